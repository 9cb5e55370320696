"""report.html: the report of a run in one file, built only from report.json and metrics.jsonl.

`templates/report.html.jinja` is the page, with figures that matplotlib draws as SVG texts. The file
loads no other files and has no scripts.
"""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.config.task import STANDARD_ERROR, STUDENT
from megakd.errors import CheckpointError
from megakd.process import files
from megakd.reports import table
from megakd.reports.report_file import Curves, Points, curves_of, read_history, read_report
from megakd.reports.table import is_number, short_count
from megakd.training.record import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_LABELS, WORST = 200, 10
"""Labels that the page lists, and rows of them that it shows unasked."""
TEMPLATES = Path(__file__).parent / "templates"


def write_html_report(output_dir: Path) -> Path:
    """Write report.html of a finished run, whole or not at all; an old file is replaced."""
    if output_dir.is_file():
        raise CheckpointError(
            f"{output_dir} is a file; give the output_dir of a finished run, such as "
            f"{output_dir.parent}"
        )
    report = read_report(output_dir / "report.json")
    config, path = output_dir / "config.yaml", output_dir / "report.html"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    page = html_report(report, read_history(output_dir / "metrics.jsonl"), config=text)
    try:
        files.write_text(path, page)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def html_report(report: Report, history: Iterable[Mapping[str, Any]], *, config: str = "") -> str:
    """Return the page as text; equal inputs result in equal texts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prefixes = ("environment.", "versions.", "latency.", "seconds.", "vocabulary.")
    return templates.get_template("report.html.jinja").render(
        report=report,
        headline=table.result_sentence(report),
        models=table.model_rows(report),
        notes=table.notes(report),
        meanings=meanings_of(report),
        sizes=size_figure(report),
        confusions=confusion_figure(report),
        candidates=candidate_figure(report),
        tables=table.tables(report, most_labels=MANY_LABELS),
        worst=WORST,
        stages=stage_figures(report, curves_of(history)),
        facts={key: value for key, value in report.items() if key.startswith(prefixes)},
        config=config,
    )


def meanings_of(report: Report) -> dict[str, dict[str, str]]:
    """Return the meanings of stages by name, at the table that names them first.

    `models` are the stages whose models are in the first table, `stages` the others.
    """
    known = {row["name"]: row["meaning"] for row in report["stages"] if row.get("meaning")}
    models = {name: text for name, text in known.items() if name in report["models"]}
    rest = {name: text for name, text in known.items() if name not in models}
    return {"models": models, "stages": rest}


logging.getLogger("matplotlib").setLevel(logging.ERROR)
STAGES, PANELS, LINES, POINTS, LABELS = 12, 9, 12, 500, 40
"""Most stages, numbers of a stage, lines, points of a line, and labels that are drawn."""
OF_TRAINING = ("train/loss", "train/learning_rate")
"""Numbers of the training that are drawn, beside those of evaluations and choices."""
COLOURS = {"teachers": "#7b4fa6", "assistants": "#a85700", "baselines": "#66717d"}
STUDENT_COLOUR = "#1668ad"
RING: Any = {"marker": "o", "markersize": 9, "linestyle": "", "fillstyle": "none"}
RING |= {"color": "#c4244f"}
Draw = Callable[["Axes"], None]


def figure(label: str, drawings: Sequence[Draw], size: tuple[float, float] = (3.6, 2.6)) -> str:
    """Return axes beside and below each other as one SVG text; `size` of one in inches.

    Equal drawings and labels result in equal texts, no drawings in an empty one.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not drawings:
        return ""
    columns = min(3, len(drawings))
    rows = -(-len(drawings) // columns)
    # Text stays text, which a reader can search. The salt makes the ids of a page different.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False}
    style |= {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 7, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
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
        panels: dict[str, dict[str, Points]] = {}
        for key, points in curves[stage].items():
            group, _, rest = key.partition("/")
            view, _, name = rest.rpartition("/")
            if len(points) > 1 and (group != "train" or key in OF_TRAINING):
                panels.setdefault(f"{group}: {name}", {})[view] = points
        shown = sorted(panels, key=lambda title: not title.startswith("train"))[:PANELS]
        label = f"{stage}: losses and evaluations over the steps"
        drawn[stage] = figure(label, [partial(_curves, title, panels[title]) for title in shown])
    return {stage: text for stage, text in drawn.items() if text}


def _curves(title: str, by_view: dict[str, Points], axes: Axes) -> None:
    from matplotlib import colormaps

    views = [*by_view][:LINES]
    for number, view in enumerate(views):
        steps, values = zip(*by_view[view][:: max(1, len(by_view[view]) // POINTS)], strict=True)
        colour = colormaps["viridis"](number / len(views)) if len(views) > 1 else STUDENT_COLOUR
        mark = "." if len(steps) <= 20 else ""
        axes.plot(steps, values, color=colour, marker=mark, linewidth=1.2, label=view or "kept")
    axes.set_title(title.replace("_", " "))
    axes.set_xlabel("step")
    if len(views) > 1:
        axes.legend(ncols=2)


def size_figure(report: Report) -> str:
    """Return the main metric against sizes and times; empty without two models of a score."""
    metric = report["metric_name"]
    colours = {name: colour for kind, colour in COLOURS.items() for name in report[kind]}
    measures = {"encoder_parameters": "parameters without embeddings"}
    measures |= {f"ms_batch_{batch}": f"ms (batch {batch})" for batch in report["batches"]}

    def model_of(row: str) -> str:
        return row.removesuffix("_onnx").removesuffix("_int8")

    def draw(key: str, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        for number, (name, x, y) in enumerate(places[key]):
            error, colour = (
                report.get(f"{name}.{metric}{STANDARD_ERROR}"),
                colours.get(model_of(name)),
            )
            axes.errorbar(
                [x], [y], yerr=error if is_number(error) else None,
                color=colour or STUDENT_COLOUR, marker="o", markersize=5.5, elinewidth=0.8,
            )  # fmt: skip
            # By turns left above and right below, on two heights each: a model and its graphs have
            # about one score, and names wider than their distance.
            further, is_below = 11 * (number // 2 % 2), number % 2
            shift, side = ((-4, -12 - further), "left") if is_below else ((4, 5 + further), "right")
            axes.annotate(name, (x, y), shift, textcoords="offset points", ha=side, fontsize=8)
        for name, y in lines:
            axes.axhline(y, color=COLOURS["baselines"], linestyle="--", linewidth=0.8)
            axes.annotate(
                name, (0, y), (2, 2), axes.get_yaxis_transform(), "offset points", fontsize=7
            )
        axes.margins(x=0.3, y=0.35)
        axes.set_xlabel(measures[key])
        axes.set_ylabel(metric)
        # 300k rather than a power of ten.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value, ".3g")))
        axes.xaxis.set_minor_formatter(NullFormatter())

    places = {
        key: sorted(
            (
                (name, x, y)
                for name in report["models"]
                # A graph has the parameters of its model, and about its score.
                if key != "encoder_parameters" or name == model_of(name)
                if is_number(x := report.get(f"{name}.{key}"))
                and x > 0
                and is_number(y := report.get(f"{name}.{metric}"))
            ),
            key=lambda place: -place[2],
        )
        for key in measures
    }
    sized = {name for key in measures for name, _, _ in places[key]}
    rest = ((name, report.get(f"{name}.{metric}")) for name in report["models"])
    lines = [(name, y) for name, y in rest if is_number(y) and name not in sized]
    drawings = [partial(draw, key) for key in measures if len(places[key]) > 1]
    return figure(f"{metric} against sizes", drawings, (3.9, 3.0))


def candidate_figure(report: Report) -> str:
    """Return metric and trade-off of the candidates by iteration; empty without two candidates."""
    rows = [row for row in report["candidates"] if is_number(row["metric"])]

    def draw(key: str, title: str, axes: Axes) -> None:
        for iteration in sorted({row["iteration"] for row in rows}):
            mine = [row for row in rows if row["iteration"] == iteration and is_number(row[key])]
            places = sorted((row["sparsity"], row[key]) for row in mine)
            axes.plot(*zip(*places, strict=True), marker="o", label=f"iteration {iteration}")
            chosen = [(row["sparsity"], row[key]) for row in mine if row["chosen"]]
            axes.plot(*zip(*chosen, strict=True), **RING)  # of none, if no candidate is chosen
        axes.set_xlabel("sparsity")
        axes.set_title(title)
        axes.legend()

    if len(rows) < 2:
        return ""
    titles = {"metric": f"metric: {rows[0]['metric_name']}", "tradeoff": "trade-off"}
    return figure("candidates", [partial(draw, *one) for one in titles.items()], (4.2, 2.8))


def confusion_figure(report: Report) -> str:
    """Return the student's confusion matrix; empty for other tasks or more than `LABELS` labels."""
    labels = [one["label"] for one in report.get(f"{STUDENT}.per_class", ())]
    pairs = report.get(f"{STUDENT}.confusion", ())
    by_pair = {(one["label"], one["predicted"]): one["rows"] for one in pairs}
    counts = [[by_pair.get((a, b), 0) for b in labels] for a in labels]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        names = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        for row, values in enumerate(counts):
            for column, count in enumerate(values):
                if count and len(labels) <= LABELS // 2:
                    colour = "white" if shares[row][column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=colour)

    side = max(3.2, 1.8 + 0.4 * len(labels))
    return figure("confusions", [draw] if 0 < len(labels) <= LABELS else [], (side + 0.6, side))
