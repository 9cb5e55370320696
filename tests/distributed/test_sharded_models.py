"""Models that ZeRO 3 shards on two ranks: loaded, read out, gathered and set."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from equal_runs import ZERO3
from safetensors.torch import load_file, save_file
from tiny_runs import bert, llama, shape_of
from transformers import AutoModelForCausalLM

from megakd.config.sections import ScratchModel
from megakd.config.task import TaskConfig
from megakd.engine.sharding import gathered, gathered_state, is_sharded, set_values
from megakd.errors import ModelError
from megakd.models.loading import load_model, resolve_model

ZERO3_OFFLOAD = {
    "zero_optimization": {**ZERO3["zero_optimization"], "offload_param": {"device": "cpu"}}
}


def load(spec, kind, ds, **changes):
    task = TaskConfig(type=kind, dataset="d", max_length=32)
    source = resolve_model(spec, task, where="teacher.model")
    facts = {
        "label_names": ("a", "b", "c") if kind == "classification" else (),
        "tokenizer_size": 300,
        "dtype": torch.float32,
        "seed": 7,
        "need_head": source.folder is not None,
    }
    return load_model(source, task=task, ds=ds, **{**facts, **changes})


def states(folder):
    results = {}
    for name, ds in (("sharded", ZERO3), ("offloaded", ZERO3_OFFLOAD)):
        loaded = load(folder, "causal_lm", ds)
        results[f"loaded/{name}"] = dict(gathered_state(loaded))
        results[f"is_sharded/{name}"] = is_sharded(loaded)
    model = load(folder, "causal_lm", ZERO3)
    results["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    sizes = ((parameter.ds_tensor.numel(), parameter.ds_numel) for parameter in model.parameters())
    results["shards"] = tuple(map(sum, zip(*sizes, strict=True)))
    half = load(folder, "causal_lm", ZERO3, dtype=torch.bfloat16)
    results["dtypes"] = {parameter.dtype for parameter in half.parameters()}
    results["rotary"] = half.model.rotary_emb.inv_freq
    return results


def opening(folder):
    """Return the effect of `gathered` on tied, open and modified parameters."""
    model = load(folder, "causal_lm", ZERO3)
    weight, norm = model.model.embed_tokens.weight, model.model.norm.weight
    results = {"closed": weight.numel()}
    with gathered([weight, model.lm_head.weight]):
        results["open"] = tuple(weight.shape)
        with gathered([weight, norm]):
            results["inner"] = (weight.numel(), norm.numel())
        results["after inner"] = (tuple(weight.shape), norm.numel())
    with gathered([norm], modify=True), torch.no_grad():
        norm.fill_(10.0 + dist.get_rank())
    with gathered([norm]):
        results["modified"] = norm.detach().clone()
    set_values(norm, torch.arange)
    with gathered([norm]):
        results["set closed"] = norm.detach().clone()
    return results


def of_other_files(folder, output):
    """Return the error of ranks whose folders hold other weights of the same shapes."""
    copied = Path(output) / f"model-{dist.get_rank()}"
    shutil.copytree(folder, copied)
    if dist.get_rank():
        weights = load_file(copied / "model.safetensors")
        scaled = {name: 1.01 * value for name, value in weights.items()}
        save_file(scaled, copied / "model.safetensors", metadata={"format": "pt"})
    try:
        load(str(copied), "causal_lm", ZERO3)
    except ModelError as error:
        return {"other files": str(error)}
    return {"other files": ""}


def sent_to_load(folder):
    """Return the number of collectives of tensors that it takes to load and to draw a model."""
    comm, count = partition_parameters.dist, []
    names = ("broadcast", "all_gather_into_tensor", "allgather_fn", "all_gather")
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(
                patch.object(comm, name, lambda *_, **__: count.append(1), create=True)
            )
        load(folder, "causal_lm", ZERO3)
        load(ScratchModel(**bert(2)), "classification", ZERO3)
    return {"sent": len(count)}


def everything(folder, output):
    results = {**states(folder), **opening(folder)}
    return results | of_other_files(folder, output) | sent_to_load(folder)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    config = shape_of(llama(2), vocab_size=300, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(workers, llama_folder, tmp_path_factory):
    folders = str(llama_folder), str(tmp_path_factory.mktemp("ranks"))
    return workers(2).run("test_sharded_models.everything", *folders)


@pytest.mark.parametrize("how", ["sharded", "offloaded"])
def test_loaded_weights_are_read_out_whole_on_the_first_rank_as_they_are_in_the_file(
    ranks, llama_folder, how
):
    state, others = (rank[f"loaded/{how}"] for rank in ranks)

    stored = load_file(llama_folder / "model.safetensors")
    assert state.keys() == others.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert all(value.numel() == 0 for value in others.values())
    # Each rank holds half, and a tied head once.
    total = sum(value.numel() for value in stored.values())
    assert [rank["shards"] for rank in ranks] == [(total // 2, total)] * 2
    assert ranks[0]["tied"]
    assert ranks[0][f"is_sharded/{how}"]


def test_a_sharded_bf16_model_keeps_its_rotary_tables_in_fp32(ranks, llama_folder):
    reference = AutoModelForCausalLM.from_pretrained(llama_folder).model.rotary_emb.inv_freq

    assert ranks[0]["dtypes"] == {torch.bfloat16}
    assert torch.equal(ranks[0]["rotary"], reference)


def test_opening_leaves_what_is_open_to_its_owner_and_sends_what_rank_0_writes_to_all(ranks):
    for rank in ranks:
        assert rank["closed"] == 0
        assert rank["open"] == (300, 16)
        assert rank["inner"] == (300 * 16, 16)
        assert rank["after inner"] == ((300, 16), 0)
        assert torch.equal(rank["modified"], torch.full((16,), 10.0))
        # Each rank has set its part of the values.
        assert torch.equal(rank["set closed"], torch.arange(16.0))


def test_weights_are_loaded_and_drawn_without_sending_any(ranks):
    assert [rank["sent"] for rank in ranks] == [0, 0]


def test_ranks_that_would_read_other_weights_are_told(ranks):
    for rank in ranks:
        assert re.match(
            r"teacher.model: \S+ holds other weights for rank 1 on \S+ than for rank 0 on ",
            rank["other files"],
        )
