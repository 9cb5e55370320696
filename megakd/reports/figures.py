"""The figures of the page, drawn by matplotlib as SVG texts."""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megakd.contract.metric import lower_is_better
from megakd.contract.results import Report
from megakd.contract.tasks import is_text_metric as is_of_texts
from megakd.reports.history import Curves
from megakd.reports.quantities import is_number, short_count
from megakd.reports.table import confusions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logging.getLogger("matplotlib").setLevel(logging.ERROR)
STAGES, PANELS, LINES, POINTS, LABELS = 12, 9, 12, 500, 40
"""Most stages, numbers of a stage, lines, points of a line, and labels that are drawn."""
COLOURS = {"teachers": "#7b4fa6", "assistants": "#a85700", "baselines": "#66717d"}
STUDENT_COLOUR, CHOSEN = "#1668ad", "#c4244f"
LEFT_OUT = ("memory_bytes", "loss_scale", "skipped_steps", "peak_share")
"""Logged numbers that are in no figure."""
Draw = Callable[["Axes"], None]


def figure(
    label: str,
    drawings: Sequence[Draw],
    *,
    columns: int = 3,
    size: tuple[float, float] = (3.6, 2.6),
) -> str:
    """Return axes beside and below each other as one SVG text; `size` of one in inches.

    Equal drawings and labels result in equal texts.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(3, len(drawings))
    rows = -(-len(drawings) // columns)
    # Text stays text, which a reader can search. The salt makes the ids of a page different.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    style |= {"text.parse_math": False}
    with rc_context(style):
        page = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        for number, draw in enumerate(drawings, 1):
            draw(page.add_subplot(rows, columns, number))
        text = io.StringIO()
        page.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Without the head of a file, its metadata, and ids that nothing refers to, such as "axes_1".
    inner = text.getvalue().partition("<svg")[2]
    inner = re.sub(r' id="[a-z0-9A-Z.]+_\d+"|<metadata>.*?</metadata>', "", inner, flags=re.DOTALL)
    return f'<svg role="img" aria-label="{html.escape(label)}"{inner}'


def stage_figures(report: Report, curves: Curves) -> dict[str, str]:
    """Return the figure of each trained stage: its losses and its evaluations over the steps."""
    names = [row["name"] for row in report["stages"] if row["name"] in curves]
    drawn: dict[str, str] = {}
    for stage in names[-STAGES:]:
        panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for key, points in curves[stage].items():
            group, _, rest = key.partition("/")
            view, _, name = rest.rpartition("/")
            if len(points) > 1 and name not in LEFT_OUT:
                panels.setdefault(f"{group}: {name}", {})[view] = points
        if panels:
            shown = sorted(panels, key=_rank)[:PANELS]
            drawn[stage] = figure(
                f"{stage}: losses and evaluations over the steps",
                [_curves(title, panels[title]) for title in shown],
            )
    return drawn


def _rank(title: str) -> int:
    # The loss, evaluations, terms of the loss and choices, then the others, such as the speed.
    group, _, name = title.partition(": ")
    if name == "loss" or group == "eval":
        return 0 if group == "train" else 1 if not is_of_texts(name) else 3
    return 2 if group == "select" or (group == "train" and lower_is_better(name)) else 3


def _curves(title: str, by_view: Mapping[str, Sequence[tuple[int, float]]]) -> Draw:
    def draw(axes: Axes) -> None:
        from matplotlib import colormaps

        views = [*by_view][:LINES]
        for number, view in enumerate(views):
            every = max(1, len(by_view[view]) // POINTS)
            steps, values = zip(*by_view[view][::every], strict=True)
            colour = colormaps["viridis"](number / LINES) if len(views) > 1 else STUDENT_COLOUR
            mark = "." if len(steps) <= 20 else ""
            axes.plot(steps, values, color=colour, marker=mark, linewidth=1.2, label=view or "kept")
        lowest = min(value for view in views for _, value in by_view[view])
        highest = max(value for view in views for _, value in by_view[view])
        if lowest > 0 and highest / lowest > 8 and not title.endswith("learning_rate"):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, (1, 2, 5))
        axes.set_title(title.replace("_", " "))
        axes.set_xlabel("step")
        if len(views) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2)

    return draw


def size_figure(report: Report) -> str:
    """Return the main metric against sizes and times; empty without two models of a score."""
    metric = report["metric_name"]
    kinds = {name: colour for kind, colour in COLOURS.items() for name in report[kind]}
    measures = {"encoder_parameters": "parameters without embeddings"}
    measures |= {f"ms_batch_{batch}": f"ms (batch {batch})" for batch in report["batches"]}

    def drawn(key: str, title: str) -> Draw | None:
        places = {
            name: (report.get(f"{name}.{key}"), report.get(f"{name}.{metric}"))
            for name in report["models"]
        }
        known = {
            n: (x, y) for n, (x, y) in places.items() if is_number(x) and x > 0 and is_number(y)
        }
        return _scatter(known, kinds, title, metric) if len(known) > 1 else None

    drawings = [draw for key, title in measures.items() if (draw := drawn(key, title))]
    return figure(f"{metric} against sizes", drawings, size=(3.9, 3.0)) if drawings else ""


def _scatter(
    places: Mapping[str, tuple[float, float]], kinds: Mapping[str, str], title: str, metric: str
) -> Draw:
    def draw(axes: Axes) -> None:
        for name, (x, y) in places.items():
            colour = kinds.get(name, STUDENT_COLOUR)
            axes.scatter([x], [y], color=colour, s=30)
        xs, ys = zip(*places.values(), strict=True)
        # A name is above its point, or below if another point of about this place comes first.
        labelled: list[tuple[float, float]] = []
        spread = (max(ys) - min(ys)) or 1.0
        for name, (x, y) in sorted(places.items(), key=lambda one: -one[1][1]):
            crowd = sum(abs(y - b) < 0.12 * spread and max(x / a, a / x) < 4 for a, b in labelled)
            offset = 5 if crowd % 2 == 0 else -12
            axes.annotate(
                name, (x, y), (0, offset - 9 * (crowd // 2)), textcoords="offset points",
                ha="center", fontsize=8,
            )  # fmt: skip
            labelled.append((x, y))
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
        axes.set_ylim(min(ys) - 0.2 * spread, max(ys) + 0.25 * spread)
        axes.set_xlabel(title)
        axes.set_ylabel(metric)
        _plain_ticks(axes.xaxis, (1, 3))

    return draw


def _plain_ticks(axis: Any, digits: Sequence[int]) -> None:
    # Of a logarithmic axis: 300k rather than a power of ten.
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=digits, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value, ".3g")))
    axis.set_minor_formatter(NullFormatter())


def candidate_figure(report: Report) -> str:
    """Return metric and trade-off of the candidates by iteration; empty without two candidates."""
    rows = [row for row in report["candidates"] if is_number(row["metric"])]
    if len(rows) < 2:
        return ""

    def drawing(key: str) -> Draw:
        def draw(axes: Axes) -> None:
            for iteration in sorted({row["iteration"] for row in rows}):
                mine = sorted(
                    (row["sparsity"], row[key], row["chosen"])
                    for row in rows
                    if row["iteration"] == iteration and is_number(row[key])
                )
                axes.plot(*zip(*(one[:2] for one in mine), strict=True), marker="o", markersize=4,
                          label=f"iteration {iteration}")  # fmt: skip
                chosen = [one[:2] for one in mine if one[2]]
                if chosen:
                    axes.scatter(*zip(*chosen, strict=True), s=110, facecolors="none",
                                 edgecolors=CHOSEN, linewidths=1.8, zorder=3)  # fmt: skip
            axes.set_xlabel("sparsity")
            axes.set_title(
                "trade-off" if key == "tradeoff" else f"metric: {rows[0]['metric_name']}"
            )
            axes.legend(fontsize=8, frameon=False)

        return draw

    return figure("candidates", [drawing("metric"), drawing("tradeoff")], size=(4.2, 2.8))


def confusion_figure(report: Report) -> str:
    """Return the student's confusion matrix; empty for other tasks or more than `LABELS` labels."""
    labels, counts = confusions(report)
    if not 0 < len(labels) <= LABELS:
        return ""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        names = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        for row, values in enumerate(counts if len(labels) <= LABELS // 2 else ()):
            for column, count in enumerate(values):
                colour = "white" if shares[row][column] > 0.5 else "black"
                if count:
                    axes.text(column, row, str(count), ha="center", va="center", color=colour,
                              fontsize=8)  # fmt: skip

    side = min(11.0, max(3.2, 1.8 + 0.4 * len(labels)))
    return figure("confusions", [draw], size=(side + 0.6, side))
