"""The errors a person can cause: one clear message each, printed without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MegakdError(Exception):
    """What is wrong, both values, which key or file, what to do."""


class ConfigError(MegakdError):
    """The run config, its overrides or a `ds_configs` file cannot be used."""


class DataError(MegakdError):
    """A data file, column, label or tokenizer cannot be used."""


class ModelError(MegakdError):
    """A model's weights, config, tokenizer or head cannot be used."""


class TeacherError(ModelError):
    """The teacher cannot teach this student with the chosen losses."""


class TrainingError(MegakdError):
    """Training cannot go on: a loss that is not finite."""


class CheckpointError(MegakdError):
    """A checkpoint cannot be written, read or continued."""


class InUseError(MegakdError):
    """Another run holds the output folder."""


class PeerLostError(MegakdError):
    """Another rank has ended while this one waited for it."""


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
