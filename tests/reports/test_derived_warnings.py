"""Warnings that follow from a report's numbers: when, about what, and where they are shown."""

from __future__ import annotations

import math
from typing import Any

import pytest
from reports import candidates, entries, language_report, report_of

from megakd.reports.html import html_report
from megakd.reports.report_file import derived_warnings
from megakd.reports.table import result_table
from megakd.training.record import Report


def labels(*recalls: float, rows: int = 20) -> dict[str, Any]:
    """The keys of a student with these labels."""
    return {
        "rows": max(100, rows * len(recalls)),
        "student.per_class": [
            {"label": f"l{n}", "precision": 1.0, "recall": recall, "f1": 0.5, "rows": rows}
            for n, recall in enumerate(recalls)
        ],
    }


def classified(student: float = 0.7, teacher: float = 0.8, **changes: Any) -> Report:
    scores = {"student__accuracy": student, "teacher__accuracy": teacher}
    return report_of(**{"metric_name": "accuracy", "baselines": [], **scores, **changes})


def beside(name: str, **scores: float | None) -> dict[str, Any]:
    return {"baselines": [name], **entries(name, scores)}


def tried(*metrics: float, name: str = "accuracy") -> dict[str, Any]:
    some = zip(candidates(), metrics, strict=False)
    return {"candidates": [{**one, "metric": metric, "metric_name": name} for one, metric in some]}


REPEAT = "the baseline alone scores {}% accuracy, the student 70.0%; repeat both"


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            classified() | labels(0.9, 0.0, 0.0),
            "student: no row is recognised of l1 (20 rows), l2 (20 rows); look for wrong labels",
        ),
        (
            classified() | {"teacher.per_class": labels(0.0, 1.0)["student.per_class"]},
            "teacher: no row is recognised of l0",
        ),
        (classified() | labels(*[0.0] * 8), " and 3 more; "),
        (
            classified(student__loss=0.6931, loss_of_guessing=math.log(2)),
            "student: the loss 0.693 is not below 0.693, that of guessing: it has learnt nothing",
        ),
        (
            language_report(teacher__loss=3.1, loss_of_guessing=math.log(20)),
            "teacher: the loss 3.100 is not below 2.996, that of guessing",
        ),
        (classified(student__threshold=0.4), "the threshold was chosen on the rows that are"),
        (classified(rows=99), "only 99 rows were scored, fewer than 100: small differences"),
        (
            classified(student__calibration_error=0.201),
            "student: the calibration error is 20.1%: do not use its probabilities as such",
        ),
        (classified() | beside("alone", accuracy=0.72), REPEAT.format(72.0)),
        (classified() | beside("alone", accuracy=0.75) | labels(*[0.8] * 100), REPEAT.format(75.0)),
        (
            language_report() | beside("alone", perplexity=9.0),
            "alone scores 9.000 perplexity, the student 10.000",
        ),
        (  # two standard errors of the loss are 8 % of a perplexity
            language_report() | beside("alone", perplexity=9.0, loss_difference_error=0.04),
            "alone scores 9.000 perplexity, the student 10.000",
        ),
        (
            language_report(teacher__perplexity=11.0, teacher__loss_difference_error=0.04),
            "the student is above its teacher (10.000 and 11.000 perplexity)",
        ),
        (
            classified(0.81),
            "the student is above its teacher (81.0% and 80.0% accuracy): the teacher has learnt",
        ),
        (
            classified(0.84, student__agreement=0.9) | labels(*[0.8] * 15),
            "the student is above its teacher (84.0% and 80.0% accuracy)",
        ),
        (
            classified() | labels(1.0, 1.0) | tried(0.6, 0.4, 0.3),
            "candidates no better than chance (50.0%): 0.7 (40.0%), 0.8 (30.0%); they have learnt",
        ),
        (classified() | labels(*[1.0] * 4) | tried(0.2), "(25.0%): 0.5 (20.0%)"),
        (
            classified() | labels(1.0, 1.0) | tried(0.3, -0.1, name="matthews_correlation"),
            "chance (0.0%): 0.7 (-10.0%)",
        ),
    ],
)
def test_a_warning_names_its_numbers_ends_the_table_and_begins_the_page(report, text):
    (message,) = derived_warnings(report, [])

    assert text in message
    assert "\n" not in message
    shown = {**report, "warnings": [message]}
    assert result_table(shown).splitlines()[-1] == f"warning: {message}"


