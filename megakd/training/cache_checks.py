"""Checks that a student can learn from cached answers of teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.contract.batch import LogitWarp
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.models.source import ModelSource


def check_caches(config: RunConfig, student: ModelSource) -> None:
    """Raise if the loss on the cached probabilities does not have the logits of the student.

    Raises:
        ConfigError: a language model is taught from a cache, and the logits of the student are
            multiplied with a factor or capped.
    """
    cached = [
        f"{config.key_of(name)}.{'cache' if spec.cache else 'server'}"
        for name, spec in config.teacher_specs.items()
        if spec.cache or (spec.server and spec.server.states is None)
    ]
    warp = student.architecture.logit_warp(student.config)
    if cached and config.task.type == "causal_lm" and warp != LogitWarp():
        keys = [key for key in student.architecture.logits if key is not None]
        values = ", ".join(f"{key}: {getattr(student.config, key)}" for key in keys)
        raise ConfigError(
            f"{cached[0]}: the {student.config.model_type} student changes its logits after "
            f"the output matrix ({values}), which the loss on cached probabilities does not "
            "support; remove the key, or use a student of another family"
        )
