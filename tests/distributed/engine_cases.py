"""Facts about the two engines of a run on gloo ranks, beside weights and gradients."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from cases import lab_of, started

from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.memory import forget_models
from megakd.models.architectures import architecture_of


def local(parameter) -> torch.Tensor:
    """This rank's share of a parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def elements(module) -> int:
    """Of all weights, on all ranks."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def two_engines(config_path: str, folder: str) -> dict:
    """One step of student and teacher, then a checkpoint: what each engine holds."""
    with started(config_path) as (run, teacher):
        weights = list(teacher.model.parameters())
        before = [local(p).clone() for p in weights]
        run.trainer.train_step(run.source.step(0))
        run.student.save(Path(folder), "saved")
        after = [local(p) for p in weights]
        return {
            "teacher_share": sum(p.numel() for p in after) / elements(teacher.model),
            "teacher_devices": {str(p.device) for p in after},
            "teacher_optimizer": type(teacher._engine.optimizer).__name__,
            "teacher_trains": any(p.requires_grad for p in weights),
            "teacher_gradients": sum(p.grad is not None for p in weights),
            "teacher_changed": not all(map(torch.equal, before, after)),
            "student_optimizer": type(run.student._engine.basic_optimizer).__name__,
            "student_elements": elements(run.student.bundle),
        }


def losses(config_path: str, *, scores: bool) -> list[dict[str, float]]:
    """This rank's losses of three steps, with a teacher that may be scored before them."""
    with started(config_path, scores=scores) as (run, _):
        reports = [run.trainer.train_step(run.source.step(step)) for step in range(3)]
        return [{name: float(value) for name, value in r.parts.items()} for r in reports]


def consecutive_stages(config_path: str, out: str, *, closes: bool) -> int:
    """Two stages with one teacher, closed between them or not; how often it was opened."""
    with lab_of(config_path, [f"output_dir={out}"]) as lab:
        teacher, objective = lab.teacher(), lab.config.objective
        with patch.object(lab.pool, "open", wraps=lab.pool.open) as opening:
            for name, terms in (("first", objective), ("second", objective[:1])):
                strategy = Constant((Pass(teacher=teacher),))
                lab.train(Stage(name=name, teachers=(teacher,), objective=terms, strategy=strategy))
                if closes:
                    lab.close()
        return opening.call_count


def epoch(config_path: str) -> dict:
    """Count the examples of each step of one epoch, over all ranks and on this rank."""
    with started(config_path) as (run, _):
        steps = [run.source.step(index) for index in range(run.source.steps_per_epoch)]
        return {
            "counted": [run.trainer.count_units(batches)["examples"].item() for batches in steps],
            "mine": [sum(int(b.valid.any(1).sum()) for b in batches) for batches in steps],
        }


def note_gathers(model, note) -> None:
    """Call `note` with the weights that are made whole together: one, or many by their first."""
    for parameter in model.parameters():
        for way in ("all_gather", "all_gather_coalesced"):
            real = getattr(parameter, way)

            def gather(*args, real=real, alone=parameter, **options):
                note((args[0] if args else options.get("param_list")) or [alone])
                return real(*args, **options)

            setattr(parameter, way, gather)


def head_gathers(config_path: str) -> list[dict]:
    """Count the gathers of the matrix of each model's head, per micro-batch."""
    with started(config_path) as (run, teacher):
        models = {"teacher": teacher.model, "student": run.student.student}
        counted = dict.fromkeys(models, 0)
        for name, model in models.items():
            head = model.get_submodule(architecture_of(model.config).head).weight

            def note(weights, name=name, head=head):
                counted[name] += any(weight is head for weight in weights)

            note_gathers(model, note)
        per_micro_batch, forward_backward = [], run.student.forward_backward

        def counting(*inputs, **options):
            losses = forward_backward(*inputs, **options)
            per_micro_batch.append(dict(counted))
            counted.update(dict.fromkeys(models, 0))
            return losses

        run.trainer.student.forward_backward = counting
        for step in range(2):
            run.trainer.train_step(run.source.step(step))
        return per_micro_batch


def teacher_gathers(config_path: str, overrides: list[str]) -> int:
    """Count the weights of the teacher that the ranks gather in the second step."""
    with started(config_path, overrides) as (run, teacher):
        gathered: list = []
        note_gathers(teacher.model, gathered.extend)
        for step in range(2):
            gathered.clear()
            run.trainer.train_step(run.source.step(step))
        return len(gathered)


def resident_memory(config_path: str, stages: int) -> list[int]:
    """The resident bytes of this rank after each of several stages, with their models freed."""
    sizes = []
    for _ in range(stages):
        with started(config_path) as (run, teacher):
            run.trainer.train_step(run.source.step(0))
        del run, teacher
        forget_models()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes
