"""The report's rows of ONNX graphs: what a service on a CPU would run, of teacher and student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from onnxruntime import InferenceSession
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_run import finish, read

from megakd.models.onnx import MODEL, quantize_graph, write_onnx
from megakd.reports.table import result_table

GRAPHS = ["teacher_onnx", "teacher_int8", "student_onnx", "student_int8"]


@pytest.fixture(scope="module")
def timed(one_rank, whole_run, tmp_path_factory) -> Path:
    """A finished run, started again with times."""
    out = Path(shutil.copytree(whole_run.out, tmp_path_factory.mktemp("timed") / "out"))
    finish(one_rank, whole_run.config, f"output_dir={out}", "eval.latency=true")
    return out


def test_models_are_timed_without_training_if_a_finished_run_is_asked_for_times(timed, whole_run):
    report, before = read(timed), read(whole_run.out)

    assert (before["batches"], report["batches"]) == ([], [1, 32])
    assert report["stages"] == before["stages"]
    for model in ("teacher", "student", *GRAPHS):
        assert min(report[f"{model}.ms_batch_{batch}"] for batch in (1, 32)) > 0
    speed = [report[f"student.speedup_batch_1{end}"] for end in ("_low", "", "_high")]
    assert 0 < speed[0] <= speed[1] <= speed[2]
    assert report["latency.dtype"] == "fp32"
    assert report["latency.device"] == "cpu (CPU time of one thread)"


def test_an_encoder_that_learns_on_a_cpu_is_reported_as_graphs_too(timed):
    report = read(timed)

    assert report["models"] == ["teacher", "student", "alone", *GRAPHS]
    for row in GRAPHS:
        model = row.split("_")[0]
        assert report[f"{row}.parameters"] == report[f"{model}.parameters"]
    for model in ("teacher", "student"):
        assert report[f"{model}_onnx.accuracy"] == report[f"{model}.accuracy"]
        assert report[f"{model}_int8.bytes"] < report[f"{model}_onnx.bytes"]
    assert "the teacher alone as an int8 graph: " in result_table(report)
    assert not list(timed.glob(".graphs*"))
    assert not (timed / "final" / MODEL).exists()


def test_the_score_of_an_int8_graph_is_that_of_its_answers(timed, whole_run, tmp_path):
    """The graph is quantised again, and asked as anyone would ask it."""
    final = whole_run.out / "final"
    write_onnx(final, to=tmp_path / "whole")
    quantize_graph(tmp_path / "whole", tmp_path / MODEL, None)
    lines = (whole_run.reviews / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    encoded = AutoTokenizer.from_pretrained(final)(
        [row["text"] for row in rows],
        padding=True,
        truncation=True,
        max_length=16,
        return_tensors="np",
    )
    graph = InferenceSession(tmp_path / MODEL)
    (logits,) = graph.run(None, {one.name: encoded[one.name] for one in graph.get_inputs()})
    names = AutoModelForSequenceClassification.from_pretrained(final).config.id2label
    right = sum(
        names[n] == row["label"] for n, row in zip(logits.argmax(1).tolist(), rows, strict=True)
    )

    # The scales of a graph depend on the texts of a batch.
    assert read(timed)["student_int8.accuracy"] == pytest.approx(right / len(rows), abs=0.05)
