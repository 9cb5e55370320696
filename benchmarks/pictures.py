"""The README's pictures, out of the report of a quickstart.

`python benchmarks/pictures.py [runs/quickstart/report.html]` writes docs/images/*.svg, each with
the report's colours in it, for light and dark pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launching import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = ROOT / "docs/images"
PICTURES = ("quality", "tradeoff")
"""In the order of the report's figures."""
FONT = 'svg { font-family: system-ui, "DejaVu Sans", sans-serif } svg text { fill: var(--ink) }'


def main(arguments: Sequence[str]) -> int:
    """Writes them."""
    report = Path(*arguments) if arguments else ROOT / "runs/quickstart/report.html"
    page = report.read_text(encoding="utf-8")
    colours = re.findall(r"^:root.*$|^@media screen.*$", page, re.MULTILINE)
    style = f"<style>{' '.join(colours)} {FONT} svg {{ background: var(--paper) }}</style>"
    FOLDER.mkdir(parents=True, exist_ok=True)
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for name, figure in zip(PICTURES, figures, strict=False):
        opened, body = figure.split(">", 1)
        drawn = f'{opened} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'
        (FOLDER / f"{name}.svg").write_text(drawn, encoding="utf-8")
        print(FOLDER / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
