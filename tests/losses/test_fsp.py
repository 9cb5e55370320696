"""FSP matrices: what may not matter, and that they never exist all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd.losses import layer_terms as flows
from megakd.losses.layer_terms import flow_errors

States = tuple[Tensor, ...]


def error(student: States, teacher: States, **options) -> Tensor:
    """Return the error of the flow through two layers."""
    (result,) = flow_errors(student, teacher, **options)
    return result


def some(rows: int = 3, positions: int = 4, width: int = 5, *, seed: int = 0) -> States:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, rows, positions, width, generator=generator, dtype=torch.float64)
    return tuple(state.requires_grad_() for state in states)


def everywhere(states: States) -> Tensor:
    return torch.ones(states[0].shape[:2], dtype=torch.bool)


def test_a_text_said_twice_flows_as_it_does_once():
    student, teacher = some(), some(seed=1)
    twice = [tuple(torch.cat([state] * 2, 1) for state in flow) for flow in (student, teacher)]

    result = error(*twice, valid=everywhere(twice[0]))

    torch.testing.assert_close(result, error(student, teacher, valid=everywhere(student)))


@pytest.mark.parametrize("elements", [1, 50, 60])
def test_matrices_of_a_few_rows_at_a_time_give_the_same(monkeypatch, elements):
    student, teacher = some(), some(seed=1)
    whole = error(student, teacher, valid=everywhere(student))
    wanted = torch.autograd.grad(whole, student)

    monkeypatch.setattr(flows, "MATRIX_ELEMENTS", elements)
    actual = error(student, teacher, valid=everywhere(student))

    torch.testing.assert_close(actual, whole)
    torch.testing.assert_close(torch.autograd.grad(actual, student), wanted)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    student, teacher = some(), some(seed=1)
    valid = everywhere(student)
    result = error(student, teacher, valid=valid)
    reference = error(student, teacher, valid=valid, kernels="reference")

    with pytest.raises(RuntimeError, match="do not support second derivatives"):
        torch.autograd.grad(result, student[0], create_graph=True)
    (slope,) = torch.autograd.grad(reference, student[0], create_graph=True)
    assert torch.autograd.grad(slope.sum(), student[1])[0].any()
