"""The report of a student that is pruned while it learns: charts and tables."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from html_page import Page
from reports import FACTS, language_report, report_of

from megakd.reports.card import model_card
from megakd.reports.curves import pruning_section
from megakd.reports.html import html_report
from megakd.reports.quantities import step_time
from megakd.reports.table import result_table

HUGE = 1e308


def row(step: float, kl: float | None = 0.5, seconds: float | None = 0.2, **changes: Any) -> Any:
    size = {"width": 100 - step, "parameters": 20_000_000 - 100_000 * step}
    return {"step": step, **size, "teacher_kl": kl, "step_seconds": seconds, **changes}


ROWS = [row(10, 0.1, 0.4), row(20, 0.15, None), row(30, 0.4, 0.25), row(40, 0.3, 0.2)]


def section_of(text: str) -> str:
    return text.partition("<h2>Pruning</h2>")[2].partition("</section>")[0]


def block(table: str) -> list[list[str]]:
    lines = next(part for part in table.split("\n\n") if part.startswith("pruned")).splitlines()
    return [re.split(r"\s{2,}", line) for line in lines]


def test_rows_are_ordered_by_step_and_the_last_row_of_a_step_counts() -> None:
    mixed = pruning_section(report_of(pruning=[ROWS[2], row(10, 9.0), ROWS[3], *ROWS[:2]]))
    ordered = pruning_section(report_of(pruning=ROWS))

    assert mixed is not None
    assert ordered is not None
    assert mixed.numbers == ordered.numbers


def test_a_single_evaluation_is_a_table_without_a_chart() -> None:
    text = html_report(report_of(pruning=[row(10)]), [])

    assert "<svg" not in section_of(text)
    assert ["10", "90", "19.00M", "0.5000", "200.0 ms"] in [cells for _, cells in Page(text).rows]


@pytest.mark.parametrize("missing", [None, -math.inf, HUGE])
def test_values_that_cannot_be_drawn_are_left_out_and_charts_of_none_too(missing) -> None:
    text = html_report(report_of(pruning=[row(step, missing, missing) for step in (10, 20)]), [])
    some = pruning_section(report_of(pruning=[*ROWS, row(50, missing, missing)]))

    assert Page(text).faults == []
    assert re.findall('class="name">(.*?)<', section_of(text)) == ["parameters of the student"]
    assert some is not None
    assert [len(chart.lines[0].points) for chart in some.charts] == [4, 5, 3]
    assert "Evaluations without a value are left out." in some.caption


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, 0.0, 0.0, parameters=0, width=0), row(1, 0.0, 0.0, parameters=0, width=0)],
        [row(1, 1e-310), row(2, -1e-310)],
        [row(2**53 - 1, 1e300), row(2**53, -1e300)],
        [row(0.5, parameters=10**299), row(0.75, parameters=1), row(1e200)],
    ],
    ids=["zeros", "tiny", "huge and late", "fractions of steps, many parameters"],
)
def test_extreme_numbers_have_a_page_and_a_table(rows: list[Any]) -> None:
    report = report_of(pruning=rows)
    text = html_report(report, [])
    assert Page(text).faults == []
    assert len(re.findall("<svg", section_of(text))) == 3
    assert not re.search(r"\b(nan|inf)\b", section_of(text) + result_table(report))


def test_thousands_of_evaluations_stay_small() -> None:
    rows = [row(step, width=8, parameters=9) for step in range(1, 20_001)]

    text = html_report(report_of(pruning=rows), [])

    assert len(text.encode()) < 60_000
    assert "15 of 20,000 evaluations" in text
    assert "lowest and highest value of each stretch" in text
    assert len(block(result_table(report_of(pruning=rows)))) == 7


def test_a_method_that_does_not_prune_during_training_has_no_section() -> None:
    report = report_of(pruning=[])
    assert "Pruning" not in Page(html_report(report, [])).headings
    assert result_table(report) == result_table(report_of())
    assert "was pruned" not in model_card(FACTS, report)


@pytest.mark.parametrize(
    ("number", "steps"),
    [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (7, [1, 2, 3, 4, 5, 7]), (51, [1, 11, 21, 31, 41, 51])],
)
def test_the_table_of_a_run_has_up_to_six_rows_with_the_first_and_the_last(number, steps):
    rows = [row(step, width=9) for step in range(1, number)]
    last = row(number, None, None, width=1024, parameters=5_339)

    titles, *shown = block(result_table(report_of(pruning=[*rows, last])))

    assert titles == ["pruned, step", "width", "parameters", "KL (nats)", "step time"]
    assert [int(cells[0]) for cells in shown] == steps
    assert shown[-1][1:] == ["1,024", "5.34k", "-", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (math.nan, "-"), (math.inf, "-"), (0.0, "0.0 ms"), (0.25, "250.0 ms"),
     (1.0, "1.00 s"), (75.0, "1m 15s")],
)  # fmt: skip
def test_a_step_time_has_a_unit_of_its_size(seconds: float | None, text: str) -> None:
    assert step_time(seconds) == text


def test_the_model_card_says_that_the_student_was_pruned_from_its_teacher() -> None:
    alone = model_card(FACTS, report_of(pruning=ROWS, teacher=None))
    assert "from 19.00M to 2.09M parameters" in alone
    card = model_card(FACTS, language_report(pruning=ROWS))
    line = "from 22.71M to 2.09M parameters."
    assert f"\n\nThe student was pruned from its teacher during distillation, {line}\n\n" in card
    assert "pruned, step" in card
