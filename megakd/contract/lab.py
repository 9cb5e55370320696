"""What a method may ask for while it runs, whether its stages are trained or only planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from megakd.contract.metrics import Metric
from megakd.contract.results import MethodRecord, ParameterCounts
from megakd.contract.shapes import Heads
from megakd.contract.stage import Stage, StageResult
from megakd.contract.terms import TermConfig
from megakd.contract.units import View

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Model = Any
"""A model that a stage can start from; a method passes it on and never opens it."""


class SortedModel(Protocol):
    """A model whose units lie by falling importance."""

    @property
    def source(self) -> Model:
        """The model itself."""
        ...

    def view_at(
        self,
        sparsity: float,
        *,
        allocation: Literal["global", "uniform"],
        round_to: int,
        residual: bool = False,
        with_heads: Collection[int] = (),
    ) -> View:
        """Return the units of every layer that are left at a sparsity.

        Args:
            sparsity: share of the units to leave out.
            allocation: how the share is spread over the layers.
            round_to: in rows and columns of the weights.
            residual: whether the width of the hidden states shrinks too.
            with_heads: attentions, from 0, that must keep a head.

        Raises:
            TeacherError: heads, neurons or the width run out.
        """
        ...


class HeldOutProbe(Protocol):
    """What a strategy that measures may use while a stage runs; every method is a collective."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        ...

    def loss(self, student: Any) -> float:
        """Return the loss on held-out rows, the same on every rank."""
        ...

    def remember(self, student: Any) -> None:
        """Keep the student's weights and optimizer."""
        ...

    def reset(self, student: Any) -> None:
        """Give the student the weights and the optimizer that were kept."""
        ...


class Lab(Protocol):
    """Run or plan the stages of one run config.

    config: the `RunConfig`. It is made of the methods' options, so that no type names it here.
    results: the stages that have finished, in order.
    record: what a method wants to be reported beside them.
    """

    config: Any
    results: list[StageResult]
    record: MethodRecord

    def hard_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """Return the loss on labels that fits the task."""
        ...

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """Return the loss on the teacher's outputs that fits the task."""
        ...

    def teacher(self, name: str | None = None) -> str:
        """Fine-tune a teacher if the config asks for it, and return its name.

        Args:
            name: of the teacher; None for the only one.
        """
        ...

    def teachers(self) -> tuple[str, ...]:
        """Fine-tune all teachers if the config asks for it, and return their names."""
        ...

    def largest_first(self) -> tuple[str, ...]:
        """Return the names of all teachers by falling number of weights."""
        ...

    def worth(self, metrics: Mapping[str, float]) -> float:
        """Return the metric that stands for the task, negated if lower is better."""
        ...

    def dev_score(self, name: str) -> float:
        """Return the `worth` of a teacher on the validation split; measured once."""
        ...

    @property
    def teacher_layers(self) -> int:
        """The number of layers of the teacher."""
        ...

    @property
    def teacher_heads(self) -> Heads:
        """The attention heads of the teacher."""
        ...

    def widths(self, teacher: str) -> tuple[int, int]:
        """Return the widths of the hidden states of the student and of a teacher."""
        ...

    def steps_of_student(self) -> int:
        """Return the optimizer steps that `train` asks for if all rows are trained on."""
        ...

    def metric(self, name: str | None) -> Metric:
        """Return a metric of the task that can be weighed against sparsity.

        Raises:
            ConfigError: the task has no such metric, or the metric is not between 0 and 1.
        """
        ...

    def unscored(self) -> SortedModel:
        """Return the teacher with units that are all alike, before it is trained."""
        ...

    def sorted_teacher(
        self, teacher: str, split: str, *, batch_size: int, residual: bool
    ) -> SortedModel:
        """Sort the units of a teacher by importance; measured once.

        Args:
            teacher: its name.
            split: whose labels say what is important.
            batch_size: rows whose gradient is summed before its absolute value is taken.
            residual: whether the columns of the hidden states are units too.

        Raises:
            MegakdError: the importance cannot be measured.
        """
        ...

    def cut(self, source: Model, view: View, name: str) -> Model:
        """Cut a model to a view, without training, into `stages/<name>`."""
        ...

    def parameters(self, source: Model, view: View) -> ParameterCounts:
        """Return the number of weights of a view."""
        ...

    def source(self, folder: Path) -> Model:
        """Return the model in a stage's folder."""
        ...

    def fresh_like(self, folder: Path) -> Model:
        """Return a model of the same shape that starts from random weights."""
        ...

    def as_teacher(self, result: StageResult, *, like: str = "teacher") -> str:
        """Make a stage's model a teacher, and return the stage's name.

        Args:
            result: of the stage.
            like: the teacher of the config that gives the engine and the dtype.
        """
        ...

    def assistant(self, result: StageResult, sparsity: float) -> str:
        """Make a stage's model the teacher of the student, and report it as an assistant."""
        ...

    def train(self, stage: Stage) -> StageResult:
        """Run a stage, or return its result if it has finished before; a collective.

        Raises:
            MegakdError: bad input, a loss that is not finite, or a checkpoint of another config.
        """
        ...

    def probe(self, stage: str) -> HeldOutProbe | None:
        """Return what a strategy may measure with in a stage; None where nothing is trained."""
        ...

    def made_by(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        """Read a file that the strategy of a stage wrote; None where nothing was trained."""
        ...
