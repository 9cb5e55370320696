"""Every loss term against an independent fp64 formula, and what may not matter to it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from loss_scene import PARTS, POSITIONS, QUERY_HEADS, Result, Scene, term_of
from waiting import no_waiting

import megakd_kernels
from megakd.config.terms import ATTENTION_TERMS, term_name

CE = term_of("hard_cross_entropy")
CLASS_WEIGHTS: Any = {"first": 0.25, "second": 2.0, "third": 1.5}
CE_WEIGHED = term_of("hard_cross_entropy", class_weights=CLASS_WEIGHTS)
CE_SMOOTHED = term_of("hard_cross_entropy", label_smoothing=0.3)
CE_BOTH = term_of("hard_cross_entropy", class_weights=CLASS_WEIGHTS, label_smoothing=0.3)
KL = term_of("soft_target_kl")
KL_AT_2 = term_of("soft_target_kl", temperature=2.0)
REVERSE = term_of("soft_target_reverse_kl", temperature=1.5)
JSD = term_of("soft_target_jsd", beta=0.3)
SKEW = term_of("soft_target_skew_kl", skew=0.2)
SKEW_REVERSE = term_of("soft_target_skew_reverse_kl", temperature=1.5)
TVD = term_of("soft_target_tvd")
HARD_MSE = term_of("hard_mse")
SOFT_MSE = term_of("soft_target_mse")
HIDDEN_MSE = term_of("hidden_mse", layer_mapping=("0:0", "2:4"))
HIDDEN_COSINE = term_of("hidden_cosine", layer_mapping=("0:0", "2:4"))
OF_FIRST: Any = {"layer_mapping": ("0:0", "2:4"), "positions": "first"}
FIRST_MSE = term_of("hidden_mse", **OF_FIRST)
FIRST_COSINE = term_of("hidden_cosine", **OF_FIRST)
EMBEDDING = term_of("embedding_mse")
FLOWS = term_of("relation_fsp", layer_mapping=("0:0", "1:2", "2:4"))
WRITTEN: Any = {"layer_mapping": ("1:2", "2:4")}
SCORES = term_of("attention_mse", **WRITTEN)
PROBABILITIES = term_of("attention_mse", fit="probabilities", **WRITTEN)
RELATIONS = term_of("relation_kl", **WRITTEN)
OTHER_HEADS = term_of("relation_kl", relations=("query_key", "value"), relation_heads=4, **WRITTEN)
OF_CLASSES = (CE, KL, KL_AT_2, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD)
STATES = (HIDDEN_MSE, HIDDEN_COSINE, FIRST_MSE, FIRST_COSINE, EMBEDDING)
ATTENTION = (SCORES, PROBABILITIES, RELATIONS, OTHER_HEADS)
OF_LABELS = (CE_WEIGHED, CE_SMOOTHED, CE_BOTH)
CASES = [
    *(("classification", term) for term in OF_LABELS),
    *(("classification", term) for term in (*OF_CLASSES, *STATES, FLOWS, *ATTENTION)),
    *(("regression", term) for term in (HARD_MSE, SOFT_MSE, *STATES, FLOWS, *ATTENTION)),
    *(("causal_lm", term) for term in (*OF_CLASSES, *STATES, FLOWS, *ATTENTION)),
    *(("causal_lm", replace(t, on=on)) for t in (CE, KL) for on in ("rollouts", "data")),
]
# A few lines of torch, no kernel.
OWN_SUMS = (*OF_LABELS, HARD_MSE, SOFT_MSE, FLOWS, SCORES, PROBABILITIES)
COMPARING = [(task, term) for task, term in CASES if term.needs_teacher]


def named(case: Any) -> str:
    return case if isinstance(case, str) else term_name(case)


every_case = pytest.mark.parametrize(("task", "term"), CASES, ids=named)
every_comparing_case = pytest.mark.parametrize(("task", "term"), COMPARING, ids=named)


def formula(scene: Scene) -> Result:
    """Return the values in fp64 from the definitions, by autograd alone."""
    leaves = {n: v.double().requires_grad_() for n, v in scene.leaves.items()}
    weights = [p.detach().double().requires_grad_() for p in scene.objective.parameters()]
    teacher = {n: v.double() for n, v in scene.teacher.items()}
    term = scene.term
    if isinstance(term, ATTENTION_TERMS):
        values = attention_values(scene, leaves, teacher)
    elif term is FLOWS:
        values = flow_values(scene, leaves, teacher, weights)
    elif term in STATES:
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
    if scene.term.loss == "hard_cross_entropy":
        surprise = -torch.log_softmax(logits[counted], -1)
        return label_values(scene.term, surprise, scene.labels[counted])
    soft = teacher["logits"] if "logits" in teacher else teacher["hidden"] @ teacher["head"].T
    shared, heat = min(logits.shape[-1], soft.shape[-1]), scene.term.temperature
    q = (logits[counted][:, :shared] / heat).softmax(-1)
    p = (soft[counted][:, :shared] / heat).softmax(-1)
    return heat**2 * divergence(scene.term, p, q).sum(-1)


def label_values(term: Any, surprise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One value per labelled row, from the target distribution and the weight of each class."""
    target = torch.nn.functional.one_hot(labels, surprise.shape[1]).double()
    target = (1 - term.label_smoothing) * target + term.label_smoothing / surprise.shape[1]
    weights = term.class_weights
    given = [1.0] * surprise.shape[1] if weights is None else [*weights.values()]
    return (target * torch.tensor(given, dtype=torch.float64) * surprise).sum(1)


