"""The folders, models and data that a run config names, and whether they are on this machine."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from megakd.config.paths import looks_like_path
from megakd.config.run import RunConfig
from megakd.config.task import listed_files
from megakd.contract.tasks import STUDENT
from megakd.errors import ConfigError
from megakd.process.terminal import in_home


def places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Yield the keys of a run's folders, models and data, with what they name."""
    task = config.task
    named: dict[str, object] = {"output_dir": config.output_dir}
    named |= {
        f"task.{key}": getattr(task, key) for key in ("dataset", "tokenizer", "chat_template")
    }
    for name, spec in {**config.teacher_specs, STUDENT: config.student}.items():
        named[f"{config.key_of(name)}.model"] = spec.model
        named[f"{config.key_of(name)}.cache"] = getattr(spec, "cache", None)
    yield from ((key, value) for key, value in named.items() if isinstance(value, str | Path))
    files = {key: getattr(task, key) for key in ("train_files", "validation_files", "test_files")}
    files |= {f"evaluation_sets.{name}": paths for name, paths in task.evaluation_sets.items()}
    files |= {f"mixture.{name}.files": part.files for name, part in (task.mixture or {}).items()}
    for key, paths in files.items():
        yield from ((f"task.{key}", path) for path in listed_files(paths))


def check_paths(config: RunConfig) -> None:
    """Check, before torch is loaded, that the models and files of a run are on this machine.

    Names that may be the Hub's, and patterns of files, are checked where they are read.
    """
    specs = {f"{config.key_of(name)}.model": spec for name, spec in config.teacher_specs.items()}
    unread = {"output_dir", "task.chat_template"}
    unread |= {key for key, spec in specs.items() if isinstance(spec.cache, Path) or spec.server}
    missing = [
        f"{key}: {path} does not exist"
        for key, value in places(config)
        if key not in unread and not key.endswith(".cache") and not glob.has_magic(str(value))
        if "files" in key or "evaluation_sets" in key or looks_like_path(str(value))
        if not (path := in_home(value)).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))
