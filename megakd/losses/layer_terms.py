"""Loss terms on hidden states, attention and relations between tokens.

All terms are counted in tokens unless their class states otherwise, and averaged over mapped
layers. The number of padded keys does not change a term.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import megakd_kernels
from megakd.config.task import Kernels
from megakd.config.terms import (
    ATTENTION_TERMS,
    AttentionMse,
    AttentionTerm,
    HiddenCosine,
    Pairs,
    Relation,
    RelationFsp,
    RelationKl,
    StateTerm,
    Unit,
)
from megakd.data.batch import AttentionVectors, Batch, LossInputs, Outputs, first_positions
from megakd.losses.targets import Evaluated, TermGroup
from megakd.models.elastic import weights_in_view
from megakd.models.outputs import Needs
from megakd_kernels.formed import refuse_second_derivative

MATRIX_ELEMENTS = 1 << 24
"""Most elements of the [D, D] FSP matrices in memory; one row's matrix may be larger."""


class LayerTerm(TermGroup):
    """Base class of terms over mapped layers, counted in tokens unless a subclass sets `units`."""

    def __init__(self, term: StateTerm | AttentionTerm, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = pairs
        self.units: Mapping[str, Unit] = {term.loss: "tokens"}
        add = Needs().with_attention if isinstance(term, ATTENTION_TERMS) else Needs().with_hidden
        self.needs = add(*(student for student, _ in pairs))

    def layers(self, inputs: LossInputs) -> list[Tensor]:
        """Return the sum over the unit of every pair of layers."""
        raise TypeError(f"{type(self).__name__} does not implement layers()")

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the mean over layers of each layer's sum over the unit."""
        return self.of_one_term(inputs, torch.stack(self.layers(inputs)).mean())


class Projections(nn.ModuleList):
    """Linear projections, one per mapped layer, between the widths of student and teacher.

    With `is_identity`, they also exist for equal widths, start as the identity, and do not decay.
    """

    def __init__(
        self, layers: int, student: int, teacher: int, *, is_identity: bool = False
    ) -> None:
        count = layers if is_identity or student != teacher else 0
        super().__init__(nn.Linear(student, teacher, bias=False) for _ in range(count))
        self.decays = not is_identity
        for linear in self if is_identity else ():
            nn.init.eye_(cast("nn.Linear", linear).weight)

    def weight(self, index: int) -> Tensor | None:
        """Return [teacher, student] of the mapped layer number `index`; None if there is none.

        If the student runs as a cut of itself, the matrix has the student's kept columns.
        """
        return weights_in_view(self[index])[0] if len(self) else None


class FspMatrices(LayerTerm):
    """`relation_fsp`: the mean over flows, each from one mapped layer to the next.

    Counted in rows. If the widths differ, a matrix per mapped layer projects the student's states.
    The matrices are learned and kept like the projections of `HiddenStates`.
    """

    def __init__(self, term: RelationFsp, pairs: Pairs, widths: tuple[int, int]) -> None:
        super().__init__(term, pairs)
        self.units = {term.loss: "examples"}
        self.projections = Projections(len(pairs), *widths)

    def layers(self, inputs: LossInputs) -> list[Tensor]:
        valid, ours = inputs.batch.valid, list[Tensor]()
        # A state is cast once for the two flows that use it, so its gradients are added in fp32.
        for index, (student, _) in enumerate(self.pairs):
            state = counted(inputs.student.states(student), valid)
            weight = self.projections.weight(index)
            ours.append(
                state if weight is None else functional.linear(state, weight.to(state.dtype))
            )
        theirs = [counted(inputs.taught.states(teacher), valid) for _, teacher in self.pairs]
        return flow_errors(ours, theirs, lengths=valid.sum(1), kernels=inputs.kernels)


class HiddenStates(LayerTerm):
    """`hidden_mse`, `hidden_cosine`, `embedding_mse`: terms on hidden states of mapped layers.

    Errors are averaged over the width. If the widths differ, or the term says so, projections are
    learned with the student, kept for resuming, and dropped at export.
    """

    def __init__(self, term: StateTerm, pairs: Pairs, widths: tuple[int, int]) -> None:
        super().__init__(term, pairs)
        self.loss = (
            megakd_kernels.hidden_cosine_projection_loss
            if isinstance(term, HiddenCosine)
            else megakd_kernels.hidden_mse_projection_loss
        )
        is_identity = getattr(term, "projection", "learned") == "identity"
        self.projections = Projections(len(pairs), *widths, is_identity=is_identity)
        self.first_alone = getattr(term, "positions", "all") == "first"
        if self.first_alone:
            self.units = {term.loss: "examples"}

    def layers(self, inputs: LossInputs) -> list[Tensor]:
        losses, batch = [], inputs.batch
        valid = batch.valid.any(1) if self.first_alone else batch.valid
        for index, (student, teacher) in enumerate(self.pairs):
            ours, theirs = inputs.student.states(student), inputs.taught.states(teacher)
            if self.first_alone:
                ours, theirs = (first_positions(states, batch.valid) for states in (ours, theirs))
            weight = self.projections.weight(index)
            losses.append(self.loss(ours, weight, theirs, valid=valid, impl=inputs.kernels))
        return losses


class AttentionMatrices(LayerTerm):
    """`attention_mse`: the mean over heads and, per query, over the visible keys.

    The scores are recomputed from queries and keys after position embedding. Models therefore do
    not need eager attention, which is the only implementation that returns its scores.
    """

    def __init__(self, term: AttentionMse, pairs: Pairs, *, causal: bool) -> None:
        super().__init__(term, pairs)
        self.fit, self.causal = term.fit, causal

    def layers(self, inputs: LossInputs) -> list[Tensor]:
        losses, valid = [], inputs.batch.valid
        seen = visible_keys(inputs.batch, causal=self.causal)[:, None]  # [B, 1, T, T]
        for student, teacher in self.pairs:
            ours = self._matrix(_vectors(inputs.student, student), valid, seen)
            theirs = self._matrix(_vectors(inputs.taught, teacher), valid, seen)
            error = (ours - theirs).where(seen, torch.zeros_like(ours))
            rows = error.square().sum(-1) / seen.sum(-1).clamp(min=1)  # [B, heads, T]
            losses.append(rows.mean(1).sum())
        return losses

    def _matrix(self, vectors: AttentionVectors, valid: Tensor, seen: Tensor) -> Tensor:
        """Return attention scores or probabilities, [B, heads, T, T] fp32."""
        queries = _heads(vectors.queries, valid, vectors.width)
        keys = _heads(vectors.keys, valid, vectors.width)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scale = vectors.width**-0.5 if vectors.scale is None else vectors.scale
        scores = queries @ keys.mT * scale
        if self.fit == "scores":
            return scores
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)


