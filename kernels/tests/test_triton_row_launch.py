"""Rows of the Triton kernel: spread over ranks, in wider buffers, none at all, refused."""

import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from megakd_kernels.row_plan import RowInputs, RowPlan
from megakd_kernels.triton.row_kd import TritonRows

# The interpreter computes with numpy, which speaks up where -inf meets -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, WIDTH, SHARED, ROWS = 64, 150, 130, 4
NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd")
ALL_SIX = tuple((name, 0.3 + index) for index, name in enumerate(NAMES))


def plan_of(*mixture, temperature=1.0):
    return RowPlan(
        mixture=mixture, beta=0.3, skew=0.1, temperature=temperature, value_scale=1.0,
        shared=SHARED, with_ce=True, with_gradient=True,
    )  # fmt: skip


class Meeting:
    """Two ranks in two threads of one process; one of them runs at a time."""

    def __init__(self):
        self.running = threading.Lock()
        self.rounds = 0
        self._barrier = threading.Barrier(2, timeout=60)
        self._parts = {}

    def join(self, rank, values, how):
        self._parts[rank] = values.clone()
        self.running.release()
        self._barrier.wait()
        joined = how(torch.stack([self._parts[0], self._parts[1]]))
        self._barrier.wait()
        self.running.acquire()
        self.rounds += rank
        return joined


@dataclass
class Rank:
    meeting: Meeting
    rank: int

    def maxima(self, values):
        (one,) = values
        return [self.meeting.join(self.rank, one, lambda parts: parts.amax(0))]

    def totals(self, values):
        (one,) = values
        return [self.meeting.join(self.rank, one, lambda parts: parts.sum(0))]


def make_rows():
    """Logits of student and teacher, and inputs; row 2 does not count and holds NaN."""
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(ROWS, WIDTH, generator=generator) * 3
    teacher = torch.randn(ROWS, SHARED, generator=generator) * 3
    labels = torch.tensor([0, WIDTH - 1, 7, 90])
    valid = torch.tensor([True, True, False, True])
    student[2], teacher[2] = math.nan, math.nan
    kd, ce = torch.rand(2, ROWS, generator=generator) * valid
    inputs = RowInputs(*(tensor.to(DEVICE) for tensor in (valid, labels, kd, ce)))
    return student.to(DEVICE), teacher.to(DEVICE), inputs


def run(kernel, student, teacher, inputs):
    gradient = student.clone()
    teacher = None if teacher is None else teacher.clone()
    return kernel.run_(gradient, teacher, inputs, gradient), gradient


def run_in_two_shards(plan, student, teacher, inputs, *, cut):
    """Both ranks' terms, the gradient put together, and the number of rounds."""
    meeting, results = Meeting(), {}

    def take_part(rank):
        columns = (slice(0, cut), slice(cut, None))[rank]
        part = None if teacher is None else teacher[:, columns]
        here = replace(
            plan, shared=0 if part is None else part.shape[1], vocab_start=columns.start,
            has_shards=True,
        )  # fmt: skip
        kernel = TritonRows(plan=here, reduce=Rank(meeting, rank), block=BLOCK)
        with meeting.running:
            results[rank] = run(kernel, student[:, columns], part, inputs)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gradient = torch.cat([results[0][1], results[1][1]], 1)
    return [results[0][0], results[1][0]], gradient, meeting.rounds


def check(both, whole):
    """Two ranks agree to the bit, and with whole rows up to rounding."""
    (first, second), gradient = both
    terms, expected = whole
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.testing.assert_close(first, terms, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_two_shards_of_the_vocabulary_make_whole_rows(temperature):
    # The second shard has ids that the teacher lacks; maxima of a row lie on different ranks,
    # or with nothing finite on one of them.
    student, teacher, inputs = make_rows()
    student[0, 3], teacher[0, 120] = 30.0, 30.0
    student[1, :80], teacher[1, :80] = -math.inf, -math.inf
    student[3, 100], teacher[3, 100] = 20.0, 20.0
    plan = plan_of(*ALL_SIX, temperature=temperature)
    whole = run(TritonRows(plan=plan, block=BLOCK), student, teacher, inputs)

    *both, rounds = run_in_two_shards(plan, student, teacher, inputs, cut=80)

    check(both, whole)
    assert whole[0].agrees.tolist()[::3] == [False, True]
    assert rounds == 3


def test_a_rank_without_an_id_takes_part():
    student, teacher, inputs = make_rows()
    plan = plan_of(("reverse_kl", 1.0), ("forward_kl", 0.5))
    whole = run(TritonRows(plan=plan, block=BLOCK), student, teacher, inputs)

    *both, rounds = run_in_two_shards(plan, student, teacher, inputs, cut=WIDTH)

    check(both, whole)
    assert rounds == 2


def test_cross_entropy_alone_works_in_shards():
    student, _, inputs = make_rows()
    plan = plan_of()
    whole = run(TritonRows(plan=plan, block=BLOCK), student, None, inputs)

    *both, _ = run_in_two_shards(plan, student, None, inputs, cut=64)

    check(both, whole)


def test_rows_of_a_wider_buffer_stay_within_their_columns(same_values):
    student, teacher, inputs = make_rows()
    kernel = TritonRows(plan=plan_of(("tvd", 1.0)), block=BLOCK)
    terms, gradient = run(kernel, student, teacher, inputs)
    buffer = torch.full((ROWS, WIDTH + 10), 7.0, device=DEVICE)
    rows = buffer[:, :WIDTH].copy_(student)

    wide_terms = kernel.run_(rows, teacher, inputs, rows)

    same_values((rows, *wide_terms), (gradient, *terms))
    assert (buffer[:, WIDTH:] == 7.0).all()


def test_no_row_gives_no_values():
    student, teacher, inputs = make_rows()
    plan = plan_of(("jsd", 0.5), ("tvd", 0.5))
    none = RowInputs(*(None if tensor is None else tensor[:0] for tensor in inputs))

    terms, _ = run(TritonRows(plan=plan), student[:0], teacher[:0], none)

    assert terms.divergences.shape == (2, 0)
    assert terms.ce.shape == terms.agrees.shape == (0,)


def test_rows_the_kernel_cannot_read_are_refused():
    student, teacher, inputs = make_rows()
    kernel = TritonRows(plan=plan_of(("forward_kl", 1.0)))

    with pytest.raises(ValueError, match=r"student is torch.float64; .* fp32, bf16 or fp16"):
        kernel.run_(student.double(), teacher, inputs, None)
    with pytest.raises(ValueError, match="gradient has a column stride of 4"):
        kernel.run_(student, teacher, inputs, torch.empty(WIDTH, ROWS, device=DEVICE).T)
    with pytest.raises(ValueError, match="rows without a teacher need labels"):
        kernel.run_(student, None, inputs._replace(labels=None), None)
