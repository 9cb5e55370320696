"""The runs of the evidence: a cell is done once, and begins anew if its config has changed."""

from __future__ import annotations

import dataclasses
import sys

import evidence_run
import pytest
from evidence_run import digest
from evidence_settings import Learning
from stored_cells import FEW, bench_of


def test_cells_of_another_setting_have_another_digest(tmp_path):
    bench = bench_of(tmp_path)
    other = dataclasses.replace(FEW, student=Learning(steps=1, rows=64, rate=1e-3))

    found = {digest("skdbert", setting, bench) for setting in (FEW, other)}
    found |= {digest("skdbert", FEW, dataclasses.replace(bench, shrunk=8))}

    assert len(found) == 3
    assert digest("skdbert", FEW, bench_of(tmp_path / "moved")) in found


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
