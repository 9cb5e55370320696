"""Paths of a run config."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from megakd.errors import ConfigError

DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json", ".txt")
"""Endings of data files, in lower case."""
COMPRESSED = (".gz", ".bz2", ".zst")


def without_compression(name: str) -> str:
    """Return the name of a file without the ending of its compression."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in COMPRESSED else name


def data_suffix(path: str | Path) -> str:
    """Return the ending that tells the format of a file, in lower case."""
    return Path(without_compression(str(path))).suffix.lower()


def data_files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder by name, without hidden ones."""
    return sorted(
        path
        for path in folder.iterdir()
        if data_suffix(path) in DATA_SUFFIXES and not path.name.startswith(".")
    )


def is_path(name: str) -> bool:
    """Return whether a name cannot be the Hub's, which has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def looks_like_path(dataset: str) -> bool:
    """Return whether the name of a data set that does not exist on disk looks like a path."""
    return is_path(dataset) or dataset.endswith("/") or data_suffix(dataset) in DATA_SUFFIXES


def _with_variables(text: str) -> str:
    try:
        return with_variables(text)
    except ConfigError as error:  # pydantic adds the key
        raise ValueError(str(error)) from None


def _expanded(path: Path) -> Path:
    try:
        return Path(_with_variables(str(path))).expanduser()
    except RuntimeError:
        user = path.parts[0]
        raise ValueError(
            f"{user} is the home folder of a user that does not exist (got {str(path)!r}); "
            "give the whole path"
        ) from None


_HUB = re.compile(r"https?://huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?")


def _is_no_address(value: str) -> str:
    if value == "":  # it would be read as the working directory
        raise ValueError('names nothing (got ""); give a name, or remove the key')
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
        hub = _HUB.fullmatch(value)
        near = f'; write "{hub[1]}"' if hub else ""
        raise ValueError(
            "must be a local folder or file, or an id on the Hugging Face Hub (got the URL "
            f'"{value}"){near}'
        )
    return value


def _is_folder(value: object) -> object:
    if value == "":
        raise ValueError('must name a folder (got ""); give "." for the current folder')
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(value)):
        raise ValueError(f'must be a local folder (got the URL "{value}")')
    return value


Name = Annotated[str, AfterValidator(_with_variables)]
"""A name with the values of `$NAME` and `${NAME}`."""
Place = Annotated[Name, AfterValidator(_is_no_address)]
"""A path, or a name on the Hub."""
Folder = Annotated[Path, BeforeValidator(_is_folder), AfterValidator(_expanded)]
"""A path in which `~` is the home folder, with the values of variables."""


def expand_path(text: str | Path) -> Path:
    """Return a path with ~ or ~name at its beginning replaced by the home folder of the user.

    Shells leave `--to=~/folder` unchanged. A name that is no user stays as written. Variables are
    replaced too, see `with_variables`.
    """
    path = with_variables(str(text))
    return Path(os.path.expanduser(path))  # noqa: PTH111, Path.expanduser raises RuntimeError


def with_variables(path: str) -> str:
    """Return a path with the values of `$NAME` and `${NAME}`; one that exists as written stays."""
    names = (name.strip("{}") for name in re.findall(r"\$([A-Za-z_]\w*|\{[^}]*\})", path))
    unset = [name for name in names if not os.environ.get(name)]
    if unset and not os.path.lexists(path):
        raise ConfigError(
            f"the variable {unset[0]} is not set (got {path!r}); set it, or write the path out"
        )
    return path if unset else os.path.expandvars(path)
