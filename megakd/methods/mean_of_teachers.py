"""All teachers of a pool at every step: the student learns their mean.

A baseline of SKDBERT. The mean of the cross-entropies with each teacher's soft targets has the
gradient of the cross-entropy with the mean of their probabilities, so no probabilities are mixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.methods import MethodOptions
from megakd.contract.terms import STRICT
from megakd.methods.pools import soft_objective, taught_by_all

if TYPE_CHECKING:
    from megakd.contract.lab import Lab
    from megakd.contract.stage import StageResult


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MeanOfTeachersConfig(MethodOptions):
    """Every teacher of the pool runs at every step, and all count alike."""

    name: Literal["mean_of_teachers"]


def run(config: MeanOfTeachersConfig, lab: Lab) -> StageResult:
    """One pass per teacher over one forward of the student."""
    del config
    names = lab.teachers()
    return taught_by_all(lab, names, soft_objective(lab), share=1 / len(names), how="mean")
