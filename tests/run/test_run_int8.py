"""Runs with save.int8: final/int8, its score in the report, and what happens when it is damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_rank import OneRank
from tiny_runs import review_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_run import WholeRun, finish, finish_in, read

import megakd
from megakd.config.run import SaveConfig
from megakd.errors import ConfigError
from megakd.models import onnx
from megakd.models.int8 import INT8
from megakd.models.model_folder import weight_bytes
from megakd.models.weights import SAFETENSORS
from megakd.run import main
from megakd.storage.folders import entries

ROW = f"{INT8}/{SAFETENSORS}"


@pytest.fixture(scope="module")
def original(one_rank: OneRank, whole_run: WholeRun, tmp_path_factory) -> Path:
    """The folder of a short run that writes int8 weights."""
    folder = tmp_path_factory.mktemp("int8")
    finish_in(
        one_rank,
        folder,
        review_task(folder),
        teacher={"model": str(whole_run.teacher)},
        method={"name": "single"},
        baselines=["alone"],
        save={"int8": True},
    )
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Iterator[Path]:
    """The run in its place, which its stages depend on; put back after the test."""
    backup = shutil.copytree(original, tmp_path / "backup")
    yield original
    shutil.rmtree(original)
    shutil.move(backup, original)


def test_the_student_is_loaded_from_int8_with_nearly_the_same_logits(original):
    final = original / "out" / "final"
    full = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokens = AutoTokenizer.from_pretrained(final / INT8)("a good film", return_tensors="pt")

    loaded = megakd.load_int8(final / INT8)

    with torch.inference_mode():
        logits, expected = (model(**tokens).logits for model in (loaded, full))
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_report_has_the_score_and_the_size_of_the_int8_weights(original, one_rank, tmp_path):
    out = original / "out"
    student = read(out)["student"]

    assert student[INT8].keys() == {"bytes", "metrics"}
    assert student[INT8]["bytes"] == weight_bytes(out / "final" / INT8)
    assert student[INT8]["bytes"] < 0.5 * student["bytes"] == 0.5 * weight_bytes(out / "final")
    assert student[INT8]["metrics"].keys() == student["metrics"].keys()
    megakd.load_int8(out / "final" / INT8).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(out / "final").save_pretrained(tmp_path / "model")
    outcome = one_rank.megakd(
        "evaluate", original / "run.yaml", "--model", tmp_path / "model", "--json"
    )
    assert json.loads(outcome.out)["metrics"] == pytest.approx(student[INT8]["metrics"], abs=1e-6)


def test_table_page_and_card_show_the_int8_weights_and_nothing_temporary_stays(original, one_rank):
    out = original / "out"

    table = finish(one_rank, original / "run.yaml").out

    rows = [line for line in table.splitlines() if re.match(r"(teacher|student|alone)", line)]
    assert [row.split("  ")[0] for row in rows[:4]] == [
        *("teacher", "student", "student (int8)", "alone")
    ]
    assert "student (int8)" in (out / "report.html").read_text()
    card = (out / "final" / "README.md").read_text()
    assert "megakd.load_int8(" in card
    assert "student (int8)" in card
    assert not (out / ".formats").exists()


def test_packages_that_a_graph_needs_are_told_before_anything_is_read(monkeypatch):
    asked = SimpleNamespace(save=SaveConfig(onnx=True))
    monkeypatch.setattr(onnx, "_PACKAGES", ("onnx", "no_such_package"))
    for check in ("check_device", "check_nodes"):
        monkeypatch.setattr(main, check, lambda *_: None)

    with pytest.raises(
        ConfigError, match=r"save\.onnx needs no_such_package, not .*megakd\[onnx\]"
    ):
        main.check_machines(asked, None)  # type: ignore[arg-type]


def test_a_graph_is_timed_beside_the_student_and_written_beside_its_weights(
    one_rank, original, tmp_path
):
    out = Path(shutil.copytree(original / "out", tmp_path / "out"))
    words = ("save.onnx=true", "eval.latency={batch: [2], generate: 0}", f"output_dir={out}")
    outcome = finish(one_rank, original / "run.yaml", *words)

    student, graph = read(out)["student"], out / "final" / onnx.MODEL
    assert student["onnx"] == {"bytes": graph.stat().st_size, "metrics": student["metrics"]}
    *_, of_graph = timed = read(out)["latency"]
    assert (of_graph["model"], of_graph["runtime"]) == ("student", "onnxruntime")
    assert of_graph["device"].startswith("cpu")
    same = {key: of_graph.get(key) for key in ("model", "batch", "length", "lengths")}
    beside = [one for one in timed if same == {key: one.get(key) for key in same}]
    assert [one.get("runtime") for one in beside] == [None, "onnxruntime"]
    row = next(line for line in outcome.out.splitlines() if line.startswith("student (onnx)"))
    assert re.search(r"\dx( \([\d.-]+\))?$", row.rstrip())
    assert not (out / ".formats").exists()
    # What is listed and missing is written again, see the int8 weights below.
    assert onnx.MODEL in entries(out / "final")


def test_missing_int8_weights_are_written_again_whatever_the_config_says(folder, one_rank):
    final = folder / "out" / "final"
    before = (final / ROW).read_bytes()
    shutil.rmtree(final / INT8)

    outcome = finish(one_rank, folder / "run.yaml", "save.int8=false")

    assert re.search(rf"lacks .*{ROW}.*copied again from", outcome.err)
    assert (final / ROW).read_bytes() == before
    assert outcome.loaded == ()


def test_a_finished_run_without_int8_weights_adds_them_unless_a_file_of_the_user_is_there(
    folder, one_rank
):
    out, final = folder / "out", folder / "out" / "final"
    (out / "report.json").unlink()
    without = finish(one_rank, folder / "run.yaml", "save.int8=false")
    weights = (final / SAFETENSORS).read_bytes()
    assert "student (int8)" not in without.out
    assert not (final / INT8).exists()
    (final / INT8).mkdir()
    (final / ROW).write_text("mine")

    refused = one_rank.train("--config", folder / "run.yaml", code=2)
    assert f"has to write: {ROW}; move these files away" in refused.err
    assert (final / ROW).read_text() == "mine"

    shutil.rmtree(final / INT8)
    outcome = finish(one_rank, folder / "run.yaml")
    assert "student (int8)" in outcome.out
    assert "student: already finished" in outcome.err
    assert (final / SAFETENSORS).read_bytes() == weights
    assert ROW in entries(final)


@pytest.mark.parametrize("wanted", [True, False])
def test_an_export_has_int8_weights_if_the_config_asks(original, one_rank, tmp_path, wanted):
    setting = f"save.int8={str(wanted).lower()}"
    outcome = one_rank.megakd("export", original / "run.yaml", setting, "--to", tmp_path / "x")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "x" / ROW).exists() == wanted
