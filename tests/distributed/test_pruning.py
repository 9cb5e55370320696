"""HomoDistil at any ranks and ZeRO stages: scores, masks, and cuts in flight."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import joined_shards, lab_of
from equal_runs import difference, write_random, zero
from slow_cases import slow
from tiny_runs import NO_DROPOUT, bert, llama, run_in, shape_of, write_text
from transformers import PreTrainedModel
from whole_run import records, weights

from megakd.engine.sharding import full_shape
from megakd.methods import run_method
from megakd.methods.homodistil import strategy as pruning
from megakd.training.checkpoint import steps_in


def prune(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the weights and every selection.

    alive: the number of models that are still in memory afterwards.
    """
    before = models_in_memory()
    notes, sensitivities = [], []
    select, update = pruning.select, pruning.PruningStrategy.before_update

    def selecting(scores, kept, wanted, student):
        chosen = select(scores, kept, wanted, student)
        units = {group: list(places) for group, places in chosen.items()}
        notes.append({"scores": scores.clone(), "kept": units, "wanted": wanted})
        return chosen

    def updating(self, step, student):
        if len(sensitivities) < 2:
            sensitivities.append(whole_sensitivities(student))
        update(self, step, student)

    with (
        patch.object(pruning, "select", selecting),
        patch.object(pruning.PruningStrategy, "before_update", updating),
        lab_of(config_path, overrides, writes=True) as lab,
    ):
        result = run_method(lab.config.method, lab)
    facts = {
        "state": weights(result.folder),
        "notes": notes,
        "sensitivities": sensitivities,
        "stages": [result.name for result in lab.results],
    }
    del lab, result
    return {**facts, "alive": models_in_memory() - before}


def whole_sensitivities(student) -> dict[str, torch.Tensor]:
    """|weight * gradient| of every weight, put together of all ranks' shards."""
    joined = joined_shards(student)
    shapes = {name: full_shape(p) for name, p in student.student.named_parameters()}
    return {
        name: (both[0] * both[1]).abs().view(shapes[name]).double() for name, both in joined.items()
    }


def models_in_memory() -> int:
    gc.collect()
    return sum(isinstance(one, PreTrainedModel) for one in gc.get_objects())


