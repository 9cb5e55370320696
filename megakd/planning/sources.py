"""The models of a run as described by their configs; weight files are not read."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from megakd.config.models import ScratchModel, StudentConfig, TeacherConfig
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.contract.tasks import FROM_TEACHER, LANGUAGE_TASKS, STUDENT, STUDENT_BASE
from megakd.errors import ModelError
from megakd.inputs.inputs import with_student
from megakd.models.architectures import architecture_named
from megakd.models.fitting import one_line
from megakd.models.loading import resolve_model, with_vocabulary
from megakd.models.original_t5 import KEPT_KEYS, READ_AS, built_as
from megakd.models.own_models import register_own_models
from megakd.models.source import ModelSource

_TRAINED_VOCABULARY = 8000
_CONFIG = "config.json"


def planned_sources(config: RunConfig) -> dict[str, ModelSource]:
    """Return the models of the config by role, with matching vocabularies and classes.

    Raises:
        ModelError: a config is missing, cannot be read, or has no model for the task.
    """
    specs: dict[str, Any] = {**config.teacher_specs, STUDENT: config.student}
    register_own_models()
    sources = {
        role: _source(spec, config.task, f"{config.key_of(role)}.model")
        for role, spec in specs.items()
        if spec.model not in (FROM_TEACHER, STUDENT_BASE)
    }
    sources = with_student(config, sources)
    own, size = config.method.own_vocabulary, _vocabulary(config.task, sources)
    sources = {
        role: with_vocabulary(source, own.size if own and role == STUDENT else size)
        for role, source in sources.items()
    }
    return _with_classes(sources, config.task)


def _source(given: TeacherConfig | StudentConfig, task: TaskConfig, where: str) -> ModelSource:
    spec = given.model
    if isinstance(spec, ScratchModel):
        return resolve_model(spec, task, where=where, architecture=given.architecture)
    path = Path(spec).expanduser()
    is_local = path.exists() or path.is_absolute() or len(path.parts) > 2 or spec[0] in ".~"
    if is_local and not (path / _CONFIG).is_file():
        raise ModelError(
            f"{where}: {path / _CONFIG} does not exist; a plan needs the config.json of the model, "
            "but no weights"
        )
    try:
        found = AutoConfig.from_pretrained(
            str(path if is_local else spec), trust_remote_code=given.trust_remote_code
        )
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        named = path / _CONFIG if is_local else f"{spec} is not a folder, and the config on the Hub"
        raise ModelError(f"{where}: {named} cannot be read: {one_line(error)}") from error
    model_type = built_as(found.model_type, given.architecture, where)
    try:
        architecture = architecture_named(model_type, task.type)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    if model_type != found.model_type:
        found = READ_AS[model_type](**{key: getattr(found, key) for key in KEPT_KEYS})
    return ModelSource(
        name=spec,
        folder=path if is_local else None,
        config=found,
        architecture=architecture,
        where=where,
        trust_remote_code=given.trust_remote_code,
    )


def _vocabulary(task: TaskConfig, sources: Mapping[str, ModelSource]) -> int:
    if isinstance(task.tokenizer, TokenizerConfig):
        return task.tokenizer.vocab_size
    counted = _counted(Path(task.tokenizer)) if task.tokenizer else None
    known = [s.config.vocab_size for s in sources.values() if not s.wants_vocabulary]
    return counted or (known[0] if known else _TRAINED_VOCABULARY)


def _counted(folder: Path) -> int | None:
    """Return the vocabulary size from a tokenizer's files, or None for other file types."""
    try:
        if (folder / "vocab.txt").is_file():
            with (folder / "vocab.txt").open(encoding="utf-8") as pieces:
                return sum(1 for _ in pieces)
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return len(model["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_classes(sources: Mapping[str, ModelSource], task: TaskConfig) -> dict[str, ModelSource]:
    if task.type in LANGUAGE_TASKS:
        return dict(sources)
    teacher = next(iter(sources.values()))
    outputs = 1 if task.type == "regression" else max(2, teacher.config.num_labels or 0)
    found = {}
    for role, source in sources.items():
        config: PretrainedConfig = copy.deepcopy(source.config)
        config.num_labels = outputs
        found[role] = dataclasses.replace(source, config=config)
    return found
