"""A model that was found, and checks that it fits the run, before any weight is loaded.

The tensors of a checkpoint are matched with parameters by names and shapes alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PretrainedConfig, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from megakd.config.sections import StudentConfig, TeacherConfig
from megakd.config.task import AUTO, FP8, LANGUAGE_TASKS, THRESHOLD, TaskConfig
from megakd.config.terms import Heads
from megakd.engine.sharding import sharded_construction
from megakd.errors import ModelError, one_line
from megakd.models.architectures import Architecture, context_length
from megakd.models.experts import FoundExperts, experts_of
from megakd.models.small_copy import new_model
from megakd.models.views import View
from megakd.models.weights import Conversion, StoredTensor, WeightReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_DROPOUT = re.compile(r"dropout(_prob|_rate)?$|_pdrop$")
"""Config keys of dropout, as the families name them."""

GGUF = "gguf"


def quantization_keys(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return the keys of a config on the quantization of the weights; empty: there is none."""
    settings: Any = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, Mapping) else vars(settings)


def method_of(config: PretrainedConfig) -> str | None:
    """Return the method by which the weights of a model are quantized; None: they are not."""
    method = quantization_keys(config).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found and whose files are complete; no weights are in memory.

    folder: None for a model that starts from random weights; a GGUF file is its own folder.
    where: The key of the run config, such as `teacher.model`.
    stored: The tensors of its weight files.
    wants_vocabulary: The model starts from random weights and takes the tokenizer's size.
    layers: The layers of the folder that the model has, from 1, in this order; None: all.
    attn_implementation: The config's choice of an attention; None: by task and device.
    fp8: Whether its linear layers have 8 bits where it is frozen.
    """

    name: str
    folder: Path | None
    config: PretrainedConfig = field(repr=False)
    architecture: Architecture
    where: str
    stored: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    wants_vocabulary: bool = False
    trust_remote_code: bool = False
    layers: tuple[int, ...] | None = None
    attn_implementation: str | None = None
    fp8: bool = False

    @property
    def depth(self) -> int:
        return self.architecture.number_of_layers(self.config)

    @property
    def heads(self) -> Heads:
        return self.architecture.heads(self.config)

    @property
    def width(self) -> int:
        return self.architecture.hidden_width(self.config)

    @property
    def units(self) -> View:
        """The units that can be cut; `head_width` is set if columns of heads can be cut."""
        return self.architecture.prunable(self.config)

    @property
    def why_fixed(self) -> str | None:
        """Why only whole layers of the model can be left out; None: units can be cut too."""
        return self.architecture.why_uncut(self.config)

    @property
    def shows_attention(self) -> bool:
        return self.architecture.shows_attention

    @property
    def whole(self) -> View:
        """The view of the whole model; without heads and neurons if these are not cut."""
        return self.architecture.units(self.config) if self.why_fixed is None else View((), ())

    @property
    def experts(self) -> FoundExperts:
        """The experts that the layers can lose."""
        return experts_of(self.config)

    @property
    def quantization(self) -> str | None:
        """The method by which its weights are quantized; None: they are not."""
        is_gguf = self.folder is not None and self.folder.is_file()
        return GGUF if is_gguf else method_of(self.config)

    @property
    def files(self) -> list[Path]:
        """The files that have its weights."""
        if self.folder is not None and self.quantization == GGUF:
            return [self.folder]
        return sorted({stored.file for stored in self.stored.values()})

    @property
    def fresh(self) -> ModelSource:
        """The model of the same shape that starts from random weights."""
        return replace(self, folder=None, stored={})

    def with_dropout(self, dropout: float | None) -> ModelSource:
        """Return the model with this dropout wherever its config has a rate; None: unchanged."""
        if dropout is None:
            return self
        config = copy.deepcopy(self.config)
        for key, value in config.to_dict().items():
            # A switch, such as ESM's `token_dropout`, is no rate.
            if _DROPOUT.search(key) and type(value) in (int, float):
                setattr(config, key, dropout)
        return replace(self, config=config)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the largest stored tensor; None for a model from scratch."""
        largest = max(self.stored.values(), key=lambda s: torch.Size(s.shape).numel(), default=None)
        return largest.dtype if largest else None


class ReadyTeacher(NamedTuple):
    """A model that can teach, fine-tuned or given, and its section of the config."""

    source: ModelSource
    spec: TeacherConfig

    def is_loaded(self, *, measures_losses: bool) -> bool:
        """Return whether a stage needs the model itself, not a server or answers on disk.

        The answers that a run caches are for training rows; held-out losses ask the model.
        """
        is_cached = self.spec.cache is not None and not (
            self.spec.cache == AUTO and measures_losses
        )
        return self.spec.server is None and not is_cached


