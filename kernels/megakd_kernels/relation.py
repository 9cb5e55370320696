"""Distillation of relations between positions (MiniLM v2); [B, A, L, L] never exists.

Shapes: B batch, L positions, D width (Ds student, Dt teacher), A relation heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels.inputs import check_constants, compute_dtype, needs_gradient, under_autocast
from megakd_kernels.relation_ops import relation_kl, relation_kl_flash
from megakd_kernels.relation_reference import Relation, relation_kl_reference
from megakd_kernels.settings import Implementation, resolve_implementation

# Largest head width whose tiles a Triton program holds, in 16 bits from sm_90 on and elsewhere; the
# registers of wider ones overflow. The tiled path computes wider heads.
WIDEST_FLASH_HEAD, WIDEST_OTHER_HEAD = 256, 128


def relation_kl_loss(  # noqa: PLR0913, the public contract: options are keyword-only
    student_queries: Tensor,
    teacher_queries: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    *,
    heads: int,
    valid: Tensor | None,
    causal: bool = False,
    segments: Tensor | None = None,
    token_weight: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return KL(teacher || student) between relations softmax(x_i . y_j / sqrt(d)) of positions.

    Wang et al. 2021 (MiniLMv2, section 3.1, equations 5 to 7): the last dimension is split anew
    into `heads` relation heads of width d = D / heads, so that student and teacher may differ in
    width and in number of attention heads. Queries alone give the relation of a tensor with
    itself (queries, keys or values); queries and keys give the attention distribution. Position i
    sees position j if both are valid, both are in the same segment and, if causal, j <= i.

    Unlike the paper, the loss is a sum over rows, not a mean, so that the caller can divide by
    the rows of the whole batch.

    Args:
        student_queries: [B, L, Ds], any strides, fp32, bf16, fp16 or fp64.
        teacher_queries: [B, L, Dt]; carries no gradient.
        student_keys: [B, L, Ds], or None.
        teacher_keys: [B, L, Dt], required if and only if student_keys is given.
        heads: relation heads, a divisor of Ds and Dt.
        valid: [B, L] bool, positions that are seen and rows that count; None: all. Other
            positions may hold anything.
        causal: a position does not see later positions.
        segments: [B, L] integers, the document of each position of a packed row.
        token_weight: [B, L], weight of each query row; it does not affect the visible keys.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.
            "auto" uses tiles for inputs that the kernels do not support: fp64, or heads wider
            than 256 (than 128 in fp32, or on a GPU before sm_90).

    Returns:
        Scalar in nats, fp32 (fp64 if an input is): *sum* over the valid rows of token_weight
        times the mean over heads of the KL summed over visible keys.

    Raises:
        ValueError: shapes, devices or dtypes do not fit; keys are given for only one model; the
            teacher requires grad; "triton" is not available.
    """
    _check_queries(student_queries, teacher_queries)
    _check_keys((student_queries, student_keys), (teacher_queries, teacher_keys))
    check_constants(
        teacher_queries=teacher_queries, teacher_keys=teacher_keys, token_weight=token_weight
    )
    _check_heads(heads, student_queries.shape[-1], teacher_queries.shape[-1])
    _check_masks(student_queries, valid=valid, segments=segments, token_weight=token_weight)
    student = _one_dtype(student_queries, student_keys)
    teacher = _one_dtype(teacher_queries, teacher_keys)
    valid = None if valid is None else valid.detach().bool()
    weight = _row_weight(student[0], teacher[0], valid, token_weight)
    segments = None if segments is None else _integers(segments.detach())
    relation = Relation(*student, *teacher, valid, segments, weight, heads, causal)
    return _compute(relation, _path(impl, relation))


def _compute(relation: Relation, path: Implementation) -> Tensor:
    *tensors, heads, causal = relation
    if path == "reference":
        return relation_kl_reference(relation)
    if path == "triton":
        return relation_kl_flash(*tensors, heads=heads, causal=causal)[0]
    queries, keys = relation.student_queries, relation.student_keys
    wants_queries, wants_keys = needs_gradient(queries), needs_gradient(keys)
    return relation_kl(
        *tensors, heads=heads, causal=causal, wants_queries=wants_queries, wants_keys=wants_keys
    )[0]


