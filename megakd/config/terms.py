"""Loss terms of a run config, with their options and the layers that they compare.

The file imports neither torch nor deepspeed.
"""

from __future__ import annotations

import re
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    cast,
    get_args,
    get_type_hints,
)

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from megakd.errors import TeacherError
from megakd.plugins import Named, wrong_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


Source = Literal["rollouts", "data"]
"""Source of a text: a model that generated it during the run, or the data."""

UNITS = ("examples", "targets", "tokens")
"""The units of every run: rows, labelled rows or positions, and valid positions."""
Unit = str
"""The items that a loss term sums over; `UNITS` are the units of every run."""


def on_source(name: str, source: Source | None) -> str:
    """Return the name of a value that is limited to a source; None: the name itself.

    The name has no slash, which separates the name from the view in logs.
    """
    return name if source is None else f"{name}_on_{source}"


class Heads(NamedTuple):
    """Attention heads of a model's layers; keys and values may have fewer heads than queries."""

    queries: int
    keys: int
    width: int


class Shape(NamedTuple):
    """Shape of a model, as losses need it: layers, hidden width, vocabulary size, heads.

    vocabulary: rows of the output matrix.
    """

    layers: int
    width: int
    vocabulary: int
    heads: Heads | None = None


STRICT = ConfigDict(extra="forbid", strict=True)

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=1, le=2**53)]
"""At most 2 ** 53: every file format that megakd writes holds these integers exactly."""

Fraction = Annotated[float, Field(ge=0, le=1)]


def matching(pattern: str, problem: str) -> AfterValidator:
    """Return a check that a whole text matches a pattern; `problem` begins its message."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{problem} (got {text!r})")
        return text

    return AfterValidator(checked)


def _each_once(items: tuple[Any, ...]) -> tuple[Any, ...]:
    for item in items:
        if items.count(item) > 1:
            raise ValueError(f"{item} is listed twice; list it once")
    return items


def as_tuple(value: object) -> object:
    """Return one name, or a list of names, as a tuple: a command line needs no brackets."""
    if isinstance(value, str):
        return (value,)
    # Strict validation takes the list of a file only where it reads it itself.
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def _some_weight(weights: dict[str, float]) -> dict[str, float]:
    if not any(weights.values()):
        raise ValueError("every weight is 0; set at least one weight above 0")
    return weights


EACH_ONCE = AfterValidator(_each_once)

ClassWeights = Annotated[dict[str, Weight], AfterValidator(_some_weight)]

LayerPair = Annotated[
    str, matching(r"\d+:\d+", "must be a layer pair student:teacher, such as 2:6")
]

LayerMapping = Literal["uniform", "last"] | Annotated[tuple[LayerPair, ...], Field(min_length=1)]

LayerPairs = Annotated[tuple[LayerPair, ...], Field(min_length=2)]

Relation = Literal["query", "key", "value", "query_key"]

Relations = Annotated[tuple[Relation, ...], Field(min_length=1), EACH_ONCE]

Positions = Literal["all", "first"]

Skew = Annotated[float, Field(ge=0, lt=1)]


_OF_CLASSES = ("classification", "mlm", "causal_lm")


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Term:
    """Base class of every term.

    tasks: values of task.type that the loss supports.
    needs_teacher: whether the loss compares with a teacher.
    reads_hidden_states: whether the loss reads hidden states.
    weight: factor of the loss in the sum that the student learns from.
    """

    tasks: ClassVar[tuple[str, ...]] = ("regression", *_OF_CLASSES)
    needs_teacher: ClassVar[bool] = True
    reads_hidden_states: ClassVar[bool] = False
    loss: str
    weight: Weight = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HardCrossEntropy(Term):
    """Cross-entropy with the labels of the data, in nats.

    class_weights: `balanced`, or a weight for every label by name (classification). The sum over
        rows is divided by the number of rows, not by the sum of weights.
    label_smoothing: the share of the target that is spread evenly over all labels (classification).
    count: the sum is divided by the labelled rows of a step (`labels`), or by all rows (`rows`),
        so that a labelled row weighs as much as a row of a soft target (classification).
    on: only the targets of `rollouts` or of `data`; null: of both (causal_lm).
    """

    tasks = _OF_CLASSES
    needs_teacher = False
    loss: Literal["hard_cross_entropy"]
    class_weights: Literal["balanced"] | ClassWeights | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    count: Literal["labels", "rows"] = "labels"
    on: Source | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HardMse(Term):
    """Squared error to the labelled score (regression)."""

    tasks = ("regression",)
    needs_teacher = False
    loss: Literal["hard_mse"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTarget(Term):
    """Options of every soft target of classifiers and language models.

    temperature: divisor of the logits of both models; the term is multiplied by temperature².
    on: only the targets of `rollouts` or of `data`; null: of both (causal_lm).
    """

    tasks = _OF_CLASSES
    temperature: Positive = 1.0
    on: Source | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetKl(SoftTarget):
    """KL(teacher || student) at a temperature (Hinton et al. 2015, section 2)."""

    loss: Literal["soft_target_kl"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetReverseKl(SoftTarget):
    """KL(student || teacher) at a temperature (Gu et al. 2024, MiniLLM)."""

    loss: Literal["soft_target_reverse_kl"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetJsd(SoftTarget):
    """beta·KL(teacher || m) + (1-beta)·KL(student || m), m = beta·teacher + (1-beta)·student.

    beta: 0 is forward KL and 1 is reverse KL, as in other implementations of equation 1 of GKD
        (Agarwal et al. 2024).
    """

    loss: Literal["soft_target_jsd"]
    beta: Fraction = 0.5


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetSkewKl(SoftTarget):
    """KL(teacher || m), m = skew·teacher + (1-skew)·student.

    skew: 0 is forward KL (Ko et al. 2024, DistiLLM).
    """

    loss: Literal["soft_target_skew_kl"]
    skew: Skew = 0.1


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetSkewReverseKl(SoftTarget):
    """KL(student || m), m = (1-skew)·teacher + skew·student.

    skew: 0 is reverse KL (Ko et al. 2024, DistiLLM).
    """

    loss: Literal["soft_target_skew_reverse_kl"]
    skew: Skew = 0.1


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetTvd(SoftTarget):
    """Total variation: half the sum of |teacher - student| (Wen et al. 2023, f-Distill)."""

    loss: Literal["soft_target_tvd"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetMse(Term):
    """Squared error to the teacher's score (regression)."""

    tasks = ("regression",)
    loss: Literal["soft_target_mse"]


