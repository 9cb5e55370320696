"""Learning rates against transformers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from megakd.config import TrainConfig
from megakd.schedules import learning_rate_schedule, warmup_steps

# The name without warm-up in it is transformers' schedule that ignores warm-up.
THEIRS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("total", [1, 20])
@pytest.mark.parametrize("warm", [0, 1, 6])
@pytest.mark.parametrize("shape", THEIRS)
def test_every_step_has_the_rate_that_transformers_gives_it(shape, warm, total):
    train = TrainConfig(learning_rate=0.3, lr_scheduler_type=shape, warmup_steps=warm)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(
        THEIRS[shape], optimizer, num_warmup_steps=warm, num_training_steps=total
    )
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()

    ours = learning_rate_schedule(train, total)

    assert [ours(step) for step in range(total)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "steps", "warm"), [(0.0, 0, 0), (0.1, 0, 3), (0.1, 7, 7), (1.0, 0, 25)]
)
def test_warm_up_is_a_share_of_the_steps_rounded_up_unless_steps_are_given(ratio, steps, warm):
    assert warmup_steps(TrainConfig(warmup_ratio=ratio, warmup_steps=steps), 25) == warm


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_is_0_at_the_end_and_does_not_come_back(shape):
    rate = learning_rate_schedule(TrainConfig(lr_scheduler_type=shape), 20)

    assert [rate(20), rate(25)] == [0.0, 0.0]
