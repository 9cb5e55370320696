"""Checks that a model fits the run, based on configs, headers and a model without memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import initialization

from megakd.config.task import TaskConfig
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.engine.sharding import sharded_construction
from megakd.errors import ModelError, one_line
from megakd.models.architecture import context_length, counts_padding
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.label_order import label_order, labels_agree, set_labels
from megakd.models.matching import (
    Match,
    check_backbone,
    check_head,
    check_tensors,
    check_ties,
    match_names,
)
from megakd.models.own_models import register_own_models
from megakd.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def plan_loading(
    source: ModelSource,
    task: TaskConfig,
    label_names: Sequence[str],
    *,
    tokenizer_size: int,
    need_head: bool,
) -> tuple[PretrainedConfig, Match]:
    """Return the config to build with and the matched checkpoint tensors, after all checks.

    For arguments and errors see `megakd.models.loading.check_model`.
    """
    _check_sizes(source, task, tokenizer_size)
    config = copy.deepcopy(source.config)
    is_classifier = task.type not in LANGUAGE_TASKS
    keeps_head = need_head or not is_classifier or labels_agree(config, label_names)
    if is_classifier and not need_head:
        set_labels(config, label_names)
    empty = valueless_model(source, task, config)
    leave_out = () if keeps_head else (source.architecture.head,)
    match = match_names(empty, source.stored, leave_out=leave_out)
    if source.folder is not None:
        if need_head:
            check_head(match, source, task=task.type)
            _check_labels(source, task, label_names)
        check_backbone(match, source)
        check_tensors(match, empty, where=source.where)
        check_ties(empty, source.stored, where=source.where)
    return config, match


def _check_sizes(source: ModelSource, task: TaskConfig, tokenizer_size: int) -> None:
    if tokenizer_size > source.config.vocab_size:
        raise ModelError(
            f"{source.where}: the tokenizer has {tokenizer_size} tokens, and the embedding of the "
            f"model has {source.config.vocab_size}; set task.tokenizer to the tokenizer of the "
            "model"
        )
    token = source.config.pad_token_id
    if counts_padding(source.config) and not isinstance(token, int):
        file = ".config" if source.folder is None else f": {source.folder / 'config.json'}"
        raise ModelError(
            f"{source.where}{file}: pad_token_id must be a whole number (got {token!r}), because "
            f"a {source.config.model_type} model counts positions from it; set pad_token_id to the "
            "number of the padding token of the tokenizer"
        )
    check_length(source, task)


def check_length(source: ModelSource, task: TaskConfig) -> None:
    """Raise if the rows of the task are longer than the model's context."""
    longest = context_length(source.config)
    if longest is not None and task.row_length > longest:
        raise ModelError(
            f"{source.where}: task.max_length is {task.row_length} and the model takes at most"
            f" {longest} tokens; lower task.max_length"
        )


def _check_labels(source: ModelSource, task: TaskConfig, label_names: Sequence[str]) -> None:
    if task.type == "regression" and source.config.num_labels != 1:
        raise ModelError(
            f"{source.where}: {source.folder} has {source.config.num_labels} outputs and regression"
            " needs 1; set teacher.finetune or give a model that was fine-tuned on scores"
        )
    label_order(source.config, label_names, where=source.where)


def valueless_model(
    source: ModelSource, task: TaskConfig, config: PretrainedConfig
) -> PreTrainedModel:
    """Build the model with names and shapes alone: whole, in fp32, and without memory."""
    with torch.device("meta"), sharded_construction(None, torch.float32):
        return build_empty(source, task, config, torch.float32)


def build_empty(
    source: ModelSource, task: TaskConfig, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model without parameter values; its buffers, such as rotary tables, are valid."""
    register_own_models()
    try:
        with initialization.no_init_weights():
            model = AUTO_CLASSES[task.type].from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(
            f"{source.where}: a {config.model_type} model cannot be built from this config: "
            f"{one_line(error)}"
        ) from error
    model.tie_weights()
    return model
