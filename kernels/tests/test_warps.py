"""Scaled and softly capped logits (Gemma, Granite, Cohere): value and gradient."""

import pytest
import torch

import megakd_kernels as mk

ALL = dict.fromkeys(mk.DIVERGENCES, 0.5)
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
WARPS = {"softcap_s": 2.0, "softcap_t": 3.0, "logit_scale_s": 0.7, "logit_scale_t": 1.3}


@IMPLS
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_loss_is_that_of_the_warped_logits(make_problem, impl, with_teacher):
    problem = make_problem(dtype=torch.float64, vs=39)
    hidden = problem.student_hidden.clone().requires_grad_()
    raw = hidden @ problem.student_weight.T
    student = 2.0 * torch.tanh(0.7 * raw / 2.0)
    soft = 3.0 * torch.tanh(1.3 * problem.teacher_hidden @ problem.teacher_weight.T / 3.0)
    teacher = soft if with_teacher else None
    options = {"divergence": ALL, "ce_weight": 1.0, "temperature": 2.0, "t_squared": True}
    expected = mk.kd_loss_from_logits(student, teacher, problem.labels, **options).loss
    (truth,) = torch.autograd.grad(expected, hidden)

    heads = (problem.teacher_hidden, problem.teacher_weight) if with_teacher else (None, None)
    output = mk.linear_kd_loss(
        hidden, problem.student_weight, *heads, problem.labels, impl=impl, **WARPS, **options
    )

    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(output.loss, hidden)[0], truth)
