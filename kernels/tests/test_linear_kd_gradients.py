"""Gradients formed in the forward, and chunks: when, from what, and in how much memory."""

import math
from dataclasses import replace

import pytest
import torch

import megakd_kernels as mk
from megakd_kernels import ops

ALL = {
    "forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2, "skew_kl": 0.7, "skew_rkl": 0.4, "tvd": 0.6,
}  # fmt: skip
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])


@pytest.mark.parametrize("cuts", [(13,), (1, 12), (5, 4, 4)], ids=str)
def test_cutting_the_step_differently_gives_the_same_gradient(make_problem, cuts):
    problem = make_problem(dtype=torch.float64)
    options = {"divergence": ALL, "ce_weight": 1.0, "reduction": "num_items", "num_items": 11}
    whole, gradients = problem.solve(**options)

    loss, weight_gradient, start = 0, 0, 0
    for size in cuts:
        part = slice(start, start + size)
        micro_batch = replace(
            problem,
            student_hidden=problem.student_hidden[part],
            teacher_hidden=problem.teacher_hidden[part],
            labels=problem.labels[part],
        )
        output, (hidden_gradient, gradient) = micro_batch.solve(**options)
        torch.testing.assert_close(hidden_gradient, gradients[0][part])
        loss, weight_gradient, start = loss + output.loss, weight_gradient + gradient, part.stop

    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(weight_gradient, gradients[1])


def test_a_loss_scale_beyond_fp16_and_a_tiny_weight_lose_nothing(make_problem, distance):
    problem = make_problem(dtype=torch.float16)

    _, gradients = problem.solve(kd_weight=1e-9, upstream=2.0**20)
    _, expected = problem.to(torch.float64).solve(kd_weight=1e-9 * 2.0**20)

    for gradient, truth in zip(gradients, expected, strict=True):
        assert distance(gradient, truth) < 5e-3


def test_the_backward_reads_neither_weights_nor_hidden_states(make_problem):
    problem = make_problem(bias=True)
    _, expected = problem.solve(divergence=ALL, ce_weight=1.0)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = mk.linear_kd_loss(
        *leaves[:2], problem.teacher_hidden, problem.teacher_weight, problem.labels,
        t_squared=True, divergence=ALL, ce_weight=1.0, student_bias=leaves[2],
    ).loss  # fmt: skip

    # As when ZeRO-3 takes a gathered weight away again after the forward.
    for tensor in (*leaves, problem.teacher_hidden, problem.teacher_weight):
        tensor.data.fill_(math.nan)

    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize(
    ("impl", "divergence", "temperature"),
    [
        *(("chunked", name, 1.7) for name in mk.DIVERGENCES),
        ("chunked", ALL, 1.0),
        ("reference", ALL, 1.7),
    ],
    ids=str,
)
def test_gradients_are_the_derivatives_of_the_loss(make_problem, impl, divergence, temperature):
    problem = make_problem(n=4, vs=6, vt=5, hs=3, ht=2, dtype=torch.float64, bias=True)
    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]

    def loss(hidden, weight, bias):
        return mk.linear_kd_loss(
            hidden, weight, problem.teacher_hidden, problem.teacher_weight, problem.labels,
            divergence=divergence, temperature=temperature, t_squared=True, ce_weight=0.4,
            student_bias=bias, impl=impl, chunk_mb=0.0002,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_all_rows_never_exist(make_problem, dtype, monkeypatch, largest_tensor):
    n, v = 600, 500
    problem = make_problem(n=n, vs=v, vt=v, dtype=dtype)
    heads = [problem.student_hidden.requires_grad_(), problem.student_weight.requires_grad_()]
    heads += [problem.teacher_hidden, problem.teacher_weight]
    options = {"divergence": ALL, "ce_weight": 1.0, "temperature": 2.0, "t_squared": True}
    monkeypatch.setattr(ops, "linear_kd", torch.no_grad()(ops.linear_kd._init_fn))

    with largest_tensor() as chunked:
        mk.linear_kd_loss(*heads, problem.labels, chunk_mb=0.1, **options)
    with largest_tensor() as reference:
        mk.linear_kd_loss(*heads, problem.labels, impl="reference", **options)

    assert 0 < chunked.numel <= n * v / 10
    assert reference.numel >= 500 * v  # rows that count
