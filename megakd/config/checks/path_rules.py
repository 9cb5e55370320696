"""Checks of the settings that name a folder, a model or data."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from megakd.config.paths import looks_like_path
from megakd.config.run import RunConfig
from megakd.config.task import listed_files
from megakd.contract.tasks import STUDENT
from megakd.errors import ConfigError
from megakd.process.terminal import in_home


def address_problems(config: RunConfig) -> Iterator[str]:
    """Yield settings that name nothing, or an address: only folders and Hub ids are supported."""
    for key, value in places(config):
        if value == "":  # the working directory, if it were read as a path
            yield f'{key}: names nothing (got ""); give a name, or remove the key'
        # `Path` has removed one of the two slashes.
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            continue
        hub = re.fullmatch(r"https?:/+huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?", str(value))
        folder = "a local folder" if isinstance(value, Path) else "a local folder or file"
        takes = folder if isinstance(value, Path) else f"{folder}, or an id on the Hugging Face Hub"
        near = f'; write "{hub[1]}"' if hub and not isinstance(value, Path) else ""
        yield f'{key}: must be {takes} (got the URL "{value}"){near}'


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
        if key not in unread and not key.endswith(".cache") and _is_local(key, str(value))
        if not (path := in_home(value)).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))


def places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Yield the keys of a run's folders, models and data, with what they name."""
    task = config.task
    places: dict[str, object] = {"output_dir": config.output_dir}
    for key in ("dataset", "tokenizer", "chat_template"):
        places[f"task.{key}"] = getattr(task, key)
    files = {key: getattr(task, key) for key in ("train_files", "validation_files", "test_files")}
    files |= {f"evaluation_sets.{name}": paths for name, paths in task.evaluation_sets.items()}
    files |= {f"mixture.{name}.files": part.files for name, part in (task.mixture or {}).items()}
    yield from ((key, value) for key, value in places.items() if isinstance(value, str | Path))
    for key, paths in files.items():
        yield from ((f"task.{key}", path) for path in listed_files(paths))
    for name, spec in {**config.teacher_specs, STUDENT: config.student}.items():
        for key, value in {"model": spec.model, "cache": getattr(spec, "cache", None)}.items():
            if isinstance(value, str | Path):
                yield f"{config.key_of(name)}.{key}", value


def _is_local(key: str, place: str) -> bool:
    return not glob.has_magic(place) and (names_files(key) or looks_like_path(place))


def names_files(key: str) -> bool:
    """Return whether a key names files, never anything on the Hub."""
    return "files" in key or "evaluation_sets" in key
