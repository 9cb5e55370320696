import json
import os
import re
from pathlib import Path

import pytest
import torch
from forked_ranks import start_rank
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from megakd.config.models import ScratchModel
from megakd.config.task import TaskConfig
from megakd.engine.distributed import free_port
from megakd.engine.sharding import (
    gathered,
    gathered_state,
    is_sharded,
    sharded_construction,
    writes_here,
)
from megakd.models.loading import load_model, resolve_model

PROGRAM = Path(__file__).with_name("sharding_ranks.py")
# A start takes seconds; many times that on a busy machine.
TIMEOUT_S = 240
SIZES = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
BERT = {"model_type": "bert", **SIZES}


def tiny_llama():
    return LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(tiny_llama()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(llama_folder, tmp_path_factory):
    """The results of both ranks, from one start."""
    output = tmp_path_factory.mktemp("ranks")
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    logs = [output / f"log{rank}.txt" for rank in range(2)]
    started = [
        start_rank(
            [str(PROGRAM), str(llama_folder), json.dumps(BERT), str(output)],
            variables={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=log,
        )
        for rank, log in enumerate(logs)
    ]
    for rank in started:
        rank.join(TIMEOUT_S)
    codes = [rank.exitcode for rank in started]
    for rank in started:
        rank.kill()
        rank.join()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("how", ["sharded", "offloaded", "plain"])
def test_loaded_weights_read_out_whole_are_those_of_the_file(ranks, llama_folder, how):
    state = ranks[0][f"loaded/{how}"]

    stored = load_file(llama_folder / "model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert ranks[0][f"is_sharded/{how}"] == (how != "plain")


@pytest.mark.parametrize("how", ["sharded", "offloaded", "plain"])
def test_first_values_are_those_of_one_process_without_sharding(ranks, how):
    task = TaskConfig(type="classification", dataset="d", max_length=32)
    source = resolve_model(ScratchModel(config=BERT), task, where="student.model")
    alone = load_model(
        source,
        task=task,
        label_names=("a", "b", "c"),
        tokenizer_size=300,
        ds=None,
        dtype=torch.float32,
        seed=7,
        need_head=False,
    ).state_dict()

    state = ranks[0][f"scratch/{how}"]

    assert state.keys() == alone.keys()
    assert all(torch.equal(state[name], alone[name]) for name in alone)


def test_the_other_rank_reads_nothing_out_but_takes_part(ranks):
    state = ranks[1]["loaded/sharded"]

    assert state.keys() == ranks[0]["loaded/sharded"].keys()
    assert all(value.numel() == 0 for value in state.values())


def test_each_rank_holds_half_and_a_tied_head_once(ranks, llama_folder):
    total = sum(value.numel() for value in load_file(llama_folder / "model.safetensors").values())

    assert [rank["shards"] for rank in ranks] == [(total // 2, total)] * 2
    assert ranks[0]["tied"]


def test_a_sharded_bf16_model_keeps_its_rotary_tables_in_fp32(ranks, llama_folder):
    reference = AutoModelForCausalLM.from_pretrained(llama_folder).model.rotary_emb.inv_freq

    assert ranks[0]["dtypes"] == {torch.bfloat16}
    assert torch.equal(ranks[0]["rotary"], reference)


def test_loading_one_model_never_changes_how_the_next_loads(ranks):
    expected = {
        "plain after sharded": False,
        "plain under the switch": False,
        "switch still set": True,
        "sharded after plain": True,
        "switch unset": True,
    }

    assert [{key: rank[key] for key in expected} for rank in ranks] == [expected, expected]


def test_a_sharded_teacher_answers_as_transformers_loads_it(ranks, llama_folder):
    reference = AutoModelForCausalLM.from_pretrained(llama_folder)
    expected = reference(torch.arange(2, 26).reshape(2, 12)).logits

    torch.testing.assert_close(ranks[0]["logits"], expected, rtol=0, atol=1e-6)
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])


def test_opening_leaves_what_is_open_to_its_owner(ranks):
    result = ranks[1]

    assert result["closed"] == 0
    assert result["open"] == (300, 16)
    assert result["inner"] == (300 * 16, 16)
    assert result["after inner"] == ((300, 16), 0)
    assert torch.equal(result["plain"], torch.ones(3))


def test_what_rank_0_writes_goes_to_all_ranks_and_each_rank_sets_its_part_of_values(ranks):
    for rank in ranks:
        assert torch.equal(rank["modified"], torch.full((16,), 10.0))
        assert torch.equal(rank["set closed"], torch.arange(16.0))


def test_weights_are_loaded_and_drawn_without_sending_any(ranks):
    assert [rank["sent"] for rank in ranks] == [0, 0]


def test_ranks_that_would_read_other_weights_are_told(ranks):
    for rank in ranks:
        assert re.match(
            r"teacher.model: \S+ holds other weights for rank 1 on \S+ than for rank 0 on ",
            rank["other files"],
        )


# One process, nothing sharded: everything is a formality that must not get in the way.


def test_plain_models_are_read_out_with_ties_once_and_copied():
    model = AutoModelForCausalLM.from_config(tiny_llama())

    state = dict(gathered_state(model))

    assert not is_sharded(model)
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(state[name], parameter)
    assert state[name].data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("modify", [False, True])
def test_opening_plain_parameters_does_nothing(modify):
    parameter = torch.nn.Parameter(torch.zeros(2))

    with gathered([parameter], modify=modify), torch.no_grad():
        parameter.add_(1.0)

    assert torch.equal(parameter, torch.ones(2))
    assert writes_here(parameter)


@pytest.mark.parametrize("ds", [None, {}, {"zero_optimization": {"stage": 2}}])
def test_modules_built_for_other_stages_are_plain(ds):
    with sharded_construction(ds, torch.float32):
        module = torch.nn.Linear(2, 2)

    assert not is_sharded(module)
