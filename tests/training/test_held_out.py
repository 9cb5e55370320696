"""The losses of held-out texts: which terms have a value."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from source_scene import Texts, objective_of

from megakd.contract.metric import WHOLE
from megakd.contract.terms import HardCrossEntropy
from megakd.engine import distributed
from megakd.training.stage_evaluation import HeldOutLosses

TERMS = tuple(HardCrossEntropy(loss="hard_cross_entropy", on=on) for on in (None, "rollouts"))


def losses(batches: list[Any], value: float) -> Any:
    """Losses of a model that has the same value at every target."""
    objective = objective_of(TERMS)
    bundle = SimpleNamespace(objective=objective, counters=objective.counters)

    def measure(batch: Any, knowledge: object, plan: object, scored: tuple) -> Any:
        counted = {unit: count(batch) for unit, count in objective.counters.items()}
        parts = {n: value * counted[u] for n, u in objective.units.items()}
        return SimpleNamespace(parts=parts, predictions=dict.fromkeys(scored))

    student = SimpleNamespace(measure=measure)
    trainer = SimpleNamespace(student=student, ask_teachers=lambda plan, batch: {})
    found = HeldOutLosses(trainer, bundle, ())  # type: ignore[arg-type]
    for batch in batches:
        found.add(batch)
    return found.means()[WHOLE]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def test_a_term_on_rollouts_has_no_value_on_texts_of_the_data():
    batch = Texts().batch()

    both = losses([batch, batch.extended(is_rollout=None)], 0.5)
    data = losses([batch.extended(is_rollout=None)], 0.5)

    assert both == pytest.approx({"hard_cross_entropy": 0.5, "hard_cross_entropy_on_rollouts": 0.5})
    assert data == pytest.approx({"hard_cross_entropy": 0.5})
