"""Runs of every method and every kind of row end with the numbers that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden_cases import CASES, STEPS, write_data
from one_rank import OneRank
from recorded import check_recorded, digest, learned, reported, resolved
from tiny_runs import config_tree, write_config
from whole_run import finish, unexplained

from megakd.config.file import load_config
from megakd.training.inputs import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("golden") / "data")


def config_of(data: Path, name: str) -> Path:
    given: dict[str, Any] = CASES[name](data)
    train = {"max_steps": STEPS, **given.pop("train", {})}
    tree = config_tree(
        data.parent / name, given.pop("task"), train=train, log={"logging_steps": 1}, **given
    )
    return write_config(data.parent / f"{name}.yaml", tree)


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_and_reports_what_was_recorded(one_rank: OneRank, data: Path, name: str):
    config = config_of(data, name)
    if name == "cache":
        assert one_rank.megakd("cache", config).code == 0

    finish(one_rank, config)

    out = data.parent / name
    assert unexplained(out) == []
    check_recorded(
        name,
        {
            "steps": learned(out),
            "report": reported(out),
            "config": resolved(out),
        },
        folder=data.parent,
    )


# The other cases have the rows of one of these.
ROWS = (
    "labels", "pairs", "masked", "causal", "chat", "last_answers", "stream", "mixture", "cache",
    "routed", "mixed_vocabulary",
)  # fmt: skip


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_encoded_as_recorded(data: Path, name: str):
    inputs = prepare(load_config(config_of(data, name)))

    encoded = inputs.encoded
    check_recorded(
        f"rows-{name}",
        {"train": digest(encoded.train), "validation": digest(encoded.validation)},
    )
