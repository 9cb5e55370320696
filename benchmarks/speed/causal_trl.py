"""TRL's trainers as sides of `causal_step.py`; written for TRL 1.16.0, and tried with it.

GKDTrainer takes off-policy steps (`lmbda=0`), as its users configure it. DistillationTrainer only
learns from text that the student has just generated; here the generation returns the batch at
hand, so that only the step remains. A step is the trainer's own `training_step`, then clipping and
the update as in the loop of `transformers.Trainer`, without its callbacks, schedule and log.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from speed import causal_step

Inputs = Callable[[Tensor], dict[str, Tensor]]
BETAS = {"forward_kl": 0.0, "jsd": 0.5}  # TRL's convention: 0 is forward KL, 1 is reverse KL


def _gkd_inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _distillation_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Return each row's first token as its prompt, so that all other tokens are targets."""
    ones = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ids[:, 1:],
        "completion_mask": ones[:, 1:],
        "num_items_in_batch": targets_of(ids),
    }


class Kind(NamedTuple):
    """A trainer: its module, its config, options of its own, a row of data, and its inputs."""

    module: str
    config: str
    options: dict[str, Any]
    row: dict[str, list[Any]]
    inputs: Inputs


KINDS = {
    "GKDTrainer": Kind(
        "trl.experimental.gkd", "GKDConfig", {"lmbda": 0.0}, {"messages": [[]]}, _gkd_inputs
    ),
    "DistillationTrainer": Kind(
        "trl", "DistillationConfig", {}, {"prompt": ["a"]}, _distillation_inputs
    ),
}


class Trl:
    """A trainer of TRL that takes one step at a time."""

    def __init__(self, trainer: Any, ids: Sequence[Tensor], inputs_of: Inputs) -> None:
        self._trainer, self._ids, self._inputs_of = trainer, ids, inputs_of
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # else set by the loop of `train()`
        trainer.model.train()

    def step(self, index: int) -> None:
        trainer, ids = self._trainer, self._ids[index]
        trainer.training_step(trainer.model, self._inputs_of(ids), targets_of(ids))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), causal_step.MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    @torch.no_grad()
    def loss(self, index: int) -> float:
        trainer, ids = self._trainer, self._ids[index]
        inputs, count = self._inputs_of(ids), targets_of(ids)
        return float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count))

    def bare(self, loss: causal_step.Loss) -> causal_step.Bare:
        models = (self._trainer.model, self._trainer.teacher_model)
        return causal_step.bare_copy(models, self._ids, loss)


def targets_of(ids: Tensor) -> Tensor:
    return torch.tensor(float(ids[:, 1:].numel()))


def available() -> list[str]:
    """Return the names of the trainers that the installed TRL has; say what is missing."""
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed: skipped", flush=True)
        return []
    names = [name for name, kind in KINDS.items() if hasattr(_module(kind.module), name)]
    for name, kind in KINDS.items():
        if name not in names:
            print(f"trl has no {kind.module}.{name}: skipped", flush=True)
    return names


def _module(name: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


@contextmanager
def opened(
    name: str, case: Path, sizes: causal_step.Sizes, divergence: str, count: int
) -> Iterator[Trl]:
    kind, (student, teacher) = KINDS[name], causal_step.random_models(sizes)
    module = _module(kind.module)
    with tempfile.TemporaryDirectory(prefix="megakd-trl-") as folder:
        options = _options(folder, sizes, divergence) | kind.options
        with warnings.catch_warnings():
            # transformers 5.23 warns of an option that TRL sets itself.
            warnings.simplefilter("ignore", FutureWarning)
            config = getattr(module, kind.config)(**options)
        trainer = getattr(module, name)(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict(kind.row),
            processing_class=AutoTokenizer.from_pretrained(case / causal_step.TOKENIZER),
        )
        if name == "DistillationTrainer":
            trainer._generate_and_score_completions = lambda given: given  # noqa: SLF001
        yield Trl(trainer, causal_step.random_ids(sizes, count), kind.inputs)


def _options(folder: str, sizes: causal_step.Sizes, divergence: str) -> dict[str, Any]:
    """Return the options of both trainers: fp32, the bare loop's AdamW, no log."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": sizes.rows,
        "learning_rate": causal_step.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "beta": BETAS[divergence],
        "temperature": 1.0,
    }
