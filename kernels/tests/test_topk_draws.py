"""`topk_kd_loss` on random draws of the teacher's tokens: the shares of the draws as targets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megakd_kernels as mk

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
VOCABULARY, WIDTH = 7, 5


def shares_of(draws, count=None):
    """Distinct ids of draws [N, n] and the logarithms of their shares, in `count` slots."""
    n, slots = draws.shape[1], draws.shape[1] if count is None else count
    ids = torch.full((len(draws), slots), -1)
    logprobs = torch.full((len(draws), slots), -math.inf, dtype=torch.float64)
    for row, drawn in enumerate(draws.tolist()):
        for slot, token in enumerate(sorted(set(drawn))):
            ids[row, slot] = token
            logprobs[row, slot] = math.log(drawn.count(token) / n)
    return ids, logprobs


def models(rows, *, seed):
    made = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    student = random(rows, WIDTH), random(VOCABULARY, WIDTH)
    return [*student, random(rows, WIDTH), random(VOCABULARY, WIDTH)], made


def test_the_mean_gradient_of_draws_is_the_gradient_of_the_full_divergence():
    tries, draws = 20_000, 4
    (hidden, weight, taught, head), made = models(1, seed=0)
    p = (taught @ head.T).softmax(-1)
    drawn = p.expand(tries, -1).multinomial(draws, replacement=True, generator=made)
    often, exact = hidden.expand(tries, -1).clone().requires_grad_(), hidden.requires_grad_()

    sampled = mk.topk_kd_loss(
        often, weight, *shares_of(drawn), mode="renorm", t_squared=True, impl="chunked"
    )
    full = mk.linear_kd_loss(exact, weight, taught, head, t_squared=True, impl="chunked")

    (gradients,) = torch.autograd.grad(sampled.loss, often)  # [tries, WIDTH], one per draw
    (expected,) = torch.autograd.grad(full.loss, exact)
    error = gradients.std(0) / math.sqrt(tries)
    assert ((gradients.mean(0) - expected[0]).abs() <= 4 * error).all()
    assert (error < 0.02 * expected.abs().max()).all()
    # The value is too high by the mean KL(shares || teacher), and never below the true value.
    assert sampled.loss / tries > full.loss + 0.1


@IMPLS
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_values_and_gradients_are_those_of_dense_shares_whatever_the_masks(impl, data):
    rows, draws = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    (hidden, weight, _, _), made = models(rows, seed=data.draw(st.integers(0, 99)))
    drawn = torch.randint(VOCABULARY, (rows, draws), generator=made)
    ids, logprobs = shares_of(drawn, draws + data.draw(st.integers(0, 2)))
    order = torch.randperm(ids.shape[1], generator=made)  # unused slots may be anywhere
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    labels = torch.where(counted, torch.randint(VOCABULARY, (rows,), generator=made), -100)
    ids[~counted], logprobs[~counted] = 3, math.nan  # rows that do not count may hold anything
    ours, dense = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))

    output = mk.topk_kd_loss(
        *ours, ids[:, order], logprobs[:, order], labels, mode="renorm", t_squared=True,
        ce_weight=0.3, impl=impl, chunk_mb=0.0004,
    )  # fmt: skip

    log_q = (dense[0] @ dense[1].T).log_softmax(-1)[counted]
    shares = torch.nn.functional.one_hot(drawn, VOCABULARY).double().mean(1)[counted]
    expected = (torch.xlogy(shares, shares) - shares * log_q).sum()
    expected = expected - 0.3 * log_q.gather(1, labels[counted, None]).sum()
    torch.testing.assert_close(output.loss, expected)
    for actual, wanted in zip(
        torch.autograd.grad(output.loss, ours), torch.autograd.grad(expected, dense), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-9, rtol=1e-9)
