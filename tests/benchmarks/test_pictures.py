"""The README's pictures, out of a report's page."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from reports import chosen_report

from megakd.reports.html import html_report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pictures

SVG = "{http://www.w3.org/2000/svg}"


def test_each_picture_is_one_file_with_its_charts_titles_and_colours(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text(html_report(chosen_report(), []))
    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "images")

    assert pictures.main([str(page)]) == 0

    charts = {"quality": 3, "tradeoff": 2}
    for name, count in charts.items():
        text = (tmp_path / "images" / f"{name}.svg").read_text()
        root = ElementTree.fromstring(text)  # noqa: S314 - drawn above
        assert len(root.findall(f"{SVG}svg")) == count
        assert len(root.findall(f"{SVG}text[@class='title']")) == count
        assert "prefers-color-scheme: dark" in text
        assert "svg text { fill: var(--muted)" in text
        # Of the page's rules for its own charts: a chart here has a width of its own.
        assert "width: 100%" not in text
