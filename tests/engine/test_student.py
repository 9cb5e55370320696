"""The student's engine on a device that this machine may lack."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megakd.engine.student import StudentEngine


@pytest.mark.parametrize("norm", [math.inf, torch.tensor(2.0)])
def test_every_norm_is_on_the_device_of_the_engine_also_of_a_step_that_overflows(norm):
    """Norms of many steps are read as one tensor. DeepSpeed gives a number for an overflow."""
    engine = SimpleNamespace(
        device=torch.device("meta"),
        optimizer=SimpleNamespace(param_groups=[]),
        zero_optimization=lambda: True,
        get_global_grad_norm=lambda: norm,
        train=lambda: None,
        step=lambda: None,
    )
    student = StudentEngine(cast("Any", engine))

    kept = student.step(1e-3)

    assert kept is not None
    assert (kept.device, kept.dtype) == (engine.device, torch.float32)
