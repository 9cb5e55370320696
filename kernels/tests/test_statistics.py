"""`linear_stats`: values and rows, on every path."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd_kernels.statistics import linear_stats

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
# The interpreter computes with numpy, which speaks up about -inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# A chunk of two or three rows, so that 13 rows make several and a ragged last one.
TINY_CHUNK_MB = 0.0008


@dataclass(frozen=True)
class Heads:
    """A student and a teacher that often agree; rows 2 and 9 are ignored."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor
    student_bias: torch.Tensor
    teacher_bias: torch.Tensor
    token_weight: torch.Tensor

    def to(self, dtype):
        floating = {name: value.to(dtype) for name, value in vars(self).items() if name != "labels"}
        return replace(self, **floating)

    def measure(self, **options):
        tensors = dict(vars(self))
        first = [tensors.pop(name) for name in list(tensors)[:4]]
        return linear_stats(*first, **{**tensors, **options})

    def truth(self, *, temperature=1.0, shared=None, softcap=None, scale=1.0):
        """Eager fp64 over full logits."""
        heads = self.to(torch.float64)
        student = scale * (heads.student_hidden @ heads.student_weight.T + heads.student_bias)
        teacher = heads.teacher_hidden @ heads.teacher_weight.T + heads.teacher_bias
        if softcap is not None:
            student, teacher = (softcap * torch.tanh(z / softcap) for z in (student, teacher))
        weight = torch.where(heads.labels == -100, 0, heads.token_weight)
        shared = shared or min(student.shape[1], teacher.shape[1])
        q = (student[:, :shared] / temperature).log_softmax(-1)
        p = (teacher[:, :shared] / temperature).log_softmax(-1)
        ce = torch.nn.functional.cross_entropy(student, heads.labels, reduction="none")
        agrees = q.argmax(-1) == p.argmax(-1)
        return {
            "kl_sum": (weight * (p.exp() * (p - q)).sum(-1)).sum(),
            "ce_sum": (weight * ce).sum(),
            "teacher_entropy_sum": -(weight * (p.exp() * p).sum(-1)).sum(),
            "agreement": (agrees & (weight != 0)).sum(),
            "n_valid": (weight != 0).sum(),
        }


