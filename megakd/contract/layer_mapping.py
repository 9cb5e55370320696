"""The layers of two models that a loss compares, and the parts that it cuts vectors into."""

from __future__ import annotations

import math

from megakd.contract.terms import (
    ATTENTION_TERMS,
    AttentionTerm,
    EmbeddingMse,
    LayerMapping,
    Relation,
    RelationKl,
    StateTerm,
)
from megakd.contract.views import Heads, Shape
from megakd.errors import TeacherError

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


def check_heads(term: AttentionTerm, student: Shape, teacher: Shape) -> None:
    """Raise TeacherError if a loss on attention cannot compare the heads of two models."""
    if isinstance(term, RelationKl):
        relation_heads(term, student, teacher)
        return
    ours = _heads(term, student, "student").queries
    theirs = _heads(term, teacher, "teacher").queries
    if ours != theirs:
        raise TeacherError(
            f"attention_mse: the teacher has {theirs} attention heads, the student {ours}, and "
            "attention_mse compares head by head; use relation_kl, which supports different "
            "numbers of heads"
        )


def relation_heads(term: RelationKl, student: Shape, teacher: Shape) -> int:
    """Return the number of parts into which the vectors of both models are cut.

    Raises:
        TeacherError: the number does not divide a width.
    """
    ours, theirs = _heads(term, student, "student"), _heads(term, teacher, "teacher")
    count = term.relation_heads or theirs.queries
    widths = {
        f"{model}'s {relation.replace('query_key', 'query')} vectors": _width(relation, heads)
        for relation in term.relations
        for model, heads in (("student", ours), ("teacher", theirs))
    }
    for vectors, width in widths.items():
        if width % count:
            common = math.gcd(*widths.values())
            fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            given = "" if term.relation_heads else " (null: the teacher's attention heads)"
            raise TeacherError(
                f"relation_kl.relation_heads {count}{given} does not divide the {vectors}, which "
                f"are {width} wide; use a number that divides all of the vectors: {fitting}"
            )
    return count


def _width(relation: Relation, heads: Heads) -> int:
    return heads.width * (heads.keys if relation in {"key", "value"} else heads.queries)


def _heads(term: AttentionTerm, model: Shape, role: str) -> Heads:
    if model.heads is None:
        raise TeacherError(
            f"{term.loss}: megakd does not support the attention of the {role}; remove the term, "
            f"or use another model as {role}"
        )
    return model.heads
