"""A finished run started again: its data, models, report and `final/` are what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from one_rank import OneRank, Outcome
from safetensors.torch import load_file, save_file
from spoiling import assert_told
from tiny_runs import SENTENCES, config_tree, llama, review_task, save_tokenizer, write_reviews
from whole_run import WholeRun, finish, finish_in, metrics_of, read

from megakd.config.file import config_of, load_config
from megakd.run import finished_run
from megakd.training.inputs import unencoded_inputs

WEIGHTS = "model.safetensors"


class Finished:
    """A finished run whose folder, data and teacher a test may damage."""

    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder, self.out = one_rank, folder, folder / "out"
        self.config = folder / "run.yaml"

    def again(self, *overrides: str) -> Outcome:
        return self.one_rank.train("--config", self.config, *overrides)


@pytest.fixture(scope="module")
def original(one_rank: OneRank, whole_run: WholeRun, tmp_path_factory) -> Path:
    """A short run that learns from a stored teacher."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(whole_run.teacher, folder / "teacher")
    sets = {"more": str(write_reviews(folder / "more") / "validation.jsonl")}
    task = review_task(folder, evaluation_sets=sets)
    teacher = {"model": str(folder / "teacher")}
    for file in filter(Path.is_file, folder.rglob("*")):
        os.utime(file, (0, 0))  # times are compared in seconds, and the run may take less than one
    finish_in(one_rank, folder, task, teacher=teacher, method={"name": "single"})
    return folder


@pytest.fixture
def finished(one_rank: OneRank, original: Path, tmp_path: Path) -> Iterator[Finished]:
    """The run in its place, which its stages depend on; put back after the test."""
    backup = shutil.copytree(original, tmp_path / "backup")
    yield Finished(one_rank, original)
    shutil.rmtree(original)
    shutil.move(backup, original)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1', 1))


