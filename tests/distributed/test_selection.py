"""Knowledge selection under several ranks: all choose alike, and the student begins anew."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from cases import lab_of
from equal_runs import difference
from safetensors.torch import load_file
from tiny_runs import NO_DROPOUT, bert, review_task, run_in

from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.engine.student import StudentEngine
from megakd.methods import run_method
from megakd.methods.knowledge_selection.selecting import Selecting
from megakd.methods.knowledge_selection.selector import Selector
from megakd.training.probe import StageProbe


class Watch:
    def __init__(self) -> None:
        self.actions: list[tuple[float, ...]] = []
        self.beginnings: list[str] = []
        self.measured = 0
        self._fresh = False

    @contextmanager
    def watching(watch):  # noqa: N805 - the functions below have a `self`, too
        chosen, loss = Selecting._chosen, StageProbe.loss
        reset, step = StageProbe.reset, StudentEngine.step

        def choosing(self, number, summaries):
            watch.actions.append(chosen(self, number, summaries))
            return watch.actions[-1]

        def measuring(self, student):
            watch.measured += 1
            watch._fresh = watch._fresh or watch.measured == 1
            return loss(self, student)

        def resetting(self, student):
            reset(self, student)
            watch._fresh = True

        def stepping(self, rate):
            if watch._fresh:
                watch.beginnings.append(digest(self))
            step(self, rate)
            watch._fresh = False

        with (
            patch.object(Selecting, "_chosen", choosing),
            patch.object(StageProbe, "loss", measuring),
            patch.object(StageProbe, "reset", resetting),
            patch.object(StudentEngine, "step", stepping),
        ):
            yield


def digest(student) -> str:
    hashed = hashlib.sha256()
    for _, tensor in gathered_state(student.student):
        hashed.update(tensor.float().numpy().tobytes())
    for state in student._engine.optimizer.state.values():
        hashed.update(str(float(state["exp_avg"].abs().sum())).encode())
    return hashed.hexdigest()


def learn_apart(config_path: str, overrides: list[str]) -> dict:
    """Runs the method on ranks whose actors say something else, as on other processors."""
    action = Selector.action

    def other(selector, state):
        answer = action(selector, state)
        return answer if distributed.ranks().is_main else 1 - answer

    with patch.object(Selector, "action", other):
        return selected(config_path, overrides)


def selected(config_path: str, overrides: list[str]) -> dict:
    """Runs the method and tells what was seen of it.

    seeds: those that the generators of this rank's GPUs get.
    """
    watch, seeds = Watch(), []
    seeding = patch("torch.cuda.manual_seed_all", seeds.append)
    with seeding, watch.watching(), lab_of(config_path, overrides) as lab:
        result = run_method(lab.config.method, lab)
    weights = load_file(result.folder / "model.safetensors")
    facts = {"actions": watch.actions, "beginnings": watch.beginnings, "measured": watch.measured}
    return {**facts, "seeds": seeds, "weights": weights}


EPISODES, STEPS, PHASE = 2, 4, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("selection")
    method = {"episodes": EPISODES, "phase_steps": PHASE, "hidden": 8}
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


@pytest.fixture(scope="module")
def usual(workers, config, tmp_path_factory) -> list[dict]:
    """The findings of two ranks that change nothing of the config but their rows."""
    out = tmp_path_factory.mktemp("usual") / "out"
    words = [f"output_dir={out}", "train.per_device_train_batch_size=2"]
    return workers(2).run("test_selection.selected", config, words)


SOFT, HARD = ("method.action=soft",), ("method.action=hard",)
# Noise switches both kinds off in some phases: their loss is 0, with gradients of 0.
OFF = ("objective=[{loss: hard_cross_entropy}, {loss: hidden_mse}]", "method.noise=20.0")
# Without a loss on the logits, neither the head nor the last layer is reached, and no gradient of
# an earlier step may be there.
LEFT_OUT = (
    "method={name: knowledge_selection, policy: random_hard}",
    "objective=[{loss: hard_cross_entropy}, {loss: hidden_mse, layer_mapping: ['1:2']}]",
)


@pytest.mark.parametrize(("settings", "stage"), [(SOFT, 2), (HARD, 1), (OFF, 3), (LEFT_OUT, 3)])
def test_two_ranks_choose_and_learn_as_one_does_and_begin_every_episode_alike(
    learn, settings, stage
):
    first, second = learn(2, *settings, f"student.deepspeed=zero{stage}")
    (alone,) = learn(1, *settings, "student.deepspeed=zero0")

    assert first["actions"] == second["actions"]
    for ours, other in zip(first["actions"], alone["actions"], strict=True):
        assert ours == pytest.approx(other, abs=1e-3)
    assert settings != OFF or (0.0, 0.0) in map(tuple, first["actions"])
    tolerance = 1e-5 if settings == LEFT_OUT else 1e-4
    assert difference(first["weights"], alone["weights"]) <= tolerance
    if settings != LEFT_OUT:  # weights and optimizer of the student
        assert len(first["beginnings"]) == EPISODES
        assert first["beginnings"][0] == first["beginnings"][1]


@pytest.mark.parametrize(("world", "stage"), [(1, 0), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_an_episode_goes_on_with_other_ranks(command, goes_on, config, tmp_path, world, stage):
    """The next episode begins from the student that the first ranks remembered."""
    out = tmp_path / "out"
    keys = ("save={save_steps: 1, save_total_limit: null}", "student.deepspeed=zero2", *SOFT)
    command("--config", config, f"output_dir={out}", *keys, code=0)
    rows = f"train.per_device_train_batch_size={8 // world}"
    other = f"student.deepspeed=zero{stage}"

    result = goes_on(config, out, "student", STEPS - 1, *keys, other, rows, world=world)

    one, two = (load_file(each / "final" / "model.safetensors") for each in (result, out))
    assert difference(one, two) < 1e-5


def test_ranks_whose_processors_differ_take_the_action_of_the_first(learn):
    settings = ("student.deepspeed=zero2", *SOFT, "method.noise=1.0")

    first, second = learn(2, *settings, how="learn_apart")

    assert first["actions"] == second["actions"]
    assert len({*map(tuple, first["actions"])}) > 1


def test_one_choice_serves_all_micro_batches_and_the_loss_is_measured_once_per_phase(usual, learn):
    once, twice = usual[0], learn(2, "train.gradient_accumulation_steps=2")[0]

    assert len(once["actions"]) == len(twice["actions"]) == (EPISODES + 1) * STEPS
    assert once["measured"] == 1 + EPISODES * STEPS // PHASE  # once before the first


def test_no_two_ranks_draw_the_same_dropout_on_their_gpus(usual):
    """Neither projections nor a selector, which are equal on all ranks, seed a GPU."""
    first, second = (rank["seeds"] for rank in usual)

    assert first
    assert set(first).isdisjoint(second)
