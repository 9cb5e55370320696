"""Few logits on a CPU: eager torch computes them, with the results of the other ways."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megakd_kernels as mk

LABELS = torch.tensor([0, 3, 2, 1, 3, 0])
CASES = {
    "divergence": {},
    "mean": {"reduction": "mean", "temperature": 2.0},
    "num_items": {"reduction": "num_items", "num_items": 7, "temperature": 3.0},
    "T stays out": {"temperature": 2.0, "t_squared": False},
    "weights": {"divergence": {"forward_kl": 0.7}, "kd_weight": 0.3},
    "a limit of jsd": {"divergence": "jsd", "beta": 0},
    "a limit of skew_kl": {"divergence": "skew_kl", "skew": 0.0},
    "fewer ids": {"vocab_size": 4},
    "both": {"labels": LABELS, "ce_weight": 0.4, "temperature": 2.0, "reduction": "mean"},
    "both, fewer ids": {"labels": LABELS, "ce_weight": 2, "vocab_size": 4},
    "all valid": {"valid": torch.ones(6, dtype=torch.bool)},
    "labels that select": {"labels": LABELS},
    "no weight": {"kd_weight": 0.0},
    "weights in tensors": {
        "labels": LABELS, "kd_weight": torch.tensor(0.5), "ce_weight": torch.tensor(0.25),
    },
    "a divisor in a tensor": {"reduction": "num_items", "num_items": torch.tensor(5)},
    "a divisor of 0": {"reduction": "num_items", "num_items": torch.tensor(0)},
    "all valid, an unlabelled row": {
        "valid": torch.ones(6, dtype=torch.bool),
        "labels": LABELS.masked_fill(LABELS == 2, -100),
        "ce_weight": 0.5,
    },
    "cross-entropy, an unlabelled row": {
        "teacher": None,
        "valid": torch.ones(6, dtype=torch.bool),
        "labels": LABELS.masked_fill(LABELS == 2, -100),
        "ce_weight": 0.5,
    },
    "cross-entropy": {"teacher": None, "labels": LABELS, "ce_weight": 1.0},
    "mean cross-entropy": {
        "teacher": None, "labels": LABELS, "ce_weight": 0.5, "reduction": "mean",
    },
    "another divergence": {"divergence": "reverse_kl"},
    "a mixture": {"divergence": {"forward_kl": 0.5, "tvd": 0.5}},
    "an invalid row": {"valid": torch.tensor([True, False, True, True, True, True])},
    "an unlabelled row": {"labels": LABELS.masked_fill(LABELS == 2, -100), "ce_weight": 1.0},
    "token weights": {"token_weight": torch.arange(6.0)},
    "ignored labels that are ids": {"labels": LABELS, "ignore_index": 2, "ce_weight": 1.0},
}  # fmt: skip


@pytest.fixture
def models():
    """Logits [6, 5] and [6, 7] in fp32; in row 1, two ids of each model are the most likely."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(6, 5, generator=generator)
    teacher = 3 * torch.randn(6, 7, generator=generator)
    student[1, [0, 2]], teacher[1, [2, 3]] = 9.0, 9.0
    return student, teacher


def solve(student, teacher, /, *, dtype=None, **options):
    """Return the output and the gradient of the student's logits."""
    options = {"t_squared": True, "teacher": teacher, **options}
    teacher, labels = options.pop("teacher"), options.pop("labels", None)
    leaf = student.detach().to(dtype or student.dtype, copy=True).requires_grad_()
    if teacher is not None and dtype is not None:
        teacher = teacher.to(dtype)
    output = mk.kd_loss_from_logits(leaf, teacher, labels, **options)
    return output, torch.autograd.grad(output.loss, leaf)[0]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_few_logits_give_the_result_of_the_reference(models, options):
    output, gradient = solve(*models, **options)
    truth, expected = solve(*models, dtype=torch.float64, impl="reference", **options)

    for name, actual, wanted in zip(truth._fields, output, truth, strict=True):
        assert actual.shape == wanted.shape, name
        torch.testing.assert_close(
            actual.double(), wanted.double(), rtol=2e-6, atol=1e-9, msg=f"{name}: {actual} {wanted}"
        )
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=5e-7)
    plain = solve(*models, impl="reference", **options)[0]
    assert [part.dtype for part in output] == [part.dtype for part in plain]


