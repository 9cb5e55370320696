"""The module that the student's engine trains: the models that learn, and the objective."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.contract.batch import Batch, Counts, Knowledge, Losses, LossInputs, Predictions, Unit
from megakd.contract.routes import taken
from megakd.contract.stage import Pass, teacher_names
from megakd.contract.tasks import Kernels
from megakd.contract.unit_counts import UnitCounter, unit_weights
from megakd.contract.views import Axes, View
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.losses.stage_losses import StageLosses
from megakd.losses.targets import Evaluated
from megakd.models.axes import WIDTH, weight_axes
from megakd.models.elastic import Elastic
from megakd.models.knowledge import Needs, opened_head, read_knowledge
from megakd.models.lora import base_model
from megakd.models.predictions import predict, predictions_of


class ReadPass(NamedTuple):
    """A pass, the inputs of its losses, and its share in the reported means of its view."""

    planned: Pass
    reading: LossInputs
    share: float


Outputs = Mapping[tuple[str | None, str | None], Knowledge]
"""Outputs of the learners for a micro-batch, by learner and view."""


class StudentBundle(nn.Module):
    """The models that learn and their objective, so that losses run inside the engine's forward.

    learners: models by role; the first learner is the model that the stage returns.
    views: sub-networks of the first learner that passes may name; if this is a mapping, also an
        empty one, the learner can run as a cut of itself (`Elastic.keep`).
    teacher_needs: outputs needed from the other learners, which may teach the first learner.
    """

    def __init__(
        self,
        learners: Mapping[str, nn.Module],
        objective: Objective,
        *,
        world_size: int,
        kernels: Kernels = "auto",
        views: Mapping[str, View] | None = None,
        teacher_needs: Needs | None = None,
    ) -> None:
        super().__init__()
        self._roles = tuple(learners)
        self.learners = nn.ModuleList(learners.values())
        self.views = dict(views or {})
        self.elastic = None if views is None else Elastic(self.student)  # type: ignore[arg-type]
        self.objective = objective
        if self.elastic is not None:
            for projection in objective.projections():
                self.elastic.follow(projection)
        self.world_size = world_size
        self.kernels: Kernels = kernels
        self._teacher_needs = teacher_needs or Needs()

    @property
    def student(self) -> nn.Module:
        """The first learner."""
        return self.learners[0]

    @property
    def counters(self) -> dict[Unit, UnitCounter]:
        """Functions that count the units of a step; units of another learner begin with its role.

        A unit of the first learner has no prefix.
        """
        return {
            _unit_of(self._key(role), unit): functools.partial(_counted_as, role, count)
            for role in self._roles
            for unit, count in self.objective.counters.items()
        }

    def rates(self, factors: Mapping[str, float]) -> dict[str, float]:
        """Return factors of learning rates by prefix of parameter names, from factors by role."""
        numbers = {role: number for number, role in enumerate(self._roles)}
        return {f"learners.{numbers[role]}.": factor for role, factor in factors.items()}

    @property
    def axes(self) -> dict[str, Axes]:
        """The axes of all weights that change when the first learner is cut, by name."""
        table = weight_axes(self.student)  # type: ignore[arg-type]
        own = {f"learners.0.{name}": axes for name, axes in table.items()}
        followers = {*self.objective.projections()}
        names = (name for name, module in self.named_modules() if module in followers)
        return own | {f"{name}.weight": (None, WIDTH) for name in names}

    def opened_head(self, batch: Batch) -> AbstractContextManager[object]:
        """Gather the student's output matrix during a forward without passes."""
        return opened_head(self.student, batch)

    def forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Counts | None = None,
        *,
        view: str | None = None,
        scored: Sequence[str | None] = (),
    ) -> Losses | Predictions:
        """Compute the losses of all passes on one micro-batch, or predictions without passes.

        Args:
            batch: one micro-batch.
            knowledge: outputs of each frozen teacher of the passes, by the teacher's name.
            plan: the passes of the step; None returns predictions.
            counts: global unit counts of the step, for all `counters`.
            view: the view to predict with; not used with `plan`.
            scored: views of the first learner whose predictions are returned beside the losses;
                None is the whole model. A view that also has a pass runs once.
        """
        if plan is None or counts is None:
            with self._viewing(view):
                return predict(self.student, batch, self.kernels)
        plan = [replace(planned, learner=self._key(planned.learner)) for planned in plan]
        sums, frozen = LossSums(counts, self.objective, self.world_size), knowledge or {}
        teaching = [name for name in teacher_names(plan) if name not in frozen]
        beside = [(self._key(name), None) for name in teaching]
        outputs = self._outputs(batch, plan, [*beside, *((None, view) for view in scored)])
        answers = {**frozen, **{n: outputs[key] for n, key in zip(teaching, beside, strict=True)}}
        readings = self._read(batch, outputs, answers, plan, sums)
        # Losses run after all views of a width, so that a head has one gradient, not one per view.
        for together in readings.values():
            with self._viewing(together[0].planned.view):
                evaluated = self.objective([read.reading for read in together])
            for read, one in zip(together, evaluated, strict=True):
                sums.add(read.planned, one, share=read.share)
        predictions = {view: self._predictions(batch, outputs, view) for view in scored}
        return sums.losses()._replace(predictions=predictions)

    def _predictions(self, batch: Batch, outputs: Outputs, view: str | None) -> Predictions:
        with self._viewing(view):  # in which the output matrix is read
            return predictions_of(outputs[None, view], batch.of(self._roles[0]), self.kernels)

    def _read(
        self,
        batch: Batch,
        outputs: Outputs,
        answers: Mapping[str, Knowledge],
        plan: Sequence[Pass],
        sums: LossSums,
    ) -> dict[tuple[str | None, int | None], list[ReadPass]]:
        """Return the passes with the outputs of both models, by learner and width of the view."""
        passes = Counter((planned.learner, planned.view) for planned in plan)
        found: dict[tuple[str | None, int | None], list[ReadPass]] = {}
        for planned in plan:
            key = (planned.learner, planned.view)
            rows = batch.of(planned.learner or self._roles[0])
            own, learned = _rows_of(planned, rows, outputs[key])
            read = ReadPass(
                planned,
                self._reading(
                    own,
                    learned,
                    answers[planned.teacher] if planned.teacher else None,
                    planned,
                    sums.per_unit(planned.learner),
                ),
                # The values of parts of the rows add up to the value of all rows.
                1 / passes[key] if own.extras.within is None else 1.0,
            )
            width = self.views[planned.view].width if planned.view in self.views else None
            found.setdefault((planned.learner, width), []).append(read)
        return found

    def _outputs(
        self, batch: Batch, plan: Sequence[Pass], beside: Sequence[tuple[str | None, str | None]]
    ) -> Outputs:
        wanted = dict.fromkeys([*beside, *((planned.learner, planned.view) for planned in plan)])
        found: dict[tuple[str | None, str | None], Knowledge] = {}
        with self._sharing(len(wanted) > 1):
            for role, view in wanted:
                with self._viewing(view):
                    found[role, view] = self._answer(role, batch.of(role or self._roles[0]))
        return found

    def _answer(self, name: str | None, batch: Batch) -> Knowledge:
        if name is None or name in self._roles:
            model, needs = self._model_of(name)
            return read_knowledge(model, batch, needs)
        with base_model(self.student) as base:
            return read_knowledge(base, batch, self._teacher_needs)

    def _key(self, role: str | None) -> str | None:
        """Return the role, or None for the first learner."""
        return None if role == self._roles[0] else role

    def _model_of(self, role: str | None) -> tuple[nn.Module, Needs]:
        number = self._roles.index(role) if role else 0
        return self.learners[number], self._teacher_needs if number else self.objective.needs

    def _reading(
        self,
        batch: Batch,
        said: Knowledge,
        taught: Knowledge | None,
        planned: Pass,
        per_unit: Mapping[Unit, Tensor],
    ) -> LossInputs:
        chosen = dict(planned.weights or {})
        reading = LossInputs(
            student=said,
            teacher=taught,
            batch=batch,
            weights=self.objective.weights | chosen,
            per_unit=per_unit,
            kernels=self.kernels,
            scale=planned.scale,
        )
        if planned.weigh is not None:
            factors = planned.weigh(reading)
            chosen = {name: reading.weights[name] * factor for name, factor in factors.items()}
        left_out = frozenset(name for name, weight in chosen.items() if weight == 0)
        return replace(reading, weights={**reading.weights, **chosen}, left_out=left_out)

    def _viewing(self, view: str | None) -> AbstractContextManager[None]:
        if self.elastic is None:
            return nullcontext()
        return self.elastic.viewing(None if view is None else self.views[view])

    def _sharing(self, several: bool) -> AbstractContextManager[None]:  # noqa: FBT001
        """Look up embeddings once for all views: each gradient is as large as the table."""
        if self.elastic is None or not several:
            return nullcontext()
        return self.elastic.sharing_embeddings()


