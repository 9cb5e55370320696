"""A config as a file: YAML with dotted overrides, its keys, and the paths that it names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megakd.config.checks import config_problems
from megakd.config.options import METHODS
from megakd.config.paths import looks_like_path
from megakd.config.run import RunConfig
from megakd.config.task import STUDENT, listed_files
from megakd.config.terms import TERMS
from megakd.errors import ConfigError, one_line, suggestion
from megakd.plugins import WrongNameError
from megakd.process.terminal import in_home

# Keys of megakd: their names in transformers, TRL, axolotl and DeepSpeed.
_OTHER_NAMES = {
    "eval.eval_steps": "eval_strategy evaluation_strategy",
    "eval.keep_best": "load_best_model_at_end",
    "eval.metric": "metric_for_best_model",
    "eval.per_device_eval_batch_size": "eval_batch_size",
    "log.report_to": "logger tensorboard use_wandb wandb_project",
    "objective": "alpha beta kd_alpha kd_loss kd_temperature kd_weight loss_functions",
    "rollout.by": "seq_kd",
    "rollout.max_new_tokens": "max_completion_length",
    "rollout.mix": "lambda lmbda",
    "rollout.prompt_tokens": "max_prompt_length",
    "rollout.server": "use_vllm vllm_mode vllm_server_base_url vllm_server_host",
    "save.hub_private": "hub_private_repo",
    "save.push_to_hub": "hub_model_id",
    "save.save_steps": "save_strategy",
    "seed": "data_seed random_seed",
    "student.deepspeed": "zero_stage",
    "student.lora": "adapter peft_config use_peft",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.r": "lora_r lora_rank",
    "student.lora.target_modules": "lora_target_linear lora_target_modules",
    "student.model": "base_model student_model student_model_name_or_path",
    "student.model teacher.model": "model_name model_name_or_path model_path",
    "task.chat_template": "chat_template_path",
    "task.dataset": "data_path dataset_name dataset_path task_name",
    "task.dataset task.mixture": "dataset_mixture datasets",
    "task.dataset_config": "dataset_config_name",
    "task.label_column": "label_column_name",
    "task.max_eval_examples": "max_eval_samples val_set_size",
    "task.max_length": "block_size cutoff_len max_seq_len max_seq_length sequence_len",
    "task.train_files task.validation_files task.test_files": "data_files",
    "task.text_columns": "dataset_text_field text_column text_column_name",
    "task.type": "task_type",
    "task.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "task.train_on": "assistant_only_loss completion_only_loss train_on_inputs",
    "teacher.dtype": "teacher_model_init_kwargs",
    "teacher.dtype train.bf16 train.fp16": "torch_dtype",
    "teacher.model": "teacher_model teacher_model_name_or_path",
    "train.bf16 train.fp16": "mixed_precision",
    "train.collective_timeout": "ddp_timeout",
    "train.early_stopping_patience": "early_stopping patience",
    "train.fused_layers": "torch_compile",
    "train.gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "train.gradient_checkpointing": "activation_checkpointing",
    "train.kernels": "use_liger use_liger_kernel",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping",
    "train.max_steps": "max_train_steps num_steps num_train_steps",
    "train.num_train_epochs": "epochs max_epochs num_epochs",
    "train.optim": "optimizer",
    "train.packing": "pack_sequences sample_packing",
    "train.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size "
    "train_micro_batch_size_per_gpu",
    "train.tokens_per_rank": "padding_free",
    "train.warmup_steps train.warmup_ratio": "num_warmup_steps warmup",
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


# By key: values of megakd, and what other tools call them, in small letters alone.
_OTHER_VALUES = {
    "loss": {
        '"hard_cross_entropy"': "ce crossentropy nll sft",
        '"soft_target_kl"': "forwardkl kd kl kldiv kld",
        '"soft_target_mse" (logits) or "hidden_mse"': "l2 mse",
    },
    "type": {
        '"causal_lm"': "causallm chat clm instruction languagemodeling sft textgeneration",
        '"mlm"': "fillmask maskedlm maskedlanguagemodeling",
        '"classification"': "multilabel nli sentiment seqcls",
        '"regression"': "scoring stsb",
    },
    "name": {
        '"single" with a section rollout, as in launch/examples/gkd.yaml': "gkd onpolicy",
        '"finetune"': "sft",
    },
}


def _meant(key: str, value: object) -> str:
    name = _plain_name(value).replace("_", "").removesuffix("loss")
    values = _OTHER_VALUES.get(key, {}).items()
    return next((f"did you mean {ours}?" for ours, names in values if name in names.split()), "")


# Names that other tools have for keys and tasks, and what to use in megakd, which has none.
_MISSING = {
    r"(sequence|context|ulysses|ring)_?parallel.*|[cs]p(_size|_degree)?|ulysses.*|ring_.*": "no "
    "parallelism within a text; lower task.max_length, or set train.gradient_checkpointing",
    r"(num_)?(tensor|pipeline|model|expert)_?(model_)?parallel.*|(auto)?_?[tpe]p(_size)?": (
        "no tensor, pipeline or expert parallelism; student.deepspeed: zero3 and teacher.deepspeed:"
        " teacher_zero3 split weights over GPUs (give a server such options where it starts)"
    ),
    r"resume.*": "no key to go on, a run does so by itself; to begin anew, set another output_dir",
    r"fsdp.*|fully_shard.*": "no FSDP; student.deepspeed: zero3 shards weights in the same way",
    r"ner|pos|(token|word)_?(cl|label).*|(ner|pos|sequence)_(label|tag).*|named_.*|tagg.*": (
        "no task with labels of words; distil the encoder with task.type: mlm, and train final/ in "
        "transformers for them"
    ),
    r"((sentence|text|semantic)_?)?(embed|embedd?ings?|similarity|transformers?|textual.*)|sts|"
    r"retriev(al|er)|contrastive.*|re_?rank.*|(bi|cross)_?encoder|feature_extraction": "no task of "
    "embeddings; distil the encoder with task.type: mlm, and train final/ in sentence-transformers,"
    " or learn scores of pairs with task.type: regression and two task.text_columns",
    r"(extractive_|question_)?(qa|answering)|seq_?2_?seq.*|summari[sz].*|translat.*|"
    r"text_?2_?text.*|encoder_decoder": "no such task; a decoder learns it with task.type: "
    "causal_lm from rows with a prompt and a completion",
}


def missing(word: object) -> str:
    """Return what to use if megakd has nothing that other tools call `word`, else an empty text."""
    name = _plain_name(word)
    use = next((use for names, use in _MISSING.items() if re.fullmatch(names, name)), "")
    return use and f"megakd has {use}"


def _plain_name(word: object) -> str:
    # TokenClassification, token-classification and TOKEN_CLASSIFICATION are one name.
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", "_", str(word)).lower().strip("_")
    return re.sub("^(auto_)?model_for_", "", name)


KeyPath = tuple[str | int, ...]

_NAMED = {"method": METHODS, "objective": TERMS}

_UNKNOWN_KEY = "unexpected_keyword_argument"

# What pydantic calls otherwise than YAML.
_WORDS = {
    "Input should": "must",
    "Tuple should": "must",
    " after validation": "",
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid boolean": "true or false",
}

_MOST_CHARACTERS = 60


def keys_at(path: KeyPath, tree: Any) -> list[str]:
    """Return the known keys of the mapping at `path` of a config; none if its keys are free."""
    names = [part for part in path if isinstance(part, str)]
    if named := _NAMED.get(".".join(names)):
        for part in path:
            tree = tree[part]
        with contextlib.suppress(ConfigError, WrongNameError):  # reported by the validation
            return [field.name for field in dataclasses.fields(named.kind(tree.get(named.key)))]
    pattern = re.compile("".join(rf"(?:\*|{re.escape(name)})\." for name in names) + r"([^.]+)")
    return [match[1] for key in _keys_of(RunConfig) if (match := pattern.fullmatch(key))]


def paths_ending_in(key: str) -> list[str]:
    """Return dotted paths of the settings named `key`, the shortest path first."""
    paths = [path for path in _keys_of(RunConfig) if path.rpartition(".")[2] == key]
    return sorted(paths, key=lambda path: path.count("."))


def _keys_of(annotation: Any, prefix: str = "") -> Iterator[str]:
    # The dotted keys of a section, also of a section in a union or a list; * is any name.
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        for name, hint in get_type_hints(annotation, include_extras=True).items():
            if get_origin(hint) is not ClassVar:
                yield f"{prefix}{name}"
                yield from _keys_of(hint, f"{prefix}{name}.")
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        for part in get_args(annotation):
            yield from _keys_of(part, prefix)
    elif get_origin(annotation) is dict:
        yield from _keys_of(get_args(annotation)[1], f"{prefix}*.")


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text, such as `objective[0].temperature`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def schema_problems(error: ValidationError, tree: Any) -> list[str]:
    """Return pydantic's errors, one line per problem, without union branches and internal names."""
    places = [(*_place(detail, tree), detail) for detail in error.errors(include_url=False)]
    fitting = [path for path, is_mismatch, _ in places if not is_mismatch]
    unknown = [path for path, _, detail in places if detail["type"] == _UNKNOWN_KEY]
    meant = " ".join(_unknown_key(path, tree) for path in unknown)
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for path, is_mismatch, detail in places:
        # Another branch of the union fits, but for a key in it.
        is_echo = is_mismatch and any(other[: len(path)] == path for other in fitting)
        is_echo |= detail["type"] == "missing" and f'"{path[-1]}"' in meant
        # pydantic counts only valid items: a list with one invalid item may be long enough.
        least = detail.get("ctx", {}).get("min_length", 0)
        is_echo |= detail["type"] == "too_short" and len(detail["input"]) >= least
        if not is_echo:
            groups.setdefault(path, []).append(detail)
    return [_line(path, details, tree) for path, details in groups.items()]


