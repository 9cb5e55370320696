"""`topk_kd_loss` on the torch paths against eager fp64, its masks, memory and bad input."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megakd_kernels as mk
from megakd_kernels import topk_ops
from megakd_kernels.topk import TOPK_MODES, topk_kd_loss

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
MODES = pytest.mark.parametrize("mode", TOPK_MODES)
# A chunk of two or three rows, so that 11 rows make several and a ragged last one.
TINY_CHUNK_MB = 0.0004
COLD_AND_WARM = [(mode, 1.0) for mode in TOPK_MODES] + [("renorm", 2.5)]
TASKS = [
    {"mode": mode, "temperature": temperature, "ce_weight": ce_weight}
    for mode, temperature in COLD_AND_WARM
    for ce_weight in (0.0, 0.7)
]


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: "-".join(map(str, task.values())))
def test_values_and_gradients_are_those_of_full_logits_in_double_precision(
    make_cached, distance, impl, task, dtype
):
    cached = make_cached(dtype=dtype)

    output, gradients = cached.solve(impl=impl, chunk_mb=TINY_CHUNK_MB, **task)

    loss, truth = cached.truth(**task)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        assert distance(gradient, expected) < (2e-5 if dtype == torch.float32 else 5e-3)
    assert output.n_valid.item() == 9
    assert output.divergence_sums.shape == (1,)


@IMPLS
@pytest.mark.parametrize(("mode", "temperature"), COLD_AND_WARM)
def test_a_cache_of_the_whole_vocabulary_gives_the_forward_kl(
    make_cached, distance, impl, mode, temperature
):
    cached = make_cached(k=31)
    teacher = make_cached(seed=5)
    logits = teacher.hidden @ teacher.weight.T
    logprobs, ids = logits.log_softmax(-1).topk(31)
    options = {"temperature": temperature, "t_squared": True, "ce_weight": 0.5}

    output, gradients = replace(cached, ids=ids, logprobs=logprobs).solve(
        mode=mode, impl=impl, **options
    )

    leaves = cached.leaves()
    expected = mk.linear_kd_loss(
        *leaves[:2], teacher.hidden, teacher.weight, cached.labels, student_bias=leaves[2],
        **options,
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=3e-6)
    assert output.agreement == expected.agreement
    for gradient, true in zip(gradients, torch.autograd.grad(expected.loss, leaves), strict=True):
        assert distance(gradient, true) < 5e-6


@IMPLS
@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16], ids=str)
def test_the_rounding_of_a_low_precision_cache_is_no_tail(make_cached, impl, kept):
    cached = make_cached(k=31)
    logprobs, ids = (cached.hidden @ cached.weight.T + cached.bias).log_softmax(-1).topk(31)
    options = {"ids": ids, "logprobs": logprobs.to(kept), "impl": impl}

    output, gradients = cached.solve(mode="tail", **options)

    assert 0 <= output.loss.item() < 0.1
    assert all(gradient.isfinite().all() for gradient in gradients)


@IMPLS
def test_a_student_that_is_the_teacher_has_no_tail_loss_however_few_ids_are_kept(make_cached, impl):
    cached = make_cached(dtype=torch.float64)
    logits = cached.hidden @ cached.weight.T + cached.bias
    logprobs, ids = logits.log_softmax(-1).topk(3)

    output, gradients = cached.solve(mode="tail", ids=ids, logprobs=logprobs, impl=impl)

    assert output.loss.item() == pytest.approx(0, abs=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
    assert output.agreement == output.n_valid == 9


@MODES
def test_rounding_makes_no_row_negative(mode):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(200, 40, generator=generator)
    logprobs, ids = student.log_softmax(-1).topk(40 if mode == "renorm" else 20)

    rows = topk_kd_loss(
        student, torch.eye(40), ids, logprobs, mode=mode, t_squared=False, reduction="none"
    ).loss

    assert rows.min() >= 0
    assert rows.max() < 1e-5


@IMPLS
@MODES
def test_entries_that_are_not_there_may_stand_anywhere_and_hold_anything(make_cached, impl, mode):
    cached = make_cached(k=3)
    cached.ids[0, 2:] = cached.ids[1].max()  # a full list for every row
    clean, clean_gradients = cached.solve(mode=mode, impl=impl)
    gap = torch.full((11, 1), -7)
    ids = torch.cat([cached.ids[:, :1], gap, cached.ids[:, 1:], gap], 1)
    nothing = torch.full((11, 1), math.nan)
    some = torch.full((11, 1), 3.0)
    logprobs = torch.cat([cached.logprobs[:, :1], nothing, cached.logprobs[:, 1:], some], 1)

    output, gradients = cached.solve(mode=mode, impl=impl, ids=ids, logprobs=logprobs)

    torch.testing.assert_close(output, clean)
    torch.testing.assert_close(gradients, clean_gradients)


@IMPLS
@MODES
def test_a_row_without_any_id_has_no_divergence(make_cached, impl, mode):
    cached = make_cached()
    cached.ids[4] = -1

    output, gradients = cached.solve(mode=mode, impl=impl)

    others = cached.labels.clone()
    others[4] = -100
    expected, expected_gradients = cached.solve(mode=mode, impl=impl, labels=others)
    torch.testing.assert_close(output.divergence_sums, expected.divergence_sums)
    torch.testing.assert_close(gradients, expected_gradients)
    assert output.n_valid == expected.n_valid + 1


@IMPLS
def test_an_id_the_teacher_excludes_is_the_same_as_one_it_does_not_name(make_cached, impl):
    cached = make_cached(k=4)
    cached.ids[0] = torch.arange(4)
    cached.logprobs[:, 3] = -math.inf
    shorter = {"ids": cached.ids[:, :3], "logprobs": cached.logprobs[:, :3]}

    got, gradients = cached.solve(mode="renorm", impl=impl)

    expected, expected_gradients = cached.solve(mode="renorm", impl=impl, **shorter)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@IMPLS
def test_logits_that_are_extreme_or_excluded_stay_exact(make_cached, distance, impl):
    cached = make_cached()
    bias = cached.bias.clone()
    bias[::3] += 80
    bias[1::3] -= 80
    bias[30] = -math.inf
    ids = torch.where(cached.ids == 30, -1, cached.ids)
    cached = replace(cached, bias=bias, labels=cached.labels.clamp(max=29), ids=ids)

    output, gradients = cached.solve(mode="tail", ce_weight=1.0, impl=impl)

    loss, truth = cached.truth("tail", ce_weight=1.0)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert distance(gradient, expected) < 2e-5


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_a_student_that_gives_the_tail_nothing_has_a_finite_gradient(make_cached, scale):
    cached = make_cached()
    bias = torch.zeros(31)
    bias[:3] = scale
    cached = replace(cached, bias=bias, ids=torch.arange(3).expand(11, 3),
                     logprobs=cached.logprobs[:, :3])  # fmt: skip

    output, (_, _, gradient) = cached.solve(mode="tail")

    counted = cached.labels != -100
    rest = 1 - cached.logprobs[counted].double().exp().sum(1)
    # The others pull with all of the rest, shared out as the student shares out what it gives.
    assert gradient[3:].sum().item() == pytest.approx(-rest.sum().item(), rel=1e-4)
    assert output.loss.item() > 20


@IMPLS
@pytest.mark.parametrize(
    ("logits", "chance"),
    [([0.0] * 6, 1 / 6), ([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], 1 / 3), ([1.0, 0, 0, 0, 2.0, 0], 0.0)],
)
def test_of_equal_maxima_the_student_draws_one(logits, chance, impl):
    ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.6, 0.3]]).log()

    output = topk_kd_loss(
        torch.tensor([logits]), torch.eye(6), ids, logprobs, mode="tail", t_squared=True, impl=impl
    )

    assert output.row_agrees.tolist() == pytest.approx([chance])


@IMPLS
def test_cross_entropy_is_that_of_torch_and_agreement_compares_the_first_ids(make_cached, impl):
    cached = make_cached(dtype=torch.float64)

    output, _ = cached.solve(mode="renorm", ce_weight=0.3, impl=impl)

    logits = cached.hidden @ cached.weight.T + cached.bias
    ce = torch.nn.functional.cross_entropy(logits, cached.labels, reduction="sum")
    counted = cached.labels != -100
    agrees = (logits.argmax(-1) == cached.ids[:, 0]) & counted
    assert 0 < agrees.sum() < 9
    torch.testing.assert_close(output.ce_sum, ce)
    assert output.agreement == agrees.sum()


@IMPLS
@MODES
def test_rows_that_do_not_count_may_hold_anything(make_cached, impl, mode):
    cached = make_cached()
    clean, clean_gradients = cached.solve(mode=mode, impl=impl)
    for tensor in (cached.hidden, cached.logprobs):
        tensor[2::7] = math.nan
    cached.ids[2::7] = 99

    output, gradients = cached.solve(mode=mode, impl=impl)

    assert all(torch.equal(a, b) for a, b in zip(output, clean, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, clean_gradients, strict=True))
    assert gradients[0][2::7].eq(0).all()


@IMPLS
@MODES
@pytest.mark.parametrize("rows", [0, 4])
def test_without_a_valid_row_loss_and_gradients_are_zero(make_cached, impl, mode, rows):
    cached = make_cached(n=rows)
    cached.labels[:] = -100

    output, gradients = cached.solve(mode=mode, impl=impl, reduction="mean")

    assert output.loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


@IMPLS
@MODES
def test_token_weights_and_reductions_act_on_rows(make_cached, impl, mode):
    cached = make_cached(dtype=torch.float64)
    weight = torch.linspace(0, 2, 11, dtype=torch.float64)
    options = {"mode": mode, "impl": impl, "token_weight": weight, "kd_weight": 1.5}

    summed, _ = cached.solve(**options)
    mean, _ = cached.solve(**options, reduction="mean")
    scaled, _ = cached.solve(**options, reduction="num_items", num_items=torch.tensor(20.0))
    with torch.no_grad():
        rows = cached.loss(cached.leaves(), **options, reduction="none").loss

    assert summed.n_valid.item() == 8
    torch.testing.assert_close(summed.loss, 1.5 * summed.divergence_sums[0])
    torch.testing.assert_close(mean.loss, summed.loss / 8)
    torch.testing.assert_close(scaled.loss, summed.loss / 20)
    torch.testing.assert_close(rows.sum(), summed.loss.detach())
    assert rows.shape == (11,)
    assert rows[0] == 0


def test_strides_and_leading_dimensions_do_not_matter(make_cached):
    cached = make_cached(n=12)
    expected, gradients = cached.solve()
    spread = replace(
        cached,
        hidden=cached.hidden.T.contiguous().T.reshape(3, 4, -1),
        weight=cached.weight.T.contiguous().T,
        labels=cached.labels.reshape(3, 4),
        ids=cached.ids.T.contiguous().T.reshape(3, 4, -1).int(),
        logprobs=cached.logprobs.reshape(3, 4, -1),
    )

    got, (hidden_gradient, *others) = spread.solve()

    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(hidden_gradient.reshape(12, -1), gradients[0])
    torch.testing.assert_close(tuple(others), gradients[1:])


def test_logits_of_all_rows_never_exist(make_cached, monkeypatch, largest_tensor):
    cached = make_cached(n=600, v=500)
    monkeypatch.setattr(topk_ops, "topk_kd", torch.no_grad()(topk_ops.topk_kd._init_fn))

    with largest_tensor() as largest:
        cached.loss(cached.leaves(), chunk_mb=0.1)

    assert 0 < largest.numel <= 600 * 500 / 10


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (8, 20, 20, 5)]),
    mode=st.sampled_from(TOPK_MODES), chunk_mb=st.sampled_from([1e-9, 3e-4, 1024.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_of_any_shape_match_the_reference(sizes, mode, chunk_mb, seed):
    n, v, k, h = sizes
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(n, h), random(v, h)
    logprobs, ids = random(n, v).log_softmax(-1).topk(min(k, v))
    labels = torch.randint(0, v, (n,), generator=generator)

    def solve(impl):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = topk_kd_loss(
            *leaves, ids, logprobs, labels, mode=mode, t_squared=False, ce_weight=0.5,
            chunk_mb=chunk_mb, impl=impl,
        )  # fmt: skip
        return output, torch.autograd.grad(output.loss, leaves)

    torch.testing.assert_close(solve("chunked"), solve("reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "tails"}, "unknown mode 'tails'; known: renorm, tail"),
        ({"mode": "tail", "temperature": 2.0}, "mode 'tail' at temperature 2.0"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
        ({"labels": None, "ce_weight": 1.0}, "ce_weight is 1.0 but labels is None"),
        ({"reduction": "none"}, "reduction 'none' has no gradient"),
        ({"ids": torch.full((11, 5), 31)}, "topk_ids hold 31, and the student has 31 ids"),
        ({"ids": torch.tensor([[1, 2, 3, 4, 2]] * 11)}, "topk_ids hold 2 twice"),
        ({"ids": torch.zeros(11, 4, dtype=torch.long)}, r"topk_ids are \[11, 4\]"),
        ({"ids": torch.zeros(11, 5)}, r"topk_ids are torch\.float32"),
        ({"logprobs": torch.full((11, 5), 0.1)}, "of row 0 have a maximum of 0.1 and"),
        ({"logprobs": torch.full((11, 5), torch.nan)}, "of row 0 have a maximum of nan"),
        ({"logprobs": torch.full((11, 5), -1.0)}, "probabilities that sum to 1.8"),
        ({"logprobs": torch.zeros(11, 5).long()}, r"topk_logprobs are torch\.int64"),
        ({"impl": "fused"}, "unknown impl 'fused'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_named(make_cached, change, message):
    cached = make_cached()
    cached.ids[0] = torch.arange(5)

    with pytest.raises(ValueError, match=message):
        cached.solve(**change)


def test_an_id_outside_the_vocabulary_that_nobody_looked_at_makes_its_row_nan(
    make_cached, monkeypatch
):
    cached = make_cached()
    cached.ids[4, 1] = 31
    # As on an accelerator, where looking would make it wait.
    monkeypatch.setattr("megakd_kernels.topk._check_ids", lambda *_: None)

    output, gradients = cached.solve(token_weight=torch.ones(11))

    assert output.loss.isnan()
    assert gradients[0][4].isnan().all()
    assert gradients[0][torch.arange(11) != 4].isfinite().all()
