"""The Triton row kernel of `topk_kd_loss` against the torch rows in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from megakd_kernels.row_plan import RowInputs, Scratch
from megakd_kernels.row_topk import TopK, TopKPlan, TopKRows
from megakd_kernels.topk import TOPK_MODES, topk_kd_loss

pytest.importorskip("triton")
# Three blocks of 32 ids, the last one ragged.
ROWS, V, K, BLOCK = 5, 75, 6, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(*, dtype=torch.float32, whole=False):
    """Logits and targets of five rows: a full list, a short one, an empty one, one ignored."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, ROWS, V, generator=generator, dtype=torch.float64)
    log_p, ids = teacher.log_softmax(-1).topk(V if whole else K)
    if not whole:
        ids[1, 2:] = -1
        ids[2] = -1
    log_p = log_p.masked_fill(ids < 0, -math.inf)
    # Row 1 has no rest: its ids have all probability.
    log_p[1] = log_p[1].log_softmax(0)
    rest = (1 - log_p.exp().sum(1)).clamp(min=0)
    best = torch.where(ids[:, 0] >= 0, ids[:, 0], -1)
    labels = torch.stack([ids[0, 3], *torch.randint(0, V, (ROWS - 1,), generator=generator)])
    valid = torch.tensor([True, True, True, False, True])
    factor = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0], dtype=torch.float64)
    targets = TopK(ids, log_p, rest, best)
    inputs = RowInputs(valid, labels, factor, factor * 0.3)
    return student.to(DEVICE, dtype), here(targets), here(inputs)


def here(values):
    return type(values)(*(value.to(DEVICE) for value in values))


def as_type(values, dtype):
    floats = (value.to(dtype) if value.is_floating_point() else value for value in values)
    return type(values)(*floats)


def run(kernel, student, targets, inputs, *, out=None):
    """Terms and gradient in the dtype of the logits; in place unless there is an `out`."""
    targets, inputs = (as_type(values, student.dtype) for values in (targets, inputs))
    logits = student.clone()
    gradient = logits if out is None else out
    terms = kernel.run_(logits, targets, inputs, gradient if kernel.plan.with_gradient else None)
    return terms, gradient


def kernels(**options):
    from megakd_kernels.triton.row_topk import TritonTopKRows

    plan = TopKPlan(**{
        "temperature": 1.0, "value_scale": 1.0, "with_ce": True, "with_gradient": True, **options
    })  # fmt: skip
    scratch = Scratch(ROWS, torch.empty(0, dtype=torch.float64, device=DEVICE))
    return TritonTopKRows(plan=plan, block=BLOCK), TopKRows(plan=plan, scratch=scratch)


@pytest.fixture
def check(distance):
    """Compares the kernel with the torch rows in fp64, and returns the kernel's gradient."""

    def compare(student, *given, out=None, tolerance=2e-5, **options):
        triton_rows, torch_rows = kernels(**options)
        terms, gradient = run(triton_rows, student, *given, out=out)
        true_terms, true_gradient = run(torch_rows, student.double(), *given)
        counts = torch.tensor([True, True, True, False, True], device=DEVICE)
        assert distance(terms.divergences[:, counts], true_terms.divergences[:, counts]) < 1e-6
        assert distance(terms.ce[counts], true_terms.ce[counts]) < 1e-6
        assert terms.agrees[counts].equal(true_terms.agrees[counts])
        if triton_rows.plan.with_gradient:
            assert distance(gradient, true_gradient) < tolerance
            assert gradient[3].eq(0).all()
        return gradient

    return compare


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("with_ce", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_match_the_double_precision_rows(check, with_ce, temperature, with_gradient):
    check(
        *problem(), with_ce=with_ce, temperature=temperature, value_scale=6.25,
        with_gradient=with_gradient,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_bias_that_the_kernel_adds_gives_the_bits_of_biased_logits(temperature):
    rows, _ = kernels(temperature=temperature)
    student, *given = problem()
    bias = torch.linspace(-2, 3, V, device=DEVICE).bfloat16()

    terms, gradient = run(replace(rows, bias=bias), student, *given)

    expected, expected_gradient = run(rows, student + bias, *given)
    assert all(map(torch.equal, terms, expected))
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16 stores truncate in the interpreter.
    [(torch.float32, 2e-5), (torch.float16, 1e-3), (torch.bfloat16, 1.2e-2)],
    ids=str,
)
def test_the_gradient_may_go_elsewhere_and_in_another_type(check, dtype, tolerance):
    out = torch.full((ROWS, 80), math.nan, dtype=dtype, device=DEVICE)[:, :V]
    check(*problem(), out=out, tolerance=tolerance)


def test_ids_that_cover_the_vocabulary_leave_no_others(check):
    student, targets, inputs = problem(whole=True)
    nothing = torch.zeros_like(targets.rest)
    check(student, targets._replace(rest=nothing), inputs, temperature=2.0)


def test_large_and_excluded_logits_stay_exact(check):
    student, targets, inputs = problem()
    student[:, ::7] += 90
    student[:, 3::7] -= 90
    free = [index for index in range(V) if index not in inputs.labels and index not in targets.ids]
    student[:, free[0]] = -math.inf

    check(student, targets, inputs, temperature=2.0)


def test_a_student_that_gives_the_tail_nothing_has_a_finite_gradient(check):
    student, targets, inputs = problem()
    student[0, targets.ids[0]] += 300

    assert check(student, targets, inputs, with_ce=False).isfinite().all()


def test_a_row_that_does_not_count_may_hold_anything():
    triton_rows, _ = kernels()
    student, targets, inputs = problem()
    student[3] = math.nan
    targets.log_p[3] = math.nan

    terms, gradient = run(triton_rows, student, targets, inputs)

    assert gradient.isfinite().all()
    assert gradient[3].eq(0).all()
    assert terms.divergences[0, 3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", TOPK_MODES)
def test_the_whole_loss_is_that_of_the_reference(distance, mode, dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 8, generator=generator).to(dtype)
    weight = torch.randn(40, 8, generator=generator).to(dtype)
    logprobs, ids = torch.randn(5, 40, generator=generator).to(DEVICE).log_softmax(-1).topk(4)
    labels = torch.tensor([3, -100, 39, 0, 7], device=DEVICE)

    def solve(impl, dtype):
        leaves = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (hidden, weight)]
        output = topk_kd_loss(
            *leaves, ids, logprobs, labels, mode=mode, t_squared=True, impl=impl,
            ce_weight=0.5, reduction="mean",
        )  # fmt: skip
        return output, torch.autograd.grad(output.loss, leaves)

    output, gradients = solve("triton", dtype)

    expected, truth = solve("reference", torch.float64)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert output.agreement == expected.agreement
    for gradient, true in zip(gradients, truth, strict=True):
        assert distance(gradient, true) < (2e-5 if dtype == torch.float32 else 5e-3)