def _place(detail: ErrorDetails, tree: Any) -> tuple[KeyPath, bool]:
    # The path of the key, and whether the error says only that a branch of a union does not fit.
    # pydantic's location also has the names of the branches.
    path: list[str | int] = []
    inside = True
    for part in detail["loc"]:
        is_item = isinstance(tree, list) and isinstance(part, int)
        inside = is_item or (isinstance(tree, dict) and part in tree)
        if inside:
            path.append(part)
            tree = tree[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    is_of_type = detail["type"].endswith("_type") or detail["type"] == "literal_error"
    return tuple(path), is_of_type and not inside


def _line(path: KeyPath, details: Sequence[ErrorDetails], tree: Any) -> str:
    detail, where = details[0], dotted(path)
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return f"{where}: missing, and it has no default"
    if kind == _UNKNOWN_KEY:
        return f"{where} = {shown(value)}: {_unknown_key(path, tree)}"
    if kind == "value_error":
        error = detail.get("ctx", {})["error"]
        if isinstance(error, WrongNameError):
            where = dotted((*path, error.key))
            if meant := _meant(error.key, value.get(error.key)):
                error = f"{error.problem}; {meant} known: {', '.join(error.known)}"
        return f"{where}: {error}"
    first, *others = [detail["msg"] for detail in details]
    text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    hint = (_meant("type", value) or missing(value)) if where == "task.type" else ""
    if isinstance(value, str) and not hint:
        near = suggestion(value, re.findall(r"'([^']*)'", text)).removeprefix("; ")
        hint = near or ("must be a list" in text) * f"write [{value}]"
    return f"{where or 'the config'}: {text} (got {shown(value)}){hint and f'; {hint}'}"


def _unknown_key(path: KeyPath, tree: Any) -> str:
    *parent, key = path
    known = keys_at(tuple(parent), tree)
    # The keys of a loss term are its own: other sections have keys of the same names.
    is_item = any(isinstance(part, int) for part in parent)
    others = () if is_item else synonyms(str(key), known) or paths_ending_in(str(key))[:1]
    meant = others or difflib.get_close_matches(str(key), known, n=1)
    if not others and (hint := missing(key)):
        return f"unknown key; {hint}"
    names = METHODS.names() if parent == ["method"] else ()
    if having := [name for name in names if key in METHODS.kind(name).__dataclass_fields__]:
        name = tree["method"]["name"]
        return f"an option of {', '.join(having)}, and not of method {name}; remove the key"
    if not meant:
        return f"unknown key; known: {', '.join(known)}"
    listed = " or ".join(f'"{path}"' for path in meant)
    return f"unknown key; did you mean {listed}?"


def shown(value: Any) -> str:
    """Return a value as written by a user, cut to one short line."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """Return the text, or the beginning of a text that is too long for a message."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Yield the keys of a run's folders, models and data, with what they name."""
    task = config.task
    named: dict[str, object] = {"output_dir": config.output_dir}
    named |= {
        f"task.{key}": getattr(task, key) for key in ("dataset", "tokenizer", "chat_template")
    }
    for name, spec in {**config.teacher_specs, STUDENT: config.student}.items():
        named[f"{config.key_of(name)}.model"] = spec.model
        named[f"{config.key_of(name)}.cache"] = getattr(spec, "cache", None)
    yield from ((key, value) for key, value in named.items() if isinstance(value, str | Path))
    files = {key: getattr(task, key) for key in ("train_files", "validation_files", "test_files")}
    files |= {f"evaluation_sets.{name}": paths for name, paths in task.evaluation_sets.items()}
    files |= {f"mixture.{name}.files": part.files for name, part in (task.mixture or {}).items()}
    for key, paths in files.items():
        yield from ((f"task.{key}", path) for path in listed_files(paths))


def check_paths(config: RunConfig) -> None:
    """Check, before torch is loaded, that the models and files of a run are on this machine.

    Names that may be the Hub's, and patterns of files, are checked where they are read.
    """
    specs = {f"{config.key_of(name)}.model": spec for name, spec in config.teacher_specs.items()}
    unread = {"output_dir", "task.chat_template"}
    unread |= {key for key, spec in specs.items() if isinstance(spec.cache, Path) or spec.server}
    missing = [
        f"{key}: {path} does not exist"
        for key, value in places(config)
        if key not in unread and not key.endswith(".cache") and not glob.has_magic(str(value))
        if "files" in key or "evaluation_sets" in key or looks_like_path(str(value))
        if not (path := in_home(value)).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))


