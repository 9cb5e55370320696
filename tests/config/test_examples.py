"""The configs in launch/examples: every file is accepted, and says where its settings come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config.file import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "launch" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_valid_config_with_a_comment(path: Path) -> None:
    config = load_config(path, ())

    assert path.read_text(encoding="utf-8").startswith("# ")
    assert str(config.output_dir).startswith("runs/")
