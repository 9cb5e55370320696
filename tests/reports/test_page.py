"""The page on a phone, in the dark, and for metrics where lower is better."""

from __future__ import annotations

import re

import pytest
from html_page import Page
from reports import chosen_report, language_report, report_of

from megakd.reports.html import html_report
from megakd.reports.table import result_table


@pytest.fixture(scope="module")
def text() -> str:
    lines = [{"stage": "student", "step": s, "train/loss": 9 / s} for s in (1, 2, 3)]
    return html_report(chosen_report(), lines, config="method: {name: minidisc}\n")


def test_the_page_fits_a_phone(text: str) -> None:
    """Charts are as wide as a phone and flow; what may be wider scrolls in a box of its own."""
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    result = Page(text)
    assert result.outside == []
    widths = {float(box.split()[2]) for box in re.findall(r'viewBox="([^"]+)"', text)}
    assert max(widths) < 360
    assert ".wide { overflow-x: auto" in text
    assert re.search(r"pre \{[^}]*overflow-x: auto", text)
    assert "repeat(auto-fill, minmax(min(100%, 19rem), 1fr))" in text
    assert "@media (max-width: 40rem)" in text


def test_the_page_has_dark_colours(text: str) -> None:
    assert '<meta name="color-scheme" content="light dark">' in text
    assert "@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d" in text
    body = text.partition("<body>")[2]
    assert re.findall(r"#[0-9a-fA-F]{6}", body) == []


def test_of_a_perplexity_lower_is_better_everywhere() -> None:
    lines = [{"stage": "student", "step": s, "eval/perplexity": 20 / s} for s in (1, 2)]

    text = html_report(language_report(), lines)

    assert "Its perplexity is 1.25 times the teacher&#39;s, +0.22 nats (lower is better)." in text
    assert "keeps" not in text
    assert "Higher and further to the left" not in text
    assert "Lower and further to the left is better" in text
    assert '<th scope="col">perplexity\N{NO-BREAK SPACE}↓</th>' in text
    assert text.count('perplexity <span class="muted">lower is better</span>') == 2
    assert "encoder parameters" not in text
    assert "parameters without embeddings" in text


def test_of_an_accuracy_higher_is_better() -> None:
    text = html_report(report_of(), [])

    table = result_table(report_of())
    assert "kept" in table
    assert "vs teacher" not in table
    assert "lower is better" not in table
    assert "It keeps 94.1% of the teacher&#39;s score." in text
    assert "Higher and further to the left is better" in text
    assert "lower is better" not in text


def test_samples_of_the_models_stand_side_by_side() -> None:
    report = language_report()
    both = {"prompt": "a\nb", "teacher": "<c>\n\n", "student": "d"}
    report["samples"] = [both, {"prompt": "a", "teacher": None, "student": "e"}]

    text = html_report(report, [])

    assert "Samples" in Page(text).headings
    assert '<p class="prompt">a↵ b</p>' in text
    assert '<p class="said">&lt;c&gt;↵ ↵ </p>' in text
    assert re.findall(r'<p class="said">(\w)</p>', text) == ["d", "e"]
    assert text.count('class="said"') == 3


def test_the_weights_of_a_selector_are_lines_of_one_chart_from_0_to_1() -> None:
    kinds = ("hard_cross_entropy", "soft_target_kl")
    lines = [
        {
            "stage": "selector",
            "step": s,
            **{f"select/{kind}": 0.4 for kind in kinds},
            "select/reward": -1.0 * s,
            "select/held_out_loss": 2.0 / s,
        }
        for s in (1, 2, 3)
    ]

    text = html_report(report_of(stages=[]), lines)

    chart = text[text.index(">weight of each kind of knowledge<") :].partition("</svg>")[0]
    assert chart.count("<polyline") == 2
    assert ">0<" in chart
    assert ">1<" in chart
    assert "nats" not in text
    assert "log scale" not in chart
    assert all(f"</span>{kind}</li>" in text for kind in kinds)
    assert 'held out loss <span class="muted">lower is better</span>' in text
