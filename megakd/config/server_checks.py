"""Checks of `rollout.server` and `teacher.server` that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.contract.tasks import FROM_TEACHER, STUDENT, STUDENT_BASE
from megakd.contract.terms import SoftTargetKl, compares, looks_inside
from megakd.methods import methods_with_rollouts

if TYPE_CHECKING:
    from megakd.config.models import TeacherConfig
    from megakd.config.rollout import RolloutServerConfig
    from megakd.config.run import RunConfig


def server_problems(config: RunConfig) -> Iterator[str]:
    """Yield the settings that `rollout.server` cannot be combined with."""
    rollouts = config.rollout
    if rollouts is None or rollouts.server is None:
        return
    if rollouts.files is not None:
        yield (
            "rollout.server: generates texts, and rollout.files names texts that exist; remove one "
            "of the two keys"
        )
    if served_name(config) is None:
        yield (
            "rollout.server.model: missing, and the config names no model that the servers could "
            "serve; set rollout.server.model to the name of the served model"
        )
    yield from _pushing(rollouts.server, config)


def _pushing(server: RolloutServerConfig, config: RunConfig) -> Iterator[str]:
    rollouts = config.rollout
    if server.push == "adapter" and server.kind == "sglang":
        yield (
            "rollout.server.push: adapter is supported with kind: vllm alone; use push: full, "
            "which sends an SGLang server the student with merged adapters"
        )
    if server.push == "adapter" and config.student.lora is None:
        yield (
            "rollout.server.push: adapter pushes the adapters of the student, and student.lora is "
            "not set; add student.lora, or set push to full"
        )
    if server.push != "none" and rollouts is not None and rollouts.by != STUDENT:
        yield (
            f"rollout.server.push: {server.push} pushes the weights of the student, and "
            f"rollout.by is {rollouts.by}, whose weights do not change; set push to none"
        )
    if (server.folder is None) != (server.push == "none"):
        wrong = "missing" if server.folder is None else "is not used"
        yield (
            f"rollout.server.folder: {wrong} with push: {server.push}; weights are pushed through "
            "a folder that rank 0 and all servers see"
        )


def served_name(config: RunConfig) -> str | None:
    """Return the name of the model that the servers of `rollout.server` have to serve.

    Returns:
        `rollout.server.model`, else the model of `rollout.by` in the config; None if the config
        has no name for the model, such as for a model from random weights.
    """
    rollouts = config.rollout
    if rollouts is None or rollouts.server is None:
        return None
    if rollouts.server.model is not None:
        return rollouts.server.model
    spec = config.student if rollouts.by == STUDENT else config.teacher_specs.get(rollouts.by)
    if spec is None or not isinstance(spec.model, str) or spec.model == FROM_TEACHER:
        return None
    return spec.model


def teacher_server_problems(config: RunConfig) -> Iterator[str]:
    """Yield the settings that `teacher.server` cannot be combined with."""
    for name, spec in config.teacher_specs.items():
        if spec.server is None:
            continue
        key = f"{config.key_of(name)}.server"
        if config.task.type != "causal_lm":
            yield f"{key}: only language models are served (task.type is {config.task.type})"
        yield from _of_the_teacher(name, spec, key, config)
        yield from _of_the_objective(key, config, is_exact=spec.server.states is not None)
        if spec.server.states is not None and spec.server.top_k is not None:
            yield (
                f"{key}: the servers return top_k probabilities or export hidden states into "
                f"states (got top_k: {spec.server.top_k}, states: {spec.server.states}); remove "
                "one of the two keys"
            )


def _of_the_teacher(name: str, spec: TeacherConfig, key: str, config: RunConfig) -> Iterator[str]:
    own = {"cache": spec.cache is not None, "finetune": spec.finetune is not None}
    for other, given in own.items():
        if given:
            yield f"{key}: a served teacher has no {other}; remove one of the two keys"
    if not config.method.learns_from_rollouts:
        yield (
            f'{key}: method "{config.method.name}" uses the model of the teacher itself; set '
            f"method.name to {' or '.join(methods_with_rollouts())}, or remove the key"
        )
    if teacher_model(spec) is None:
        yield (
            f"{key}: the model of the teacher is {spec.model!r}, which no server can serve; set "
            f"{config.key_of(name)}.model to the folder or the id of the served model"
        )
    rollouts = config.rollout
    if rollouts is not None and rollouts.by == name and rollouts.server is None:
        yield (
            f"rollout.by: {name} is not loaded ({key}), so it generates no texts; name its servers "
            "in rollout.server with push: none"
        )


def _of_the_objective(key: str, config: RunConfig, *, is_exact: bool) -> Iterator[str]:
    for index, term in enumerate(config.objective or ()):
        where = f"objective[{index}].loss: {term.loss}"
        if looks_inside(term):
            yield f"{where} needs more than the outputs of the teacher; remove {key} or the term"
        elif is_exact or not compares(term):
            continue
        elif not (isinstance(term, SoftTargetKl) and term.temperature == 1):
            yield (
                f"{where}: a server returns only the largest probabilities, at temperature 1, "
                "which suffice for soft_target_kl at temperature 1; export hidden states with "
                f"{key}.states, or remove {key} or the term"
            )


def teacher_model(spec: TeacherConfig) -> str | None:
    """Return the name of the model that the servers of a teacher have to serve.

    Returns:
        `server.model`, else the teacher's `model`; None if the config has no name for the model.
    """
    if not isinstance(spec.model, str) or spec.model == STUDENT_BASE:
        return None
    return spec.model if spec.server is None or spec.server.model is None else spec.server.model
