"""HomoDistil at any ranks and ZeRO stages: scores, masks, and cuts in flight."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import config_tree, save_tokenizer, write_config, write_text
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SIZES = {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
METHOD = {"name": "homodistil", "target_width": 12, "cuts": 2, "pruning_end": 6, "pruning_start": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a BERT and a Llama with random weights, once with and once without dropout."""
    folder = tmp_path_factory.mktemp("pruning")
    text = write_text(folder / "text.txt", documents=120)
    torch.manual_seed(0)
    models = {
        "bert": BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "dropout": BertConfig(**SIZES),
        "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    }
    for name, config in models.items():
        auto = AutoModelForCausalLM if name == "llama" else AutoModelForMaskedLM
        model = auto.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        kind = "bpe" if name == "llama" else "wordpiece"
        save_tokenizer(folder / name, text.read_text().split("\n\n"), kind=kind)
    return folder


def config_of(folder: Path, out: Path, name: str = "bert", *, zero=0, **sections) -> Path:
    kind = "causal_lm" if name == "llama" else "mlm"
    method = {**METHOD, **sections.pop("method", {})}
    if name == "llama":
        method |= {"target_width": 16, "round_to": 8}
    preset = ZERO3 if zero == 3 else f"zero{zero}"
    tree = config_tree(
        out / "out",
        {"type": kind, "dataset": str(folder / "text.txt")},
        teacher={"model": str(folder / name)},
        method=method,
        train={
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_steps": 8,
            "learning_rate": 0.01,
            "adam_epsilon": 0.01,
            "weight_decay": 0.01,
        },
    )
    tree["student"] = {"model": "from_teacher", "deepspeed": preset}
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section}
    return write_config(out / "run.yaml", tree)


@pytest.fixture(scope="module")
def alone(workers, folder, tmp_path_factory) -> dict:
    """By model: one rank at ZeRO 0 that never cuts, with the batch of two ranks."""
    found = {}
    for name in ("bert", "llama"):
        train = {"per_device_train_batch_size": 6}
        path = config_of(folder, tmp_path_factory.mktemp(name), name, train=train)
        found[name] = workers(1).run("pruning_cases.prune", str(path), ["method.cuts=0"])[0]
    return found


