"""Runs of knowledge selection on gloo ranks."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from unittest.mock import patch

from cases import lab_of
from safetensors.torch import load_file

from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.engine.student import StudentEngine
from megakd.methods import run_method
from megakd.methods.knowledge_selection.selecting import Selecting
from megakd.methods.knowledge_selection.selector import Selector
from megakd.training.probe import StageProbe


class Watch:
    """Notes what is chosen, measured and begun while a run goes on."""

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
    """Return the weights and the moments of the optimizer."""
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
        said = action(selector, state)
        return said if distributed.ranks().is_main else 1 - said

    with patch.object(Selector, "action", other):
        return learn(config_path, overrides)


def device_seeds(config_path: str, overrides: list[str]) -> list[int]:
    """Runs the method and tells what the generators of this rank's GPUs are seeded with."""
    seeds: list[int] = []
    with patch("torch.cuda.manual_seed_all", seeds.append):
        learn(config_path, overrides)
    return seeds


def learn(config_path: str, overrides: list[str]) -> dict:
    """Runs the method and tells what was seen of it."""
    watch = Watch()
    with watch.watching(), lab_of(config_path, overrides) as lab:
        result = run_method(lab.config.method, lab)
    weights = load_file(result.folder / "model.safetensors")
    facts = {"actions": watch.actions, "beginnings": watch.beginnings, "measured": watch.measured}
    return {**facts, "weights": weights}
