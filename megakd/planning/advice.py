"""Search for changes that make a run fit; every candidate is planned again, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.config.deepspeed import load_ds_config, zero_stage
from megakd.config.run import RunConfig, TeacherConfig
from megakd.planning.cluster import Cluster

if TYPE_CHECKING:
    from megakd.planning.memory_plan import Plan

WANTED = 3
_MOST_TOGETHER = 4
_MOST_NODES = 64


class Case(NamedTuple):
    """A variant of a run, and the settings that lead to it."""

    config: RunConfig
    cluster: Cluster
    settings: tuple[str, ...] = ()

    def with_teachers(self, setting: str, change: Callable[[TeacherConfig], TeacherConfig]) -> Case:
        """Return the case with every teacher changed.

        Args:
            setting: the change as typed, relative to the section of a teacher.
            change: returns a teacher's config with the setting.
        """
        specs = self.config.teacher_specs
        keys = [self.config.key_of(name).replace("[", ".").removesuffix("]") for name in specs]
        setting = " ".join(f"{key}.{setting}" for key in keys)
        if self.config.teacher is not None:
            config = replace(self.config, teacher=change(self.config.teacher))
        else:
            pool: Any = tuple(map(change, self.config.teachers))
            config = replace(self.config, teachers=pool)
        return Case(config, self.cluster, (*self.settings, setting))

    def with_config(self, setting: str, section: str, **keys: Any) -> Case:
        """Return the case with changed keys in a section of the config."""
        changed = replace(getattr(self.config, section), **keys)
        config = replace(self.config, **{section: changed})
        return Case(config, self.cluster, (*self.settings, setting))


def find_changes(case: Case, planner: Callable[[Case], Plan]) -> list[tuple[Case, Plan]]:
    """Return at most three ways to make a run fit, in order of increasing cost in speed.

    Single settings are tried one by one. If no single setting is enough, the setting with the
    smallest remaining overflow is kept, and other settings are tried together with it.

    Args:
        case: a run that does not fit.
        planner: plans a case.
    """
    found: list[tuple[Case, Plan]] = []
    for _ in range(_MOST_TOGETHER):
        rest: list[tuple[Case, Plan]] = []
        for other in candidates(case):
            plan = planner(other)
            (found if plan.fits else rest).append((other, plan))
            if len(found) == WANTED:
                return found
        if found or not rest:
            return found
        case = min(rest, key=lambda pair: pair[1].overflow)[0]
    return found


def candidates(case: Case) -> Iterator[Case]:
    """Yield single settings that save memory, in order of increasing cost in speed."""
    for group in (_sharding, _precision, _ranks, _activations, _offload):
        yield from group(case)


def _precision(case: Case) -> Iterator[Case]:
    train, specs = case.config.train, case.config.teacher_specs.values()
    if not train.bf16 and not train.fp16:
        yield case.with_config("train.bf16=true", "train", bf16=True)
    if any(spec.dtype in {None, "fp32"} for spec in specs):
        yield case.with_teachers("dtype=bf16", lambda spec: replace(spec, dtype="bf16"))


def _sharding(case: Case) -> Iterator[Case]:
    config, specs = case.config, case.config.teacher_specs.values()
    if case.cluster.ranks == 1:
        return
    for stage in (2, 3):
        if _stage(config.student.deepspeed, "student.deepspeed") < stage:
            yield _student_preset(case, f"zero{stage}")
    if any(_stage(spec.deepspeed, "teacher.deepspeed") == 0 for spec in specs):
        yield _teacher_preset(case, "teacher_zero3")
    trained = [spec.finetune for spec in specs if spec.finetune]
    if any(_stage(one.deepspeed, "teacher.finetune.deepspeed") < 3 for one in trained):
        yield case.with_teachers("finetune.deepspeed=zero3", _finetuned_at_zero3)


def _activations(case: Case) -> Iterator[Case]:
    config = case.config
    rows, held = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    if not config.train.gradient_checkpointing:
        yield case.with_config(
            "train.gradient_checkpointing=true", "train", gradient_checkpointing=True
        )
    if getattr(config.method, "passes_per_backward", 1) is None:
        yield case.with_config("method.passes_per_backward=1", "method", passes_per_backward=1)
    if rows > 1:
        fewer, more = rows // 2, -(-held * rows // (rows // 2))
        setting = f"train.per_device_train_batch_size={fewer} "
        setting += f"train.gradient_accumulation_steps={more}"
        keys = {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": more}
        yield case.with_config(setting, "train", **keys)
    if config.eval_rows() > rows:
        setting = f"eval.per_device_eval_batch_size={rows}"
        yield case.with_config(setting, "eval", per_device_eval_batch_size=rows)


def _offload(case: Case) -> Iterator[Case]:
    config = case.config
    if case.cluster.device == "cpu":
        return
    for preset in ("zero2_offload", "zero3_offload"):
        if config.student.deepspeed != preset:
            yield _student_preset(case, preset)
    offloaded = "teacher_zero3_offload"
    if any(spec.deepspeed != offloaded for spec in config.teacher_specs.values()):
        yield _teacher_preset(case, offloaded)


def _ranks(case: Case) -> Iterator[Case]:
    nodes, ranks = 2 * case.cluster.nodes, 2 * case.cluster.ranks
    if nodes <= _MOST_NODES:
        cluster = replace(case.cluster, nodes=nodes, ranks=ranks)
        yield Case(case.config, cluster, (*case.settings, f"--nodes {nodes} --ranks {ranks}"))


def _student_preset(case: Case, preset: str) -> Case:
    return case.with_config(f"student.deepspeed={preset}", "student", deepspeed=preset)


def _teacher_preset(case: Case, preset: str) -> Case:
    return case.with_teachers(f"deepspeed={preset}", lambda spec: replace(spec, deepspeed=preset))


def _finetuned_at_zero3(spec: TeacherConfig) -> TeacherConfig:
    if spec.finetune is None:
        return spec
    return replace(spec, finetune=replace(spec.finetune, deepspeed="zero3"))


def _stage(spec: Any, where: str) -> int:
    return zero_stage(load_ds_config(spec, where=where))
