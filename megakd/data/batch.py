"""One micro-batch, the passes over it, the outputs of models for it, and the counts of losses.

Shapes: B rows of a micro-batch, T positions, V vocabulary or classes, D width, L layers.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megakd.config.task import Kernels
from megakd.config.terms import Source, Unit
from megakd.errors import MegakdError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of a step: its teacher, its learner, the sub-network, and the weights of terms.

    teacher: name of a frozen teacher, or of a model that learns in the same stage. The terms read
        the teacher's outputs detached (`LossInputs.taught`), so the teacher learns only from its
        own passes; `LossInputs.teacher` of a model that learns carries a gradient.
    learner: role of the model that learns; None for the first learner of the stage.
    view: sub-network of the first learner.
    weights: term name -> weight that replaces the objective's weight; None keeps the objective's
        weights. A term with weight 0 here adds nothing to the loss. The term is neither computed
        nor reported, unless another pass of the same learner and width has a weight for it. A
        language model computes and reports terms on hard and soft targets together, all or none.
        If all terms of a pass have weight 0, the loss of the pass is 0, with gradients of 0.
    scale: factor of the pass's loss.
    backward: number of the backward of the pass in its step. Passes that follow each other and have
        the same number keep their activations at the same time, and share a backward. Every
        backward reduces all gradients, so there should be as few as memory allows.
    weigh: function from the outputs of both models for a micro-batch (a `LossInputs`, with their
        last hidden states) to factors by which the weights are multiplied. It is called in the
        student's forward of a step, not of an evaluation, and returns the same factors on all
        ranks. The passes of all steps have a function, or those of none.
    """

    teacher: str | None = None
    learner: str | None = None
    view: str | None = None
    weights: Mapping[str, float] | None = None
    scale: float = 1.0
    backward: int = 0
    weigh: Callable[[Any], Mapping[str, float]] | None = None


def backward_groups(plan: Sequence[Pass]) -> list[Sequence[Pass]]:
    """Split the passes of a step into the groups that share a backward."""
    if not plan:
        raise MegakdError(
            "the strategy's passes() returned 0 passes for a step, and a step needs at least 1; "
            "return a Pass, for example one whose `weights` are all 0 for a step without a loss"
        )
    return [tuple(group) for _, group in groupby(plan, key=attrgetter("backward"))]


def teacher_names(plan: Sequence[Pass]) -> tuple[str, ...]:
    """Return the teachers of the passes, each once, in order (the same order on all ranks)."""
    return tuple(dict.fromkeys(p.teacher for p in plan if p.teacher is not None))


class Teacher(Protocol):
    """A frozen model that answers one micro-batch at a time; a collective under ZeRO-3.

    By default, a step asks for one micro-batch after the other, and nothing is prepared or freed.
    """

    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs for a micro-batch that the student's losses need, detached."""
        ...

    def answers(self, batches: Sequence[Batch]) -> Iterator[Outputs]:
        """Yield the outputs for every micro-batch of a step, in order."""
        return map(self, batches)

    def prefetch(self) -> None:
        """Prepare for the next step, which uses this teacher."""

    def evict(self) -> None:
        """Free device memory: the next step uses other teachers."""


Counts = Mapping[Unit, "Tensor"]
"""int64 scalars by unit: the counts of one rank, or their sum over all ranks."""

IGNORE = -100

ROUTE = "route"
"""Column with the teacher of a row: its name in rows of text, its number in encoded rows."""


class Targets(NamedTuple):
    """Positions that a model with two vocabularies predicts from its second vocabulary.

    positions: [N] int64 positions of the flattened [B * T]; at least one position.
    labels: [N] int64 numbers in the second vocabulary; -100 = no label.
    """

    positions: Tensor
    labels: Tensor


class Documents(NamedTuple):
    """The documents in the rows of causal_lm; padding at the end of a row is a document too.

    starts: [documents + 1] int32, the first position of each in the flattened [B * T], and B * T.
    longest: length of the longest document.
    """

    starts: Tensor
    longest: int


class Batch(NamedTuple):
    """One micro-batch of one rank, aligned so that no loss has to shift labels or logits.

    inputs: arguments of the model's forward (`input_ids` [B, T], `attention_mask`, …).
    labels: [B] class numbers, [B] scores (float, NaN = no label), [B, C] 1 for each label of a row
        and else 0 (float, NaN = labels unknown), or [B, T] tokens: the next tokens, already
        shifted, or the masked tokens; -100 = no label.
    valid: [B, T] bool, False at padding and in dummy rows, which only keep the ranks in step.
    rows: [B] int64 numbers of the training rows, on the CPU; -1 for dummy rows; None if rows are
        not numbered.
    targets: [N] int64 positions of the flattened [B * T] that a language model predicts: the
        labelled positions, and at least one position; None predicts all positions.
    documents: of the rows of causal_lm, packed or not; None for other tasks.
    others: by role, the same rows encoded for models with another tokenizer.
    second: what the model predicts from its second vocabulary; `labels` and `targets` are then
        those of its first vocabulary. In `input_ids`, numbers of the second vocabulary follow those
        of the first.
    is_rollout: whether a model has generated the texts during the run, the same on all ranks.
    teacher: the teacher that all rows name, and that alone teaches them; None if the rows name no
        teachers.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    valid: Tensor
    targets: Tensor | None = None
    rows: Tensor | None = None
    documents: Documents | None = None
    others: Mapping[str, Batch] | None = None
    second: Targets | None = None
    is_rollout: bool = False
    teacher: str | None = None

    def for_role(self, role: str | None) -> Batch:
        """Return the rows encoded for the model of a role; None: as they are."""
        return self.others.get(role, self) if self.others and role else self

    @property
    def multi_label(self) -> bool:
        """Whether a row has any number of labels, 0 or 1 by class."""
        return self.labels.dim() == 2 and self.labels.is_floating_point()

    @property
    def labels_tokens(self) -> bool:
        """Whether the labels are tokens [B, T], as those of a language model."""
        return self.labels.dim() == 2 and not self.labels.is_floating_point()

    @property
    def target_labels(self) -> Tensor:
        """The labels at `targets` [N]; all labels if `targets` is None."""
        return self.labels if self.targets is None else self.labels.flatten()[self.targets]


class LogitWarp(NamedTuple):
    """Function of the product z of a language model's output matrix: cap(scale * z).

    scale: factor of the product.
    softcap: c in cap(z) = c tanh(z / c); None: no cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Return the logits for a product of hidden states and output matrix, bias included."""
        logits = product * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Head(Protocol):
    """The output matrix of a language model, [V, D], which may be sharded until it is opened."""

    @property
    def warp(self) -> LogitWarp:
        """The factor and the cap between the product and the logits."""
        ...

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [V, D], bias [V] or None), readable while the head is open."""
        ...

    def open(self) -> AbstractContextManager[object]:
        """Return a context manager that keeps the whole weight readable."""
        ...