SIZES = {"vocab_size": 320, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2}
DECODERS = ("llama", "headed")
METHOD = {"name": "homodistil", "target_width": 12, "cuts": 2, "pruning_end": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a BERT and a Llama with random weights, once with and once without dropout."""
    folder = tmp_path_factory.mktemp("pruning")
    return write_random(
        folder,
        write_text(folder / "text.txt", documents=120),
        bert=shape_of(bert(2, 24, **SIZES, **NO_DROPOUT)),
        dropout=shape_of(bert(2, 24, **SIZES)),
        llama=shape_of(llama(2, 24, **GROUPED)),
        headed=shape_of(llama(1, 24, **{**GROUPED, "vocab_size": 1000})),
    )


ROWS = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
TRAIN = {**ROWS, "max_steps": 8, "adam_epsilon": 0.01, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def config_of(folder, tmp_path_factory):
    """A config in a folder of its own: `config_of(model, ZeRO stage, options, train=...)`."""

    def written(name="bert", stage=0, method=None, train=None, **sections) -> Path:
        is_llama = name in DECODERS
        sizes = {"target_width": 16, "round_to": 8} if is_llama else {}
        return run_in(
            tmp_path_factory.mktemp(name),
            {"type": "causal_lm" if is_llama else "mlm", "dataset": str(folder / "text.txt")},
            teacher={"model": str(folder / name)},
            student={"model": "from_teacher", "deepspeed": zero(stage)},
            method=METHOD | sizes | (method or {}),
            train=TRAIN | (train or {}),
            **sections,
        )

    return written


@pytest.fixture(scope="module")
def pruned(workers):
    return lambda path, ranks=2: workers(ranks).run("test_pruning.prune", str(path), [])


SLOW = [("bert", 0), ("bert", 2), ("bert", 3), ("llama", 1)]
TWO_RANKS = {"per_device_train_batch_size": 6}


@pytest.fixture(scope="module")
def alone(pruned, config_of) -> Callable[[str], dict]:
    """By model: one rank at ZeRO 0 that never cuts, with the batch of two ranks."""
    return functools.cache(lambda name: pruned(config_of(name, 0, {"cuts": 0}, TWO_RANKS), 1)[0])


def assert_same(result: dict, reference: dict, *, tolerance=1e-5) -> None:
    assert [n["wanted"] for n in result["notes"]] == [n["wanted"] for n in reference["notes"]]
    torch.testing.assert_close(result["state"], reference["state"], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize(("name", "stage"), [("llama", 3), *slow(*SLOW)])
def test_two_ranks_with_cuts_end_as_one_rank_that_only_masks_and_leave_no_engine_in_memory(
    pruned, config_of, alone, name, stage
):
    both = pruned(config_of(name, stage))

    assert both[0]["stages"] == ["pruning-1", "pruning-2", "student"]
    assert_same(both[0], alone(name))
    assert [n["kept"] for n in both[0]["notes"]] == [n["kept"] for n in both[1]["notes"]]
    first, reference = both[0]["notes"][0], alone(name)["notes"][0]
    torch.testing.assert_close(first["scores"], reference["scores"], rtol=1e-5, atol=1e-9)
    assert first["kept"] == reference["kept"]
    assert [rank["alive"] for rank in both] == [0, 0]


@pytest.mark.slow
def test_a_rank_that_holds_the_output_matrix_alone_takes_part_in_a_cut(pruned, config_of):
    three_ranks = {"per_device_train_batch_size": 9}
    reference = pruned(config_of("headed", 0, {"cuts": 0}, three_ranks), 1)[0]

    three = pruned(config_of("headed", 1), 3)

    assert three[0]["stages"] == ["pruning-1", "pruning-2", "student"]
    assert_same(three[0], reference)


@pytest.mark.slow
def test_scores_are_the_sums_of_whole_matrices(pruned, config_of):
    result = pruned(config_of("bert", 3))[0]

    # Units are first ranked after the first step, whose sensitivities are 1 - beta of the average.
    reference = reference_scores(result["sensitivities"][0]) * (1 - pruning.BETA)
    torch.testing.assert_close(result["notes"][0]["scores"], reference, rtol=1e-5, atol=1e-9)


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
    result = [width]
    for layer in layers:
        attention = f"{layer}.attention.self"
        result += [rows[f"{attention}.query.weight"] + rows[f"{attention}.key.weight"]]
        result += [rows[f"{attention}.value.weight"], rows[f"{layer}.intermediate.dense.weight"]]
    return torch.cat(result)


# (model, ZeRO stage, bf16, largest difference): dropout draws the same after a cut, and a student
# in bf16 keeps its fp32 weights.
CUTS = [("bert", 2, True, 2e-2), *slow(("dropout", 3, False, 1e-5))]


@pytest.mark.parametrize(("name", "stage", "bf16", "tolerance"), CUTS)
def test_a_cut_changes_nothing_of_what_follows(pruned, config_of, name, stage, bf16, tolerance):
    without, with_cuts = (
        pruned(config_of(name, stage, {"cuts": cuts}, train={"bf16": bf16}))[0] for cuts in (0, 2)
    )

    assert len(with_cuts["stages"]) > len(without["stages"]) == 1
    assert_same(with_cuts, without, tolerance=tolerance)


DISTILLATION = [
    {"loss": "soft_target_kl"},
    {"loss": "hidden_mse", "projection": "identity"},
    {"loss": "attention_mse"},
    {"loss": "embedding_mse", "projection": "identity"},
]


@pytest.mark.slow
def test_at_step_0_no_term_separates_the_student_from_its_teacher(pruned, config_of):
    sections = {"objective": DISTILLATION, "log": {"logging_steps": 1}, "train": {"max_steps": 2}}
    config = config_of("bert", 3, {"cuts": 0, "pruning_end": 2}, **sections)

    result = pruned(config)[0]

    assert all(values.count_nonzero() == 0 for values in result["sensitivities"][0].values())
    logged = records(config.parent / "out", "student")
    first = next(record for record in logged if "train/loss" in record)
    assert [first[f"train/{term['loss']}"] for term in DISTILLATION] == [0.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_killed_within_a_window_ends_with_the_same_weights(command, launch, config_of, stage):
    whole = config_of("dropout", stage)
    killed = config_of("dropout", stage, save={"save_steps": 1}, log={"logging_steps": 1})
    folder = killed.parent / "out" / "checkpoints" / "pruning-2"

    command("--config", str(whole), code=0)
    first = launch("--config", str(killed))
    assert first.wait_until(lambda: bool(steps_in(folder))), first.text
    first.kill()
    second = command("--config", str(killed), code=0)

    # The kill may come late, in the window after it.
    assert re.search("(pruning-2|student): resumed at step", second.text)
    outs = (config.parent / "out" for config in (whole, killed))
    assert difference(*(weights(out / "final") for out in outs)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(1, 0), (4, 3)])
def test_a_window_goes_on_with_other_ranks(goes_on, config_of, world, zero):
    outs = goes_on(config_of("bert", 2), "pruning-2/step-5", world=world, zero=zero)

    assert difference(*(weights(out / "final") for out in outs)) < 1e-5
