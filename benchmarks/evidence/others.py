"""Comparisons of the evidence whose arms are trained by benchmarks of their own.

`evidence --collect` reads the reports of these benchmarks (`collect.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evidence.comparisons import COMPARISONS, FIVE, THREE, Comparison
from evidence.settings import SETTINGS


@dataclass(frozen=True, kw_only=True)
class Source:
    """A setting of a comparison that is collected.

    title: for the page. words: options of the benchmark's command, without data folder and seeds.
    start: how the students are initialised. metric: what is scored.
    overrides: of the run config, in all runs of the setting.
    benchmark: None: that of the comparison. seeds: of the runs.
    """

    title: str
    words: tuple[str, ...]
    start: str
    metric: str
    lower_is_better: bool = False
    overrides: tuple[str, ...] = ()
    benchmark: str | None = None
    seeds: tuple[int, ...] = THREE

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of the benchmark's command with the seeds."""
        return (*self.words, "--seeds", ",".join(map(str, self.seeds)))


@dataclass(frozen=True, kw_only=True)
class Collected(Comparison):
    """A comparison whose cells come from the runs of another benchmark.

    benchmark: name of the benchmark. words: options of its command. arms: the name in the
        benchmark, by arm. sources: by setting.
    """

    benchmark: str
    words: tuple[str, ...] = ()
    arms: Mapping[str, str]
    sources: Mapping[str, Source]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_DATA = ("--data", "FOLDER")
_MIXED = ("--arms", "alone,dual,down,up,version_2", "--steps", "500", "--teacher-steps", "250")
_MIXED_TASKS = ("--task-steps", "600", "--wide-task-rate", "5e-4")
_MIXED_START = "random weights; `version_2` starts with the embeddings that its teacher learned"
_FP32 = ("train.bf16=false",)
"""Written out by the version that made the runs; null, as the benchmark has it now, is the same."""


def _mixed_task(name: str, title: str) -> Source:
    return Source(
        title=f"{title}, after 500 steps on the books",
        words=(*_MIXED, *_MIXED_TASKS, "--tasks", name),
        start=_MIXED_START,
        metric="accuracy",
        overrides=_FP32,
    )


COLLECTED = {
    "mixed_vocabulary": Collected(
        title="Mixed vocabularies: a student with a small vocabulary of its own",
        page="mixed-vocabulary.md",
        benchmark="methods.mixed_vocabulary",
        words=_DATA,
        # Version 1 of the paper in full, and the method's default: the teacher reads both
        # vocabularies, and shared projections compare its weights with the student's. `dual` leaves
        # the projections out, `up` projects the other way, `version_2` is the later publication.
        reference="down",
        plain="patient_kd",
        labels="alone",
        arms=_same("down", "up", "dual", "version_2", "patient_kd", "alone"),
        sources={
            "books": Source(
                title="masked words of eleven novels",
                words=(*_MIXED, *_MIXED_TASKS),
                start=_MIXED_START,
                metric="held-out nats per character",
                lower_is_better=True,
                overrides=_FP32,
            ),
            "pydocs": Source(
                title="masked words of Python docstrings, which the teacher has never seen",
                words=("--text", "pydocs", *_MIXED),
                start=_MIXED_START,
                metric="nats per character on the test rows",
                lower_is_better=True,
            ),
            "sst2": _mixed_task("sst2", "SST-2, 8000 labels"),
            "banking77": _mixed_task("banking77", "banking77, all labels"),
        },
    ),
    "homodistil": Collected(
        title="HomoDistil: the student is pruned while it is distilled",
        page="homodistil.md",
        benchmark="methods.homodistil",
        words=_DATA,
        reference="homodistil",
        # Plain distillation and its control start from the teacher, cut at once to the final size.
        plain="one_shot",
        labels="one_shot_alone",
        # Three arms choose units by another score than the sensitivity.
        arms=_same("homodistil", "early", "one_shot", "platon", "magnitude", "random_scores")
        | _same("one_shot_alone", "random", "alone"),
        sources={
            "stories260K": Source(
                title="a pretrained Llama of 260,032 weights to half of its width, TinyStories",
                words=("--steps", "1600", "--equal-cost"),
                benchmark="methods.homodistil_decoder",
                start="the whole teacher; `random` and `alone` start from random weights",
                metric="held-out loss in nats per token",
                lower_is_better=True,
            ),
            "novels": Source(
                title="masked tokens of eleven novels",
                words=("--tasks", "sst2"),
                start="the whole teacher; `random` and `alone` start from random weights",
                metric="held-out loss in nats per masked token",
                lower_is_better=True,
            ),
        },
    ),
    "on_policy": Collected(
        title="On-policy distillation: the student learns from its own texts",
        page="on-policy.md",
        benchmark="methods.on_policy",
        reference="on_policy",
        plain="off_policy",
        labels="labels",
        arms=_same("on_policy", "mixed", "off_policy", "labels"),
        sources={
            "arithmetic": Source(
                title="sums of eight digits in steps",
                words=(),
                start="the same student after 400 steps on the data",
                metric="share of right texts",
            ),
        },
    ),
    "shrink": Collected(
        title="Shrink: a decoder is cut to a size in one trial",
        page="shrink.md",
        benchmark="methods.shrink",
        words=_DATA,
        reference="shrink",
        # The student's shape from random weights, distilled for as many steps.
        plain="random weights",
        labels=None,
        arms={
            "shrink": "shrink",
            **{f"{layers} layers alone": f"layers-{layers}" for layers in (6, 5, 4, 3, 2)},
            "random weights": "random",
        },
        sources={
            "stories260K": Source(
                title="a pretrained Llama of 260,032 weights to 0.4 of its weights, TinyStories",
                words=(),
                start="cut out of the teacher; `random weights` has the shape of the student",
                metric="held-out loss in nats per token",
                lower_is_better=True,
                # A seed takes less than ten minutes.
                seeds=FIVE,
            ),
            "books": Source(
                title="a Llama of 1,473,152 weights to 0.4 of its weights, eleven novels",
                words=("--case", "books"),
                start="cut out of the teacher; `random weights` has the shape of the student",
                metric="held-out loss in nats per token",
                lower_is_better=True,
            ),
        },
    ),
}

ALL_COMPARISONS: Mapping[str, Comparison] = {**COMPARISONS, **COLLECTED}


def titles_of(comparison: str) -> Mapping[str, str]:
    if comparison in COLLECTED:
        return {name: source.title for name, source in COLLECTED[comparison].sources.items()}
    return {name: setting.title for name, setting in SETTINGS.items()}
