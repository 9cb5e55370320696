"""`topk_kd_loss` as an operator of torch: masks, reductions, graphs, memory and bad input."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd_kernels import topk_ops
from megakd_kernels.topk import TOPK_MODES, topk_kd_loss

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
MODES = pytest.mark.parametrize("mode", TOPK_MODES)


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


@pytest.mark.parametrize("mode", ["renorm", "subset"])
def test_logits_of_all_rows_never_exist(make_cached, mode, monkeypatch, largest_tensor):
    cached = make_cached(n=600, v=500)
    monkeypatch.setattr(topk_ops, "topk_kd", torch.no_grad()(topk_ops.topk_kd._init_fn))

    with largest_tensor() as largest:
        cached.loss(cached.leaves(), mode=mode, chunk_mb=0.1)

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
    ce_weight = 0.0 if mode == "subset" else 0.5

    def solve(impl):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = topk_kd_loss(
            *leaves, ids, logprobs, labels, mode=mode, t_squared=False, ce_weight=ce_weight,
            chunk_mb=chunk_mb, impl=impl,
        )  # fmt: skip
        return output, torch.autograd.grad(output.loss, leaves)

    torch.testing.assert_close(solve("chunked"), solve("reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "tails"}, "unknown mode 'tails'; known: renorm, tail, truncated, subset"),
        ({"mode": "tail", "temperature": 2.0}, "mode 'tail' at temperature 2.0"),
        ({"mode": "truncated", "temperature": 2.0}, "mode 'truncated' at temperature 2.0"),
        ({"mode": "subset", "ce_weight": 0.5}, "mode 'subset' with ce_weight 0.5"),
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
