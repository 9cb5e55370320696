"""Cuts of models in a lab that trains nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.contract.lab import TimedWork
from megakd.contract.views import View
from megakd.data.step_layout import StepShape
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.planning.phase import Phase
from megakd.pruning.builder import Shapes, SortedTeacher, shape_of_cut, unscored
from megakd.scoring.scorer import FEW

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megakd.config.run import RunConfig


class PlannedPruning(Shapes):
    """Tools of methods that cut models, which record work with models instead of doing it."""

    def __init__(
        self,
        config: RunConfig,
        sources: Mapping[str, ModelSource],
        *,
        teachers: Mapping[str, ReadyTeacher],
        phases: list[Phase],
        world: int,
        classes: int | None = None,
    ) -> None:
        super().__init__(config, sources, classes=classes)
        self._teachers, self._phases, self._world = teachers, phases, world

    def sorted_teacher(
        self, teacher: str, split: str, *, batch_size: int, residual: bool
    ) -> SortedTeacher:
        """Record the importance phase, once per run."""
        ready = self._teachers[teacher]
        if not any(known.work == "importance" for known in self._phases):
            # Several ranks may use fewer rows per micro-batch.
            most = self.config.train.rows_at_once(self.config.task.row_length)
            phase = Phase(
                name="specification",
                work="importance",
                teachers={teacher: ready},
                rows=StepShape.of_batch(batch_size, most, rank=0, world=1).per_device,
                with_width=residual,
            )
            self._phases.append(phase)
        return unscored(ready.source)

    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        """Record the scoring of the teacher, once; return the same importance for all layers."""
        ready, rows = self._teachers[teacher], self.config.eval_rows()
        layers = ready.source.architecture.number_of_layers(ready.source.config)
        if not any(known.name == "layers" for known in self._phases):
            few = FEW[self.config.task.type]
            forwards = (layers + 1) * -(-few // (rows * self._world))
            teachers = {"layers": ready}
            phase = Phase(
                name="layers", work="scoring", teachers=teachers, rows=rows, forwards=forwards
            )
            self._phases.append(phase)
        return (1.0,) * layers

    def relative_times(
        self, source: ModelSource, views: Mapping[str, View], name: str, work: TimedWork
    ) -> Mapping[str, float]:
        """Return the views' shares of the weights of the layers; a plan times nothing."""
        del name, work
        whole = self.parameters(source, source.architecture.units(source.config))
        counts = {known: self.parameters(source, view) for known, view in views.items()}
        return {k: n.encoder_parameters / whole.encoder_parameters for k, n in counts.items()}

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return the shape of the cut model; the cut itself runs tensor by tensor on one rank."""
        return shape_of_cut(source, view, self.config.task.type)
