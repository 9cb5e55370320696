"""The evidence: cells are valid runs, costs are equalised, and problems are said first."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import evidence
import evidence_checks
import evidence_run
import numpy as np
import pytest
from evidence_arms import arm_beside, named
from evidence_cells import SAME_RUN, Cell, Stored, TeacherGate, read_stored
from evidence_comparisons import COMPARISONS, KINDS, TRADEOFF
from evidence_run import Bench, Planned, cell_config, digest, place_of
from evidence_scores import Answered, accuracy, mean_divergence
from evidence_settings import SETTINGS, Learning, read_table
from hypothesis import given
from hypothesis import strategies as st
from launching import RunFailedError
from tiny_runs import bert, config_tree, write_config, write_reviews
from whole_run import finish

from megakd.config.file import load_config
from megakd.methods.minidisc import MiniDiscConfig

FEW = dataclasses.replace(SETTINGS["clinc150-few"], label_rate=2e-4, cut_label_rate=2e-4)


def bench_of(folder: Path) -> Bench:
    return Bench(data=folder / "data", out=folder / "out", encoder="some/encoder")


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_every_arm_is_a_valid_config_of_the_same_rows_and_optimizer(tmp_path, comparison):
    bench, found = bench_of(tmp_path), COMPARISONS[comparison]
    place = place_of(bench, FEW, 1, {"soft": dict.fromkeys(KINDS, 0.4)})
    configs = {}
    for arm in found.arms:
        planned = Planned(
            name=arm, seed=1, basis="steps", steps=9, place=place, folder=tmp_path / "run"
        )
        tree = cell_config(bench, found.arms[arm], planned)
        path = write_config(tmp_path / "run.yaml", {"output_dir": str(tmp_path / "run"), **tree})
        configs[arm] = load_config(path)

    taught = {c.train for arm, c in configs.items() if named(arm) != found.labels}
    assert len(taught) == 1
    alone = dataclasses.replace(*taught, learning_rate=FEW.label_rate)
    assert {c.train for arm, c in configs.items() if named(arm) == found.labels} == {alone}
    silent = {named(arm) for arm in found.arms if not found.arms[arm].asks_teachers}
    assert silent == {found.labels}
    assert len({str(config.task) for config in configs.values()}) == 1
    assert len({str(config.student.model) for config in configs.values()}) == 1
    assert {config.seed for config in configs.values()} == {1}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_the_reference_the_plain_and_the_labels_arm_exist(comparison):
    found = COMPARISONS[comparison]
    for arm in found.arms:
        assert named(found.reference_of(arm)) == found.reference
        plain = arm_beside(found.arms, found.plain, arm)
        assert plain is not None
        assert named(plain) == found.plain
        assert {found.reference_of(arm), plain} <= found.arms.keys()
    assert found.labels in {named(arm) for arm in found.arms}
    assert found.seeds.keys() <= SETTINGS.keys()


def test_an_arm_is_compared_within_its_group():
    found = COMPARISONS["skdbert"]

    assert found.reference_of("mean, T 4") == "uniform, T 4"
    assert found.reference_of("labels") == "uniform, T 1"


def test_cells_of_another_setting_have_another_digest(tmp_path):
    bench = bench_of(tmp_path)
    other = dataclasses.replace(FEW, student=Learning(steps=1, rows=64, rate=1e-3))

    found = {digest("skdbert", setting, bench) for setting in (FEW, other)}
    found |= {digest("skdbert", FEW, dataclasses.replace(bench, shrunk=8))}

    assert len(found) == 3
    assert digest("skdbert", FEW, bench_of(tmp_path / "moved")) in found


def cell(arm: str, cost: float, *, fixed: float = 0.0, seed: int = 1) -> Cell:
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=50.0,
        divergence=None,
        steps=100,
        cpu_seconds=cost,
        teacher_rows=0,
        details={"fixed_cpu_seconds": fixed},
    )


def stored_of(*cells: Cell) -> Stored:
    return Stored(
        comparison="skdbert", setting=FEW.name, settings="x", start="y", metric="z", cells=cells
    )


def test_a_cell_at_equal_cost_takes_the_steps_that_the_reference_pays_for():
    stored = stored_of(
        cell("ours", 100), cell("twice", 200), cell("same", 105), cell("first", 150, fixed=50)
    )

    assert evidence.cost_share(stored, "ours", "ours") is None
    assert evidence.cost_share(stored, "twice", "ours") == 0.5
    assert evidence.cost_share(stored, "same", "ours") == 1.0
    assert evidence.cost_share(stored, "first", "ours") == 0.5


def test_an_arm_that_is_too_dear_before_its_first_step_has_no_cell_at_equal_cost():
    stored = stored_of(cell("ours", 100), cell("dear", 300, fixed=99))

    assert evidence.cost_share(stored, "dear", "ours") is None
    assert evidence.cost_share(stored, "not yet run", "ours") is None


def test_cost_is_the_median_over_the_seeds_that_both_arms_have():
    stored = stored_of(
        *(cell("ours", 100, seed=seed) for seed in (1, 2, 3)),
        *(cell("other", cost, seed=seed) for seed, cost in enumerate((400, 200, 250, 1), start=1)),
        *(cell("alike", cost, seed=seed) for seed, cost in enumerate((80, 105, 104), start=1)),
    )

    assert evidence.cost_share(stored, "other", "ours") == 0.4
    assert evidence.cost_share(stored, "alike", "ours") == 1.0


def test_equal_cost_begins_when_all_seeds_have_their_costs(tmp_path, monkeypatch):
    ran, arms = [], COMPARISONS["skdbert"].arms

    def cells_of(seed: int) -> list[Cell]:
        return [dataclasses.replace(cell(arm, 100, seed=seed), max_steps=400) for arm in arms]

    gate = TeacherGate(teacher="six", seed=2, scores=(), final=0.0)
    finished = stored_of(*cells_of(1), *cells_of(2))
    monkeypatch.setattr(evidence, "_run_seed", lambda *given: ran.append(given[3:]) or finished)
    monkeypatch.setattr(evidence, "taught", lambda *given: ran.append(given[2:]) or gate)
    monkeypatch.setattr(evidence, "cached", lambda *given: None)
    asked = argparse.Namespace(jobs=1, groups=None, quick=False)

    evidence.run_comparison(asked, bench_of(tmp_path), stored_of(*cells_of(1)), (1, 2))

    # Seed 1 has all of its cells, so that only seed 2 needs teachers.
    teachers = [(name, 2) for name in COMPARISONS["skdbert"].teachers]
    assert ran == [*teachers, (1, "steps"), (2, "steps"), (1, "cost"), (2, "cost")]


def test_a_lesser_control_has_no_cell_at_equal_cost(tmp_path):
    arms = ("soft", "random soft", "random hard", "only soft_target_kl", "only hidden_mse")
    stored = stored_of(*(cell(arm, 100) for arm in arms))
    stored = dataclasses.replace(stored, comparison="selection")

    _, left = evidence.known_and_left(bench_of(tmp_path), stored, 1, arms, "cost")

    assert [run.name for run in left] == ["random soft", "only soft_target_kl"]


def test_a_stored_cell_is_run_again_only_with_other_steps(tmp_path):
    bench, arms = bench_of(tmp_path), ("uniform, T 1", "takd, T 1", "mean, T 1", "labels")
    ours, takd, mean = (
        dataclasses.replace(cell(arm, cost), max_steps=400)
        for arm, cost in zip(arms, (100, 200, 105), strict=False)
    )
    stored = stored_of(ours, takd, mean)

    known, left = evidence.known_and_left(bench, stored, 1, arms, "steps")
    assert ([c.arm for c in known], [run.name for run in left]) == ([*arms[:3]], ["labels"])

    known, left = evidence.known_and_left(bench, stored, 1, arms[:3], "cost")
    assert known == [dataclasses.replace(mean, basis="cost")]
    assert [(run.name, run.steps) for run in left] == [("takd, T 1", 200)]

    paid = dataclasses.replace(takd, basis="cost", max_steps=200)
    known, left = evidence.known_and_left(bench, stored_of(ours, takd, paid), 1, arms[:2], "cost")
    assert (known, left) == ([paid], [])


def test_a_cell_that_fails_does_not_keep_the_others_from_being_stored(tmp_path, monkeypatch):
    def run(bench, comparison, planned: Planned) -> Cell:
        if planned.name == "mean, T 1":
            raise RunFailedError("mean, T 1: exit code 1")
        return cell(planned.name, 100)

    monkeypatch.setattr(evidence, "run_cell", run)
    given, arms = argparse.Namespace(stored=tmp_path, jobs=2), ["mean, T 1", "takd, T 1", "labels"]

    with pytest.raises(RunFailedError, match="mean, T 1"):
        evidence._run_arms(given, bench_of(tmp_path), stored_of(), 1, arms, "steps")

    (path,) = tmp_path.glob("*.json")
    assert {*read_stored(path).arms()} == {*arms[1:]}


def test_the_arm_that_takes_longest_is_begun_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        evidence, "run_cell", lambda bench, _, run: ran.append(run.name) or cell(run.name, 9)
    )
    known = stored_of(cell("mean, T 1", 100), cell("takd, T 1", 200), cell("labels", 50))
    given, arms = argparse.Namespace(stored=tmp_path, jobs=1), ["labels", "mean, T 1", "takd, T 1"]

    evidence._run_arms(given, bench_of(tmp_path), known, 2, arms, "steps")

    assert ran == ["takd, T 1", "mean, T 1", "labels"]


def test_the_rule_of_choice_has_the_default_of_the_method():
    assert MiniDiscConfig(name="minidisc").tradeoff == TRADEOFF


def trial(chosen: float, **scores: float) -> Stored:
    """A cell of MiniDisc at 0.9 whose first trial has these scores; other cells by `stored_of`."""
    details = {f"trial score {name[1:]}": score for name, score in scores.items()}
    made = dataclasses.replace(cell("minidisc, 0.9", 100), details={**details, "chosen": chosen})
    return dataclasses.replace(stored_of(made), comparison="minidisc")


SCORES = {"s0.5": 0.9, "s0.7": 0.88, "s0.85": 0.83, "s0.9": 0.7}


@pytest.mark.parametrize(
    ("arm", "is_same"),
    [
        ("lambda 0, 0.9", False),  # chooses 0.5
        ("lambda 0.4, 0.9", True),
        ("target barred, 0.9", True),
        ("direct, 0.9", False),
    ],
)
@pytest.mark.parametrize("basis", ["steps", "cost"])
def test_an_arm_with_the_choice_of_the_reference_is_a_copy_of_its_cell(arm, is_same, basis):
    stored = trial(chosen=0.85, **{**SCORES, "s0.85": 0.87})

    copy = evidence.copied(stored, arm, 1, basis)

    assert (copy is not None) == is_same
    if copy is not None:
        assert (copy.arm, copy.basis, copy.score) == (arm, basis, 50.0)
        assert copy.details[SAME_RUN]


def test_a_target_that_is_barred_is_no_copy_of_a_run_that_it_has_won():
    stored = trial(chosen=0.9, **{**SCORES, "s0.9": 0.89})

    assert evidence.copied(stored, "target barred, 0.9", 1, "steps") is None
    assert evidence.copied(stored, "lambda 0.4, 0.9", 1, "steps") is not None


@pytest.mark.parametrize("name", COMPARISONS)
def test_settings_after_the_first_repeat_the_arms_that_decide(name):
    found = COMPARISONS[name]
    first, *others = found.seeds

    assert found.arms_in(first) == found.arms
    for setting in others:
        repeated = found.arms_in(setting)
        assert repeated.items() <= found.arms.items()
        assert {found.reference, found.plain, found.labels} <= {named(arm) for arm in repeated}
        assert {arm.after for arm in repeated.values()} <= {None, *repeated}


def test_quick_trains_the_deciding_arms_of_one_group(tmp_path):
    quick = evidence.parse(["--quick", "--out", str(tmp_path)])

    arms = evidence._chosen_arms(quick, stored_of())

    deciding = COMPARISONS["skdbert"].deciding
    assert arms == [arm for arm in deciding if not arm.endswith("T 4")]
    assert len(evidence._chosen_arms(evidence.parse([]), stored_of())) > len(deciding)


def test_a_missing_data_file_is_named_before_the_first_cell(tmp_path, capsys):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "selection"]

    assert evidence.main(words) == 1
    assert "clinc150/data_full.json" in capsys.readouterr().err


def test_groups_that_a_comparison_does_not_have_are_named(tmp_path, capsys):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--groups", "0.97"]

    assert evidence.main([*words, "--only", "skdbert"]) == 1
    message = capsys.readouterr().err
    assert "skdbert has no arms of the groups 0.97" in message
    assert "T 1, T 4" in message


def test_a_full_disk_is_said_before_the_first_cell(tmp_path, capsys, monkeypatch):
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150/data_full.json").write_text("{}")
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(evidence_checks.shutil, "disk_usage", lambda _: usage)
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]

    assert evidence.main([*words, "--only", "skdbert", "--settings", "clinc150-few"]) == 1
    message = capsys.readouterr().err
    assert "1.0 GB free" in message
    assert "20 teachers" in message


def test_splits_are_disjoint_and_keep_every_row_text(tmp_path):
    folder = tmp_path / "banking77"
    folder.mkdir()
    for name, count in {"train": 1100, "test": 5}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = ((f'say "{number}",\n twice', "a") for number in range(count))
            csv.writer(file).writerows([("text", "category"), *rows])

    SETTINGS["banking77"].write_splits(tmp_path, tmp_path / "out")

    found = {
        split: [
            text
            for text, _ in read_table(
                tmp_path / f"out/{split}.csv", ("text", "label"), delimiter=","
            )
        ]
        for split in ("train", "validation", "test")
    }
    assert {split: len(texts) for split, texts in found.items()} == {
        "train": 100,
        "validation": 1000,
        "test": 5,
    }
    assert not {*found["train"]} & {*found["validation"]}
    assert found["test"][3] == 'say "3",\n twice'


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(2, 7))
def test_the_divergence_is_zero_only_for_equal_answers(seed, rows, classes):
    random = np.random.default_rng(seed)
    teacher, student = random.normal(size=(2, rows, classes))

    assert mean_divergence(teacher, teacher + 3.0) == pytest.approx(0, abs=1e-12)
    assert mean_divergence(teacher, student) > 0


def test_the_divergence_is_that_of_the_definition():
    teacher, student = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)

    assert mean_divergence(teacher, student) == pytest.approx(expected)


def test_accuracy_compares_names_of_labels_in_the_order_of_the_model():
    answered = Answered(np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 9.0]]), ["no", "yes"])

    assert accuracy(answered, ["yes", "yes", "yes"]) == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def sorted_teacher(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    model = bert(2, width=32, num_attention_heads=4)
    tree = config_tree(folder / "teacher", task, student={"model": model})
    tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 20}
    finish(one_rank, write_config(folder / "teacher.yaml", tree))
    return folder


def variant(one_rank, folder: Path, run: str, labelled: int | None = None, **options) -> Path:
    """Run a variant of MiniDisc with two trials of 4 steps."""
    task = {"type": "classification", "dataset": str(folder / "reviews")}
    task |= {"labelled_examples": labelled} if labelled else {}
    grid = {"sparsities": [0.25, 0.5, 0.75], "target_sparsity": 0.75, "round_to": 1}
    tree = config_tree(
        folder / run,
        task,
        teacher={"model": str(folder / "teacher/final")},
        student={"model": "from_teacher"},
        method={"name": "evidence_variants:Variant", **grid, **options},
        eval={"eval_steps": 4},
        log={"logging_steps": 1},
    )
    tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 4}
    finish(one_rank, write_config(folder / f"{run}.yaml", tree))
    return folder / run


def rates(out: Path, stage: str) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        r["train/learning_rate"]
        for r in records
        if r["stage"] == stage and "train/learning_rate" in r
    ]


def test_a_variant_without_changes_is_the_paper(one_rank, sorted_teacher):
    ours = variant(one_rank, sorted_teacher, "ours")
    papers = variant(one_rank, sorted_teacher, "papers", name="minidisc", target_may_win=False)

    texts = [(out / "stages/trial-2/result.json").read_text() for out in (ours, papers)]
    scores = [json.loads(text)["metrics"] for text in texts]
    assert scores[0] == scores[1]


def test_one_schedule_goes_on_with_the_learning_rate_of_the_first_trial(one_rank, sorted_teacher):
    out = variant(one_rank, sorted_teacher, "one", one_schedule=True, teaches="split", alone=True)

    first, second = rates(out, "trial-1"), rates(out, "trial-2")
    assert max(second) < min(first)


def test_labels_alone_learn_from_the_rows_with_a_label_in_a_cut_of_the_target(
    one_rank, sorted_teacher
):
    out = variant(one_rank, sorted_teacher, "labels", labelled=8, name="evidence_labels:Labels")

    report = json.loads((out / "report.json").read_text())
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [r["epoch"] for r in last if "epoch" in r]
    assert [stage["name"] for stage in report["stages"]] == ["specification", "student"]
    assert max(epochs) == 4.0  # each of the 4 steps takes all 8 rows that have a label
    config = json.loads((out / "final/config.json").read_text())
    assert config["model_type"] == "cut_bert"


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    config = {"task": {}, "train": {"max_steps": 1}}
    evidence_run.write_done(tmp_path / "cell.json", config, {"score": 1.0})

    assert evidence_run.is_done(tmp_path / "cell.json", config)
    assert not evidence_run.is_done(tmp_path / "cell.json", {**config, "seed": 2})
    assert evidence_run.read_done(tmp_path / "cell.json") == {"score": 1.0}


@pytest.mark.parametrize(("steps", "is_kept"), [(4, True), (5, False)])
def test_a_cell_goes_on_where_it_was_unless_its_config_has_changed(
    tmp_path, monkeypatch, steps, is_kept
):
    ends = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(evidence_run, "launch_command", lambda *given: ends)
    folder = tmp_path / "cell"

    def config(steps: int) -> dict:
        return {"student": {"layers": (2, 5)}, "train": {"max_steps": steps, "rate": 1e-5}}

    evidence_run.start(folder, config(4), program="train")
    (folder / "checkpoint").touch()

    evidence_run.start(folder, config(steps), program="train")

    assert (folder / "checkpoint").exists() is is_kept
    assert (folder / "process.json").is_file()