def parts_of(cut: ModelSource, whole: ModelSource, layers: tuple[int, ...] | None) -> str:
    """Return what a cut model keeps, as `layers 1, 3 of 6 · 12 heads · 256 of 1536 neurons`.

    layers: the numbers of its layers in the whole model; None: they are not known.
    """
    numbers = ", ".join(map(str, layers)) if layers and len(layers) == cut.depth else ""
    depth = f"layer{'s' * (cut.depth > 1)} {numbers}" if numbers else f"{cut.depth}"
    parts = [f"{depth} of {whole.depth}{'' if numbers else ' layers'}"]
    if cut.width != whole.width:
        parts.append(f"{cut.width} of {whole.width} columns")
    heads = "key-value heads" if whole.heads.keys < whole.heads.queries else "heads"
    mine, every = cut.whole, whole.whole
    for name, left, before in (
        (heads, mine.heads, every.heads),
        ("neurons", mine.neurons, every.neurons),
    ):
        if not left or not any(before):
            continue
        least, most, total = min(left), max(left), max(before)
        some = f"{least}" if least == most else f"{least} to {most}"
        parts.append(f"{total} {name}" if least == total else f"{some} of {total} {name}")
    left, total = cut.experts.total, whole.experts.total
    if total:
        parts.append(f"{total} experts" if left == total else f"{left} of {total} experts")
    return " · ".join(parts)


MULTI_LABEL = "multi_label_classification"
"""`problem_type` of a model whose outputs are a probability each, by a sigmoid."""

_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}

TEXT_PARTS = ("language_model.", "text_model.")


