"""What the gloo ranks run: labs, stages and methods of run configs, weights and gradients out."""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch

from megakd.cli import train_main
from megakd.config.file import load_config
from megakd.data.batch import Pass
from megakd.engine import collectives, distributed
from megakd.engine.sharding import full_shape, gathered_state
from megakd.run.run_work import RunWork
from megakd.stage import Constant, Stage, Strategy
from megakd.training.inputs import prepare
from megakd.training.lab import Lab
from megakd.training.log import Reporter
from megakd.training.stage_run import StageRun


@contextmanager
def lab_of(
    config_path: str, overrides: Sequence[str] = (), *, writes: bool = False
) -> Iterator[Lab[RunWork]]:
    """The lab of a run; with `writes`, rank 0 logs to metrics.jsonl."""
    config = load_config(Path(config_path), overrides)
    ranks = distributed.ranks()
    reporter = Reporter(config.output_dir, is_main=writes and ranks.is_main)
    lab = Lab(RunWork(prepare(config), ranks, reporter))
    try:
        yield lab
    finally:
        lab.work.close()


def command(*arguments: str) -> tuple[int, str]:
    """Run `launch/train.py ARGUMENTS` in the group of these ranks: its exit code and output."""
    output, log = io.StringIO(), logging.getLogger("megakd")
    level = log.level
    logging.getLogger().handlers.clear()  # the last command's output
    with (
        patch.object(distributed, "stop", lambda **_: None),
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        code = train_main(arguments)
    log.setLevel(level)
    gc.freeze()
    return code, output.getvalue()


@contextmanager
def started(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    strategy=Constant,
    scores: bool = False,
):
    """The stage of a run's student and its teacher, None if that is the student's own base.

    scores: the teacher is scored before the stage begins.
    """
    with lab_of(config_path, overrides) as lab:
        config = lab.config
        name = lab.teacher()
        stage = Stage(
            name="student",
            teachers=(name,),
            objective=config.objective,
            strategy=strategy((Pass(teacher=name),)),
            train=config.train,
        )
        teacher = None if name in config.base_teachers else lab.work.pool.open(name, stage)
        if scores:
            lab.work.pool._measure_opened(name, teacher)
        run = StageRun(stage, lab.work.assembly, teachers={name: teacher} if teacher else {})
        yield run, teacher
        run.close()
        if teacher:
            teacher.destroy()


def sgd_engine(module, rate: float, stage: int):
    """Plain SGD with DeepSpeed, at a ZeRO stage that keeps no weight whole for long."""
    kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    none = {f"stage3_{key}": 0 for key in (*kept, "prefetch_bucket_size")}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(none if stage == 3 else {})},
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


class Watching(Strategy):
    """Keeps the whole gradient of every step, as it is before the update."""

    def __init__(self, planned) -> None:
        self.planned = planned
        self.gradients: list[dict] = []
        self.shards: dict = {}

    def passes(self, step):
        return self.planned

    def before_update(self, step, student):
        from deepspeed.utils import safe_get_full_grad

        gradients, shards = {}, joined_shards(student)
        for name, parameter in student.bundle.named_parameters():
            joined = shards.get(name.removeprefix("learners.0."))
            if step > 0 and joined is not None:
                # In one collective; those of the first step are DeepSpeed's answers.
                full = joined[1].view(full_shape(parameter))
            else:
                full = safe_get_full_grad(parameter)
                full = parameter.grad if full is None else full
            if full is not None:
                gradients[name] = full.detach().float().cpu().clone()
        self.gradients.append(gradients)
        self.shards = self.shards or shards


def joined_shards(student) -> dict:
    """Weights and gradients of the first learner by name, put together of all ranks' shards."""
    learning = {n: p for n, p in student.student.named_parameters() if p.requires_grad}
    sizes = {name: full_shape(p).numel() for name, p in learning.items()}
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    whole = torch.zeros(2, sum(sizes.values()))
    for shard in student.local_shards():
        first = starts[shard.name] + shard.offset
        part = slice(first, first + len(shard.weight))
        whole[0, part] += shard.weight.detach()
        whole[1, part] += shard.gradient
    parts = collectives.all_reduce_(whole).split([*sizes.values()], dim=1)
    return dict(zip(sizes, parts, strict=True))


def summed(parts: dict) -> dict[str, float]:
    totals = collectives.all_reduce_(torch.stack([part.float() for part in parts.values()]))
    return dict(zip(parts, totals.tolist(), strict=True))


def train(config_path: str, overrides: list[str], steps: int) -> dict:
    """Train `steps` steps of a run config's student; return weights, gradients and losses."""
    with started(config_path, overrides, strategy=Watching) as (run, _):
        initial = dict(gathered_state(run.student.bundle))
        reports = (run.trainer.train_step(run.batch_source.step(step)) for step in range(steps))
        losses = [summed(one.parts) for one in reports]
        rows = run.assembly.prepared.encoded.validation
        return {
            "initial": initial,
            "final": dict(gathered_state(run.student.bundle)),
            "gradients": run.stage.strategy.gradients,
            "shards": run.stage.strategy.shards,
            "losses": losses,
            "scores": run.scorer.score(run.student.predict, rows),
            "local_elements": sum(
                getattr(p, "ds_tensor", p).numel() for p in run.student.bundle.parameters()
            ),
        }


def local(parameter) -> torch.Tensor:
    return getattr(parameter, "ds_tensor", parameter).detach()


def elements(module) -> int:
    """Of all weights, on all ranks."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
