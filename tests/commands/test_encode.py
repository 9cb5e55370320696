"""`megakd encode`, and runs that read its folder instead of the texts."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import run_in, write_reviews


@pytest.fixture
def texts(tmp_path):
    return write_reviews(tmp_path / "texts")


def config_of(folder, texts, kind="classification", **keys):
    task = {"type": kind, "dataset": str(texts), "text_columns": ["text"], **keys}
    return run_in(folder, task)


def outcome(config):
    out = config.parent / "out"
    report = json.loads((out / "report.json").read_text())
    return (out / "final/model.safetensors").read_bytes(), report["student"]["metrics"]


@pytest.mark.parametrize("kind", ["classification", "mlm"])
def test_a_run_on_the_folder_gives_the_weights_of_a_run_on_the_texts(
    one_rank, tmp_path, texts, kind
):
    plain = config_of(tmp_path / "plain", texts, kind)
    other = config_of(tmp_path / "other", texts, kind)
    assert one_rank.train("--config", plain).code == 0
    encoded = tmp_path / "encoded"

    answer = one_rank.megakd("encode", other, "--to", encoded, code=0)

    assert answer.out == f"the run reads the encoded data with task.encoded={encoded}\n"
    shutil.rmtree(texts)
    answer = one_rank.train("--config", other, f"task.encoded={encoded}", code=0)
    assert outcome(other) == outcome(plain)


def test_a_run_that_began_with_the_texts_goes_on_with_the_folder(one_rank, tmp_path, texts):
    config = config_of(tmp_path, texts)
    one_rank.train("--config", config, stop_at=("student", 2))
    assert one_rank.megakd("encode", config, "--to", tmp_path / "encoded").code == 0

    outcome = one_rank.train("--config", config, f"task.encoded={tmp_path / 'encoded'}", code=0)

    assert "student: resumed at step 3" in outcome.err


def test_no_folder_is_refused(one_rank, tmp_path, texts):
    outcome = one_rank.megakd("encode", config_of(tmp_path, texts), code=2)
    assert "--to is missing; give the folder for the encoded data" in outcome.err


def test_another_length_than_the_folders_is_refused_before_a_model_is_loaded(
    one_rank, tmp_path, texts
):
    config = config_of(tmp_path, texts)
    assert one_rank.megakd("encode", config, "--to", tmp_path / "encoded").code == 0

    outcome = one_rank.train(
        "--config", config, f"task.encoded={tmp_path / 'encoded'}", "task.max_length=12", code=2
    )

    assert "was encoded with other settings (task.max_length: 16 there, 12 here)" in outcome.err
    assert not outcome.loaded


def test_a_method_that_needs_the_texts_is_refused(one_rank, tmp_path, texts):
    settings = ("method.name=mixed_vocabulary", "task.type=mlm", "teacher.model=x")

    outcome = one_rank.train(
        "--config", config_of(tmp_path, texts), f"task.encoded={tmp_path}", *settings, code=2
    )

    assert "task.encoded: method mixed_vocabulary trains a vocabulary on the texts" in outcome.err
