"""The public functions with `impl="triton"`, end to end, against the reference."""

import math
from contextlib import nullcontext

import pytest
import torch

import megakd_kernels as mk

pytest.importorskip("triton")
# The interpreter computes with numpy, which speaks up where -inf meets -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = {name: 0.3 + 0.1 * index for index, name in enumerate(mk.DIVERGENCES)}
FP64 = torch.float64


BENT = {"ce_weight": 0.7, "softcap_s": 3.0, "logit_scale_t": 0.5}


@pytest.mark.parametrize(
    ("dtype", "ids", "options"),
    [
        (torch.float32, (130, 130), {"divergence": "forward_kl"}),
        (torch.float32, (130, 150), {"divergence": ALL, "ce_weight": 0.7, "temperature": 2.5}),
        (torch.float32, (150, 130), {"divergence": ALL, **BENT}),
        (
            torch.float32,
            (150, 130),
            {"divergence": "reverse_kl", "vocab_size": 97, "reduction": "mean"},
        ),
        *((dtype, (130, 130), {"divergence": ALL}) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_linear_kd_loss_is_that_of_the_reference(make_problem, distance, dtype, ids, options):
    problem = make_problem(n=4, vs=ids[0], vt=ids[1], dtype=dtype, bias=True).to(DEVICE)
    problem.student_hidden[2] = math.nan  # an ignored row

    output, gradients = problem.solve(impl="triton", **options)
    expected, truth = problem.to(FP64).solve(impl="reference", **options)

    value, gradient = (1e-5, 1e-5) if dtype == torch.float32 else (1e-4, 5e-3)
    assert output.loss.dtype == torch.float32
    for got, true in zip(output[:3], expected[:3], strict=True):
        assert distance(got.detach(), true.detach()) < value
    for got, true in zip(gradients, truth, strict=True):
        assert got.dtype == dtype
        assert distance(got, true) < gradient
    assert output.n_valid == expected.n_valid
    assert output.agreement == expected.agreement


@pytest.mark.parametrize(("impl", "passes"), [("triton", 0), ("chunked", 2)])
def test_kernels_add_a_bias_without_a_pass_over_logits(make_problem, monkeypatch, impl, passes):
    problem = make_problem(n=7, vs=130, vt=130, bias=True).to(DEVICE)
    adds, add_ = [], torch.Tensor.add_

    def counted(tensor, *others, **options):
        adds.extend([tensor] if tensor.dim() == 2 and tensor.shape[1] == 130 else [])
        return add_(tensor, *others, **options)

    monkeypatch.setattr(torch.Tensor, "add_", counted)
    biases = {"teacher_bias": torch.ones(130, device=DEVICE)}
    problem.solve(impl=impl, divergence="forward_kl", **biases)

    assert len(adds) == passes


@pytest.mark.parametrize("is_watched", [False, True])
def test_cross_entropy_alone_runs_too(make_problem, distance, is_watched, largest_tensor):
    """Under a mode, torch checks that no result of an operator shares memory with another."""
    problem = make_problem(n=7, vs=130).to(DEVICE)
    labels = problem.labels.clamp(min=0)
    leaves = [problem.student_hidden.requires_grad_(), problem.student_weight.requires_grad_()]
    with largest_tensor() if is_watched else nullcontext():
        results = [
            torch.autograd.grad(
                mk.linear_kd_loss(
                    *leaves, labels=labels, t_squared=True, ce_weight=1.0, impl=impl
                ).loss,
                leaves,
            )
            for impl in ("triton", "reference")
        ]

    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < 1e-5


def test_double_precision_stays_with_torch(make_problem):
    problem = make_problem(dtype=FP64).to(DEVICE)

    output, gradients = problem.solve(divergence=ALL, impl="triton")
    expected, truth = problem.solve(divergence=ALL, impl="chunked")

    assert torch.equal(output.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, truth, strict=True))
