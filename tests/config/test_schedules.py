"""Learning rates against transformers' own schedulers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from megakd.config.sections import ScheduleName, TrainConfig, learning_rate_schedule, warmup_steps
from megakd.errors import ConfigError

# Without options, with them, and with the one that replaces the number of all steps.
OPTIONS = [
    ("linear", {}),
    ("polynomial", {"power": 2.0, "lr_end": 0.01}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.0}),
    ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 3, "min_lr_ratio": 0.1}),
]


def rates_of_transformers(name, total, warm, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(name, optimizer, warm, total, scheduler_specific_kwargs=options)
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps:UserWarning")
@pytest.mark.parametrize("warm", [0, 6])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_step_has_the_rate_that_transformers_gives_it(name, options, warm):
    schedule = {"lr_scheduler_type": name, "lr_scheduler_kwargs": options, "warmup_steps": warm}
    train = TrainConfig(learning_rate=0.3, **schedule)

    ours = learning_rate_schedule(train, 20)

    expected = list(rates_of_transformers(name, 20, warm, options))
    assert [ours(step) for step in range(20)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_a_stage_of_one_step_has_a_rate(name):
    options = {"cosine_with_min_lr": {"min_lr_rate": 0.1}}
    options["warmup_stable_decay"] = {"num_decay_steps": 1}
    train = TrainConfig(lr_scheduler_type=name, lr_scheduler_kwargs=options.get(name))

    assert learning_rate_schedule(train, 1)(0) == train.learning_rate


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("linear", {"a": 2}, "unexpected keyword argument 'a'; correct train.lr_scheduler_kwargs"),
        ("polynomial", {"powr": 2}, "unexpected keyword argument 'powr'"),
        ("polynomial", {"power": "a"}, "correct train.lr_scheduler_kwargs"),
        ("polynomial", {"lr_end": 1}, "lr_end"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 20}, "take 21 steps, and the stage has 10"),
    ],
)
def test_options_that_a_schedule_does_not_have_or_lacks_are_refused(name, options, text):
    train = TrainConfig(lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=1)

    with pytest.raises(ConfigError) as refused:
        learning_rate_schedule(train, 10)

    assert str(refused.value).startswith(f"train.lr_scheduler_type: {name}: ")
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("ratio", "steps", "warm"), [(0.0, 0, 0), (0.1, 0, 3), (0.1, 7, 7), (1.0, 0, 25)]
)
def test_warm_up_is_a_share_of_the_steps_rounded_up_unless_steps_are_given(ratio, steps, warm):
    assert warmup_steps(TrainConfig(warmup_ratio=ratio, warmup_steps=steps), 25) == warm


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_a_constant_rate_may_have_a_warm_up(name):
    train = TrainConfig(learning_rate=0.4, lr_scheduler_type=name, warmup_steps=2)

    rate = learning_rate_schedule(train, 20)

    assert [rate(step) for step in (0, 1, 2, 19)] == [0.0, 0.2, 0.4, 0.4]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_is_0_at_the_end_and_does_not_come_back(shape):
    rate = learning_rate_schedule(TrainConfig(lr_scheduler_type=shape), 20)

    assert [rate(20), rate(25)] == [0.0, 0.0]
