"""Errors that a user can cause, printed as one message without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MegakdError(Exception):
    """Base class of errors that a user can cause.

    The message states the problem, both values, the key or file, and what to do.

    of_one_rank: whether the other ranks do not raise the error, so that this rank has to print it.
    """

    exit_code = 2
    of_one_rank = False


class ConfigError(MegakdError):
    """The run config, its overrides or a `ds_configs` file cannot be used."""


class DataError(MegakdError):
    """A data file, column, label or tokenizer cannot be used."""


class ModelError(MegakdError):
    """A model's weights, config, tokenizer or head cannot be used."""


class TeacherError(ModelError):
    """The teacher cannot teach this student with the chosen losses."""


class ServerError(MegakdError):
    """An inference server cannot be reached, or its answer cannot be used."""


class TrainingError(MegakdError):
    """Training cannot continue because a loss is not finite."""


class CheckpointError(MegakdError):
    """A checkpoint cannot be written, read or continued."""


class InUseError(MegakdError):
    """Another run is using the output folder."""


class PeerLostError(MegakdError):
    """Another rank has ended while this rank waited for it."""

    exit_code = 1


class CollectiveTimeoutError(PeerLostError):
    """Another rank did not join a collective within `train.collective_timeout`."""


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the nearest known word, or an empty string."""
    names, text = list(known), str(word).lower()
    parts = [name for name in names if text in name.split("_")]  # "kl" of soft_target_kl
    near = difflib.get_close_matches(text, names, n=1) or parts
    return f'; did you mean "{near[0]}"?' if near else ""


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library, or its class if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