def test_a_warning_begins_the_page():
    assert '<p class="warning">a warning</p>' in html_report(classified(warnings=["a warning"]), [])


@pytest.mark.parametrize(
    "report",
    [
        classified(),
        classified(teacher=None),
        language_report(),
        classified() | beside("broken", accuracy=None),
        classified() | beside("alone", accuracy=0.7),
        # Of 200 rows, five points are within two standard errors.
        classified() | beside("alone", accuracy=0.75) | labels(*[0.8] * 10),
        classified(0.8, 0.8),
        # The two differ on 30 of 300 rows, of which 18 speak for the student.
        classified(0.82, student__agreement=0.9) | labels(*[0.8] * 15),
        classified() | labels(0.0, 1.0, rows=4),
        classified() | labels(1.0, 1.0) | tried(0.6),
        language_report() | tried(-9.0),
        language_report() | beside("alone", perplexity=9.0, loss_difference_error=0.06),
        language_report(teacher__perplexity=11.0, teacher__loss_difference_error=0.06),
        # Divergences from the teacher, and the F1 of a rare label.
        *(classified() | labels(1.0, 1.0) | tried(0.1, name=n) for n in ("soft_target_kl", "f1")),
        classified(student__loss=0.69, loss_of_guessing=0.6931, student__calibration_error=0.2),
        classified(student__loss=0.01, loss_of_guessing=0.0),  # rows of one label
        classified(student__threshold=0.4, evaluated_on="test", rows=100),
    ],
)
def test_a_run_as_it_should_be_has_no_warning(report):
    assert derived_warnings(report, []) == []


@pytest.mark.parametrize(
    ("values", "metric", "warned"),
    [
        ((0.5, 0.6, 0.65), "accuracy", True),
        ((0.5, 0.6, 0.605), "accuracy", False),  # by less than noise
        ((0.5, 0.7, 0.6, 0.65), "accuracy", False),  # not its best
        ((0.5, 0.8, 0.6, 0.805), "accuracy", False),  # its best by less than noise
        ((0.65,), "accuracy", False),
        ((12.0, 10.0), "perplexity", True),
        ((10.0, 12.0), "perplexity", False),
        ((10.0, 9.95), "perplexity", False),
    ],
)
def test_a_teacher_that_still_rises_is_told(values, metric, warned):
    report = classified() if metric == "accuracy" else language_report()
    steps = enumerate(values, 1)
    scored = [{"stage": "teacher-finetune", "step": 10 * n, f"eval/{metric}": v} for n, v in steps]

    result = derived_warnings(report, scored)

    assert len(result) == warned
    if metric == "accuracy" and warned:
        text = "teacher-finetune still rises: 60.0% accuracy at step 20, 65.0% at step 30"
        assert text in result[0]


def test_of_a_majority_the_accuracy_is_chance_and_other_metrics_are_not():
    report = classified(0.8) | labels(1.0, 1.0) | tried(0.7)
    report["student.per_class"][0]["rows"] = 60  # of 80

    assert "chance (75.0%)" in derived_warnings({**report, "teacher.accuracy": 0.9}, [])[0]
    assert derived_warnings(report | tried(0.7, name="f1_macro"), []) == []
    # The labels of the test rows say nothing of the validation rows that candidates are scored on.
    assert derived_warnings({**report, "evaluated_on": "test"}, []) == []
