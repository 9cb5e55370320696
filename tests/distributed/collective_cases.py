"""Work of the gloo ranks of `test_collectives.py`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset

from megakd.config.file import load_config
from megakd.engine import collectives, distributed
from megakd.engine.distributed import warn_of_missing_variables
from megakd.errors import ConfigError, DataError
from megakd.inputs.inputs import prepare
from megakd.run import holder


def errors(kind: str, failing: int) -> str:
    """One rank alone fails inside a collective; every rank must learn of it instead of waiting."""

    def action():
        if distributed.ranks().rank == failing:
            raise DataError(f"rank {failing} cannot read it")
        return "went on"

    try:
        return getattr(collectives, kind)(action)
    except DataError as error:
        return str(error)


def rows_of_node(
    folders: list[str], failing: int | None = None, place: str | None = None
) -> dict[str, object]:
    """Make rows once per node, in this rank's folder."""
    rank = distributed.ranks().rank
    ran = []

    def action() -> Dataset:
        ran.append(rank)
        if rank == failing:
            raise DataError(f"rank {rank} cannot read it")
        path = Path(folders[rank]) / "rows"
        Dataset.from_dict({"number": [rank, 10, 20]}).save_to_disk(str(path))
        return Dataset.load_from_disk(str(path)).select([0, 2])

    try:
        rows = collectives.once_per_node(action, place=place or folders[rank])
    except DataError as error:
        return {"ran": ran, "said": str(error)}
    files = [entry["filename"] for entry in rows.cache_files]
    return {"ran": ran, "rows": list(rows["number"]), "files": files}


def missing_variables(lacking_rank: int) -> list[str]:
    """Return what this rank logs if one rank lacks two variables."""
    with pytest.MonkeyPatch.context() as patch, noted("megakd") as messages:
        if distributed.ranks().rank != lacking_rank:
            patch.setenv("MEGAKD_CACHE_TEST", "x")
            patch.setenv("HF_TEST", "secret")
            patch.setenv("UNRELATED", "x")
        warn_of_missing_variables()
    return messages


@contextmanager
def noted(name: str) -> Iterator[list[str]]:
    """The messages that a logger gets in the body."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


def rows_of_separate_node(folders: list[str], failing: int | None = None) -> dict[str, object]:
    """Do as `rows_of_node`; no rank sees the disk of another node, and all hosts have one name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUP_RANK", str(distributed.ranks().rank))
        patch.setattr(collectives, "_can_open", lambda _: False)
        return rows_of_node(folders, failing, place="cache")


def held_folder(folders: list[str], looks: int) -> str:
    """Hold this rank's folder; rank 1 does not see the lock before it has looked a few times."""
    rank, seen, look = distributed.ranks().rank, [], holder.read_holder

    def read(path: Path) -> holder.Holder | None:
        seen.append(path)
        return None if rank == 1 and len(seen) <= looks else look(path)

    with pytest.MonkeyPatch.context() as patch, noted("megakd") as messages:
        patch.setenv("GROUP_RANK", str(rank))
        patch.setattr(holder, "DEAD_AFTER_S", 3.0)
        patch.setattr(holder, "read_holder", read)
        try:
            with holder.held(Path(folders[rank])):
                return "; ".join(["held", *messages])
        except ConfigError as error:
            return str(error)


def files_read(config_path: str, folder: str) -> list[str]:
    """Prepare the inputs of a run, and return the files below a folder that this rank has read."""
    found: list[str] = []
    listening = [True]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open" and str(arguments[0]).startswith(folder):
            found.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)  # cannot be removed
    try:
        rows = prepare(load_config(Path(config_path))).encoded.train
    finally:
        listening.clear()
    return [*sorted(set(found)), str(len(rows))]
