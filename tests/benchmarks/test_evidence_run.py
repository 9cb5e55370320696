"""The runs of the evidence: a cell is done once, and begins anew if its config has changed."""

from __future__ import annotations

import dataclasses
import sys

import evidence_run
import pytest
from evidence_run import digest
from evidence_settings import Learning
from stored_cells import FEW


def test_cells_of_another_setting_have_another_digest():
    longer = Learning(steps=1, rows=64, rate=1e-3)
    others = [dataclasses.replace(FEW, **{model: longer}) for model in ("student", "teacher")]

    assert len({digest("skdbert", setting) for setting in (FEW, *others)}) == 3
    assert digest(
        "skdbert", dataclasses.replace(FEW, title="other words", in_plan=False)
    ) == digest("skdbert", FEW)


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
