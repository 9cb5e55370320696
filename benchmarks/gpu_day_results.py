"""Results of `gpu_day.py`: what happened to every part, in one JSON file that is always whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megakd.storage.atomic import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

State = Literal["finished", "failed", "timed out", "skipped", "not run"]
FINISHED: State = "finished"
DONE = (FINISHED, "skipped")
"""States without a problem; a part that was skipped is tried again all the same."""


class OtherRunError(Exception):
    """The folder holds the results of another kind of run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a part.

    about: what the part does.
    reason: why the part has not finished; empty if the part has finished.
    tail: the end of the output of a part that has not finished.
    """

    state: State
    about: str
    reason: str = ""
    seconds: float = 0.0
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tail: str = ""


class Results:
    """The outcomes of a folder, written to `results.json` after every change."""

    def __init__(self, folder: Path, *, rehearsal: bool) -> None:
        self._path = folder / "results.json"
        self._tree: dict[str, Any] = {"rehearsal": rehearsal, "machine": {}, "parts": {}}
        if self._path.is_file():
            self._tree = json.loads(self._path.read_text(encoding="utf-8"))
        if self._tree["rehearsal"] != rehearsal:
            kinds = ("a run on a GPU", "a rehearsal")
            raise OtherRunError(
                f"{self._path} holds the results of {kinds[self._tree['rehearsal']]}, and this is "
                f"{kinds[rehearsal]}; choose another --out"
            )

    @property
    def machine(self) -> dict[str, Any]:
        """The machine of the last start."""
        return self._tree["machine"]

    @property
    def is_rehearsal(self) -> bool:
        """True if the numbers are those of small sizes on a CPU."""
        return self._tree["rehearsal"]

    @property
    def parts(self) -> dict[str, Outcome]:
        """All outcomes by name."""
        return {name: Outcome(**found) for name, found in self._tree["parts"].items()}

    def is_finished(self, name: str) -> bool:
        """Return whether a part needs no further run."""
        return self._tree["parts"].get(name, {}).get("state") == FINISHED

    def set_machine(self, machine: Mapping[str, Any]) -> None:
        """Write down the machine that the next parts run on."""
        self._tree["machine"] = dict(machine)
        self._write()

    def record(self, name: str, outcome: Outcome) -> None:
        """Write down what happened to a part."""
        self._tree["parts"][name] = asdict(outcome)
        self._write()

    def forget(self, names: Iterable[str]) -> None:
        """Remove outcomes, so that their parts are run again."""
        for name in names:
            self._tree["parts"].pop(name, None)
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._tree)