def assert_same(found: dict, reference: dict, *, tolerance=1e-5) -> None:
    assert [n["wanted"] for n in found["notes"]] == [n["wanted"] for n in reference["notes"]]
    assert found["state"].keys() == reference["state"].keys()
    for name, weight in reference["state"].items():
        torch.testing.assert_close(
            found["state"][name], weight, atol=tolerance, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_ranks_with_cuts_end_as_one_rank_that_only_masks(
    workers, folder, tmp_path, alone, name, zero
):
    path = config_of(folder, tmp_path, name, zero=zero)

    both = workers(2).run("pruning_cases.prune", str(path), [])

    assert both[0]["stages"] == ["pruning-1", "pruning-2", "student"]
    assert_same(both[0], alone[name])
    assert [n["kept"] for n in both[0]["notes"]] == [n["kept"] for n in both[1]["notes"]]
    first, reference = both[0]["notes"][0], alone[name]["notes"][0]
    torch.testing.assert_close(first["scores"], reference["scores"], rtol=1e-5, atol=1e-9)
    assert first["kept"] == reference["kept"]


@pytest.mark.parametrize("score", ["platon", "magnitude", "random"])
def test_other_scores_do_not_depend_on_ranks_or_cuts(workers, folder, tmp_path, score):
    one = config_of(
        folder, tmp_path / "one", method={"score": score}, train={"per_device_train_batch_size": 6}
    )
    two = config_of(folder, tmp_path / "two", zero=2, method={"score": score})

    alone = workers(1).run("pruning_cases.prune", str(one), ["method.cuts=2"])[0]
    both = workers(2).run("pruning_cases.prune", str(two), [])[0]

    assert_same(both, alone)


@pytest.mark.parametrize("zero", [0, 3])
def test_scores_are_the_sums_of_whole_matrices(workers, folder, tmp_path, zero):
    path = config_of(folder, tmp_path, zero=zero, method={"sensitivity_beta": 0.0})

    found = workers(2).run("pruning_cases.prune", str(path), [])[0]

    # beta 0: the sensitivities of the very step after which the first units go.
    reference = reference_scores(found["sensitivities"][0])
    torch.testing.assert_close(found["notes"][0]["scores"], reference, rtol=1e-5, atol=1e-9)


def reference_scores(sensitivities: dict) -> torch.Tensor:
    """The scores in the order of the groups, from whole matrices and by name."""
    layers = [f"bert.encoder.layer.{n}" for n in range(2)]
    rows = {name: value.sum(1) for name, value in sensitivities.items() if value.dim() == 2}
    embeddings = ("word", "position", "token_type")
    tables = [f"bert.embeddings.{kind}_embeddings.weight" for kind in embeddings]
    width = sum(sensitivities[name].sum(0) for name in tables)
    width = width + sum(
        rows[f"{layer}.{part}.dense.weight"]
        for layer in layers
        for part in ("attention.output", "output")
    )
    found = [width]
    for layer in layers:
        own = f"{layer}.attention.self"
        found += [rows[f"{own}.query.weight"] + rows[f"{own}.key.weight"]]
        found += [rows[f"{own}.value.weight"], rows[f"{layer}.intermediate.dense.weight"]]
    return torch.cat(found)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_cut_changes_nothing_of_what_follows_with_dropout(workers, folder, tmp_path, zero):
    masked = config_of(folder, tmp_path / "masked", "dropout", zero=zero)
    cut = config_of(folder, tmp_path / "cut", "dropout", zero=zero)

    without = workers(2).run("pruning_cases.prune", str(masked), ["method.cuts=0"])[0]
    with_cuts = workers(2).run("pruning_cases.prune", str(cut), ["method.cuts=3"])[0]

    assert len(with_cuts["stages"]) > len(without["stages"]) == 1
    assert_same(with_cuts, without)


@pytest.mark.parametrize("zero", [0, 2])
def test_bf16_students_keep_their_fp32_weights_across_cuts(workers, folder, tmp_path, zero):
    masked, cut = (
        config_of(folder, tmp_path / kind, zero=zero, train={"bf16": True})
        for kind in ("masked", "cut")
    )

    without = workers(2).run("pruning_cases.prune", str(masked), ["method.cuts=0"])[0]
    with_cuts = workers(2).run("pruning_cases.prune", str(cut), ["method.cuts=2"])[0]

    assert_same(with_cuts, without, tolerance=2e-2)


DISTILLATION = [
    {"loss": "soft_target_kl"},
    {"loss": "hidden_mse", "projection": "identity"},
    {"loss": "attention_mse"},
    {"loss": "embedding_mse", "projection": "identity"},
]


@pytest.mark.parametrize("zero", [0, 3])
def test_at_step_0_no_term_separates_the_student_from_its_teacher(workers, folder, tmp_path, zero):
    path = config_of(folder, tmp_path, zero=zero, method={"cuts": 0})
    tree = json.loads(path.read_text())
    write_config(path, {**tree, "objective": DISTILLATION, "log": {"logging_steps": 1}})

    found = workers(2).run("pruning_cases.prune", str(path), [])[0]

    assert all(values.count_nonzero() == 0 for values in found["sensitivities"][0].values())
    first = found["logged"][0]
    assert [first[f"train/{term['loss']}"] for term in DISTILLATION] == [0.0] * 4


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_killed_within_a_window_ends_with_the_same_weights(launch, folder, tmp_path, zero):
    settings = {"save": {"save_steps": 1}, "log": {"logging_steps": 1}}
    whole, killed = (
        config_of(folder, tmp_path / kind, "dropout", zero=zero, **settings)
        for kind in ("whole", "killed")
    )
    checkpoints = tmp_path / "killed" / "out" / "checkpoints" / "pruning-2"

    assert launch("--config", str(whole)).wait() == [0, 0]
    first = launch("--config", str(killed))
    assert first.wait_until((checkpoints / "latest").exists), first.text
    first.kill()
    second = launch("--config", str(killed))

    assert second.wait() == [0, 0], second.text
    # The kill may come late, in the window after it.
    assert re.search("(pruning-2|student): resumed at step", second.text)
    one, other = (
        load_file(tmp_path / kind / "out" / "final" / "model.safetensors")
        for kind in ("whole", "killed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_no_engine_of_a_finished_window_stays_in_memory(workers, folder, tmp_path, zero):
    path = config_of(folder, tmp_path, zero=zero)

    assert workers(2).run("pruning_cases.alive_after", str(path)) == [0, 0]
