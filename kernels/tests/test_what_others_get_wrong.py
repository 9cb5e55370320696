"""Three mistakes that are common in distillation losses, and that these losses do not make."""

import pytest
import torch
from torch.nn import functional

import megakd_kernels as mk


def forward_kl(student, teacher):
    log_q = functional.log_softmax(student, -1)
    return functional.kl_div(log_q, functional.softmax(teacher, -1), reduction="sum")


def close_models(gap, rows=24, ids=2000, width=32):
    """bf16 heads and hidden states of a student near its teacher; logits of std 5."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ids, width, generator=generator).mul(5 / width**0.5).bfloat16()
    teacher = torch.randn(rows, width, generator=generator).bfloat16()
    noise = torch.randn(rows, width, generator=generator)
    return (teacher + gap * noise).bfloat16(), teacher, weight


def gradient_error(gradient, student, teacher, weight):
    exact = student.double().requires_grad_()
    truth = forward_kl(exact @ weight.double().T, teacher.double() @ weight.double().T)
    (expected,) = torch.autograd.grad(truth, exact)
    return ((gradient.double() - expected).norm() / expected.norm()).item()


def test_bf16_logits_ruin_the_gradient_of_a_student_that_has_nearly_converged():
    student, teacher, weight = close_models(gap=0.01)
    rounded = student.clone().requires_grad_()
    usual = forward_kl((rounded @ weight.T).float(), (teacher @ weight.T).float())
    (usual_gradient,) = torch.autograd.grad(usual, rounded)
    ours = student.clone().requires_grad_()

    loss = mk.linear_kd_loss(ours, weight, teacher, weight, t_squared=True).loss
    (gradient,) = torch.autograd.grad(loss, ours)

    assert gradient_error(usual_gradient, student, teacher, weight) > 0.1
    assert gradient_error(gradient, student, teacher, weight) < 5e-3


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_padding_a_vocabulary_with_logit_zero_gives_mass_to_ids_that_do_not_exist(impl):
    generator = torch.Generator().manual_seed(0)
    # Confident models whose logits lie below 0: a padded 0 would take nearly all the mass.
    student, teacher = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64) - 10
    padded = functional.pad(student, (0, 4))

    usual = forward_kl(padded, functional.pad(teacher, (0, 4)))
    right = mk.kd_loss_from_logits(padded, teacher, t_squared=True, impl=impl).loss

    assert right.item() == pytest.approx(forward_kl(student, teacher).item())
    assert usual < 0.01 * right


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_mean_per_micro_batch_is_not_the_mean_of_the_step(impl, make_problem):
    problem = make_problem(dtype=torch.float64)
    labels = torch.where(torch.arange(13) < 12, problem.labels, -100)
    labels[3:12] = -100
    labels[12] = 5
    spread = torch.linspace(0.2, 3, 13, dtype=torch.float64)[:, None]
    inputs = (problem.student_hidden * spread, problem.student_weight)
    heads = (problem.teacher_hidden, problem.teacher_weight)

    def loss(rows, **options):
        return mk.linear_kd_loss(
            inputs[0][rows], inputs[1], heads[0][rows], heads[1], labels[rows], t_squared=True,
            impl=impl, **options,
        ).loss  # fmt: skip

    whole = loss(slice(None), reduction="mean")
    halves = [slice(None, 12), slice(12, None)]
    # Two rows in one micro-batch and one in the other: their means weigh the last one double.
    usual = sum(loss(half, reduction="mean") for half in halves) / 2
    right = sum(loss(half, reduction="num_items", num_items=3) for half in halves)

    assert right.item() == pytest.approx(whole.item())
    assert abs(usual / whole - 1) > 0.01
