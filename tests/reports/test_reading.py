"""report.json as it is read back: damage is named by its key, in one message."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reports import chosen_report, language_report, report_of

from megakd.errors import CheckpointError
from megakd.reports.html import html_report, write_html_report
from megakd.reports.reading import read_report
from megakd.reports.report import write_report

ROW = {"step": 1, "width": 8, "parameters": 90, "teacher_kl": None, "step_seconds": None}
DAMAGE: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "no stages": (("stages",), None, "stages is null, and must be a list"),
    "a null stage": (("stages", 0), None, "stages[0] is null, and must be a mapping"),
    "a null time": (("stages", 1, "seconds"), None, "stages[1].seconds is null"),
    "an endless time": (("seconds",), {"data": math.inf}, "seconds.data is inf"),
    "a huge size": (("student", "parameters"), 10**400, "student.parameters is 1000"),
    "words": (("student", "parameters"), "many", 'student.parameters is "many", and must be a'),
    "metrics in a list": (("baselines", "alone"), [0.5], "baselines.alone is [0.5], and must be"),
    "a number for a name": (("method",), 3, "method is 3, and must be text"),
    "a text for a teacher": (("teacher",), "bert", 'teacher is "bert", and must be a mapping'),
    "int8 without bytes": (
        ("student", "int8"),
        {"metrics": {}},
        "student.int8.bytes is missing",
    ),
    "int8 in words": (("student", "int8"), "small", 'student.int8 is "small", and must be a'),
    "no pruning": (("pruning",), None, "pruning is null, and must be a list"),
    "pruning in one": (("pruning",), [ROW, [2]], "pruning[1] is [2], and must be a mapping"),
    "a null width": (("pruning",), [{**ROW, "width": None}], "pruning[0].width is null"),
    "a null step": (("pruning",), [{**ROW, "step": None}], "pruning[0].step is null"),
    "an endless size": (("pruning",), [{**ROW, "parameters": math.inf}], "pruning[0].parameters"),
    "a wordy KL": (("pruning",), [{**ROW, "teacher_kl": "far"}], 'pruning[0].teacher_kl is "far"'),
    "half a pruning": (("pruning",), [{"step": 1}], "pruning[0].width is missing"),
    "half a candidate": (("candidates",), [{"iteration": 1}], "candidates[0].sparsity is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_by_its_key(tmp_path: Path, case: str) -> None:
    keys, value, message = DAMAGE[case]
    report: Any = json.loads(json.dumps(report_of()))
    node = report
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))

    with pytest.raises(CheckpointError) as refused:
        write_html_report(tmp_path)

    assert str(refused.value).startswith(f"{path} is damaged: {message}")
    assert f"remove {path} and start the command of the run again" in str(refused.value)


@pytest.mark.parametrize("content", ["9" * 5000, "[" * 100_000], ids=["digits", "brackets"])
def test_a_file_beyond_what_json_can_hold_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"report.json is damaged: it is not JSON"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("report", [report_of(), chosen_report(), language_report()])
def test_what_a_run_writes_is_read_back(tmp_path: Path, report: Any) -> None:
    report["student"]["metrics"] = dict.fromkeys(report["student"]["metrics"], math.nan)
    path = tmp_path / "report.json"
    write_report(path, report)

    assert read_report(path)["student"]["metrics"] == dict.fromkeys(report["student"]["metrics"])
    assert html_report(read_report(path), [])


def test_a_pruned_student_without_divergence_or_step_time_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    rows = [ROW, {**ROW, "step": 2, "teacher_kl": math.nan, "step_seconds": 0.5}]
    write_report(path, report_of(pruning=rows))

    assert read_report(path)["pruning"] == [ROW, {**ROW, "step": 2, "step_seconds": 0.5}]


def test_a_report_of_an_earlier_version_has_no_pruning(tmp_path: Path) -> None:
    report: Any = {key: value for key, value in report_of().items() if key != "pruning"}
    write_report(tmp_path / "report.json", report)

    assert "Pruning" not in html_report(read_report(tmp_path / "report.json"), [])
