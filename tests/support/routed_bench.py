"""Rows that name one of two experts."""

from __future__ import annotations

import random
from typing import Any

from tiny_runs import review

ROWS = 40
EXPERTS = ("math", "code")


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Labelled rows; of three rows in turn, two name math and one names code."""
    rng = random.Random(5)
    return [
        {
            "text": f"{review(rng, good=number % 2 == 0)} n{number}",
            "label": ("positive", "negative")[number % 2],
            "expert": EXPERTS[number % 3 == 2],
        }
        for number in range(count)
    ]
