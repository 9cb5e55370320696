"""What a stage's weights depend on: a result of anything else is not taken for its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megakd.config_file import config_tree
from megakd.engine.ds_config import load_ds_config
from megakd.fingerprint import Fingerprint, flatten

if TYPE_CHECKING:
    from megakd.assembly import Assembly
    from megakd.config import TrainConfig
    from megakd.stage import Stage


def stage_identity(stage: Stage, assembly: Assembly) -> Fingerprint:
    """Everything except the number of ranks.

    Args:
        stage: with nothing left open, see `recipes.completed`.
        assembly: of the run; the stage's teachers are ready in it.
    """
    config, where = assembly.config, f"{assembly.config.key_of(stage.role)}.deepspeed"
    tree: dict[str, Any] = {
        "seed": config.seed,
        "task": config_tree(config)["task"],
        "data": assembly.prepared.encoded.content_hash,
        "model": assembly.identity_of(assembly.learner(stage)),
        "train": _training(stage.train),
        "objective": [asdict(term) for term in stage.objective],
        "deepspeed": load_ds_config(stage.deepspeed, where=where),
        "labelled_only": stage.labelled_only,
        "strategy": _plain(stage.strategy),
        "views": {name: view._asdict() for name, view in stage.views.items()},
        "judge": _plain(stage.judge),
        "eval": {k: v for k, v in asdict(config.eval).items() if "batch" not in k},
    }
    if stage.episodes > 1:
        tree["episodes"] = stage.episodes
    return flatten(tree | {name: _teacher(assembly, name) for name in stage.teachers})


def _teacher(assembly: Assembly, name: str) -> Mapping[str, Any]:
    ready = assembly.teachers[name]
    facts = {
        "model": assembly.identity_of(ready.source),
        "dtype": assembly.teacher_dtype(ready),
    }
    return facts if ready.spec.cache is None else {**facts, "cached": ready.spec.cache_top_k}


def _training(train: TrainConfig) -> Mapping[str, Any]:
    """Without what may differ between two parts of one run: all kernels compute the same."""
    tree = asdict(train) | {"resume_from_checkpoint": None}
    del tree["kernels"]
    return tree


def _plain(value: Any) -> Any:
    """What a strategy or a judge is made of."""
    if hasattr(value, "facts"):
        return value.facts
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    return {"kind": type(value).__name__, **asdict(value)}
