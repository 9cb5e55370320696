"""Checks of the input tensors of the losses: shapes, shards, labels, and rows that count.

Shapes: N rows (positions or examples), V vocabulary or classes, H width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows that count among the N rows, and their weights.

    valid: [N] bool, rows of the divergences.
    weight: [N] token weight, exactly 0 where not valid.
    labels: [N] int64, or None; 0 if a row has no label or its label is not an id of the student.
    hard_weight: [N] like weight, for cross-entropy; 0 without a label, NaN if the label is not
        an id of the student.
    """

    valid: Tensor
    weight: Tensor
    labels: Tensor | None
    hard_weight: Tensor

    @property
    def labelled(self) -> Tensor:
        """[N] bool, rows that count and have a label that is an id of the student."""
        return (self.hard_weight != 0) & ~self.hard_weight.isnan()

    def taken(self, index: Tensor) -> Rows:
        """Return a subset of the rows."""
        labels = None if self.labels is None else self.labels[index]
        return Rows(self.valid[index], self.weight[index], labels, self.hard_weight[index])


class Masks(NamedTuple):
    """Row masks that a caller may pass; every tensor has one entry per row."""

    labels: Tensor | None
    token_weight: Tensor | None
    ignore_index: int
    valid: Tensor | None = None

    def checked(self, rows: torch.Size) -> Masks:
        """Return the masks themselves; raise the errors of `check_rows`."""
        check_rows(rows, labels=self.labels, token_weight=self.token_weight, valid=self.valid)
        return self


def check_rows(rows: torch.Size, **entries: Tensor | None) -> None:
    """Check that tensors have one entry per row, in the shape of the rows or flat.

    Raises:
        ValueError: another shape, whose entries would be those of other rows.
    """
    for name, tensor in entries.items():
        if tensor is not None and tensor.shape != rows and tensor.shape != (rows.numel(),):
            raise ValueError(
                f"{name} is {list(tensor.shape)}; it must be {list(rows)}, one entry per row"
            )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return fp32, or fp64 if any input is fp64 (gradient checks)."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def needs_gradient(tensor: Tensor | None) -> bool:
    """Return whether a gradient must be formed for the tensor now."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def may_look_at(tensor: Tensor) -> bool:
    """Return whether reading values is free: on a CPU and not while compiling."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def all_count(valid: Tensor) -> bool:
    """Return whether all rows count, as far as reading the mask is free; else False."""
    return may_look_at(valid) and bool(valid.all())


def rows_to_keep(valid: Tensor) -> Tensor | None:
    """Return the indices of the rows that count.

    The result is None if all rows count, or if reading the mask would wait for the device. Only
    operators may call this function: the values they read are not part of a graph.
    """
    if not valid.is_cpu or bool(valid.all()):
        return None
    return valid.nonzero().squeeze(1)


def check_integers(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor does not hold integers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} are {tensor.dtype}; they must be integer ids")


def under_autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in autocast's dtype if autocast is on, as for a matrix product.

    The cast happens outside the operators, so that autograd casts the gradient back.
    """
    device = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that switches autocast off, if autocast is on."""
    # Meta tensors have no autocast; to enter and leave a context of torch takes 3 microseconds.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_constants(**tensors: Tensor | float | None) -> None:
    """Check that inputs without a gradient in the loss do not require one; numbers never do.

    Raises:
        ValueError: a tensor requires grad while gradients are recorded.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and needs_gradient(tensor):
            raise ValueError(
                f"{name} requires grad, and the loss has no gradient for it: pass {name}.detach()"
            )


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check hidden states [..., H], output matrix [V, H] and bias [V] of one model.

    Raises:
        ValueError: the shapes or devices disagree, or the weight is a ZeRO-3 shard.
    """
    check_not_sharded(f"{name}_weight", weight)
    check_not_sharded(f"{name}_bias", bias)
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden is {list(hidden.shape)} and {name}_weight {list(weight.shape)}; "
            "they must be [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}_bias is {list(bias.shape)}; it must be [{len(weight)}], one value per id"
        )
    for part, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name}_hidden is on {hidden.device} and {name}_{part} on {tensor.device}; move "
                "them to one device"
            )
    for part, tensor in {"hidden": hidden, "weight": weight}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}_{part} is {tensor.dtype}; it must be floating point")


def check_not_sharded(name: str, weight: Tensor | None) -> None:
    """Check that `weight` is not the empty tensor that DeepSpeed leaves for a sharded parameter.

    Raises:
        ValueError: `weight` is such a placeholder; the message says how to gather the parameter.
    """
    whole = getattr(weight, "ds_shape", None)
    if weight is None or whole is None or tuple(weight.shape) == tuple(whole):
        return
    raise ValueError(
        f"{name} is a ZeRO-3 shard: {list(weight.shape)} here, {list(whole)} in all; compute the "
        "loss inside the engine's forward, or under deepspeed.zero.GatheredParameters([weight])"
    )


def check_labels(labels: Tensor, is_known: Tensor, ignore_index: int, ids: int) -> None:
    """Check on a CPU that the labels are ids of the student.

    On an accelerator the check would wait for the device. There a label outside the vocabulary
    gives its row a loss of NaN instead, and nothing outside the row is read.

    Raises:
        ValueError: a label is neither an id of the student nor ignore_index.
    """
    if not may_look_at(labels):
        return
    is_right = is_known | (labels == ignore_index)
    if not is_right.all():
        raise ValueError(
            f"label {int(labels[~is_right][0])} is not one of the student's ids, 0 to {ids - 1}, "
            f"and not ignore_index {ignore_index}"
        )


def select_rows(count: int, *, like: Tensor, masks: Masks, ids: int | None) -> Rows:
    """Flatten and combine the masks.

    Args:
        count: N.
        like: gives dtype and device.
        masks: masks that the caller passed, checked.
        ids: number of ids of the student; None if the labels only mark the rows that count.

    Raises:
        ValueError: (on a CPU) a label is not an id of the student.
    """
    labels = labelled = None
    if masks.labels is not None:
        check_integers(labels=masks.labels)
        labels = masks.labels.detach().reshape(-1).long()
        labelled = labels != masks.ignore_index
    if masks.valid is not None:
        counted = masks.valid.detach().reshape(-1).bool().contiguous()
    elif labelled is not None:
        counted = labelled
    else:
        counted = torch.ones(count, dtype=torch.bool, device=like.device)
    weight = counted.to(like.dtype)
    if masks.token_weight is not None:
        given = masks.token_weight.detach().reshape(-1).to(like.dtype)
        counted = counted & (given != 0)
        weight = torch.where(counted, given, 0)
    if labels is None or labelled is None:
        return Rows(counted, weight, None, torch.zeros_like(weight))
    if ids is None:
        return Rows(counted, weight, torch.zeros_like(labels), torch.where(labelled, weight, 0))
    # A row that does not count may hold any label.
    labels, labelled = torch.where(counted, labels, masks.ignore_index), labelled & counted
    is_known = (labels >= 0) & (labels < ids)
    check_labels(labels, is_known, masks.ignore_index, ids)
    hard_weight = torch.where(labelled, torch.where(is_known, weight, math.nan * weight), 0)
    return Rows(counted, weight, torch.where(is_known & counted, labels, 0), hard_weight)


def shared_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """Return the number n of ids [0, n) that both softmaxes run over.

    Raises:
        ValueError: vocab_size exceeds the vocabulary of a model.
    """
    shared = min(student, teacher)
    if vocab_size is None:
        return shared
    if not 0 < vocab_size <= shared:
        raise ValueError(
            f"vocab_size {vocab_size} must lie in 1..{shared}: "
            f"the student has {student} ids and the teacher {teacher}"
        )
    return vocab_size
