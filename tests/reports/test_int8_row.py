"""The student's int8 weights in the table, on the page, and in no chart."""

from __future__ import annotations

import re
from typing import Any

from reports import chosen_report, report_of

from megakd.reports.html import html_report
from megakd.reports.table import result_table


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(row))
    return re.split(r"\s{2,}", line.strip())


def test_int8_weights_are_a_row_after_the_student() -> None:
    report = report_of()
    int8: Any = {"bytes": 2_190_000, "metrics": {"accuracy": 0.74, "mean_accuracy_f1": 0.79}}
    report["student"]["int8"] = int8

    table = result_table(report)

    assert cells(table, "student (int8)") == [
        *("student (int8)", "2.09M", "99.97k", "2.2", "10.9x"),
        *("74.0%", "-", "79.0%", "92.9%", "-", "-"),
    ]
    names = [line.split("  ")[0] for line in table.splitlines()[3:7]]
    assert names == ["teacher", "student", "student (int8)", "alone"]


def test_int8_weights_are_a_row_of_the_table_and_no_dot() -> None:
    report = chosen_report()
    report["student"]["int8"] = {"bytes": 2_190_000, "metrics": {"mean_accuracy_f1": 0.79}}

    text = html_report(report, [])

    assert re.search(r"student \(int8\)</th>.*?92\.9%.*?>2\.2<.*?>10\.9x<", text, re.DOTALL)
    legend = re.findall(r'<span class="key \w+"[^>]*></span>(.+?)<', text)
    assert legend[:4] == ["1 teacher", "2 assistant-1", "3 student", "4 alone"]
    assert not [entry for entry in legend if "int8" in entry]
