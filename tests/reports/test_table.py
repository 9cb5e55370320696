"""The report in rows and columns, for the end of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from reports import chosen_report, entries, language_report, report_of, timed

from megakd.reports.report_file import standard_errors
from megakd.reports.table import duration, result_sentence, result_table, short_count


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(row))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_sizes_scores_and_speed_of_each_model():
    table = result_table(chosen_report())

    assert cells(table, "teacher") == [
        *("teacher", "22.71M", "10.65M", "-", "1.0x", "80.0%", "90.0%", "85.0%", "100.0%"),
        *("12.00", "1.00x", "310.00", "1.00x"),
    ]
    assert cells(table, "assistant-1")[:5] == ["assistant-1", "15.00M", "3.19M", "60.0", "1.5x"]
    assert cells(table, "student") == [
        *("student", "2.09M", "99.97k", "8.4", "10.9x", "75.0%", "85.0%", "80.0%", "94.1%"),
        *("2.00", "6.00x (5.50-6.50)", "31.00", "10.00x (9.50-10.50)"),
    ]
    assert cells(table, "alone")[4:] == [
        *("10.9x", "70.0%", "80.0%", "75.0%", "88.2%", "-", "-", "-", "-")
    ]
    assert re.findall(r"ms \(batch \d+\)", table) == ["ms (batch 1)", "ms (batch 32)"]
    note = "ms: median of one forward, texts of 24 tokens on average, float32, on cpu (1 thread)"
    assert note in table


def test_the_table_says_what_was_scored_what_it_cost_and_where_the_student_is():
    table = result_table(chosen_report(), final=Path("runs/quickstart/final"))

    assert table.startswith("minidisc on glue/mrpc, scored on validation\n")
    tested = result_table(chosen_report(evaluated_on="test"))
    assert "mrpc, scored on test; the log has the validation rows\n" in tested
    assert cells(table, "student ")[0] == "student"
    assert re.search(r"student +1,200 +1h 02m +12,345 +0\.90 GB", table)
    assert "training 1h 03m in 2 stages, peak memory 1.50 GB per rank" in table
    assert "the student is in runs/quickstart/final" in table
    seconds = {"start": 9.0, "data": 2.0, "training": 100.0, "latency": 4.5}
    timed = chosen_report(**{f"seconds__{name}": value for name, value in seconds.items()})
    assert "beside training 15.5s: start 9.0s, data 2.0s, latency 4.5s" in result_table(timed)


def test_of_a_teacher_that_has_learnt_too_little_no_share_is_kept():
    table = result_table(report_of(student__mean_accuracy_f1=0.9, teacher__mean_accuracy_f1=0.6))

    assert "above" in cells(table, "student ")


def test_of_a_perplexity_the_factor_is_told_and_nothing_is_kept():
    table = result_table(language_report())

    assert cells(table, "teacher")[5:] == ["8.000", "2.079", "40.0%", "x1.00"]
    assert cells(table, "student")[5:] == ["10.000", "2.303", "40.0%", "x1.25"]
    assert cells(table, "alone")[-1] == "x2.00"
    assert "vs teacher" in table
    assert "kept" not in table
    assert "perplexity, loss: lower is better" in table.splitlines()

    other = result_table(language_report() | {"metric_name": "loss"})
    assert cells(other, "student")[-1] == "+0.224"


def test_a_run_without_teacher_or_stages_has_a_table_without_comparison():
    report = report_of(stages=[], models=["student"], teachers=[], baselines=[])
    report = {key: value for key, value in report.items() if not key.startswith("teacher.")}

    table = result_table(report)

    assert table.splitlines()[2].split()[-1] == "mean_accuracy_f1"
    assert "teacher" not in table
    assert "smaller" not in table


@pytest.mark.parametrize(
    ("rounds", "low", "shown"),
    [(9, 5.5, "10.00x (5.50-6.50)"), (9, 0.9, "0.90-6.50x"), (4, 5.5, "5.50-6.50x")],
    ids=["clear", "within the noise", "too few rounds"],
)
def test_a_speed_up_within_the_noise_is_a_range_alone(rounds, low, shown):
    key = "student.speedup_batch_32"
    report = report_of(**timed(rounds)) | {f"{key}_low": low, f"{key}_high": 6.5}

    assert cells(result_table(report), "student")[-1] == shown


@pytest.mark.parametrize(
    ("what", "value", "text"),
    [
        ("parameters", 2_100_000, "have 2,100,000 weights"),
        ("flops", 0.01, "have 1.0% of the operations in the teacher's layers"),
        ("speedup", 9.0, "have a speed-up of 9x at the largest batch"),
    ],
)
def test_the_size_that_was_asked_for_and_what_was_cut_stand_below_the_table(what, value, text):
    parts = "layers 4, 5, 6 of 6 · 12 heads · 256 of 1536 neurons"
    lines = result_table(report_of(asked__what=what, asked__value=value, student__parts=parts))

    assert f"the student was asked to {text}" in lines.splitlines()
    assert f"student: {parts} of its teacher · 2.09M weights" in lines.splitlines()


def test_the_first_sentence_compares_the_student_with_its_teacher_in_the_same_form():
    graphs = {
        **entries("student_int8", {"accuracy": 0.765, "bytes": 13_532_470, "ms_batch_1": 1.25}),
        **entries("student_int8", {"accuracy_standard_error": 0.013}),
        **entries("teacher_int8", {"accuracy": 0.77, "bytes": 27_000_000, "ms_batch_1": 7.5}),
    }
    models = ["teacher", "student", "student_int8"]
    keys = {"metric_name": "accuracy", "batches": [1], **graphs}

    alone = result_sentence(report_of(models=models, **keys))
    both = result_sentence(report_of(models=[*models, "teacher_int8"], **keys))

    assert both == (
        "The student: accuracy 76.5% ±1.3%, 13.5 MB, 1.2 ms a text: 6.0 times as fast as and 2.0 "
        "times smaller than its teacher, both in int8."
    )
    size = report_of()["student.bytes"] / 1e6
    assert alone == f"The student: accuracy 75.0%, {size:.1f} MB."
    assert result_sentence(report_of(student__mean_accuracy_f1=None)) == ""


def test_shares_of_rows_have_their_standard_errors():
    sets = [{"set": "s", "model": "student", "rows": 9, "accuracy": 0.5}]
    sets[0] |= standard_errors(sets[0], 9)
    student = {"accuracy": 0.75, "f1": 0.85}
    scores = standard_errors(entries("student", student), 300)

    table = result_table(report_of(**scores, rows=300, evaluation_sets=sets))

    assert scores == {"student.accuracy_standard_error": 0.025}
    assert cells(table, "student")[5:9] == ["75.0% ±2.5%", "85.0%", "80.0%", "94.1%"]
    assert "±: standard error of a share of the 300 scored rows" in table
    assert re.search(r"^s +student +9 +0\.5000 ±0\.1667$", table, re.MULTILINE)


def test_a_classifier_has_its_scores_by_label():
    classes = [
        {"label": label, "precision": 0.9, "recall": recall, "f1": 0.79, "rows": 40}
        for label, recall in (("late", 0.7), ("lost", 1.0))
    ]
    student: dict[str, Any] = {"agreement": 0.931, "calibration_error": 0.034}
    few, many = (
        result_table(report_of(**entries("student", {**student, "per_class": classes * times})))
        for times in (1, 4)
    )

    assert re.search(r"^Scores by label\nlabel +precision +recall +f1 +rows$", few, re.MULTILINE)
    assert re.search(r"^late +0\.9000 +0\.7000 +0\.7900 +40$", few, re.MULTILINE)
    assert "student and teacher agree on 93.1% of the rows" in few
    assert "expected calibration error: student 3.4%" in few
    assert "by label" not in many


def test_the_choices_of_a_method_are_tables_of_what_their_rows_have():
    taught = [{"name": "small", "weight": 0.25, "steps": 1200, "rows": None, "score": -12.5}]
    course = [
        {"step": s, "width": 640, "parameters": 81_230_144, "teacher_kl": kl}
        for s, kl in ((0, None), *((step, 0.041) for step in range(20, 501, 20)))
    ]
    table = result_table(
        language_report(
            pool=taught, pruning=course
        )
    )  # fmt: skip

    assert "Who taught\nname   weight  steps  score\n" in table
    assert cells(table, "small") == ["small", "0.2500", "1,200", "-12.5"]
    assert cells(table, "500 ") == ["500", "640", "81.23M", "0.0410"]
    assert cells(table, "0 ")[3] == "-"
    # Of 26 rows over the steps, as many as a reader compares, with both ends.
    assert len(re.findall(r"^\d+ +640 ", table, re.MULTILINE)) == 12
    chosen = [x.split() for x in result_table(chosen_report()).splitlines() if x.endswith("yes")]
    assert [row[:2] for row in chosen] == [["1", "0.7"], ["2", "0.9"]]


def test_named_sets_and_generated_texts_have_their_scores():
    stage = {**report_of()["stages"][0], "match": 0.41, "text_tokens": 118.2, "text_truncated": 0.1}
    mine = {"set": "mine", "model": "student", "rows": 40, "accuracy": 0.5, "f1": None}
    table = result_table(report_of(stages=[stage], evaluation_sets=[mine]))

    assert cells(table, "mine") == ["mine", "student", "40", "0.5000"]
    assert cells(table, "name ")[4:] == ["peak memory bytes", "match", "tokens", "truncated"]
    assert re.search(r"1\.50 GB +0\.4100 +118\.2 +0\.1000$", table, re.MULTILINE)


def test_numbers_have_units():
    counts = [short_count(n) for n in (0, 999, 999_999, 22_713_984)]

    assert counts == ["0", "999", "1.00M", "22.71M"]
    assert [duration(s) for s in (0.38, 2.0, 75.0, 3725)] == ["380 ms", "2.0s", "1m 15s", "1h 02m"]
