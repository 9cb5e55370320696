"""The blocks of a report's page, which `templates/report.html.jinja` renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from megakd.contract.results import SampleReport
    from megakd.reports.charts import Chart

TEMPLATE = "report.html.jinja"
RAMP_LENGTH = 12
"""Number of colours `ramp-0`, `ramp-1`, … for the lines of a chart."""


def _ramp(anchors: Sequence[str]) -> list[str]:
    """Return evenly interpolated colours from the first anchor to the last."""
    numbers = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors]
    mixed = []
    for index in range(RAMP_LENGTH):
        place = index * (len(anchors) - 1) / (RAMP_LENGTH - 1)
        left = min(int(place), len(anchors) - 2)
        pairs = zip(numbers[left], numbers[left + 1], strict=True)
        mixed.append("#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in pairs))
    return mixed


# name -> colour on a light page and on a dark page.
COLOURS = {
    "paper": ("#fdfdfc", "#14181d"),
    "ink": ("#1d2731", "#e4e8ed"),
    "muted": ("#5c6875", "#9ba7b4"),
    "line": ("#dbe0e6", "#333c47"),
    "teacher": ("#7b4fa6", "#b894e0"),
    "assistant": ("#a85700", "#f0a347"),
    "student": ("#1668ad", "#62b0f2"),
    "baseline": ("#66717d", "#a3aeb9"),
    "chosen": ("#c4244f", "#ff7d9c"),
} | {
    f"ramp-{index}": pair
    for index, pair in enumerate(
        zip(
            _ramp(["#5b3fa8", "#0a766c", "#a06a00", "#b3304f"]),
            _ramp(["#a08bf0", "#4fc9b0", "#e3b04b", "#ff7a8a"]),
            strict=True,
        )
    )
}


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    kind: ClassVar = "paragraph"
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of plain text. The first row holds the titles; the first cell of a row is its heading.

    chosen: numbers of the rows to mark, counted from 1, because row 0 holds the titles.
    """

    kind: ClassVar = "table"
    rows: Sequence[Sequence[str]]
    caption: str = ""
    chosen: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """Charts side by side, with a legend, a caption, and the numbers of the charts."""

    kind: ClassVar = "figure"
    charts: Sequence[Chart]
    caption: str
    legend: Sequence[tuple[str, str, bool]] = ()
    numbers: Sequence[Block] = ()


@dataclass(frozen=True)
class Bar:
    """A bar with its value in words; `colour` names a colour of the page."""

    name: str
    value: float
    text: str
    colour: str = "student"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars with the same unit."""

    kind: ClassVar = "bars"
    title: str
    bars: Sequence[Bar]

    def share(self, bar: Bar) -> str:
        """Return a bar's length as a percentage of the longest."""
        longest = max((other.value for other in self.bars), default=0)
        return f"{100 * bar.value / longest:.1f}" if longest > 0 else "0"


@dataclass(frozen=True)
class BarGroups:
    """Groups of bars side by side, with a caption."""

    kind: ClassVar = "bar_groups"
    groups: Sequence[Bars]
    caption: str


@dataclass(frozen=True)
class Facts:
    """Names and values in two columns."""

    kind: ClassVar = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """Prompts with the answers of teacher and student."""

    kind: ClassVar = "samples"
    samples: Sequence[SampleReport]


@dataclass(frozen=True)
class Listing:
    """Preformatted text."""

    kind: ClassVar = "listing"
    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until the user clicks on the summary."""

    kind: ClassVar = "folded"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A heading with blocks under it; a section without blocks is left out of the page."""

    kind: ClassVar = "section"
    title: str
    blocks: Sequence[Block]
    level: int = 2


Block = Paragraph | Table | Figure | BarGroups | Facts | Samples | Listing | Folded | Section


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return an HTML document that loads no other files."""
    template = _environment().get_template(TEMPLATE)
    return template.render(title=title, blocks=blocks, colours=COLOURS)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("megakd.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
