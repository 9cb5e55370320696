"""The report in rows and columns, for the end of a run."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from reports import chosen_report, language_report, report_of

from megakd.reports.html import html_report
from megakd.reports.report_file import completed
from megakd.reports.table import asked_rows, result_table


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(row))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_sizes_scores_and_speed_of_each_model() -> None:
    table = result_table(report_of())

    assert cells(table, "teacher") == [
        *("teacher", "22.71M", "10.65M", "90.9", "1.0x"),
        *("80.0%", "90.0%", "85.0%"),
        *("100.0%", "50.00", "1.00x"),
    ]
    assert cells(table, "student") == [
        *("student", "2.09M", "99.97k", "8.4", "10.9x"),
        *("75.0%", "85.0%", "80.0%"),
        *("94.1%", "5.00", "10.00x"),
    ]
    assert cells(table, "alone") == [
        *("alone", "2.09M", "99.97k", "8.4", "10.9x"),
        *("70.0%", "80.0%", "75.0%"),
        *("88.2%", "-", "-"),
    ]


def test_the_table_says_what_was_scored_and_what_it_cost() -> None:
    table = result_table(report_of(), final=Path("runs/quickstart/final"))

    assert table.startswith("single on glue/mrpc, scored on validation")
    assert "1m 18s" in table
    assert "1h 02m" in table
    assert "12,345" in table
    assert "training 1h 03m, peak memory 1.50 GB per rank" in table
    assert "the student is in runs/quickstart/final" in table


def test_of_a_perplexity_the_factor_is_told_and_nothing_is_kept() -> None:
    table = result_table(language_report())

    assert cells(table, "teacher")[5:] == ["8.000", "2.079", "40.0%", "x1.00"]
    assert cells(table, "student")[5:] == ["10.000", "2.303", "40.0%", "x1.25"]
    assert cells(table, "alone")[-1] == "x2.00"
    assert "vs teacher" in table
    assert "kept" not in table
    assert "perplexity, loss: lower is better" in table.splitlines()

    other = result_table(language_report() | {"metric_name": "loss"})
    assert cells(other, "student")[-1] == "+0.224"
    assert cells(other, "teacher")[-1] == "+0.000"


def test_a_teacher_ranked_by_perplexity_shows_its_perplexity() -> None:
    def table(distribution: str, score: float | None) -> str:
        one = {"name": "small", "weight": 1.0, "steps": 4, "score": score}
        return result_table(language_report(pool={"distribution": distribution, "teachers": [one]}))

    # What a teacher is worth is minus its perplexity.
    ranked, unranked = table("dev_score", -12.5), table("uniform", None)

    assert cells(ranked, "taught by")[-1] == "perplexity (validation)"
    assert cells(ranked, "small") == ["small", "1.000", "4", "12.500"]
    assert cells(unranked, "taught by") == ["taught by", "uniform", "steps"]


def test_a_run_without_teacher_or_stages_has_a_table_without_comparison() -> None:
    table = result_table(report_of(teacher=None, speedup=None, stages=[], baselines={}))
    assert table.splitlines()[2].split()[-1] == "mean_accuracy_f1"
    assert "teacher" not in table
    assert "size MB" in table
    assert "smaller" not in table


def test_times_say_their_length_device_and_dtype() -> None:
    note = "ms: median of one forward, 24 tokens per text, float32, on cpu (1 thread)"
    assert note in result_table(chosen_report()).splitlines()
    assert note.removeprefix("ms: ") in html_report(chosen_report(), [])
    assert "ms:" not in result_table(report_of())


def timed(student: list[float], teacher: list[float], **more: object) -> list[dict]:
    """Entries of two models that took turns."""
    series = {"teacher": teacher, "student": student}
    return [
        {"model": n, "batch": 1, "ms": statistics.median(ms), "rounds_ms": ms, "length": 24, **more}
        for n, ms in series.items()
    ]


def test_a_speed_up_is_the_median_of_the_rounds_with_its_range() -> None:
    # One round was disturbed, in which both models were slow; the ratios are 2 to 2.4.
    latency = timed([10, 10, 10, 100, 10], [20, 22, 24, 220, 22])
    table = result_table(report_of(latency=latency, speedup=None))
    assert "2.20x (2.00-2.40)" in table
    assert "speed-up: median and range of the rounds; a range alone is within the noise" in table
    assert "is 2.20x (2.00-2.40) as fast at batch 1" in html_report(report_of(latency=latency), [])


def test_the_headline_is_on_texts_of_the_data_and_the_page_has_the_other_lengths_too() -> None:
    of_data = timed([10] * 5, [30] * 5, lengths=[8, 40])
    report = report_of(latency=[*of_data, *timed([10] * 5, [40] * 5)], speedup=None)

    table, page = result_table(report), html_report(report, [])

    assert cells(table, "student")[-2:] == ["10.00", "3.00x"]
    assert "one forward, texts as long as the held-out ones (24 tokens on average), " in table
    assert "4.00x" not in table
    assert "It has 106.5x fewer parameters without embeddings, is 3.00x as fast at batch 1." in page
    assert ">ms of 24 tokens (batch 1)</th>" in page
    assert ">4.00x</td>" in page


def test_a_size_that_was_asked_for_stands_beside_the_size_that_was_measured() -> None:
    asked = {"what": "speedup", "value": 8.0, "batch": 32, "runtime": "torch"}
    larger = {**report_of()["student"], "asked": {"what": "flops", "value": 0.01}}
    report = report_of(
        latency=timed(student=[2.0] * 5, teacher=[15.8] * 5, batch=32),
        student={**report_of()["student"], "asked": asked},
        sizes=[{"name": "student-0.01", **larger}],
    )

    assert asked_rows(completed(report)) == [
        ["size", "asked", "measured"],
        ["student-0.01", "1.0% of the layers", "0.9%"],
        ["student", "8x at batch 32", "7.90x"],
    ]


@pytest.mark.parametrize(
    ("student", "teacher", "shown"),
    [
        ([10] * 9, [20] * 8 + [900], "2.00x"),  # a disturbed round of nine
        ([20, 10, 20, 20, 12], [33, 33, 33, 15, 33], "0.75-3.30x"),  # below the noise
        ([10, 10, 11], [20, 22, 21], "1.91-2.20x"),  # fewer than five rounds
    ],
)
def test_a_speed_up_within_the_noise_is_a_range_alone(student, teacher, shown) -> None:
    report = report_of(latency=timed(student, teacher), speedup=None)
    assert cells(result_table(report), "student")[-1] == shown
    assert ("as fast" in html_report(report, [])) == ("-" not in shown)


def test_a_decoder_also_has_the_tokens_that_it_generates_in_a_second() -> None:
    forwards = timed([10, 10], [20, 20])
    generation = timed([50, 50], [100, 100], generated=16)
    for entry, rate in zip(generation, (160.0, 320.0), strict=True):
        entry["tokens_per_second"] = rate
    report = report_of(latency=[*forwards, *generation], speedup=None)

    header, _, student = result_table(report).split("\n")[2:5]

    assert re.split(r"  +", header)[-4:] == [
        "ms (batch 1)", "speed-up", "tokens/s (batch 1)", "speed-up",
    ]  # fmt: skip
    assert student.split()[-4:] == ["10.00", "2.00x", "320.00", "2.00x"]
    assert "tokens/s: of the last 16, which are generated" in result_table(report)
    assert "generates 2.00x as fast at batch 1" in html_report(report, [])


def test_an_assistant_stands_between_teacher_and_student() -> None:
    table = result_table(chosen_report())

    header, *rows = table.splitlines()[2:7]
    assert [line.split()[0] for line in rows] == ["teacher", "assistant-1", "student", "alone"]
    assert re.findall(r"ms \(batch \d+\)", header) == ["ms (batch 1)", "ms (batch 32)"]
    assert header.count("speed-up") == 2
    assert cells(table, "assistant-1")[:5] == ["assistant-1", "15.00M", "3.19M", "60.0", "1.5x"]
    assert cells(table, "assistant-1")[-5:] == ["97.6%", "5.00", "2.40x", "101.00", "3.07x"]
    assert cells(table, "alone")[-4:] == ["2.50", "4.80x", "40.00", "7.75x"]
    chosen = [line.split() for line in table.splitlines() if line.endswith("yes")]
    assert [row[1] for row in chosen] == ["0.7", "0.9"]  # the page has the numbers of all


def test_the_cost_of_trying_every_assistant_is_told() -> None:
    report = chosen_report()
    assert "7 trials, about 25m 00s (2.5x)" in html_report(report, [])
    assert (
        "1 trial, 10m 00s; every assistant tried (MaxiDisc): 7 trials, about 25m 00s (2.5x)"
    ) in result_table(report)

    assert report["cost"] is not None
    report["cost"]["seconds"] = 1499.0
    assert "7 trials, about 25m 00s (as long)" in result_table(report)


def test_a_report_of_an_earlier_version_has_a_table_and_a_page() -> None:
    earlier: Any = report_of()
    for key in ("assistants", "latency", "cost", "samples"):
        del earlier[key]
    assert result_table(earlier) == result_table(report_of())
    assert html_report(earlier, []) == html_report(report_of(), [])


def test_a_graph_is_a_row_after_the_student_and_no_dot() -> None:
    report = chosen_report()
    metrics = {"accuracy": 0.74, "mean_accuracy_f1": 0.79}
    report["student"]["onnx"] = {"bytes": 2_190_000, "metrics": metrics}

    table, page = result_table(report), html_report(report, [])

    assert cells(table, "student (onnx)") == [
        *("student (onnx)", "2.09M", "99.97k", "2.2", "10.9x"),
        *("74.0%", "-", "79.0%", "92.9%", "-", "-", "-", "-"),
    ]
    names = [line.split("  ")[0] for line in table.splitlines()[3:8]]
    assert names == ["teacher", "assistant-1", "student", "student (onnx)", "alone"]
    assert re.search(r"student \(onnx\)</th>.*?92\.9%.*?>2\.2<.*?>10\.9x<", page, re.DOTALL)
    legend = re.findall(r'<span class="key \w+"[^>]*></span>(.+?)<', page)
    assert legend[:4] == ["1 teacher", "2 assistant-1", "3 student", "4 alone"]
    assert not [entry for entry in legend if "onnx" in entry]