class LossSums:
    """Sum of the losses of all passes of a micro-batch.

    counts: global unit counts of the step.
    """

    def __init__(self, counts: Counts, objective: Objective, world_size: int) -> None:
        self._per_unit = unit_weights(counts, world_size)
        self._counts, self._units, self._world_size = counts, objective.units, world_size
        self._own_units = tuple(objective.counters)
        self._total = torch.zeros((), device=next(iter(counts.values())).device)
        self._parts: dict[str, Tensor] = {}

    def per_unit(self, learner: str | None) -> Mapping[Unit, Tensor]:
        """Return the factor of each unit in a learner's losses, by the counts of its own rows."""
        return {unit: self._per_unit[_unit_of(learner, unit)] for unit in self._own_units}

    def add(self, planned: Pass, evaluated: Evaluated, *, share: float) -> None:
        """Add one pass; its terms are reported as a mean over the passes of its view."""
        self._total = self._total + evaluated.total
        prefix = "".join(f"{name}/" for name in (planned.learner, planned.view) if name)
        for name, value in evaluated.sums.items():
            count = self._counts[_unit_of(planned.learner, self._units[name])].clamp(min=1)
            known = self._parts.get(prefix + name, 0.0)
            self._parts[prefix + name] = known + share * value.float() / count

    def losses(self) -> Losses:
        """Return the loss to minimise, and the values to report."""
        minimised = {WEIGHTED_LOSS: self._total.detach() / self._world_size}
        return Losses(self._total, self._parts | minimised)


