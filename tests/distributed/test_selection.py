"""Knowledge selection under several ranks: all choose alike, and the student begins anew."""

from __future__ import annotations

import pytest
from equal_runs import difference
from tiny_runs import NO_DROPOUT, bert, config_tree, write_config, write_reviews

EPISODES, STEPS, PHASE = 2, 6, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("selection")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(
        folder / "unused",
        task,
        teacher={"model": bert(4, initializer_range=0.2, **NO_DROPOUT)},
        student={"model": bert(2, **NO_DROPOUT)},
        method={
            "name": "knowledge_selection",
            "episodes": EPISODES,
            "phase_steps": PHASE,
            "hidden": 8,
        },
    )
    # Large, so that the size of a gradient shows in the step that Adam takes.
    tree["train"] |= {"max_steps": STEPS, "adam_epsilon": 0.01}
    return str(write_config(folder / "run.yaml", tree))


@pytest.fixture
def learn(run_case, config):
    """The findings of all ranks."""

    def learned(ranks: int, *overrides: str, how: str = "learn") -> list[dict]:
        return run_case(f"selection_cases.{how}", config, ranks, *overrides)

    return learned


SOFT, HARD = ("method.action=soft",), ("method.action=hard",)
# Noise switches both kinds off in some phases: their loss is 0, with gradients of 0.
OFF = ("objective=[{loss: hard_cross_entropy}, {loss: hidden_mse}]", "method.noise=20.0")
# Without a loss on the logits, neither the head nor the last layer is reached, and no gradient of
# an earlier step may be there.
LEFT_OUT = (
    "method={name: knowledge_selection, policy: random_hard}",
    "objective=[{loss: hard_cross_entropy}, {loss: hidden_mse, layer_mapping: ['1:2']}]",
)
CASES = [(SOFT, 2), (HARD, 3), (OFF, 2), (OFF, 3), (LEFT_OUT, 3)]
SLOW = [(SOFT, 0), (SOFT, 1), (SOFT, 3), (HARD, 0), (HARD, 1), (HARD, 2), (OFF, 0), (OFF, 1)]
SLOW += [(LEFT_OUT, 2)]


@pytest.mark.parametrize(
    ("settings", "stage"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_ranks_choose_and_learn_as_one_does(learn, settings, stage):
    first, second = learn(2, *settings, f"student.deepspeed=zero{stage}")
    (alone,) = learn(1, *settings, "student.deepspeed=zero0")

    assert first["actions"] == second["actions"]
    for ours, other in zip(first["actions"], alone["actions"], strict=True):
        assert ours == pytest.approx(other, abs=1e-3)
    assert settings != OFF or (0.0, 0.0) in map(tuple, first["actions"])
    tolerance = 1e-5 if settings == LEFT_OUT else 1e-4
    assert difference(first["weights"], alone["weights"]) <= tolerance


@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in range(3)), 3]
)
def test_a_student_that_begins_anew_is_as_it_was(learn, stage):
    """Weights and optimizer: its first step is the first step again."""
    student = f"student.deepspeed=zero{stage}"

    found = learn(2, student, "train.lr_scheduler_type=constant")[0]

    assert len(found["beginnings"]) == EPISODES
    assert found["beginnings"][0] == found["beginnings"][1]


@pytest.mark.parametrize(
    ("stage", "action"), [(2, SOFT), pytest.param(3, HARD, marks=pytest.mark.slow)]
)
def test_ranks_whose_processors_differ_take_the_action_of_the_first(learn, stage, action):
    settings = (f"student.deepspeed=zero{stage}", *action, "method.noise=1.0")

    first, second = learn(2, *settings, how="learn_apart")

    assert first["actions"] == second["actions"]
    assert len({*map(tuple, first["actions"])}) > 1


def test_one_choice_serves_all_micro_batches_and_the_loss_is_measured_once_per_phase(learn):
    once, twice = learn(2)[0], learn(2, "train.gradient_accumulation_steps=2")[0]

    assert len(once["actions"]) == len(twice["actions"]) == (EPISODES + 1) * STEPS
    assert once["measured"] == 1 + EPISODES * STEPS // PHASE  # once before the first


def test_no_two_ranks_draw_the_same_dropout_on_their_gpus(learn):
    """Neither projections nor a selector, which are equal on all ranks, seed a GPU."""
    first, second = learn(2, how="device_seeds")

    assert first
    assert set(first).isdisjoint(second)
