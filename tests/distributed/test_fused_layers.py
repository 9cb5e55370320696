"""Ranks with fused layers take the steps that they take with plain layers."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import cases
import pytest
import torch
from equal_runs import LANGUAGE, PACKED, ROWS, assert_equal, cut_of
from slow_cases import slow

from megakd.models import fused_layers

STEPS = 3
COMPILE = torch.compile


def train(config_path: str, overrides: list[str]) -> dict:
    """Return what `cases.train` returns, and how many parts of models were fused."""
    count = []

    def forwards(model):
        fused = fused_forwards(model)
        count.append(len(fused))
        return fused

    fused_forwards = fused_layers.fused_forwards
    quick = patch.object(torch, "compile", partial(COMPILE, backend="aot_eager"))
    with quick, patch.object(fused_layers, "fused_forwards", forwards):
        return {**cases.train(config_path, overrides, STEPS), "fused": count}


# (ZeRO stage of student and teacher, recomputes, packs)
CASES = [(3, True, True), (2, False, False)]
SLOW = [(0, False, True), (0, True, False), (1, True, True), (2, True, True), (3, False, False)]


@pytest.mark.parametrize(("stage", "recomputes", "packs"), [*CASES, *slow(*SLOW)])
def test_two_ranks_take_the_same_steps(workers, write_run, stage, recomputes, packs):
    cut = cut_of((2, ROWS // 4, 2)) | {"gradient_checkpointing": recomputes}
    cut |= {"tokens_per_rank": PACKED["tokens_per_rank"]} if packs else {}
    path = write_run("llama-tied", LANGUAGE, (stage, stage if stage == 3 else 0), train=cut)

    plain, fused = (
        workers(2).run("test_fused_layers.train", path, [f"train.fused_layers={choice}"])[0]
        for choice in ("off", "on")
    )

    # Student and teacher: norms, MLPs and attentions; each of both models was checked before.
    assert (plain["fused"], fused["fused"][-2:]) == ([], [4 * 4 + 1, 2 * 4 + 1])
    assert_equal(fused, plain, of_gradients=3e-6)
    assert fused["scores"] == pytest.approx(plain["scores"], rel=1e-5)
