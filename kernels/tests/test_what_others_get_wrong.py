"""A mistake that is common in distillation losses, and that these losses do not make."""

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
