"""FSP matrices: hand value, what may not matter, and that they never exist all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd.losses import fsp as flows
from megakd.losses.fsp import flow_errors

States = tuple[Tensor, ...]


def error(student: States, teacher: States, **options) -> Tensor:
    """Of the one flow through two layers."""
    (found,) = flow_errors(student, teacher, **options)
    return found


def some(rows: int = 3, positions: int = 4, width: int = 5, *, seed: int = 0) -> States:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, rows, positions, width, generator=generator, dtype=torch.float64)
    return tuple(state.requires_grad_() for state in states)


def everywhere(states: States) -> Tensor:
    return torch.ones(states[0].shape[:2], dtype=torch.bool)


def test_it_has_its_hand_value():
    # G = F^T F' / 2 with two positions: [[1, 0], [0, 1]] / 2 against [[0, 2], [0, 0]] / 2.
    identity = torch.eye(2)[None]
    first = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    teacher = (first, torch.tensor([[[0.0, 2.0], [9.0, 9.0]]]))

    found = error((identity, identity), teacher, valid=torch.ones(1, 2).bool())

    assert found.item() == pytest.approx((0.25 + 1.0 + 0.0 + 0.25) / 4)


def test_gradients_are_those_of_finite_differences():
    student, teacher = some(), some(seed=1)
    valid = everywhere(student)
    valid[0, 2:] = False

    def of(*states: Tensor) -> Tensor:
        return error(states, teacher, valid=valid)

    assert torch.autograd.gradcheck(of, student)


def test_a_text_said_twice_flows_as_it_does_once():
    student, teacher = some(), some(seed=1)
    twice = [tuple(torch.cat([state] * 2, 1) for state in flow) for flow in (student, teacher)]

    found = error(*twice, valid=everywhere(twice[0]))

    torch.testing.assert_close(found, error(student, teacher, valid=everywhere(student)))


def test_the_order_of_the_positions_does_not_matter():
    student, teacher = some(), some(seed=1)
    order = torch.tensor([2, 0, 3, 1])
    turned = [tuple(state[:, order] for state in flow) for flow in (student, teacher)]

    found = error(*turned, valid=everywhere(student))

    torch.testing.assert_close(found, error(student, teacher, valid=everywhere(student)))


@pytest.mark.parametrize("elements", [1, 50, 60])
def test_matrices_of_a_few_rows_at_a_time_give_the_same(monkeypatch, elements):
    student, teacher = some(), some(seed=1)
    whole = error(student, teacher, valid=everywhere(student))
    wanted = torch.autograd.grad(whole, student)

    monkeypatch.setattr(flows, "MATRIX_ELEMENTS", elements)
    found = error(student, teacher, valid=everywhere(student))

    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, student), wanted)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    student, teacher = some(), some(seed=1)
    valid = everywhere(student)
    found = error(student, teacher, valid=valid)
    reference = error(student, teacher, valid=valid, kernels="reference")

    with pytest.raises(RuntimeError, match="do not support second derivatives"):
        torch.autograd.grad(found, student[0], create_graph=True)
    (slope,) = torch.autograd.grad(reference, student[0], create_graph=True)
    assert torch.autograd.grad(slope.sum(), student[1])[0].any()


def test_every_flow_of_a_chain_is_that_of_its_two_layers_alone():
    student, teacher = (*some(), some(seed=2)[0]), (*some(seed=1), some(seed=3)[0])
    valid = everywhere(student)

    first, second = flow_errors(student, teacher, valid=valid)

    torch.testing.assert_close(first, error(student[:2], teacher[:2], valid=valid))
    torch.testing.assert_close(second, error(student[1:], teacher[1:], valid=valid))