class AttentionVectors(NamedTuple):
    """Query, key and value vectors of one layer, with the heads side by side.

    queries: [B, T, heads * width], after rotary position embedding if the model family has it.
    keys: [B, T, key heads * width], likewise; there may be fewer key heads than query heads.
    values: [B, T, key heads * width].
    width: the width of one head.
    scale: factor of the attention scores; None: 1 / sqrt(width).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int
    scale: float | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> AttentionVectors:
        """Return the vectors with a function applied to queries, keys and values."""
        queries, keys, values = map(change, self[:3])
        return self._replace(queries=queries, keys=keys, values=values)


class TopK(NamedTuple):
    """The most likely next tokens of a language model.

    ids: [B, T, k] token numbers; negative at positions without an answer.
    logprobs: [B, T, k] natural logarithms of the model's softmax over the whole vocabulary.
    """

    ids: Tensor
    logprobs: Tensor


class Draws(NamedTuple):
    """Tokens drawn at random, with replacement, from a language model's next-token distribution.

    The share of a token in the draws is an unbiased estimate of its probability.

    ids: [B, T, n] different token numbers; negative in unused slots and at positions without an
        answer.
    logprobs: [B, T, n] natural logarithms of the shares, -inf in unused slots.
    """

    ids: Tensor
    logprobs: Tensor


class Routing(NamedTuple):
    """What the routers of a mixture of experts gave for the positions of a micro-batch.

    logits: [B * T, E] by router.
    chosen: experts per token.
    coefficient: factor of the loss that balances the experts.
    """

    logits: tuple[Tensor, ...]
    chosen: int
    coefficient: float


class Outputs(NamedTuple):
    """Outputs of one model for one micro-batch; outputs of a frozen teacher carry no gradient.

    logits: [B, C] of a classifier or regressor, None for a language model.
    hidden: [B, T, D] input of the LM head, or [N, D] if the batch has `targets`; None for a
        classifier.
    head: the LM head; `hidden` and `head` replace logits that are never formed.
    hidden_states: [B, T, D] by layer, 0 being the embedding output; None at layers that were not
        requested. Empty if no layer was.
    attention: by layer, numbered like hidden states; None at 0 and at layers that were not
        requested.
    kept: the part of a language model's answer that a cache keeps; replaces `hidden` and `head`.
    second: `hidden` and `head` at the positions that the batch predicts from a second vocabulary.
    routing: of a mixture of experts that learns; None if its experts are not balanced.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    hidden_states: tuple[Tensor | None, ...] = ()
    attention: tuple[AttentionVectors | None, ...] = ()
    kept: TopK | Draws | None = None
    second: Outputs | None = None
    routing: Routing | None = None

    def states(self, layer: int) -> Tensor:
        """Return the hidden states [B, T, D] of a layer; negative numbers count from the end."""
        of_layer = self.hidden_states[layer] if self.hidden_states else None
        if of_layer is None:
            raise TypeError(f"the hidden states of layer {layer} were not read")
        return of_layer

    def mapped(
        self,
        logits: Callable[[Tensor], Tensor],
        hidden: Callable[[Tensor], Tensor],
        states: Callable[[Tensor], Tensor],
    ) -> Outputs:
        """Return the outputs with functions applied to logits, `hidden`, and values of layers."""
        return self._replace(
            logits=None if self.logits is None else logits(self.logits),
            hidden=None if self.hidden is None else hidden(self.hidden),
            hidden_states=tuple(None if s is None else states(s) for s in self.hidden_states),
            attention=tuple(None if a is None else a.mapped(states) for a in self.attention),
        )

    def detached(self) -> Outputs:
        """Return the outputs detached from the graph."""
        detach = operator.methodcaller("detach")
        second = None if self.second is None else self.second.detached()
        return self.mapped(detach, detach, detach)._replace(second=second)


class Losses(NamedTuple):
    """Return value of the student's forward; a NamedTuple, so that ZeRO-3 finds the tensors.

    total: scalar with gradient, the sum over passes of scale * weight * sum / count * world.
    parts: detached scalars, sum / count without weight and world size, by the name
        `[learner/][view/]loss`.
    predictions: those of the first learner, if they were asked for.
    """

    total: Tensor
    parts: dict[str, Tensor]
    predictions: Predictions | None = None


