"""Shrink of classifiers: depth, width and residual width, sizes in operations and in time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_runs import bert, review_task, run_in, write_jsonl, write_scored_pairs, write_text
from transformers import AutoModelForSequenceClassification, BertConfig
from whole_run import finish, finish_in, read, same_weights

from megakd.contract.lab import TimedWork
from megakd.contract.results import SizedStudent
from megakd.contract.views import View
from megakd.errors import ConfigError
from megakd.methods.shrink.candidates import Budget, Family, Sizes, timed_candidates
from megakd.pruning.builder import ShapeTimer
from megakd.run.run_report import timed_forwards, timed_on

TEACHER = bert(4, width=32, num_attention_heads=4, intermediate_size=64)
METHOD = {"name": "shrink", "flops": "40%", "candidates": 20, "round_to": 4, "trial_steps": 3}
STUDENT = {"model": "from_teacher", "dropout": 0.0}
WORK = TimedWork(batch=1)


def shrinking(folder: Path, **sections: Any) -> Path:
    """A run config of a classifier that is fine-tuned for a few steps."""
    return run_in(
        folder,
        review_task(folder),
        teacher={"model": TEACHER, "finetune": {"max_steps": 8}, "cache": "auto"},
        method={**METHOD, "repair_steps": 4, **sections.pop("method", {})},
        student=STUDENT,
        save={"save_steps": 1},
        **sections,
    )


def test_a_classifier_loses_depth_and_width_and_the_best_candidate_is_chosen(one_rank, tmp_path):
    finish(one_rank, shrinking(tmp_path))

    report = read(tmp_path / "out")
    shapes = [row["shape"] for row in report["candidates"]]
    assert any("width" in shape for shape in shapes)
    assert len({shape.split()[0] for shape in shapes}) > 1
    (chosen,) = [row for row in report["candidates"] if row["chosen"]]
    assert chosen["metric"] == min(row["metric"] for row in report["candidates"])


@pytest.mark.parametrize(
    ("flops", "candidates", "intermediate_size"), [(0.5, 1, 64), (0.4, 1, 40), (0.4, [0.75], 4)]
)
def test_a_single_candidate_is_cut_and_repaired_without_a_trial(
    one_rank, tmp_path, flops, candidates, intermediate_size
):
    method = {"flops": flops, "candidates": candidates, "trial_steps": None}
    config = shrinking(tmp_path, method=method)

    finish(one_rank, config)

    report = read(tmp_path / "out")
    trained = [one["name"] for one in report["stages"] if one["steps"]]
    assert trained == ["teacher-finetune", "student"]
    assert [(one["what"], one["value"]) for one in report["asked"]] == [("flops", flops)]
    made = json.loads((tmp_path / "out/final/config.json").read_text())
    assert made["intermediate_size"] == intermediate_size
    # Whole layers need no importance of their units.
    measured = {one["name"] for one in report["stages"]} - {*trained}
    assert ("specification" in measured) == (intermediate_size < 64)
    assert "layers" in measured


@pytest.mark.parametrize("kind", ["regression", "mlm"])
def test_other_tasks_of_encoders_are_shrunk_as_classifiers_are(one_rank, tmp_path, kind):
    texts = {
        "regression": lambda: {
            "dataset": str(write_scored_pairs(tmp_path / "pairs")),
            "text_columns": ["first", "second"],
            "label_column": "similarity",
        },
        "mlm": lambda: {
            "dataset": str(write_text(tmp_path / "text.txt")),
            "tokenizer": {"type": "wordpiece", "vocab_size": 300},
        },
    }
    teacher = {"model": TEACHER, "finetune": {"max_steps": 8}}
    teacher |= {"cache": "auto"} if kind == "regression" else {}
    method = {**METHOD, "flops": "50%", "candidates": 3, "repair_steps": 4}
    task = {"type": kind, **texts[kind]()}

    finish_in(one_rank, tmp_path, task, teacher=teacher, student=STUDENT, method=method)

    report = read(tmp_path / "out")
    parts = {one: report[f"{one}.encoder_parameters"] for one in ("student", "teacher")}
    assert parts["student"] == pytest.approx(0.5 * parts["teacher"], rel=0.05)
    assert [one["chosen"] for one in report["candidates"]].count(True) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"flops": "0.1%"}, r"no model with 0\.1% of the layers' operations .*the nearest"),
        ({"flops": None, "parameters": "1B"}, "give a smaller size"),
        ({"flops": "40%,0.1%"}, r"no model with 0\.1% of the layers' operations .*the nearest"),
        (
            {"flops": None, "speedup": 2, "timing": {"device": "cuda"}},
            "method.timing.device: cuda, and this process sees no GPU",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_or_timed_is_refused_before_anything_is_trained(
    one_rank, tmp_path, method, message
):
    outcome = one_rank.train("--config", shrinking(tmp_path, method=method), code=2)

    assert re.search(message, outcome.err)
    assert outcome.loaded == ()


SERIES = {"flops": "70%,40%,20%", "candidates": 3, "repair_steps": 4}


@pytest.fixture(scope="module")
def series(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    finish(one_rank, shrinking(folder, method=SERIES, eval={"latency": True}))
    return folder / "out"


def test_every_size_of_a_series_is_a_stock_model_of_its_size(series):
    report = read(series)
    teacher = report["teacher.encoder_parameters"]

    folders = [*(series / "sizes" / name for name in report["sizes"]), series / "final"]
    names = [*report["sizes"], "student"]

    assert [folder.name for folder in folders] == ["student-0.7", "student-0.4", "final"]
    for folder, name, share in zip(folders, names, (0.7, 0.4, 0.2), strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(model).__name__ == "BertForSequenceClassification"
        assert model.num_parameters() == report[f"{name}.parameters"]
        assert report[f"{name}.encoder_parameters"] == pytest.approx(share * teacher, rel=0.06)
    assert [one["value"] for one in report["asked"]] == [0.7, 0.4, 0.2]
    chosen = [row["iteration"] for row in report["candidates"] if row["chosen"]]
    assert chosen == [1, 2, 3]
    # The view that holds all students does not learn, and has scores but no losses.
    (trial,) = [stage for stage in report["stages"] if stage["name"] == "trial-1"]
    assert "accuracy" in trial
    assert "soft_target_kl" not in trial


def test_the_student_has_no_dropout_and_its_teacher_keeps_its_own_and_answers_once(series):
    student, teacher = (
        json.loads((series / folder / "config.json").read_text())
        for folder in ("final", "stages/teacher-finetune")
    )

    assert student["hidden_dropout_prob"] == student["attention_probs_dropout_prob"] == 0.0
    assert teacher["hidden_dropout_prob"] == 0.1
    assert (series / "stages" / "teacher-answers").is_dir()


def test_weights_are_counted_with_the_head_that_the_labels_of_the_data_need(one_rank, tmp_path):
    """The head of the model is for two labels, and the data have sixty."""
    rows = [{"text": f"word {n % 60} and {n}", "label": f"class {n % 60}"} for n in range(240)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    method = {"flops": None, "parameters": "28K", "candidates": 1, "trial_steps": None}
    config = shrinking(tmp_path, method={**method, "repair_steps": 1})

    finish(one_rank, config, f"task.dataset={path}", "teacher.finetune.max_steps=1")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final")
    assert model.config.num_labels == 60
    assert model.num_parameters() == pytest.approx(28_000, rel=0.03)


def test_the_sizes_of_a_series_are_timed_and_drawn_beside_each_other(series):
    report, page = read(series), (series / "report.html").read_text()

    assert all(report[f"{n}.ms_batch_1"] > 0 for n in ("student-0.7", "student-0.4", "student"))
    assert "student-0.7" in page
    assert "70.0% of the layers" in page


def test_a_size_that_was_removed_is_copied_again(one_rank, series):
    removed = series / "sizes" / "student-0.7"
    card = (removed / "README.md").read_text().partition("\ntraining ")[0]
    shutil.rmtree(removed)

    finish(one_rank, series.parent / "run.yaml")

    assert same_weights(removed, series / "stages" / "student-0.7")
    assert (removed / "README.md").read_text().startswith(card)


def test_a_series_of_one_candidate_each_has_no_trial(one_rank, tmp_path):
    method = {**SERIES, "flops": "75%,50%", "candidates": 1, "trial_steps": None}

    finish(one_rank, shrinking(tmp_path, method=method))

    report = read(tmp_path / "out")
    trained = [one["name"] for one in report["stages"] if one["steps"]]
    assert trained == ["teacher-finetune", "shared", "student-0.75", "student"]
    layers = {
        one: json.loads((tmp_path / "out" / one / "config.json").read_text())["num_hidden_layers"]
        for one in ("sizes/student-0.75", "final")
    }
    assert layers == {"sizes/student-0.75": 3, "final": 2}


def test_a_series_stopped_in_every_stage_ends_with_the_same_weights(one_rank, series, tmp_path):
    config = shrinking(tmp_path, method=SERIES)

    stops = ("teacher-finetune", 3), ("trial-1", 2), ("shared", 1), ("student-0.7", 1)
    for stop in (*stops, ("student", 1)):
        assert one_rank.train("--config", config, stop_at=stop).code != 0
    finish(one_rank, config)

    for folder in ("sizes/student-0.7", "sizes/student-0.4", "final"):
        assert same_weights(tmp_path / "out" / folder, series / folder)


def test_a_speedup_is_timed_once_before_the_teacher_learns(one_rank, tmp_path):
    method = {"flops": None, "speedup": 1000, "timing": {"batch": 1}}
    config = shrinking(tmp_path, method=method)

    outcome = one_rank.train("--config", config, code=2)

    assert "no model with a speed-up of 1000.00x" in outcome.err
    assert "the nearest possible sizes are a speed-up of" in outcome.err
    stages = {folder.name for folder in (tmp_path / "out" / "stages").glob("*")}
    assert stages <= {"times", "times-width-24", "times-width-16"}


def sized(**asked: Any) -> list[SizedStudent]:
    return [SizedStudent("student", Path("final"), asked)]


SHARE, SPEEDUP = sized(what="flops", value=0.1), {"what": "speedup", "value": 8.0, "batch": 32}


def test_the_report_of_a_run_on_a_gpu_times_where_the_speedup_was_asked_for():
    gpu = torch.device("cuda", 1)

    on_cpu, on_gpu = (timed_on(sized(**SPEEDUP, device=name), gpu) for name in ("cpu", "cuda"))

    assert on_cpu == torch.device("cpu")
    assert on_gpu == timed_on(SHARE, gpu) == gpu


def test_the_report_times_the_forward_of_a_speedup_beside_its_usual_ones():
    size, long = sized(**SPEEDUP), sized(**SPEEDUP, tokens=64)

    assert timed_forwards("causal_lm", SHARE) == ((1,), None)
    assert timed_forwards("causal_lm", size * 2) == ((1, 32), None)
    assert timed_forwards("classification", long) == ((1, 32), 64)


def test_a_text_beyond_the_positions_of_the_model_is_not_timed():
    source = SimpleNamespace(config=BertConfig(max_position_embeddings=32))

    with pytest.raises(ConfigError, match=r"method\.timing\.tokens: 64, and .* at most 32 tokens"):
        ShapeTimer(cast("Any", source), cast("Any", None), TimedWork(tokens=64), [])


FAMILY = Family(View((4,) * 6, (256,) * 6), 6, lambda view: max(view.heads) == 4, 8)


def depth_of(view: View) -> int:
    return sum(any(layer) for layer in zip(view.heads, view.neurons, strict=True))


def clock(view: View) -> float:
    """Time of a view in no line: layers cost as much as all their neurons, and the first more."""
    return 2 + depth_of(view) ** 1.1 * (10 + (max(view.neurons) / 16) ** 1.05)


def sizes(
    factor: Callable[[View, str], float] = lambda *_: 1.0, widths: tuple[int | None, ...] = (None,)
) -> Sizes:
    """Return sizes by the clock times a factor of the view and of the name of its measurement."""
    asked: list[str] = []

    def times(_: object, views: Mapping[str, View], name: str, __: object) -> Mapping[str, float]:
        asked.append(name)
        whole = clock(FAMILY.units)
        return {one: factor(view, name) * clock(view) / whole for one, view in views.items()}

    lab: Any = SimpleNamespace(pruning=SimpleNamespace(relative_times=times, asked=asked))
    return Sizes(lab, None, FAMILY, widths)


def speedup(factor: float) -> Budget:
    return Budget("method.speedup", 1 / factor, 0.05, lambda size: f"{1 / size:.1f}x")


@pytest.mark.parametrize("disturbed", [1.0, 1.3, 0.7])
def test_timed_candidates_have_the_wanted_time_though_the_first_times_mislead(disturbed):
    measured = sizes(lambda _, name: disturbed if name == "times" else 1.0)

    result = timed_candidates(measured, speedup(3), 6, WORK)

    assert len(result) > 1
    whole = clock(measured.family.units)
    for one in result:
        assert whole / clock(measured.family.view(*one[:3])) == pytest.approx(3, rel=0.06)
        assert one.size == clock(measured.family.view(*one[:3])) / whole


@pytest.mark.parametrize("factor", [1.3, 2, 3, 6])
def test_the_one_candidate_of_a_speedup_has_the_fewest_layers_that_are_slow_enough(factor):
    measured = sizes()
    whole = clock(measured.family.units)

    (result,) = timed_candidates(measured, speedup(factor), 1, WORK)

    assert whole / clock(measured.family.view(*result[:3])) == pytest.approx(factor, rel=0.06)
    fewer = (View((4,) * n, (256,) * n) for n in range(1, result.layers))
    assert all(whole / clock(view) > 1.04 * factor for view in fewer)


def test_narrower_shapes_are_timed_where_no_other_is_fast_enough():
    measured = sizes(lambda view, _: (view.width or 64) / 64, (None, 48, 32))
    asked: Any = measured.lab.pruning.asked  # type: ignore[attr-defined]
    first = ["times", "times-width-48", "times-width-32"]

    for factor, tried in ((3, 1), (20, 2), (28, 3)):
        asked.clear()
        (one,) = timed_candidates(measured, speedup(factor), 1, WORK)
        assert one.width == measured.widths[tried - 1]
        assert [name for name in asked if name in first] == first[:tried]


def test_another_depth_is_timed_where_the_fewest_layers_turn_out_too_fast():
    # What the first shapes do not tell: two layers alone take half of their time.
    measured = sizes(lambda view, _: 0.5 if depth_of(view) == 2 else 1.0)

    (result,) = timed_candidates(measured, speedup(3), 1, WORK)

    assert result.layers > 2


def test_a_speedup_that_no_shape_reaches_names_the_fastest():
    with pytest.raises(ConfigError, match=r"with 50\.0x .*sizes are [\d.]+x \(1 layers"):
        timed_candidates(sizes(), speedup(50), 6, WORK)
