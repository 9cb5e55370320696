"""Comparisons of the page whose arms are trained by benchmarks of their own, such as `shrink`.

`evidence --collect` stores their cells from the reports of these benchmarks (`collect.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from evidence.comparisons import COMPARISONS, Comparison
from evidence.settings import SETTINGS


@dataclass(frozen=True, kw_only=True)
class Collected(Comparison):
    """A comparison whose cells come from another benchmark.

    sources: titles of its settings. runs: name of an arm's run, if it is not the arm's. baselines:
        the run whose baseline is an arm, and its name there. no_teacher: arms without a teacher.
    """

    arms: tuple[str, ...]
    sources: Mapping[str, str]
    runs: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    no_teacher: tuple[str, ...] = ("alone", "labels")


COLLECTED = {
    "mixed_vocabulary": Collected(
        title="Mixed vocabularies: a student with a small vocabulary of its own",
        page="mixed-vocabulary.md",
        # Version 1 of the paper in full, and the method's default: the teacher reads both
        # vocabularies, and shared projections compare its weights with the student's. `dual` leaves
        # the projections out, `up` projects the other way, `version_2` is the later publication.
        reference="down",
        plain="patient_kd",
        labels="alone",
        arms=("down", "up", "dual", "version_2", "patient_kd", "alone"),
        baselines={"patient_kd": ("alone", "patient_kd")},
        sources={
            "books": "masked words of eleven novels",
            "pydocs": "masked words of Python docstrings, which the teacher has never seen",
            "sst2": "SST-2, 8000 labels, after 500 steps on the books",
            "banking77": "banking77, all labels, after 500 steps on the books",
        },
    ),
    "homodistil": Collected(
        title="HomoDistil: the student is pruned while it is distilled",
        page="homodistil.md",
        reference="homodistil",
        # Plain distillation and its control start from the teacher, cut at once to the final size.
        plain="one_shot",
        labels="one_shot_alone",
        # Three arms choose units by another score than the sensitivity.
        arms=("homodistil", "early", "one_shot", "platon", "magnitude", "random_scores",
              "one_shot_alone", "random", "alone"),
        # The cells of `homodistil` have the later end of the pruning, those of `early` the default.
        runs={"homodistil": "late", "early": "homodistil"},
        baselines={name: ("homodistil", name) for name in ("random", "alone")},
        no_teacher=("alone", "one_shot_alone"),
        sources={
            "stories260K": "a pretrained Llama of 260,032 weights to half of its width, TinyStories"
        },
    ),
    "on_policy": Collected(
        title="On-policy distillation: the student learns from its own texts",
        page="on-policy.md",
        reference="on_policy",
        plain="off_policy",
        labels="labels",
        arms=("on_policy", "mixed", "off_policy", "labels"),
        sources={"arithmetic": "sums of eight digits in steps"},
    ),
    "shrink": Collected(
        title="Shrink: a decoder is cut to a size in one trial",
        page="shrink.md",
        reference="shrink",
        # The student's shape from random weights, distilled for as many steps.
        plain="random weights",
        labels=None,
        arms=("shrink", *(f"{layers} layers alone" for layers in (6, 5, 4, 3, 2)),
              "random weights"),
        runs={f"{layers} layers alone": f"layers-{layers}" for layers in (6, 5, 4, 3, 2)},
        baselines={"random weights": ("shrink", "random")},
        sources={
            "stories260K": "a pretrained Llama of 260,032 weights to 0.4 of its weights, "
            "TinyStories",
            "books": "a Llama of 1,473,152 weights to 0.4 of its weights, eleven novels",
        },
    ),
}  # fmt: skip

ALL_COMPARISONS: Mapping[str, Comparison] = {**COMPARISONS, **COLLECTED}


def titles_of(comparison: str) -> Mapping[str, str]:
    if comparison in COLLECTED:
        return COLLECTED[comparison].sources
    return {name: setting.title for name, setting in SETTINGS.items()}
