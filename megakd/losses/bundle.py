"""The module that the student's engine trains: the models that learn, and the objective."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.config.task import Kernels
from megakd.config.terms import Unit
from megakd.data.batch import (
    Batch,
    Counts,
    Losses,
    LossInputs,
    Outputs,
    Pass,
    Predictions,
    UnitCounter,
    add_parts,
    teacher_names,
)
from megakd.losses.objective import WEIGHTED_LOSS, Objective, StageLosses
from megakd.losses.router_balance import ROUTER_BALANCE
from megakd.models.elastic import Elastic, weight_axes
from megakd.models.lora import base_model
from megakd.models.outputs import Needs, predict, predictions_of, read_outputs
from megakd.models.proposed_units import WIDTH
from megakd.models.views import Axes, View

Forward = tuple[str, str | None]
"""A forward for a micro-batch: of the model of a role, as one of its views.

A role that no learner has is the first learner without its adapters.
"""
OutputsByForward = Mapping[Forward, Outputs]


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
    def role(self) -> str:
        return self._roles[0]

    @property
    def student(self) -> nn.Module:
        return self.learners[0]

    @property
    def by_role(self) -> dict[str, nn.Module]:
        """The learners by role."""
        return dict(zip(self._roles, self.learners, strict=True))

    @property
    def counters(self) -> dict[Unit, UnitCounter]:
        """Functions that count the units of a step; units of another learner begin with its role.

        A unit of the first learner has no prefix.
        """
        return {
            self.unit_of(role, unit): functools.partial(_counted_as, role, count)
            for role in self._roles
            for unit, count in self.objective.counters.items()
        }

    def unit_of(self, learner: str, unit: Unit) -> Unit:
        """Return the name of a learner's unit among the counts of a step."""
        return unit if learner == self.role else f"{learner}_{unit}"

    def rates(self, factors: Mapping[str, float]) -> dict[str, float]:
        """Return factors of learning rates by prefix of parameter names, from factors by role."""
        numbers = {role: number for number, role in enumerate(self._roles)}
        return {f"learners.{numbers[role]}.": factor for role, factor in factors.items()}

    @property
    def axes(self) -> dict[str, Axes]:
        """The axes of all weights that change when the first learner is cut, by name."""
        table = weight_axes(self.student)  # type: ignore[arg-type]
        of_student = {f"learners.0.{name}": axes for name, axes in table.items()}
        followers = {*self.objective.projections()}
        names = (name for name, module in self.named_modules() if module in followers)
        return of_student | {f"{name}.weight": (None, WIDTH) for name in names}

    def forward(
        self,
        batch: Batch,
        answers: Mapping[str, Outputs] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Counts | None = None,
        *,
        view: str | None = None,
        scored: bool = False,
    ) -> Losses | Predictions:
        """Compute the losses of all passes on one micro-batch, or predictions without passes.

        Args:
            knowledge: outputs of each frozen teacher of the passes, by the teacher's name.
            plan: the passes of the step, with `counts`; without them, predictions are returned.
            counts: the counts of the units of the step on all ranks.
            view: the view to predict with; not used with `plan`.
            scored: whether the predictions of the whole first learner are returned beside the
                losses; it runs once, also if it has a pass.
        """
        if plan is None or counts is None:
            with self._viewing(view):
                return predict(self.student, batch, self.kernels)
        answers, scales = dict(answers or {}), unit_scales(counts, self.world_size)
        learning = [name for name in teacher_names(plan) if name not in answers]
        trained = [(planned.learner or self.role, planned.view) for planned in plan]
        wanted: list[Forward] = [(name, None) for name in (*learning, *[self.role] * scored)]
        outputs = self._outputs(batch, [*wanted, *trained])
        answers |= {name: outputs[name, None] for name in learning}
        all_inputs: dict[tuple[str, int | None], list[tuple[Forward, LossInputs]]] = {}
        for planned, forward in zip(plan, trained, strict=True):
            width = self.views[planned.view].width if planned.view in self.views else None
            inputs = self._inputs(batch, planned, outputs[forward], answers, scales)
            all_inputs.setdefault((forward[0], width), []).append((forward, inputs))
        totals: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        # Losses of all views of a width run together: a head has one gradient, not one per view.
        for group in all_inputs.values():
            forwards, inputs = zip(*group, strict=True)
            with self._viewing(forwards[0][1]):
                evaluated = self.objective(inputs)
            for forward, values in zip(forwards, evaluated, strict=True):
                totals.append(values.total)
                # Terms are reported as a mean over the passes of their view.
                share = 1 / trained.count(forward)
                add_parts(parts, self._means(forward, values.sums, share, scales.divisors))
        predictions = None
        if scored:
            with self._viewing(None):  # in which the output matrix is read
                whole = outputs[self.role, None]
                predictions = predictions_of(whole, batch.for_role(self.role), self.kernels)
        total = functools.reduce(operator.add, totals)
        parts[WEIGHTED_LOSS] = total.detach() / self.world_size
        return Losses(total, parts, predictions)

    def _outputs(self, batch: Batch, wanted: Sequence[Forward]) -> OutputsByForward:
        outputs: dict[Forward, Outputs] = {}
        # Embeddings are looked up once for all views: each gradient is as large as the table.
        elastic = self.elastic if len(set(wanted)) > 1 else None
        with nullcontext() if elastic is None else elastic.sharing_embeddings():
            for role, view in dict.fromkeys(wanted):
                with self._viewing(view):
                    outputs[role, view] = self._run(role, batch.for_role(role))
        return outputs

    def _run(self, role: str, batch: Batch) -> Outputs:
        if role not in self._roles:
            with base_model(self.student) as base:
                return read_outputs(base, batch, self._teacher_needs)
        needs = self.objective.needs if role == self.role else self._teacher_needs
        return read_outputs(self.learners[self._roles.index(role)], batch, needs)

    def _inputs(
        self,
        batch: Batch,
        planned: Pass,
        student: Outputs,
        answers: Mapping[str, Outputs],
        scales: UnitScales,
    ) -> LossInputs:
        learner = planned.learner or self.role
        units = {unit: self.unit_of(learner, unit) for unit in self.objective.counters}
        inputs = LossInputs(
            student=student,
            teacher=answers[planned.teacher] if planned.teacher else None,
            batch=batch.for_role(learner),
            weights=self.objective.weights,
            # By the counts of the learner's own rows.
            per_unit={unit: scales.per_unit[name] for unit, name in units.items()},
            kernels=self.kernels,
            scale=planned.scale,
        )
        return _weighted(inputs, planned)

    def _means(
        self,
        forward: Forward,
        sums: Mapping[str, Tensor],
        share: float,
        divisors: Mapping[Unit, Tensor],
    ) -> dict[str, Tensor]:
        learner, view = forward
        names = (None if learner == self.role else learner, view)
        prefix = "".join(f"{name}/" for name in names if name)
        means: dict[str, Tensor] = {}
        for name, value in sums.items():
            divisor = divisors[self.unit_of(learner, self.objective.units[name])]
            part = value.float() if share == 1 else share * value.float()
            means[prefix + name] = part / divisor
        return means

    def _viewing(self, view: str | None) -> AbstractContextManager[None]:
        if self.elastic is None:
            return nullcontext()
        return self.elastic.viewing(None if view is None else self.views[view])