@dataclass(frozen=True, kw_only=True)
class Match:
    """The tensors that a checkpoint provides for a model.

    stored: the model's tensors that the checkpoint has; tied ones under their first name.
    missing: parameters that the checkpoint lacks.
    unused: keys of the checkpoint that no parameter uses.
    left_out: tensors that the checkpoint has, and that the model is to draw anew.
    """

    stored: Mapping[str, StoredTensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def in_disk_order(self) -> list[tuple[str, StoredTensor]]:
        return sorted(self.stored.items(), key=lambda item: (item[1].file, item[1].offset))


def plan_loading(
    source: ModelSource,
    task: TaskConfig,
    label_names: Sequence[str],
    *,
    tokenizer_size: int,
    need_head: bool,
) -> tuple[PretrainedConfig, Match]:
    """Return the config to build with and the matched checkpoint tensors, after all checks.

    A stored head for the data's labels gives its outputs in the data's order; a head for other
    labels is left out.

    For arguments and errors see `megakd.models.loading.check_model`.
    """
    if tokenizer_size > source.config.vocab_size:
        raise ModelError(
            f"{source.where}: the tokenizer has {tokenizer_size} tokens, and the embedding of the "
            f"model has {source.config.vocab_size}; set task.tokenizer to the tokenizer of the "
            "model"
        )
    check_length(source, task)
    config = copy.deepcopy(source.config)
    if source.quantization is not None:  # transformers alone knows its tensors
        label_order(config, label_names, where=source.where)
        return config, Match(stored={}, missing=(), unused=())
    is_classifier = task.type not in LANGUAGE_TASKS
    order = head_order(config, label_names)
    keeps_head = need_head or not is_classifier or order is not None
    if not need_head:
        config.problem_type = None  # of a classifier that a language model starts from
    if is_classifier and (label_names or source.folder is None or not need_head):
        set_labels(config, label_names, multi_label=bool(task.multi_label))
    empty = valueless_model(source, task, config)
    leave_out = () if keeps_head else (source.architecture.head,)
    match = match_names(empty, source.stored, leave_out=leave_out)
    if source.folder is not None:
        drawn = random_head(match, source)
        if drawn and task.type == "causal_lm":
            raise ModelError(
                f"{source.where}: {source.folder} lacks {drawn}, and config.json does not tie the "
                "head to the embeddings, so that it would be random; set tie_word_embeddings: true "
                "in config.json if the model ties them, or give another folder"
            )
        if need_head:
            _check_head(match, source, task, label_names)
        _check_tensors(match, source, empty)
        _check_ties(empty, source)
    if order is not None and list(order) != sorted(order):
        last = output_module(empty, source.architecture.head)
        permuted = {
            name: stored.chosen(0, order)
            for name, stored in match.stored.items()
            if name.rpartition(".")[0] == last
        }
        match = replace(match, stored={**match.stored, **permuted})
        threshold = getattr(config, THRESHOLD, None)
        if isinstance(threshold, list) and len(threshold) == len(order):
            setattr(config, THRESHOLD, [threshold[column] for column in order])
    return config, match


def output_module(model: PreTrainedModel, head: str) -> str:
    """Return the last module of a head, whose outputs are classes or tokens."""
    inside = model.named_modules()
    parts = [(path, part) for path, part in inside if f"{path}.".startswith(f"{head}.")]
    return [path for path, part in parts if [*part.parameters(recurse=False)]][-1]


def check_length(source: ModelSource, task: TaskConfig) -> None:
    """Raise if the rows of the task are longer than the model's context."""
    longest = context_length(source.config)
    if longest is not None and task.row_length > longest:
        raise ModelError(
            f"{source.where}: task.max_length is {task.row_length} and the model takes at most"
            f" {longest} tokens; lower task.max_length"
        )


def random_head(match: Match, source: ModelSource) -> str:
    """Return the tensors of the head that would start from random values, up to three."""
    # A new bias is zero, as in a family that has none.
    new = [n for n in match.missing if source.architecture.of_the_task(n) and "bias" not in n]
    return listed(new, 3)


def _check_head(
    match: Match, source: ModelSource, task: TaskConfig, label_names: Sequence[str]
) -> None:
    lacking = [name for name in match.missing if source.architecture.of_the_task(name)]
    if lacking:
        raise ModelError(
            f"{source.where}: {source.folder} has no head for {task.type} ({listed(lacking, 3)} "
            "missing); set teacher.finetune or give a folder that was fine-tuned for the task"
        )
    wanted, stated = _PROBLEMS.get(task.type), source.config.problem_type
    wanted = MULTI_LABEL if task.multi_label else wanted
    if wanted is not None and stated not in (None, wanted):
        raise ModelError(
            f"{source.where}: {source.folder} has problem_type {stated} in config.json, and "
            f"task.type {task.type} needs {wanted}; set teacher.finetune or give a model that was "
            "fine-tuned for it"
        )
    if task.type == "regression" and source.config.num_labels != 1:
        raise ModelError(
            f"{source.where}: {source.folder} has {source.config.num_labels} outputs and regression"
            " needs 1; set teacher.finetune or give a model that was fine-tuned on scores"
        )
    label_order(source.config, label_names, where=source.where)


def _check_tensors(match: Match, source: ModelSource, model: PreTrainedModel) -> None:
    lacking = [name for name in match.missing if not source.architecture.of_the_task(name)]
    if lacking:
        raise ModelError(
            f"{source.where}: {source.folder} lacks {len(lacking)} weights of a "
            f"{source.config.model_type} model ({listed(lacking, 3)}); check that config.json and "
            "the weights belong to the same model"
        )
    tensors = model.state_dict(keep_vars=True)
    for name, stored in match.stored.items():
        expected = tuple(tensors[name].shape)
        if stored.shape != expected:
            raise ModelError(
                f"{source.where}: {stored.file} holds {stored.key} of shape {list(stored.shape)}, "
                f"and config.json requires {list(expected)}; check that config.json and the "
                "weights belong to the same model"
            )
        if tensors[name].is_floating_point() and not stored.dtype.is_floating_point:
            raise ModelError(
                f"{source.where}: {stored.file} holds {stored.key} as "
                f"{str(stored.dtype).removeprefix('torch.')}, which is not a floating-point type, "
                "and quantized models are not supported; give the model in fp32, bf16 or fp16"
            )


def _check_ties(model: PreTrainedModel, source: ModelSource) -> None:
    stored, reader = source.stored, WeightReader(source.where)
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if one not in stored or other not in stored:
            continue
        if not torch.equal(reader.read(stored[one]), reader.read(stored[other])):
            raise ModelError(
                f"{source.where}: config.json ties {one} to {other}, and the weights hold"
                " different values for them; set tie_word_embeddings to false in config.json"
            )


def match_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], *, leave_out: Iterable[str] = ()
) -> Match:
    """Match stored tensors with a model's, for any head that the checkpoint was saved with.

    Names and shapes in a file may be others than in the model: transformers renames and joins
    tensors while it loads. The prefix of a text part beside vision or sound is left out too.
    """
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}  # of tied tensors
    skipped = tuple(f"{module}." for module in leave_out)
    taken: dict[str, StoredTensor] = {}
    unused, left_out = list[str](), list[str]()
    named, used = as_in_model(model, stored, tensors)
    for key, value in named.items():
        names = key, *(key.replace(part, "", 1) for part in TEXT_PARTS)
        name = next((name for name in names if name in tensors), None)
        if name is not None and not name.startswith(skipped):
            taken[first[id(tensors[name])]] = value
        else:
            unused += used[key]
            left_out += [] if name is None else used[key]
    missing = tuple(
        name for name, _ in model.named_parameters() if first[id(tensors[name])] not in taken
    )
    return Match(stored=taken, missing=missing, unused=tuple(unused), left_out=tuple(left_out))


