"""The Triton sweep of `linear_stats` against the fp64 reference, under the interpreter.

Tiles are 16 rows by 32 ids by 32 widths there, in two stretches of the vocabulary: 19 rows and
75 ids make two and three of them, the last ones ragged.
"""

import math

import pytest
import torch

from megakd_kernels.statistics import linear_stats

pytest.importorskip("triton")
N, HT = 19, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What numpy says of -inf minus -inf, in lanes whose result is then not taken.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def close_heads(vs=75, vt=75, *, gap=0.5, dtype=torch.float32):
    """Student and teacher whose logits are some `gap` apart, and labels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(N, HT), random(max(vs, vt), HT)
    student_hidden = torch.cat([hidden, random(N, 2) * gap], 1)
    student_weight = torch.cat([weight, random(len(weight), 2)], 1)
    labels = torch.randint(0, vs, (N,), generator=generator)
    labels[3::5] = -100
    tensors = [student_hidden, student_weight[:vs], hidden, weight[:vt]]
    return [(tensor / 2).to(DEVICE, dtype) for tensor in tensors], labels.to(DEVICE)


def measure(tensors, labels, impl, **options):
    """In fp64 by the reference; biases come in the type of the tensors."""
    own = tensors[0].dtype
    dtype = torch.float64 if impl == "reference" else own
    for name in ("student_bias", "teacher_bias"):
        if options.get(name) is not None:
            options[name] = options[name].to(own).to(dtype)
    return linear_stats(*(tensor.to(dtype) for tensor in tensors), labels, impl=impl, **options)


def assert_same(got, expected, *, rel=3e-5):
    # A gap of 0.3 between logits of 10 has six digits in fp32, and in which order a sum is formed
    # in the interpreter depends on the processor.
    for name in ("kl_sum", "ce_sum", "teacher_entropy_sum"):
        assert getattr(got, name).item() == pytest.approx(getattr(expected, name).item(), rel=rel)
    assert got.agreement.item() == expected.agreement.item()
    assert got.n_valid.item() == expected.n_valid.item()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"temperature": 2.5}),
        (torch.float32, {"vocab_size": 40}),
        (
            torch.float16,
            {"softcap_s": 3.0, "softcap_t": 2.0, "logit_scale_s": 0.8, "temperature": 0.7},
        ),
    ],
    ids=str,
)
def test_one_sweep_gives_the_sums_of_full_logits(options, dtype):
    tensors, labels = close_heads(dtype=dtype)
    options = {"student_bias": torch.linspace(-1, 1, 75, device=DEVICE), **options}

    got = measure(tensors, labels, "triton", **options)

    expected = measure(tensors, labels, "reference", **options)
    assert 5 <= expected.agreement <= 14
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("ids", "gap", "tolerance"),
    [((75, 61), 0.5, 3e-5), ((61, 75), 0.5, 3e-5), ((75, 75), 0.01, 5e-3)],
    ids=["fewer ids of the teacher", "fewer of the student", "close models"],
)
def test_first_ids_are_shared_and_close_models_keep_their_digits(ids, gap, tolerance):
    tensors, labels = close_heads(*ids, gap=gap)

    expected = measure(tensors, labels, "reference")

    assert (expected.kl_sum.item() < 1e-3) == (gap == 0.01)
    assert_same(measure(tensors, labels, "triton"), expected, rel=tolerance)


def test_logits_far_apart_and_far_from_zero_keep_their_digits():
    tensors, labels = close_heads()
    bias = torch.full((75,), 300.0, device=DEVICE)
    bias[::3] = -300

    options = {"student_bias": bias, "teacher_bias": bias.flip(0) / 8}
    got = measure(tensors, labels, "triton", **options)

    assert_same(got, measure(tensors, labels, "reference", **options))


@pytest.mark.parametrize("both", [True, False])
def test_an_excluded_id_adds_nothing_and_one_the_student_alone_excludes_makes_it_infinite(both):
    tensors, labels = close_heads()
    bias = torch.zeros(75, device=DEVICE)
    bias[40] = -math.inf

    options = {"student_bias": bias, "teacher_bias": bias if both else None}
    got = measure(tensors, labels.clamp(max=30), "triton", **options)

    assert_same(got, measure(tensors, labels.clamp(max=30), "reference", **options))
    assert math.isinf(got.kl_sum) is not both


def test_without_a_teacher_cross_entropy_and_accuracy_are_left():
    (hidden, weight, *_), labels = close_heads()
    labels[::2] = (hidden @ weight.T).argmax(-1)[::2]

    got = linear_stats(hidden, weight, labels=labels, impl="triton")

    assert_same(got, linear_stats(hidden, weight, labels=labels, impl="reference"))
    assert got.agreement.item() >= 10


def test_without_labels_the_divergence_and_the_entropy_are_left():
    tensors, _ = close_heads(75, 61)
    weight = torch.linspace(0, 2, N, device=DEVICE)

    got = measure(tensors, None, "triton", token_weight=weight)

    assert_same(got, measure(tensors, None, "reference", token_weight=weight))
    assert got.n_valid.item() == N - 1


def test_rows_that_do_not_count_may_hold_anything_and_a_tile_of_them_is_skipped():
    tensors, labels = close_heads()
    labels[:16] = -100
    expected = measure(tensors, labels, "reference")
    tensors[0][:16] = math.nan
    tensors[2][:16] = math.inf

    assert_same(measure(tensors, labels, "triton"), expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_valid_row_everything_is_zero(rows):
    tensors, _ = close_heads()
    tensors = [tensors[0][:rows], tensors[1], tensors[2][:rows], tensors[3]]
    labels = torch.full((rows,), -100, device=DEVICE)

    assert all(value.item() == 0 for value in measure(tensors, labels, "triton"))


def test_strides_do_not_matter():
    tensors, labels = close_heads()
    expected = measure(tensors, labels, "triton")

    got = measure([tensor.T.contiguous().T for tensor in tensors], labels, "triton")

    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_maxima_in_different_stretches_are_compared_over_the_whole_row():
    """Ids 0 and 40 lie in different stretches; every row has its maxima at one of the two."""
    weight = torch.zeros(75, 32, device=DEVICE)
    weight[0, 0] = weight[40, 1] = 1
    student, teacher = torch.zeros(2, 4, 32, device=DEVICE)
    student[:, :2] = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 1.0], [1.0, 0.5]])
    teacher[:, :2] = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]])

    got = linear_stats(student, weight, teacher, weight, impl="triton")

    assert got.agreement.item() == 3
