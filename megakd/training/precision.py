"""The dtypes and kernels of a run, and checks that the device supports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megakd.config.run import inherit
from megakd.engine.distributed import supported_dtypes
from megakd.errors import ConfigError
from megakd_kernels.settings import resolve_implementation

if TYPE_CHECKING:
    from megakd.config.run import RunConfig, TeacherConfig, TrainConfig
    from megakd.contract.tasks import Dtype, Kernels
    from megakd.engine.distributed import Ranks

TORCH_DTYPE: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
STORED_DTYPE: dict[torch.dtype | None, Dtype] = {
    stored: name for name, stored in TORCH_DTYPE.items()
}


def frozen_dtype(spec: TeacherConfig, stored: torch.dtype | None, device: str) -> Dtype:
    """Return `teacher.dtype`; by default the stored dtype on a GPU, and fp32 on a CPU."""
    if spec.dtype is not None:
        return spec.dtype
    return "fp32" if device == "cpu" else STORED_DTYPE.get(stored, "fp32")


def training_dtype(train: TrainConfig) -> Dtype:
    """Return the dtype that `train.bf16` and `train.fp16` choose."""
    return "bf16" if train.bf16 else "fp16" if train.fp16 else "fp32"


def check_device(config: RunConfig, ranks: Ranks) -> None:
    """Raise if the device lacks a dtype or kernel, before a teacher is trained in vain.

    Raises:
        ConfigError: names the dtype and the supported dtypes, or the kernels.
    """
    check_dtype(training_dtype(config.train), ranks, "train")
    check_kernels(config.train.kernels, ranks, "train")
    for name, spec in config.teacher_specs.items():
        key = config.key_of(name)
        if spec.dtype is not None:
            check_dtype(spec.dtype, ranks, f"{key}.dtype")
        if spec.finetune is not None:
            train = inherit(config.train, spec.finetune)
            check_dtype(training_dtype(train), ranks, f"{key}.finetune")
            check_kernels(train.kernels, ranks, f"{key}.finetune")


def check_dtype(dtype: Dtype, ranks: Ranks, where: str) -> None:
    """Raise if the device does not support a dtype, before anything is loaded.

    Raises:
        ConfigError: the device does not support the dtype.
    """
    known = supported_dtypes()
    if TORCH_DTYPE[dtype] not in known:
        has = ", ".join(name for name, t in TORCH_DTYPE.items() if t in known)
        raise ConfigError(
            f"{where}: {dtype} is not supported on {ranks.device.type}; supported: {has}"
        )


def check_kernels(kernels: Kernels, ranks: Ranks, where: str) -> None:
    """Raise if this device cannot run the chosen kernels, before anything is loaded.

    Raises:
        ConfigError: the device does not support the kernels.
    """
    try:
        resolve_implementation(kernels, ranks.device)
    except ValueError as error:
        raise ConfigError(f"{where}.kernels: {error}") from error
