"""The further formats in which a run writes its student: an entry for each, and a key of `save`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megakd.models.int8 import INT8, write_int8, write_restored
from megakd.models.onnx import MODEL, check_packages, write_onnx


class Format(NamedTuple):
    """A format of a finished model.

    place: name of the file or folder in `final/`.
    write: writes the format of a model folder to a path.
    restore: writes what was written as a model folder, to be scored; None: it computes what the
        model computes.
    check: raises ConfigError if a package is missing that writes the format.
    """

    place: str
    write: Callable[[Path, Path], object]
    restore: Callable[[Path, Path], object] | None = None
    check: Callable[[], None] | None = None


FORMATS: Mapping[str, Format] = {
    "int8": Format(INT8, write_int8, restore=write_restored),
    "onnx": Format(
        MODEL,
        lambda folder, graph: write_onnx(folder, to=graph),
        check=partial(check_packages, "save.onnx"),
    ),
}


def check_formats(names: Collection[str]) -> None:
    """Raise ConfigError if a package is missing that writes one of the formats."""
    for name in names:
        check = FORMATS[name].check
        if check is not None:
            check()


def adding(names: Collection[str]) -> Callable[[Path], None] | None:
    """Return a function that writes formats into a model folder; None if there are none."""
    check_formats(names)

    def add(folder: Path) -> None:
        for name in names:
            FORMATS[name].write(folder, folder / FORMATS[name].place)

    return add if names else None