def _rows_of(planned: Pass, batch: Batch, said: Knowledge) -> tuple[Batch, Knowledge]:
    """Return the rows of a pass and the learner's outputs for them.

    If the rows of a micro-batch name their teachers, a pass covers the rows of its teacher alone.
    """
    own = batch.of(planned.teacher)
    return (batch, said) if own.extras.within is None else (own, taken(said, own.extras.within))


def _unit_of(learner: str | None, unit: Unit) -> Unit:
    return f"{learner}_{unit}" if learner else unit


def _counted_as(role: str, count: UnitCounter, batch: Batch) -> Tensor:
    """Count the units of the rows as encoded for the model of a role."""
    return count(batch.of(role))


def build_bundle(
    losses: StageLosses,
    learners: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    world_size: int,
    kernels: Kernels,
) -> StudentBundle:
    """Build the module that the engine of a stage trains, for a run or for a memory plan.

    Args:
        losses: losses of the stage.
        learners: the models that learn, by role; the stage's own model comes first.
        dtype: dtype of the models.
        world_size: number of ranks.
        kernels: code path of the losses.

    Raises:
        MegakdError: a loss term cannot work with these models.
    """
    objective = losses.objective()
    objective.bind(learners)
    # ZeRO 3 puts all parameters of a model into one buffer, which has one dtype.
    objective.to(dtype)
    stage, train = losses.stage, losses.stage.train
    if train.gradient_checkpointing:
        offload = train.activation_offload and torch.cuda.is_available()
        for model in learners.values():
            # With reentrant checkpointing, hooks that read parts of a block would run twice.
            options = {"use_reentrant": False}
            model.activation_checkpointing_enable(options, offload=offload)  # type: ignore[operator]
    views = None if stage.strategy.pruned_to is None and not stage.views else stage.views
    return StudentBundle(
        learners,
        objective,
        world_size=world_size,
        kernels=kernels,
        views=views,
        teacher_needs=losses.teacher_needs(),
    )
