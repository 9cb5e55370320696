"""Losses of the benchmark of shrink, from the reports of its runs to a table and a Markdown row."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from machine import markdown_row, mean_and_deviation, print_row
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Reports = dict[str, dict[str, Any] | None]
"""By name of the variant: the report of a run, None if the run has not finished."""
VARIANTS = ("teacher", "shrink", "tried", "on_policy", "random", "trial", "cut")
ALONE = "layers-"


class Scores(NamedTuple):
    """Held-out losses of one seed, in nats per token.

    alone: by number of layers, each candidate that was trained alone; empty if not all were.
    chosen: layers of the candidate that the trial chose.
    divergences: by number of layers, KL(teacher || candidate) by which the trial chose.
    trial_seconds, alone_seconds: time of the trial, and of training all candidates.
    """

    teacher: float
    shrink: float
    random: float
    cut: float
    trial: float
    chosen: int
    divergences: Mapping[int, float]
    alone: Mapping[int, float]
    on_policy: float | None
    trial_seconds: float
    alone_seconds: float

    @property
    def tried(self) -> float | None:
        """The loss of the best candidate that was trained alone."""
        return min(self.alone.values(), default=None)

    @property
    def best_alone(self) -> int | None:
        """Layers of the best candidate that was trained alone."""
        return min(self.alone, key=lambda layers: self.alone[layers], default=None)


def scores_of(reports: Reports, depths: Sequence[int], metrics: Path) -> Scores | None:
    """Return the losses of a seed; None without the report of `shrink`.

    Args:
        reports: the reports of the runs of the seed.
        depths: numbers of layers of the candidates.
        metrics: the log of the run `shrink`.
    """
    report = reports["shrink"]
    if report is None:
        return None
    (chosen,) = [layers_of(row) for row in report["candidates"] if row["chosen"]]
    trial, on_policy = stage(report, "trial-1"), reports["on_policy"]
    tried = _alone(reports, depths)
    return Scores(
        teacher=report["teacher"]["metrics"]["loss"],
        shrink=_loss(report),
        random=report["baselines"]["random"]["loss"],
        cut=cut_loss(metrics, chosen),
        trial=trial["metrics"]["loss"],
        chosen=chosen,
        divergences=divergences_of(report),
        alone={layers: _loss(found) for layers, found in tried.items()},
        on_policy=None if on_policy is None else _loss(on_policy),
        trial_seconds=trial["seconds"],
        alone_seconds=sum(seconds_of(found) for found in tried.values()),
    )


def layers_of(candidate: Mapping[str, Any]) -> int:
    """The number of layers of a candidate of a report."""
    return int(candidate["shape"].split()[0])


def divergences_of(report: Mapping[str, Any]) -> dict[int, float]:
    """By number of layers, KL(teacher || candidate) at the end of the trial of a run."""
    return {layers_of(row): row["metric"] for row in report["candidates"]}


def divergences_line(divergences: Mapping[int, float]) -> str:
    """The divergences of the candidates of a seed."""
    return "KL " + ", ".join(f"{layers} layers {kl:.3f}" for layers, kl in divergences.items())


def _alone(reports: Reports, depths: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = {layers: reports[f"{ALONE}{layers}"] for layers in depths}
    known = {layers: report for layers, report in found.items() if report is not None}
    return known if len(known) == len(depths) else {}


def _loss(report: Mapping[str, Any]) -> float:
    return report["student"]["metrics"]["loss"]


def stage(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A stage of a report."""
    return next(one for one in report["stages"] if one["name"] == name)


def seconds_of(report: Mapping[str, Any]) -> float:
    """The time that a run has trained."""
    return sum(stage(report, name)["seconds"] for name in ("trial-1", "student"))


def cut_loss(metrics: Path, layers: int) -> float:
    """The loss of a candidate before its first step, from the log of a run."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    key = f"eval/layers-{layers}/loss"
    return next(line[key] for line in lines if line["stage"] == "trial-1" and key in line)


def stock_class(folder: Path) -> str:
    """Return the class that transformers alone opens a student as, without code from the folder."""
    from transformers import AutoModelForCausalLM

    return type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)).__name__


def show(found: Sequence[Scores], what: str, command: str, extra: Sequence[str] = ()) -> None:
    """Print the table, and the row for docs/measurements.md.

    Args:
        found: the losses of each seed.
        what: the first cell of the row.
        command: the command of the benchmark.
        extra: further parts of the numbers.
    """
    lines, means, spreads = [["variant", "held-out loss", "seeds"]], [], []
    for name, values in _columns(found).items():
        mean, deviation = mean_and_deviation(values)
        lines.append([name, f"{mean:.4f} ±{deviation:.4f}", str(len(values))])
        means.append(f"{name} {mean:.4f}")
        spreads.append(f"{name} {deviation:.4f}")
    print(aligned(lines))
    differences = [difference(found, name) for name in ("tried", "random", "trial")]
    numbers = "; ".join([*means, *filter(None, differences), *_choices(found), *extra])
    print_row(markdown_row(what, command, numbers, "sd: " + "; ".join(spreads)))


def _columns(found: Sequence[Scores]) -> dict[str, list[float]]:
    """Return the known losses of each variant, over the seeds."""
    depths = list(dict.fromkeys(layers for one in found for layers in one.alone))
    reads: dict[str, Callable[[Scores], float | None]] = {
        name: lambda one, name=name: getattr(one, name) for name in VARIANTS
    }
    reads |= {f"{ALONE}{n} alone": lambda one, n=n: one.alone.get(n) for n in depths}
    columns = {
        name: [value for one in found if (value := read(one)) is not None]
        for name, read in reads.items()
    }
    return {name: values for name, values in columns.items() if values}


def difference(found: Sequence[Scores], other: str) -> str | None:
    """Return by how much `shrink` differs from a variant, in pairs; negative: `shrink` is better.

    None if no seed has both.
    """
    pairs = [one.shrink - value for one in found if (value := getattr(one, other)) is not None]
    if not pairs:
        return None
    mean, deviation = mean_and_deviation(pairs)
    each = ", ".join(f"{pair:+.4f}" for pair in pairs)
    return f"shrink - {other} {mean:+.4f} (sd {deviation:.4f}; {each})"


def _choices(found: Sequence[Scores]) -> list[str]:
    """Return which candidates were chosen, which are the best alone, and the times."""
    parts = [f"the trial chose {', '.join(str(one.chosen) for one in found)} layers"]
    parts += [f"trial: {divergences_line(one.divergences)}" for one in found]
    tried = [one for one in found if one.best_alone is not None]
    if tried:
        right = sum(one.chosen == one.best_alone for one in tried)
        parts.append(f"the best alone have {', '.join(str(one.best_alone) for one in tried)}")
        parts.append(f"the best candidate alone in {right} of {len(tried)} seeds")
    parts += [f"trial {o.trial_seconds:.0f} s, all alone {o.alone_seconds:.0f} s" for o in tried]
    return parts
