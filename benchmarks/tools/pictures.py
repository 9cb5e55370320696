"""The pictures of docs/report.md, out of the report of a MiniDisc run.

`python benchmarks tools.pictures [runs/pydocs_minidisc/report.html]` writes docs/images/*.svg, each
with the report's colours in it, for light and dark pages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lib.launching import ROOT
from lib.options import parser_of

FOLDER = ROOT / "docs/images"
PICTURES = ("quality", "tradeoff")
"""In the order of the report's figures."""
GAP, TITLE, COLUMNS = 24, 24, 3
STYLE = "svg { background: var(--paper) } text.title { fill: var(--ink); font-weight: 600 }"


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    default = ROOT / "runs/pydocs_minidisc/report.html"
    parser.add_argument("report", nargs="?", type=Path, default=default)
    page = parser.parse_args(arguments).report.read_text(encoding="utf-8")
    rules = re.findall(r"^:root.*$|^@media screen.*$|^svg [^{].*$(?:\n  .*$)?", page, re.MULTILINE)
    FOLDER.mkdir(parents=True, exist_ok=True)
    figures = re.findall(r"<figure>\n<div class=\"charts\">.*?</figure>", page, re.DOTALL)
    for name, figure in zip(PICTURES, figures, strict=False):
        style = f"<style>{' '.join(rules)} {STYLE}</style>"
        (FOLDER / f"{name}.svg").write_text(drawn(figure, style), encoding="utf-8")
        print(FOLDER / f"{name}.svg")
    return 0


def drawn(figure: str, style: str) -> str:
    """Return a figure's charts side by side with their titles and their legend, as one SVG."""
    titles = re.findall(r'<p class="name">(.*?)</p>', figure)
    charts = re.findall(r"<svg.*?</svg>", figure, re.DOTALL)
    width, height = (int(n) for n in re.findall(r'viewBox="0 0 (\d+) (\d+)"', charts[0])[0])
    parts = []
    for number, (title, chart) in enumerate(zip(titles, charts, strict=True)):
        x, y = (number % COLUMNS) * (width + GAP), (number // COLUMNS) * (height + TITLE)
        words = re.sub(r"<[^>]+>", "", title)
        parts.append(f'<text class="title" x="{x + 4}" y="{y + 15}">{words}</text>')
        place = f'<svg x="{x}" y="{y + TITLE}" width="{width}" height="{height}"'
        parts.append(chart.replace("<svg", place, 1))
    columns, rows = min(COLUMNS, len(charts)), -(-len(charts) // COLUMNS)
    bottom = rows * (height + TITLE)
    names = re.findall(r"<li><span[^>]*></span>(.*?)</li>", figure)
    if names:
        bottom += TITLE
        parts.append(f'<text x="4" y="{bottom - 8}">{" · ".join(names)}</text>')
    size = f"0 0 {columns * (width + GAP) - GAP} {bottom}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">'
    return "\n".join([head, style, *parts, "</svg>"]) + "\n"
