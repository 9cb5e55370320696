"""A finished run started again: its data, models, report and `final/` are what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from one_rank import OneRank, Outcome
from spoiling import assert_told
from tiny_runs import (
    SENTENCES,
    bert,
    config_tree,
    llama,
    review_task,
    save_tokenizer,
    write_reviews,
)
from whole_run import WholeRun, finish_in

from megakd.config.file import config_of, load_config
from megakd.contract import plugins
from megakd.errors import DataError
from megakd.inputs.inputs import unencoded_inputs
from megakd.run import finished_run

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
    finish_in(one_rank, folder, task, teacher=teacher, method={"name": "single"})
    return folder


@pytest.fixture
def finished(one_rank: OneRank, original: Path, tmp_path: Path) -> Iterator[Finished]:
    """The run in its place, which its stages depend on; put back after the test."""
    backup = shutil.copytree(original, tmp_path / "backup")
    yield Finished(one_rank, original)
    shutil.rmtree(original)
    shutil.move(backup, original)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1', 1))


def truncate(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def reword(path: Path) -> None:
    path.write_text(path.read_text().replace("good", "fine"))


REPORT, STAGE, STUDENT = "out/report.json", "out/stages/student", "out/final"
CHECKSUMS = "teacher/checksums.json"
OTHER = "was made from other data or models"
NOT_THE_STUDENT = f"{{}}/{STUDENT} is not the student of this run: the checksum of"
# What happens to files of the run, and parts of the message; {} is the folder of the run.
DAMAGE: dict[str, tuple[dict[str, Callable[[Path], object]], tuple[str, ...]]] = {
    "other rows": ({"reviews/train.jsonl": reword}, (OTHER, "task.dataset", "use another output")),
    "another evaluation set": ({"more/validation.jsonl": reword}, (OTHER, "task.dataset")),
    "another teacher": (
        {CHECKSUMS: remove, f"teacher/{WEIGHTS}": flip},
        (OTHER, "teacher.model.weights"),
    ),
    "a damaged teacher": (
        {f"teacher/{WEIGHTS}": flip},
        (
            f"teacher.model: {{}}/teacher is damaged: the checksum of {WEIGHTS}",
            f"remove {{}}/{CHECKSUMS}",
        ),
    ),
    "weights of the student": (
        {f"{STUDENT}/{WEIGHTS}": flip},
        (f"{NOT_THE_STUDENT} {WEIGHTS} differs", f"move {{}}/{STUDENT} away"),
    ),
    "no student and a damaged stage": (
        {STUDENT: remove, f"{STAGE}/{WEIGHTS}": flip},
        (f"{{}}/{STAGE} is damaged", f"remove {{}}/{STAGE} and {{}}/{REPORT}"),
    ),
    "a stage that is not recorded": (
        {REPORT: remove, "out/run.json": remove, f"{STAGE}/result.json": edit},
        (f"{{}}/{STAGE} is damaged: ", "result.json", f"remove {{}}/{STAGE}"),
    ),
    "a file that would be replaced": (
        {REPORT: remove, f"{STUDENT}/{WEIGHTS}": flip},
        (f"the checksum of {WEIGHTS} differs", "megakd removes no file that it"),
    ),
    "an empty config": ({"out/config.yaml": lambda path: path.write_bytes(b"")}, ("{}/out",)),
    "no text": ({"out/config.yaml": lambda path: path.write_bytes(b"\xff\xfe\x00")}, ("{}/out",)),
    **{
        f"{spoil.__name__} {name}": ({name: spoil}, (f"{{}}/{name}", f"remove {{}}/{REPORT}"))
        for name, spoil in (
            *((REPORT, edit), (REPORT, truncate), ("out/run.json", truncate)),
            ("out/run.json", flip),
        )
    },
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_run_whose_files_have_changed_is_refused_saying_what_to_do(finished, case):
    damage, fragments = DAMAGE[case]
    for name, spoil in damage.items():
        spoil(finished.folder / name)
    outcome = finished.again()
    assert_told(outcome, *(part.replace("{}", str(finished.folder)) for part in fragments))


def test_a_teacher_that_is_gone_is_said_and_the_table_is_printed(finished):
    shutil.rmtree(finished.folder / "teacher")
    outcome = finished.again()
    assert outcome.code == 0, outcome.err
    assert (
        "teacher.model cannot be compared with the inputs that the run was made from" in outcome.err
    )


ITS_METRIC = """
def one(outputs, labels):
    return 1.0