class Relations(LayerTerm):
    """`relation_kl`: the mean over relation heads and the chosen relations.

    The vectors of all heads are concatenated and cut into the same number of parts for both
    models, so that widths, heads and key heads may differ.
    """

    def __init__(self, term: RelationKl, pairs: Pairs, *, heads: int, causal: bool) -> None:
        super().__init__(term, pairs)
        self.relations, self.relation_heads, self.causal = term.relations, heads, causal

    def layers(self, inputs: LossInputs) -> list[Tensor]:
        """Return KL(teacher's relation || student's) in nats, summed over the visible keys."""
        loss = functools.partial(
            megakd_kernels.relation_kl_loss,
            heads=self.relation_heads,
            valid=inputs.batch.valid,
            causal=self.causal,
            segments=documents(inputs.batch) if self.causal else None,
            impl=inputs.kernels,
        )
        losses = []
        for student, teacher in self.pairs:
            ours, theirs = _vectors(inputs.student, student), _vectors(inputs.taught, teacher)
            values = []
            for relation in self.relations:
                our_queries, our_keys = _sides(relation, ours)
                their_queries, their_keys = _sides(relation, theirs)
                values.append(loss(our_queries, their_queries, our_keys, their_keys))
            losses.append(torch.stack(values).mean())
        return losses


def _sides(relation: Relation, vectors: AttentionVectors) -> tuple[Tensor, Tensor | None]:
    """Return the two sides of a relation; None as second side relates the vectors to themselves."""
    alone = {"query": vectors.queries, "key": vectors.keys, "value": vectors.values}
    if relation in alone:
        return alone[relation], None
    keys = vectors.keys.unflatten(-1, (-1, vectors.width))
    groups = vectors.queries.shape[-1] // vectors.keys.shape[-1]
    return vectors.queries, keys.repeat_interleave(groups, dim=2).flatten(2)


