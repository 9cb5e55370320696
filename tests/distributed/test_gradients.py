"""The gradient of a step is that of the step alone, at every ZeRO stage and in every precision."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import EPSILON, RATE, Matrices, rows

RANKS = 2
# A backward reaches the matrices among a, b and c that it names.
STEPS = {
    "a whole step": [["abc", "abc"], ["ab", "ab"], ["abc", "abc"]],
    "the first backward": [["abc", "abc"], ["ab", "abc"], ["abc", "abc"]],
    "the last backward": [["abc", "abc"], ["abc", "ab"], ["abc", "abc"]],
    "one backward": [["abc"], ["ab"], ["c"], ["abc"]],
}
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
OFFLOADED = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
PRESETS = ["zero0", "zero1", "zero2", "zero3", SHARDED]
# The first use of DeepSpeed's CPU Adam compiles it, which takes a minute.
SLOW = [OFFLOADED, "zero2_offload", "zero3_offload"]
ALL = [*PRESETS, *(pytest.param(preset, marks=pytest.mark.slow) for preset in SLOW)]


def plain(steps, skipped=()) -> dict:
    """Run the steps in one process and plain PyTorch, on the rows of all ranks."""
    model = Matrices("abc", torch.float32)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    weights, norms = [{n: p.detach().clone() for n, p in named.items()}], []
    for step, backwards in enumerate(steps):
        # A weight that a step does not reach has a gradient of 0, not none.
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        for number, names in enumerate(backwards):
            for rank in range(RANKS):
                (model(rows(step, number, rank, names)).total / RANKS).backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in named.values()])))
        if step not in skipped:
            optimizer.step()
        weights.append({n: p.detach().clone() for n, p in named.items()})
    return {"weights": weights, "norms": norms}


def difference(found, expected) -> float:
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("missed_by", STEPS)
@pytest.mark.parametrize("preset", ALL, ids=str)
def test_a_weight_that_is_missed_gets_no_gradient_of_another_step(workers, preset, missed_by):
    steps = STEPS[missed_by]

    found = workers(RANKS).run("gradient_cases.train", preset, "fp32", steps, {}, timeout_s=400)[0]

    expected = plain(steps)
    for mine, other in zip(found["weights"], expected["weights"], strict=True):
        assert difference(mine, other) <= 1e-6
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def moved(found, first) -> torch.Tensor:
    """All changes of the weights in one vector."""
    return torch.cat([(found[name] - first[name]).flatten() for name in sorted(first)])


def assert_moved_alike(found, expected) -> None:
    """The changes are equal to the rounding of 16 bits."""
    for mine, other in zip(found["weights"][1:], expected["weights"][1:], strict=True):
        change = moved(other, expected["weights"][0])
        assert (moved(mine, found["weights"][0]) - change).norm() <= 0.05 * change.norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", ALL, ids=str)
def test_updates_in_16_bits_are_as_large_as_in_32(workers, preset, dtype):
    """The first, whose bias Adam corrects most, and one of two backwards."""
    steps = [["abc"], ["abc"], ["abc", "abc"], ["ab"]]

    found = workers(RANKS).run("gradient_cases.train", preset, dtype, steps, {}, timeout_s=400)[0]

    expected = plain(steps)
    assert_moved_alike(found, expected)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.02)


@pytest.mark.parametrize("preset", ALL, ids=str)
def test_only_the_step_that_overflows_is_skipped(workers, preset):
    steps = [["abc", "abc"]] * 4

    run = workers(RANKS).run
    found = run("gradient_cases.train", preset, "fp16", steps, {1: 1000.0}, timeout_s=400)[0]

    assert_moved_alike(found, plain(steps, skipped={1}))
    assert found["norms"][1] == float("inf")


@pytest.mark.parametrize("preset", ALL, ids=str)
def test_a_gradient_that_is_not_finite_shows_in_the_norm_of_its_step(workers, preset):
    steps = [["abc", "abc"]] * 2

    run = workers(RANKS).run
    found = run("gradient_cases.train", preset, "fp32", steps, {1: float("inf")}, timeout_s=400)[0]

    first, second = found["norms"]
    assert 0 < first < float("inf")
    assert not 0 <= second < float("inf")
