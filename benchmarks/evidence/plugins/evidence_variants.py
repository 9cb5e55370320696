"""Variants of MiniDisc's second trial, as a method plug-in of the benchmark.

A second trial of the paper begins with a new optimizer and a new learning rate schedule, loses the
teacher, and trains all candidates from the assistant's size on. Each option changes one of these.
`notebook/evidence.md` compares the variants with the paper's form and with no assistant.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab
from megakd.contract.stage import Constant, Pass, Stage, StageResult, Window
from megakd.contract.terms import STRICT
from megakd.methods.assistants import AssistantOptions, ranked_teacher, view_name
from megakd.methods.minidisc import Link, MiniDiscConfig, trial

OUTPUTS, STATES = "soft_target_kl", "hidden_mse"
"""The terms of MiniDisc's default objective."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Variant(AssistantOptions):
    """MiniDisc with two trials, where the target cannot win the first, and a changed second trial.

    teaches: who teaches the second trial: the assistant (the paper), assistant and teacher with
        half of the loss each, or the teacher the outputs and the assistant the hidden states.
    alone: whether the target learns alone in the second trial.
    one_schedule: whether the second trial continues the first: learning rate, optimizer, rows.
    """

    teaches: Literal["assistant", "both", "split"] = "assistant"
    alone: bool = False
    one_schedule: bool = False


def run(config: Variant, lab: Lab) -> StageResult:
    teacher, ranked = ranked_teacher(config, lab)
    papers = _papers(config)
    target, steps = view_name(config.target_sparsity), lab.steps_of_student()

    def in_window(stage: Stage, first: int) -> Stage:
        window = Window(first, first + steps, 2 * steps) if config.one_schedule else None
        return dataclasses.replace(stage, window=window)

    first = in_window(trial(papers, lab, ranked, Link(teacher, ranked.source, 0.0), 1), 0)
    result = lab.train(first)
    chosen = next(s for s in config.sparsities if view_name(s) == result.view)
    start = lab.source(result.folder)
    assistant = lab.assistant(result, chosen)
    second = trial(papers, lab, ranked, Link(assistant, start, chosen), 2)
    views = (target,) if config.alone else tuple(second.views)
    passes = [one for view in views for one in _taught(config.teaches, teacher, assistant, view)]
    second = dataclasses.replace(
        second,
        teachers=tuple(dict.fromkeys(one.teacher for one in passes if one.teacher)),
        strategy=Constant(
            tuple(dataclasses.replace(p, scale=p.scale / len(views)) for p in passes)
        ),
        # The first trial's model is the assistant already; another cut would lose the optimizer.
        start=start if config.one_schedule else second.start,
    )
    return lab.train(in_window(second, steps))


def _papers(config: Variant) -> MiniDiscConfig:
    """Return the paper's method with the same options, where the target cannot win."""
    shared = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(AssistantOptions)
    }
    return MiniDiscConfig(**shared | {"name": "minidisc", "target_may_win": False})


def _taught(teaches: str, teacher: str, assistant: str, view: str) -> tuple[Pass, ...]:
    """Return the passes of one candidate; their losses add up to the loss of one pass."""
    if teaches == "both":
        names = (teacher, assistant)
        return tuple(Pass(teacher=name, view=view, scale=0.5) for name in names)
    if teaches == "split":
        outputs = Pass(teacher=teacher, view=view, weights={OUTPUTS: 0.5, STATES: 0.0})
        states = Pass(teacher=assistant, view=view, weights={OUTPUTS: 0.0, STATES: 0.5})
        return outputs, states
    return (Pass(teacher=assistant, view=view),)