def add_parts(sums: dict[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    """Add values to the sums of the same names."""
    for name, value in parts.items():
        sums[name] = sums[name] + value if name in sums else value


class Predictions(NamedTuple):
    """Return value of the student's or teacher's forward if no passes are given.

    outputs: [B, C] fp32 logits or scores; None for a language model.
    sums: for a language model `[3]` fp64: summed cross-entropy in nats, number of correct tokens,
        number of targets.
    """

    outputs: Tensor | None
    sums: Tensor | None


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a group of loss terms.

    student, teacher: the outputs of the model that learns and of the one that it learns from.
    weights: by the name of a term.
    per_unit: the factor of a sum over a unit: ranks / count of the unit in the step, on all ranks.
    kernels: the code path of megakd_kernels, named like `train.kernels`.
    scale: the scale of the pass that is computed.
    left_out: terms that the pass skips; within the objective, those that all passes skip.
    """

    student: Outputs
    teacher: Outputs | None
    batch: Batch
    weights: Mapping[str, float]
    per_unit: Mapping[Unit, Tensor]
    kernels: Kernels = "auto"
    scale: float = 1.0
    left_out: frozenset[str] = frozenset()

    @functools.cached_property
    def taught(self) -> Outputs:
        """The teacher's outputs, detached; in `teacher`, a teacher that learns has a gradient."""
        if self.teacher is None:
            raise TypeError("a term that compares with a teacher was planned without a teacher")
        return self.teacher.detached()


def first_positions(states: Tensor, valid: Tensor) -> Tensor:
    """Return [B, D] states at each row's first valid position, which left padding shifts."""
    place = valid.int().argmax(dim=1)
    return states.take_along_dim(place[:, None, None], dim=1).squeeze(1)


class BatchSource(Protocol):
    """The micro-batches of a stage, grouped by optimizer step.

    steps_per_epoch: steps that `num_train_epochs` and the log count as one epoch.
    waited_s: seconds that the loop has waited for batches.
    """

    steps_per_epoch: int
    waited_s: float

    def iterate(self, start: int, stop: int) -> Generator[Sequence[Batch], None, None]:
        """Yield this rank's micro-batches of each step from `start` up to, excluding, `stop`.

        Every rank has the same number of micro-batches in every step. The micro-batches of a step
        depend only on the config, the seed, the step and the state.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that a resumed run and the next window need, equal on every rank.

        The call may be a collective. By default, the rows of a step follow from the seed.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    def scalars(self) -> Mapping[str, float]:
        """Return values to log for the steps since the last call, the same on every rank."""
        return {}


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, without a host sync; the tensor itself if it is there."""
    # A copy from memory that is not pinned makes the host wait for the device.
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    # An expanded tensor cannot be pinned.
    return (tensor.contiguous().pin_memory() if pinned else tensor).to(device, non_blocking=True)


def teacher_number(name: str) -> int:
    """Return the number of a teacher in encoded rows: a hash of the name, from 1 to 2**48.

    The number does not depend on the other teachers, so that encoded rows can be used again with
    another list of teachers. Two of 1000 names have the same number with a probability of 2e-9.
    """
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


UnitCounter = Callable[[Batch], "Tensor"]
"""Function from a rank's micro-batch to an int64 scalar on its device, without a host sync."""


def is_of(source: Source | None, batch: Batch) -> bool:
    """Return whether the texts of a micro-batch are of a source; None: of any."""
    return source is None or batch.is_rollout == (source == "rollouts")


def second_targets(batch: Batch) -> Batch | None:
    """Return the targets in the second vocabulary as a batch that predicts all its positions.

    The result is None if a batch has no such targets.
    """
    if batch.second is None:
        return None
    labels = batch.second.labels
    return batch._replace(labels=labels, targets=None, second=None)


def has_label(labels: Tensor) -> Tensor:
    """Return a bool per element: whether it is a label, and not -100 or NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE


def _targets(batch: Batch) -> Tensor:
    labels = batch.labels[:, 0] if batch.multi_label else batch.labels
    count, second = has_label(labels).sum(), batch.second
    return count if second is None else count + has_label(second.labels).sum()


def _targets_on(source: Source, batch: Batch) -> Tensor:
    return has_label(batch.labels).sum() * is_of(source, batch)


COUNTERS: Mapping[Unit, UnitCounter] = MappingProxyType(
    {
        "examples": lambda batch: batch.valid.any(dim=1).sum(),
        "targets": _targets,
        "tokens": lambda batch: batch.valid.sum(),
    }
)
"""The units of every run. A loss group may declare more in its `counters`."""

SOURCE_UNITS: Mapping[Source, Unit] = MappingProxyType(
    {"rollouts": "rollout_targets", "data": "data_targets"}
)


def source_counters(source: Source | None) -> Mapping[Unit, UnitCounter]:
    """Return the counter of the labelled positions of a source; none without: `COUNTERS` has it."""
    return {} if source is None else {SOURCE_UNITS[source]: functools.partial(_targets_on, source)}


def count_units(
    batches: Sequence[Batch], counters: Mapping[Unit, UnitCounter] = COUNTERS
) -> Counts:
    """Return int64 scalars by unit: the sums over the micro-batches of one rank in a step."""
    return {
        unit: functools.reduce(operator.add, map(count, batches))
        for unit, count in counters.items()
    }
