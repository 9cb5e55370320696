"""Fingerprint of a stage: everything that its weights depend on, to recognize its own results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megakd.config.rollout import RolloutConfig
from megakd.config.train import TrainConfig
from megakd.contract.plugins import code_of
from megakd.contract.stage import Stage
from megakd.engine.distributed import Ranks
from megakd.errors import MegakdError
from megakd.inputs.precision import training_dtype
from megakd.storage.fingerprint import Fingerprint, flatten
from megakd.training.assembly import Assembly
from megakd.training.stage_extra import step_shape
from megakd.training.stage_folder import ROWS_PER_STEP

_PLAIN = (str, int, float, bool, type(None))
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_rank")
"""Keys of `train` that split a step; of their values, only the rows of all ranks count."""
FREE = (*SPLIT, "kernels", "collective_timeout", "resume_from_checkpoint")
"""Keys of `train` on which the weights do not depend; all kernels compute the same."""
PLACES = ("url", "folder", "time_limit")
"""Keys of `server`: where the servers are changes no text and no answer."""


def stage_identity(stage: Stage, assembly: Assembly) -> Fingerprint:
    """Return everything that a stage's weights depend on.

    How ranks share the rows and the weights changes the rounding alone, so that a run may go on
    with other ranks. The stage is complete, see `recipes.completed`, and its teachers are ready.
    """
    config = assembly.config
    (_, learner), *beside = assembly.learners(stage).items()
    tree: dict[str, Any] = {
        "seed": config.seed,
        **assembly.of(stage.role).conditions,
        "model": assembly.identity_of(learner),
        **{
            f"{role} (learns)": {**assembly.identity_of(source), "rate": stage.learners[role]}
            for role, source in beside
        },
        "train": _training(stage.train, assembly.ranks),
        "objective": [asdict(term) | code_of(term) for term in stage.objective],
        "labelled_only": stage.labelled_only,
        "strategy": facts_of(stage.strategy),
        "views": {name: view._asdict() for name, view in stage.views.items()},
        "judge": None if stage.judge is None else facts_of(stage.judge),
        # Under a key of their own: a teacher may have any name, such as "train".
        "teachers": {name: _teacher(assembly, name) for name in stage.teachers},
    }
    if stage.window is not None:
        tree["window"] = stage.window._asdict()
    if stage.rollouts is not None:
        tree["rollouts"] = _rollouts(stage.rollouts)
    lora = config.lora_of(stage.role)
    if lora is not None:
        tree["lora"] = asdict(lora)
    if stage.mixed:
        tree["mixed"] = {role: reading._asdict() for role, reading in stage.mixed.items()}
        # A narrow table has the width of a student that does not learn here.
        widths = {role: size.width for role, size in assembly.second_sizes(stage).items()}
        if any(widths.values()):
            tree["mixed_widths"] = widths
    if config.method.reads_rows(stage):
        tree["mixed_rows"] = assembly.method_rows.key
    return flatten(tree)


def _teacher(assembly: Assembly, name: str) -> Mapping[str, Any]:
    ready = assembly.teachers[name]
    facts = assembly.frozen_facts(ready)
    if name in assembly.config.base_teachers:  # computed with the weights of the student
        return {**facts, "dtype": None, "base": True}
    if ready.spec.server is not None:
        return {**facts, "served": ready.spec.server.top_k}
    if ready.spec.cache is None:
        return facts
    from megakd.training.answer_cache import kept_facts

    kept = kept_facts(ready.spec)
    return {**facts, "cached": kept.get("top_k", kept)}


def _rollouts(rollouts: RolloutConfig) -> Mapping[str, Any]:
    tree = asdict(rollouts)
    del tree["rows_per_call"]
    if rollouts.server is not None:
        for place in PLACES:
            del tree["server"][place]
    return tree


def _training(train: TrainConfig, ranks: Ranks) -> Mapping[str, Any]:
    bf16 = training_dtype(train, ranks.device.type) == "bf16"
    rows = {ROWS_PER_STEP: step_shape(train, ranks).rows_per_step}
    tree = {key: value for key, value in asdict(train).items() if key not in FREE} | rows
    return tree | {"resume_from_checkpoint": None, "bf16": bf16}


def facts_of(value: Any) -> Mapping[str, Any]:
    """Return everything that the decisions of a strategy or a judge depend on.

    A class states its facts by a `facts` property, or by being a dataclass of plain values itself.
    The attributes of a plain subclass would not count, and a changed option would reuse the result
    of another option.
    """
    kind = type(value).__name__
    if hasattr(value, "facts"):
        facts = dict(value.facts)
    elif "__dataclass_fields__" in vars(type(value)):
        facts = asdict(value)
    else:
        raise MegakdError(
            f"{kind} does not declare its options, so results of different options could be "
            f"confused; decorate {kind} itself with @dataclass(frozen=True), or give it a `facts` "
            "property that returns all of its options"
        )
    for key, fact in flatten(facts).items():
        if not isinstance(fact, _PLAIN):
            raise MegakdError(
                f"{kind}.{key} is a {type(fact).__name__}: facts are numbers, strings, booleans, "
                f"None, or lists and mappings of them; give {kind} a `facts` property that "
                f"returns such values"
            )
    return {"kind": kind, **facts, **code_of(value)}
