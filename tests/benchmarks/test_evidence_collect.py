"""Reports of other benchmarks become cells of the evidence, which replace those of their runs."""

from __future__ import annotations

import json

import pytest
import reports
import yaml
from stored_cells import cells, stored

from evidence.__main__ import main
from evidence.cells import read_stored, write_stored
from lib.launching import UnusableError

STAGES = {"mixed-teacher": 250, "student": 500, "random": 500}


def write_run(folder, loss, *, stages=("student",), score=0.5):
    """Write what a run of two ranks and one thread leaves; a stage takes a second per ten steps."""
    folder.mkdir(parents=True)
    metrics = {"soft_target_kl": loss / 10}
    result = reports.report_of(
        student__loss=loss,
        student__nats_per_character=loss,
        student__accuracy=score,
        random__loss=9.0,
        metric_name="accuracy",
        baselines=["random"] if "random" in stages else [],
        environment__ranks=2,
        environment__threads=1,
        stages=[
            {"name": name, "steps": STAGES[name], "seconds": STAGES[name] / 10, **metrics}
            for name in stages
        ],
    )
    (folder / "report.json").write_text(json.dumps(result))
    train = {"per_device_train_batch_size": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": train}))


def collected(tmp_path, name, setting, *known, metric="held-out loss in nats per token", **changes):
    before = stored(*known, comparison=name, setting=setting, metric=metric, **changes)
    path = write_stored(tmp_path / "notebook/evidence", before)
    arguments = ["--collect", path.stem, str(tmp_path / "runs"), "--stored", str(path.parent)]
    main(arguments)
    assert (path.parent.parent / "evidence.md").is_file()
    return read_stored(path)


def test_runs_and_their_baselines_replace_the_cells_of_their_arms_and_seeds(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_run(runs / "shrink-1", 2.0, stages=("student", "random"))
    write_run(runs / "layers-5-1", 3.0)
    write_run(runs / "layers-5-unfinished", 3.0)
    known = [cells(arm, (7.0, 8.0)) for arm in ("shrink", "4 layers alone")]
    known.append(cells("shrink", (7.5,), basis="cost"))

    after = collected(tmp_path, "shrink", "stories260K", *known, lower_is_better=True)

    assert {seed: cell.score for seed, cell in after.of("shrink").items()} == {1: 2.0, 2: 8.0}
    assert after.of("shrink", "cost") == {}
    assert [c.score for c in after.of("4 layers alone").values()] == [7.0, 8.0]
    assert "4 layers alone with some seeds; its stored cells stay" in capsys.readouterr().out
    one = after.of("5 layers alone")[1]
    assert (one.score, one.divergence, one.steps) == (3.0, 0.3, 500)
    assert (one.cpu_seconds, one.teacher_rows) == (2 * 50, 500 * 8)
    assert after.of("random weights")[1].score == 9.0
    assert (after.teachers, after.metric) == (stored().teachers, "held-out loss in nats per token")


def test_a_teacher_that_reads_before_or_is_none_and_a_task_after_count_as_such(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "version_2-1", 2.0, stages=("mixed-teacher", "student"))
    for arm in ("alone", "down"):
        write_run(runs / f"{arm}-1", 2.5)
    for arm, score in {"version_2": 0.75, "alone": 0.5}.items():
        write_run(runs / f"sst2-{arm}-1", 0.0, score=score)

    after = collected(tmp_path, "mixed_vocabulary", "sst2", metric="accuracy")

    assert after.arms() == ["version_2", "alone"]
    assert after.of("alone")[1].teacher_rows == 0
    one = after.of("version_2")[1]
    assert (one.score, one.steps, one.teacher_rows) == (75.0, 1000, 250 * 8)
    assert one.cpu_seconds == 2 * (25 + 50 + 50)


def test_a_folder_without_a_finished_run_changes_nothing(tmp_path):
    with pytest.raises(UnusableError, match="no finished run of shrink"):
        collected(tmp_path, "shrink", "books", cells("shrink", (7.0,)), lower_is_better=True)
