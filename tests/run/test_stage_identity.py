"""Facts of teachers, strategies and judges are complete, or their stage is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from megakd.contract.metric import MetricJudge
from megakd.contract.stage import Constant, Pass, Strategy
from megakd.errors import MegakdError
from megakd.methods.knowledge_selection.selecting import RandomWeights
from megakd.methods.minidisc import Sandwich, TradeoffJudge
from megakd.methods.skdbert import Drawn
from megakd.run.stage_identity import facts_of
from megakd.scoring.scores import headline


class Halving(Strategy):
    """Keeps its option in an attribute that is not a fact."""

    def __init__(self, every: int) -> None:
        object.__setattr__(self, "every", every)

    def passes(self, step: int) -> tuple[Pass, ...]:
        return (Pass(scale=0.5 ** (step // self.every)),)


class Stating(Halving):
    @property
    def facts(self) -> dict[str, Any]:
        return {"every": self.every}


@dataclass(frozen=True)
class Calling(Strategy):
    schedule: Callable[[int], float] = float


class Alone:
    """Follows the protocol without its base class."""

    def __call__(self, scores: Any) -> Any:
        return scores


ACCURACY = headline(["accuracy"])


@pytest.mark.parametrize("value", [Halving(3), Alone()], ids=["strategy", "judge"])
def test_a_class_that_states_no_facts_is_refused_with_the_two_ways_to_state_them(value):
    with pytest.raises(MegakdError, match=type(value).__name__) as refused:
        facts_of(value)
    assert "@dataclass(frozen=True)" in str(refused.value)
    assert "`facts`" in str(refused.value)


def test_facts_that_are_stated_tell_options_apart():
    stated = facts_of(Stating(3))
    assert stated == {"kind": "Stating", "every": 3, "code": stated["code"]} != facts_of(Stating(4))


def test_a_fact_that_no_file_can_hold_is_refused_by_its_name():
    with pytest.raises(MegakdError, match=r"Calling\.schedule is a type"):
        facts_of(Calling())


def test_a_pass_that_weighs_by_a_function_needs_facts_of_its_strategy():
    with pytest.raises(MegakdError, match=r"Constant\.planned\.0\.weigh is a"):
        facts_of(Constant((Pass(weigh=lambda reading: {}),)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Constant((Pass(teacher="a"),)), Constant((Pass(teacher="b"),))),
        (Constant((Pass(scale=1.0),)), Constant((Pass(scale=0.5),))),
        (Drawn(("a", "b"), (0.5, 0.5), 1), Drawn(("a", "b"), (0.4, 0.6), 1)),
        (Sandwich("a", ("w", "n"), None, 1), Sandwich("a", ("w", "n"), 1, 1)),
        (
            RandomWeights("a", ("k",), hard=True, seed=1),
            RandomWeights("a", ("k",), hard=False, seed=1),
        ),
        (MetricJudge(ACCURACY), MetricJudge(ACCURACY, "narrow")),
        (TradeoffJudge(ACCURACY, (0.5,), 0.2, 0.5), TradeoffJudge(ACCURACY, (0.5,), 0.3, 0.5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_option_of_ours_is_a_fact(one, other):
    assert facts_of(one) == facts_of(one) != facts_of(other)
