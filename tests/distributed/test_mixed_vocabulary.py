"""Mixed vocabularies at any ranks and ZeRO stages against training in plain PyTorch."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import lab_of, summed
from equal_runs import in_parts, write_random, zero
from mixed_reference import Pair, trained
from safetensors.torch import load_file
from slow_cases import slow
from tiny_runs import NO_DROPOUT, bert, run_in, shape_of
from transformers import AutoTokenizer

from megakd.engine.sharding import gathered_state
from megakd.methods import run_method
from megakd.methods.mixed_vocabulary.parameter_projections import LayerErrors
from megakd.models.second_vocabulary import FILE
from megakd.training import stage_run
from megakd.training.trainer import Trainer


def learn(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return by stage: initial weights, batches, gradients and final weights."""
    notes: dict[str, dict[str, Any]] = {}
    build, step = stage_run.student_engine, Trainer.train_step

    def building(assembly, stage):
        engine, bundle = build(assembly, stage)
        notes[stage.name] = {"initial": dict(gathered_state(bundle)), "batches": [], "parts": []}
        return engine, bundle

    def stepping(self, batches):
        here = list(notes.values())[-1]
        here["batches"].append(list(batches))
        report = step(self, batches)
        here["parts"].append(summed(report.parts))
        return report

    with (
        patch.object(stage_run, "student_engine", building),
        patch.object(Trainer, "train_step", stepping),
        lab_of(config_path, overrides, writes=True) as lab,
    ):
        run_method(lab.config.method, lab)
    for result in lab.results:
        notes[result.name]["final"] = folder_weights(result.folder)
    return notes


def folder_weights(folder: Path) -> dict[str, Any]:
    collected = {}
    for file in sorted(folder.rglob("*.safetensors")):
        below = file.relative_to(folder)
        place = below.with_suffix("") if file.name == FILE else below.parent
        collected |= {str(place / name): weight for name, weight in load_file(file).items()}
    return collected


def open_layers(config_path: str, overrides: list[str]) -> list[int]:
    """Run the method; return how many compared layers are gathered whenever a layer is compared."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    counts: list[int] = []
    known: dict[int, LayerErrors] = {}
    forward = LayerErrors.forward

    def is_gathered(place) -> bool:
        weight = place.module._parameters.get(place.name)
        return getattr(weight, "ds_status", None) == ZeroParamStatus.AVAILABLE

    def comparing(self):
        known[id(self)] = self
        result = forward(self)
        counts.append(
            sum(
                any(is_gathered(place) for pair in layer._compared for place in pair[:2])
                for layer in known.values()
            )
        )
        return result

    with patch.object(LayerErrors, "forward", comparing):
        learn(config_path, overrides)
    return counts


PADS = {"pad_token_id": 0, **NO_DROPOUT}
TEACHER = bert(2, 24, num_attention_heads=4, intermediate_size=40, **PADS)
STUDENT = bert(2, 12, intermediate_size=20, **PADS)
PIECES = 100
TRAIN = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 0.01,
    "adam_epsilon": 0.01,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a teacher with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(150)]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 30))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return write_random(folder, folder / "text.txt", teacher=shape_of(TEACHER, vocab_size=320))


def config_of(folder: Path, out: Path, *, stage=0, train=None, **method) -> str:
    config = run_in(
        out,
        {"type": "mlm", "dataset": str(folder / "text.txt"), "max_length": 24},
        teacher={"model": str(folder / "teacher")},
        student={"model": STUDENT, "deepspeed": zero(stage)},
        method={"name": "mixed_vocabulary", "student_vocabulary": PIECES, **method},
        train={**TRAIN, **(train or {})},
    )
    return str(config)


METHODS = {
    "down": {"projections": "down"},
    "up": {"projections": "up", "teacher_learning_rate": 0.002},
    "dual": {"projections": "dual"},
    "words": {"projections": "down", "p": 0.0, "epsilon": 500.0},
}


@pytest.fixture(scope="module")
def alone(workers, folder, tmp_path_factory) -> Callable[[str], dict]:
    """By method: one rank at ZeRO 0 with the batch of two ranks."""

    @functools.cache
    def learned(name: str) -> dict:
        train = {"per_device_train_batch_size": 6}
        path = config_of(folder, tmp_path_factory.mktemp(name), train=train, **METHODS[name])
        return workers(1).run("test_mixed_vocabulary.learn", path, [])[0]

    return learned


def reference_of(folder: Path, notes: dict, method: dict) -> tuple[Pair, list[dict]]:
    """Return the models and the losses of every step of plain PyTorch on the same batches."""
    offset = len(AutoTokenizer.from_pretrained(folder / "teacher"))
    assert offset < 320  # the teacher's table has further rows, as tables with padding have
    roles = {
        "student": shape_of(STUDENT, vocab_size=PIECES),
        "teacher": shape_of(TEACHER, vocab_size=320),
    }
    pair = Pair(notes["initial"], roles, {**method, "offset": offset})
    train = dict(TRAIN)
    if "teacher_learning_rate" in method:
        train["teacher_factor"] = method["teacher_learning_rate"] / TRAIN["learning_rate"]
    return pair, trained(pair, notes["batches"], train, learners=[*roles])


def assert_same(actual: dict, expected: dict) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["up", "words", *slow("down", "dual")])
def test_one_rank_learns_as_plain_pytorch_does(folder, alone, name):
    notes, method = alone(name)["student"], METHODS[name]

    pair, losses = reference_of(folder, notes, method)

    names = {
        "hard_cross_entropy": "student",
        "teacher/hard_cross_entropy": "teacher",
        "parameter_projection": "projection",
    }
    for parts, expected in zip(notes["parts"], losses, strict=True):
        actual = {names[name]: value for name, value in parts.items() if name in names}
        assert actual == pytest.approx(expected, rel=1e-5)
    assert_same(notes["final"], pair.weights())


@pytest.mark.slow
def test_two_vocabularies_go_on_with_other_ranks(goes_on, folder, tmp_path):
    """Two learners with a rate each, and shared projections."""
    config = config_of(folder, tmp_path, stage=2, **METHODS["up"])

    outs = goes_on(config, "student/step-2", zero=3)

    assert_same(*(folder_weights(out / "stages" / "student") for out in outs))


SLOW = [("down", 0), ("up", 1), ("dual", 2), ("down", 3), ("dual", 3), ("words", 3)]


@pytest.mark.parametrize(("name", "stage"), [("up", 3), *slow(*SLOW)])
def test_two_ranks_end_as_one_rank(workers, folder, tmp_path, alone, name, stage):
    path = config_of(folder, tmp_path, stage=stage, **METHODS[name])

    both = workers(2).run("test_mixed_vocabulary.learn", path, [])[0]

    one = alone(name)
    assert both.keys() == one.keys()
    for part, notes in both.items():
        assert_same(notes["final"], one[part]["final"])
        for actual, expected in zip(notes["parts"], one[part]["parts"], strict=True):
            assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_zero_3_gathers_one_layer_of_each_model_at_a_time(workers, folder, tmp_path):
    path = config_of(folder, tmp_path, projections="down", p=0.0)
    # Without a prefetch; weights of tiny models would be kept from the forward to their comparison.
    override = f"student.deepspeed={json.dumps(in_parts(0))}"

    result = workers(2).run("test_mixed_vocabulary.open_layers", path, [override])[0]

    # 4 steps of 2 micro-batches, each with both layers.
    assert result == [1] * 16
