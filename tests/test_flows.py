"""FSP matrices: hand value, what may not matter, and that they never exist all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd import flows
from megakd.flows import Flow, flow_error


def some(rows: int = 3, positions: int = 4, width: int = 5, *, seed: int = 0) -> Flow:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, rows, positions, width, generator=generator, dtype=torch.float64)
    return Flow(*(state.requires_grad_() for state in states))


def everywhere(flow: Flow) -> Tensor:
    return torch.ones(flow.first.shape[:2], dtype=torch.bool)


def test_it_has_its_hand_value():
    # G = F^T F' / 2 with two positions: [[1, 0], [0, 1]] / 2 against [[0, 2], [0, 0]] / 2.
    identity = torch.eye(2)[None]
    first = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    teacher = Flow(first, torch.tensor([[[0.0, 2.0], [9.0, 9.0]]]))

    error = flow_error(Flow(identity, identity), teacher, valid=torch.ones(1, 2).bool())

    assert error.item() == pytest.approx((0.25 + 1.0 + 0.0 + 0.25) / 4)


def test_gradients_are_those_of_finite_differences():
    student, teacher = some(), some(seed=1)
    valid = everywhere(student)
    valid[0, 2:] = False

    def error(first: Tensor, second: Tensor) -> Tensor:
        return flow_error(Flow(first, second), teacher, valid=valid)

    assert torch.autograd.gradcheck(error, tuple(student))


def test_a_text_said_twice_flows_as_it_does_once():
    student, teacher = some(), some(seed=1)
    twice = [Flow(*(torch.cat([state, state], 1) for state in flow)) for flow in (student, teacher)]

    found = flow_error(*twice, valid=everywhere(twice[0]))

    torch.testing.assert_close(found, flow_error(student, teacher, valid=everywhere(student)))


def test_the_order_of_the_positions_does_not_matter():
    student, teacher = some(), some(seed=1)
    order = torch.tensor([2, 0, 3, 1])
    turned = [Flow(*(state[:, order] for state in flow)) for flow in (student, teacher)]

    found = flow_error(*turned, valid=everywhere(student))

    torch.testing.assert_close(found, flow_error(student, teacher, valid=everywhere(student)))


@pytest.mark.parametrize("elements", [1, 50, 60])
def test_matrices_of_a_few_rows_at_a_time_give_the_same(monkeypatch, elements):
    student, teacher = some(), some(seed=1)
    whole = flow_error(student, teacher, valid=everywhere(student))
    wanted = torch.autograd.grad(whole, tuple(student))

    monkeypatch.setattr(flows, "MATRIX_ELEMENTS", elements)
    found = flow_error(student, teacher, valid=everywhere(student))

    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, tuple(student)), wanted)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    student, teacher = some(), some(seed=1)
    valid = everywhere(student)
    error = flow_error(student, teacher, valid=valid)
    reference = flow_error(student, teacher, valid=valid, kernels="reference")

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(error, student.first, create_graph=True)
    (slope,) = torch.autograd.grad(reference, student.first, create_graph=True)
    assert torch.autograd.grad(slope.sum(), student.second)[0].any()
