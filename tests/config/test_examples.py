"""The configs in launch/examples: every file is accepted, and says where its settings come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config.file import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "launch" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_valid_config_with_a_comment(path):
    config = load_config(path, ())

    assert path.read_text(encoding="utf-8").startswith("# ")
    assert str(config.output_dir).startswith("runs/")


@pytest.mark.parametrize("method", ["direct", "maxidisc"])
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("minidisc_*.yaml")), ids=lambda p: p.stem)
def test_an_example_of_minidisc_takes_another_assistant_by_one_switch(path, method):
    assert load_config(path, (f"method.name={method}",)).method.name == method
