"""MT-BERT: all teachers run at every step, and teachers that miss a row's label count less.

A baseline of SKDBERT, as simplified by the authors of SKDBERT (Wu et al. 2021; Ding et al. 2023,
supplement): the sum over teachers of CE(z_i / T, z_s / T) / (1 + CE(y, z_i)), row by row.

Differs from the paper: for a row without a label, every teacher has weight 1, as if it were right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab
from megakd.contract.options import MethodOptions
from megakd.contract.stage import StageResult
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.contract.terms import STRICT, compares
from megakd.methods.pools import all_teachers, taught_by_all


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MtBertConfig(MethodOptions):
    """Every teacher of the pool runs at every step; a wrong prediction counts less in its row."""

    learns_adapters: ClassVar[bool] = True
    name: Literal["mt_bert"]

    def problems(self, config: Any) -> Iterator[str]:
        """Yield a line if the rows have no label of their own, by which teachers could count."""
        if config.task.type in LANGUAGE_TASKS:
            yield (
                f'method "mt_bert" divides a row by the loss of the teacher on its label, and the '
                f"rows of task.type {config.task.type} have none; use mean_of_teachers"
            )


def run(config: MtBertConfig, lab: Lab) -> StageResult:
    """Train with one pass per teacher and a single forward of the student per micro-batch."""
    del config
    names = all_teachers(lab)
    trusting = (dataclasses.replace(term, row_weight="teacher_loss") for term in lab.soft_terms())
    # Passes add up over teachers, and labels count once.
    objective = tuple(
        term if compares(term) else dataclasses.replace(term, weight=term.weight / len(names))
        for term in lab.config.objective or trusting
    )
    return taught_by_all(lab, names, objective, share=1.0, how="teacher_loss")
