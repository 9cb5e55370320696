"""Loss terms on hidden states, attention and relations between tokens.

All terms are counted in tokens unless their class states otherwise, and averaged over mapped
layers. The number of padded keys does not change a term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

import megakd_kernels
from megakd.contract.batch import (
    AttentionVectors,
    Batch,
    Knowledge,
    LossInputs,
    Unit,
    first_positions,
)
from megakd.contract.layer_mapping import Pairs
from megakd.contract.terms import (
    AttentionMse,
    HiddenCosine,
    Relation,
    RelationFsp,
    RelationKl,
    StateTerm,
)
from megakd.losses.fsp import counted, flow_errors
from megakd.losses.targets import Evaluated, TermGroup
from megakd.models.elastic_modules import weights_in_view
from megakd.models.knowledge import Needs


class LayerTerm(TermGroup):
    """Base class of terms over mapped layers, counted in tokens unless a subclass sets `units`."""

    needs_teacher = True

    def __init__(self, name: str, pairs: Pairs) -> None:
        super().__init__()
        self.name, self.pairs = name, pairs
        self.units: Mapping[str, Unit] = {name: "tokens"}

    def layer(self, reading: LossInputs, index: int) -> Tensor:
        """Return the sum over tokens of the pair number `index`."""
        raise TypeError(f"{type(self).__name__} does not implement layer()")

    def layers(self, reading: LossInputs) -> Sequence[Tensor]:
        return [self.layer(reading, index) for index in range(len(self.pairs))]

    def forward(self, reading: LossInputs) -> Evaluated:
        """Return the mean over layers of each layer's sum over the unit."""
        total = torch.stack(list(self.layers(reading))).mean()
        scale = reading.weights[self.name] * reading.per_unit[self.units[self.name]]
        return Evaluated(total * scale, {self.name: total.detach()})


class Projections(nn.ModuleList):
    """Linear projections, one per mapped layer, between the widths of student and teacher.

    With `is_identity`, they also exist for equal widths, and start as the identity.
    """

    def __init__(
        self, layers: int, student: int, teacher: int, *, is_identity: bool = False
    ) -> None:
        count = layers if is_identity or student != teacher else 0
        super().__init__(nn.Linear(student, teacher, bias=False) for _ in range(count))
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
        super().__init__(term.loss, pairs)
        self.needs = Needs().with_hidden(*(student for student, _ in pairs))
        self.units = {term.loss: "examples"}
        self.projections = Projections(len(pairs), *widths)

    def layers(self, reading: LossInputs) -> Sequence[Tensor]:
        weights = [self.projections.weight(index) for index in range(len(self.projections))]
        return flow_errors(
            [reading.student.states(student) for student, _ in self.pairs],
            [reading.taught.states(teacher) for _, teacher in self.pairs],
            valid=reading.batch.valid,
            projections=cast("list[Tensor]", weights) or None,
            kernels=reading.kernels,
        )


class HiddenStates(LayerTerm):
    """`hidden_mse`, `hidden_cosine`, `embedding_mse`: terms on hidden states of mapped layers.

    Errors are averaged over the width. If the widths differ, or the term says so, projections are
    learned with the student, kept for resuming, and dropped at export.
    """

    def __init__(self, term: StateTerm, pairs: Pairs, widths: tuple[int, int]) -> None:
        super().__init__(term.loss, pairs)
        self.needs = Needs().with_hidden(*(student for student, _ in pairs))
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

    def layer(self, reading: LossInputs, index: int) -> Tensor:
        student, teacher = self.pairs[index]
        valid = reading.batch.valid
        ours = reading.student.states(student)
        theirs = reading.taught.states(teacher)
        if self.first_alone:
            ours, theirs = first_positions(ours, valid), first_positions(theirs, valid)
            valid = valid.any(1)
        return self.loss(
            ours, self.projections.weight(index), theirs, valid=valid, impl=reading.kernels
        )


class AttentionMatrices(LayerTerm):
    """`attention_mse`: the mean over heads and, per query, over the visible keys.

    The scores are recomputed from queries and keys after position embedding. Models therefore do
    not need eager attention, which is the only implementation that returns its scores.
    """

    def __init__(self, term: AttentionMse, pairs: Pairs, *, causal: bool) -> None:
        super().__init__(term.loss, pairs)
        self.fit, self.causal = term.fit, causal
        self.needs = Needs(attention_layers=tuple(dict.fromkeys(s for s, _ in pairs)))

    def layer(self, reading: LossInputs, index: int) -> Tensor:
        student, teacher = self.pairs[index]
        seen = visible_keys(reading.batch, causal=self.causal)[:, None]  # [B, 1, T, T]
        ours = self._matrix(_vectors(reading.student, student), reading.batch.valid, seen)
        theirs = self._matrix(_vectors(reading.taught, teacher), reading.batch.valid, seen)
        error = (ours - theirs).where(seen, torch.zeros_like(ours))
        rows = error.square().sum(-1) / seen.sum(-1).clamp(min=1)  # [B, heads, T]
        return rows.mean(1).sum()

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
        super().__init__(term.loss, pairs)
        self.relations, self.relation_heads, self.causal = term.relations, heads, causal
        self.needs = Needs(attention_layers=tuple(dict.fromkeys(s for s, _ in pairs)))

    def layer(self, reading: LossInputs, index: int) -> Tensor:
        """Return KL(teacher's relation || student's) in nats, summed over the visible keys."""
        student, teacher = self.pairs[index]
        ours, theirs = _vectors(reading.student, student), _vectors(reading.taught, teacher)
        segments = documents(reading.batch) if self.causal else None
        values = []
        for relation in self.relations:
            our_queries, our_keys = _sides(relation, ours)
            their_queries, their_keys = _sides(relation, theirs)
            value = megakd_kernels.relation_kl_loss(
                our_queries,
                their_queries,
                our_keys,
                their_keys,
                heads=self.relation_heads,
                valid=reading.batch.valid,
                causal=self.causal,
                segments=segments,
                impl=reading.kernels,
            )
            values.append(value)
        return torch.stack(values).mean()


def _sides(relation: Relation, vectors: AttentionVectors) -> tuple[Tensor, Tensor | None]:
    """Return the two sides of a relation; None as second side relates the vectors to themselves."""
    alone = {"query": vectors.queries, "key": vectors.keys, "value": vectors.values}
    if relation in alone:
        return alone[relation], None
    keys = vectors.keys.unflatten(-1, (-1, vectors.width))
    groups = vectors.queries.shape[-1] // vectors.keys.shape[-1]
    return vectors.queries, keys.repeat_interleave(groups, dim=2).flatten(2)


def _vectors(knowledge: Knowledge, layer: int) -> AttentionVectors:
    vectors = knowledge.attention[layer] if knowledge.attention else None
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