one.higher_is_better = True
"""


@pytest.mark.usefixtures("process_group")
def test_the_code_of_a_plug_in_is_an_input_of_a_run(tmp_path, monkeypatch):
    plugin = tmp_path / "its_metric.py"
    plugin.write_text(ITS_METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    sections = {"teacher": {"model": bert(1)}, "method": {"name": "single"}}
    measured = {"eval": {"metrics": ["its_metric:one"]}}
    task = review_task(tmp_path, type="classification")
    config = config_of(config_tree(tmp_path / "out", task, **sections, **measured))

    def inputs() -> dict[str, object]:
        plugins._hash_of.cache_clear()
        return finished_run.run_inputs(config, unencoded_inputs(config))

    before = inputs()
    plugin.write_text(ITS_METRIC + "\n")
    changed = {name for name, value in inputs().items() if before[name] != value}
    assert changed == {"code.its_metric:one.code"}


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


@pytest.mark.parametrize("missing", [None, WEIGHTS])
def test_a_student_that_was_removed_is_copied_again_from_its_stage(finished, missing):
    final = finished.out / "final"
    before = (final / WEIGHTS).read_bytes()
    (final / "notes.txt").write_text("mine")
    if missing is None:
        shutil.rmtree(final)
    else:
        (final / missing).unlink()

    outcome = finished.again()

    assert outcome.code == 0, outcome.err
    assert f"copied again from {finished.out / 'stages' / 'student'}" in outcome.err
    assert (final / WEIGHTS).read_bytes() == before
    assert (final / "README.md").is_file()
    assert (final / "notes.txt").is_file() == (missing is not None)
    assert finished.again().err.count("copied again") == 0


def test_a_damaged_student_is_neither_scored_nor_exported(finished, tmp_path):
    flip(finished.out / "final" / WEIGHTS)
    flip(finished.out / "stages" / "student" / WEIGHTS)

    scored = finished.one_rank.megakd("evaluate", finished.config)
    exported = finished.one_rank.megakd("export", finished.config, "--to", tmp_path / "x")

    assert_told(scored, f"{finished.out / 'final'} is damaged: the checksum of {WEIGHTS} differs")
    assert_told(exported, f"{finished.out / 'stages' / 'student'} is damaged")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed between two renames"])
def test_a_report_and_a_stage_that_were_removed_are_made_again_and_files_of_the_user_stay(
    finished, killed
):
    out, final = finished.out, finished.out / "final"
    before = (final / WEIGHTS).read_bytes()
    (out / "report.json").unlink()
    shutil.rmtree(out / "stages" / "student")
    (final / "notes.txt").write_text("mine")
    (final / "README.md").write_text("my card")
    if killed:
        final.rename(out / ".final.old")

    outcome = finished.again()

    assert outcome.code == 0, outcome.err
    assert "final: files that megakd did not write are kept: README.md, notes.txt" in outcome.err
    assert (final / "notes.txt").read_text() == "mine"
    assert (final / "README.md").read_text() == "my card"
    assert (final / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("moment", ["dump_config", "write_report"])
def test_a_longer_run_that_is_killed_while_it_is_published_goes_on(finished, monkeypatch, moment):
    longer = load_config(finished.config, ["train.max_steps=6"])
    report = json.loads((finished.out / "report.json").read_text())

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finished_run, moment, kill)
    stage = finished.out / "stages" / "student"
    with pytest.raises(KeyboardInterrupt):
        finished_run.publish(longer, stage, report, inputs={}, command="train")

    outcome = finished.again("train.max_steps=6")

    assert outcome.code == 0, outcome.err
    assert json.loads((finished.out / "report.json").read_text())["stages"][0]["steps"] == 6
    assert finished.again("train.max_steps=6").code == 0


HUB = "teacher.model: owner/name cannot be downloaded from the Hub"


@pytest.mark.parametrize(
    ("override", "error", "gone"),
    [
        ("teacher.model=owner/name", "reviews/train.jsonl: row 3 has no label", []),
        ("teacher.model=owner/name", HUB, ["teacher.model"]),
        ("teacher.model=./nowhere", "anything", ["teacher.model"]),
        ("task.dataset=./nowhere", "anything", ["task.dataset"]),
        ("task={type: classification, train_files: [no*.csv, no.csv]}", "x", ["task.train_files"]),
    ],
)
def test_a_path_that_is_gone_excuses_any_error_and_a_name_one_of_the_hub(
    original, override, error, gone
):
    config = load_config(original / "run.yaml", [override])
    assert finished_run._not_here(config, DataError(error)) == gone
