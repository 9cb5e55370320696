"""Calls of `deepspeed.initialize` for the model that learns and for frozen models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer, compiler
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from megakd.config.deepspeed import clips_on_device, frozen_ds_config, merged_ds_config
from megakd.config.sections import TrainConfig
from megakd.config.task import Dtype
from megakd.engine.sharding import linear_left_alone, note_fetches

# It prints the memory at the beginning of every stage, and forgets the peak, which we report.
bf16_optimizer.see_memory_usage = lambda *_, **__: None
Engine = Any  # deepspeed.DeepSpeedEngine carries no types
RATE = "rate"
"""Key of an optimizer's parameter group: the factor of the learning rate."""
DECAYS = "decays"
"""Attribute of a module: false if weight decay would pull its weights away from a good start."""


def training_engine(
    model: nn.Module,
    *,
    ds: Mapping[str, Any],
    train: TrainConfig,
    dtype: Dtype,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Engine:
    """Return a training engine: AdamW or SGD, explicit clipping, one micro-batch per backward.

    The parameters of the bundle may be sharded already. `rates` gives factors of the learning rate
    by prefix of parameter names; other parameters have 1.
    """
    config = merged_ds_config(ds, train, dtype=dtype)
    gather_experts_together(model)
    groups = _parameter_groups(model, train.weight_decay, rates)
    optimizer = _optimizer(groups, train, offloaded=_offloads_optimizer(ds))
    _import_muon_without_compiling()
    with linear_left_alone():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    wrapper: Any = engine.optimizer
    if dtype != "fp32" and not engine.zero_optimization():
        # DeepSpeed has taken an update without gradients, which counts in Adam's bias correction
        # and has decayed the fp32 weights.
        wrapper.optimizer.state.clear()
        wrapper.refresh_fp32_params()
    updates_here = engine.zero_optimization_stage() in (1, 2) and not _offloads_optimizer(ds)
    if updates_here and wrapper.compute_grad_norm:
        # The norm tells whether gradients are finite. DeepSpeed looks at each gradient with six
        # kernels before: 27 of the 323 ms of a step of SmolLM2-135M on an H200.
        wrapper.check_overflow = lambda **_: None
        if clips_on_device(ds) and (dtype, train.optim) == ("bf16", "adamw"):
            _clip_on_device(wrapper)
    note_fetches(engine)
    return engine


def frozen_engine(model: nn.Module, *, ds: Mapping[str, Any], dtype: Dtype, rows: int) -> Engine:
    """Return an inference engine: no optimizer, no gradient, ZeRO 0 or 3.

    The parameters may be sharded already. DeepSpeed requires `rows`, the micro-batch size.
    """
    model.requires_grad_(requires_grad=False)
    gather_experts_together(model)
    config = frozen_ds_config(ds, dtype=dtype, micro_batch=rows)
    _import_muon_without_compiling()
    # DeepSpeed casts them: scales of quantized weights, and what a family keeps in fp32.
    whole = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if dtype != "fp32" and parameter.dtype == torch.float32 and not is_zero_param(parameter)
    ]
    with linear_left_alone():
        engine, *_ = deepspeed.initialize(model=model, config=config)
    for parameter, value in whole:
        if not is_zero_param(parameter):
            parameter.data = value.to(parameter.device)
    note_fetches(engine)
    engine.eval()
    return engine


def _clip_on_device(wrapper: Any) -> None:
    """Let ZeRO 1 or 2 measure, clip and skip a gradient without a number on the host.

    DeepSpeed makes the host wait for the device several times a step, copies each gradient to fp64
    for its norm, and multiplies all gradients to clip them. torch's fused AdamW divides by
    `grad_scale` and skips the update where `found_inf` is 1 inside its kernel, as for a gradient
    scaler; its count of steps then stays as it is. The norm of a skipped step is NaN or infinite.
    """
    optimizer = wrapper.optimizer

    def norm(norm_type: float = 2) -> Tensor:
        parts = list[Tensor]()
        for number in range(len(wrapper.bit16_groups)):
            gradients = wrapper.averaged_gradients[number]
            flat = getattr(gradients, "flat_partition", None)  # at ZeRO 2, one for all weights
            parts += gradients if flat is None else [flat]
        # Public functions sum in the dtype of the gradients, bf16 at ZeRO 1.
        norms = torch._foreach_norm(parts, norm_type, dtype=torch.float32)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
        total = torch.stack(norms).square().sum()
        dist.all_reduce(total, group=wrapper.dp_process_group)
        return total.sqrt()

    def clip(_: object, total: Tensor) -> None:
        optimizer.found_inf = (~torch.isfinite(total)).float()
        if wrapper.clip_grad > 0:
            scale = torch.clamp((total + 1e-6) / wrapper.clip_grad, min=1.0)
            optimizer.grad_scale = scale.nan_to_num(1.0, posinf=1.0)

    wrapper.scaled_global_norm, wrapper.unscale_and_clip_grads = norm, clip
    wrapper.check_grad_overflow = False


@cache
def _import_muon_without_compiling() -> None:
    # `deepspeed.initialize` imports Muon for every engine, and its `torch.compile` decorator
    # imports torch's inductor, which takes more than a second. No engine of megakd uses Muon.
    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_of_deepspeed


def _optimizer(
    groups: list[dict[str, Any]], train: TrainConfig, *, offloaded: bool
) -> torch.optim.Optimizer:
    if train.optim == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate)
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    # One pass over the weights, on a GPU and on a CPU, without temporary tensors.
    return torch.optim.AdamW(groups, **options, fused=True)


def _parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    # Matrices have weight decay, biases and norms have none, as in Hugging Face's Trainer.
    kept = {
        id(parameter)
        for module in model.modules()
        if not getattr(module, DECAYS, True)
        for parameter in module.parameters()
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((r for prefix, r in rates.items() if name.startswith(prefix)), 1.0)
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            decays = is_matrix and id(parameter) not in kept
            groups.setdefault((rate, decays), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0, RATE: key[0]}
        for key in sorted(groups, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    ]


def _offloads_optimizer(ds: Mapping[str, Any]) -> bool:
    zero = ds.get("zero_optimization") or {}
    target = zero.get("offload_optimizer") or {}  # `null` is an absent section
    return target.get("device", "none") != "none"


EXPERTS = "experts"
"""Name of the child with the experts, in every block of transformers that routes tokens."""


def gather_experts_together(model: nn.Module) -> None:
    """Let ZeRO 3 gather each block of experts as a whole; call before `deepspeed.initialize`.

    ZeRO 3 gathers the weights of a module when the forward of the module begins. If the experts are
    modules, each rank calls the experts of its own tokens: the ranks would gather different weights
    with one collective. A block that ZeRO 3 treats as a leaf is gathered by all ranks alike.
    """
    for module in model.modules():
        if hasattr(module, EXPERTS):
            set_z3_leaf_module(module, flag=True)
