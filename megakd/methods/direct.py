"""Direct distillation into a student that is cut out of the teacher, without an assistant."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megakd.config.terms import STRICT
from megakd.methods.assistants import SparsityOptions, leg, ranked_teacher, view_of
from megakd.stage import StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class DirectConfig(SparsityOptions):
    """The target is cut out of the sorted teacher and distilled from it."""


def run(config: DirectConfig, lab: Lab) -> StageResult:
    """Cut the target out of the sorted teacher and distil it."""
    teacher, ranked = ranked_teacher(config, lab)
    view = view_of(config, lab, ranked, config.target_sparsity)
    start = lab.work.cut(ranked.source, view, "cut")
    return lab.train(leg(lab, "student", teacher=teacher, start=start))
