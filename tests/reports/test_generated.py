"""Generated texts in the report: the last evaluation, its table, its texts, its curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from reports import language_report

from megakd.reports.html import html_report
from megakd.reports.table import TEXTS_SHOWN, generation_reports, result_table
from megakd.storage.atomic import json_text

TEXT = {
    "prompt": "2 +\n2 =", "text": "<5>", "wanted": "4", "finished": True, "matches": False,
}  # fmt: skip
OTHER = {**TEXT, "text": "4", "matches": True, "finished": False}
METRICS = {"text_tokens": 37.5, "text_truncated": 0.25, "match": 0.5}
ENTRY = {"stage": "student", "step": 1200, "metrics": METRICS, "texts": [TEXT, OTHER]}
WARNING = {"stage": "student", "kind": "rollout", "step": 9, "message": "texts <run> away"}


def line(step: int, stage: str = "student", **values: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "time": 1.0, **values}


def evaluation(step: int, **metrics: float) -> dict[str, Any]:
    return line(step, **{f"eval/{name}": value for name, value in metrics.items()})


def write_run(folder: Path, records: list[dict[str, Any]], texts: dict[int, list[Any]]) -> Path:
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "texts" / "student").mkdir(parents=True)
    for step, rows in texts.items():
        path = folder / "texts" / "student" / f"step-{step:08d}.jsonl"
        path.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_report_has_the_texts_and_metrics_of_the_last_evaluation(tmp_path: Path) -> None:
    text = {**TEXT, "text": "one\x85two\u2028three\u2029"}  # separators of lines in Unicode
    records = [
        evaluation(10, perplexity=9.0, **METRICS),
        evaluation(20, perplexity=8.0, **{**METRICS, "match": 0.75}),
    ]
    out = write_run(tmp_path, records, {10: [OTHER], 20: [text] * (TEXTS_SHOWN + 1)})

    actual = generation_reports(out, ["teacher", "student"])

    metrics = {**METRICS, "match": 0.75}
    wanted = {"stage": "student", "step": 20, "metrics": metrics, "texts": [text] * TEXTS_SHOWN}
    assert actual == [wanted]


def test_a_run_without_generated_texts_has_no_entry(tmp_path: Path) -> None:
    out = write_run(tmp_path, [evaluation(10, perplexity=9.0)], {})
    assert generation_reports(out, ["student"]) == []
    assert "Generated texts" not in html_report(language_report(), [])


@pytest.mark.parametrize("content", [None, "{half"], ids=["removed", "damaged"])
def test_metrics_remain_without_the_file_of_the_texts(tmp_path: Path, content: str | None) -> None:
    out = write_run(tmp_path, [evaluation(10, **METRICS)], {})
    if content is not None:
        (out / "texts" / "student" / "step-00000010.jsonl").write_text(content)
    result = generation_reports(out, ["student"])
    assert result == [{"stage": "student", "step": 10, "metrics": METRICS, "texts": []}]


def test_the_page_shows_warnings_prompt_text_wanted_text_and_match() -> None:
    alone = {**ENTRY, "stage": "other", "texts": [{**TEXT, "matches": None}]}
    report = language_report(generation=[ENTRY, alone], warnings=[WARNING])

    text = html_report(report, [])

    page = Page(text)
    assert page.faults == []
    assert "Generated texts" in page.headings
    assert '<p class="prompt">2 +↵ 2 =</p>' in text
    assert '<p class="said">&lt;5&gt;</p>' in text
    assert "step 1,200: the texts for the first 2 prompts, 1 of 2 match" in text
    assert "ended, no match" in text
    assert "cut at the limit of tokens, match" in text
    assert "the texts for the first 1 prompts</summary>" in text
    assert '<p class="muted">ended</p>' in text
    assert text.index("texts &lt;run&gt; away") < text.index("Scores on")


def test_the_table_of_a_run_has_a_row_for_match() -> None:
    table = result_table(language_report(generation=[ENTRY])).splitlines()
    place = next(i for i, row in enumerate(table) if row.startswith("generated texts"))
    assert table[place].split()[2:] == ["step", "match", "tokens", "truncated"]
    assert table[place + 1].split() == ["student", "1,200", "50.0%", "37.5", "25.0%"]


def test_metrics_of_generated_texts_are_not_repeated_in_the_table_of_the_stages() -> None:
    report = language_report()
    report["stages"] = [
        {
            "name": "student", "steps": 4, "seconds": 1.0, "tokens_per_second": 2.0,
            "peak_memory_bytes": 3, "metrics": {"perplexity": 8.0, **METRICS},
        }
    ]  # fmt: skip

    rows = [row for _, row in Page(html_report(report, [])).rows]

    titles = next(row for row in rows if row[:2] == ["stage", "steps"])
    assert titles[5:] == ["perplexity", "match"]


def test_length_truncation_staleness_and_match_are_drawn_over_the_steps() -> None:
    rollout = {
        "rollout/tokens_per_text": 30.0, "rollout/truncated": 0.1, "rollout/staleness": 1.0,
    }  # fmt: skip
    metrics = {**METRICS, "perplexity": 9.0}
    records = [
        record
        for step in (1, 2, 3)
        for record in (line(step, **rollout), evaluation(step, **metrics))
    ]

    text = html_report(language_report(), records)

    labels = [label for label in Page(text).labels if "over its steps" in label]
    drawn = {label.split("over its steps: ")[1].split(".")[0] for label in labels}
    assert drawn >= {"match", "text_tokens", "tokens_per_text", "truncated", "staleness"}
    # Lengths are no percentages.
    assert 'text tokens <span class="muted">tokens</span>' in text
    assert 'match <span class="muted">%</span>' in text
