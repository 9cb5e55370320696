"""Curves of generated texts by position: the same on any ranks and at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_rollouts import finish, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture

TOKENS, ROWS = 6, 5


def evaluated(command, folder: Path, texts: Path, *, zero: int, world: int) -> dict[str, float]:
    """The values of texts in the only evaluation of a run."""
    generation = {"max_new_tokens": TOKENS, "rows": ROWS, "prompt_tokens": 4}
    path = write_config(
        folder,
        texts,
        zero=zero,
        train={"per_device_train_batch_size": 12 // world, "max_steps": 2},
        objective=[{"loss": "soft_target_kl"}],
        rollout=None,
        eval={"eval_steps": 2, "keep_best": False, "generation": generation},
    )
    out = finish(command, path, folder / "out", world=world)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (record,) = [record for record in map(json.loads, lines) if "eval/text_kl" in record]
    return {k: v for k, v in record.items() if k.startswith(("text/", "eval/text_"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(command, texts, folder) -> dict[str, float]:
    return evaluated(command, folder, texts, zero=0, world=1)


def test_the_report_has_the_texts_and_their_metrics(alone, folder) -> None:
    report = json.loads((folder / "out" / "report.json").read_text())

    (entry,) = report["generation"]
    assert (entry["stage"], entry["step"], len(entry["texts"])) == ("student", 2, ROWS)
    assert entry["metrics"]["text_kl"] == alone["eval/text_kl"]
    assert report["warnings"] == []
    page = (folder / "out" / "report.html").read_text()
    assert "Generated texts by position" in page


def test_the_means_by_position_are_those_of_the_objective_on_the_same_texts(alone) -> None:
    """At temperature 1, the loss is the divergence."""
    assert alone["eval/text_kl"] == pytest.approx(alone["eval/text_soft_target_kl"], rel=1e-4)
    assert {key for key in alone if key.endswith("/kl")} == {
        f"text/{bucket}/kl" for bucket in ("0-0", "1-1", "2-2", "3-5")
    }
    assert 0 < alone["text/0-0/kl"] < alone["text/0-0/teacher_entropy"] + 10
    # Texts without an end have one token in each of the first buckets, and three in the last.
    if alone["eval/text_truncated"] == 1:
        parts = [alone[f"text/{bucket}/kl"] for bucket in ("0-0", "1-1", "2-2", *["3-5"] * 3)]
        assert sum(parts) / TOKENS == pytest.approx(alone["eval/text_kl"], rel=1e-5)


@pytest.mark.parametrize(("zero", "world"), [pytest.param(2, 3, marks=pytest.mark.slow), (3, 2)])
def test_values_by_position_do_not_depend_on_ranks_or_sharding(
    command, texts, alone, tmp_path, zero, world
) -> None:
    result = evaluated(command, tmp_path, texts, zero=zero, world=world)

    assert result.keys() == alone.keys()
    assert result == pytest.approx(alone, rel=1e-3, abs=1e-5)
