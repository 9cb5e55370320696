"""Generated texts against the texts of the data: as text, or as mathematics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.rollout import GenerationConfig

Match = Callable[[str, str], bool]
"""Function from a generated text and the text of the data to whether their answers are equal."""


def matcher(config: GenerationConfig) -> Match | None:
    """Return the comparison of a config; None if texts are not compared.

    Raises:
        ConfigError: `match: math` needs a package that is not installed.
    """
    if config.match is None:
        return None
    equal = _same_text if config.match == "exact" else _same_mathematics()

    def match(text: str, wanted: str) -> bool:
        said, there = answer_of(text, config.answer), answer_of(wanted, config.answer)
        return said is not None and there is not None and equal(said, there)

    return match


def answer_of(text: str, pattern: str | None) -> str | None:
    """Return the answer in a text: the group of the last match; None without a match."""
    if pattern is None:
        return text.strip()
    found = re.findall(pattern, text)
    return found[-1].strip() if found else None


def _same_text(said: str, wanted: str) -> bool:
    return said == wanted


def _same_mathematics() -> Match:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            "eval.generation.match: math needs the package math-verify, which is not installed; "
            "install megakd[eval], or set the key to exact"
        ) from error
    return lambda said, wanted: _verified(parse, verify, said, wanted)


def _verified(parse: Any, verify: Any, said: str, wanted: str) -> bool:
    # The time limit of math-verify is a signal, which only a main thread may set.
    gold, answer = (parse(text, parsing_timeout=None) for text in (wanted, said))
    return bool(verify(gold, answer, timeout_seconds=None))
