"""What the gloo ranks tell of the two engines of a run, beside weights and gradients."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import psutil
import torch

from megakd.config.file import load_config
from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine import distributed
from megakd.engine.memory import forget_models
from megakd.inputs.inputs import prepare
from megakd.run.run_lab import RunLab
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun


def two_engines(config_path: str, folder: str) -> dict:
    """One step of student and teacher, then a checkpoint: what each engine holds."""
    run, teacher = _started(config_path)
    whole = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in _weights(teacher))
    before = [_local(p).clone() for p in _weights(teacher)]
    run.trainer.train_step(run.source.step(0))
    after = [_local(p) for p in _weights(teacher)]
    run.student.save(Path(folder), "saved")
    facts = {
        "teacher_elements": whole,
        "teacher_local": sum(_local(p).numel() for p in _weights(teacher)),
        "teacher_devices": sorted({str(_local(p).device) for p in _weights(teacher)}),
        "teacher_optimizer": type(teacher._engine.optimizer).__name__,
        "teacher_trains": any(p.requires_grad for p in _weights(teacher)),
        "teacher_gradients": sum(p.grad is not None for p in _weights(teacher)),
        "teacher_changed": any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "student_optimizer": type(run.student._engine.basic_optimizer).__name__,
        "student_elements": sum(
            p.ds_numel if hasattr(p, "ds_numel") else p.numel()
            for p in run.student.bundle.parameters()
        ),
    }
    run.close()
    teacher.destroy()
    return facts


def _started(config_path: str, overrides: list[str] | None = None, *, scores: bool = False):
    config = load_config(Path(config_path), overrides or [])
    ranks, prepared = distributed.ranks(), prepare(config)
    reporter = Reporter(config.output_dir, is_main=False)
    lab = RunLab(config, prepared, ranks, reporter)
    name = lab.teacher()
    stage = Stage(
        name="student",
        teachers=(name,),
        objective=config.objective,
        strategy=Constant((Pass(teacher=name),)),
        train=config.train,
        deepspeed=config.student.deepspeed,
    )
    teacher = lab.pool.open(name, stage)
    if scores:
        lab.pool._measure_opened(name, teacher)
    run = StageRun(
        stage,
        lab.assembly,
        teachers={name: teacher},
        reporter=reporter,
        fingerprint={},
    )
    return run, teacher


def losses(config_path: str, overrides: list[str], *scored: str) -> list[dict[str, float]]:
    """This rank's losses of three steps, with a teacher that is scored before them if `scored`."""
    run, teacher = _started(config_path, overrides, scores=bool(scored))
    reports = [run.trainer.train_step(run.source.step(step)) for step in range(3)]
    found = [{name: float(value) for name, value in r.parts.items()} for r in reports]
    run.close()
    teacher.destroy()
    return found


def consecutive_stages(config_path: str, out: str, *closed: str) -> int:
    """Two stages with one teacher, `closed` between them; how often the teacher was opened."""
    config = load_config(Path(config_path), [f"output_dir={out}"])
    reporter = Reporter(config.output_dir, is_main=False)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    teacher = lab.teacher()
    with patch.object(lab.pool, "open", wraps=lab.pool.open) as opening:
        for name, terms in (("first", config.objective), ("second", config.objective[:1])):
            strategy = Constant((Pass(teacher=teacher),))
            lab.train(Stage(name=name, teachers=(teacher,), objective=terms, strategy=strategy))
            if closed:
                lab.close()
    lab.close()
    return opening.call_count


def _weights(teacher):
    return list(teacher.model.parameters())


def _local(parameter) -> torch.Tensor:
    """This rank's share of a parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def epoch(config_path: str) -> dict:
    """How many examples each step of one epoch counts over all ranks, and what this rank has."""
    run, teacher = _started(config_path)
    steps = [run.source.step(index) for index in range(run.source.steps_per_epoch)]
    counted = [run.trainer.count_units(batches)["examples"].item() for batches in steps]
    mine = [sum(int(b.valid.any(1).sum()) for b in batches) for batches in steps]
    run.close()
    teacher.destroy()
    return {"counted": counted, "mine": mine}


def head_gathers(config_path: str) -> list[dict]:
    """How often the ranks make the matrix of each model's head whole, per micro-batch."""
    from megakd.models.architectures import architecture_of

    run, teacher = _started(config_path)
    models = {"teacher": teacher.model, "student": run.student.student}
    counted = dict.fromkeys(models, 0)
    for name, model in models.items():
        head = architecture_of(model.config).head_of(model).weight
        for parameter in model.parameters():
            _note_gathers(parameter, head, counted, name)
    found, forward_backward = [], run.student.forward_backward

    def counting(*inputs, **options):
        losses = forward_backward(*inputs, **options)
        found.append(dict(counted))
        counted.update(dict.fromkeys(models, 0))
        return losses

    run.trainer.student.forward_backward = counting
    for step in range(2):
        run.trainer.train_step(run.source.step(step))
    run.close()
    teacher.destroy()
    return found


def teacher_gathers(config_path: str, overrides: list[str]) -> int:
    """How many weights of the teacher the ranks make whole in the second step."""
    run, teacher = _started(config_path, overrides)
    counted = [0]
    for parameter in teacher.model.parameters():
        for way in ("all_gather", "all_gather_coalesced"):
            setattr(parameter, way, _counting(getattr(parameter, way), counted))
    for step in range(2):
        counted[0] = 0
        run.trainer.train_step(run.source.step(step))
    run.close()
    teacher.destroy()
    return counted[0]


def _counting(gather, counted: list[int]):
    def counting(*args, **options):
        counted[0] += len((args[0] if args else options.get("param_list")) or [None])
        return gather(*args, **options)

    return counting


def _note_gathers(parameter, head, counted: dict, name: str) -> None:
    """Parameters are gathered alone, or many by the first of them."""
    for way in ("all_gather", "all_gather_coalesced"):
        real = getattr(parameter, way)

        def gather(*args, real=real, **options):
            together = (args[0] if args else options.get("param_list")) or [parameter]
            counted[name] += any(member is head for member in together)
            return real(*args, **options)

        setattr(parameter, way, gather)


def resident_memory(config_path: str, overrides: list[str], stages: int) -> list[int]:
    """The resident bytes of this rank after each of several stages, with their models freed."""
    sizes = []
    for _ in range(stages):
        run, teacher = _started(config_path, overrides)
        run.trainer.train_step(run.source.step(0))
        run.close()
        teacher.destroy()
        del run, teacher
        forget_models()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes
