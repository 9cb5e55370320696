"""Weights, moments and other values of the optimizer, read and set at every ZeRO stage.

    <checkpoint>/engine-<r>.pt    rank r's part of every value, and where it begins

Any number of ranks at any ZeRO stage can read the files of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megakd.engine.collectives import all_reduce_
from megakd.engine.sharding import (
    full_shape,
    gathered,
    is_first_rank,
    is_zero_param,
    own_partition,
    writes_here,
)
from megakd.errors import CheckpointError

_PREFIX, _SUFFIX = "engine-", ".pt"
Parts = Mapping[str, Mapping[str, Tensor]]
"""Parts [n] of flattened values, by kind of value and by name of the weight."""
WEIGHT = "weight"
"""Name of the fp32 weights among the values of the optimizer; the others are its moments."""
AVERAGES = "averages"
"""Kind of the values in files that a strategy keeps, beside weights and moments."""
LEARNER = "learners.0."
"""Prefix of the first learner's weights in the engine's module."""


class Shard(NamedTuple):
    """A part of a flattened weight.

    The shards of all ranks cover every weight once, so that a sum over the shards of all ranks is
    a sum over the weight.

    name: name of the weight in its model.
    weight: [n] fp32; the values that the optimizer updates.
    gradient: [n] fp32; the gradient of the whole step, over all ranks and micro-batches, before
        clipping.
    offset: index of the first element in the flattened weight.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    offset: int


class Slot(NamedTuple):
    """The part of one weight that this rank's optimizer updates.

    owner: tensor by which the optimizer knows its state, which may hold several weights.
    start: first element of the part in `owner`.
    offset: first element of the part in the flattened weight.
    size: number of elements; 0 if this rank holds no part.
    is_shared: every rank holds and updates the whole weight, and the part is this rank's share.
    """

    owner: Tensor
    start: int
    offset: int
    size: int
    is_shared: bool = False