def as_in_model(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], names: Collection[str]
) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
    """Return stored tensors by the names that transformers gives them, and the keys of each.

    A tensor whose name alone changes is read as it is stored. Others, such as the experts of a
    layer, are converted from one or more stored tensors when they are read.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, state = model.base_model_prefix, dict.fromkeys(names, True)
    named: dict[str, StoredTensor] = {}
    used: dict[str, list[str]] = {}
    groups: dict[str, Conversion] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if pattern is None or key in state:
            name = key if key in state else name
            named[name] = stored[key]
            used.setdefault(name, []).append(key)
        else:
            group = groups.setdefault(name, Conversion(name, by_pattern[pattern], model.config))
            group.parts.append((key, pattern, stored[key]))
    for group in groups.values():
        keys = [key for key, _, _ in group.parts]
        try:
            results = group.tensors()
        except (RuntimeError, ValueError, KeyError, IndexError, StopIteration):
            # A part is missing, so that what it would be a part of is missing too.
            results = {key: tensor for key, _, tensor in group.parts}
        named |= results
        used |= dict.fromkeys(results, keys)
    return named, used


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
    trusted = source.trust_remote_code
    try:
        with initialization.no_init_weights():
            model = new_model(config, task.type, dtype=dtype, trust_remote_code=trusted)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        raise ModelError(
            f"{source.where}: a {config.model_type} model cannot be built from this config: "
            f"{one_line(error)}"
        ) from error
    model.tie_weights()
    return model


def label_order(
    model_config: PretrainedConfig, label_names: Sequence[str], *, where: str
) -> tuple[int, ...] | None:
    """Return `order` such that `logits[:, order]` is in the data's order of labels.

    None: the model's order is that of the data, or the task has no labels.
    """
    if not label_names:
        return None
    names = model_label_names(model_config)
    if len(names) != len(label_names):
        raise ModelError(
            f"{where}: the model has {len(names)} labels ({listed(names)}) and the data"
            f" {len(label_names)} ({listed(label_names)}); {_finetune(where)}give a model that"
            " was fine-tuned on these labels"
        )
    order = head_order(model_config, label_names)
    if order is None:
        raise ModelError(
            f"{where}: the model's labels ({listed(names)}) are not those of the data"
            f" ({listed(label_names)}); {_finetune(where)}write the data's labels into id2label of"
            " the model's config.json, in the order of its outputs"
        )
    return None if order == tuple(range(len(names))) else order


def head_order(
    model_config: PretrainedConfig, label_names: Sequence[str]
) -> tuple[int, ...] | None:
    """Return the output of a stored head for each of the data's labels; None: it has others.

    Without labels, a head has one score.
    """
    names = model_label_names(model_config)
    order = _columns(names, label_names) if label_names else (0,)
    return order if sorted(order) == list(range(len(names))) else None


def model_label_names(model_config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of a model's labels in the order of its logits."""
    return tuple(str(name) for _, name in sorted((model_config.id2label or {}).items()))


def set_labels(
    model_config: PretrainedConfig, label_names: Sequence[str], *, multi_label: bool = False
) -> None:
    """Write the data's labels into a config; no labels mean one score (regression)."""
    names = tuple(label_names) or ("LABEL_0",)
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: number for number, name in enumerate(names)}
    kind = MULTI_LABEL if multi_label else "single_label_classification"
    model_config.problem_type = kind if label_names else "regression"


def _columns(names: Sequence[str], label_names: Sequence[str]) -> tuple[int, ...]:
    """Return the model's column of each of the data's labels; -1 for a label it does not have.

    Upper and lower case are told apart only for names that differ in nothing else.
    """
    if all(map(str.isdecimal, label_names)):
        names = [re.sub(r"^LABEL_(\d+)$", r"\1", name) for name in names]
    columns = {name: column for column, name in enumerate(names)}
    by_fold: dict[str, list[int]] = {}
    for name, column in columns.items():
        by_fold.setdefault(name.casefold(), []).append(column)

    def column_of(label: str) -> int:
        alike = by_fold.get(label.casefold(), [])
        return columns.get(label, alike[0] if len(alike) == 1 else -1)

    return tuple(map(column_of, label_names))


def _finetune(where: str) -> str:
    owner = where.removesuffix(".model")
    return f"set {owner}.finetune or " if owner.startswith("teacher") else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as text for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def specified(source: ModelSource, spec: TeacherConfig | StudentConfig) -> ModelSource:
    """Return a model with the attention and, of a teacher, the 8 bits that its section asks for."""
    has_fp8 = isinstance(spec, TeacherConfig) and spec.dtype == FP8
    return replace(source, attn_implementation=spec.attn_implementation, fp8=has_fp8)
