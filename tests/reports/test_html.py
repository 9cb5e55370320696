"""report.html: it says what the report says, and asks nothing of the outside."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from reports import SCORES, TRADEOFF, chosen_report, entries, language_report, report_of

from megakd import cli
from megakd.errors import CheckpointError
from megakd.reports.html import html_report, write_html_report
from megakd.reports.report_file import write_report
from megakd.run import finished_run

CONFIG = "method: {name: minidisc}\n"
STAGES = ("teacher", "student")


def history(steps: int = 40, every: int = 10) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for stage in STAGES:
        for step in range(every, steps + 1, every):
            place = {"stage": stage, "step": step, "time": 1.0}
            losses = {"train/loss": 9 / step, "train/hidden_mse": 5 / step}
            views = {f"eval/sparsity-{s}/f1": 0.9 - s / step for s in (0.5, 0.9)}
            lines += [{**place, **losses}, {**place, "eval/f1": 0.8, **views}]
    return lines


@pytest.fixture(scope="module")
def text() -> str:
    return html_report(chosen_report(), history(), config=CONFIG)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_is_well_formed_and_loads_nothing(text, page):
    assert page.faults == []
    assert page.outside == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(page.labels)
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert text == html_report(chosen_report(), history(), config=CONFIG)


def test_every_model_and_candidate_is_in_a_table_and_the_chosen_ones_are_marked(page):
    rows = [cells for _, cells in page.rows]
    marked = [cells for kind, cells in page.rows if kind == "chosen"]

    assert [row[0] for row in rows[1:5]] == ["teacher", "assistant-1", "student", "alone"]
    for iteration, scores in SCORES.items():
        for sparsity, metric in scores.items():
            weighed = [f"{metric:.4f}", f"{metric + TRADEOFF * sparsity:.4f}"]
            result = [r for r in rows if r[:2] == [str(iteration), f"{sparsity:g}"]]
            assert [row[4:6] for row in result] == [weighed]
    assert [(r[0], r[1]) for r in marked] == [("1", "0.7"), ("2", "0.9")]


def test_the_figures_show_sizes_candidates_and_every_stage(text, page):
    assert page.labels == [
        "mean_accuracy_f1 against sizes",
        "candidates",
        *(f"{stage}: losses and evaluations over the steps" for stage in STAGES),
    ]
    for words in ("parameters without embeddings", "ms (batch 32)", "trade-off", "eval: f1"):
        assert f">{words}</text>" in text
    assert text.count(">sparsity-0.9</text>") == len(STAGES)
    # A term of the loss is in metrics.jsonl.
    assert "hidden mse" not in text


def test_a_stage_is_explained_once_where_the_page_first_names_it():
    meanings = {
        "teacher-finetune": "trained before it teaches",
        "trial-1": "candidates learn together",
        "alone": "learns without a <teacher>",
        "student": "",
    }
    stages = [{"name": name, "meaning": text, "steps": 3} for name, text in meanings.items()]
    models = ["teacher", "trial-1", "student", "alone"]

    text = html_report(report_of(models=models, stages=stages), [])

    beneath, below = (text.index(f"<dt>{name}</dt>") for name in ("trial-1", "teacher-finetune"))
    assert text.index("<tbody>") < beneath < text.index("<h2>Stages</h2>") < below
    assert below < text.index('<th scope="row">teacher-finetune</th>')
    assert "<dd>learns without a &lt;teacher&gt;</dd>" in text
    assert text.count("<dt>") == 3
    assert "<dt>student</dt>" not in text
    assert Page(text).faults == []


def test_a_report_of_before_has_no_meanings():
    assert "<dt>" not in html_report(report_of(), [])


def test_a_classifier_has_a_picture_of_its_confusions():
    classes = [{"label": x, "precision": 1, "recall": 1, "f1": 1, "rows": 7} for x in ("a", "b$1$")]
    pairs = [{"label": "a", "predicted": "b$1$", "rows": 7}]
    keys = entries("student", {"per_class": classes, "confusion": pairs})

    text = html_report(report_of(**keys), [])

    assert "confusions" in Page(text).labels
    assert text.count(">b$1$</text>") == 2
    assert ">7</text>" in text


def test_the_worst_labels_stand_first_and_the_rest_is_folded():
    scores = [n * 7 % 13 / 13 for n in range(13)]
    classes = [{"label": f"l{n}", "f1": f1, "rows": 7} for n, f1 in enumerate(scores)]

    text = html_report(report_of(**entries("student", {"per_class": classes})), [])

    shown, _, folded = text.partition("<summary>3 more labels</summary>")
    order = sorted(range(13), key=scores.__getitem__)
    labels = [re.findall(r'<th scope="row">(l\d+)</th>', part) for part in (shown, folded)]
    assert labels == [[f"l{n}" for n in part] for part in (order[:10], order[10:])]
    assert "<strong>The student: " in shown


def test_a_baseline_without_a_size_is_a_line_of_its_score():
    keys = {
        **entries("tfidf", {"mean_accuracy_f1": 0.71}),
        "models": ["teacher", "student", "tfidf"],
    }

    text = html_report(report_of(**keys), [])

    assert text.count(">tfidf</text>") == 1


def test_text_of_others_is_escaped_everywhere():
    bad = "<script>$x_1$ & \"q\" 'p'"
    report = chosen_report(task=bad, environment__python=bad, warnings=[bad])
    report["models"] = [*report["models"], bad]
    report |= entries(bad, {"parameters": 5, "encoder_parameters": 5, "mean_accuracy_f1": 0.5})
    report["stages"][0]["name"] = bad
    lines = [{"stage": bad, "step": s, f"train/{bad}": s, f"eval/{bad}/f1": s} for s in (1, 2)]

    text = html_report(report, lines, config=bad)

    assert Page(text).faults == []
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8


@pytest.mark.parametrize("values", [[], [2.0], [None, None, math.nan]])
def test_without_a_curve_there_is_no_picture_of_training(values):
    lines = [{"stage": "student", "step": s, "train/loss": v} for s, v in enumerate(values)]

    actual = Page(html_report(report_of(), lines))

    assert actual.headings == ["single on glue/mrpc", "Stages", "Environment"]
    assert len(actual.labels) == 1


def test_what_is_missing_or_not_finite_has_no_picture_and_no_number():
    report = report_of(stages=[], models=["student"], teachers=[], baselines=[])
    report = {k: v for k, v in report.items() if not k.startswith(("teacher.", "alone."))}

    result = Page(html_report({**report, "student.mean_accuracy_f1": None}, [], config="seed: 7\n"))

    assert (result.faults, result.labels) == ([], [])
    assert result.headings[-2:] == ["Environment", "Config"]
    report = chosen_report()
    for row in report["candidates"]:  # a run that was killed before the choice
        row["chosen"] = False
    assert "candidates" in Page(html_report(report, [])).labels
    report = chosen_report()
    for row in report["candidates"]:
        row |= {"metric": math.nan, "tradeoff": math.nan}
    result = Page(html_report(report, []))
    assert "candidates" not in result.labels
    assert ["1", "0.7", "3.00M", "accuracy", "-", "-", "yes"] in [cells for _, cells in result.rows]


def test_a_long_history_of_many_stages_stays_small():
    stages = [{**report_of()["stages"][0], "name": f"trial-{n}"} for n in range(10)]
    lines = (
        {"stage": f"trial-{step % 10}", "step": step, "train/loss": math.sin(step) + 2}
        for step in range(1, 40_001)
    )

    assert len(html_report(report_of(stages=stages), lines).encode()) < 280_000


def test_samples_of_the_models_stand_side_by_side():
    report = language_report()
    both = {"prompt": "a\nb", "teacher": "<c>\n\n", "student": "d"}
    report["samples"] = [both, {"prompt": "a", "teacher": None, "student": "e"}]

    text = html_report(report, [])

    assert "Samples" in Page(text).headings
    assert "<strong>a↵ b</strong>" in text
    assert "<p>&lt;c&gt;↵ ↵ </p>" in text
    assert (text.count(">teacher</p>"), text.count(">student</p>")) == (1, 2)


def folder_of(tmp_path: Path) -> Path:
    write_report(tmp_path / "report.json", report_of())
    lines = map(json.dumps, history()[:8])
    late = '{"stage": "student", "step": ' + "9" * 400 + ', "train/loss": 1.0}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, late]) + "\n{half")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_the_command_draws_the_page_of_a_folder(tmp_path, capsys):
    folder = folder_of(tmp_path)
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert written == html_report(report_of(), history()[:8], config=CONFIG)


def test_what_is_no_folder_of_a_finished_run_or_cannot_be_written_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    message = "does not exist: megakd writes the file when the run is complete"
    assert f"{tmp_path / 'report.json'} {message}" in capsys.readouterr().err

    file = folder_of(tmp_path) / "report.json"
    assert cli.main(["report", str(file)]) == 2
    message = f"is a file; give the output_dir of a finished run, such as {tmp_path}\n"
    assert f"{file} {message}" in capsys.readouterr().err

    (tmp_path / "report.html").mkdir()
    with pytest.raises(CheckpointError, match=r"report\.html cannot be written: Is a directory"):
        write_html_report(tmp_path)


def test_a_picture_that_fails_does_not_spoil_the_run(tmp_path, monkeypatch, caplog):
    def fail(folder: Path) -> Path:
        raise ArithmeticError(f"no room in {folder.name}")

    monkeypatch.setattr("megakd.reports.html.write_html_report", fail)

    finished_run._draw(tmp_path / "out")

    assert "report.html could not be written" in caplog.text
    assert "no room in out" in caplog.text
