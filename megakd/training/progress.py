"""Output of a run while it trains: metrics.jsonl, trackers, and a progress bar or log lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megakd.contract.completions import TOKENS_PER_TEXT, TRUNCATED
from megakd.errors import MegakdError
from megakd.storage import atomic

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

    from tqdm import tqdm

    from megakd.training.trackers import Trackers

logger = logging.getLogger(__name__)
LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
TOKENS_PER_SECOND = "train/tokens_per_s"
MEMORY_BYTES = "train/memory_bytes"
EVALUATION = "eval/"
SHOWN = {
    LOSS: "loss",
    LEARNING_RATE: "lr",
    TOKENS_PER_SECOND: "tok/s",
    MEMORY_BYTES: "mem",
    "train/skipped_steps": "skipped",
    TOKENS_PER_TEXT: "tok/text",
    TRUNCATED: "truncated",
}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The length of a stage in optimiser steps: done before this start, in total, and per epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    def epoch(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 4)


class Progress:
    """The progress bar of one stage if standard error is a terminal, else log lines."""

    _bar: tqdm | None = None

    def __init__(self, stage: str, extent: Extent) -> None:
        self._stage, self._extent = stage, extent
        self._began = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            total, done = extent.total_steps, extent.step
            self._bar = tqdm(total=total, initial=done, desc=stage, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        shown = _shown(scalars)
        if self._bar is None:
            total, epoch = self._extent.total_steps, self._extent.epoch(step)
            parts = [f"{self._stage} {step}/{total}", f"epoch {epoch:.2f}", *shown]
            if LOSS in scalars:
                done, left = max(1, step - self._extent.step), total - step
                seconds = (time.perf_counter() - self._began) / done * left
                parts.insert(-1, f"ETA {_clock(seconds)}")
            logger.info("%s", "  ".join(parts))
            return
        self.advance(step)
        if shown:
            self._bar.set_postfix_str(", ".join(part.replace(" ", "=", 1) for part in shown))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _shown(scalars: Mapping[str, float]) -> list[str]:
    # metrics.jsonl has all numbers, also those of views.
    training = [f"{name} {_short(k, scalars[k])}" for k, name in SHOWN.items() if k in scalars]
    return training + [
        f"{key} {value:.4g}"
        for key, value in scalars.items()
        if key.startswith(EVALUATION) and key.count("/") == 1
    ]


def _short(key: str, value: float) -> str:
    if key == MEMORY_BYTES:
        return f"{value / 1e9:.1f}GB"
    return f"{value:,.0f}" if key == TOKENS_PER_SECOND else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Reporter:
    """Writer of scalars to metrics.jsonl, trackers and terminal; only the main rank writes."""

    def __init__(
        self, output_dir: Path, *, is_main: bool, trackers: Trackers | None = None
    ) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._is_main = is_main
        self._trackers = trackers
        self._file: FileIO | None = None
        self._extents: dict[str, Extent] = {}
        self._progress: Progress | None = None

    def check(self) -> None:
        """Raise MegakdError if metrics.jsonl cannot be written, before any long work."""
        with _reports_unusable(self._path):
            if self._is_main and self._path.exists():
                self._path.open("ab").close()

    def begin(self, stage: str, extent: Extent) -> None:
        self._end_progress()
        self.resume(stage, extent.step)
        self._extents[stage] = extent
        if self._is_main:
            self._progress = Progress(stage, extent)

    def resume(self, stage: str, step: int) -> None:
        """Remove the entries for `stage` after `step`, because these steps are repeated."""
        if not self._is_main:
            return
        self._close_file()
        with _reports_unusable(self._path):
            lines = list(_whole_lines(self._path))
            kept = [line for line in lines if not _comes_again(line, stage, step)]
            if len(kept) < len(lines):
                atomic.write_text(self._path, "".join(kept))
        if self._trackers is not None:
            self._trackers.begin(stage, step)

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.advance(step)

    def log(self, step: int, scalars: Mapping[str, float], *, stage: str) -> None:
        if not self._is_main:
            return
        values = {key: float(value) for key, value in scalars.items()}
        extent = self._extents.get(stage)
        epoch = {} if extent is None else {"epoch": extent.epoch(step)}
        record = {"stage": stage, "step": step, **epoch, "time": round(time.time(), 3), **values}
        self._append(atomic.json_text(record))
        if self._trackers is not None:
            self._trackers.log(stage, step, values)
        if self._progress is not None:
            self._progress.show(step, values)

    def close(self) -> None:
        """Close every file; a later `log` opens the files again."""
        self._end_progress()
        self._close_file()
        if self._trackers is not None:
            self._trackers.close()

    def _append(self, line: str) -> None:
        with _reports_unusable(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                before = self._path.read_bytes() if self._path.exists() else b""
                if before and not before.endswith(b"\n"):  # cut a half line
                    os.truncate(self._path, before.rfind(b"\n") + 1)
                # Unbuffered: the rest of a buffer would fail again when the file is closed.
                self._file = self._path.open("ab", buffering=0)
            content = line.encode() + b"\n"
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


@contextmanager
def _reports_unusable(path: Path) -> Iterator[None]:
    try:
        with atomic.reports_full_disk(path):
            yield
    except OSError as error:
        raise MegakdError(
            f"{path} cannot be used ({error.strerror or error}), and the run writes its metrics "
            "there; move the file or folder away, then start the same command again"
        ) from error


def _whole_lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line for line in file if line.endswith("\n"))


def _comes_again(line: str, stage: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return True  # a damaged line is of no use
    # A stage that starts over repeats everything, also its evaluation at step 0.
    return record.get("stage") == stage and (record.get("step", 0) > step or step == 0)
