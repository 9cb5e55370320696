"""Unit counts of a step, written as numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def counts_of(examples: int, targets: int, tokens: int) -> dict[str, torch.Tensor]:
    numbers = {"examples": examples, "targets": targets, "tokens": tokens}
    return {unit: torch.tensor(number) for unit, number in numbers.items()}


def numbers(counts: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(int(count) for count in counts.values())
