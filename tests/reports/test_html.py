"""report.html: it says what the report says, asks nothing of the outside, and fits a phone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from reports import ASSISTANT, SCORES, TRADEOFF, chosen_report, language_report, report_of

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
            scalars = {"loss": 9 / step, "hidden_mse": 5 / step, "learning_rate": 1 - step / steps}
            train = {f"train/{name}": value for name, value in scalars.items()}
            lines.append({"stage": stage, "step": step, "time": 1.0, **train})
            views = {f"eval/sparsity-{s}/f1": 0.9 - s / step for s in (0.5, 0.9)}
            lines.append({"stage": stage, "step": step, "time": 1.0, "eval/f1": 0.8, **views})
    return lines


@pytest.fixture(scope="module")
def text() -> str:
    return html_report(chosen_report(), history(), config=CONFIG)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_is_well_formed_and_asks_nothing_of_the_outside(text, page):
    assert page.faults == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(page.labels)
    assert page.tags.count("figure") == page.tags.count("figcaption")
    assert "http" not in text
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert page.links == []
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)


def test_every_candidate_stands_there_with_its_numbers_and_one_of_each_is_marked(page):
    rows = [cells for _, cells in page.rows]
    marked = [cells for kind, cells in page.rows if kind == "chosen"]

    for iteration, scores in SCORES.items():
        for sparsity, metric in scores.items():
            weighed = [f"{metric:.4f}", f"{metric + TRADEOFF * sparsity:.4f}"]
            result = [r for r in rows if r[:2] == [str(iteration), f"{sparsity:g}"]]
            assert [row[3:5] for row in result] == [weighed]
    assert [(r[0], r[1], r[-1]) for r in marked] == [("1", "0.7", "yes"), ("2", "0.9", "yes")]


def test_each_iteration_has_its_curves_and_the_weight_of_sparsity(text, page):
    assert [h for h in page.headings if h.startswith("Iteration")] == ["Iteration 1", "Iteration 2"]
    assert "with λ = 0.2;" in text
    assert sum("Chosen: sparsity 0.7, metric 0.8990" in x for x in page.labels) == 1
    assert sum("Chosen: sparsity 0.7, trade-off 1.0390" in x for x in page.labels) == 1
    assert text.count(">chosen: 0.8990<") == text.count(">chosen: 1.0390<") == 1


def test_a_choice_that_is_not_the_highest_is_told():
    report = chosen_report()
    report["candidates"][3]["tradeoff"] = 1.5
    assert "The highest trade-off is that of sparsity 0.9." in html_report(report, [])


def test_every_model_has_its_sizes_scores_and_times(page):
    rows = [cells for _, cells in page.rows]
    sizes = ("97.6%", "15.00M", "3.19M", "60.0", "1.5x")

    assert ["assistant-1", "78.0%", "88.0%", "83.0%", *sizes] in rows
    assert ["student", "2.00", "6.00x", "31.00", "10.00x"] in rows
    assert ["alone", "2.50", "4.80x", "40.00", "7.75x"] in rows


def test_the_legend_explains_the_number_of_every_dot(text):
    legend = re.findall(r'<span class="key (\w+)" style="color:var\(--(\w+)\)"></span>(.+?)<', text)

    assert legend[:4] == [
        ("dot", "teacher", "1 teacher"),
        ("dot", "assistant", "2 assistant-1"),
        ("dot", "student", "3 student"),
        ("hollow", "baseline", "4 alone"),
    ]
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)[:3]
    for chart in charts:
        assert re.findall(r'<circle.*class="(\w+)"', chart) == ["dot", "dot", "dot", "hollow"]
        assert re.findall(r'class="word".*var\(--(\w+)\)">(\d)<', chart) == [
            *(("teacher", "1"), ("assistant", "2"), ("student", "3"), ("baseline", "4"))
        ]


def test_each_stage_has_its_losses_evaluations_and_speed(page):
    kinds = [label.partition(" over")[0] for label in page.labels if "of stage" in label]

    assert list(dict.fromkeys(kinds)) == [
        f"{kind} of stage {stage}"
        for stage in STAGES
        for kind in ("Losses", "Evaluation", "Speed and step size")
    ]


def test_text_of_others_is_escaped_everywhere():
    bad = "<script>$x_1$ & \"q\" 'p'"
    report = chosen_report(task=bad, environment={bad: bad}, baselines={bad: {"f1": 0.5}})
    report["stages"][0]["name"] = bad
    report["assistants"] = [ASSISTANT | {"name": bad}]
    lines = [{"stage": bad, "step": s, f"train/{bad}": s, f"eval/{bad}/f1": s} for s in (1, 2)]

    text = html_report(report, lines, config=bad)

    assert Page(text).faults == []
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"stage": "student", "step": 1, "time": 1.0, "train/loss": 2.0}],
        [{"stage": "student", "step": s, "train/loss": None} for s in (1, 2, 3)],
        [{"stage": "student", "step": s, "time": 1.0} for s in (1, 2, 3)],
    ],
    ids=["no line", "one line", "nothing finite", "an empty stage"],
)
def test_without_a_curve_there_is_no_picture_of_training(lines):
    actual = Page(html_report(report_of(), lines))

    assert "Training" not in actual.headings
    assert len(actual.labels) == 2  # by size, and by time
    # Without candidates there is no choice and no cost.
    wanted = ["single on glue/mrpc", "Size, quality, latency", "Time and memory"]
    assert [h for h in actual.headings if h != "Training"] == wanted


def test_a_report_with_hardly_anything_has_a_page():
    environment = {"versions": {"torch": "2.13.0"}, "corpus_content_hash": None}
    report = report_of(teacher=None, speedup=None, stages=[], baselines={}, environment=environment)
    report["student"]["metrics"] = {"mean_accuracy_f1": None}  # type: ignore[dict-item]
    result = Page(html_report(report, [], config="seed: <7>\n"))
    assert result.faults == []
    assert result.labels == []
    assert ["versions torch", "2.13.0"] in [cells for _, cells in result.rows]
    assert result.headings[-2:] == ["Environment", "Config"]


def test_candidates_without_finite_scores_have_a_table_and_no_picture():
    report = chosen_report()
    for row in report["candidates"]:
        row["tradeoff"] = math.nan

    result = Page(html_report(report, []))

    assert sum("trade-off" in label for label in result.labels) == 0
    assert ["1", "0.7", "3.00M", "0.8990", "-", "yes"] in [cells for _, cells in result.rows]


def test_what_is_not_finite_or_thinned_is_told():
    lines = [{"stage": "a", "step": s, "train/loss": 1 / s, "eval/f1": s} for s in range(1, 401)]
    lines[7]["train/loss"] = math.nan

    text = html_report(report_of(), lines)

    assert "As logged, not smoothed." in text
    assert "Values left out because they were not finite: 1." in text
    assert "lowest and highest value of each stretch" in text
    assert "15 of 400 steps" in text


def test_a_long_history_of_many_stages_stays_small():
    lines = (
        {"stage": f"trial-{step % 25}", "step": step, "train/loss": math.sin(step) + 2}
        for step in range(1, 100_001)
    )

    text = html_report(report_of(stages=[]), lines)

    assert len(text.encode()) < 500_000
    assert "15 of 4,000 steps" in text
    assert "5 more stages are in metrics.jsonl." in text


def test_the_page_fits_a_phone(text, page):
    """Charts are as wide as a phone and flow; what may be wider scrolls in a box of its own."""
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert page.outside == []
    widths = {float(box.split()[2]) for box in re.findall(r'viewBox="([^"]+)"', text)}
    assert max(widths) < 360
    assert ".wide { overflow-x: auto" in text
    assert re.search(r"pre \{[^}]*overflow-x: auto", text)
    assert "repeat(auto-fill, minmax(min(100%, 19rem), 1fr))" in text
    assert "@media (max-width: 40rem)" in text


def test_the_page_has_dark_colours(text):
    assert '<meta name="color-scheme" content="light dark">' in text
    assert "@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d" in text
    body = text.partition("<body>")[2]
    assert re.findall(r"#[0-9a-fA-F]{6}", body) == []


def test_of_a_perplexity_lower_is_better_everywhere():
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


def test_of_an_accuracy_higher_is_better():
    text = html_report(report_of(), [])

    assert "It keeps 94.1% of the teacher&#39;s score." in text
    assert "Higher and further to the left is better" in text
    assert "lower is better" not in text


def test_samples_of_the_models_stand_side_by_side():
    report = language_report()
    both = {"prompt": "a\nb", "teacher": "<c>\n\n", "student": "d"}
    report["samples"] = [both, {"prompt": "a", "teacher": None, "student": "e"}]

    text = html_report(report, [])

    assert "Samples" in Page(text).headings
    assert '<p class="prompt">a↵ b</p>' in text
    assert '<p class="said">&lt;c&gt;↵ ↵ </p>' in text
    assert re.findall(r'<p class="said">(\w)</p>', text) == ["d", "e"]
    assert text.count('class="said"') == 3


def test_the_weights_of_a_selector_are_lines_of_one_chart_from_0_to_1():
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", "{", "report.json is damaged: it is not JSON"),
        ("report.json", "[]", "is not a report of megakd"),
        ("report.json", "{}", "megakd: baselines, cand"),
        ("config.yaml", b"seed: 1 # \xff\n", "config.yaml is damaged: it is not UTF-8 text"),
        ("report.html", None, "report.html cannot be written: Is a directory"),
        ("report.json", "[" * 100_000, "report.json is damaged: it is not JSON"),
    ],
    ids=["half", "list", "empty", "not UTF-8", "folder", "brackets"],
)
def test_a_file_of_the_folder_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = folder_of(tmp_path) / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(CheckpointError, match=message):
        write_html_report(tmp_path)


def test_what_is_no_folder_of_a_finished_run_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    message = "does not exist: megakd writes the file when the run is complete"
    assert f"{tmp_path / 'report.json'} {message}" in capsys.readouterr().err

    file = folder_of(tmp_path) / "report.json"
    assert cli.main(["report", str(file)]) == 2
    message = f"is a file; give the output_dir of a finished run, such as {tmp_path}\n"
    assert f"{file} {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("student", "shown"),
    [(2_000_000, "5.3x fewer"), (21_291_264, "2.0x more"), (10_645_633, "as many")],
)
def test_the_sizes_of_student_and_teacher_are_compared(student, shown):
    report = report_of()
    report["student"]["encoder_parameters"] = student
    assert f"It has {shown} parameters without embeddings" in html_report(report, [])


def test_a_picture_that_fails_does_not_spoil_the_run(tmp_path, monkeypatch, caplog):
    def fail(folder: Path) -> Path:
        raise ArithmeticError(f"no room in {folder.name}")

    monkeypatch.setattr("megakd.reports.html.write_html_report", fail)

    finished_run._draw(tmp_path / "out")

    assert "report.html could not be written" in caplog.text
    assert "no room in out" in caplog.text