def _path(impl: str, relation: Relation) -> Implementation:
    device = relation.weight.device
    path = resolve_implementation(impl, device)
    if path != "triton":
        return path
    widths = [side.shape[-1] // relation.heads
              for side in (relation.student_queries, relation.teacher_queries)]  # fmt: skip
    widest = _widest_head(relation)
    if relation.weight.dtype != torch.float64 and max(widths) <= widest:
        return path
    if impl != "triton":
        return "chunked"
    raise ValueError(
        f"impl 'triton' computes in fp32 with heads up to {widest} wide here, got "
        f"{relation.weight.dtype} and heads of {widths[0]} (student) and {widths[1]} (teacher): "
        "use impl 'chunked'"
    )


def _widest_head(relation: Relation) -> int:
    sides, device = (relation.student_queries, relation.teacher_queries), relation.weight.device
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    is_narrow = all(side.element_size() == 2 for side in sides)
    return WIDEST_FLASH_HEAD if is_narrow and not is_old else WIDEST_OTHER_HEAD


def _one_dtype(queries: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return queries and keys of one model in a common dtype, as for a matrix product."""
    queries = under_autocast(queries)
    if keys is None:
        return queries, None
    keys = under_autocast(keys)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return queries.to(dtype), keys.to(dtype)


def _integers(segments: Tensor) -> Tensor:
    return segments.byte() if segments.dtype == torch.bool else segments


def _row_weight(
    student: Tensor, teacher: Tensor, valid: Tensor | None, token_weight: Tensor | None
) -> Tensor:
    dtype = compute_dtype(student, teacher)
    if token_weight is None:
        weight = student.new_ones(student.shape[:2], dtype=dtype)
    else:
        weight = token_weight.detach().to(dtype)
    return weight if valid is None else torch.where(valid, weight, 0)


def _check_states(name: str, states: Tensor) -> None:
    if states.dim() != 3 or not states.is_floating_point():
        raise ValueError(
            f"{name} is {list(states.shape)} of {states.dtype}; "
            "it must be [B, L, D] and floating point"
        )


def _check_queries(student: Tensor, teacher: Tensor) -> None:
    _check_states("student_queries", student)
    _check_states("teacher_queries", teacher)
    if student.shape[:2] != teacher.shape[:2] or student.device != teacher.device:
        raise ValueError(
            f"student_queries is {list(student.shape)} on {student.device} and teacher_queries "
            f"{list(teacher.shape)} on {teacher.device}; only the last dimension may differ"
        )


def _check_keys(
    student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]
) -> None:
    if (student[1] is None) != (teacher[1] is None):
        given, missing = ("teacher", "student") if student[1] is None else ("student", "teacher")
        raise ValueError(f"{given}_keys are given and {missing}_keys are not; give both or none")
    for owner, (queries, keys) in (("student", student), ("teacher", teacher)):
        if keys is None:
            continue
        _check_states(f"{owner}_keys", keys)
        if keys.shape != queries.shape or keys.device != queries.device:
            raise ValueError(
                f"{owner}_keys is {list(keys.shape)} on {keys.device} and {owner}_queries "
                f"{list(queries.shape)} on {queries.device}; both must have the same shape and "
                "device (repeat the keys of grouped-query attention)"
            )


def _check_heads(heads: int, student: int, teacher: int) -> None:
    if heads < 1 or student % heads or teacher % heads or not (student and teacher):
        raise ValueError(
            f"heads is {heads}, the student {student} wide and the teacher {teacher}; "
            "heads must be at least 1 and divide both widths"
        )


def _check_masks(queries: Tensor, **masks: Tensor | None) -> None:
    for name, mask in masks.items():
        if mask is None:
            continue
        if mask.shape != queries.shape[:2] or mask.device != queries.device:
            raise ValueError(
                f"{name} is {list(mask.shape)} on {mask.device}; it must be "
                f"{list(queries.shape[:2])} on {queries.device}, like student_queries"
            )
        if name != "token_weight" and (mask.is_floating_point() or mask.is_complex()):
            raise ValueError(f"{name} is {mask.dtype}; it must be bool or integers")
