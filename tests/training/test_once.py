"""A measurement is made once, and never taken for one of another model or condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab_scene import config_of, lab_of, save_teacher
from transformers import BertConfig

from megakd.run.run_lab import RunLab
from megakd.storage.fingerprint import flatten
from megakd.training.answer_cache import model_identity

METRIC = "def mine(outputs, labels):\n    return 1.0\n\n\nmine.higher_is_better = True\n"


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., tuple[RunLab, list[str]]]:
    """A lab in which a teacher has a score, and the list of its measurements."""
    save_teacher(tmp_path / "teacher")

    def make(**sections: Any) -> tuple[RunLab, list[str]]:
        lab, measured = lab_of(config_of(tmp_path, **sections)), list[str]()

        def score(name: str) -> dict[str, float]:
            measured.append(name)
            return {"accuracy": 0.75}

        lab.pool.score = score  # type: ignore[method-assign]
        lab.teacher()
        return lab, measured

    return make


def test_a_measurement_is_made_once_and_kept_for_the_next_start(scored):
    lab, measured = scored()
    again, measured_again = scored()

    scores = [lab.dev_score("teacher"), lab.dev_score("teacher"), again.dev_score("teacher")]

    assert scores == [0.75] * 3
    assert (measured, measured_again) == (["teacher"], [])


def test_a_measurement_that_fails_keeps_nothing(scored):
    lab, _ = scored()

    def fails() -> dict[str, float]:
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        lab.assembly.measured_once("teacher-scored", fails)
    assert not (lab.config.output_dir / "stages").exists()


def identity(config: Any) -> dict[str, Any]:
    source: Any = SimpleNamespace(config=config, files=[], layers=None, folder=None)
    return flatten(model_identity(source, seed=1))


def test_another_version_of_transformers_is_the_same_model(monkeypatch):
    before = identity(BertConfig(num_hidden_layers=3))
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")

    assert identity(BertConfig(num_hidden_layers=3)) == before
