"""Shares of a model's layers, by which a plan estimates times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_cuts

from megakd.contract.lab import TimedWork
from megakd.contract.views import View
from megakd.planning.planning_lab import PlannedPruning


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "enct5"])
def test_one_of_three_layers_takes_a_third_of_the_time_also_beside_a_decoder(family, tmp_path):
    folder = tiny_cuts.saved(tiny_cuts.build(family), tmp_path)
    source = tiny_cuts.source_of(folder, "classification")
    config = cast("Any", SimpleNamespace(task=tiny_cuts.task()))
    pruning = PlannedPruning(config, {}, teachers={}, phases=[], world=1)
    units = source.architecture.units(source.config)
    kept = {"layers": (1,), "width": None}
    for kind in ("heads", "neurons"):
        first, _, _, *others = getattr(units, kind)
        kept[kind] = (first, 0, 0, *others)

    times = pruning.relative_times(source, {"one": View(**kept)}, "times", TimedWork())

    assert times["one"] == pytest.approx(1 / 3, abs=0.03)