class UnitScales(NamedTuple):
    """Factors of sums over a step, fp32 scalars by unit.

    divisors: the unit's count, at least one.
    per_unit: world size / divisor; the world size cancels DeepSpeed's averaging of gradients over
        the ranks.
    """

    divisors: dict[Unit, Tensor]
    per_unit: dict[Unit, Tensor]


def unit_scales(counts: Counts, world_size: int) -> UnitScales:
    """Return the factors of each unit of a step, from the counts of all ranks."""
    # Together, because beside a small loss an operation on a scalar takes long.
    divisors = torch.stack([*counts.values()]).clamp(min=1).float()
    both = (divisors, world_size / divisors)
    return UnitScales(*(dict(zip(counts, values.unbind(), strict=True)) for values in both))


def _weighted(inputs: LossInputs, planned: Pass) -> LossInputs:
    weights = {**inputs.weights, **(planned.weights or {})}
    chosen = dict(planned.weights or {})
    if planned.weigh is not None:
        factors = planned.weigh(replace(inputs, weights=weights))
        chosen = {name: weights[name] * factor for name, factor in factors.items()}
    left_out = frozenset(name for name, weight in chosen.items() if weight == 0)
    if left_out >= weights.keys() - {ROUTER_BALANCE}:  # the loss of the pass is 0
        left_out |= {ROUTER_BALANCE}
    return replace(inputs, weights={**weights, **chosen}, left_out=left_out)


def _counted_as(role: str, count: UnitCounter, batch: Batch) -> Tensor:
    return count(batch.for_role(role))


def build_bundle(
    losses: StageLosses,
    learners: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    world_size: int,
    kernels: Kernels,
) -> StudentBundle:
    """Build the module that the engine of a stage trains, for a run or for a memory plan.

    The learners stand by role; the stage's own model comes first.
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
    # Without views, a model that is pruned has parts too; None: the whole model alone.
    views = None if stage.pruned_to is None and not stage.views else stage.views
    return StudentBundle(
        learners,
        objective,
        world_size=world_size,
        kernels=kernels,
        views=views,
        teacher_needs=losses.teacher_needs(),
    )
