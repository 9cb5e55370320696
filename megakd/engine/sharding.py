"""Models with parameters sharded by ZeRO 3: construction, gathering, prefetch and whole copies.

All functions also accept models that are not sharded, so that callers need not distinguish them.
Every function that gathers a sharded parameter is a collective: all ranks call the function, in
the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import (
    DeepSpeedTensorOverride,
    ZeroParamStatus,
    is_zero_param,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import deepspeed as transformers_switch

from megakd.config.deepspeed import shards_within_node, zero_stage
from megakd.engine.collectives import gather
from megakd.engine.distributed import node_group

GROUP_ELEMENTS = 1 << 26
"""Elements that are gathered at a time, beside the copy."""


@contextmanager
def sharded_construction(
    ds: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device | None = None
) -> Iterator[None]:
    """Shard modules during construction in the body if `ds` sets ZeRO 3, else build them in place.

    transformers has a process-wide switch that shards every model built after the switch is set.
    The switch is off in the body and restored afterwards, so that only `ds` decides.

    Args:
        ds: a loaded `ds_configs` file; None for a model without an engine.
        device: device of modules that are not sharded. The ranks of a node would otherwise each
            hold a whole model in the memory of the host. None: the CPU.
    """
    earlier = transformers_switch._hf_deepspeed_config_weak_ref  # noqa: SLF001  (no public reader)
    transformers_switch.unset_hf_deepspeed_config()
    plain = nullcontext() if device is None or device.type == "cpu" else device
    try:
        building = _zero_init(ds, dtype) if ds is not None and zero_stage(ds) == 3 else plain
        with linear_left_alone(), building:
            yield
    finally:
        owner = earlier() if earlier is not None else None
        if owner is not None:
            transformers_switch.set_hf_deepspeed_config(owner)


def _zero_init(ds: Mapping[str, Any], dtype: torch.dtype) -> AbstractContextManager[Any]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": dict(ds["zero_optimization"]),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    # The dtype is set in the config: the argument `dtype` is replaced by bfloat16 on devices
    # without fp16. Created tensors keep their dtype, otherwise rotary tables lose precision.
    return _InitWithoutValues(
        config_dict_or_path=config,
        data_parallel_group=node_group() if shards_within_node(ds) else None,
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )


class _InitWithoutValues(deepspeed.zero.Init):
    """Shards parameters that get their values later.

    DeepSpeed sends each new parameter from rank 0 to all ranks, which fills a whole one on each.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def is_sharded(module: nn.Module) -> bool:
    """Return whether any parameter of the module is sharded by ZeRO 3."""
    return any(is_zero_param(parameter) for parameter in module.parameters())


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the full shape of a parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_first_rank() -> bool:
    """Return whether this process is rank 0 or runs without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def writes_here(parameter: Tensor) -> bool:
    """Return whether this rank sets a parameter's value inside `gathered(modify=True)`.

    This is the first rank of those that share the parameter: rank 0, or the first rank of a node.
    """
    if not is_zero_param(parameter):
        return True
    return dist.get_rank(parameter.ds_process_group) == 0  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def set_values(tensor: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Set a tensor, of which each rank reads the part that it keeps.

    A collective for a sharded parameter that is gathered, is quantized or lies on a disk.

    Args:
        read: returns the elements of the flattened tensor from a first to before a last one.
    """
    part = getattr(tensor, "ds_tensor", None)
    is_closed = getattr(tensor, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
    in_memory = part is not None and part.final_location is None
    if part is not None and is_closed and in_memory and not hasattr(part, "ds_quant_scale"):
        offset, count = own_partition(tensor, part.numel())
        start = min(offset, tensor.ds_numel)  # pyright: ignore[reportAttributeAccessIssue]
        part[:count].copy_(read(start, start + count))
        return
    with gathered([tensor], modify=True):
        if writes_here(tensor):
            tensor.copy_(read(0, tensor.numel()).reshape(tensor.shape))


def in_fp32(tensor: Tensor) -> None:
    """Give a tensor fp32 in place; a part that is quantized or lies on a disk stays as it is."""
    part = getattr(tensor, "ds_tensor", None)
    if part is None or (part.final_location is None and not hasattr(part, "ds_quant_scale")):
        for one in (tensor, part):
            if one is not None:
                one.data = one.data.float()


@contextmanager
def linear_left_alone() -> Iterator[None]:
    """Put torch's linear back after the body, where DeepSpeed replaces it for the whole process.

    A resumed run, which leaves finished stages out, would round otherwise in all stages after them.
    """
    plain = functional.linear
    try:
        yield
    finally:
        functional.linear = plain


@contextmanager
def memory_efficient_linear(engine: Any) -> Iterator[None]:
    """Use DeepSpeed's linear in the body at a ZeRO 3 with `memory_efficient_linear`.

    Its backward gathers the weight again, which torch's keeps from the forward on.
    """
    with linear_left_alone():
        zero = engine._config.zero_config  # noqa: SLF001 - as DeepSpeed's properties read it
        if engine.zero_optimization_stage() == 3 and zero.memory_efficient_linear:
            functional.linear = zero3_linear_wrap
        yield


_COORDINATORS: WeakSet[Any] = WeakSet()
"""What fetches the weights of each engine at ZeRO 3."""


def note_fetches(engine: Any) -> None:
    """Let `gathered` wait for the weights that a DeepSpeed engine fetches ahead."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if hasattr(offload, "get_param_coordinator"):
        _COORDINATORS.add(offload.get_param_coordinator())


def gathered(parameters: Iterable[Tensor], *, modify: bool = False) -> AbstractContextManager[Any]:
    """Return a context manager that gathers sharded parameters.

    A parameter that appears twice (tied embeddings) is gathered once. A parameter that is already
    gathered, by the forward of its module or by an outer context, is not gathered or released.
    Weights that an engine fetches ahead, for a backward that may not come, are waited for and
    released first. Parameters that are not sharded are left unchanged. With `modify`, values are
    sent on exit from the rank that wrote them (`writes_here`) to all ranks that share the
    parameter.
    """
    unique = {id(parameter): parameter for parameter in parameters if is_zero_param(parameter)}
    if any(one.ds_status == ZeroParamStatus.INFLIGHT for one in unique.values()):  # pyright: ignore[reportAttributeAccessIssue]
        for coordinator in _COORDINATORS:
            coordinator._clean_inflight_param_registry()  # noqa: SLF001 - as its next forward does
    closed = [
        parameter
        for parameter in unique.values()
        if modify or parameter.ds_status != ZeroParamStatus.AVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
    ]
    if not closed:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(closed, modifier_rank=0 if modify else None)


def gathered_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's state, one whole tensor at a time; every rank must iterate to the end.

    Tied tensors are yielded once, under their first name. Rank 0 gets a copy on the CPU, and the
    other ranks an empty tensor.
    """
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with gathered([tensor]):
            here = tensor.detach().to("cpu", copy=True) if is_first_rank() else torch.empty(0)
        yield name, here


@contextmanager
def weights_let_go() -> Iterator[None]:
    """Keep autograd from holding gathered weights in memory after their use in the body.

    torch's linear saves a transposed view of its weight, which would keep the gathered weight of
    every layer in memory from the forward to the backward. In the body, autograd saves the
    parameter instead. The parameter is empty between forward and backward, and DeepSpeed gathers
    it again before the backward of its module. DeepSpeed's own solution, `memory_efficient_linear`,
    replaces torch's function in the whole process.
    """
    with torch.autograd.graph.saved_tensors_hooks(_parameter_in_place_of_view, _view_anew):
        yield


def _parameter_in_place_of_view(tensor: Tensor) -> Any:
    parameter = tensor._base  # noqa: SLF001  (no public name)
    if parameter is None or not is_zero_param(parameter):
        return tensor
    offset = tensor.storage_offset() - parameter.storage_offset()
    return parameter, tensor.shape, tensor.stride(), offset


def _view_anew(saved: Any) -> Tensor:
    if not isinstance(saved, tuple):
        return saved
    parameter, shape, stride, offset = saved
    return parameter.as_strided(shape, stride, parameter.storage_offset() + offset)


@contextmanager
def whole_model(module: nn.Module) -> Iterator[nn.Module]:
    """Give a model of an engine with whole weights in evaluation mode; a collective at ZeRO 3.

    Generation calls a model once per token: the hooks of ZeRO 3 would gather every weight for every
    token. The body has no collectives: ranks may call the model different numbers of times. The
    caller may not change anything in the model, which at ZeRO 3 is a copy without the hooks of the
    engine. The copy has the dtype and the device of the gathered weights, and is freed at the end.
    """
    if not is_sharded(module):
        with evaluating(module):
            yield module
        return
    whole = _unsharded_copy(module)
    try:
        yield whole
    finally:
        for parameter in whole.parameters():
            # Also if the caller keeps a reference to the copy.
            parameter.data = parameter.data.new_empty(0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch all modules to evaluation mode in the body, and restore the mode of each module."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _unsharded_copy(module: nn.Module) -> nn.Module:
    parts = list(module.modules())
    copies = {id(part): type(part).__new__(type(part)) for part in parts}
    memo: dict[int, Any] = dict(copies)
    for group in _groups(module.parameters()):
        with gathered(group):
            for parameter in group:
                whole = parameter.detach().clone()
                memo[id(parameter)] = nn.Parameter(whole, requires_grad=False)
    for part in parts:
        vars(copies[id(part)]).update(_plain_members(part, memo))
    return copies[id(module)].eval()


def _plain_members(part: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    members = vars(nn.Module())
    for name, empty in members.items():
        if isinstance(empty, dict):
            # Objects that remove a hook refer to these; the hooks themselves refer to the engine.
            memo[id(vars(part)[name])] = empty
    # Neither torch's attributes nor those that DeepSpeed adds at ZeRO 3.
    foreign = {*members, "_external_params", "_original_parameters"}
    plain = {n: v for n, v in vars(part).items() if n not in foreign and not n.startswith("ds_")}
    members |= copy.deepcopy(plain, memo)
    members["_buffers"] = copy.deepcopy(dict(part._buffers), memo)  # noqa: SLF001
    members["_non_persistent_buffers_set"] = set(part._non_persistent_buffers_set)  # noqa: SLF001
    for name in ("_parameters", "_modules"):
        items = vars(part)[name].items()
        members[name] = {key: None if item is None else memo[id(item)] for key, item in items}
    return members


def _groups(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for parameter in parameters:
        elements = full_shape(parameter).numel()
        if group and size + elements > GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += elements
    if group:
        yield group


def own_partition(parameter: Any, size: int) -> tuple[int, int]:
    """Return the offset and the length of this rank's part of a weight that ZeRO 3 has split.

    Every rank holds `size` elements; the last ranks hold padding.
    """
    offset = dist.get_rank(parameter.ds_process_group) * size
    return offset, max(0, min(size, parameter.ds_numel - offset))


def names_of_bad_weights(module: nn.Module) -> list[str]:
    """Return the names of parameters that are not finite on any rank; a collective.

    Costs one pass over this rank's weights and one device sync.
    """
    named = [(name, _own_part(parameter)) for name, parameter in module.named_parameters()]
    named = [(name, part) for name, part in named if part.numel()]
    # Minimum and maximum need no memory, unlike `isfinite` of all values.
    ends = [torch.stack(torch.aminmax(part)).isfinite().all() for _, part in named]
    finite = torch.stack(ends).tolist() if named else []
    bad = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
    return list(dict.fromkeys(name for names in gather(bad) for name in names))


def _own_part(parameter: Tensor) -> Tensor:
    if not is_zero_param(parameter):
        return parameter.detach()
    shard = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return shard.detach()[: own_partition(parameter, shard.numel())[1]]


class Prefetch:
    """A prefetcher that copies this rank's shards to the device during other computation.

    DeepSpeed copies a shard when the forward reaches its layer, and the forward waits for the
    copy. DeepSpeed reads `ds_tensor` on any device, so this class replaces the storage of
    `ds_tensor`. Shards on the device, and models that are not sharded, are left unchanged.
    """

    def __init__(self, module: nn.Module) -> None:
        shards = (getattr(parameter, "ds_tensor", None) for parameter in module.parameters())
        self._away = [shard for shard in shards if shard is not None and is_away(shard)]
        self._host: list[Tensor] = []
        # CPUs have no streams.
        stream = _accelerator().Stream if self._away else None
        self._stream: Any = None if stream is None else stream()

    def start(self) -> None:
        """Begin to copy and return at once; do nothing if the copy has already begun."""
        if self._host:
            return
        accelerator = _accelerator()
        device = accelerator.current_device_name()
        if self._stream is not None:
            # A running forward may still read memory that the allocator is about to reuse.
            self._stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._stream):
            for shard in self._away:
                self._host.append(shard.data)
                shard.data = torch.empty_like(shard, device=device).copy_(shard, non_blocking=True)

    def wait(self) -> None:
        """Wait for the end of the copy, because DeepSpeed reads the shards on its own streams."""
        if self._host and self._stream is not None:
            self._stream.synchronize()

    def drop(self) -> None:
        """Point the shards to host memory again, and free the copies on the device."""
        for shard, host in zip(self._away, self._host, strict=False):
            shard.data = host
        self._host.clear()


def is_away(shard: Any) -> bool:
    """Return whether a shard is in host memory and the device is not the CPU."""
    return shard.device.type != _accelerator().device_name()


def _accelerator() -> Any:
    return get_accelerator()
