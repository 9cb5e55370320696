"""Chunk buffers: their budget, from the caller or by the kind of device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd_kernels import chunking
from megakd_kernels.chunking import plan_chunks, plan_fused_chunks, plan_row_chunks


def row_chunks(like, chunk_mb):
    return plan_row_chunks(
        8192, widths=(128256, 128256), like=like, gradient=torch.bfloat16, chunk_mb=chunk_mb,
        implementation="triton",
    )  # fmt: skip


@pytest.mark.parametrize(("device", "default"), [("meta", 1024), ("cpu", 64)])
def test_the_budget_is_one_number_per_kind_of_device_unless_the_caller_names_another(
    device, default
):
    like = torch.empty(0, device=device)

    assert row_chunks(like, 0.0) == row_chunks(like, default) != row_chunks(like, 2 * default)


def test_8192_rows_of_a_large_vocabulary_form_the_gradient_in_few_products():
    plan = row_chunks(torch.empty(0, device="meta"), 0.0)

    assert (plan.group, plan.chunk) == (2048, 512)


@given(st.integers(1, 20000), st.integers(1, 200000), st.integers(1, 200000), st.floats(1, 4096))
def test_the_parts_of_a_gpu_are_alike_up_to_a_tile_and_within_the_budget(rows, ids, others, budget):
    plan = plan_fused_chunks(
        rows, widths=(ids, others), like=torch.empty(0), gradient=torch.bfloat16, chunk_mb=budget
    )

    half, widths = budget * 2**19, [-(-width // 64) * 64 for width in (ids, others)]
    for length, part, row in [
        (rows, plan.group, 2 * widths[0]), (plan.group, plan.chunk, 4 * sum(widths))
    ]:  # fmt: skip
        parts = -(-length // part)
        assert part == 1 or part * row <= half
        assert parts * part - length < 64 * parts
        assert parts <= -(-length * row // max(half - 64 * row, row))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("ALLOC_FAILED when calling cublasCreate")],
)
def test_memory_that_is_short_is_not_taken_for_a_missing_product(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "mm", fail)
    chunking._has_wide_results.cache_clear()

    with pytest.raises(type(error), match=str(error)):
        chunking._has_wide_results(torch.device("cpu"), torch.bfloat16)


def test_a_device_without_the_product_takes_another_way_and_says_so_once(monkeypatch, recwarn):
    def fail(*_, **__):
        raise RuntimeError("out_dtype is not supported")

    monkeypatch.setattr(torch, "addmm", fail)
    chunking._accumulates_narrow.cache_clear()

    assert not chunking._accumulates_narrow(torch.device("cpu"))
    assert not chunking._accumulates_narrow(torch.device("cpu"))
    assert ["multiply in fp32" in str(each.message) for each in recwarn] == [True]
    chunking._accumulates_narrow.cache_clear()


@given(st.integers(1, 5000), st.integers(1, 40000), st.sampled_from([64, 128]))
def test_the_chunks_of_a_cpu_are_equal_and_within_the_budget(rows, ids, budget):
    sizes = plan_chunks(rows, widths=(ids, ids), like=torch.empty(0), chunk_mb=budget)

    chunks = -(-rows // sizes.chunk)
    assert sizes.chunk == 1 or sizes.chunk * 2 * ids * 4 <= budget * 2**20
    assert chunks * sizes.chunk - rows < chunks
    assert sizes.block <= sizes.chunk
