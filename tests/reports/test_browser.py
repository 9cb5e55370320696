"""The page in a real browser: nothing is wider than the screen. Skipped where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reports import chosen_report, language_report

from megakd.reports.html import html_report

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))),
    None,
)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=2000", "--allow-file-access-from-files"),
)
# A frame has the width that is asked for; a window has a least one.
FRAME = """<!DOCTYPE html><body><iframe id="f" src="report.html"
style="width:{width}px;height:2000px;border:0"></iframe><script>onload = () => {{
const d = document.getElementById("f").contentDocument;
d.querySelectorAll("details").forEach(e => e.open = true);
document.title = "wide=" + d.scrollingElement.scrollWidth + " texts=" +
  Math.min(...[...d.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height));
}}</script>"""

LONG = "x" * 300
GENERATED = {
    "generation": [
        {
            "stage": "student", "step": 9, "metrics": {f"text_{LONG[:30]}{n}": 0.5 for n in "abc"},
            "texts": [
                {"prompt": LONG, "text": LONG, "wanted": LONG, "finished": True, "matches": False}
            ],
        }
    ],
    "warnings": [{"stage": "student", "kind": "rollout", "step": 9, "message": LONG}],
}  # fmt: skip


def measured(folder: Path, page: str, width: int) -> tuple[float, float]:
    """Return the width of the page and the height of a chart's smallest text, in pixels."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    output = subprocess.run(
        [
            *(BROWSER, *OPTIONS, "--dump-dom"),
            f"--user-data-dir={folder / 'browser'}",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    result = re.search(r"wide=([\d.]+) texts=([\d.]+)", output)
    assert result, output[:500]
    return float(result[1]), float(result[2])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [360, 420, 1200])
@pytest.mark.parametrize("kind", ["minidisc", "language model"])
def test_nothing_is_wider_than_the_screen_and_charts_can_be_read(tmp_path, kind, width):
    lines = [
        {"stage": "student", "step": s, "train/loss": 9 / s, "eval/perplexity": 20 / s}
        for s in range(1, 30)
    ]
    lines += [{"stage": "student", "step": s, "eval/text_tokens": 3.0 * s} for s in (1, 9)]
    report = chosen_report() if kind == "minidisc" else language_report(**GENERATED)
    page = html_report(report, lines, config=f"key: {'x' * 300}\n")

    wide, smallest = measured(tmp_path, page, width)

    assert wide <= width
    assert smallest >= 10
