"""The dtypes and kernels of a run, and checks that the device supports them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from megakd.config.models import TeacherConfig
from megakd.config.run import RunConfig
from megakd.config.train import TrainConfig
from megakd.contract.tasks import FP8, STUDENT, Dtype, Kernels
from megakd.engine.distributed import Ranks, supported_dtypes
from megakd.errors import ConfigError
from megakd.models.fp8 import check_fp8_device
from megakd.models.fused_layers import why_not_compiled
from megakd.models.source import ModelSource
from megakd_kernels.settings import resolve_implementation

logger = logging.getLogger(__name__)
TORCH_DTYPE: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def frozen_dtype(spec: TeacherConfig, stored: torch.dtype | None, device: str) -> Dtype:
    """Return `teacher.dtype`; by default the stored 16-bit dtype on a GPU, or `_default_dtype`."""
    if spec.dtype is not None:
        return "bf16" if spec.dtype == FP8 else spec.dtype
    halves: dict[torch.dtype | None, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtype = halves.get(stored)
    return dtype if dtype and device != "cpu" else _default_dtype(device)


def training_dtype(train: TrainConfig, device: str) -> Dtype:
    """Return the dtype that `train.bf16` and `train.fp16` choose, by default `_default_dtype`."""
    if train.fp16:
        return "fp16"
    if train.bf16 is None:
        return _default_dtype(device)
    return "bf16" if train.bf16 else "fp32"


def _default_dtype(device: str) -> Dtype:
    # Tensor cores multiply fp32 about 10 times slower than bf16. A plan for GPUs on a host without
    # a GPU assumes that the GPUs have bf16, as all have since 2020.
    if device != "cuda":
        return "fp32"
    here = torch.cuda.is_available()
    has_bf16 = not here or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def scoring_dtype(train: TrainConfig, device: str) -> Dtype:
    """Return the dtype in which finished models are scored: on a GPU the dtype of training."""
    return "fp32" if device == "cpu" else training_dtype(train, device)


def saved_dtype(config: RunConfig, sources: Mapping[str, ModelSource]) -> torch.dtype:
    """Return `save.dtype`; by default the dtype in which the first teacher with weights is stored.

    Without a teacher, it is that of the model that the student starts from; else fp32.
    """
    if config.save.dtype != "auto":
        return TORCH_DTYPE[config.save.dtype]
    roles = [role for role in (*config.teacher_specs, STUDENT) if role in sources]
    stored = [sources[role].stored_dtype for role in roles]
    return next((d for d in stored if d is not None and d in TORCH_DTYPE.values()), torch.float32)


def say_precision(config: RunConfig, device: str) -> None:
    """Log the dtypes that a GPU chooses by default."""
    if device == "cpu":
        return
    dtypes = [f"training in {training_dtype(config.train, device)} (train.bf16, train.fp16)"]
    for name, spec in config.teacher_specs.items():
        if spec.dtype is None:
            other = _default_dtype(device)
            dtypes.append(f"{name} in 16 bits as stored, or {other} ({config.key_of(name)}.dtype)")
    logger.info("precision on %s: %s", device, ", ".join(dtypes))


def check_device(config: RunConfig, ranks: Ranks) -> None:
    """Raise if the device lacks a dtype or kernel, before a teacher is trained in vain."""
    device = ranks.device.type
    say_precision(config, device)
    for where, train in config.trainings.items():
        check_dtype(training_dtype(train, device), ranks, where)
        check_kernels(train.kernels, ranks, where)
        if train.fused_layers == "on" and (reason := why_not_compiled(ranks.device)) is not None:
            raise ConfigError(f"{where}.fused_layers: on: {reason}; use auto, or remove the key")
    chosen = {config.key_of(n): s.attn_implementation for n, s in config.teacher_specs.items()}
    on_gpu = device == "cuda"
    has = ["sdpa", "eager"] + ["varlen"] * (config.task.type == "causal_lm")
    has += ["flash_attention_2"] * (on_gpu and is_flash_attn_2_available())
    has += ["flash_attention_3"] * (on_gpu and is_flash_attn_3_available())
    for key, name in {**chosen, "student": config.student.attn_implementation}.items():
        if name is not None and name not in has:
            raise ConfigError(
                f"{key}.attn_implementation: {name} cannot be used on {device} with "
                f"task.type {config.task.type} in this environment; use one of {', '.join(has)}"
            )
    for name, spec in config.teacher_specs.items():
        if spec.dtype == FP8:
            check_fp8_device(ranks.device, f"{config.key_of(name)}.dtype")
        elif spec.dtype is not None:
            check_dtype(spec.dtype, ranks, f"{config.key_of(name)}.dtype")


def check_dtype(dtype: Dtype, ranks: Ranks, where: str) -> None:
    """Raise if the device does not support a dtype, before anything is loaded."""
    known = supported_dtypes()
    if TORCH_DTYPE[dtype] not in known:
        has = ", ".join(name for name, t in TORCH_DTYPE.items() if t in known)
        raise ConfigError(
            f"{where}: {dtype} is not supported on {ranks.device.type}; supported: {has}"
        )


def check_kernels(kernels: Kernels, ranks: Ranks, where: str) -> None:
    """Raise if this device cannot run the chosen kernels, before anything is loaded."""
    try:
        resolve_implementation(kernels, ranks.device)
    except ValueError as error:
        raise ConfigError(f"{where}.kernels: {error}") from error
