"""The dtypes and kernels of a run, what a device supports, and the largest step of a rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from megakd.config.deepspeed import clips_on_device, load_ds_config, zero_stage
from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig, TrainConfig
from megakd.config.task import FP8, STUDENT, Dtype, FusedLayers, Kernels, TaskConfig
from megakd.data.loader import StepLayout, StepShape
from megakd.engine.distributed import Ranks, supported_dtypes
from megakd.errors import ConfigError
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.models.fused_layers import KEY, why_not_compiled
from megakd.models.outputs import Needs
from megakd.models.quantized import check_fp8_device
from megakd.stage import Stage
from megakd_kernels.settings import resolve_implementation

logger = logging.getLogger(__name__)

TORCH_DTYPE: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choice_of(stage: Stage) -> FusedLayers:
    """Return `fused_layers` of a stage; off with views, which give modules another class."""
    choice = stage.train.fused_layers
    if not stage.views and stage.pruned_to is None:
        return choice
    if choice == "on":
        raise ConfigError(
            f"{KEY}: on: the stage {stage.name} trains parts of its student, whose layers cannot "
            "be fused; use auto, or remove the key"
        )
    return "off"


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
    """Log the dtypes that a GPU chooses by default, and what it leaves out."""
    if device == "cpu":
        return
    dtypes = [f"training in {training_dtype(config.train, device)} (train.bf16, train.fp16)"]
    for name, spec in config.teacher_specs.items():
        if spec.dtype is None:
            other = _default_dtype(device)
            dtypes.append(f"{name} in 16 bits as stored, or {other} ({config.key_of(name)}.dtype)")
    logger.info("precision on %s: %s", device, ", ".join(dtypes))
    untried = [f"fused layers ({KEY}: on)"] if config.train.fused_layers == "auto" else []
    ds = load_ds_config(config.student.deepspeed, where="student.deepspeed")
    if zero_stage(ds) in (1, 2) and not clips_on_device(ds):
        untried.append("clipping without the host (student.deepspeed: megakd.clip_on_device: true)")
    if untried:
        logger.info("off until a GPU has run them: %s", ", ".join(untried))


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


BUDGET = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes for the answers of a step and the activations of the forward that computes them."""

_IN_FLIGHT = 12
"""Tensors as wide as the hidden states that a forward without gradient holds at a time."""


class StepSize(NamedTuple):
    """The largest step of a rank: micro-batches, rows of each, and positions per row."""

    micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def largest_step(train: TrainConfig, task: TaskConfig) -> StepSize:
    """Return the sizes of a step in which every row has `task.max_length` tokens."""
    shape = StepShape(train.per_device_train_batch_size, train.gradient_accumulation_steps)
    layout = StepLayout(shape, train.tokens_per_rank)
    count = layout.most_micro_batches(task.row_length)
    if train.tokens_per_rank is None:
        return StepSize(count, shape.per_device, task.row_length)
    return StepSize(count, 1, train.tokens_per_rank)


def joins_micro_batches(
    ready: ReadyTeacher,
    needs: Needs,
    train: TrainConfig,
    config: RunConfig,
    *,
    dtype: Dtype,
    device: str,
) -> bool:
    """Return whether one forward of a teacher answers all micro-batches of a step.

    By default a replicated teacher answers them one by one. A teacher at ZeRO 3 is gathered in
    every forward, so it answers them together if that fits into `BUDGET`.
    """
    step = largest_step(train, config.task)
    if step.micro_batches == 1 or ready.spec.joins_micro_batches is not None:
        return step.micro_batches > 1 and bool(ready.spec.joins_micro_batches)
    if zero_stage(load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")) != 3:
        return False
    source = ready.source
    kept = 1 + len(needs.hidden_layers) + 3 * len(needs.attention_layers)
    width = source.architecture.hidden_width(source.config) * TORCH_DTYPE[dtype].itemsize
    return step.micro_batches * step.tokens * width * (kept + _IN_FLIGHT) <= BUDGET[device]