Projection = Literal["learned", "identity"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HiddenMse(Term):
    """Squared error between hidden states of mapped layers (Romero et al. 2015; Jiao et al. 2020).

    layer_mapping: `uniform`, `last`, or student:teacher pairs; 0 is the embedding output.
    positions: `all`, or `first` for the first position of each text, which is [CLS] in encoders;
        `first` is averaged over rows.
    projection: the matrices that map the student's states to the teacher's width. `learned`: random
        at the start, only if the widths differ. `identity`: the identity at the start, also if the
        widths are equal, so that a student that starts as its teacher has no loss.
    """

    reads_hidden_states = True
    loss: Literal["hidden_mse"]
    layer_mapping: LayerMapping = "uniform"
    positions: Positions = "all"
    projection: Projection = "learned"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HiddenCosine(Term):
    """One minus the cosine between hidden states of mapped layers (Sanh et al. 2019).

    layer_mapping: as in hidden_mse.
    positions: as in hidden_mse. With `first`, the loss is half the squared distance of normalised
        [CLS] vectors (Sun et al. 2019, patient KD).
    """

    reads_hidden_states = True
    loss: Literal["hidden_cosine"]
    layer_mapping: LayerMapping = "uniform"
    positions: Positions = "all"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EmbeddingMse(Term):
    """Squared error between the embedding outputs (Jiao et al. 2020, TinyBERT, section 3.1).

    projection: as in hidden_mse.
    """

    reads_hidden_states = True
    loss: Literal["embedding_mse"]
    projection: Projection = "learned"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RelationFsp(Term):
    """Squared error between FSP matrices of consecutive mapped layers (Yim et al. 2017).

    layer_mapping: `uniform`, or at least two student:teacher pairs; 0 is the embedding output.
        Each pair and the next pair form one FSP matrix per model.
    """

    reads_hidden_states = True
    loss: Literal["relation_fsp"]
    layer_mapping: Literal["uniform"] | LayerPairs = "uniform"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AttentionMse(Term):
    """Squared error between the attention of mapped layers (Jiao et al. 2020, equation 7).

    fit: `scores` before the softmax, which worked better in the paper, or `probabilities`.
    layer_mapping: `uniform`, `last`, or student:teacher pairs of layers from 1.
    """

    loss: Literal["attention_mse"]
    layer_mapping: LayerMapping = "uniform"
    fit: Literal["scores", "probabilities"] = "scores"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RelationKl(Term):
    """KL between the relations among tokens in mapped layers (Wang et al. 2020, 2021, MiniLM).

    relations: `query`, `key` and `value` compare vectors with themselves; `query_key` compares
        queries with keys.
    relation_heads: number of parts into which the vectors are cut; null: the number of the
        teacher's attention heads.
    layer_mapping: `uniform`, `last`, or student:teacher pairs of layers from 1.
    """

    loss: Literal["relation_kl"]
    layer_mapping: LayerMapping = "last"
    relations: Relations = ("query", "key", "value")
    relation_heads: Count | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MethodTerm(Term):
    """Base class of a term that a method sets; it is not an option of `objective`."""

    needs_teacher = False

    def check(self, student: Shape, teacher: Shape | None, families: Sequence[str]) -> None:
        """Raise a MegakdError if the term cannot work with the models of a stage.

        Args:
            student: the shape of the first model that learns.
            teacher: the shape of the first teacher, frozen or learning.
            families: the families (`model_type`) of the models that learn.
        """

    def group(self) -> Any:
        """Return the module that computes the term (`losses.targets.TermGroup`)."""
        raise TypeError(f"{type(self).__name__} does not implement group()")


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PluginTerm(Term):
    """Base class for the options of a loss of another package; see docs/plugins.md.

    unit: the items that `total` sums over: `examples` (rows), `targets` (labelled rows or
        positions) or `tokens` (valid positions). The sum is divided by the number of these items
        in the whole step.
    """

    unit: ClassVar[Unit]

    def total(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        """Return the sum over the unit in fp32, without `weight`, as a 0-dimensional tensor.

        `student`, `teacher`: the outputs (`data.batch.Outputs`); the teacher's are None without
        a teacher. `batch`: the micro-batch (`data.batch.Batch`).
        """
        raise TypeError(f"{type(self).__name__} does not implement total()")

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Raise a TeacherError if the shapes of the two models do not fit the loss."""


def _wrong_term(kind: Any) -> str | None:
    wrong = wrong_options(kind, PluginTerm, ("total",))
    if wrong is None and getattr(kind, "unit", None) not in UNITS:
        *others, last = UNITS
        return f"{kind.__name__}.unit must be {', '.join(others)} or {last}"
    return wrong


StateTerm = HiddenMse | HiddenCosine | EmbeddingMse | RelationFsp

AttentionTerm = AttentionMse | RelationKl

STATE_TERMS: tuple[type[StateTerm], ...] = get_args(StateTerm)

ATTENTION_TERMS: tuple[type[AttentionTerm], ...] = get_args(AttentionTerm)

INTERMEDIATE_TERMS = (*STATE_TERMS, *ATTENTION_TERMS)

_BY_NAME: dict[str, type[Term]] = {
    get_args(get_type_hints(kind)["loss"])[0]: kind
    for kind in (
        *(HardCrossEntropy, HardMse, *SoftTarget.__subclasses__(), SoftTargetMse),
        *INTERMEDIATE_TERMS,
    )
}

TERMS = Named("loss", "loss", _BY_NAME.get, lambda: [*_BY_NAME], _wrong_term)

TermConfig = Annotated[Term, TERMS]


def looks_inside(term: Term) -> bool:
    """Return whether a term needs more than a teacher's outputs."""
    inside = isinstance(term, INTERMEDIATE_TERMS) or term.reads_hidden_states
    return inside and term.needs_teacher


def hard_terms(
    task: str, weight: float = 1.0, *, per_row: bool = False
) -> tuple[HardMse | HardCrossEntropy]:
    """Return the loss on labels for a type of task.

    With `per_row`, a labelled row of a classifier weighs as much as a row of the soft targets,
    also where other rows have no label.
    """
    if task == "regression":
        return (HardMse(loss="hard_mse", weight=weight),)
    count = "rows" if per_row and task == "classification" else "labels"
    return (HardCrossEntropy(loss="hard_cross_entropy", weight=weight, count=count),)


def soft_terms(task: str, weight: float = 1.0) -> tuple[SoftTargetMse | SoftTargetKl]:
    """Return the loss on a teacher's outputs for a type of task."""
    if task == "regression":
        return (SoftTargetMse(loss="soft_target_mse", weight=weight),)
    return (SoftTargetKl(loss="soft_target_kl", weight=weight),)


def source_of(term: Term) -> Source | None:
    """Return the source that a term is limited to by `on`; None: all targets."""
    # A loss of another package may have an option `on` of its own.
    if isinstance(term, HardCrossEntropy | SoftTarget):
        return term.on
    return None


def term_name(term: Term) -> str:
    """Return the name of the loss, with that of the source to which the term is limited, if any."""
    return on_source(term.loss, source_of(term))


Pairs = tuple[tuple[int, int], ...]
"""(student layer, teacher layer); 0 is the embedding output."""


def layer_pairs(term: StateTerm | AttentionTerm, student: Shape, teacher: Shape) -> Pairs:
    """Return pairs (student layer, teacher layer); 0 is the embedding output.

    `uniform` spreads the student's layers 1..Ls over the teacher's: s -> round(s · Lt / Ls), at
    least 1 for attention.

    Raises:
        TeacherError: a pair names a layer that a model does not have, or the attention of the
            embedding output.
    """
    mapping: LayerMapping = ("0:0",) if isinstance(term, EmbeddingMse) else term.layer_mapping
    if mapping == "last":
        return ((student.layers, teacher.layers),)
    if mapping == "uniform":
        ratio = teacher.layers / student.layers
        least = int(isinstance(term, ATTENTION_TERMS))  # the embedding output has no attention
        return tuple((s, max(least, round(s * ratio))) for s in range(1, student.layers + 1))
    pairs = []
    for text in mapping:
        s, t = (int(number) for number in text.split(":"))
        if s > student.layers or t > teacher.layers:
            raise TeacherError(
                f"{term.loss}.layer_mapping {text}: a layer does not exist; the student has layers "
                f"0 to {student.layers}, the teacher 0 to {teacher.layers} (0 is the embedding "
                "output)"
            )
        if isinstance(term, ATTENTION_TERMS) and 0 in (s, t):
            raise TeacherError(
                f"{term.loss}.layer_mapping {text}: 0 is the embedding output, which has no "
                f"attention; layers count from 1"
            )
        pairs.append((s, t))
    return tuple(pairs)
