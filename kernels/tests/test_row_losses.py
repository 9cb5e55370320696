"""Divergences by hand, by their properties, at the edges of arithmetic, and of close models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megakd_kernels as mk

INF = math.inf
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
NAMES = pytest.mark.parametrize("name", mk.DIVERGENCES)


def loss_of(student, teacher, name="forward_kl", impl="chunked", **options):
    options = {"t_squared": True, **options}
    return mk.kd_loss_from_logits(student, teacher, divergence=name, impl=impl, **options).loss


def solved(student, teacher, name, impl="chunked", **options):
    """The loss and the gradient of the student's logits."""
    leaf = student.clone().requires_grad_()
    loss = loss_of(leaf, teacher, name, impl, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


@IMPLS
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # p = (1/2, 1/2) is the teacher, q = (1/4, 3/4) the student.
        ("forward_kl", 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("reverse_kl", 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        (
            "jsd",  # m = (3/8, 5/8)
            0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
            + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
        ),
        # skew 0.1: m = 0.1 p + 0.9 q = (0.275, 0.725), and with p and q swapped (0.475, 0.525).
        ("skew_kl", 0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725)),
        ("skew_rkl", 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525)),
        ("tvd", 0.25),
    ],
)
def test_divergence_has_the_value_worked_out_by_hand(impl, name, expected):
    loss = loss_of(logits_of(0.25, 0.75), logits_of(0.5, 0.5), name, impl)

    assert loss.item() == pytest.approx(expected, rel=1e-12)


@IMPLS
def test_jsd_weighs_the_teacher_by_beta(impl):
    p, q, beta = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]), 0.2
    m = beta * p + (1 - beta) * q

    loss = loss_of(q.log()[None], p.log()[None], "jsd", impl, beta=beta)

    expected = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@IMPLS
@pytest.mark.parametrize(("beta", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_its_ends_is_the_kl_of_that_end(impl, beta, limit):
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))

    loss = loss_of(student, teacher, "jsd", impl, beta=beta)

    assert loss == loss_of(student, teacher, limit, impl)
    assert loss > 0.1


@IMPLS
def test_temperature_squared_applies_to_loss_and_gradient(impl):
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    results = []
    for t_squared in (False, True):
        leaf = student.clone().requires_grad_()
        output = mk.kd_loss_from_logits(
            leaf, teacher, temperature=3.0, t_squared=t_squared, impl=impl
        )
        gradient = torch.autograd.grad(output.loss, leaf)[0]
        results.append((output.loss.detach(), gradient, output.divergence_sums))

    plain, squared = results

    for without, with_ in zip(plain, squared, strict=True):
        torch.testing.assert_close(with_, without * 9)


@IMPLS
@NAMES
def test_equal_models_have_no_loss_and_no_gradient(impl, name):
    teacher = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) * 4

    loss, gradient = solved(teacher, teacher, name, impl, temperature=1.5)

    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


ROW = st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4)


@NAMES
@settings(max_examples=30, deadline=None)
@given(student=ROW, teacher=ROW, temperature=st.floats(0.25, 8))
def test_divergence_is_never_negative_and_always_finite(name, student, teacher, temperature):
    loss = loss_of(torch.tensor([student]), torch.tensor([teacher]), name, temperature=temperature)

    assert 0 <= loss.item() < INF


@NAMES
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_extreme_logits_match_double_precision(name, temperature, distance):
    student = torch.tensor([[80.0, -80, 0, 3], [-80, 80, 80, -80], [1, 2, 3, 80]])
    both, options = (student, student.flip(1)), {"temperature": temperature}

    loss, gradient = solved(*both, name, **options)
    expected, truth = solved(*(one.double() for one in both), name, "reference", **options)

    assert distance(loss, expected) < 1e-5
    # Saturated softmaxes have gradients of 1e-12, the difference of values of order 1.
    torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-6)


@NAMES
@IMPLS
def test_ids_that_both_models_exclude_play_no_part(name, impl):
    student = torch.tensor([[1.0, -INF, 2.0, -INF, 0.5]])
    teacher = torch.tensor([[0.3, -INF, 1.0, -INF, 2.0]])

    loss, gradient = solved(student, teacher, name, impl)

    expected = solved(student[:, [0, 2, 4]], teacher[:, [0, 2, 4]], name, impl)
    torch.testing.assert_close((loss, gradient[:, [0, 2, 4]]), expected)
    assert gradient[0, [1, 3]].tolist() == [0, 0]


@IMPLS
@pytest.mark.parametrize(
    ("name", "who", "is_infinite"),
    [
        ("forward_kl", "student", True),
        ("forward_kl", "teacher", False),
        ("reverse_kl", "student", False),
        ("reverse_kl", "teacher", True),
        ("jsd", "student", False),
        ("jsd", "teacher", False),
    ],
)
def test_an_id_one_model_excludes_is_infinite_only_where_mathematics_says_so(
    impl, name, who, is_infinite
):
    logits = {"student": [[1.0, 0.2, 2.0]], "teacher": [[0.4, 1.0, 0.1]]}
    logits[who][0][1] = -INF
    student = torch.tensor(logits["student"], requires_grad=True)

    loss = loss_of(student, torch.tensor(logits["teacher"]), name, impl)

    assert loss.isinf().item() == is_infinite
    assert not loss.isnan()
    if not is_infinite:
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("excluding", ["student", "teacher"])
@pytest.mark.parametrize("row_weight", [1.0, 1000.0])
def test_infinite_exclusion_of_an_id_without_mass_is_harmless(excluding, row_weight):
    student, teacher = torch.tensor([[300.0, -300, 0]]), torch.tensor([[250.0, -250, 1]])
    {"student": student, "teacher": teacher}[excluding][0, 1] = -INF
    student.requires_grad_()

    everything = dict.fromkeys(mk.DIVERGENCES, 1.0)
    loss = loss_of(student, teacher, everything, token_weight=torch.tensor([row_weight]))

    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@NAMES
@pytest.mark.parametrize("gap", [1.0, 0.01])
def test_gradient_keeps_its_digits_when_the_student_is_close(name, gap, distance):
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(4, 2000, generator=generator) * 3
    student = teacher + gap * torch.randn(4, 2000, generator=generator)

    loss, gradient = solved(student, teacher, name)
    expected, truth = solved(student.double(), teacher.double(), name, "reference")

    # The logits themselves are rounded to 2^-23: 1e-6 of a gap of 0.1.
    assert distance(loss, expected) < 2e-6 / min(gap, 0.2)
    assert distance(gradient, truth) < 2e-6 / min(gap, 0.1)


@NAMES
@pytest.mark.parametrize("shift", [0.7, -1000.0])
def test_a_shift_between_the_models_costs_no_digits(name, shift, distance):
    generator = torch.Generator().manual_seed(5)
    student = 4 * torch.randn(8, 300, generator=generator)
    teacher = student + 0.05 * torch.randn(8, 300, generator=generator) + shift
    _, truth = solved(student.double(), teacher.double(), name, "reference")

    error, usual = (
        distance(solved(student, teacher, name, impl)[1], truth)
        for impl in ("chunked", "reference")
    )

    assert error <= max(3 * usual, 2e-6)
    assert error < 1e-4
