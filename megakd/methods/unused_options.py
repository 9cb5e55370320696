"""Options that the other options of a method leave without an effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from megakd.contract.options import MethodOptions


def unused(options: MethodOptions, names: Collection[str], why: str) -> Iterator[str]:
    """Yield a line for every option that differs from its default and has no effect.

    The clause `why` states the reason, such as `method.distribution uniform ranks no teacher`.
    """
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name in names and value != option.default:
            default = "null" if option.default is None else option.default
            yield (
                f"method.{option.name}: {value} has no effect (default {default}), because {why}; "
                "remove the key"
            )
