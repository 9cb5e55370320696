"""Forest plots of the evidence: a panel per setting, a line per arm, in colours for light and dark.

The same differences give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evidence.cells import BASES
from evidence.statistics import Assessed, Verdict, unit_of

COLOURS = {
    "paper": ("#fdfdfc", "#14181d"),
    "ink": ("#1d2731", "#e4e8ed"),
    "muted": ("#5c6875", "#9ba7b4"),
    "line": ("#dbe0e6", "#333c47"),
    "better": ("#1668ad", "#62b0f2"),
    "worse": ("#c4244f", "#ff7d9c"),
    "perhaps-better": ("#7ba7cc", "#4a7396"),
    "perhaps-worse": ("#d98ba1", "#99586a"),
    "untold": ("#66717d", "#a3aeb9"),
}
"""Colours of the report on light and on dark pages."""
LIGHT = {name: pair[0] for name, pair in COLOURS.items()}
SHADES: Mapping[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "perhaps better": "perhaps-better",
    "perhaps worse": "perhaps-worse",
    "cannot be told": "untold",
}
"""The name of the colour of each verdict."""
WIDE = 3
"""Panels side by side."""
PANEL, NAMES, LINE, FRAME = 2.3, 2.3, 0.27, 0.95
"""Inches: width of a panel, width of the arms' names, height of an arm, height of titles."""
DRAWING: dict[Any, Any] = {
    # Text stays text: small files, and the fonts of the page's reader.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LIGHT["line"],
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
}


def forest_plot(panels: Sequence[Assessed]) -> str:
    arms = list(dict.fromkeys(one.arm for panel in panels for one in panel.differences))
    rows, columns = math.ceil(len(panels) / WIDE), min(WIDE, len(panels))
    size = (NAMES + PANEL * columns, rows * (FRAME + LINE * len(arms)) + 0.5)
    with mpl.rc_context(DRAWING):
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                _panel(axes, panels[place], arms)
            else:
                axes.set_visible(False)
        # One panel alone is too narrow for the whole legend in a line.
        legend = {"loc": "outside lower center", "ncols": 4 if columns > 1 else 3}
        figure.legend(handles=_legend(), **legend, frameon=False)
        written = io.StringIO()
        canvas.print_svg(written, metadata={"Date": None, "Creator": None})
    return _with_page_colours(_with_numbered_ids(written.getvalue()))


def _panel(axes: Axes, panel: Assessed, arms: Sequence[str]) -> None:
    unit = unit_of(panel.stored)
    axes.set_title(panel.stored.setting, fontsize=10, fontweight="bold")
    axes.set_xlabel(f"{unit.name}, right is better", color=LIGHT["muted"])
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.tick_params(colors=LIGHT["muted"], length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    has_both = {one.arm for one in panel.differences if one.basis == "cost"}
    for one in panel.differences:
        shift = 0.17 * (1 if one.basis == "cost" else -1) if one.arm in has_both else 0.0
        height, colour = arms.index(one.arm) + shift, LIGHT[SHADES[one.verdict]]
        if math.isfinite(one.low):
            axes.plot([one.low, one.high], [height, height], color=colour, linewidth=1.4, zorder=2)
        axes.plot([one.mean], [height], **_look(colour, is_filled=one.basis == BASES[0]), zorder=3)


def _look(colour: str, *, is_filled: bool) -> dict[str, Any]:
    face = colour if is_filled else LIGHT["paper"]
    return {"marker": "o", "markersize": 5, "color": colour, "markerfacecolor": face, "ls": ""}


def _legend() -> list[Line2D]:
    looks = {
        "equal steps": _look(LIGHT["untold"], is_filled=True),
        "equal cost": _look(LIGHT["untold"], is_filled=False),
    }
    dots = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    return dots + [
        Line2D([], [], color=LIGHT[shade], label=verdict) for verdict, shade in SHADES.items()
    ]


def _with_numbered_ids(drawn: str) -> str:
    """Number the ids of shapes, which are hashes of positions that differ between machines."""
    for number, name in enumerate(dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', drawn))):
        drawn = drawn.replace(name, f"shape-{number}")
    return drawn


def _with_page_colours(drawn: str) -> str:
    """Replace the colours of light pages by variables, which have another value on dark pages."""
    for name, colour in LIGHT.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    # The figure's own background is the first patch.
    drawn = re.sub(r"fill: #ffffff", "fill: var(--paper)", drawn, count=1)
    light, dark = (
        " ".join(f"--{name}: {pair[shade]};" for name, pair in COLOURS.items()) for shade in (0, 1)
    )
    style = (
        f"<style>:root {{ {light} }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>\n"
    )
    drawn = re.sub(r"[ \t]+$", "", drawn, flags=re.MULTILINE)
    return re.sub(r"(<svg\b[^>]*>\n)", lambda head: head[1] + style, drawn, count=1)
