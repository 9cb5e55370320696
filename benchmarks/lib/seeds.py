"""Several seeds of one run with the baseline `alone`, from their reports to a table and a row."""

from __future__ import annotations

from collections.abc import Mapping

from lib.launching import Report, seconds_of
from lib.tables import aligned, mean_and_deviation, print_scores

LOWER_IS_BETTER = ("perplexity", "loss")


def scores(report: Report) -> dict[str, float]:
    """Return the headline metric of teacher, distilled and alone, on the report's split."""
    metrics = {"distilled": report["student"]["metrics"], **report["baselines"]}
    if report["teacher"] is not None:
        metrics = {"teacher": report["teacher"]["metrics"], **metrics}
    return {model: values[report["metric_name"]] for model, values in metrics.items()}


def gain(report: Report) -> float:
    """Return the gain of the distilled student over the student alone; negative for a loss."""
    by_model = scores(report)
    difference = by_model["distilled"] - by_model["alone"]
    return -difference if report["metric_name"] in LOWER_IS_BETTER else difference


def table(rows: Mapping[object, Mapping[str, float]]) -> str:
    """Return a line per seed, then mean and standard deviation over the seeds."""
    # One seed may need a stage that another does without.
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    columns = [[row[title] for row in rows.values() if title in row] for title in titles]
    pairs = [mean_and_deviation(column) for column in columns]
    lines = {str(seed): row for seed, row in rows.items()}
    for name, place in (("mean", 0), ("sd", 1)):
        values = (pair[place] for pair in pairs)
        lines[name] = dict(zip(titles, values, strict=True))
    cells = [
        [name, *(f"{row[title]:.4g}" if title in row else "-" for title in titles)]
        for name, row in lines.items()
    ]
    return aligned([["seed", *titles], *cells])


def show(what: str, command: str, reports: Mapping[int, Report]) -> None:
    rows = {
        seed: {**scores(report), "gain": gain(report)}
        | {f"{stage} s": spent for stage, spent in seconds_of(report).items()}
        for seed, report in reports.items()
    }
    print(table(rows))
    first, *_ = reports.values()
    columns = {model: [scores(r)[model] for r in reports.values()] for model in scores(first)}
    columns["gain"] = [gain(report) for report in reports.values()]
    spent = [sum(seconds_of(report).values()) for report in reports.values()]
    extra = [_sizes(first), f"training {mean_and_deviation(spent)[0]:.0f} s"]
    what = f"{what}, {first['metric_name']} on {first['evaluated_on']}, {len(reports)} seed(s)"
    print_scores(what, command, columns, extra=extra)


def _sizes(report: Report) -> str:
    student = report["student"]["parameters"]
    if report["teacher"] is None:
        return f"{student:,} parameters"
    teacher = report["teacher"]["parameters"]
    return f"{teacher:,} to {student:,} parameters ({teacher / student:.1f}x)"