_RUN_CONFIG = TypeAdapter(RunConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load and check the run config of a YAML file.

    Args:
        path: a YAML 1.2 file in UTF-8, or the folder of a run, which stands for its config.yaml
            with this folder as `output_dir`. Other relative paths are kept as written.
        overrides: `a.b=value` or `a.0.b=value` with a YAML value; later overrides win.

    Raises:
        ConfigError: one line per problem, each with the file or the override that causes it.
    """
    of_run = path / "config.yaml"
    path = of_run if of_run.is_file() else path
    tree = parse_yaml(_read(path), source=str(path))
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"holds {shown(tree)}"
        raise ConfigError(f"{path}: {what}; a run config is a mapping with the key output_dir, …")
    is_run = path == of_run and (of_run.parent / "metrics.jsonl").is_file()
    if is_run:  # it may have been moved or copied
        tree["output_dir"] = str(of_run.parent)
    return config_of(tree, overrides, source=str(path))


def config_of(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> RunConfig:
    """Return the checked run config of plain values, such as parsed YAML or JSON."""
    given: dict[str, Any] = _plain(tree, source)
    config, problems = _checked(with_overrides(given, overrides, source=source))
    if config is None or problems:
        raise _error(problems, given, overrides, source)
    return config


def with_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], *, source: str = "config"
) -> dict[str, Any]:
    """Return plain values with overrides applied, not yet checked."""
    changed: dict[str, Any] = _plain(tree, source)
    for override in overrides:
        _apply(override, changed)
    return changed


def config_tree(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, with the defaults of all keys."""
    return _RUN_CONFIG.dump_python(config, mode="json")


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML text, from which `load_config` reads an equal config."""
    return dump_yaml(config_tree(config))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path} cannot be read ({getattr(error, 'strerror', error)}); give a YAML "
            "file in UTF-8, or the folder of a run"
        ) from error


def _checked(tree: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    try:
        config = _RUN_CONFIG.validate_json(json.dumps(tree))
    except ValidationError as error:
        return None, schema_problems(error, tree)
    unknown = re.compile(r'(deepspeed: unknown key "(.*?)")(.*)')
    return config, [
        unknown.sub(lambda m: f"{m[1]}; {missing(m[2])}" if missing(m[2]) else m[0], problem)
        for problem in config_problems(config)
    ]


def _error(
    problems: Sequence[str], tree: dict[str, Any], overrides: Sequence[str], source: str
) -> ConfigError:
    # The problems that the tree has without the overrides are those of its source.
    without = set(_checked(tree)[1] if overrides else problems)
    lines = [f"{source if p in without else _culprit(p, overrides)}: {p}" for p in problems]
    counted = [f"{len(lines)} problems"] if len(lines) > 1 else []
    return ConfigError("\n  ".join([*counted, *lines]))


def _culprit(problem: str, overrides: Sequence[str]) -> str:
    # A problem begins with its key, whose indices an override writes as keys: objective.0.weight.
    where = re.sub(r"\[(\d+)\]", r".\1", re.split(r": | = ", problem, maxsplit=1)[0])
    within: list[str] = []
    for override in reversed(overrides):
        name = ".".join(_keys(override))
        if f"{where}.".startswith(f"{name}."):
            within = [override]
            break
        if name.startswith(f"{where}."):
            within.insert(0, override)
    return f'override "{cut(" ".join(within or overrides))}"'


def _plain(tree: Any, source: str) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Path):
            return str(value)
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}")

    try:
        return json.loads(json.dumps(tree, default=plain, allow_nan=False))
    except ValueError as error:
        what = "text, finite numbers, true and false, null, lists and mappings"
        raise ConfigError(f"{source}: {error}; a config holds {what}") from error


def _apply(override: str, tree: dict[str, Any]) -> None:
    # Sections that are missing or null are created.
    keys, (_, equals, text) = _keys(override), override.partition("=")
    if not equals or not all(keys):
        raise ConfigError(
            f'override "{override}" is not of the form key=value, such as train.learning_rate=3e-4'
        )
    value = parse_yaml(text, source=f'override "{override}"')
    node: Any = tree
    for depth, key in enumerate(keys):
        where = f'override "{override}": {".".join(keys[:depth])}'
        is_last = depth == len(keys) - 1
        slot: Any = key
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(
                    f"{where} is a list of {len(node)} items, numbered from 0, without an item "
                    f'"{key}"'
                )
            slot = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"{where} is {shown(node)} and has no keys")
        elif not is_last and node.get(key) is None:
            node[key] = {}
        if is_last:
            node[slot] = value
        else:
            node = node[slot]


def _keys(override: str) -> list[str]:
    # The form `objective[0].weight` is also accepted.
    return re.sub(r"\[(\d+)\]", r".\1", override.partition("=")[0].strip()).split(".")


_TAG = "tag:yaml.org,2002:"

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")

# `safe_load` reads YAML 1.1, in which `2e-5` is text, `on` is true, and the layer pair `7:1` 421.
_SCALARS = {
    "null": re.compile(r"(null|Null|NULL|~|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?[0-9]+\Z"),
    "float": _FLOAT,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {None: [(_TAG + k, v) for k, v in _SCALARS.items()]}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    # Keys stay as written: `1:` and `on:` are text.
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if (key := loader.construct_scalar(key_node)) in values:
            problem = f'the key "{key}" is given twice'
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor(f"{_TAG}map", _mapping)

_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value))

# The emitter in C is a few times as fast, where PyYAML was built with it.
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # a value that occurs twice is written twice


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML treats these characters like a newline, unless they are escaped.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _text)

_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))  # quotes such texts


def parse_yaml(text: str, *, source: str) -> Any:
    """Return the value of the single document in `text`; raise ConfigError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # _Loader builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {line}{problem}") from error
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{source}: cannot be read: {one_line(error)}") from error


def dump_yaml(tree: Any) -> str:
    """Return YAML text of plain values that YAML 1.2 and 1.1 readers read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
