"""Labels alone for a student that is cut out of the teacher, as a method plug-in of the benchmark.

The control of MiniDisc and `direct`: the same cut learns from the rows with a label, without soft
targets and hidden states. `finetune` does the same for a student that is not cut.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megakd.config.terms import STRICT
from megakd.methods.assistants import SparsityOptions, ranked_teacher, view_of
from megakd.stage import Stage, StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Labels(SparsityOptions):
    """The target is cut out of the sorted teacher and learns from the labels."""


def run(config: Labels, lab: Lab) -> StageResult:
    _, ranked = ranked_teacher(config, lab)
    view = view_of(config, lab, ranked, config.target_sparsity)
    start = lab.work.cut(ranked.source, view, "cut")
    objective = lab.hard_terms()
    return lab.train(Stage(name="student", objective=objective, start=start))
