"""Warnings that follow from a report's numbers: when, about what, and where they are shown."""

from __future__ import annotations

from typing import Any

import pytest
from reports import candidates, language_report, report_of

from megakd.contract.results import Report
from megakd.reports.derived_warnings import derived_warnings
from megakd.reports.history import panels
from megakd.reports.html import html_report
from megakd.reports.table import result_table


def scored(value: float, **more: Any) -> dict[str, Any]:
    sizes = {"parameters": 10, "encoder_parameters": 5}
    return {**sizes, "metrics": {"accuracy": value}, **more}


def labels(*recalls: float, rows: int = 20) -> dict[str, Any]:
    return {
        "per_class": [
            {"label": f"l{n}", "precision": 1.0, "recall": recall, "f1": 0.5, "rows": rows}
            for n, recall in enumerate(recalls)
        ]
    }


def classified(student: float = 0.7, teacher: float = 0.8, **changes: Any) -> Report:
    both = {"student": scored(student), "teacher": scored(teacher)}
    return report_of(**{"metric_name": "accuracy", "baselines": {}, **both, **changes})


def tried(*metrics: float, name: str = "accuracy", shape: str = "") -> list[dict[str, Any]]:
    named = {"metric_name": name, **({"shape": shape} if shape else {})}
    some = zip(candidates(), metrics, strict=False)
    return [{**one, "metric": metric, **named} for one, metric in some]


def evaluated(*values: float, metric: str = "accuracy") -> list[dict[str, Any]]:
    return [
        {"stage": "teacher-finetune", "step": 10 * n, f"eval/{metric}": value}
        for n, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("report", "kind", "text"),
    [
        (
            classified() | {"student": scored(0.7, **labels(0.9, 0.0, 0.0))},
            "label",
            "student: no row is recognised of l1 (20 rows), l2 (20 rows); look for wrong labels",
        ),
        (classified() | {"teacher": scored(0.8, **labels(0.0, 1.0))}, "label", "teacher: no"),
        (classified() | {"student": scored(0.7, **labels(*[0.0] * 8))}, "label", " and 3 more; "),
        (
            classified(baselines={"alone": {"accuracy": 0.72}, "direct": {"accuracy": 0.7}}),
            "baseline",
            "the baseline alone scores 72.0% accuracy, the student 70.0%; repeat both",
        ),
        (
            language_report() | {"baselines": {"alone": {"perplexity": 9.0}}},
            "baseline",
            "alone scores 9.000 perplexity, the student 10.000",
        ),
        (
            classified(0.81),
            "above teacher",
            "the student is above its teacher (81.0% and 80.0% accuracy): the teacher has learnt",
        ),
        (
            classified() | {"student": scored(0.84, agreement=0.9, **labels(*[0.8] * 15))},
            "above teacher",
            "the student is above its teacher (84.0% and 80.0% accuracy)",
        ),
        (
            classified(candidates=tried(0.6, 0.4, 0.3))
            | {"student": scored(0.7, **labels(1.0, 1.0))},
            "chance",
            "candidates no better than chance (50.0%): 0.7 (40.0%), 0.8 (30.0%); they have learnt",
        ),
        (
            classified(candidates=tried(0.2, shape="2 x 8"))
            | {"student": scored(0.7, **labels(*[1.0] * 4))},
            "chance",
            "chance (25.0%): 2 x 8 (20.0%)",
        ),
        (
            classified(candidates=tried(0.3, -0.1, name="matthews_correlation"))
            | {"student": scored(0.7, **labels(1.0, 1.0))},
            "chance",
            "chance (0.0%): 0.7 (-10.0%)",
        ),
    ],
)
def test_a_warning_names_its_numbers_and_what_to_do(report, kind, text):
    (result,) = derived_warnings(report, {})

    assert result["kind"] == kind
    assert text in result["message"]
    assert "\n" not in result["message"]


@pytest.mark.parametrize(
    "report",
    [
        classified(),
        report_of(teacher=None),
        language_report() | {"baselines": {"alone": {"perplexity": 11.0}}},
        classified(baselines={"alone": {"accuracy": 0.7}, "broken": {"accuracy": None}}),
        classified(0.8, 0.8),
        # The two differ on 30 of 300 rows, of which 18 speak for the student.
        classified() | {"student": scored(0.82, agreement=0.9, **labels(*[0.8] * 15))},
        classified() | {"student": scored(0.7, **labels(0.0, 1.0, rows=4))},
        classified(candidates=tried(0.6)) | {"student": scored(0.7, **labels(1.0, 1.0))},
        language_report(candidates=tried(-9.0)),
        # Divergences from the teacher, and the F1 of a rare label.
        *(
            classified(candidates=tried(0.1, name=name))
            | {"student": scored(0.7, **labels(1.0, 1.0))}
            for name in ("soft_target_kl", "f1")
        ),
    ],
)
def test_a_run_as_it_should_be_has_no_warning(report):
    assert derived_warnings(report, {}) == []


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
    report = classified() if metric == "accuracy" else language_report() | {"baselines": {}}

    result = derived_warnings(report, panels(evaluated(*values, metric=metric)))

    assert [one["kind"] for one in result] == ["rising teacher"] * warned
    if metric == "accuracy" and warned:
        text = "teacher-finetune still rises: 60.0% accuracy at step 20, 65.0% at step 30"
        assert text in result[0]["message"]


def test_of_a_majority_the_accuracy_is_chance_and_other_metrics_are_not():
    classes = labels(1.0, 1.0)
    classes["per_class"][0]["rows"] = 60  # of 80
    report = classified(candidates=tried(0.7)) | {"student": scored(0.8, **classes)}

    assert "chance (75.0%)" in derived_warnings(report, {})[0]["message"]
    other = {"candidates": tried(0.7, name="f1_macro")}
    assert derived_warnings({**report, **other}, {}) == []
    # The labels of the test rows say nothing of the validation rows that candidates are scored on.
    assert derived_warnings({**report, "evaluated_on": "test"}, {}) == []


def test_warnings_end_the_table_and_begin_the_page():
    report = classified(0.81)
    report["warnings"] = derived_warnings(report, {})

    message = report["warnings"][0]["message"]
    assert result_table(report).splitlines()[-1] == f"warning: {message}"
    assert f'<p class="warning">{message}</p>' in html_report(report, [])
