"""Steps of texts that are partly rollouts, by a rule that no cut of the step can change."""

from __future__ import annotations

import cases
import pytest

from megakd.training.trainer import Trainer


def train(config_path: str, overrides: list[str], steps: int) -> dict:
    """Train as `cases.train`, on batches that are marked."""
    real = Trainer.train_step

    def marking(self: Trainer, batches):
        return real(self, [marked(batch, self.step) for batch in batches])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", marking)
        return cases.train(config_path, overrides, steps, generates=False)


def marked(batch, step: int):
    """Return rows of either source at step 0, only data at step 1, then texts within rows."""
    ids = batch.inputs["input_ids"]
    if step == 1:
        return batch
    own = ids.sum(1, keepdim=True) % 2 == 0 if step == 0 else ids % 2 == 0
    return batch.extended(is_rollout=own.expand(ids.shape).cpu())
