"""The lab of a run and the lab of a plan offer what the contract promises to methods."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from megakd.contract import lab as contract
from megakd.planning.planning_lab import PlannedPruning, PlanningLab
from megakd.pruning.builder import ModelPruning
from megakd.run.run_lab import RunLab
from megakd.training.recipes import LabBase


def methods(promised: type) -> dict[str, Any]:
    members = vars(promised).items()
    return {n: m for n, m in members if not n.startswith("_") and inspect.isfunction(m)}


PAIRS = [
    (kind, promised)
    for promised, kinds in (
        (contract.Lab, (RunLab, PlanningLab)),
        (contract.Pruning, (ModelPruning, PlannedPruning)),
    )
    for kind in kinds
]


def parameters(function) -> list[tuple[str, object, object]]:
    result = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in result]


@pytest.mark.parametrize(("kind", "promised"), PAIRS)
def test_a_lab_takes_the_arguments_that_the_contract_names(kind, promised):
    for name, method in methods(promised).items():
        assert parameters(getattr(kind, name)) == parameters(method), name


@pytest.mark.parametrize("lab", [RunLab, PlanningLab])
def test_a_lab_sets_the_attributes_of_the_contract_when_it_is_made(lab):
    base, source = (inspect.getsource(made.__init__) for made in (LabBase, lab))

    assert issubclass(lab, LabBase)
    assert "super().__init__(" in source
    assert [n for n in contract.Lab.__annotations__ if f"self.{n}" not in base] == []
