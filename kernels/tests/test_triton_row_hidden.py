"""The Triton row kernels of the hidden-state losses, and functions of all, against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from megakd_kernels.triton import row_hidden
from megakd_kernels.triton.row_hidden import one_minus_cosine_rows, squared_error_rows
from megakd_kernels.triton.row_math import mixture_series

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 150
LOSSES = pytest.mark.parametrize("loss", [squared_error_rows, one_minus_cosine_rows])


def make_rows(rows=5, width=WIDTH, dtype=torch.float32):
    """Student and teacher rows; the second does not count and holds NaN."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, rows, width, generator=generator).to(dtype)
    valid = torch.ones(rows, dtype=torch.bool)
    valid[1] = False
    student[1], teacher[1] = math.nan, math.nan
    return student.to(DEVICE), teacher.to(DEVICE), valid.to(DEVICE)


def truth(loss, student, teacher, valid):
    """Values and gradients in fp64, zeros in rows that do not count."""
    inputs = torch.where(valid[:, None], student.double(), 1).requires_grad_()
    target = torch.where(valid[:, None], teacher.double(), 1)
    if loss is squared_error_rows:
        values = (inputs - target).square().mean(-1)
    else:
        values = 1 - F.cosine_similarity(inputs, target, dim=-1)
    (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return torch.where(valid, values.detach(), 0), torch.where(valid[:, None], gradient, 0)


def check(result, expected, *, gradients=2e-6):
    (values, gradient), (true_values, true_gradient) = result, expected
    torch.testing.assert_close(values.double(), true_values, rtol=2e-6, atol=2e-7)
    error = (gradient.double() - true_gradient).norm(dim=-1)
    assert (error <= gradients * true_gradient.norm(dim=-1)).all()


@LOSSES
@pytest.mark.parametrize(
    ("dtype", "block", "tolerance"),
    [(torch.float32, None, 2e-6), (torch.float32, 64, 2e-6), (torch.float16, None, 1e-3)],
    ids=["one block", "wider than a block", "half precision"],
)
def test_rows_become_their_gradient_and_match_fp64(loss, dtype, block, tolerance, monkeypatch):
    if block is not None:
        monkeypatch.setattr(row_hidden, "_WIDEST_BLOCK", block)
    student, teacher, valid = make_rows(3, dtype=dtype)
    expected = truth(loss, student, teacher, valid)

    values = loss(student, teacher, valid, student)

    check((values, student), expected, gradients=tolerance)


@LOSSES
def test_gradient_may_go_to_a_buffer_of_another_type(loss):
    student, teacher, valid = make_rows(4, dtype=torch.float16)
    buffer = torch.full((4, WIDTH + 6), 7.0, device=DEVICE)
    before = student.clone()

    values = loss(student, teacher.float(), valid, buffer[:, :WIDTH])

    check((values, buffer[:, :WIDTH]), truth(loss, before, teacher, valid))
    torch.testing.assert_close(student, before, rtol=0, atol=0, equal_nan=True)
    assert (buffer[:, WIDTH:] == 7.0).all()


@LOSSES
@pytest.mark.parametrize("block", [None, 64], ids=["one block", "wider than a block"])
def test_without_a_gradient_the_values_are_the_same_and_nothing_is_written(
    loss, block, monkeypatch, same_values
):
    if block is not None:
        monkeypatch.setattr(row_hidden, "_WIDEST_BLOCK", block)
    student, teacher, valid = make_rows(3)
    before = student.clone()

    values = loss(student, teacher, valid, None)

    torch.testing.assert_close(student, before, rtol=0, atol=0, equal_nan=True)
    same_values(values, loss(student, teacher, valid, student))


def test_a_vector_without_length_has_cosine_loss_one_and_no_gradient():
    student, teacher, _ = make_rows(4)
    student[0], teacher[1], student[1] = 0.0, 0.0, 1.0
    student[2] = 1e-13 / math.sqrt(WIDTH)

    every = torch.ones(4, dtype=torch.bool, device=DEVICE)
    values = one_minus_cosine_rows(student, teacher, every, student)

    assert (values[:3] == 1).all()
    assert (student[:3] == 0).all()
    assert student[3].norm() > 0


@LOSSES
def test_no_row_and_no_valid_row_give_zeros(loss):
    student, teacher, valid = make_rows(2)

    values = loss(student[1:], teacher[1:], valid[1:], student[1:])
    nothing = loss(student[:0], teacher[:0], valid[:0], student[:0])

    assert (values == 0).all()
    assert (student[1] == 0).all()
    assert nothing.shape == (0,)


@LOSSES
def test_rows_the_kernel_cannot_read_are_refused(loss):
    student, teacher, valid = make_rows(2)

    with pytest.raises(ValueError, match=r"target is torch.float64; .* fp32, bf16 or fp16"):
        loss(student, teacher.double(), valid, None)
    with pytest.raises(ValueError, match="projected has a column stride of 2"):
        loss(torch.empty(WIDTH, 2, device=DEVICE).T, teacher, valid, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [768, 8192, 12288])
@LOSSES
def test_model_widths_match_fp64_on_a_device(loss, width):
    student, teacher, valid = make_rows(600, width=width)
    expected = truth(loss, student, teacher, valid)

    values = loss(student, teacher, valid, student)

    check((values, student), expected)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_the_series_of_a_mixture_has_the_digits_of_fp32(share):
    gap = torch.linspace(-0.4, 0.4, 801, dtype=torch.float64)
    gap = gap[gap.abs() > 1e-3]

    first, *others = mixture_series(share)

    powers = list(enumerate(others, start=2))
    log = first * gap + sum(factor * gap**power for power, factor in powers)
    tilt = sum(power * factor * gap ** (power - 1) for power, factor in powers)
    excess = share * torch.expm1(gap)
    torch.testing.assert_close(log, torch.log1p(excess), rtol=3e-8, atol=0)
    torch.testing.assert_close(tilt, (1 - share) * excess / (1 + excess), rtol=3e-7, atol=0)
