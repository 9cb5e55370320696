"""What the gloo ranks tell of a run of knowledge selection."""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import load_file

from megakd.config.file import load_config
from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.engine.student import StudentEngine
from megakd.inputs.inputs import prepare
from megakd.methods import run_method
from megakd.methods.knowledge_selection.selecting import Selecting
from megakd.methods.knowledge_selection.selector import Selector
from megakd.run.run_lab import RunLab
from megakd.training.probe import StageProbe
from megakd.training.progress import Reporter


class Watch:
    """Notes what is chosen, measured and begun while a run goes on."""

    def __init__(self) -> None:
        self.actions: list[tuple[float, ...]] = []
        self.beginnings: list[str] = []
        self.measured = 0
        self._fresh = False

    def __enter__(self):
        self._kept = Selecting._chosen, StageProbe.loss, StageProbe.reset, StudentEngine.step
        chosen, loss, reset, step = self._kept
        watch = self

        def choosing(strategy, step, summaries):
            action = chosen(strategy, step, summaries)
            watch.actions.append(action)
            return action

        def measuring(probe, student):
            watch.measured += 1
            watch._fresh = watch._fresh or watch.measured == 1
            return loss(probe, student)

        def resetting(probe, student):
            reset(probe, student)
            watch._fresh = True

        def stepping(student, rate):
            before = watch._digest(student) if watch._fresh else ""
            step(student, rate)
            if watch._fresh:
                watch.beginnings.append(before)
            watch._fresh = False

        Selecting._chosen, StageProbe.loss = choosing, measuring
        StageProbe.reset, StudentEngine.step = resetting, stepping
        return self

    def __exit__(self, *_):
        Selecting._chosen, StageProbe.loss, StageProbe.reset, StudentEngine.step = self._kept

    def _digest(self, student) -> str:
        """Of the weights, and of the moments that the optimizer has."""
        found = hashlib.sha256()
        for _, tensor in gathered_state(student.student):
            found.update(tensor.float().numpy().tobytes())
        for state in student._engine.optimizer.state.values():
            found.update(str(float(state["exp_avg"].abs().sum())).encode())
        return found.hexdigest()


def learn_apart(config_path: str, overrides: list[str]) -> dict:
    """Runs the method on ranks whose actors say something else, as on other processors."""
    said, rank = Selector.action, distributed.ranks().rank

    def other(selector, state):
        action = said(selector, state)
        return action if rank == 0 else 1 - action

    Selector.action = other
    try:
        return learn(config_path, overrides)
    finally:
        Selector.action = said


def device_seeds(config_path: str, overrides: list[str]) -> list[int]:
    """Runs the method and tells what the generators of this rank's GPUs are seeded with."""
    seeds: list[int] = []
    with patch("torch.cuda.manual_seed_all", seeds.append):
        learn(config_path, overrides)
    return seeds


def learn(config_path: str, overrides: list[str]) -> dict:
    """Runs the method and tells what was seen of it."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=False)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    with Watch() as watch:
        result = run_method(config.method, lab)
        lab.close()
    weights = load_file(result.folder / "model.safetensors")
    facts = {"actions": watch.actions, "beginnings": watch.beginnings, "measured": watch.measured}
    return {**facts, "weights": weights}
