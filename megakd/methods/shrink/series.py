"""Several sizes in one run: the students learn as views of one model, then each by itself.

Differs from Nemotron Elastic and Flextron: no router chooses the shapes, and each student is cut
out at last and repaired with weights of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megakd.contract.lab import Lab, Model
from megakd.contract.stage import Scores, Stage, StageResult, Verdict
from megakd.contract.tasks import STUDENT
from megakd.methods.shrink.candidates import Budget, Candidate
from megakd.methods.shrink.stages import (
    ALL_SIZES,
    BestCandidate,
    Link,
    metric_of,
    repair,
    repair_steps,
    rows_of,
    train_of,
    trial,
)

if TYPE_CHECKING:
    from megakd.methods.shrink import ShrinkConfig

SHARED = "shared"
"""The stage in which the chosen students learn together."""
ALONE = 0.5
"""Share of the repair that each student has by itself."""
Named = dict[str, Candidate]


def train_series(
    config: ShrinkConfig, lab: Lab, link: Link, groups: Mapping[Budget, Sequence[Candidate]]
) -> list[StageResult]:
    """Choose a shape for each size, train the shapes together, then each by itself."""
    named = [{f"{size.name}-{one.name}": one for one in ones} for size, ones in groups.items()]
    link, shapes = _choose(config, lab, link, named)
    alone = max(1, round(ALONE * repair_steps(config, lab)))
    together = train_of(lab, max(1, repair_steps(config, lab) - alone))
    stage = _stage(config, lab, link, [{name: one} for name, one in shapes.items()])
    result = lab.train(dataclasses.replace(stage, name=SHARED, train=together))
    link = _within(link, lab.source(result.folder), shapes)
    results: list[StageResult] = []
    for size, one in zip(groups, shapes.values(), strict=True):
        start = lab.pruning.cut(link.start, link.view(one), f"start-{size.name}")
        stage = repair(config, lab, link.teacher, start, alone)
        name = STUDENT if len(results) == len(groups) - 1 else f"{STUDENT}-{size.name}"
        results.append(lab.train(dataclasses.replace(stage, name=name)))
    return results


def _choose(
    config: ShrinkConfig, lab: Lab, link: Link, groups: Sequence[Named]
) -> tuple[Link, Named]:
    """Return the best candidate of each size in a trial, and a model that contains them."""
    shapes = _all_of(groups)
    if len(shapes) > len(groups):
        link, shapes = _tried(config, lab, link, groups)
    # Units that no student has would take time without being trained.
    start = lab.pruning.cut(link.start, link.view(_union(shapes)), f"start-{SHARED}")
    return _within(link, start, shapes), shapes


def _tried(
    config: ShrinkConfig, lab: Lab, link: Link, groups: Sequence[Named]
) -> tuple[Link, Named]:
    """Run the trial; return the model that it has trained, and the best candidate of each size."""
    result = lab.train(_stage(config, lab, link, groups))
    shapes: Named = {}
    judges = _judges(config, lab, groups)
    for number, (named, judge) in enumerate(zip(groups, judges, strict=True), start=1):
        lab.record.candidates += rows_of(
            lab, link, named, result.scores, judge=judge, iteration=number
        )
        chosen = judge(result.scores, 0).view
        shapes[chosen] = named[chosen]
    return _within(link, lab.source(result.folder), _all_of(groups)), shapes


def _stage(config: ShrinkConfig, lab: Lab, link: Link, groups: Sequence[Named]) -> Stage:
    """Return a stage whose model is cut to the units of all candidates."""
    every = _all_of(groups)
    views = {name: link.view(one) for name, one in {ALL_SIZES: _union(every), **every}.items()}
    return trial(config, lab, link, views, BestSeries(_judges(config, lab, groups)))


def _judges(config: ShrinkConfig, lab: Lab, groups: Sequence[Named]) -> tuple[BestCandidate, ...]:
    metric = metric_of(config, lab)
    return tuple(BestCandidate(metric, tuple(named)) for named in groups)


def _all_of(groups: Sequence[Named]) -> Named:
    return {name: one for named in groups for name, one in named.items()}


def _within(link: Link, start: Model, named: Named) -> Link:
    """Return the link from a model that was cut to the units of all candidates."""
    return link.at(start, link.view(_union(named)).layers or ())


def _union(named: Named) -> Candidate:
    """Return the smallest shape that contains all candidates."""
    layers, heads, neurons, _, widths = zip(*named.values(), strict=True)
    width = None if None in widths else max(widths)
    return Candidate(max(layers), max(heads), max(neurons), 0, width)


@dataclass(frozen=True)
class BestSeries:
    """A judge that keeps the units of all candidates, and compares the best of each size."""

    judges: tuple[BestCandidate, ...]

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the sum of the best scores of each size."""
        return Verdict(sum(judge(scores, step).score for judge in self.judges), ALL_SIZES)
