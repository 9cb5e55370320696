"""A finished run started again: its data, models, report and `final/` are what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from one_rank import OneRank, Said
from tiny_runs import config_tree, write_config, write_reviews
from whole_run import WholeRun, finish

from megakd.config.file import load_config
from megakd.errors import DataError
from megakd.run import finished_run

WEIGHTS = "model.safetensors"


class Finished:
    """A finished run whose folder, data and teacher a test may damage."""

    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder, self.out = one_rank, folder, folder / "out"
        self.config = folder / "run.yaml"

    def again(self, *overrides: str) -> Said:
        """Start the run again."""
        return self.one_rank.train("--config", self.config, *overrides)


@pytest.fixture(scope="module")
def original(one_rank: OneRank, whole_run: WholeRun, tmp_path_factory) -> Path:
    """A short run that learns from a stored teacher."""
    folder = tmp_path_factory.mktemp("finished")
    reviews = write_reviews(folder / "reviews")
    shutil.copytree(whole_run.teacher, folder / "teacher")
    task = {"type": "classification", "dataset": str(reviews)}
    teacher = {"model": str(folder / "teacher")}
    tree = config_tree(folder / "out", task, teacher=teacher, method={"name": "single"})
    finish(one_rank, write_config(folder / "run.yaml", tree))
    return folder


@pytest.fixture
def finished(one_rank: OneRank, original: Path, tmp_path: Path) -> Iterator[Finished]:
    """The run in its place, which its stages depend on; put back after the test."""
    backup = shutil.copytree(original, tmp_path / "backup")
    yield Finished(one_rank, original)
    shutil.rmtree(original)
    shutil.move(backup, original)


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def assert_refused(said: Said, *fragments: object) -> None:
    assert said.code == 2, said.out
    message = said.err[said.err.index("megakd: error: ") :]
    for fragment in fragments:
        assert str(fragment) in message
    assert "Traceback" not in said.err
    assert said.out == ""
    assert said.loaded == ()


def test_a_finished_run_prints_its_table_and_loads_nothing(finished):
    said = finished.again()

    assert said.code == 0, said.err
    assert f"the student is in {finished.out / 'final'}" in said.out
    assert said.loaded == ()


def test_a_run_whose_data_has_changed_since_is_refused(finished):
    rows = finished.folder / "reviews" / "train.jsonl"
    rows.write_text(rows.read_text().replace("good", "fine"))

    assert_refused(
        finished.again(), "was made from other data or models", "task.dataset", "use another output"
    )


def test_a_run_whose_teacher_has_changed_since_is_refused(finished):
    (finished.folder / "teacher" / "checksums.json").unlink()
    flip(finished.folder / "teacher" / WEIGHTS)

    assert_refused(finished.again(), "was made from other data or models", "teacher.model.weights")


def test_a_damaged_teacher_is_named_with_its_file(finished):
    flip(finished.folder / "teacher" / WEIGHTS)

    assert_refused(
        finished.again(),
        f"teacher.model: {finished.folder / 'teacher'} is damaged: the checksum of {WEIGHTS}",
        f"remove {finished.folder / 'teacher' / 'checksums.json'}",
    )


def test_a_teacher_that_is_gone_is_said_and_the_table_is_printed(finished):
    shutil.rmtree(finished.folder / "teacher")

    said = finished.again()

    assert said.code == 0, said.err
    assert "teacher.model cannot be compared with the inputs that the run was made from" in said.err


@pytest.mark.parametrize("missing", [None, WEIGHTS])
def test_a_student_that_was_removed_is_copied_again_from_its_stage(finished, missing):
    final = finished.out / "final"
    before = (final / WEIGHTS).read_bytes()
    (final / "notes.txt").write_text("mine")
    if missing is None:
        shutil.rmtree(final)
    else:
        (final / missing).unlink()

    said = finished.again()

    assert said.code == 0, said.err
    assert f"copied again from {finished.out / 'stages' / 'student'}" in said.err
    assert (final / WEIGHTS).read_bytes() == before
    assert (final / "README.md").is_file()
    assert (final / "notes.txt").is_file() == (missing is not None)
    assert finished.again().err.count("copied again") == 0


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_student_that_was_changed_is_refused_saying_what_to_do(finished, name):
    flip(finished.out / "final" / name)

    assert_refused(
        finished.again(),
        f"{finished.out / 'final'} is not the student of this run: the checksum of {name} differs",
        f"move {finished.out / 'final'} away",
    )


def test_the_student_of_another_run_is_refused(finished, whole_run):
    shutil.rmtree(finished.out / "final")
    shutil.copytree(whole_run.out / "final", finished.out / "final")

    assert_refused(finished.again(), "is not the student of this run")


def test_a_student_is_not_made_again_from_a_damaged_stage(finished):
    stage = finished.out / "stages" / "student"
    shutil.rmtree(finished.out / "final")
    flip(stage / WEIGHTS)

    assert_refused(
        finished.again(), f"{stage} is damaged", f"remove {stage} and {finished.out}/report.json"
    )


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1', 1))


def truncated(path: Path) -> None:
    path.write_text(path.read_text()[:40])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("report.json", edited),
        ("report.json", truncated),
        ("run.json", truncated),
        ("run.json", flip),
    ],
)
def test_a_damaged_record_of_a_run_is_refused_with_what_to_remove(
    finished, name: str, spoil: Callable[[Path], None]
):
    spoil(finished.out / name)

    assert_refused(finished.again(), finished.out / name, f"remove {finished.out / 'report.json'}")


@pytest.mark.parametrize("content", [b"", b"task: [", b"\xff\xfe\x00", b"- 1\n"])
def test_a_damaged_config_of_a_finished_run_is_refused(finished, content):
    (finished.out / "config.yaml").write_bytes(content)

    assert_refused(finished.again(), finished.out)


def test_a_report_that_was_removed_is_made_again_and_files_of_the_user_stay(finished):
    (finished.out / "report.json").unlink()
    (finished.out / "final" / "notes.txt").write_text("mine")
    (finished.out / "final" / "README.md").write_text("my card")

    said = finished.again()

    assert said.code == 0, said.err
    assert "final: files that megakd did not write are kept: README.md, notes.txt" in said.err
    assert (finished.out / "final" / "notes.txt").read_text() == "mine"
    assert (finished.out / "final" / "README.md").read_text() == "my card"
    assert finished.again().code == 0


def test_a_file_that_megakd_did_not_write_stops_a_run_before_it_is_replaced(finished):
    (finished.out / "report.json").unlink()
    flip(finished.out / "final" / WEIGHTS)

    assert_refused(
        finished.again(), f"the checksum of {WEIGHTS} differs", "megakd removes no file that it"
    )


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_student_is_neither_scored_nor_exported(finished, name, tmp_path):
    flip(finished.out / "final" / name)
    flip(finished.out / "stages" / "student" / name)

    scored = finished.one_rank.megakd("evaluate", finished.config)
    exported = finished.one_rank.megakd("export", finished.config, "--to", tmp_path / "x")

    assert_refused(scored, f"{finished.out / 'final'} is damaged: the checksum of {name} differs")
    assert_refused(exported, f"{finished.out / 'stages' / 'student'} is damaged")
    assert not (tmp_path / "x").exists()


def test_a_damaged_stage_is_not_taken_as_finished(finished):
    stage = finished.out / "stages" / "student"
    for path in (finished.out / "report.json", finished.out / "run.json"):
        path.unlink()
    edited(stage / "result.json")

    assert_refused(finished.again(), f"{stage} is damaged: ", "result.json", f"remove {stage}")


def test_a_stage_that_was_removed_is_made_again_with_the_same_weights(finished):
    before = (finished.out / "final" / WEIGHTS).read_bytes()
    (finished.out / "report.json").unlink()
    shutil.rmtree(finished.out / "stages" / "student")

    said = finished.again()

    assert said.code == 0, said.err
    assert (finished.out / "final" / WEIGHTS).read_bytes() == before


def test_the_record_names_the_stage_of_the_student_and_what_it_was_made_from(finished):
    record = json.loads((finished.out / "run.json").read_text())

    assert record["student"] == "student"
    assert {"task.dataset", "task.tokenizer", "teacher.model.weights"} <= record["inputs"].keys()
    assert WEIGHTS in record["final"]


@pytest.mark.parametrize("moment", ["dump_config", "write_signed", "write_report"])
def test_a_longer_run_that_is_killed_while_it_is_published_goes_on(finished, monkeypatch, moment):
    longer = load_config(finished.config, ["train.max_steps=6"])
    report = json.loads((finished.out / "report.json").read_text())

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finished_run, moment, kill)
    stage = finished.out / "stages" / "student"
    with pytest.raises(KeyboardInterrupt):
        finished_run.publish(longer, stage, report, inputs={}, command="train")

    said = finished.again("train.max_steps=6")

    assert said.code == 0, said.err
    assert json.loads((finished.out / "report.json").read_text())["stages"][0]["steps"] == 6
    assert finished.again("train.max_steps=6").code == 0


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        ("reviews/train.jsonl: row 3 has no label", []),
        ("teacher.model: owner/name cannot be downloaded from the Hub", ["teacher.model"]),
    ],
)
def test_a_name_on_the_hub_excuses_only_an_error_of_the_hub(original, error, gone):
    config = load_config(original / "run.yaml", ["teacher.model=owner/name"])

    assert finished_run._not_here(config, DataError(error)) == gone


@pytest.mark.parametrize("key", ["teacher.model", "task.dataset"])
def test_a_path_that_is_gone_excuses_any_error(original, key):
    config = load_config(original / "run.yaml", [f"{key}=./nowhere"])

    assert finished_run._not_here(config, DataError("anything")) == [key]
