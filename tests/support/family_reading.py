"""What megakd reads of a tiny model of any family, against `from_pretrained` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_families import SMALL, build, small_configs
from torch.nn import functional

from megakd.config.task import TaskConfig
from megakd.data.batch import Batch
from megakd.errors import MegakdError
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.loading import load_model, resolve_model
from megakd.models.outputs import Needs, read_outputs
from megakd.models.small_copy import no_cache
from megakd.models.structure import architecture_of

LABELS = 3
SHIFTED = ("mamba", "falcon_mamba", "rwkv")
"""Types whose hidden states in transformers start after the first layer."""
CLOSE = 1e-5
"""Largest difference, relative to the largest value."""


class Reading(NamedTuple):
    """One family read for one task.

    result: `not built`, `fails` in transformers itself, `equal`, `differs` or `refused`.
    why: the message or the differences.
    """

    model_type: str
    task: str
    result: str
    why: str = ""
    hidden: str = ""

    def __str__(self) -> str:
        return f"{self.task} {self.model_type}: {self.result} {self.why} {self.hidden}".rstrip()


def reading_of(model_type: str, task: Any, folder: Path) -> Reading:
    """Write a tiny model by `save_pretrained`, and read it by megakd and by transformers."""
    of = (model_type, task)
    why = ""
    for config in small_configs(model_type, task):
        config.num_labels = LABELS
        try:
            build(config, task).save_pretrained(folder)
            plain = AUTO_CLASSES[task].from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            ids = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(0))
            ids[:, -1] = SMALL["eos_token_id"]  # the token of a text that some families pool
            with torch.no_grad():
                expected = plain.eval()(input_ids=ids, **no_cache(plain))
            break
        except Exception as error:  # noqa: BLE001 - any family may fail in its own way
            why = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
            )
    else:
        return Reading(*of, "fails" if why else "not built", why)
    try:
        return _compared(of, folder, plain, ids, expected.logits)
    except MegakdError as error:
        return Reading(*of, "refused", str(error).replace(str(folder), "FOLDER"))


def _compared(of: Any, folder: Path, plain: Any, ids: Any, expected: Any) -> Reading:
    task = TaskConfig(type=of[1], dataset="d", max_length=16)
    is_classifier = task.type == "classification"
    source = resolve_model(str(folder), task, where="teacher.model")
    model = load_model(
        source,
        task=task,
        label_names=[f"LABEL_{number}" for number in range(LABELS)] if is_classifier else [],
        tokenizer_size=500,
        ds=None,
        dtype=torch.float32,
        seed=1,
        need_head=True,
    ).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": ids}
    if task.type == "causal_lm":
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    else:
        inputs["attention_mask"] = torch.ones_like(ids)
    labels = torch.zeros(len(ids), dtype=torch.long) if is_classifier else ids
    batch = Batch(inputs, labels, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        read = read_outputs(model, batch, Needs())
        logits = read.logits
        if read.head is not None:
            weight, bias = read.head.read()
            logits = read.head.warp(functional.linear(read.hidden, weight, bias))
        error, hidden = difference(logits, expected), _of_states(model, plain, batch)
        if task.type == "mlm":
            rows = torch.tensor([1, 5, 14])
            some = read_outputs(model, batch._replace(targets=rows), Needs()).hidden
            error = max(error, difference(some, read.hidden.flatten(0, 1)[rows]))
    result = "equal" if error <= CLOSE and not hidden.startswith("states differ") else "differs"
    return Reading(*of, result, f"{error:.0e}", hidden)


def _of_states(model: Any, plain: Any, batch: Batch) -> str:
    # Empty if all hidden states are those of transformers.
    count = architecture_of(model.config).number_of_layers(model.config)
    try:
        states = read_outputs(model, batch, Needs(hidden_layers=(0, 1, count))).hidden_states
    except MegakdError:
        return "refused"
    ids = batch.inputs["input_ids"]
    every = plain(input_ids=ids, output_hidden_states=True, **no_cache(plain)).hidden_states
    if not every:
        return "no states in transformers"
    first = -1 if model.config.model_type in SHIFTED and len(every) == count + 1 else 0
    pairs = [(1, 1 + first), (count, count)] + ([] if first else [(0, 0)])
    errors = [difference(states[i], every[j]) for i, j in pairs]
    return "" if max(errors) <= CLOSE else f"states differ by {errors}"


def difference(one: Any, other: Any) -> float:
    if one.shape != other.shape:
        return 9.0
    return ((one - other).abs().max() / other.abs().max()).item()
