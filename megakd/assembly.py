"""Builds the engines of a stage from what was prepared: the learner, and each frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megakd.config import Dtype, RunConfig, TeacherConfig
from megakd.data.encoding import Collator
from megakd.data.masking import task_masking
from megakd.engine.distributed import Ranks
from megakd.engine.ds_config import load_ds_config
from megakd.engine.initialize import training_engine
from megakd.engine.memory import freed_memory_returned
from megakd.engine.student import StudentEngine
from megakd.knowledge import Needs
from megakd.models.bundle import StudentBundle
from megakd.models.labels import label_order
from megakd.models.loading import ModelSource, load_model
from megakd.objective import Objective, Shape, build_objective
from megakd.precision import TORCH_DTYPE, check_dtype, check_kernels, frozen_dtype, training_dtype
from megakd.preparation import Prepared
from megakd.scoring import Scorer
from megakd.stage import Stage
from megakd.teachers.frozen import FrozenModel, FrozenTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReadyTeacher(NamedTuple):
    """A model that can teach, fine-tuned or given, and how the config wants it held."""

    source: ModelSource
    spec: TeacherConfig


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What engines are built from.

    teachers: those that are ready, by name; a method may add to them.
    """

    config: RunConfig
    prepared: Prepared
    ranks: Ranks
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)

    def learner(self, stage: Stage) -> ModelSource:
        """The model that learns in this stage."""
        return stage.start or self.prepared.sources[stage.role]

    def shapes(self, stage: Stage) -> tuple[Shape, Shape | None]:
        """Of the student, and of its first teacher: where losses look inside, all are alike."""
        student = self.prepared.shape_of(self.learner(stage))
        if not stage.teachers:
            return student, None
        return student, self.prepared.shape_of(self.teachers[stage.teachers[0]].source)

    def student(self, stage: Stage) -> tuple[StudentEngine, Objective]:
        """The engine of the model that learns in this stage, with its objective.

        Raises:
            MegakdError: the model or its DeepSpeed config cannot be used.
        """
        objective = self._objective(stage)
        ds = load_ds_config(stage.deepspeed, where=f"{self.config.key_of(stage.role)}.deepspeed")
        dtype = training_dtype(stage.train)
        check_dtype(dtype, self.ranks, "train")
        check_kernels(stage.train.kernels, self.ranks, "train")
        model = self._load(self.learner(stage), ds, dtype, need_head=False)
        if stage.train.gradient_checkpointing:
            # Hooks that read a block's parts would run twice under the reentrant kind.
            model.activation_checkpointing_enable({"use_reentrant": False})
        # ZeRO 3 lays all parameters of a model into one buffer, which has one dtype.
        objective.to(TORCH_DTYPE[dtype])
        bundle = StudentBundle(
            model,
            objective,
            world_size=self.ranks.world_size,
            kernels=stage.train.kernels,
            views=stage.views,
        )
        engine = training_engine(
            bundle, ds=ds, train=stage.train, dtype=dtype, world_size=self.ranks.world_size
        )
        return StudentEngine(engine, passes_per_backward=stage.passes_per_backward), objective

    def _objective(self, stage: Stage) -> Objective:
        # Projections start alike on every rank and leave the stage's random numbers alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return build_objective(stage.objective, self.config.task.type, *self.shapes(stage))

    def frozen(
        self, source: ModelSource, spec: str | Mapping[str, Any], *, dtype: Dtype, needs: Needs
    ) -> FrozenTeacher:
        """A model that only answers, in an engine of its own.

        Raises:
            MegakdError: the model or its DeepSpeed config cannot be used.
        """
        ds = load_ds_config(spec, where="teacher.deepspeed")
        module = self.frozen_module(source, ds, dtype=dtype, needs=needs)
        rows = self.config.train.per_device_train_batch_size
        return FrozenTeacher(module, ds=ds, dtype=dtype, rows=rows)

    def frozen_module(
        self, source: ModelSource, ds: Mapping[str, Any], *, dtype: Dtype, needs: Needs
    ) -> FrozenModel:
        """A loaded model that an engine without an optimizer can own; `ds` is of that engine.

        Raises:
            MegakdError: the model cannot be used.
        """
        check_dtype(dtype, self.ranks, "teacher.dtype")
        check_kernels(self.config.train.kernels, self.ranks, "train")
        model = self._load(source, ds, dtype, need_head=True)
        order = label_order(model.config, self.prepared.splits.label_names, where=source.where)
        kernels = self.config.train.kernels
        return FrozenModel(model, needs=needs, label_order=order, kernels=kernels)

    def scorer(self) -> Scorer:
        """Scores any model on a held-out split of this run."""
        return Scorer(
            metrics=self.prepared.splits.metrics,
            collate=Collator(self.prepared.tokenizer, self.config.task),
            batch_size=self.config.eval.per_device_eval_batch_size,
            ranks=self.ranks,
            masking=task_masking(self.prepared.tokenizer, self.config.task),
        )

    def teacher_dtype(self, ready: ReadyTeacher) -> Dtype:
        """What a model that only answers is held in."""
        return frozen_dtype(ready.spec, ready.source.stored_dtype, self.ranks.device.type)

    def _load(
        self, source: ModelSource, ds: Mapping[str, Any], dtype: Dtype, *, need_head: bool
    ) -> PreTrainedModel:
        with freed_memory_returned():
            model = load_model(
                source,
                task=self.config.task,
                label_names=self.prepared.splits.label_names,
                tokenizer_size=len(self.prepared.tokenizer),
                ds=ds,
                dtype=TORCH_DTYPE[dtype],
                seed=self.config.seed,
                need_head=need_head,
            )
        torch.nn.Module.to(model, self.ranks.device)  # transformers' own `to` is typed wrongly
        return model