def divergence(term: Any, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the terms of the sum over the classes."""
    if term.loss == "soft_target_tvd":
        return (p - q).abs() / 2
    if term.loss == "soft_target_jsd":
        m = term.beta * p + (1 - term.beta) * q
        return term.beta * p * (p / m).log() + (1 - term.beta) * q * (q / m).log()
    skew = getattr(term, "skew", 0.0)
    if term.loss in {"soft_target_kl", "soft_target_skew_kl"}:
        return p * (p / (skew * p + (1 - skew) * q)).log()
    return q * (q / ((1 - skew) * p + skew * q)).log()


def hidden_values(scene: Scene, leaves: dict, teacher: dict, weights: list) -> torch.Tensor:
    layers = []
    pairs = ((0, 0),) if scene.term is EMBEDDING else ((0, 0), (2, 4))
    for index, (s, t) in enumerate(pairs):
        counted = scene.counting("state")
        z, y = leaves[f"state{s}"][counted], teacher[f"state{t}"][counted]
        z = z @ weights[index].T if weights else z
        if scene.term.loss != "hidden_cosine":
            layers.append((z - y).square().mean(-1))
        else:
            layers.append(1 - (z * y).sum(-1) / (z.norm(dim=-1) * y.norm(dim=-1)))
    return torch.stack(layers).mean(0)


def flow_values(scene: Scene, leaves: dict, teacher: dict, weights: list) -> torch.Tensor:
    """One value per row that counts, from the matrices of all its flows."""
    rows = []
    for b in scene.valid.any(dim=1).nonzero()[:, 0].tolist():
        kept = scene.valid[b]
        ours = [leaves[f"state{s}"][b, kept] for s in (0, 1, 2)]
        ours = [x @ w.T for x, w in zip(ours, weights, strict=True)] if weights else ours
        theirs = [teacher[f"state{t}"][b, kept] for t in (0, 2, 4)]
        matrices = [[a.T @ b / kept.sum() for a, b in pairwise(x)] for x in (ours, theirs)]
        errors = [(z - y).square().mean() for z, y in zip(*matrices, strict=True)]
        rows.append(torch.stack(errors).mean())
    return torch.stack(rows)


def attention_values(scene: Scene, leaves: dict, teacher: dict) -> torch.Tensor:
    """One value per token that counts, token by token and key by key."""
    is_causal = scene.task == "causal_lm"
    documents = (POSITIONS == 0).cumsum(1) if is_causal else torch.ones(4, 5)
    row = score_error if scene.term.loss == "attention_mse" else relation_kl
    values = []
    for b, i in scene.valid.nonzero().tolist():
        known = range(i + 1 if is_causal else 5)
        seen = [j for j in known if scene.valid[b, j] and documents[b, i] == documents[b, j]]
        layers = []
        for s, t in ((1, 2), (2, 4)):
            ours = {part: leaves[f"{part}{s}"][b] for part in PARTS}
            theirs = {part: teacher[f"{part}{t}"][b] for part in PARTS}
            layers.append(row(scene.term, ours, theirs, i, seen))
        values.append(torch.stack(layers).mean())
    return torch.stack(values)


def score_error(term: Any, ours: dict, theirs: dict, i: int, seen: list) -> torch.Tensor:
    both = [products(x["queries"], x["keys"], QUERY_HEADS, i, seen) for x in (ours, theirs)]
    if term.fit == "probabilities":
        both = [scores.softmax(-1) for scores in both]
    return (both[0] - both[1]).square().mean()


def relation_kl(term: Any, ours: dict, theirs: dict, i: int, seen: list) -> torch.Tensor:
    values = []
    for relation in term.relations:
        log_q, log_p = (
            products(*sides(relation, x), term.relation_heads or QUERY_HEADS, i, seen)
            for x in (ours, theirs)
        )
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return torch.stack(values).mean()


def sides(relation: str, x: dict) -> tuple[torch.Tensor, torch.Tensor]:
    if relation == "query_key":
        return x["queries"], torch.cat([x["keys"]] * QUERY_HEADS, -1)
    part = {"query": "queries", "key": "keys", "value": "values"}[relation]
    return x[part], x[part]


def products(queries: Any, keys: Any, parts: int, i: int, seen: list) -> torch.Tensor:
    """[parts, seen]: each part of query i with its part of the keys, scaled."""
    width = queries.shape[-1] // parts
    query, key = queries[i].reshape(parts, width), keys[seen].reshape(len(seen), -1, width)
    return torch.stack([key[:, p % key.shape[1]] @ query[p] for p in range(parts)]) / width**0.5


@every_case
def test_value_and_gradient_are_those_of_an_independent_fp64_formula(task, term):
    scene = Scene(task, term)

    actual, wanted = scene.result(), formula(scene)

    assert actual.total.dtype == torch.float32
    assert actual.total.item() == pytest.approx(wanted.total.item(), rel=1e-5)
    assert {n for n, g in actual.gradients.items() if g.any()} == set(wanted.gradients)
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(
            actual.gradients[name], gradient.float(), rtol=1e-4, atol=1e-6, msg=name
        )


@every_comparing_case
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(task, term):
    scene = Scene(task, term, same_widths=True).equal_to_teacher()
    scene.objective.weights = {term_name(term): 1.0}

    result = scene.result()

    assert result.total.item() == pytest.approx(0.0, abs=1e-6)
    assert all(g.abs().max() < 1e-6 for g in result.gradients.values())


@every_case
def test_nan_where_nothing_counts_changes_neither_value_nor_gradient(task, term):
    actual, wanted = Scene(task, term).poisoned().result(), Scene(task, term).result()

    torch.testing.assert_close(actual.total, wanted.total, rtol=0, atol=0)
    torch.testing.assert_close(actual.gradients, wanted.gradients, rtol=0, atol=0)


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
def test_the_chosen_code_path_reaches_every_kernel(task, term, kernel_calls):
    kernels = (name for name in megakd_kernels.__all__ if name.endswith(("loss", "logits")))
    calls = kernel_calls(*kernels)

    Scene(task, term).result(kernels="reference")

    ways = {options.get("impl") for _, options in calls}
    assert ways == (set() if term in OWN_SUMS else {"reference"})


@every_case
def test_no_operation_of_a_loss_makes_the_host_wait_for_the_device(task, term):
    with no_waiting():
        actual = Scene(task, term).result(kernels="chunked")

    wanted = Scene(task, term).result()
    torch.testing.assert_close(actual.total, wanted.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.gradients, wanted.gradients, rtol=1e-5, atol=1e-6)


@every_case
def test_low_precision_inputs_are_computed_in_fp32(task, term):
    low = Scene(task, term).converted(torch.bfloat16)
    wanted = Scene(task, term).converted(torch.bfloat16).converted(torch.float32).result()

    actual = low.result()

    torch.testing.assert_close(actual.total, wanted.total, rtol=1e-6, atol=1e-6)
    for name, gradient in actual.gradients.items():
        exact = wanted.gradients[name].to(gradient.dtype)
        # A key of several queries' heads has the sum of their gradients, each rounded.
        rounding = 0.01 * exact.abs().max().item() if term is OTHER_HEADS else 1e-6
        torch.testing.assert_close(gradient, exact, rtol=0.01, atol=rounding, msg=name)


@every_case
def test_a_step_in_which_nothing_counts_gives_zero_and_no_gradient(task, term):
    result = Scene(task, term).masked().poisoned().result()

    assert result.total.item() == 0.0
    assert all(not g.any() for g in result.gradients.values())  # NaN would count as something
    assert all(value.item() == 0 for value in result.sums.values())


@pytest.mark.parametrize(
    "term", [t for task, t in COMPARING if task == "causal_lm" and t in OF_CLASSES], ids=term_name
)
def test_a_teacher_that_learns_in_the_same_stage_learns_nothing_from_teaching(term):
    scene = Scene("causal_lm", term)
    for value in scene.teacher.values():
        value.requires_grad_()

    scene.result()

    assert all(value.grad is None for value in scene.teacher.values())
