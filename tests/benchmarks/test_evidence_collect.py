"""The runs of other benchmarks become cells of the evidence, with the numbers of their reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from evidence import __main__ as evidence
from evidence import collect as evidence_collect
from evidence.cells import STORED, read_stored, stored_path
from evidence.collect import (
    homodistil_cells,
    homodistil_cost_cells,
    mixed_vocabulary_cells,
    shrink_cells,
)
from evidence.others import COLLECTED
from lib.launching import write_config
from megakd.errors import MegakdError
from methods import homodistil, mixed_vocabulary, on_policy

RIGHT = {"on_policy": 0.5, "mixed": 0.6, "off_policy": 0.7, "labels": 0.4}
TEACHER_CURVE = (0.5, 0.9, 0.98)


def report_of(stages: dict[str, tuple[int, float]], *, ranks=1, threads=1, **more) -> dict:
    """Return a report. stages: steps and seconds of each."""
    versions = {"megakd": "1", "torch": "2", "transformers": "5"}
    return {
        "environment": {"ranks": ranks, "threads": threads, "python": "3", "versions": versions},
        "stages": [
            {"name": name, "steps": steps, "seconds": seconds, "metrics": {}}
            for name, (steps, seconds) in stages.items()
        ],
        "baselines": {},
        "evaluation_sets": {},
        **more,
    }


def finish(folder: Path, config: dict, seed: int, report: dict, log: list[dict]) -> None:
    """Write what a finished run leaves in its folder."""
    write_config(folder / "config.yaml", {**config, "output_dir": str(folder), "seed": seed})
    (folder / "report.json").write_text(json.dumps(report))
    lines = (json.dumps({"stage": "student", **record}) + "\n" for record in log)
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def sums(tmp_path, monkeypatch) -> Path:
    """Finished runs of on_policy.py with two seeds; the evidence reads them."""
    words = ("--out", str(tmp_path / "runs"))
    found = COLLECTED["on_policy"]
    source = dataclasses.replace(found.sources["arithmetic"], words=words, seeds=(1, 2))
    changed = dataclasses.replace(found, sources={"arithmetic": source})
    monkeypatch.setitem(COLLECTED, "on_policy", changed)
    given = on_policy.parse(words)
    curve = [{"eval/match": share} for share in TEACHER_CURVE]
    teacher = report_of({"student": (1500, 9.0)}, teacher=None)
    finish(given.out / "teacher", on_policy.teacher_config(given), 0, teacher, curve)
    for seed in (1, 2):
        for name, right in RIGHT.items():
            taught = name != "labels"
            report = report_of({"student": (300, 10.0)}, threads=2, teacher={} if taught else None)
            last = {"eval/match": right + 0.01 * seed}
            last |= {"eval/soft_target_kl": 0.25} if taught else {}
            config = on_policy.arm(given, name, given.out / f"half-way-{seed}" / "final")
            log = [{"eval/match": 0.1}, last]
            finish(given.out / f"{name}-{seed}", config, seed, report, log)
    return tmp_path


def collected(folder: Path):
    evidence_collect.collect(folder / "evidence", folder / "data", ["on_policy"])
    return read_stored(stored_path(folder / "evidence", "on_policy", "arithmetic"))


def test_reports_and_logs_become_cells_with_score_divergence_steps_cost_and_rows(sums):
    stored = collected(sums)

    cell = stored.of("mixed")[2]
    assert (cell.score, cell.divergence) == (pytest.approx(62.0), 0.25)
    assert (cell.steps, cell.cpu_seconds, cell.teacher_rows) == (300, 20.0, 300 * 64)
    labels = stored.of("labels")[1]
    assert (labels.score, labels.divergence, labels.teacher_rows) == (pytest.approx(41), None, 0)
    assert stored.arms() == [*RIGHT]
    assert all(stored.of(arm).keys() == {1, 2} for arm in RIGHT)
    (gate,) = stored.teachers
    assert gate.scores == pytest.approx([50, 90, 98])
    assert gate.final == pytest.approx(98)
    assert stored.versions == {"python": "3", "megakd": "1", "torch": "2", "transformers": "5"}


def test_a_run_that_has_not_finished_is_named_and_left_out(sums, capsys):
    (sums / "runs/mixed-2/report.json").unlink()
    stored = collected(sums)
    assert "on_policy on arithmetic: mixed-2 has not finished" in capsys.readouterr().out
    assert stored.of("mixed").keys() == {1}
    assert stored.of("on_policy").keys() == {1, 2}


def test_a_run_of_other_settings_is_refused_with_its_folder_and_the_key(sums):
    given = on_policy.parse(COLLECTED["on_policy"].sources["arithmetic"].options)
    other = on_policy.arm(given, "mixed", given.out / "half-way-1" / "final")
    other["train"]["learning_rate"] = 1e-5
    write_config(
        sums / "runs/mixed-1/config.yaml",
        {**other, "output_dir": str(sums / "runs/mixed-1"), "seed": 1},
    )

    with pytest.raises(MegakdError, match=r"mixed-1.*learning_rate: 1e-05 there, 0.0005 here"):
        collected(sums)
    assert not (sums / "evidence").exists()


def test_stored_cells_stay_when_their_runs_are_gone_and_a_new_run_replaces_its_cell(sums):
    before = collected(sums)
    shutil.rmtree(sums / "runs/mixed-1")
    log = sums / "runs/mixed-2/metrics.jsonl"
    log.write_text(json.dumps({"stage": "student", "eval/match": 0.9}) + "\n")

    after = collected(sums)

    assert after.of("mixed")[1] == before.of("mixed")[1]
    assert after.of("mixed")[2].score == pytest.approx(90)
    assert len(after.cells) == len(before.cells)


def test_collecting_draws_the_page_next_to_the_stored_cells_and_writes_no_config(sums, capsys):
    configs = sorted(sums.glob("runs/**/*.yaml"))
    words = ["--collect", "on_policy", "--stored", str(sums / "evidence")]

    assert evidence.main(words) == 0
    page = (sums / "evidence.md").read_text()
    assert "### on_policy on arithmetic" in page
    assert "sums of eight digits in steps" in page
    assert sorted(sums.glob("runs/**/*.yaml")) == configs


def on_text(loss: float, stages: dict[str, tuple[int, float]], **baselines: float) -> dict:
    report = report_of(stages, ranks=2, teacher={"parameters": 9})
    scored = {"student": loss, "teacher": 1.0, **baselines}
    metrics = {model: {"nats_per_character": nats} for model, nats in scored.items()}
    return {**report, "evaluation_sets": {"held_out": {"metrics": metrics}}}


def test_a_vocabulary_costs_all_stages_of_its_arm_on_both_ranks_and_a_task_its_own_too():
    task = report_of(
        {"student": (60, 3.0)}, metric_name="accuracy", student={"metrics": {"accuracy": 0.75}}
    )
    reports = {
        "alone-1": on_text(2.0, {"student": (50, 4.0), "patient_kd": (50, 7.0)}, patient_kd=1.9),
        "down-1": on_text(1.8, {"student": (50, 20.0)}),
        "version_2-1": on_text(2.2, {"mixed-teacher": (25, 9.0), "student": (50, 5.0)}),
        "up-1": None,
        "sst2-down-1": task,
        "sst2-alone-1": None,
    }
    found = mixed_vocabulary.Found(reports, (1,), ("sst2",), 0)

    texts = mixed_vocabulary_cells(found, task=None, rows=8)
    (on_task,) = mixed_vocabulary_cells(found, task="sst2", rows=8)

    assert {c.arm: (c.score, c.steps, c.cpu_seconds, c.teacher_rows) for c in texts} == {
        "down": (1.8, 50, 40.0, 400),
        "version_2": (2.2, 50, 28.0, 200),
        "patient_kd": (1.9, 50, 14.0, 400),
        "alone": (2.0, 50, 8.0, 0),
    }
    assert (on_task.arm, on_task.score, on_task.steps, on_task.cpu_seconds) == (
        *("down", 75.0, 110, 43.0),
    )


def test_pruned_students_and_students_from_random_weights_have_the_same_steps():
    stages = {"pruning-1": (4, 1.0), "student": (6, 2.0), "random": (10, 5.0), "alone": (10, 3.0)}
    first = report_of(stages, ranks=2)
    losses = {"student": 3.5, "random": 4.5, "alone": 6.0, "teacher": 3.0}
    metrics = {model: {"loss": loss} for model, loss in losses.items()}
    first["evaluation_sets"] = {"held_out": {"metrics": metrics}}
    first["stages"][1]["metrics"] = {"soft_target_kl": 0.5}
    reports = {"homodistil-1": first, "early-1": None, "one_shot-1": None}
    found = homodistil.Found(reports, (1,), ())

    at_steps = homodistil_cells(found, homodistil.held_out, rows=8)

    cells = {cell.arm: cell for cell in at_steps}
    assert {arm: (c.score, c.cpu_seconds, c.teacher_rows) for arm, c in cells.items()} == {
        "homodistil": (3.5, 6.0, 80),
        "random": (4.5, 10.0, 80),
        "alone": (6.0, 6.0, 0),
    }
    assert {cell.steps for cell in cells.values()} == {10}
    assert cells["homodistil"].divergence == 0.5
    # Equal cost takes longer runs where there are any, and else the same cells.
    longer = [dataclasses.replace(cells["alone"], score=5.5)]
    at_cost = homodistil_cost_cells(at_steps, longer, {"one_shot": 5, "alone": 9})
    assert {cell.basis for cell in at_cost} == {"cost"}
    assert {c.arm: c.score for c in at_cost}["alone"] == 5.5


def shrunk(loss: float, layers: int, **baselines: float) -> dict:
    stages = {"specification": (0, 1.0), "trial-1": (6, 3.0), "student": (40, 8.0)}
    stages |= dict.fromkeys(baselines, (46, 5.0))
    return report_of(
        stages,
        student={"metrics": {"loss": loss}},
        baselines={name: {"loss": value} for name, value in baselines.items()},
        candidates=[{"shape": f"{n} layers, 1 neurons", "chosen": n == layers} for n in (3, 2)],
    )


def test_shrink_is_stored_without_its_baseline_and_with_the_loss_of_its_cut(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"stage": "trial-1", "eval/layers-2/loss": 7.0}) + "\n")
    reports = {"shrink": shrunk(2.0, 2, random=3.0), "layers-3": shrunk(1.9, 3), "layers-2": None}

    cells = {cell.arm: cell for cell in shrink_cells(reports, 1, run=tmp_path, rows=4)}

    numbers = {arm: (c.score, c.steps, c.cpu_seconds, c.teacher_rows) for arm, c in cells.items()}
    assert numbers == {
        "shrink": (2.0, 46, 12.0, 184),
        "3 layers alone": (1.9, 46, 12.0, 184),
        "random weights": (3.0, 46, 5.0, 184),
    }
    assert cells["shrink"].details == {"layers": 2, "loss before repair": 7.0}


@pytest.mark.parametrize("name", COLLECTED)
def test_the_stored_cells_belong_to_the_settings_of_this_program(name):
    paths = {s: stored_path(STORED, name, s) for s in COLLECTED[name].sources}
    present = {setting: path for setting, path in paths.items() if path.is_file()}
    if not present:
        pytest.skip(f"no cell of {name} is stored")

    for setting, path in present.items():
        stored = read_stored(path, settings=evidence_collect.digest(name, setting))
        assert {cell.arm for cell in stored.cells} <= COLLECTED[name].arms.keys()