@pytest.fixture
def make_heads():
    def make(n=13, vs=37, vt=37, hs=6, ht=9, *, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared_part = random(n, min(hs, ht))
        student_weight, teacher_weight = random(vs, hs), random(vt, ht)
        width, ids = min(hs, ht), min(vs, vt)
        teacher_weight[:ids, :width] = student_weight[:ids, :width]
        student_hidden, teacher_hidden = random(n, hs) * 0.5, random(n, ht) * 0.5
        student_hidden[:, :width] += shared_part
        teacher_hidden[:, :width] += shared_part
        labels = torch.randint(0, vs, (n,), generator=generator)
        labels[2::7] = -100
        token_weight = torch.linspace(0.5, 2, n, dtype=torch.float64)
        return Heads(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
            random(vs), random(vt), token_weight,
        ).to(dtype)  # fmt: skip

    return make


@IMPLS
@pytest.mark.parametrize(
    ("ids", "temperature", "dtype"),
    [
        ((37, 37), 1.0, torch.float32),
        ((37, 41), 2.5, torch.bfloat16),
        ((41, 37), 2.5, torch.float16),
    ],
    ids=str,
)
def test_sums_are_those_of_full_logits_in_double_precision(
    make_heads, impl, temperature, ids, dtype
):
    heads = make_heads(vs=ids[0], vt=ids[1], dtype=dtype)

    got = heads.measure(impl=impl, temperature=temperature, chunk_mb=TINY_CHUNK_MB)

    expected = heads.truth(temperature=temperature)
    assert 1 <= expected["agreement"] <= 10
    for name, value in expected.items():
        assert getattr(got, name).item() == pytest.approx(value.item(), rel=1e-5), name


@IMPLS
def test_softcap_scale_and_vocab_size_change_the_models_measured(make_heads, impl):
    heads = make_heads(dtype=torch.float64)

    got = heads.measure(impl=impl, softcap_s=3.0, softcap_t=3.0, logit_scale_s=0.7, vocab_size=30)

    expected = heads.truth(softcap=3.0, scale=0.7, shared=30)
    for name, value in expected.items():
        assert getattr(got, name).item() == pytest.approx(value.item(), rel=1e-12), name


@IMPLS
def test_an_id_the_teacher_excludes_has_no_part_in_entropy_or_divergence(make_heads, impl):
    heads = make_heads()
    excluded = heads.teacher_bias.clone()
    excluded[5] = -math.inf
    both = heads.student_bias.clone()
    both[5] = -math.inf
    heads = replace(heads, teacher_bias=excluded, student_bias=both, labels=heads.labels % 5)

    got = heads.measure(impl=impl, labels=None)
    kept = [index for index in range(37) if index != 5]
    cut = replace(
        heads, student_weight=heads.student_weight[kept], teacher_weight=heads.teacher_weight[kept],
        student_bias=both[kept], teacher_bias=excluded[kept],
    )  # fmt: skip

    torch.testing.assert_close(got, cut.measure(impl=impl, labels=None))


@IMPLS
def test_an_id_that_the_student_alone_excludes_makes_the_divergence_infinite(make_heads, impl):
    heads = make_heads()
    heads.student_bias[5] = -math.inf

    got = replace(heads, labels=heads.labels.clamp(max=4)).measure(impl=impl)

    assert got.kl_sum.item() == math.inf
    assert math.isfinite(got.teacher_entropy_sum)
    assert math.isfinite(got.ce_sum)
    heads.student_hidden[0] = math.nan  # of a row that counts
    got = heads.measure(impl=impl)
    assert math.isnan(got.kl_sum)
    assert math.isnan(got.ce_sum)


@IMPLS
def test_logits_far_apart_and_far_from_zero_keep_their_digits(make_heads, impl):
    heads = make_heads()
    heads.student_bias[:] = 300.0
    heads.student_bias[::3] = -300.0
    heads = replace(heads, teacher_bias=heads.student_bias.flip(0) / 8)

    got, expected = heads.measure(impl=impl), heads.truth()

    for name in ("kl_sum", "ce_sum", "teacher_entropy_sum"):
        value = getattr(got, name).item()
        assert value == pytest.approx(expected[name].item(), rel=3e-5, abs=1e-4), name


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_close_models_keep_their_digits(make_heads, impl):
    heads = make_heads(hs=9)
    weight, hidden = heads.teacher_weight, heads.teacher_hidden
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    heads = replace(
        heads, student_weight=weight + noise, student_hidden=hidden, student_bias=heads.teacher_bias
    )

    expected = heads.truth()

    assert expected["kl_sum"] < 0.01
    got = heads.measure(impl=impl)
    assert got.kl_sum.item() == pytest.approx(expected["kl_sum"].item(), rel=5e-3)


@IMPLS
def test_without_a_teacher_agreement_is_accuracy(impl):
    identity = torch.eye(4)
    labels = torch.tensor([0, 1, 0, -100])

    got = linear_stats(identity, identity, labels=labels, impl=impl)

    assert got.agreement.item() == 2
    assert got.n_valid.item() == 3
    assert got.kl_sum.item() == got.teacher_entropy_sum.item() == 0
    ce = torch.nn.functional.cross_entropy(identity, labels, reduction="sum")
    assert got.ce_sum.item() == pytest.approx(ce.item(), rel=1e-6)


@IMPLS
def test_of_several_equal_maxima_each_model_draws_one(impl):
    student = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.0]])

    got = linear_stats(student, torch.eye(3), teacher, torch.eye(3), impl=impl)

    # One of two with one of two, none, one of three, and one without a tie.
    assert got.agreement.item() == pytest.approx(1 / 4 + 1 / 3 + 1)


@IMPLS
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_a_maximum_whose_exponential_rounds_to_that_of_others_is_no_tie(temperature, impl):
    student, teacher = torch.zeros(1, 6), torch.zeros(1, 6)
    student[0, 2], teacher[0, 2] = 1e-8, 3e-8

    both = (student, torch.eye(6), teacher, torch.eye(6))
    got = linear_stats(*both, temperature=temperature, impl=impl)
    alone = linear_stats(student, torch.eye(6), labels=torch.tensor([2]), impl=impl)

    assert (got.agreement.item(), alone.agreement.item()) == (1, 1)


@IMPLS
def test_a_collapsed_model_is_right_as_often_as_a_guess(impl):
    labels = torch.tensor([0, 1, 4, -100])

    got = linear_stats(torch.zeros(4, 2), torch.ones(5, 2), labels=labels, impl=impl)

    assert got.agreement.item() == pytest.approx(3 / 5)


