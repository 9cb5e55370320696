"""What a method is written against, whether its stages are trained or only planned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megakd.contract.results import MethodRecord, Metric, ParameterCounts
from megakd.contract.stage import Stage, StageResult
from megakd.contract.terms import TermConfig, hard_terms, soft_terms
from megakd.contract.views import Allocation, View

T = TypeVar("T")
Model = Any
"""A model that a stage can start from. A method passes the model on and never opens it.

It has the attributes `depth` (number of layers), `heads` (`Heads`), `width` (of the hidden states),
`units` (`View`; `head_width` is set if columns of heads can be cut), `uncut` (why only whole layers
can be left out, or None), `shows_attention` (attentions can be read), `whole` (`View` of all that
can be left out) and `fresh` (the model of the same shape that starts from random weights).
"""


class SortedModel(Protocol):
    """A model whose units are sorted by importance, the most important unit first."""

    @property
    def source(self) -> Model:
        """The model itself."""
        ...

    def view_at(
        self,
        sparsity: float,
        *,
        allocation: Allocation,
        round_to: int,
        with_heads: Collection[int] = (),
    ) -> View:
        """Return the units of every layer that remain at a sparsity.

        Args:
            sparsity: share of the units to leave out.
            allocation: how the share is spread over the layers.
            round_to: multiple of rows and columns of the weights to round to.
            with_heads: attentions, numbered from 0, that must keep a head.
        """
        ...


class Pruning(ABC):
    """Sizes, importance and cuts of models."""

    @abstractmethod
    def unscored(self) -> SortedModel:
        """Return the teacher with equal importance for all units, before the teacher is trained."""

    @abstractmethod
    def sorted_teacher(self, teacher: str) -> SortedModel:
        """Sort the units of a teacher by importance, measured once on the validation rows."""

    @abstractmethod
    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        """Return the importance of each layer of a teacher, which is measured once.

        The importance is the rise of the loss on held-out rows if the layer is left out.
        """

    @abstractmethod
    def why_rigid(self, source: Model) -> str | None:
        """Return the reason why hidden states cannot lose columns; None: they can."""

    @abstractmethod
    def has_stock_config(self, source: Model, view: View) -> bool:
        """Return whether transformers' own class of the family can have the shape of a cut."""

    @abstractmethod
    def check_layers(self, source: Model, view: View) -> None:
        """Raise if the layers of a view would not compute alone what they compute in the model."""

    @abstractmethod
    def cut(self, source: Model, view: View, name: str) -> Model:
        """Cut a model to a view, without training, into `stages/<name>`."""

    @abstractmethod
    def parameters(self, source: Model, view: View) -> ParameterCounts:
        """Return the number of weights of a view."""

    @abstractmethod
    def relative_times(
        self, source: Model, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the time of a forward of each view, relative to the whole model's; measured once.

        The views are built with random weights, and timed on the device of the run with the most
        texts at a time of the report. `name` is that of the stage that keeps the times.
        """


class Lab(ABC):
    """Run or plan the stages of one run config.

    config: the `RunConfig`. It is typed as Any because `RunConfig` contains the methods' options.
    results: the results of the finished stages, in order.
    record: further results that a method reports.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.results: list[StageResult] = []
        self.record = MethodRecord()

    @property
    @abstractmethod
    def pruning(self) -> Pruning:
        """The tools of methods that cut models."""

    def hard_terms(self, weight: float = 1.0, *, per_row: bool = False) -> tuple[TermConfig, ...]:
        """Return the loss on labels for the type of the task; see `terms.hard_terms`."""
        return hard_terms(self.config.task.type, weight, per_row=per_row)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """Return the loss on the teacher's outputs for the type of the task."""
        return soft_terms(self.config.task.type, weight)

    @abstractmethod
    def teacher(self, name: str | None = None) -> str:
        """Fine-tune a teacher if the config asks for it; return its name. None: the only one."""

    @abstractmethod
    def dev_score(self, name: str) -> float:
        """Return the worth of the main metric of a teacher on the validation split, measured once.

        See `Metric.worth`.
        """

    @abstractmethod
    def given(self, role: str) -> Model:
        """Return the model that the config gives for a role, before any training."""

    @abstractmethod
    def rows_of_teachers(self) -> dict[str, int]:
        """Return the number of training rows that name each teacher of the config."""

    @abstractmethod
    def steps_of_student(self) -> int:
        """Return the number of optimizer steps in `train` if all rows are used."""

    @abstractmethod
    def metric(self, *, weighed: bool = True) -> Metric:
        """Return the metric that ranks evaluations.

        Raises:
            ConfigError: the metric is `weighed` against sparsity, and is not between 0 and 1.
        """

    @abstractmethod
    def source(self, folder: Path) -> Model:
        """Return the model in the folder of a stage."""

    @abstractmethod
    def model(self, teacher: str) -> Model:
        """Return the model of a teacher that is ready, for a student that starts as its teacher."""

    @abstractmethod
    def as_teacher(self, result: StageResult) -> str:
        """Register a stage's model as a teacher, and return the stage's name.

        It has the engine and dtype of the only teacher of the config.
        """

    @abstractmethod
    def assistant(self, result: StageResult, sparsity: float | None) -> str:
        """Register a stage's model as a teacher, and report it as an assistant.

        `sparsity`: share of the teacher's units that the model lacks; None if it was not cut.
        """

    @abstractmethod
    def train(self, stage: Stage) -> StageResult:
        """Run a stage, or return its result if the stage has finished before; a collective.

        Raises:
            MegakdError: bad input, a loss that is not finite, or a checkpoint of another config.
        """

    @abstractmethod
    def probe(self, stage: str) -> Any:
        """Return the `training.probe.StageProbe` of a stage; None if nothing is trained."""

    @abstractmethod
    def made_by(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        """Read a file that the strategy of a stage wrote; None if nothing was trained."""
