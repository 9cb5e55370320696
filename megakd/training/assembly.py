"""What a stage is built from: the prepared inputs, the ready teachers, and models as they load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megakd.config.deepspeed import frozen_on, load_ds_config, zero_stage
from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig
from megakd.config.task import Dtype, FusedLayers
from megakd.engine.collectives import activity
from megakd.engine.distributed import Ranks
from megakd.engine.memory import forget_models, freed_memory_returned
from megakd.models.fitting import ModelSource, ReadyTeacher, label_order
from megakd.models.fused_layers import fuse_layers
from megakd.models.loading import check_finite, load_model
from megakd.models.outputs import Needs
from megakd.models.packing import set_attention
from megakd.process.clock import phase
from megakd.teachers.frozen import FrozenModel, FrozenTeacher
from megakd.training.inputs import RunInputs
from megakd.training.precision import (
    TORCH_DTYPE,
    check_dtype,
    check_kernels,
    frozen_dtype,
    scoring_dtype,
)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts that engines are built from.

    teachers: the teachers that are ready, by name; a method may add teachers.
    are_finished: False in a dry run, whose teachers may lack the head of their fine-tuning.
    """

    prepared: RunInputs
    ranks: Ranks
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)
    teachers_have_heads: bool = True

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def for_role(self, role: str) -> Assembly:
        """Return the assembly with the tokenizer and the data of the model of a role."""
        prepared = self.prepared.for_role(role)
        return self if prepared is self.prepared else replace(self, prepared=prepared)

    def stage_folder(self, name: str) -> Path:
        return self.config.output_dir / "stages" / name

    @phase("models")
    @activity("loading a model")
    def frozen(self, ready: ReadyTeacher) -> FrozenTeacher:
        ds, rows = self.frozen_ds(ready), self.config.train.per_device_train_batch_size
        module = self.frozen_module(ready, ds)
        return FrozenTeacher(module, ds=ds, dtype=self.teacher_dtype(ready), rows=rows)

    @contextmanager
    def loaded(self, ready: ReadyTeacher) -> Iterator[FrozenTeacher]:
        """Load a frozen model that only answers, for the length of the body."""
        model = self.frozen(ready)
        try:
            yield model
        finally:
            model.destroy()

    def scored(self, source: ModelSource) -> AbstractContextManager[FrozenTeacher]:
        """Load a finished model as it is scored."""
        preset = scoring_preset(self.config.student.deepspeed)
        dtype = scoring_dtype(self.config.train, self.ranks.device.type)
        spec = TeacherConfig(model=source.name, deepspeed=preset, dtype=dtype)
        return self.loaded(ReadyTeacher(source, spec))

    def frozen_ds(self, ready: ReadyTeacher) -> Mapping[str, Any]:
        ds = load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")
        return frozen_on(self.ranks.world_size, ds)

    def frozen_module(self, ready: ReadyTeacher, ds: Mapping[str, Any]) -> FrozenModel:
        """Load a model for an engine without an optimizer; `ds` is the config of that engine."""
        source, dtype, train = ready.source, self.teacher_dtype(ready), self.config.train
        check_dtype(dtype, self.ranks, "teacher.dtype")
        check_kernels(train.kernels, self.ranks, "train")
        need_head, fused = self.teachers_have_heads, train.fused_layers
        model = self.load(source, ds, dtype, need_head=need_head, fused=fused)
        order = label_order(model.config, self.prepared.splits.label_names, where=source.where)
        return FrozenModel(model, needs=Needs(), label_order=order, kernels=train.kernels)

    def teacher_dtype(self, ready: ReadyTeacher) -> Dtype:
        return frozen_dtype(ready.spec, ready.source.stored_dtype, self.ranks.device.type)

    def load(
        self,
        source: ModelSource,
        ds: Mapping[str, Any],
        dtype: Dtype,
        *,
        need_head: bool,
        fused: FusedLayers,
    ) -> PreTrainedModel:
        """Load a model of an engine with the config `ds`, or one that has no optimizer."""
        forget_models()
        with freed_memory_returned():
            model = load_model(
                source,
                task=self.config.task,
                label_names=self.prepared.splits.label_names,
                tokenizer_size=source.config.vocab_size,  # checked before the run
                ds=ds,
                dtype=TORCH_DTYPE[dtype],
                seed=self.config.seed,
                need_head=need_head,
                device=self.ranks.device,
            )
        check_finite(model, source)
        torch.nn.Module.to(model, self.ranks.device)  # transformers' own `to` is typed wrongly
        if source.attn_implementation is not None or self.config.task.type == "causal_lm":
            set_attention(model, source, self.config.task.type, self.ranks.device)
        if fused == "on":  # auto: no GPU has run them
            fuse_layers(model, source, self.ranks.device)
        return model


def scoring_preset(deepspeed: str | Mapping[str, Any]) -> str:
    """Return the preset for scoring a finished student: sharded if it was trained sharded."""
    ds = load_ds_config(deepspeed, where="student.deepspeed")
    return "teacher_zero3" if zero_stage(ds) == 3 else "teacher_zero0"
