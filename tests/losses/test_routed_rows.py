"""Rows that name their teachers: a step is the sum of the rows' losses with their own teachers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_terms import term_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch, Losses, teacher_number
from megakd.contract.stage import Pass
from megakd.contract.unit_counts import count_units
from megakd.contract.views import Heads, Shape
from megakd.data.collation import Collator, with_parts
from megakd.data.masking import Masking
from megakd.data.step_layout import StepLayout, StepShape, collate_step
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective
from megakd.models.knowledge import Needs
from megakd.teachers.frozen import FrozenModel

NAMES = ("math", "code", "chat")
NUMBERS = {name: teacher_number(name) for name in NAMES}
TOKENS, CLASSES, LONGEST = 40, 3, 16
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.4,
    "vocab_size": TOKENS,
}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TERMS: tuple[Any, ...] = (
    term_of("soft_target_kl", temperature=2.0),
    term_of("soft_target_jsd", weight=0.5),
    term_of("hard_cross_entropy", weight=0.25),
    term_of("hidden_mse", weight=0.3),
    term_of("relation_kl", weight=0.2),
)
ROUTES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)


def model(task: str, *, layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    if task == "causal_lm":
        made = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **SIZES)
        )
    else:
        config = BertConfig(num_hidden_layers=layers, num_labels=CLASSES, **SIZES, **PLAIN)
        kind = BertForMaskedLM if task == "mlm" else BertForSequenceClassification
        made = kind(config)
    return made.eval()


class Scene:
    """A student, three teachers, and rows that name them."""

    def __init__(self, task: str) -> None:
        self.task = task
        classes = CLASSES if task == "classification" else TOKENS
        shapes = [Shape(layers, 16, classes, Heads(2, 2, 8)) for layers in (1, 2)]
        objective = build_objective(TERMS, task, *shapes)  # type: ignore[arg-type]
        needs = Needs().with_hidden(0, 1, 2).with_attention(2)
        self.student = StudentBundle(
            {"student": model(task, layers=1, seed=0)}, objective, world_size=1
        )
        self.teachers = {
            name: FrozenModel(model(task, layers=2, seed=seed), needs=needs, label_order=None)
            for seed, name in enumerate(NAMES, start=1)
        }
        config = TaskConfig(type=task, dataset="none", max_length=LONGEST)  # type: ignore[arg-type]
        self.collate = Collator(SimpleNamespace(pad_token_id=0), config)  # type: ignore[arg-type]

    def batches(self, rows: dict[str, list[Any]], budget: int | None = None) -> list[Batch]:
        """One micro-batch, or several packed rows."""
        made = collate_step(rows, StepLayout(StepShape(9, 1), budget), self.collate)
        if self.task != "mlm":
            return list(made)
        masking = Masking(mask_id=1, special_ids=[0], vocabulary=range(2, TOKENS), probability=0.3)
        numbers = np.arange(len(rows["input_ids"]))
        return [masking(batch, numbers, seed=1, draw=0) for batch in made]

    def gradient(
        self, batches: list[Batch], passes: tuple[Pass, ...], *, rows_of: str | None = None
    ) -> tuple[dict, list[Losses]]:
        """The gradient and the losses of a step that is divided by the counts of all rows.

        Teachers read all rows; `rows_of` hides the rows of other teachers from the student.
        """
        self.student.zero_grad()
        counts = count_units(batches, self.student.counters)
        collected = []
        for batch in batches:
            asked = {p.teacher: self.teachers[p.teacher] for p in passes if p.teacher}
            with torch.no_grad():
                answer = {name: teacher.read(batch.of(name)) for name, teacher in asked.items()}
            seen = batch if rows_of is None else hidden(batch, rows_of)
            losses = self.student(seen, answer, passes, counts)
            losses.total.backward()
            collected.append(losses)
        grads = {
            n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None
        }
        return grads, collected


def hidden(batch: Batch, name: str) -> Batch:
    """The batch without labels and without valid positions in rows of other teachers."""
    assert batch.extras.routes is not None
    routed = batch.extras.routes == NUMBERS[name]
    at = routed if batch.labels.dim() == 2 else routed.any(1)
    return batch._replace(labels=batch.labels.masked_fill(~at, IGNORE), valid=routed)


def rows_of(routes: list[str], *, seed: int, task: str) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, TOKENS, size=rng.integers(2, LONGEST + 1)).tolist() for _ in routes]
    columns: dict[str, list[Any]] = {"input_ids": ids, "route": [NUMBERS[r] for r in routes]}
    if task == "causal_lm":
        columns["labels"] = [[*row[1:], IGNORE] for row in ids]
    elif task == "classification":
        columns["label"] = rng.integers(-1, CLASSES, size=len(ids)).tolist()
        columns["label"] = [IGNORE if label < 0 else label for label in columns["label"]]
    return columns


@pytest.fixture(scope="module", params=["classification", "mlm", "causal_lm"])
def scene(request) -> Scene:
    return Scene(request.param)


@pytest.fixture(scope="module")
def texts() -> Scene:
    return Scene("causal_lm")


def assert_sum_of_parts(scene: Scene, batches: list[Batch]) -> None:
    routed = [with_parts(batch, NUMBERS) for batch in batches]
    plan = tuple(Pass(teacher=name) for name in NAMES)

    actual, losses = scene.gradient(routed, plan)

    parts = [scene.gradient(batches, (Pass(teacher=n),), rows_of=n)[0] for n in NAMES]
    for name, gradient in actual.items():
        wanted = torch.stack([part[name] for part in parts if name in part]).sum(0)
        torch.testing.assert_close(gradient, wanted, rtol=2e-4, atol=2e-6)
    assert all(torch.isfinite(one.total) for one in losses)


@settings(max_examples=8, deadline=None)
@given(routes=ROUTES, seed=st.integers(0, 99))
def test_a_step_is_the_sum_of_the_rows_of_each_teacher(scene, routes, seed):
    assert_sum_of_parts(scene, scene.batches(rows_of(routes, seed=seed, task=scene.task)))


@settings(max_examples=8, deadline=None)
@given(routes=ROUTES, seed=st.integers(0, 99), budget=st.sampled_from([LONGEST, 24, 48]))
def test_packed_rows_of_several_teachers_are_the_sum_too(texts, routes, seed, budget):
    rows = rows_of(routes, seed=seed, task="causal_lm")
    assert_sum_of_parts(texts, texts.batches(rows, budget))


def test_rows_of_one_teacher_give_the_step_of_this_teacher_alone(scene):
    batches = scene.batches(rows_of(["code"] * 4, seed=3, task=scene.task))
    plan = tuple(Pass(teacher=name) for name in NAMES)

    actual, losses = scene.gradient([with_parts(batch, NUMBERS) for batch in batches], plan)

    wanted, single = scene.gradient(batches, (Pass(teacher="code"),))
    for name, gradient in wanted.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses[0].parts, single[0].parts, rtol=1e-5, atol=1e-6)


def test_a_teacher_reads_the_tokens_of_its_own_rows_alone(scene):
    rows = rows_of(["math", "code", "math", "math"], seed=5, task=scene.task)
    (batch,) = scene.batches(rows)

    parts = with_parts(batch, NUMBERS)

    code = parts.of("code")
    assert len(code.valid) == 1
    assert int(code.valid.sum()) == len(rows["input_ids"][1])
    assert code.valid.shape[1] <= max(8, -(-len(rows["input_ids"][1]) // 8) * 8)
    assert len(parts.of("math").valid) == 3
    nobody = parts.of("chat")
    assert nobody.valid.shape == (1, 8)
    assert not nobody.valid.any()
    assert parts.of("student") is parts


@settings(max_examples=25, deadline=None)
@given(routes=ROUTES, seed=st.integers(0, 99), budget=st.sampled_from([None, 96]))
def test_a_part_is_the_micro_batch_of_its_rows_alone(texts, routes, seed, budget):
    """Also the documents, which the attention of packed rows on a GPU reads."""
    rows = rows_of(routes, seed=seed, task="causal_lm")
    (batch,) = texts.batches(rows, budget)
    places = [place for place, route in enumerate(routes) if route == routes[0]]
    (wanted,) = texts.batches(
        {n: [column[i] for i in places] for n, column in rows.items()}, budget
    )

    part = with_parts(batch, NUMBERS).of(routes[0])

    assert part.documents is not None
    assert wanted.documents is not None
    assert part.documents.starts.tolist() == wanted.documents.starts.tolist()
    assert part.documents.longest == wanted.documents.longest
    assert part.labels.equal(wanted.labels)
    assert part.valid.equal(wanted.valid)
    assert part.inputs["position_ids"].equal(wanted.inputs["position_ids"])
    ids = (one.inputs["input_ids"][one.valid].tolist() for one in (part, wanted))
    assert next(ids) == next(ids)
