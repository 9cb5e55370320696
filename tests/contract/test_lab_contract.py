"""What labs and strategies owe each other, and directions of metrics."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from megakd.config.schema import variants
from megakd.contract import lab as contract
from megakd.contract.results import lower_is_better
from megakd.contract.stage import Pass, backward_groups
from megakd.contract.terms import TermConfig
from megakd.errors import MegakdError
from megakd.planning.phases import PlanningLab
from megakd.pruning.builder import ModelPruning
from megakd.run.run_lab import RunLab
from megakd.training.recipes import LabBase


def parameters(function: Any) -> list[tuple[str, object, object]]:
    result = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in result]


@pytest.mark.parametrize(
    ("kind", "promised"),
    [
        *((kind, contract.Lab) for kind in (RunLab, PlanningLab)),
        *((kind, contract.Pruning) for kind in (ModelPruning, PlanningLab)),
    ],
)
def test_a_lab_takes_the_arguments_that_the_contract_names(kind, promised):
    methods = {n: m for n, m in vars(promised).items() if n[0] != "_" and inspect.isfunction(m)}

    for name, method in methods.items():
        assert parameters(getattr(kind, name)) == parameters(method), name


@pytest.mark.parametrize("lab", [RunLab, PlanningLab])
def test_a_lab_sets_the_attributes_of_the_contract_when_it_is_made(lab):
    base, source = (inspect.getsource(made.__init__) for made in (LabBase, lab))

    assert issubclass(lab, LabBase)
    assert "super().__init__(" in source
    assert [n for n in contract.Lab.__annotations__ if f"self.{n}" not in base] == []


PLAN = [Pass(teacher=name) for name in "abc"]


@pytest.mark.parametrize(("size", "lengths"), [(None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_passes_share_a_backward_up_to_the_size(size, lengths):
    groups = backward_groups(PLAN, size)

    assert [len(group) for group in groups] == lengths
    assert [one for group in groups for one in group] == PLAN


@pytest.mark.parametrize("size", [None, 2])
def test_a_step_without_a_pass_is_refused_with_what_to_return(size):
    with pytest.raises(MegakdError, match=r"passes\(\) returned 0 passes .* return a Pass"):
        backward_groups([], size)


def test_lower_is_better_for_losses_and_higher_for_scores():
    assert all(map(lower_is_better, variants(TermConfig, "loss")))
    assert not any(map(lower_is_better, ("accuracy", "top1_agreement", "matthews_correlation")))
