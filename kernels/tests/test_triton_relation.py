"""Features of the relation kernels alone: skipped blocks, tilings, code for a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from megakd_kernels.relation_reference import Relation, relation_kl_reference, visible_pairs
from megakd_kernels.triton import relation_flash

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER_SHARED_MEMORY = 232_448


def make_relation(length, *, valid=None, segments=None, heads=1, causal=False):
    """A self relation of one example, one or two wide."""
    generator = torch.Generator().manual_seed(length)
    student, teacher = (
        torch.randn(1, length, heads * width, generator=generator).to(DEVICE) for width in (1, 2)
    )
    weight = torch.ones(1, length, device=DEVICE) if valid is None else valid.float()
    return Relation(student, None, teacher, None, valid, segments, weight, heads, causal)


def check_gradient(relation, distance):
    student = relation.student_queries.double().requires_grad_()
    loss, statistics = relation_flash.forward(relation)
    gradient, _ = relation_flash.backward(
        torch.ones_like(loss), statistics, relation, wants_queries=True, wants_keys=False
    )
    expected = relation_kl_reference(relation._replace(student_queries=student))
    (true_gradient,) = torch.autograd.grad(expected, student)

    assert distance(loss, expected.detach()) < 1e-5
    assert distance(gradient, true_gradient) < 2e-5


@pytest.mark.parametrize("causal", [False, True])
# Blocks of 16: padding that fills whole blocks on both sides, and documents whose blocks are
# apart from each other, in order and not.
@pytest.mark.parametrize("case", ["padding", "documents", "mixed"])
def test_blocks_that_are_skipped_are_those_that_do_not_meet(case, causal, distance):
    positions = torch.arange(52, device=DEVICE)[None]
    valid = (positions >= 18) & (positions < 35) if case == "padding" else None
    segments = positions // 17 if case == "documents" else None
    if case == "mixed":
        valid, segments = positions % 5 != 0, (positions // 16) % 2
    relation = make_relation(52, valid=valid, segments=segments, causal=causal)

    ranges = relation_flash._block_ranges(relation, 16)

    expected = {"padding": [[0, 0], [1, 3], [1, 3], [0, 0]],
                "documents": [[0, 2], [0, 3], [1, 4], [2, 4]],
                "mixed": [[0, 3], [1, 4], [0, 3], [1, 4]]}  # fmt: skip
    assert ranges.tolist() == [expected[case]]
    check_gradient(relation, distance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=40))
def test_every_visible_pair_lies_in_the_range_of_its_block(positions):
    valid, segments = (torch.tensor([column]) for column in zip(*positions, strict=True))
    relation = make_relation(len(positions), valid=valid.bool().to(DEVICE),
                             segments=segments.to(DEVICE))  # fmt: skip

    first, last = relation_flash._block_ranges(relation, 4).unbind(-1)

    _, _, rows, columns = visible_pairs(relation).nonzero(as_tuple=True)
    assert (first[0, rows // 4] <= columns // 4).all()
    assert (columns // 4 < last[0, rows // 4]).all()


def test_without_masks_there_is_nothing_to_skip():
    assert relation_flash._block_ranges(make_relation(5), 16) is None


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 34), st.integers(1, 2), st.booleans())
def test_kernels_match_the_reference_for_any_length_and_mask(data, length, heads, causal):
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    valid, segments = (torch.tensor([data.draw(bits)], device=DEVICE) for _ in range(2))
    relation = make_relation(length, valid=valid, segments=segments.int(), heads=heads,
                             causal=causal)  # fmt: skip

    loss, _ = relation_flash.forward(relation)

    double = relation._replace(student_queries=relation.student_queries.double())
    torch.testing.assert_close(loss.double(), relation_kl_reference(double), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's memory is not seen by the dispatcher")
def test_kernels_never_hold_all_pairs_of_positions(monkeypatch, largest_tensor):
    heads, length = 4, 128
    valid = torch.ones(1, length, dtype=torch.bool)
    relation = make_relation(length, valid=valid, heads=heads)
    launched = []
    # The interpreter's own temporaries are not torch's; what it is given is.
    for name in ("forward_kernel", "backward_kernel"):
        recorder = {(heads * length // 16,): lambda *args, **_: launched.extend(args)}
        monkeypatch.setattr(relation_flash, name, recorder)

    with largest_tensor() as largest:
        loss, statistics = relation_flash.forward(relation)
        relation_flash.backward(loss, statistics, relation, wants_queries=True, wants_keys=False)

    given = max(item.numel() for item in launched if isinstance(item, torch.Tensor))
    assert 0 < max(given, largest.numel) <= heads * length * length / 16


# Narrow, usual and widest heads in both sizes of number.
@pytest.mark.parametrize("row_bytes", [64, 256, 512, 1024, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
# A100, consumer cards, H100 and H200.
@pytest.mark.parametrize("shared_memory", [166_912, 101_376, HOPPER_SHARED_MEMORY])
def test_a_tiling_fits_the_shared_memory(row_bytes, itemsize, shared_memory):
    block, stages = relation_flash._tiling(row_bytes, itemsize, shared_memory)

    assert (1 + stages) * block * row_bytes + 4 * block**2 <= shared_memory
    assert block <= (64 if itemsize == 2 else 32)
