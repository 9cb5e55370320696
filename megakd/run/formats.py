"""The further formats in which a run writes its student: an entry for each, and a key of `save`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from megakd.models.int8 import INT8, write_int8, write_restored
from megakd.models.onnx import MODEL, write_onnx


class Format(NamedTuple):
    """A format of a finished model.

    place: name of the file or folder in `final/`.
    write: writes the format of a model folder to a path.
    restore: writes what was written as a model folder, to be scored; None: it computes what the
        model computes.
    """

    place: str
    write: Callable[[Path, Path], object]
    restore: Callable[[Path, Path], object] | None = None


FORMATS: Mapping[str, Format] = {
    "int8": Format(INT8, write_int8, write_restored),
    "onnx": Format(MODEL, lambda folder, graph: write_onnx(folder, to=graph)),
}


def add_formats(folder: Path, names: Iterable[str]) -> None:
    """Write formats into a finished model folder."""
    for name in names:
        FORMATS[name].write(folder, folder / FORMATS[name].place)