def truncate(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def reword(path: Path) -> None:
    path.write_text(path.read_text().replace("good", "fine"))


REPORT, STAGE, STUDENT = "out/report.json", "out/stages/student", "out/final"
TEACHER = f"teacher/{WEIGHTS}"
OTHER = "holds a run of another config"
DAMAGE: dict[str, tuple[dict[str, Callable[[Path], object]], tuple[str, ...]]] = {
    "other rows": ({"reviews/train.jsonl": reword}, (OTHER, "file task.dataset reviews/train.js")),
    "another evaluation set": ({"more/validation.jsonl": reword}, (OTHER, "validation.jsonl")),
    "another teacher": ({TEACHER: cut}, (OTHER, f"file teacher.model {TEACHER}")),
    "weights of the student": (
        {f"{STUDENT}/{WEIGHTS}": flip},
        (f"{{}}/{STUDENT} is damaged: the checksum of {WEIGHTS} differs", f"remove {{}}/{STUDENT}"),
    ),
    "a file of the student": (
        {f"{STUDENT}/tokenizer.json": Path.unlink},
        (f"{{}}/{STUDENT} is damaged: tokenizer.json is missing", f"remove {{}}/{STUDENT}"),
    ),
    "no student and a damaged stage": (
        {STUDENT: shutil.rmtree, f"{STAGE}/{WEIGHTS}": flip},
        (f"{{}}/{STAGE} is damaged", f"remove {{}}/{STAGE} and {{}}/{REPORT}"),
    ),
    "another result of a stage": (
        {REPORT: Path.unlink, f"{STAGE}/result.json": edit},
        (f"{{}}/{STAGE} is damaged: ", "result.json", f"remove {{}}/{STAGE}"),
    ),
    "a damaged report": ({REPORT: truncate}, (f"{{}}/{REPORT}", f"remove {{}}/{REPORT}")),
    "a damaged record": ({"out/run.json": truncate}, ("run.json is damaged", "start over")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_run_whose_files_have_changed_is_refused_saying_what_to_do(finished, case):
    damage, fragments = DAMAGE[case]
    for name, spoil in damage.items():
        spoil(finished.folder / name)
    outcome = finished.again()
    assert_told(outcome, *(part.replace("{}", str(finished.folder)) for part in fragments))


def test_a_removed_student_is_copied_again_from_its_stage(finished):
    final, teacher = finished.out / "final", finished.folder / "teacher"
    before = (final / WEIGHTS).read_bytes()
    shutil.rmtree(final)

    outcome = finished.again()

    assert outcome.code == 0, outcome.err
    assert "student: already finished" in outcome.err
    assert (final / WEIGHTS).read_bytes() == before
    assert (final / "README.md").is_file()
    shutil.rmtree(teacher)  # the table is printed without it
    assert finished.again().code == 0


def test_a_report_and_a_stage_that_were_removed_are_made_again_and_files_of_the_user_stay(finished):
    out, final = finished.out, finished.out / "final"
    before = (final / WEIGHTS).read_bytes()
    (out / "report.json").unlink()
    shutil.rmtree(out / "stages" / "student")
    users = {"notes.txt": "mine", "README.md": "my card"}
    for name, text in users.items():
        (final / name).write_text(text)

    outcome = finished.again()

    assert outcome.code == 0, outcome.err
    aside = out / "final.unused-1"
    assert f"{final} has files of yours: README.md, notes.txt; it is now {aside}" in outcome.err
    assert {name: (aside / name).read_text() for name in users} == users
    assert (final / WEIGHTS).read_bytes() == before


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("named", [True, False])
def test_a_decoder_from_scratch_learns_the_end_and_pads_with_no_other_token(tmp_path, named):
    """transformers keeps the embedding of a padding token zero, without a gradient."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", SENTENCES, kind="bpe")
    task = review_task(tmp_path, type="causal_lm", tokenizer=str(tokenizer))
    keys = json.loads((tokenizer / "tokenizer_config.json").read_text())
    keys["pad_token"] = "<pad>" if named else None
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(keys))
    one = {"teacher": {"model": llama(1)}, "method": {"name": "single"}}

    inputs = unencoded_inputs(config_of(config_tree(tmp_path / "out", task, **one)))

    assert (inputs.tokenizer.pad_token_id is None) is not named
    pads = {source.config.pad_token_id for source in inputs.sources.values()}
    assert pads == {inputs.tokenizer.pad_token_id if named else None}


def test_a_damaged_student_is_neither_scored_nor_exported(finished, tmp_path):
    final, stage = finished.out / "final", finished.out / "stages" / "student"
    flip(final / WEIGHTS)
    flip(stage / WEIGHTS)

    scored = finished.one_rank.megakd("evaluate", finished.config)
    exported = finished.one_rank.megakd("export", finished.config, "--to", tmp_path / "x")

    assert_told(scored, f"{final} is damaged: the checksum of {WEIGHTS} differs")
    assert_told(exported, f"{stage} is damaged")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("moment", ["dump_config", "write_report"])
def test_a_longer_run_that_is_killed_while_it_is_published_goes_on(finished, monkeypatch, moment):
    longer = load_config(finished.config, ["train.max_steps=6"])
    report = json.loads((finished.out / "report.json").read_text())

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finished_run, moment, kill)
    stage = finished.out / "stages" / "student"
    with pytest.raises(KeyboardInterrupt):
        finished_run.publish(longer, stage, report, dtype=torch.float32, command="train")

    outcome = finished.again("train.max_steps=6")

    assert outcome.code == 0, outcome.err
    assert json.loads((finished.out / "report.json").read_text())["stages"][0]["steps"] == 6
    assert finished.again("train.max_steps=6").code == 0


def stored_types(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / WEIGHTS).values()}


def test_the_student_is_stored_as_its_teacher_is_and_scored_as_it_is_stored(
    one_rank, whole_run, tmp_path
):
    teacher = shutil.copytree(whole_run.teacher, tmp_path / "teacher")
    weights = {name: weight.bfloat16() for name, weight in load_file(teacher / WEIGHTS).items()}
    save_file(weights, teacher / WEIGHTS, metadata={"format": "pt"})
    (teacher / "checksums.json").unlink()
    spec = {"model": str(teacher)}
    keys = {"method": {"name": "single"}, "baselines": ["alone"]}
    finish_in(one_rank, tmp_path, whole_run.task, teacher=spec, **keys)
    out, config = tmp_path / "out", tmp_path / "run.yaml"
    scored = json.loads(one_rank.megakd("evaluate", config, "--json", code=0).out)

    assert scored["metrics"] == metrics_of(read(out))
    assert stored_types(out / "final") == {torch.bfloat16}
    assert json.loads((out / "final/config.json").read_text())["dtype"] == "bfloat16"
    assert stored_types(out / "stages/student") == {torch.float32}
    size = (out / "final" / WEIGHTS).stat().st_size
    assert abs(read(out)["student.bytes"] - size) < size / 20
    assert read(out)["alone.bytes"] == read(out)["student.bytes"]  # of one dtype too
    assert read(out)["teacher.bytes"] > read(out)["student.bytes"]

    finish(one_rank, config, "save.dtype=fp32")

    assert stored_types(out / "final") == {torch.float32}
