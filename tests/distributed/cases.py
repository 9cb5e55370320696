"""What the gloo ranks run: real stages over the documented rooms, weights and gradients out."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from megakd.config.file import load_config
from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine import collectives, distributed
from megakd.engine.sharding import full_shape, gathered_state
from megakd.inputs.inputs import prepare
from megakd.run.run_lab import RunLab
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun


class Watching(Constant):
    """Keeps the whole gradient of every step, as it is before the update."""

    gradients: list = []  # noqa: RUF012 - emptied by every case
    shards: list = []  # noqa: RUF012

    def before_update(self, step, student):
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, parameter in student.bundle.named_parameters():
            full = safe_get_full_grad(parameter)
            full = parameter.grad if full is None else full
            if full is not None:
                found[name] = full.detach().float().cpu().clone()
        self.gradients.append(found)
        if step == 0:
            self.shards.append(joined_shards(student))


def joined_shards(student) -> dict:
    """Weights and gradients of the first learner by name, put together of all ranks' shards."""
    learning = {n: p for n, p in student.student.named_parameters() if p.requires_grad}
    sizes = {name: full_shape(p).numel() for name, p in learning.items()}
    whole = {name: torch.zeros(2, size) for name, size in sizes.items()}
    for shard in student.local_shards():
        part = slice(shard.offset, shard.offset + len(shard.weight))
        whole[shard.name][0, part] += shard.weight.detach()
        whole[shard.name][1, part] += shard.gradient
    return {name: collectives.all_reduce_(both) for name, both in whole.items()}


def train(config_path: str, overrides: list[str], steps: int, *, generates: bool = True) -> dict:
    """Train `steps` steps of a run config's student; return weights, gradients and losses.

    generates: whether the student learns from its own texts if the config has `rollout`.
    """
    config = load_config(Path(config_path), overrides)
    prepared = prepare(config)
    lab = RunLab(config, prepared, distributed.ranks(), Reporter(config.output_dir, is_main=False))
    teachers = (lab.teacher(),) if config.teacher else ()
    watching = Watching((Pass(teacher=teachers[0] if teachers else None),))
    Watching.gradients.clear()
    Watching.shards.clear()
    stage = Stage(
        name="student",
        teachers=teachers,
        objective=config.objective,
        strategy=watching,
        rollouts=config.rollout if generates else None,
        train=config.train,
        deepspeed=config.student.deepspeed,
    )
    asked = [name for name in teachers if name not in config.base_teachers]
    frozen = {name: lab.pool.open(name, stage) for name in asked}
    run = StageRun(
        stage,
        lab.assembly,
        teachers=frozen,
        reporter=Reporter(config.output_dir, is_main=False),
        fingerprint={},
    )
    initial = dict(gathered_state(run.student.bundle))
    losses = []
    for index in range(steps):
        report = run.trainer.train_step(run.source.step(index))
        parts = {n: collectives.all_reduce_(v.clone().float()) for n, v in report.parts.items()}
        losses.append({name: float(value) for name, value in parts.items()})
    norm = run.student.gradient_norm()
    result = {
        "initial": initial,
        "final": dict(gathered_state(run.student.bundle)),
        "gradients": list(Watching.gradients),
        "shards": list(Watching.shards),
        "losses": losses,
        "gradient_norm": None if norm is None else float(norm),
        "scores": run.evaluation.scorer.score(run.student.predict, prepared.encoded.validation),
        "local_elements": sum(
            getattr(p, "ds_tensor", p).numel() for p in run.student.bundle.parameters()
        ),
    }
    run.close()
    for teacher in frozen.values():
        teacher.destroy()
    del run, frozen
    gc.collect()
    return result


def steps_taken(config_path: str) -> int:
    """Train the student's stage to its end and return the number of its steps on this rank."""
    config = load_config(Path(config_path))
    reporter = Reporter(config.output_dir, is_main=False)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    teacher = lab.teacher()
    strategy = Constant((Pass(teacher=teacher),))
    stage = Stage(
        name="student", teachers=(teacher,), objective=config.objective, strategy=strategy
    )
    result = lab.train(stage)
    lab.close()
    gc.collect()
    return result.steps