@IMPLS
def test_without_labels_every_weighted_row_counts_and_cross_entropy_is_zero(make_heads, impl):
    heads = make_heads()
    heads.token_weight[4] = 0

    got = heads.measure(impl=impl, labels=None)

    assert got.n_valid.item() == 12
    assert got.ce_sum.item() == 0
    assert got.kl_sum.item() > 0


@IMPLS
def test_rows_that_do_not_count_may_hold_anything(make_heads, impl):
    heads = make_heads()
    clean = heads.measure(impl=impl)
    for garbage in (math.nan, math.inf):
        heads.student_hidden[2::7], heads.teacher_hidden[2::7] = garbage, garbage

        assert all(map(torch.equal, heads.measure(impl=impl), clean))


@IMPLS
@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_valid_row_everything_is_zero(make_heads, impl, rows):
    heads = make_heads(n=rows)
    heads.labels[:] = -100
    heads.student_hidden[:] = math.nan

    assert all(value.item() == 0 for value in heads.measure(impl=impl))


def test_strides_and_leading_dimensions_do_not_matter(make_heads):
    heads = make_heads(n=12)
    expected = heads.measure()
    spread = replace(
        heads,
        student_hidden=heads.student_hidden.T.contiguous().T.reshape(3, 4, -1),
        teacher_hidden=heads.teacher_hidden.repeat_interleave(2, 0)[::2].reshape(3, 4, -1),
        student_weight=heads.student_weight.T.contiguous().T,
        labels=heads.labels.reshape(3, 4),
        token_weight=heads.token_weight.reshape(3, 4),
    )

    torch.testing.assert_close(spread.measure(), expected)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (9, 20, 20, 5)]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]), chunk_mb=st.sampled_from([1e-9, 3e-4, 1024.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_of_any_shape_match_the_reference(sizes, temperature, chunk_mb, seed):
    n, vs, vt, hs = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, hs), (vs, hs), (n, 4), (vt, 4)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    labels = torch.randint(0, vs, (n,), generator=generator)

    got, expected = (
        linear_stats(*tensors, labels, temperature=temperature, chunk_mb=chunk_mb, impl=impl)
        for impl in ("chunked", "reference")
    )

    torch.testing.assert_close(got, expected)


def test_inputs_that_require_grad_are_only_read(make_heads):
    heads = make_heads()
    heads.student_hidden.requires_grad_()
    heads.teacher_weight.requires_grad_()

    assert not any(value.requires_grad for value in heads.measure())


def test_under_autocast_products_run_in_its_type(make_heads):
    heads = make_heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = heads.measure()

    expected = heads.to(torch.bfloat16).measure(token_weight=heads.token_weight)
    torch.testing.assert_close(got, expected)


def test_it_compiles_whole_and_changes_nothing(make_heads):
    heads = make_heads()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled():
        return heads.measure(temperature=2.0)

    torch.testing.assert_close(compiled(), heads.measure(temperature=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"chunk_mb": 0}, "chunk_mb must be above 0, got 0"),
        ({"vocab_size": 38}, r"vocab_size 38 must lie in 1\.\.37"),
        ({"labels": torch.full((13,), 37)}, "label 37 is not one of the student"),
        ({"labels": torch.zeros(12, dtype=torch.long)}, r"labels is \[12\]; it must be \[13\]"),
        ({"teacher_bias": torch.zeros(3)}, r"teacher_bias is \[3\]; it must be \[37\]"),
        ({"impl": "cuda"}, "unknown impl 'cuda'"),
        ({"softcap_s": -1.0}, "softcap_s must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(make_heads, change, message):
    with pytest.raises(ValueError, match=message):
        make_heads().measure(**change)


def test_a_student_needs_something_to_be_compared_with(make_heads):
    heads = make_heads()
    hidden, weight = heads.student_hidden, heads.student_weight

    with pytest.raises(ValueError, match="pass a teacher or labels"):
        linear_stats(hidden, weight)
    with pytest.raises(ValueError, match="must be given together"):
        linear_stats(hidden, weight, heads.teacher_hidden)
    with pytest.raises(ValueError, match=r"hidden is \[13, 6\] .* teacher_hidden \[12, 9\]"):
        linear_stats(hidden, weight, heads.teacher_hidden[1:], heads.teacher_weight)
