"""Every loss term against an independent fp64 formula, and what may not matter to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megakd.losses import Reading
from megakd.objective import Shape, build_objective, count_units, unit_weights
from megakd.stage import IGNORE, Batch, Knowledge
from megakd.terms import (
    HardCrossEntropy,
    HardMse,
    HiddenCosine,
    HiddenMse,
    SoftTargetJsd,
    SoftTargetKl,
    SoftTargetMse,
    SoftTargetReverseKl,
)

CE = HardCrossEntropy(loss="hard_cross_entropy")
KL = SoftTargetKl(loss="soft_target_kl")
KL_AT_2 = SoftTargetKl(loss="soft_target_kl", temperature=2.0)
KL_AT_2_PLAIN = SoftTargetKl(loss="soft_target_kl", temperature=2.0, t_squared=False)
REVERSE = SoftTargetReverseKl(loss="soft_target_reverse_kl", temperature=1.5)
JSD = SoftTargetJsd(loss="soft_target_jsd", beta=0.3)
HARD_MSE = HardMse(loss="hard_mse")
SOFT_MSE = SoftTargetMse(loss="soft_target_mse")
HIDDEN_MSE = HiddenMse(loss="hidden_mse", layer_mapping=("0:0", "2:4"))
HIDDEN_COSINE = HiddenCosine(loss="hidden_cosine", layer_mapping=("0:0", "2:4"))
OF_CLASSES = (CE, KL, KL_AT_2, KL_AT_2_PLAIN, REVERSE, JSD)
HIDDEN = (HIDDEN_MSE, HIDDEN_COSINE)
CASES = [
    *(("classification", term) for term in (*OF_CLASSES, *HIDDEN)),
    *(("regression", term) for term in (HARD_MSE, SOFT_MSE, *HIDDEN)),
    *(("causal_lm", term) for term in (*OF_CLASSES, *HIDDEN)),
]
COMPARING = [(task, term) for task, term in CASES if term not in (CE, HARD_MSE)]
LENGTHS = (5, 3, 4, 0)  # the last row only keeps the ranks in step
CLASSES, VOCABULARIES, WIDTHS, LAYERS = 3, (7, 9), (4, 6), (2, 4)


def named(case: Any) -> str:
    return case if isinstance(case, str) else case.loss


every_case = pytest.mark.parametrize(("task", "term"), CASES, ids=named)
every_comparing_case = pytest.mark.parametrize(("task", "term"), COMPARING, ids=named)


class Matrix:
    """A head that needs no opening."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def read(self) -> tuple[torch.Tensor, None]:
        return self.weight, None


