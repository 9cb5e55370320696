"""Several seeds of one run, from their reports to a table and a Markdown row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from machine import markdown_row, mean_and_deviation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOWER_IS_BETTER = ("perplexity", "loss")
SAME_COST = 0.1
"""Two costs that differ by a smaller share count as equal."""


def scores(report: Mapping[str, Any]) -> dict[str, float]:
    """The headline metric of teacher, distilled and alone, on the report's split."""
    metrics = {"distilled": report["student"]["metrics"], **report["baselines"]}
    if report["teacher"] is not None:
        metrics = {"teacher": report["teacher"]["metrics"], **metrics}
    return {model: values[report["metric_name"]] for model, values in metrics.items()}


def gain(report: Mapping[str, Any]) -> float:
    """Return the gain of the distilled student over the student alone; negative for a loss."""
    found = scores(report)
    difference = found["distilled"] - found["alone"]
    return -difference if report["metric_name"] in LOWER_IS_BETTER else difference


def table(reports: Mapping[int, Mapping[str, Any]]) -> str:
    """A line per seed, then mean and standard deviation over the seeds."""
    rows = {str(seed): _numbers(report) for seed, report in reports.items()}
    # One seed may need a stage that another does without.
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    columns = [[row[title] for row in rows.values() if title in row] for title in titles]
    for name, index in (("mean", 0), ("sd", 1)):
        spreads = [mean_and_deviation(column)[index] for column in columns]
        rows[name] = dict(zip(titles, spreads, strict=True))
    cells = [[name, *(_cell(row.get(title)) for title in titles)] for name, row in rows.items()]
    return aligned([["seed", *titles], *cells])


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    spent = {f"{stage} s": value for stage, value in seconds(report).items()}
    return {**scores(report), "gain": gain(report), **spent}


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def seconds(report: Mapping[str, Any]) -> dict[str, float]:
    """Stage name -> seconds of training, evaluations and saves included."""
    return {stage["name"]: stage["seconds"] for stage in report["stages"]}


def row(what: str, command: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """The row for docs/measurements.md."""
    first = reports[0]
    columns = {model: [scores(r)[model] for r in reports] for model in scores(first)}
    columns["gain"] = [gain(r) for r in reports]
    means = {name: mean_and_deviation(values) for name, values in columns.items()}
    name, split = first["metric_name"], first["evaluated_on"]
    numbers = f"{name} on {split}: " + _listed({key: value[0] for key, value in means.items()})
    spent = [sum(seconds(r).values()) for r in reports]
    numbers += f"; {_sizes(first)}; training {mean_and_deviation(spent)[0]:.0f} s"
    if len(reports) == 1:
        return markdown_row(what, command, numbers, "one seed")
    spread = f"sd over {len(reports)} seeds: " + _listed({k: v[1] for k, v in means.items()})
    spread += f"; smallest gain {min(columns['gain']):.4g}; training sd"
    return markdown_row(what, command, numbers, f"{spread} {mean_and_deviation(spent)[1]:.0f} s")


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _sizes(report: Mapping[str, Any]) -> str:
    student = report["student"]["parameters"]
    if report["teacher"] is None:
        return f"{student:,} parameters"
    teacher = report["teacher"]["parameters"]
    return f"{teacher:,} to {student:,} parameters ({teacher / student:.1f}x)"
