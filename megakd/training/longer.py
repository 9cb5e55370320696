"""Restart of a run: the options that may change, and the stages that continue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.config.run import RunConfig
from megakd.contract.tasks import STUDENT
from megakd.storage.fingerprint import ABSENT

LENGTHS = tuple(
    f"{section}.{key}"
    for section in ("train", "alone")
    for key in ("max_steps", "num_train_epochs")
)


def is_longer(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return true if two flat configs or fingerprints differ only in increased lengths."""
    changed = [k for k in {*there, *here} if there.get(k, ABSENT) != here.get(k, ABSENT)]
    return bool(changed) and all(_is_raised(there, here, key) for key in changed)


def _is_raised(there: Mapping[str, Any], here: Mapping[str, Any], key: str) -> bool:
    before, now = there.get(key), here.get(key)
    return key in LENGTHS and before is not None and now is not None and now > before


def keeps_last(fields: Mapping[str, Any]) -> bool:
    """Return true if no evaluation decides which weights a run of this flat config keeps."""
    best = fields.get("eval.keep_best")
    chooses = best or (best is None and fields.get("eval.eval_steps") is not None)
    return not (chooses or any(fields[k] for k in fields if k.endswith("early_stopping_patience")))


def may_grow(stage: str, config: RunConfig) -> bool:
    """Return true for a stage that no other stage is made from: the student's and the baselines'.

    If a teacher or an assistant continued to learn, its students would belong to an older teacher.
    """
    return stage in (STUDENT, *config.baselines)