class Scene:
    """What one term computes from, with random contents; `leaves` are what it may change."""

    def __init__(self, task: str, term: Any, *, same_widths: bool = False) -> None:
        torch.manual_seed(1)
        self.task, self.term = task, term
        ours, theirs = (WIDTHS[0],) * 2 if same_widths else WIDTHS
        self.objective = build_objective(
            (term,),
            task,  # type: ignore[arg-type]
            Shape(LAYERS[0], ours, CLASSES),
            Shape(LAYERS[1], theirs, CLASSES),
        )
        self.leaves = self.contents(0, ours)
        self.teacher = self.contents(1, theirs)
        self.valid = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
        self.labels = {
            "classification": torch.tensor([1, IGNORE, 0, IGNORE]),
            "regression": torch.tensor([0.5, math.nan, -1.0, math.nan]),
            "causal_lm": torch.randint(VOCABULARIES[0], (4, 5)).masked_fill(~self.valid, IGNORE),
        }[task]
        if task == "causal_lm":
            self.labels[0, 0] = IGNORE

    def contents(self, model: int, width: int) -> dict[str, torch.Tensor]:
        if self.task == "causal_lm":
            outputs = {
                "hidden": torch.randn(4, 5, width),
                "head": torch.randn(VOCABULARIES[model], width),
            }
        else:
            outputs = {"logits": torch.randn(4, CLASSES if self.task == "classification" else 1)}
        states = {f"state{i}": torch.randn(4, 5, width) for i in range(LAYERS[model] + 1)}
        return outputs | states

    def equal_to_teacher(self) -> Scene:
        self.leaves |= {name: self.teacher[name].clone() for name in self.leaves}
        self.leaves |= {"state2": self.teacher["state4"].clone()}
        return self

    def converted(self, dtype: torch.dtype) -> Scene:
        self.leaves = {name: value.to(dtype) for name, value in self.leaves.items()}
        self.teacher = {name: value.to(dtype) for name, value in self.teacher.items()}
        return self

    def counting(self, name: str) -> torch.Tensor:
        """Where a tensor's contents may matter to this term, by the table of units."""
        if name.startswith("state"):
            return self.valid
        has_label = ~self.labels.isnan() if self.task == "regression" else self.labels != IGNORE
        wants_label = self.task == "causal_lm" or self.term in (CE, HARD_MSE)
        return has_label if wants_label else self.valid.any(dim=1)

    def poisoned(self) -> Scene:
        for contents in (self.leaves, self.teacher):
            for name, value in contents.items():
                if name != "head":
                    value[~self.counting(name)] = math.nan
        return self

    def masked(self) -> Scene:
        nothing = math.nan if self.task == "regression" else IGNORE
        self.valid = torch.zeros_like(self.valid)
        self.labels = torch.full_like(self.labels, nothing)
        return self

    def result(self, rows: slice = slice(None), counts: torch.Tensor | None = None) -> Result:
        """Total, sums and gradients of some rows, divided by `counts` or by the scene's own."""
        leaves = {n: v.detach().clone().requires_grad_() for n, v in self.leaves.items()}
        batch = Batch({}, self.labels[rows], self.valid[rows])
        self.objective.zero_grad()
        reading = Reading(
            student=knowledge(leaves, rows),
            teacher=knowledge(self.teacher, rows),
            batch=batch,
            weights=self.objective.weights,
            per_unit=unit_weights(count_units([batch]) if counts is None else counts, 1),
        )
        total, sums = self.objective(reading)
        total.backward()
        gradients = {n: v.grad for n, v in leaves.items() if v.grad is not None}
        gradients |= {n: p.grad for n, p in self.objective.named_parameters()}
        return Result(total.detach(), sums, gradients)

    def counts(self) -> torch.Tensor:
        return count_units([Batch({}, self.labels, self.valid)])


class Result:
    def __init__(self, total: torch.Tensor, sums: dict, gradients: dict) -> None:
        self.total, self.sums, self.gradients = total, sums, gradients


def knowledge(contents: dict[str, torch.Tensor], rows: slice) -> Knowledge:
    states = tuple(v[rows] for name, v in contents.items() if name.startswith("state"))
    if "logits" in contents:
        return Knowledge(logits=contents["logits"][rows], hidden_states=states)
    head = Matrix(contents["head"])
    return Knowledge(hidden=contents["hidden"][rows], head=head, hidden_states=states)  # type: ignore[arg-type]


def assert_same(found: Result, wanted: Result, **tolerance: float) -> None:
    torch.testing.assert_close(found.total, wanted.total, **tolerance)
    torch.testing.assert_close(found.gradients, wanted.gradients, **tolerance)


def formula(scene: Scene) -> Result:
    """The same in fp64 from the definitions, by autograd alone."""
    leaves = {n: v.double().requires_grad_() for n, v in scene.leaves.items()}
    weights = [p.detach().double().requires_grad_() for p in scene.objective.parameters()]
    teacher = {n: v.double() for n, v in scene.teacher.items()}
    term = scene.term
    if term in HIDDEN:
        values = hidden_values(scene, leaves, teacher, weights)
    elif scene.task == "regression":
        target = scene.labels.double() if term is HARD_MSE else teacher["logits"][:, 0]
        values = (leaves["logits"][:, 0] - target)[scene.counting("logits")].square()
    else:
        values = class_values(scene, leaves, teacher)
    values.mean().backward()
    names = [name for name, _ in scene.objective.named_parameters()]
    gradients = {n: v.grad for n, v in leaves.items() if v.grad is not None}
    gradients |= {n: w.grad for n, w in zip(names, weights, strict=True)}
    return Result(values.detach().mean(), {}, gradients)


