"""What a stage logs, in files, trackers and lines.

Each stage is a run of its own, so that its steps begin at 0 and a resumed stage continues its
curve.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.errors import MegakdError
from megakd.models.generation import TOKENS_PER_TEXT, TRUNCATED
from megakd.process import files
from megakd.training.trackers import Trackers

if TYPE_CHECKING:
    from tqdm import tqdm


logger = logging.getLogger(__name__)


LOSS = "train/loss"

LEARNING_RATE = "train/learning_rate"

TOKENS_PER_SECOND = "train/tokens_per_s"

MEMORY_BYTES = "train/memory_bytes"

SHOWN = {
    LOSS: "loss",
    LEARNING_RATE: "lr",
    TOKENS_PER_SECOND: "tok/s",
    MEMORY_BYTES: "mem",
    "train/skipped_steps": "skipped",
    TOKENS_PER_TEXT: "tok/text",
    TRUNCATED: "truncated",
}


class Reporter:
    """Writer of scalars to metrics.jsonl, trackers and terminal; only the main rank writes.

    A terminal gets a progress bar, another standard error log lines.
    """

    def __init__(
        self, output_dir: Path, *, is_main: bool, trackers: Trackers | None = None
    ) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._is_main, self._trackers = is_main, trackers
        self._stage, self._first, self._last = "", 0, 0
        self._steps_per_epoch = 1
        self._bar: tqdm | None = None
        self._began = time.perf_counter()

    def check(self) -> None:
        """Raise MegakdError if metrics.jsonl cannot be written, before any long work."""
        with _reports_unusable(self._path):
            if self._is_main and self._path.exists():
                self._path.open("ab").close()

    def begin(self, stage: str, step: int, *, last: int, steps_per_epoch: int) -> None:
        """Remove the entries for `stage` after the `step` steps of `last` that are done.

        These are repeated.
        """
        if not self._is_main:
            return
        with _reports_unusable(self._path):
            if self._path.exists():
                with self._path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                    lines = list(file)
                kept = [line for line in lines if _stays(line, stage, step)]
                if len(kept) < len(lines):
                    files.write_text(self._path, "".join(kept))
        if self._trackers is not None:
            self._trackers.begin(stage, step)
        self._stage, self._first, self._last = stage, step, last
        self._steps_per_epoch = steps_per_epoch
        self._began = time.perf_counter()
        if self._bar is not None:
            self._bar.close()
        if sys.stderr.isatty():
            from tqdm import tqdm

            options = {"desc": stage, "unit": "step", "dynamic_ncols": True}
            self._bar = tqdm(total=last, initial=step, **options)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers of a step of the stage that has begun."""
        if not self._is_main:
            return
        values = {key: float(value) for key, value in scalars.items()}
        epoch = round(step / self._steps_per_epoch, 4)
        record = {"stage": self._stage, "step": step, "epoch": epoch}
        record |= {"time": round(time.time(), 3), **values}
        line = files.json_text(record).encode() + b"\n"
        with _reports_unusable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: the rest of a buffer would fail again when the file is closed.
            with self._path.open("ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._trackers is not None:
            self._trackers.log(step, values)
        shown = _shown(values)
        if self._bar is not None:
            self.advance(step)
            if shown:
                self._bar.set_postfix_str(", ".join(part.replace(" ", "=", 1) for part in shown))
        else:
            if LOSS in values:
                done, left = max(1, step - self._first), self._last - step
                minutes, rest = divmod(round((time.perf_counter() - self._began) / done * left), 60)
                shown.insert(-1, f"ETA {minutes // 60}:{minutes % 60:02d}:{rest:02d}")
            head = f"{self._stage} {step}/{self._last}", f"epoch {epoch:.2f}"
            logger.info("%s", "  ".join([*head, *shown]))

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close()


def _shown(scalars: Mapping[str, float]) -> list[str]:
    # metrics.jsonl has all numbers, also those of views.
    forms = {MEMORY_BYTES: "{:.1f}GB", TOKENS_PER_SECOND: "{:,.0f}"}
    texts = {
        name: forms.get(key, "{:.4g}").format(scalars[key] / (1e9 if key == MEMORY_BYTES else 1))
        for key, name in SHOWN.items()
        if key in scalars
    }
    texts |= {
        key: f"{value:.4g}"
        for key, value in scalars.items()
        if key.startswith("eval/") and key.count("/") == 1
    }
    return [f"{name} {text}" for name, text in texts.items()]


@contextmanager
def _reports_unusable(path: Path) -> Iterator[None]:
    try:
        with files.reports_full_disk(path):
            yield
    except OSError as error:
        raise MegakdError(
            f"{path} cannot be used ({error.strerror or error}), and the run writes its metrics "
            "there; move the file or folder away, then start the same command again"
        ) from error


def _stays(line: str, stage: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False  # cut by a kill or a full disk
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # a damaged line is of no use
    # A stage that starts over repeats everything, also its evaluation at step 0.
    return record.get("stage") != stage or (record.get("step", 0) <= step and step > 0)