class OptimizerState:
    """The values that a training engine's optimizer keeps.

    Methods are collectives unless they say otherwise.
    """

    def __init__(self, engine: Any) -> None:
        self._outer = engine.optimizer
        self._inner: torch.optim.Optimizer = getattr(self._outer, "optimizer", self._outer)
        is_adam = "betas" in self._inner.param_groups[0]
        self.kinds = (WEIGHT, "exp_avg", "exp_avg_sq") if is_adam else (WEIGHT,)
        self._masters = _masters(self._outer)
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }

    @property
    def steps(self) -> int:
        """The number of updates that the bias correction of AdamW counts; 0 without moments."""
        counts = (int(s["step"]) for s in self._inner.state.values() if "step" in s)
        # A rank may hold no part of any weight.
        largest = torch.tensor(max(counts, default=0))
        return int(all_reduce_(largest, largest=True))

    def whole(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the kind of value, the name of the weight, and the value; ranks must all iterate.

        The values are fp32 tensors on the CPU, in the shape of the weight; ranks other than 0 get
        an empty tensor.
        """
        for name, parameter in self._parameters.items():
            slot = self._slot(parameter)
            for kind in self.kinds:
                here = self.put_together(name, self._part(slot, kind))
                yield kind, name, here if is_first_rank() else torch.empty(0)

    def parts(self) -> Parts:
        """Return this rank's part of every value; no collective."""
        slots = {name: self._slot(parameter) for name, parameter in self._parameters.items()}
        return {
            # A view of a part of a value would be written with the whole value.
            kind: {
                name: part.clone() if slot.size < slot.owner.numel() and slot.is_shared else part
                for name, slot in slots.items()
                if len(part := self._part(slot, kind))
            }
            for kind in self.kinds
        }

    def shards(self, *, loss_scale: float) -> Iterator[Shard]:
        """Yield this rank's shards of the first learner, between the last backward and the update.

        Weights without a gradient are left out. The engine has multiplied the loss by `loss_scale`
        under fp16. No collective.
        """
        for name, parameter in self._parameters.items():
            slot = self._slot(parameter)
            is_ours = name.startswith(LEARNER)
            gradient = _own_gradient(parameter, slot.offset, slot.size) if is_ours else None
            if gradient is not None:
                weight = self._part(slot, WEIGHT).to(gradient.device, torch.float32)
                slope = gradient.flatten().float() / loss_scale
                yield Shard(name.removeprefix(LEARNER), weight, slope, slot.offset)

    @property
    def offsets(self) -> dict[str, int]:
        """Index of the first element of this rank's part in the flattened weight, by name."""
        return {name: self._slot(p).offset for name, p in self._parameters.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of the whole weights, by name."""
        return {name: full_shape(p).numel() for name, p in self._parameters.items()}

    def load(self, read: Callable[[str, str, slice], Tensor], *, steps: int) -> None:
        """Set all values; `read(kind, name, wanted)` returns elements of a flattened value."""
        owners: dict[int, Tensor] = {}
        kinds = self.kinds if steps else (WEIGHT,)
        if not steps:
            self._inner.state.clear()  # as it was before the first update
        for name, parameter in self._parameters.items():
            slot, whole = self._slot(parameter), slice(0, full_shape(parameter).numel())
            if slot.size or slot.is_shared:
                owners[id(slot.owner)] = slot.owner
                mine = slice(slot.offset, slot.offset + slot.size)
                for kind in kinds:
                    self._set(slot, kind, read(kind, name, whole if slot.is_shared else mine))
            if slot.owner is parameter:  # the optimizer updates the weight itself, which is set
                continue
            with gathered([parameter], modify=True):
                if writes_here(parameter):
                    value = read(WEIGHT, name, whole)
                    parameter.data.copy_(value.reshape(full_shape(parameter)))
        if steps:
            self._set_steps(owners.values(), steps)

    def put_together(self, name: str, part: Tensor) -> Tensor:
        """Return a whole tensor on the CPU, of the parts [n] as `shards` splits a weight."""
        parameter = self._parameters[name]
        offset, shape = self._slot(parameter).offset, full_shape(parameter)
        whole = torch.zeros(shape.numel(), device=parameter.device)
        whole[offset : offset + len(part)] = part.to(whole.device, torch.float32)
        return all_reduce_(whole).cpu().reshape(shape)

    def part_of(self, name: str) -> slice:
        """Return this rank's part of a flattened weight, as `shards` splits the weight."""
        slot = self._slot(self._parameters[name])
        return slice(slot.offset, slot.offset + slot.size)

    def _part(self, slot: Slot, kind: str) -> Tensor:
        state: Mapping[str, Any] = self._inner.state.get(slot.owner, {})
        source = slot.owner if kind == WEIGHT else state.get(kind)
        if source is None:  # a moment that was never set
            return torch.zeros(slot.size)
        return source.detach().flatten().narrow(0, slot.start, slot.size)

    def _set(self, slot: Slot, kind: str, value: Tensor) -> None:
        if kind == WEIGHT:
            target = slot.owner.detach()
        else:
            state = self._inner.state[slot.owner]
            if kind not in state:
                state[kind] = torch.zeros_like(slot.owner, requires_grad=False)
            target = state[kind]
        if slot.is_shared:
            target.copy_(value.reshape(target.shape))
        else:
            target.view(-1).narrow(0, slot.start, slot.size).copy_(value)

    def _set_steps(self, owners: Iterable[Tensor], steps: int) -> None:
        counts_in_tensors = isinstance(self._inner, torch.optim.AdamW)
        for owner in owners if len(self.kinds) > 1 else ():
            # Fused AdamW reads the number on the device of its weight.
            step = torch.tensor(float(steps), device=owner.device) if counts_in_tensors else steps
            self._inner.state[owner]["step"] = step

    def _slot(self, parameter: Any) -> Slot:
        if is_zero_param(parameter):
            place = self._outer.grad_position[self._outer.get_param_id(parameter)]
            group, start, size = (int(number) for number in place)
            offset, count = own_partition(parameter, size)
            return Slot(self._outer.fp32_partitioned_groups_flat[group], start, offset, count)
        if not hasattr(parameter, "_hp_mapping"):  # every rank holds and updates the whole weight
            total = parameter.numel()
            share = -(-total // dist.get_world_size())
            first = min(dist.get_rank() * share, total)
            owner: Any = self._masters.get(id(parameter), parameter)
            return Slot(owner, first, first, min(share, total - first), is_shared=True)
        mapping: Any = parameter._hp_mapping  # noqa: SLF001  (as deepspeed.utils does)
        if mapping is None:
            return Slot(torch.empty(0), 0, 0, 0)
        flats = getattr(self._outer, "single_partition_of_fp32_groups", None)
        flats = self._outer.fp32_groups_flat_partition if flats is None else flats
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Slot(flats[mapping.param_group_index], there.start, here.start, there.numel)


def _masters(optimizer: Any) -> dict[int, Tensor]:
    # The fp32 copies of bf16 and fp16 weights at ZeRO 0, by the weight's id.
    if not hasattr(optimizer, "fp32_groups") or not hasattr(optimizer, "fp16_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {
        id(weight): master
        for weights, masters in groups
        for weight, master in zip(weights, masters, strict=True)
    }


def _own_gradient(parameter: Any, offset: int, size: int) -> Tensor | None:
    if is_zero_param(parameter):
        optimizer = parameter._z3_optimizer  # noqa: SLF001 - as deepspeed.utils does
        return optimizer.get_local_fp32_grad_for_param(parameter).flatten()[:size]
    if not hasattr(parameter, "_hp_mapping"):  # every rank holds the whole weight
        gradient = parameter.grad
    elif parameter._hp_mapping is None:  # noqa: SLF001 - this rank holds no part of the weight
        return None
    else:  # ZeRO 1 and 2, and bf16 at ZeRO 0, which accumulates whole gradients
        number = parameter._index_in_param_group  # noqa: SLF001
        gradient = parameter._hp_mapping.get_lp_grad_fragment(number)  # noqa: SLF001
    if gradient is None or gradient.numel() == size:
        return gradient
    return gradient.flatten()[offset : offset + size]


def file_of(
    rank: int, parts: Parts, *, offsets: Mapping[str, int], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the file of one rank, by the name of the file.

    Args:
        offsets: index of a part's first element in the flattened weight, by name.
        facts: plain values that are the same on all ranks.
    """
    plain = {kind: dict(by_name) for kind, by_name in parts.items()}
    content = {"parts": plain, "offsets": dict(offsets), "facts": dict(facts)}
    return {f"{_PREFIX}{rank}{_SUFFIX}": content}


class StoredParts:
    """The parts that all ranks wrote into a folder.

    The files are mapped into memory, so that a rank reads only the elements that it needs.

    facts: the plain values of `file_of`.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))
        if not paths:
            raise CheckpointError(f"{folder} has no {_PREFIX}<rank>{_SUFFIX}")
        self._files: Sequence[Mapping[str, Any]] = [
            torch.load(path, mmap=True, map_location="cpu", weights_only=True) for path in paths
        ]
        self.facts: Mapping[str, Any] = self._files[0]["facts"]

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the weights by kind of value, in the same order on all ranks."""
        by_kind: dict[str, dict[str, None]] = {}
        for file in self._files:
            for kind, by_name in file["parts"].items():
                by_kind.setdefault(kind, {}).update(dict.fromkeys(by_name))
        return {kind: [*names] for kind, names in by_kind.items()}

    def size(self, kind: str, name: str) -> int:
        """Return the number of elements of a value that are stored."""
        return sum(len(part) for _, part in self._pieces(kind, name))

    def read(self, kind: str, name: str, wanted: slice) -> Tensor:
        """Return some elements of a flattened value, [stop - start] on the CPU."""
        values = torch.zeros(wanted.stop - wanted.start)
        for offset, part in self._pieces(kind, name):
            first, last = max(offset, wanted.start), min(offset + len(part), wanted.stop)
            if first < last:
                here = part[first - offset : last - offset]
                values[first - wanted.start : last - wanted.start] = here
        return values

    def _pieces(self, kind: str, name: str) -> Iterator[tuple[int, Tensor]]:
        for file in self._files:
            part = file["parts"].get(kind, {}).get(name)
            if part is not None:
                yield file["offsets"][name], part
