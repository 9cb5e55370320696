"""HomoDistil's benchmark: its runs are valid, its text is split once, its numbers are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_books import write_real_data

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import homodistil  # noqa: E402
import homodistil_cases  # noqa: E402
import homodistil_summary  # noqa: E402
from homodistil_summary import Found  # noqa: E402

WORDS = ("the", "whale", "ship", "sea", "of", "a", "captain", "saw", "his", "white", "old", "cold")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two books and a task, as the folder of real data has them."""
    return write_real_data(tmp_path / "data", homodistil_cases.BOOKS, WORDS)


def words(data: Path, *more: str) -> list[str]:
    out = str(data.parent / "out")
    return ["--data", str(data), "--out", out, "--quick", "--tasks", "clinc150", *more]


def test_every_run_is_a_valid_config_of_the_same_text_steps_and_rate(data):
    given = homodistil.parse(words(data, "--seeds", "1,2"))
    homodistil.write_configs(given)

    pruning = [
        load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"])
        for leg in homodistil.pruning_legs(given)
    ]
    others = [*homodistil.teacher_legs(given), *homodistil.task_legs(given)]
    configs = [load_config(leg.config, [*leg.overrides]) for leg in others]

    found = [(c.method.schedule, c.method.pruning_end, c.seed, c.baselines) for c in pruning]
    assert found == [
        run
        for seed in (1, 2)
        for run in (
            ("cubic", None, seed, ("random", "alone")),
            *[("one_shot", None, seed, ())] * 2,
            ("cubic", given.sizes.early, seed, ()),
        )
    ]
    without_teacher = [c for c in pruning if c.objective is not None]
    assert [c.output_dir.name for c in without_teacher] == ["one_shot_alone-1", "one_shot_alone-2"]
    assert {term.loss for c in without_teacher for term in c.objective} == {"hard_cross_entropy"}
    assert len({c.train for c in pruning}) == 1
    assert {str(c.task.train_files) for c in (*pruning, *configs[:2])} == {
        str(given.out / "text" / "train.jsonl")
    }
    sizes = given.sizes
    first, second = configs[:2]
    assert (first.task.max_length, second.task.max_length) == (sizes.short, sizes.length)
    assert first.train.per_device_train_batch_size * given.ranks == sizes.short_rows
    assert second.student.model == str(given.out / "teacher-short" / "final")
    assert len(configs) == 2 + 2 * 7
    assert all(config.eval.keep_best is False for config in (*pruning, *configs))


def test_a_piece_of_text_is_learned_or_held_out_and_the_sample_is_held_out(data, tmp_path):
    sizes = homodistil_cases.QUICK._replace(pieces=None)

    homodistil_cases.write_text(data, tmp_path / "text", sizes)

    train, held_out, sample = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "text" / f"{n}.jsonl" for n in ("train", "held_out", "sample"))
    )
    assert not {*train} & {*held_out}
    assert len(held_out) == pytest.approx(len(train) / 19, abs=2)
    assert len(sample) >= 2
    assert all(any(piece.startswith(part) for piece in held_out) for part in sample)
    books = [(data / homodistil_cases.BOOKS / f"{book}.txt").read_text() for book in ("one", "two")]
    assert sum(map(len, books)) == pytest.approx(sum(map(len, train + held_out)), rel=0.01)


def test_data_that_is_not_there_is_named(data, capsys):
    (data / "clinc150" / "data_full.json").unlink()

    code = homodistil.main(words(data))

    assert code == 1
    assert f"{data / 'clinc150' / 'data_full.json'} does not exist" in capsys.readouterr().err


def text_report(loss: float, jump: float, *, baselines: bool) -> dict:
    others = {"random": 5.0, "alone": 6.0} if baselines else {}
    models = {"teacher": 3.0, "student": loss, **others}
    stages = {"pruning-1": 3.0, "student": 4.0, "random": 6.0, "alone": 5.0}
    return {
        "evaluation_sets": {"held_out": {"metrics": {m: {"loss": x} for m, x in models.items()}}},
        "student": {"parameters": 900},
        "stages": [{"name": name, "seconds": value} for name, value in stages.items()],
        "pruning": [{"step": n, "teacher_kl": kl} for n, kl in enumerate((0.1, jump + 0.1, 0.2))],
    }


@pytest.fixture
def found() -> Found:
    """Two seeds; a task is not finished in the second."""
    reports: dict = {"teacher": text_report(3.0, 0.0, baselines=False)}
    for seed in (1, 2):
        reports[f"homodistil-{seed}"] = text_report(4.0 + seed, 0.2, baselines=True)
        reports[f"one_shot-{seed}"] = text_report(4.5, 0.8 * seed, baselines=False)
        reports[f"early-{seed}"] = text_report(4.4, 0.3, baselines=False)
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        for task in ("sst2", "mrpc"):
            metrics = {"metrics": {"accuracy": accuracy}}
            reports[f"{task}-alone-{seed}"] = {"metric_name": "accuracy", "student": metrics}
    reports["mrpc-alone-2"] = None
    return Found(reports, [1, 2], ["sst2", "mrpc"])


def test_a_line_has_all_seeds_and_its_mean_score_only_those_with_all_tasks(found):
    alone = homodistil_summary.numbers(found, "alone")

    assert alone["loss"] == [6.0, 6.0]
    assert alone["sst2"] == pytest.approx([50, 70])
    assert (alone["mrpc"], alone["tasks"]) == (pytest.approx([50]), pytest.approx([50]))
    assert alone["seconds"] == [5.0, 5.0]
    assert homodistil_summary.numbers(found, "homodistil")["seconds"] == [7.0, 7.0]
    assert homodistil_summary.numbers(found, "teacher")["loss"] == [3.0, 3.0]


def test_a_jump_is_the_largest_rise_and_the_path_starts_at_the_teacher(found):
    assert homodistil_summary.largest_jump([{"teacher_kl": kl} for kl in (0.5, 0.7, 0.1)]) == 0.5
    jumps = homodistil_summary.homotopy(found)
    assert jumps == {1: pytest.approx((0.2, 0.8)), 2: pytest.approx((0.2, 1.6))}


def test_the_table_shows_gaps_and_the_row_all_models(found, capsys):
    homodistil_summary.show(found, "python x.py")

    shown = capsys.readouterr().out
    assert "5.500 ±0.707" in shown
    assert "seed 2: largest jump of the divergence: cubic 0.2000, one_shot 1.6000, ratio 8.0" in (
        shown
    )
    assert "alone loss 6.000, tasks 50.000; jump of one_shot over cubic 4.0, 8.0" in shown


@pytest.mark.slow
def test_the_whole_chain_runs_and_a_second_start_repeats_nothing(data):
    program = [sys.executable, "benchmarks/homodistil.py", *words(data, "--seeds", "1")]
    options = ["--ranks", "1", "--jobs", "1", "--no-bf16"]

    first, second = (
        subprocess.run([*program, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        for _ in range(2)
    )

    assert first.returncode == 0, first.stderr
    assert "teacher, held out: loss " in first.stdout
    assert "has not finished" not in first.stdout
    assert "| HomoDistil, held-out loss and mean score of the tasks |" in first.stdout
    assert "tokens/s" not in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