ROW = st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(student=ROW, teacher=ROW, temperature=st.floats(0.25, 8))
def test_logits_of_any_size_give_the_result_of_the_reference(student, teacher, temperature):
    models = torch.tensor([student]), torch.tensor([teacher])
    options = {"temperature": temperature, "labels": torch.tensor([1]), "ce_weight": 0.5}

    actual, gradient = solve(*models, **options)
    truth, expected = solve(*models, dtype=torch.float64, impl="reference", **options)

    torch.testing.assert_close(actual.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def small_numbers(request):
    """What the processor does with numbers that are not normal."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor keeps small numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("small_numbers")
@pytest.mark.parametrize("rows", [1, 2000])
def test_a_probability_too_small_for_its_dtype_loses_no_gradient(rows):
    """exp(-88) is no normal number of fp32, and q/p is exp(88)."""
    student = torch.tensor([[88.0, 0.0]]).repeat(rows, 1)

    output, gradient = solve(student, student.flip(1))

    assert output.loss.item() == pytest.approx(88 * rows)
    assert output.row_divergences.tolist() == [[pytest.approx(88)] * rows]
    assert gradient.tolist() == [[pytest.approx(1.0), pytest.approx(-1.0)]] * rows


@pytest.mark.usefixtures("small_numbers")
def test_a_small_loss_counts_an_id_that_only_the_student_expects():
    """The id adds q = 1e-3 to the loss; p is exp(-95), and q/p is exp(88)."""
    student = torch.tensor([[0.0, math.log(1e-3)], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, -95.0], [0.0, 0.0]])

    output, _ = solve(student, teacher)

    assert output.loss.item() == pytest.approx(math.log1p(1e-3), rel=1e-5)
    assert output.row_divergences.tolist()[0] == pytest.approx([math.log1p(1e-3), 0], abs=1e-8)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_excluded_ids_have_the_limits_of_the_reference(models, who):
    student, teacher = models
    if who != "teacher":
        student[2, 1] = -math.inf
    if who != "student":
        teacher[2, 1] = -math.inf

    output, gradient = solve(student, teacher)
    expected, wanted = solve(student, teacher, impl="reference")

    assert output.loss.isinf() == (who == "student")
    for pair in zip(output, expected, strict=True):
        torch.testing.assert_close(*pair)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("gap", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_close_models_keep_their_digits(gap, shift, distance):
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(8, 300, generator=generator)
    student = teacher + gap * torch.randn(8, 300, generator=generator) + shift
    options = {"temperature": 2.0}

    output, gradient = solve(student, teacher, **options)
    truth, expected = solve(student, teacher, dtype=torch.float64, impl="reference", **options)

    noise = 2e-7 * (1 + shift) / gap
    assert distance(output.row_divergences, truth.row_divergences) < 2 * noise
    assert distance(gradient, expected) < 5 * noise


@settings(max_examples=40, deadline=None)
@given(
    gap=st.floats(-3, 0.5).map(lambda exponent: 10**exponent),
    rows=st.sampled_from([1, 8, 200]),
    seed=st.integers(0, 1000),
)
def test_the_loss_has_its_digits_at_every_distance_of_the_models(gap, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(rows, 20, generator=generator)
    student = teacher + gap * torch.randn(rows, 20, generator=generator)

    output, _ = solve(student, teacher)
    truth, _ = solve(student, teacher, dtype=torch.float64, impl="reference")

    distance = math.sqrt(2 * truth.loss.item() / rows)
    tolerance = 5e-6 + 4e-7 / distance
    assert output.loss.item() == pytest.approx(truth.loss.item(), rel=tolerance)
    assert output.divergence_sums.item() == pytest.approx(output.loss.item(), rel=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_has_the_dtype_of_the_logits_and_the_loss_that_of_the_computation(
    models, dtype, distance
):
    student, teacher = (logits.to(dtype) for logits in models)
    truth, expected = solve(student, teacher.double(), dtype=torch.float64, impl="reference")

    output, gradient = solve(student, teacher)

    assert (output.loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert distance(output.loss.detach(), truth.loss.detach()) < 1e-5
    assert distance(gradient, expected) < 5e-3


def test_autocast_changes_nothing(models):
    expected = solve(*models, temperature=2.0, labels=LABELS, ce_weight=1.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = solve(*models, temperature=2.0, labels=LABELS, ce_weight=1.0)

    assert torch.equal(actual[0].loss, expected[0].loss)
    assert torch.equal(actual[1], expected[1])


def test_transforms_of_functions_work(models):
    def loss(student, teacher):
        return mk.kd_loss_from_logits(student, teacher, t_squared=True).loss

    gradient = torch.func.grad(loss)(*models)

    torch.testing.assert_close(gradient, solve(*models)[1])


def test_without_a_gradient_the_loss_is_a_constant(models):
    with torch.no_grad():
        result = mk.kd_loss_from_logits(models[0].requires_grad_(), models[1], t_squared=True).loss

    assert not result.requires_grad
    torch.testing.assert_close(result, solve(*models)[0].loss.detach())


def test_a_weight_that_changes_in_place_counts_with_its_value_at_the_call(models):
    weight = torch.tensor(1.0)
    options = {"t_squared": True, "kd_weight": weight}
    before = mk.kd_loss_from_logits(*models, **options).loss

    weight.fill_(2.0)

    torch.testing.assert_close(mk.kd_loss_from_logits(*models, **options).loss, 2 * before)


def test_statistics_keep_neither_the_graph_nor_the_logits_alive(models):
    student = models[0].requires_grad_() * 2
    inner = weakref.ref(student)
    output = mk.kd_loss_from_logits(student, models[1], t_squared=True)

    statistics = output[1:]
    del output, student

    assert inner() is None
    assert not any(part.requires_grad for part in statistics)