def _vectors(outputs: Outputs, layer: int) -> AttentionVectors:
    vectors = outputs.attention[layer] if outputs.attention else None
    if vectors is None:
        raise TypeError(f"the attention of layer {layer} was not read")
    return vectors


def _heads(vectors: Tensor, valid: Tensor, width: int) -> Tensor:
    """Return [B, heads, T, width] fp32, zero at padding: NaN times a gradient of 0 is NaN."""
    return counted(vectors, valid).unflatten(-1, (-1, width)).transpose(1, 2)


def visible_keys(batch: Batch, *, causal: bool) -> Tensor:
    """Return [B, T, T] bool: True where a query (dim 1) sees a key (dim 2); False at padding."""
    seen = batch.valid[:, :, None] & batch.valid[:, None, :]
    if not causal:
        return seen
    document = documents(batch)
    if document is not None:
        seen = seen & (document[:, :, None] == document[:, None, :])
    return seen.tril()


def documents(batch: Batch) -> Tensor | None:
    """Return [B, T] numbers of packed documents; None if nothing is packed.

    A document begins where positions restart. The decoders of transformers separate documents by
    the same rule.
    """
    positions = batch.inputs.get("position_ids")
    if positions is None:
        return None
    steps = positions.diff(dim=1, prepend=positions[:, :1] - 1)
    return (steps != 1).cumsum(dim=1)


def flow_errors(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    lengths: Tensor,
    kernels: Kernels = "auto",
) -> list[Tensor]:
    """Return squared errors between FSP matrices G = F^T F' / n (Yim et al. 2017, equation 1).

    Each layer and the next layer form one flow; n is the number of valid positions of a row. The
    matrices of all rows are never in memory at once, and no matrix is kept for the backward: the
    gradients with respect to the states are computed in the forward.

    Args:
        student: states of the student's mapped layers, at least two, each [B, T, D], 0 at padding.
        teacher: states of the teacher's mapped layers, as many; they carry no gradient.
        lengths: [B] numbers of valid positions.
        kernels: `reference` forms all matrices and leaves the gradient to autograd.

    Returns:
        One scalar per flow, fp32 (fp64 if an input is fp64): per row the mean over the [D, D]
        entries of the squared difference, summed over the rows.
    """
    lengths, flows = lengths.clamp(min=1), zip(pairwise(student), pairwise(teacher), strict=True)
    flows = [(*ours, *theirs) for ours, theirs in flows]
    if kernels == "reference":
        return [_apart(states, lengths).square().mean((1, 2)).sum() for states in flows]
    return [_FlowError.apply(*states, lengths) for states in flows]  # pyright: ignore[reportReturnType]


def counted(state: Tensor, valid: Tensor) -> Tensor:
    """Return [B, T, D] in at least fp32, zero where not valid: NaN times a zero slope is NaN."""
    wide = state if state.dtype == torch.float64 else state.float()
    return wide.masked_fill(~valid[..., None], 0)


def _apart(states: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Return [B, D, D]: the student's matrices minus the teacher's."""
    first, second, their_first, their_second = states
    return (first.mT @ second - their_first.mT @ their_second) / lengths[:, None, None]


class _FlowError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        *states, lengths = inputs
        first, second = states[:2]
        slopes = [torch.empty_like(first), torch.empty_like(second)]
        total = first.new_zeros(())
        entries = first.shape[-1] ** 2
        together = max(1, MATRIX_ELEMENTS // entries)
        for start in range(0, len(first), together):
            part = slice(start, start + together)
            apart = _apart([state[part] for state in states], lengths[part])  # [b, D, D]
            total = total + apart.square().sum() / entries
            slope = apart * (2 / entries) / lengths[part, None, None]
            slopes[0][part] = second[part] @ slope.mT
            slopes[1][part] = first[part] @ slope
        ctx.save_for_backward(*slopes)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        first, second = ctx.saved_tensors
        return first * upstream, second * upstream, None, None, None