def class_values(scene: Scene, leaves: dict, teacher: dict) -> torch.Tensor:
    counted = scene.counting("logits")
    logits = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["head"].T
    if scene.term is CE:
        rows = torch.log_softmax(logits[counted], -1)
        return -rows.gather(1, scene.labels[counted][:, None])[:, 0]
    soft = teacher["logits"] if "logits" in teacher else teacher["hidden"] @ teacher["head"].T
    shared, heat = min(logits.shape[-1], soft.shape[-1]), scene.term.temperature
    q = (logits[counted][:, :shared] / heat).softmax(-1)
    p = (soft[counted][:, :shared] / heat).softmax(-1)
    scale = heat**2 if scene.term.t_squared else 1.0
    if isinstance(scene.term, SoftTargetKl):
        return scale * (p * (p / q).log()).sum(-1)
    if isinstance(scene.term, SoftTargetReverseKl):
        return scale * (q * (q / p).log()).sum(-1)
    beta = scene.term.beta
    m = beta * p + (1 - beta) * q
    parts = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    return scale * parts.sum(-1)


def hidden_values(scene: Scene, leaves: dict, teacher: dict, weights: list) -> torch.Tensor:
    layers = []
    for index, (s, t) in enumerate(((0, 0), (2, 4))):
        z, y = leaves[f"state{s}"][scene.valid], teacher[f"state{t}"][scene.valid]
        z = z @ weights[index].T if weights else z
        if scene.term is HIDDEN_MSE:
            layers.append((z - y).square().mean(-1))
        else:
            layers.append(1 - (z * y).sum(-1) / (z.norm(dim=-1) * y.norm(dim=-1)))
    return torch.stack(layers).mean(0)


@every_case
def test_value_and_gradient_are_those_of_an_independent_fp64_formula(task, term):
    scene = Scene(task, term)

    found, wanted = scene.result(), formula(scene)

    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-5)
    assert {n for n, g in found.gradients.items() if g.any()} == set(wanted.gradients)
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], gradient.float(), rtol=1e-4, atol=1e-6, msg=name
        )


@every_comparing_case
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(task, term):
    scene = Scene(task, term, same_widths=True).equal_to_teacher()
    scene.objective.weights = {term.loss: 1.0}

    found = scene.result()

    assert found.total.item() == pytest.approx(0.0, abs=1e-6)
    assert all(g.abs().max() < 1e-6 for g in found.gradients.values())


@every_case
def test_nan_where_nothing_counts_changes_neither_value_nor_gradient(task, term):
    found, wanted = Scene(task, term).poisoned().result(), Scene(task, term).result()

    assert_same(found, wanted, rtol=0, atol=0)


@every_case
def test_cutting_a_step_into_micro_batches_changes_nothing(task, term):
    scene = Scene(task, term)
    counts, whole = scene.counts(), scene.result()

    cuts = [scene.result(rows, counts) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]

    torch.testing.assert_close(sum(cut.total for cut in cuts), whole.total)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(sum(cut.gradients[name] for cut in cuts), gradient)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(cut.sums[name] for cut in cuts), value)


@every_case
def test_low_precision_inputs_are_computed_in_fp32(task, term):
    low = Scene(task, term).converted(torch.bfloat16)
    wanted = Scene(task, term).converted(torch.bfloat16).converted(torch.float32).result()

    found = low.result()

    torch.testing.assert_close(found.total, wanted.total, rtol=1e-6, atol=1e-6)
    for name, gradient in found.gradients.items():
        exact = wanted.gradients[name].to(gradient.dtype)
        torch.testing.assert_close(gradient, exact, rtol=0.01, atol=1e-6, msg=name)


@every_case
def test_a_step_in_which_nothing_counts_gives_zero_and_no_gradient(task, term):
    found = Scene(task, term).masked().poisoned().result()

    assert found.total.item() == 0.0
    assert all(not g.any() for g in found.gradients.values())  # NaN would count as something
    assert all(value.item() == 0 for value in found.sums.values())


@pytest.mark.parametrize("term", [HARD_MSE, SOFT_MSE], ids=named)
def test_a_squared_error_has_its_hand_value(term):
    scene = Scene("regression", term)
    scene.leaves["logits"] = torch.tensor([[2.0], [3.0], [-1.0], [7.0]])
    scene.teacher["logits"] = torch.tensor([[2.0], [0.0], [1.0], [9.0]])

    total = scene.result().total.item()

    # Hard: rows 0 and 2 carry the labels 0.5 and -1. Soft: all but the dummy row.
    assert total == pytest.approx(1.5**2 / 2 if term is HARD_MSE else (9 + 4) / 3)
