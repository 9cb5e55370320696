"""Kernels of the relation loss: one sweep forward, one backward, no atomics.

A program owns a block of positions of one head and streams the blocks that can interact with it.
Scores stay in registers, in base 2. Row maximum and log Z are kept separate: their sum would lose
the small differences of large scores. Endings: _s student, _t teacher.
Shapes: B batch, L positions, D width, A relation heads.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
import math

import triton
import triton.language as tl

_LN_2 = tl.constexpr(math.log(2))
# Finite, so that no difference is NaN. A hidden score is as far below the first maximum as the
# first maximum is below every real score, so that its exponential is 0 relative to both.
_FIRST_MAXIMUM = tl.constexpr(-1e30)
_HIDDEN_SCORE = tl.constexpr(-2e30)


@triton.jit
def _load_block(
    pointer, offset, rows, counted, row_stride, stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return [BLOCK, PADDED], with zeros beyond the width and for positions that do not count."""
    columns = tl.arange(0, PADDED)
    addresses = offset + rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * stride
    mask = counted[:, None] & (columns < WIDTH)[None, :]
    block = tl.load(pointer + addresses, mask=mask, other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def _counted(valid, offset, rows, length, MASKED: tl.constexpr):
    counted = rows < length
    if MASKED:
        counted = tl.load(valid + offset + rows, mask=counted, other=0) != 0
    return counted


@triton.jit
def _segments_of(segments, offset, rows, length, SEGMENTED: tl.constexpr):
    """Return the segment of each position; an unused value without segments."""
    numbers = rows
    if SEGMENTED:
        numbers = tl.load(segments + offset + rows, mask=rows < length, other=0)
    return numbers


@triton.jit
def forward_kernel(
    queries_s, keys_s, queries_t, keys_t, valid, segments, ranges, statistics, values,
    query_batch_s, query_row_s, query_step_s, key_batch_s, key_row_s, key_step_s,
    query_batch_t, query_row_t, query_step_t, key_batch_t, key_row_t, key_step_t,
    length, heads, plane, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    PADDED_S: tl.constexpr, PADDED_T: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SEGMENTED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Store statistics [4, B, A, L] (maximum, log2 Z; student, teacher) and values [B, A, L]."""
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % blocks
    head = ((tl.program_id(0) // blocks) % heads).to(tl.int64)
    example = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    flat = example * length
    rows = block * BLOCK + tl.arange(0, BLOCK)
    row_counted = _counted(valid, flat, rows, length, MASKED)
    row_segments = _segments_of(segments, flat, rows, length, SEGMENTED)
    offset = example * query_batch_s + head * WIDTH_S * query_step_s
    x_rows = _load_block(queries_s, offset, rows, row_counted, query_row_s, query_step_s,
                         WIDTH_S, PADDED_S, UPCAST)  # fmt: skip
    offset = example * query_batch_t + head * WIDTH_T * query_step_t
    y_rows = _load_block(queries_t, offset, rows, row_counted, query_row_t, query_step_t,
                         WIDTH_T, PADDED_T, UPCAST)  # fmt: skip
    offset_s = example * key_batch_s + head * WIDTH_S * key_step_s
    offset_t = example * key_batch_t + head * WIDTH_T * key_step_t

    first = 0
    last = blocks
    if MASKED or SEGMENTED:
        first = tl.load(ranges + (example * blocks + block) * 2)
        last = tl.load(ranges + (example * blocks + block) * 2 + 1)
    if CAUSAL:
        last = tl.minimum(last, block + 1)

    max_s = tl.full([BLOCK], _FIRST_MAXIMUM, tl.float32)
    max_t = tl.full([BLOCK], _FIRST_MAXIMUM, tl.float32)
    z_s = tl.zeros([BLOCK], tl.float32)
    z_t = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last):
        columns = start * BLOCK + tl.arange(0, BLOCK)
        column_counted = _counted(valid, flat, columns, length, MASKED)
        visible = row_counted[:, None] & column_counted[None, :]
        if SEGMENTED:
            column_segments = _segments_of(segments, flat, columns, length, SEGMENTED)
            visible &= row_segments[:, None] == column_segments[None, :]
        if CAUSAL:
            visible &= rows[:, None] >= columns[None, :]
        x_columns = _load_block(keys_s, offset_s, columns, column_counted, key_row_s, key_step_s,
                                WIDTH_S, PADDED_S, UPCAST)  # fmt: skip
        y_columns = _load_block(keys_t, offset_t, columns, column_counted, key_row_t, key_step_t,
                                WIDTH_T, PADDED_T, UPCAST)  # fmt: skip
        s = tl.dot(x_rows, tl.trans(x_columns), input_precision="ieee") * scale_s
        t = tl.dot(y_rows, tl.trans(y_columns), input_precision="ieee") * scale_t
        s = tl.where(visible, s, _HIDDEN_SCORE)
        t = tl.where(visible, t, _HIDDEN_SCORE)

        new_max_s = tl.maximum(max_s, tl.max(s, 1))
        new_max_t = tl.maximum(max_t, tl.max(t, 1))
        s -= new_max_s[:, None]
        t -= new_max_t[:, None]
        p = tl.exp2(t)
        shift_s = max_s - new_max_s
        shift_t = max_t - new_max_t
        decay_t = tl.exp2(shift_t)
        # gap = sum p ((t - max_t) - (s - max_s)): a new maximum changes every term.
        gap = decay_t * (gap + z_t * (shift_t - shift_s)) + tl.sum(p * (t - s), 1)
        z_t = decay_t * z_t + tl.sum(p, 1)
        z_s = tl.exp2(shift_s) * z_s + tl.sum(tl.exp2(s), 1)
        max_s = new_max_s
        max_t = new_max_t

    seen = z_t > 0
    z_s = tl.where(seen, z_s, 1.0)
    z_t = tl.where(seen, z_t, 1.0)
    divergence = (gap / z_t + tl.log2(z_s / z_t)) * _LN_2
    divergence = tl.where(divergence < 0, 0.0, divergence)  # a maximum would turn NaN into 0
    within = rows < length
    place = (example * heads + head) * length + rows
    tl.store(values + place, divergence, mask=within)
    tl.store(statistics + place, tl.where(seen, max_s, 0.0), mask=within)
    tl.store(statistics + plane + place, tl.log2(z_s), mask=within)
    tl.store(statistics + 2 * plane + place, tl.where(seen, max_t, 0.0), mask=within)
    tl.store(statistics + 3 * plane + place, tl.log2(z_t), mask=within)


@triton.jit
def _softmax_gap(s, t, max_s, log_z_s, max_t, log_z_t, visible):
    """Return q - p for visible pairs, else 0; statistics broadcast against the scores."""
    # Masked before the exponential: a hidden score may exceed the maximum of the visible scores.
    log_q = tl.where(visible, (s - max_s) - log_z_s, _HIDDEN_SCORE)
    log_p = tl.where(visible, (t - max_t) - log_z_t, _HIDDEN_SCORE)
    return tl.exp2(log_q) - tl.exp2(log_p)


@triton.jit
def backward_kernel(
    own_s, streamed_s, own_t, streamed_t, valid, segments, ranges, statistics, factor, gradient,
    own_batch_s, own_row_s, own_step_s, streamed_batch_s, streamed_row_s, streamed_step_s,
    own_batch_t, own_row_t, own_step_t, streamed_batch_t, streamed_row_t, streamed_step_t,
    length, heads, plane, scale_s, scale_t,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    PADDED_S: tl.constexpr, PADDED_T: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SEGMENTED: tl.constexpr, UPCAST: tl.constexpr,
    AS_QUERIES: tl.constexpr, AS_KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """Store the gradient [B, L, D] of the own positions, used as queries, as keys, or as both.

    Both applies to a self relation: the scores are symmetric, so that one tile gives the gradient
    of row i against column j and the gradient of row j against column i.
    """
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % blocks
    head = ((tl.program_id(0) // blocks) % heads).to(tl.int64)
    example = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    flat = example * length
    place = (example * heads + head) * length
    rows = block * BLOCK + tl.arange(0, BLOCK)
    within = rows < length
    row_counted = _counted(valid, flat, rows, length, MASKED)
    row_segments = _segments_of(segments, flat, rows, length, SEGMENTED)
    offset = example * own_batch_s + head * WIDTH_S * own_step_s
    x_rows = _load_block(own_s, offset, rows, row_counted, own_row_s, own_step_s,
                         WIDTH_S, PADDED_S, UPCAST)  # fmt: skip
    offset = example * own_batch_t + head * WIDTH_T * own_step_t
    y_rows = _load_block(own_t, offset, rows, row_counted, own_row_t, own_step_t,
                         WIDTH_T, PADDED_T, UPCAST)  # fmt: skip
    offset_s = example * streamed_batch_s + head * WIDTH_S * streamed_step_s
    offset_t = example * streamed_batch_t + head * WIDTH_T * streamed_step_t
    row_max_s = tl.load(statistics + place + rows, mask=within, other=0.0)
    row_log_z_s = tl.load(statistics + plane + place + rows, mask=within, other=0.0)
    row_max_t = tl.load(statistics + 2 * plane + place + rows, mask=within, other=0.0)
    row_log_z_t = tl.load(statistics + 3 * plane + place + rows, mask=within, other=0.0)
    row_factor = tl.load(factor + flat + rows, mask=within, other=0.0)

    first = 0
    last = blocks
    if MASKED or SEGMENTED:
        first = tl.load(ranges + (example * blocks + block) * 2)
        last = tl.load(ranges + (example * blocks + block) * 2 + 1)

    total = tl.zeros([BLOCK, PADDED_S], tl.float32)
    # Under a causal mask only the diagonal block needs both directions. Without the mask all
    # blocks do, and there is one part.
    for part in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
        begin = first
        end = last
        if CAUSAL:
            if part == 0:
                end = tl.minimum(last, block)
            elif part == 1:
                begin = block
                end = block + 1
            else:
                begin = tl.maximum(first, block + 1)
        if part == 1 or (CAUSAL and ((AS_QUERIES and part == 0) or (AS_KEYS and part == 2))):
            for start in range(begin, end):
                columns = start * BLOCK + tl.arange(0, BLOCK)
                inside = columns < length
                column_counted = _counted(valid, flat, columns, length, MASKED)
                x_columns = _load_block(
                    streamed_s, offset_s, columns, column_counted, streamed_row_s,
                    streamed_step_s, WIDTH_S, PADDED_S, UPCAST,
                )  # fmt: skip
                y_columns = _load_block(
                    streamed_t, offset_t, columns, column_counted, streamed_row_t,
                    streamed_step_t, WIDTH_T, PADDED_T, UPCAST,
                )  # fmt: skip
                s = tl.dot(x_rows, tl.trans(x_columns), input_precision="ieee") * scale_s
                t = tl.dot(y_rows, tl.trans(y_columns), input_precision="ieee") * scale_t
                meets = row_counted[:, None] & column_counted[None, :]
                if SEGMENTED:
                    column_segments = _segments_of(segments, flat, columns, length, SEGMENTED)
                    meets &= row_segments[:, None] == column_segments[None, :]
                change = tl.zeros([BLOCK, BLOCK], tl.float32)
                if AS_QUERIES and part < 2:
                    visible = meets
                    if CAUSAL:
                        visible &= rows[:, None] >= columns[None, :]
                    change += row_factor[:, None] * _softmax_gap(
                        s, t, row_max_s[:, None], row_log_z_s[:, None],
                        row_max_t[:, None], row_log_z_t[:, None], visible,
                    )  # fmt: skip
                if AS_KEYS and part > 0:
                    visible = meets
                    if CAUSAL:
                        visible &= columns[None, :] >= rows[:, None]
                    others = statistics + place + columns
                    max_s = tl.load(others, mask=inside, other=0.0)
                    log_z_s = tl.load(others + plane, mask=inside, other=0.0)
                    max_t = tl.load(others + 2 * plane, mask=inside, other=0.0)
                    log_z_t = tl.load(others + 3 * plane, mask=inside, other=0.0)
                    column_factor = tl.load(factor + flat + columns, mask=inside, other=0.0)
                    change += column_factor[None, :] * _softmax_gap(
                        s, t, max_s[None, :], log_z_s[None, :],
                        max_t[None, :], log_z_t[None, :], visible,
                    )  # fmt: skip
                if x_columns.dtype == tl.float16:
                    # Small weights would underflow in fp16; TF32 represents fp16 exactly.
                    total = tl.dot(change, x_columns.to(tl.float32), total,
                                   input_precision="tf32")  # fmt: skip
                else:
                    total = tl.dot(change.to(x_columns.dtype), x_columns, total,
                                   input_precision="ieee")  # fmt: skip

    columns_s = tl.arange(0, PADDED_S)
    width = heads * WIDTH_S
    addresses = (flat + rows)[:, None] * width + head * WIDTH_S + columns_s[None, :]
    mask = within[:, None] & (columns_s < WIDTH_S)[None, :]
    tl.store(gradient + addresses, total.to(gradient.dtype.element_ty), mask=mask)
