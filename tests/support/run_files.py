"""The smallest run config as a file, and the message with which a config is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.errors import ConfigError

RUN = """
output_dir: runs/x
task: {type: classification, dataset: texts}
teacher: {model: teacher}
student: {model: student}
method: {name: single}
objective:
  - {loss: hard_cross_entropy}
  - {loss: soft_target_kl, weight: 0.5}
"""


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
