"""What a run reports, and what its method adds to that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Report = dict[str, Any]
"""The content of report.json: one flat mapping, see docs/report.md.

A number of a model has the key `NAME.NUMBER`, such as `student.accuracy`; `teacher` is the largest
teacher. Lists hold names, texts, or rows such as those of the stages.
"""


Row = dict[str, Any]
"""A row of a list of the report, such as a candidate of a trial or a label's scores."""


class Assistant(NamedTuple):
    """A teacher assistant: a model between the teacher and the student in size.

    sparsity: share of the teacher's units that the assistant lacks; None if it was not cut.
    """

    name: str
    sparsity: float | None
    folder: Path


@dataclass
class MethodRecord:
    """Results that a method adds to the report.

    candidates: what the method compared; all are scored in the same evaluation.
    asked: the size that the student was cut to: `what` (parameters, flops, speedup) and `value`.
    layers: the layers of the teacher that the student is made of; None: all, or none.
    pool: how often each of several teachers taught: `distribution`, and rows of `teachers`.
    pruning: the student of a method that prunes during training, at each evaluation.
    dev_scores: by name, the scores by which teachers were ranked.
    """

    candidates: list[Row] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    asked: Row | None = None
    layers: tuple[int, ...] | None = None
    pool: Row | None = None
    pruning: list[Row] = field(default_factory=list)
    dev_scores: dict[str, float] = field(default_factory=dict)
