"""The keys of a config: known keys, variants, options, defaults, and names of other libraries."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megakd.config.run import RunConfig
from megakd.contract.plugins import FromPackage
from megakd.errors import ConfigError

KeyPath = tuple[str | int, ...]


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, with `Annotated` and unions resolved."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in members(part)]
    return [annotation]


def variants(annotation: Any, tag: str) -> dict[str, type]:
    """Return the dataclasses of a tagged union by the value of `tag`, in the order of the union."""
    named = ((_tag_value(kind, tag), kind) for kind in members(annotation))
    return {name: kind for name, kind in named if name is not None}


def _package_options(annotation: Any) -> FromPackage | None:
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        options = [mark for mark in marks if isinstance(mark, FromPackage)]
        return options[0] if options else _package_options(inner)
    if get_origin(annotation) in (Union, types.UnionType):
        options = [_package_options(part) for part in get_args(annotation)]
        return next((mark for mark in options if mark is not None), None)
    return None


def known_keys(path: KeyPath, tree: Any) -> list[str]:
    """Return the keys that the mapping at `path` may have; [] if all keys are allowed."""
    kind = _dataclass_of(annotation_at(path, tree), value_at(path, tree))
    return [] if kind is None else [field.name for field in dataclasses.fields(kind)]


def annotation_at(path: KeyPath, tree: Any) -> Any:
    """Return the annotation of the value at `path`; None below a mapping with free keys."""
    annotation: Any = RunConfig
    for depth, part in enumerate(path):
        if isinstance(part, int):
            items = [kind for kind in members(annotation) if get_origin(kind) is tuple]
            annotation = get_args(items[0])[0] if items else None
        else:
            kind = _dataclass_of(annotation, value_at(path[:depth], tree))
            annotation = None if kind is None else _hints(kind).get(part)
    return annotation


def value_at(path: KeyPath, tree: Any) -> Any:
    """Return the value at `path`; None if the path does not exist."""
    for part in path:
        inside = (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if not inside:
            return None
        tree = tree[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tree


def paths_ending_in(key: str) -> list[str]:
    """Return dotted paths of the settings named `key`, the shortest path first."""
    paths = [path for path in _option_paths(RunConfig, "") if path.rpartition(".")[2] == key]
    return sorted(paths, key=lambda path: path.count("."))


def _option_paths(kind: type, prefix: str) -> Iterator[str]:
    for name, annotation in _hints(kind).items():
        yield f"{prefix}{name}"
        inner = [part for part in members(annotation) if dataclasses.is_dataclass(part)]
        if len(inner) == 1 and isinstance(inner[0], type):
            yield from _option_paths(inner[0], f"{prefix}{name}.")


def defaults(kind: type) -> dict[str, Any]:
    """Return options of a variant with defaults; `dataclasses.MISSING` if there is no default."""
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if get_origin(_hints(kind)[field.name]) is not Literal
        or field.default is not dataclasses.MISSING
    }


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text, such as `objective[0].temperature`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _tag_value(kind: Any, tag: str) -> str | None:
    hint = _hints(kind).get(tag) if isinstance(kind, type) else None
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else None


def _dataclass_of(annotation: Any, value: Any) -> type | None:
    package = _package_options(annotation)
    if package is not None and package.is_named_by(value):
        try:
            return package.kind(value[package.tag])
        except ConfigError:  # reported when the value is validated
            return None
    kinds = [part for part in members(annotation) if dataclasses.is_dataclass(part)]
    fitting = [kind for kind in kinds if len(kinds) == 1 or _fits(kind, value)]
    return fitting[0] if fitting and isinstance(fitting[0], type) else None


def _fits(kind: Any, value: Any) -> bool:
    tags = {tag: _tag_value(kind, tag) for tag in ("loss", "name")}
    given = value if isinstance(value, dict) else {}
    return any(name is not None and given.get(tag) == name for tag, name in tags.items())


# Keys of megakd, and their names in other libraries, such as Hugging Face, DeepSpeed and Lightning.
_OTHER_NAMES = {
    "eval.eval_steps": "eval_strategy evaluation_strategy",
    "eval.keep_best": "load_best_model_at_end",
    "eval.metric": "metric_for_best_model",
    "eval.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "log.report_to": "tensorboard",
    "output_dir": "logging_dir",
    "save.hub_private": "hub_private_repo",
    "save.push_to_hub": "hub_model_id",
    "save.save_steps": "save_strategy",
    "seed": "random_seed",
    "student.model": "student_model student_model_name_or_path",
    "student.model teacher.model": "model_name model_name_or_path model_path "
    "pretrained_model_name_or_path",
    "task.dataset": "dataset_name dataset_path task_name",
    "task.dataset_config": "dataset_config_name",
    "task.label_column": "label_column_name",
    "task.max_eval_examples": "max_eval_samples",
    "task.max_length": "block_size max_seq_len max_seq_length model_max_length seq_length "
    "sequence_length",
    "task.text_columns": "text_column text_column_name",
    "task.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "teacher.dtype train.bf16 train.fp16": "torch_dtype",
    "teacher.model": "teacher_model teacher_model_name_or_path",
    "train.adam_beta1": "adam_beta_1",
    "train.adam_beta2": "adam_beta_2",
    "train.adam_epsilon": "adam_eps",
    "train.bf16 train.fp16": "mixed_precision",
    "train.gradient_accumulation_steps": "grad_accum grad_accumulation_steps gradient_accumulation",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "learning_rate_scheduler lr_scheduler scheduler scheduler_type",
    "train.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping",
    "train.max_steps": "max_train_steps num_steps num_train_steps training_steps",
    "train.num_train_epochs": "epochs max_epochs n_epochs num_epochs",
    "train.optim": "optimizer",
    "train.per_device_train_batch_size": "batch_size micro_batch_size per_device_batch_size "
    "per_gpu_train_batch_size train_batch_size train_micro_batch_size_per_gpu",
    "train.resume_from_checkpoint": "resume",
    "train.warmup_ratio": "warmup_proportion",
    "train.warmup_steps": "num_warmup_steps",
    "train.warmup_steps train.warmup_ratio": "warmup",
    "train.weight_decay": "wd",
}
SYNONYMS = {
    name: tuple(keys.split()) for keys, names in _OTHER_NAMES.items() for name in names.split()
}
"""Keys of megakd by common names."""


def synonyms(word: str, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the keys that `word` may mean; only keys of its own section if there are any."""
    meant = SYNONYMS.get(word.lower().replace("-", "_"), ())
    here = {key.rpartition(".")[2] for key in meant}.intersection(known)
    return tuple(sorted(here)) or meant
