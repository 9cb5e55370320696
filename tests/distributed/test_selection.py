"""Knowledge selection under several ranks: all choose alike, and the student begins anew."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from cases import lab_of
from equal_runs import difference
from slow_cases import slow
from tiny_runs import NO_DROPOUT, bert, review_task, run_in
from whole_run import weights

from megakd.engine import distributed
from megakd.methods import run_method
from megakd.methods.knowledge_selection import selecting
from megakd.methods.knowledge_selection.selecting import Selecting, Selector
from megakd.training.evaluation import StageProbe


def selected(config_path: str, overrides: list[str]) -> dict:
    """Runs the method and tells what was seen of it.

    measured: how often the loss was measured; seeds: those of the generators of this rank's GPUs.
    """
    actions, measured, seeds = [], [], []
    chosen, loss = Selecting._chosen, StageProbe.loss

    def choosing(self, number, summaries):
        actions.append(chosen(self, number, summaries))
        return actions[-1]

    def measuring(self, student):
        measured.append(loss(self, student))
        return measured[-1]

    with (
        patch("torch.cuda.manual_seed_all", seeds.append),
        patch.object(Selecting, "_chosen", choosing),
        patch.object(StageProbe, "loss", measuring),
        lab_of(config_path, overrides) as lab,
    ):
        result = run_method(lab.config.method, lab)
    facts = {"actions": actions, "measured": len(measured), "seeds": seeds}
    return {**facts, "weights": weights(result.folder)}


def learn_apart(config_path: str, overrides: list[str]) -> dict:
    """Runs the method on ranks whose actors say something else, as on other processors."""
    action = Selector.action

    def other(selector, state):
        answer = action(selector, state)
        return answer if distributed.ranks().is_main else 1 - answer

    with patch.object(Selector, "action", other):
        return selected(config_path, overrides)


def learn_noisily(config_path: str, overrides: list[str]) -> dict:
    """Runs the method with noise that switches every kind off in some phases."""
    with patch.object(selecting, "NOISE", 20.0):
        return selected(config_path, overrides)


EPISODES, STEPS, PHASE = 2, 4, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("selection")
    method = {"episodes": EPISODES, "phase_steps": PHASE}
    config = run_in(
        folder,
        review_task(folder),
        teacher={"model": bert(4, initializer_range=0.2, **NO_DROPOUT)},
        student={"model": bert(2, **NO_DROPOUT)},
        method={"name": "knowledge_selection", **method},
        # Large, so that the size of a gradient shows in the step that Adam takes.
        train={"max_steps": STEPS, "adam_epsilon": 0.01},
    )
    return str(config)


@pytest.fixture
def learn(run_case, config):
    def learned(ranks: int, *overrides: str, how: str = "selected") -> list[dict]:
        return run_case(f"test_selection.{how}", config, ranks, *overrides)

    return learned


SOFT, HARD = ("method.action=soft",), ("method.action=hard",)
# Noise switches both kinds off in some phases: their loss is 0, with gradients of 0.
OFF = ("objective=[{loss: hard_cross_entropy}, {loss: hidden_mse}]",)
# Without a loss on the logits, neither the head nor the last layer is reached, and no gradient of
# an earlier step may be there.
LEFT_OUT = (
    "method={name: knowledge_selection, policy: random_hard}",
    "objective=[{loss: hard_cross_entropy}, {loss: hidden_mse, layer_mapping: ['1:2']}]",
)


@pytest.mark.parametrize(
    ("settings", "stage"), [(LEFT_OUT, 3), *slow((SOFT, 2), (HARD, 1), (OFF, 3))]
)
def test_two_ranks_choose_and_learn_as_one_does(learn, settings, stage):
    how = "learn_noisily" if settings == OFF else "selected"

    first, second = learn(2, *settings, f"student.deepspeed=zero{stage}", how=how)
    (alone,) = learn(1, *settings, "student.deepspeed=zero0", how=how)

    assert first["actions"] == second["actions"]
    for ours, other in zip(first["actions"], alone["actions"], strict=True):
        assert ours == pytest.approx(other, abs=1e-3)
    assert settings != OFF or (0.0, 0.0) in map(tuple, first["actions"])
    tolerance = 1e-5 if settings == LEFT_OUT else 1e-4
    assert difference(first["weights"], alone["weights"]) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(1, 0), (4, 3)])
def test_an_episode_goes_on_with_other_ranks(goes_on, config, world, zero):
    """The next episode begins from the student that the first ranks remembered."""
    saved, words = f"student/step-{STEPS - 1}", ("student.deepspeed=zero2", *SOFT)

    outs = goes_on(config, saved, *words, world=world, zero=zero, rows=8)

    assert difference(*(weights(out / "final") for out in outs)) < 1e-5


@pytest.mark.slow
def test_ranks_whose_processors_differ_take_the_action_of_the_first(learn):
    settings = ("student.deepspeed=zero2", *SOFT)

    first, second = learn(2, *settings, how="learn_apart")

    assert first["actions"] == second["actions"]
    assert len({*map(tuple, first["actions"])}) > 1


@pytest.mark.slow
def test_one_choice_serves_all_micro_batches_and_the_loss_is_measured_once_per_phase(learn):
    once, twice = learn(2)[0], learn(2, "train.gradient_accumulation_steps=2")[0]

    assert len(once["actions"]) == len(twice["actions"]) == (EPISODES + 1) * STEPS
    assert once["measured"] == 1 + EPISODES * STEPS // PHASE  # once before the first


@pytest.mark.slow
def test_no_two_ranks_draw_the_same_dropout_on_their_gpus(learn):
    """Neither projections nor a selector, which are equal on all ranks, seed a GPU."""
    first, second = (rank["seeds"] for rank in learn(2))

    assert first
    assert set(first).isdisjoint(second)
