"""Terms of weight 0 add nothing to a loss or its gradient, however large they are."""

import math

import pytest
import torch

import megakd_kernels as mk

# The interpreter computes with numpy, which speaks up where -inf meets -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
WEIGHTS = pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["0", "0.0", "tensor"])
LABELS = torch.tensor([0, 2])


def logits_that_exclude(who):
    """Return logits [2, 3]; `who` gives id 1 no mass, and the other model gives it some."""
    student, teacher = torch.tensor([[[1.0, 0.2, 2.0]] * 2, [[0.4, 1.0, 0.1]] * 2])
    {"student": student, "teacher": teacher}[who][:, 1] = -math.inf
    return student.requires_grad_(), teacher


def loss_and_gradient(student, teacher, **options):
    loss = mk.kd_loss_from_logits(student, teacher, LABELS, t_squared=True, **options).loss
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@IMPLS
@WEIGHTS
@pytest.mark.parametrize(("name", "who"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_infinite_divergences_of_kd_weight_0_leave_the_cross_entropy(impl, zero, name, who):
    student, teacher = logits_that_exclude(who)

    actual = loss_and_gradient(
        student, teacher, divergence=name, kd_weight=zero, ce_weight=1.0, impl=impl
    )

    expected = loss_and_gradient(student, None, ce_weight=1.0)
    torch.testing.assert_close(actual, expected)


@IMPLS
@pytest.mark.parametrize(("name", "who"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_an_infinite_divergence_of_weight_0_leaves_the_rest_of_a_mixture(impl, name, who):
    student, teacher = logits_that_exclude(who)

    actual = loss_and_gradient(student, teacher, divergence={"jsd": 0.5, name: 0.0}, impl=impl)

    expected = loss_and_gradient(student, teacher, divergence={"jsd": 0.5})
    torch.testing.assert_close(actual, expected)


@IMPLS
def test_infinite_cross_entropy_of_weight_0_leaves_the_divergence(impl):
    student, teacher = logits_that_exclude("student")
    labels, zero = torch.tensor([1, 2]), torch.tensor(0.0)

    output = mk.kd_loss_from_logits(
        student, teacher, labels, divergence="jsd", t_squared=True, ce_weight=zero, impl=impl
    )

    expected = loss_and_gradient(student, teacher, divergence="jsd")
    assert output.ce_sum.isinf()
    actual = output.loss.detach(), torch.autograd.grad(output.loss, student)[0]
    torch.testing.assert_close(actual, expected)


@IMPLS
def test_rows_of_a_loss_have_no_nan_from_terms_of_weight_0(impl):
    student, teacher = logits_that_exclude("student")

    with torch.no_grad():
        rows = mk.kd_loss_from_logits(
            student, teacher, LABELS, divergence={"forward_kl": 0.0, "tvd": 1.0}, t_squared=True,
            ce_weight=1.0, kd_weight=0.0, reduction="none", impl=impl,
        ).loss  # fmt: skip
        expected = torch.nn.functional.cross_entropy(student, LABELS, reduction="none")

    torch.testing.assert_close(rows, expected)
