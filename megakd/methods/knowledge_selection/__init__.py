"""Knowledge selection: an actor decides at every step which kinds of knowledge the student uses.

Wang et al. 2022 (https://arxiv.org/abs/2302.00444). A teacher offers several kinds of knowledge:
labels, responses, features, relations. Not all kinds are needed, and the helpful kinds change
during training. Stage 1 trains a selector with actor-critic learning over episodes; the student
starts again in every episode. The reward is the decrease of the student's loss on held-out data
over a phase. Stage 2 freezes the selector and distils the student with the selector's choices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from megakd.config.options import OneTeacherOptions
from megakd.config.task import LANGUAGE_TASKS, STUDENT
from megakd.config.terms import STRICT, Count, HiddenMse, RelationFsp, TermConfig, Weight, term_name
from megakd.data.batch import Pass
from megakd.errors import ConfigError
from megakd.stage import Stage, StageResult, Window
from megakd.training.lab import Lab

STAGE = "selector"
OF_SELECTOR = {"action", "episodes", "episode_steps", "phase_steps", "exploration"}
"""Options that only a learned policy reads."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class KnowledgeSelectionConfig(OneTeacherOptions):
    """The terms of the objective are kinds of knowledge, weighed anew at every step.

    policy: `learned` by a selector, or a control, which draws random weights: `random_soft` or
        `random_hard`.
    action: action of the learned policy: `soft` gives weights between 0 and 1; `hard` uses a kind
        or not.
    episodes: number of episodes of stage 1; the student starts again in every episode.
    episode_steps: optimizer steps of an episode; null: as many as for the student.
    phase_steps: optimizer steps of a phase, after which the reward is measured; null: a tenth of an
        episode. 1 is the paper's algorithm without its refinement.
    exploration: beta, weight of the reward for actions that differ from the previous phase.
    """

    policy: Literal["learned", "random_soft", "random_hard"] = "learned"
    action: Literal["soft", "hard"] = "soft"
    episodes: Count = 5
    episode_steps: Count | None = None
    phase_steps: Count | None = None
    exploration: Weight = 0.1

    @property
    def looks_into_teacher(self) -> bool:
        """True for a learned policy, which reads the hidden states of the teacher."""
        return self.policy == "learned"

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        policy = f"method.policy {self.policy}"
        if self.policy != "learned":
            yield from self.unused(OF_SELECTOR, f"{policy} has no selector")
        if config.objective is None and config.train.tokens_per_rank is not None:
            yield (
                "train.tokens_per_rank: packs rows, and relation_fsp, which is a kind of knowledge "
                "without an objective, is averaged over rows; remove the key, or list other kinds "
                "in objective"
            )
        for term in config.objective or ():
            if term.weight == 0:
                yield (
                    f"objective: {term.loss} has weight 0, and {policy} multiplies the weights of "
                    "the objective, so no step can use the term; remove the term, or set a weight "
                    "above 0"
                )


def run(config: KnowledgeSelectionConfig, lab: Lab) -> StageResult:
    """Run stage 1 if a selector has to be learned, then train the student."""
    from megakd.methods.knowledge_selection.selecting import RandomWeights, Selecting

    teacher, labels = lab.teacher(config.teacher), lab.hard_terms(per_row=True)
    states = (HiddenMse(loss="hidden_mse"), RelationFsp(loss="relation_fsp"))
    kinds = lab.config.objective or (*labels, *lab.soft_terms(), *states)
    if config.policy == "learned":
        selector = _learned(config, lab, teacher, kinds)
        strategy = Selecting(teacher, selector, config, **_reading(lab))
    else:
        strategy = RandomWeights(
            teacher,
            {term_name(term): term.weight for term in kinds},
            hard=config.policy == "random_hard",
            seed=lab.config.seed,
        )
    stage = Stage(
        name=STUDENT,
        teachers=(teacher,),
        objective=kinds,
        strategy=strategy,
        # All terms, also those that a step leaves out.
        measured=(Pass(teacher=teacher),) if lab.config.eval.losses else (),
    )
    return lab.train(stage)


def _reading(lab: Lab) -> dict[str, Any]:
    # The state of the first token does not represent the text in language models.
    return {"seed": lab.config.seed, "whole_texts": lab.config.task.type in LANGUAGE_TASKS}


def _learned(
    config: KnowledgeSelectionConfig, lab: Lab, teacher: str, kinds: tuple[TermConfig, ...]
) -> Any:
    """Return the `Selector` of stage 1."""
    from safetensors.torch import load_file

    from megakd.methods.knowledge_selection.selecting import SELECTOR, LearningToSelect, Selector
    from megakd.process.seeding import cpu_seeded

    steps = config.episode_steps or lab.facts.steps(lab.config.train)
    phase = config.phase_steps or max(1, math.ceil(steps / 10))
    if phase > steps:
        raise ConfigError(
            f"method.phase_steps: a phase of {phase} steps does not fit into an episode of "
            f"{steps}; lower method.phase_steps, or raise method.episode_steps"
        )
    widths = lab.configured_model(STUDENT).width, lab.configured_model(teacher).width
    with cpu_seeded(lab.config.seed):
        new = Selector(widths, tuple(map(term_name, kinds)))
    strategy = LearningToSelect(
        teacher,
        new,
        config,
        probe=lab.work.probe(STAGE),
        steps=steps,
        phase_steps=phase,
        **_reading(lab),
    )
    stage = Stage(
        name=STAGE,
        meaning="students that are trained in turn, from which the selector of knowledge learns",
        teachers=(teacher,),
        objective=kinds,
        strategy=strategy,
        # The selector learns in whole episodes, regardless of the students' scores.
        train=dataclasses.replace(lab.config.train, max_steps=steps, early_stopping_patience=None),
        window=Window(0, config.episodes * steps, steps),
    )
    learned = lab.work.read_file(lab.train(stage, strategy.files), SELECTOR, load_file)
    if learned is not None:  # None in a plan
        new.load_state_dict(learned)
    return new
