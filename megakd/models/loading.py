"""Loading of models: those of a run, sharded or not, and finished ones, from their folders.

For a run, `resolve_model` finds a model and reads its config, `check_model` checks that the model
fits the run before anything large is loaded, and `load_model` builds it empty and fills it tensor
by tensor; new weights are the same at every ZeRO stage and for any number of ranks.
`load_finished` opens a folder without a run.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING

from megakd.config.paths import expand_path
from megakd.config.sections import ScratchModel
from megakd.config.task import LANGUAGE_TASKS, TaskConfig
from megakd.data.hub import silent_hub
from megakd.engine.collectives import gather, node_name, raise_on_all
from megakd.engine.sharding import (
    is_first_rank,
    is_sharded,
    names_of_bad_weights,
    set_values,
    sharded_construction,
)
from megakd.errors import ModelError, one_line, suggestion
from megakd.models.architectures import (
    CONFIG_ERRORS,
    HEAD_COUNTS,
    NARROW,
    class_name,
    class_of,
    config_in,
    counts_padding,
    narrow_maps,
    register_own_models,
    stated,
)
from megakd.models.fitting import (
    Match,
    ModelSource,
    build_empty,
    listed,
    method_of,
    model_label_names,
    plan_loading,
)
from megakd.models.modeling.modeling_t5 import EncT5Config, T5EncoderConfig
from megakd.models.quantized import (
    Fp8Linear,
    check_quantized,
    gguf_config,
    gguf_file,
    open_quantized,
    pack_linears,
    packed_linears,
)
from megakd.models.structure import for_task
from megakd.models.weights import (
    StoredTensor,
    WeightReader,
    check_weight_files,
    initialize_parameters,
    keep_in_fp32,
)
from megakd.process.seals import check_given
from megakd.process.terminal import is_first_of_node

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)
CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md")
# Subfolders, other frameworks, and the weights a second time in the format of another library.
NOT_FROM_HUB = ("*/*", "*.msgpack", "consolidated*.safetensors")
# Keys of older config files that transformers still reads although its classes do not list them.
LEGACY_KEYS = frozenset(
    {
        *("num_labels", "torch_dtype", "rope_theta", "rope_scaling", "pretraining_tp"),
        *("cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation_autoset"),
        *("_commit_hash", "_flash_attn_2_enabled", "_num_labels"),
    }
)
_READ_KEY = re.compile(r'\bconfig(?:\.|,\s*")(\w+)')
# Of all families, by the names that transformers maps to those of a family.
SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "d_kv", "d_ff", "intermediate_size", "n_inner", "vocab_size"),
    *("embedding_size", "max_position_embeddings", "moe_intermediate_size"),
)
LARGEST_SIZE = 2**24
"""Larger than any size in a model, and small enough for products of two sizes."""
READ_T5_AS = {cls.model_type: cls for cls in (EncT5Config, T5EncoderConfig)}
"""Config classes that a published T5 can be read as; the first is the default."""
T5_KEYS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj"),
    *("pad_token_id", "eos_token_id"),
)
# The vocabulary matrix and its copy in old files; the decoder here embeds only a prompt.
T5_EMBEDDINGS = {
    "shared.weight": "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight": None,
}


def resolve_model(
    spec: str | ScratchModel,
    task: TaskConfig,
    *,
    where: str,
    architecture: str | None = None,
    trust_remote_code: bool = False,
    with_weights: bool = True,
) -> ModelSource:
    """Find a model and read its config; the weight files are checked first.

    Args:
        spec: A folder, a GGUF file, a Hub id, or a config to start from random weights.
        architecture: The model type to read a T5 checkpoint as, see `modeling_t5`; None: `enct5`.
        with_weights: False for a plan, which reads the config alone.
    """
    register_own_models()
    if isinstance(spec, ScratchModel):
        return _scratch_source(spec.config, task, where, architecture)
    patterns = HUB_FILES if with_weights else (CONFIG,)
    folder = _folder_of(spec, where, [*patterns, *(["*.py"] if trust_remote_code else [])])
    file = gguf_file(folder, where) if _has_gguf(folder) else None
    if file is not None:
        config = _checked_config(partial(gguf_config, file, task, where), f"{where}: {file}")
        _built_as(config.model_type, architecture, where)
        return _source(config, task, where, name=spec, folder=file)
    stored = {}
    if with_weights:
        stored = check_weight_files(folder, where)
        if is_first_of_node():  # nodes may have disks of their own
            check_given(folder, where)
    hint = "" if with_weights else "; a plan reads this file alone"
    keys = _read_config(folder, where, trust_remote_code=trust_remote_code, hint=hint)
    model_type = _built_as(keys["model_type"], architecture, where)

    def make() -> PretrainedConfig:
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = config_in(folder, **options)
        is_stray = "head_dim" in vars(config) and not hasattr(type(config), "head_dim")
        if is_stray and "head_dim" not in _read_keys(type(config)):
            vars(config).pop("head_dim")  # heads do not have this width
        return _text_part(config, keys) if task.type == "causal_lm" else config

    config = _checked_config(make, f"{where}: {folder / CONFIG}")
    if model_type != keys["model_type"]:
        config, stored = _read_original_t5(config, stored, model_type, where)
    facts = {"stored": stored, "trust_remote_code": trust_remote_code}
    return _source(config, task, where, name=spec, folder=folder, **facts)


def with_vocabulary(
    source: ModelSource, size: int, *, pad_token_id: int | None = None
) -> ModelSource:
    """Set the vocabulary size of a model from scratch if its config does not set one.

    The embedding of the token `pad_token_id` stays zero; None keeps the token of the config.
    """
    if not source.wants_vocabulary:
        return source
    config = copy.deepcopy(source.config)
    config.vocab_size = size
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    for key in ("bos_token_id", "eos_token_id"):
        token = getattr(config, key, None)
        if isinstance(token, int) and token >= size:  # GPT-2's default, in another vocabulary
            setattr(config, key, None)
    return replace(source, config=config, wants_vocabulary=False)


def check_model(
    source: ModelSource,
    *,
    task: TaskConfig,
    label_names: Sequence[str],
    tokenizer_size: int,
    need_head: bool,
) -> None:
    """Check that a model fits the run, based on headers and configs alone.

    With `need_head`, the head must come with the weights (a teacher that is not trained).
    """
    if source.quantization is not None:
        check_quantized(source, None, is_frozen=need_head)
    source = with_vocabulary(source, tokenizer_size)
    plan_loading(source, task, label_names, tokenizer_size=tokenizer_size, need_head=need_head)


def load_model(  # noqa: PLR0913  (each is another fact about the run)
    source: ModelSource,
    *,
    task: TaskConfig,
    label_names: Sequence[str],
    tokenizer_size: int,
    ds: Mapping[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
    need_head: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Build a model and fill it, in the same way at every ZeRO stage; a collective at stage 3.

    The model is built empty, and sharded module by module if `ds` sets ZeRO 3. Then it is filled
    tensor by tensor: each rank reads what it keeps. Weights that the checkpoint lacks are drawn
    from (seed, module name) and do not depend on the stage or the number of ranks.

    Args:
        ds: A loaded `ds_configs` file; None for a model without an engine.
        need_head: Whether the model is frozen and its head must come with the weights; otherwise a
            head that is missing or was made for other labels is replaced by a new one.
        device: Device of a model that is not sharded; None: the CPU.

    Returns:
        The model in training mode. The outputs are in the order of the data's labels, or in that
        of the checkpoint's if the model is quantized (see `label_order`).
    """
    if source.quantization is not None:
        check_quantized(source, ds, is_frozen=need_head)
        return open_quantized(source, task, dtype, device or torch.device("cpu"))
    source = with_vocabulary(source, tokenizer_size)
    config, match = plan_loading(
        source, task, label_names, tokenizer_size=tokenizer_size, need_head=need_head
    )
    with sharded_construction(ds, dtype, device):
        model = build_empty(source, task, config, dtype)
        keep_in_fp32(model, dtype, is_frozen=need_head)
        if source.fp8 and need_head:
            pack_linears(model, source, match.missing)
    _fill(model, match, source.where, packed_linears(model) if source.fp8 else {})
    parameters = dict(model.named_parameters())
    initialize_parameters(model, [parameters[name] for name in match.missing], seed=seed)
    whole = [name for name, parameter in parameters.items() if not hasattr(parameter, "ds_id")]
    if is_sharded(model) and whole:
        raise RuntimeError(f"{len(whole)} parameters are not sharded, among them {whole[0]}")
    _log_match(source, match, task)
    if match.left_out and is_first_rank():
        logger.warning(
            "warning: %s: the head of %s is for the labels %s, and the data have %s: a new head is "
            "drawn, and the old one is not used",
            *(source.where, source.folder, listed(model_label_names(source.config))),
            listed(label_names) or "one score",
        )
    return model


def load_finished(
    folder: Path,
    where: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the model of a folder as its config.json names it, of megakd or of transformers.

    Args:
        where: the key or option that asks for the model, for messages.
        device: default: the CPU.
        dtype: default: the stored dtype.

    Raises:
        ModelError: the folder is damaged or incomplete, its config cannot be read, its class does
            not exist, or it is quantised.
    """
    if _has_gguf(folder) and gguf_file(folder, where) is not None:
        raise ModelError(f"{where}: {folder} is a GGUF file; give the model in fp32, bf16 or fp16")
    check_given(folder, where)
    register_own_models()
    file, final = folder / CONFIG, folder / "final"
    if not file.is_file():
        remedy = f"; give {final}" if (final / file.name).is_file() else ""
        raise ModelError(f"{where}: {file} does not exist{remedy}")
    try:
        config = _with_named_outputs(config_in(folder))
    except CONFIG_ERRORS as error:
        raise ModelError(f"{where}: {file} cannot be read: {one_line(error)}") from error
    model_class: Any = class_of(config, f"{where}: {file}")
    method = method_of(config)
    if method is not None:
        raise ModelError(
            f"{where}: {folder} is quantized ({method}); give the model in fp32, bf16 or fp16"
        )
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{where}: {folder} cannot be loaded: {one_line(error)}") from error
    lacking = listed(sorted(report["missing_keys"]), 3)
    if lacking:
        raise ModelError(f"{where}: {folder} lacks {lacking}; give a folder with all weights")
    return model.to(device or torch.device("cpu"))


def _scratch_source(
    keys: Mapping[str, Any], task: TaskConfig, where: str, architecture: str | None
) -> ModelSource:
    model_type = keys.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{where}.config has no model_type; set one, such as model_type: bert")
    model_type = _built_as(model_type, architecture, where)
    rest = {key: value for key, value in keys.items() if key != "model_type"}
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{where}.config.model_type: transformers {transformers.__version__} has no "
            f"{model_type}{suggestion(model_type, sorted(CONFIG_MAPPING.keys()))}"
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        default, code = config_class(), inspect.getsource(config_class)
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"{where}.config: a {model_type} config has no defaults ({one_line(error)}); give the "
            "folder of a model"
        ) from error
    known = {*default.to_dict(), *default.attribute_map, *LEGACY_KEYS, *_read_keys(config_class)}
    # transformers would silently use a default for a misspelled key, and its code pops some keys.
    for key in rest:
        is_private = key.startswith("_") and hasattr(default, key)
        if not (key in known or is_private or f'"{key}"' in code):
            near = suggestion(key, sorted(known))
            raise ModelError(f"{where}.config.{key}: unknown key of a {model_type} config{near}")
    config = _checked_config(partial(config_class, **rest), f"{where}.config")
    if getattr(config, "sinusoidal_pos_embds", False):
        raise ModelError(
            f"{where}.config: sinusoidal_pos_embds: true is not supported for a model from "
            "scratch; remove the key to use learned positions"
        )
    facts = {"name": f"new {model_type}", "wants_vocabulary": "vocab_size" not in keys}
    return _source(config, task, where, folder=None, **facts)


def _read_keys(config_class: type) -> Iterator[str]:
    for file in Path(inspect.getfile(config_class)).parent.glob("modeling_*.py"):
        yield from _READ_KEY.findall(file.read_text(encoding="utf-8"))


def _built_as(model_type: str, wanted: str | None, where: str) -> str:
    if model_type in ("t5", "mt5"):
        return wanted or next(iter(READ_T5_AS))
    if wanted not in (None, model_type):
        raise ModelError(
            f"{where.partition('.')[0]}.architecture: {wanted} applies only to a T5 checkpoint, "
            f"and {where} is a {model_type!r} model; remove the key"
        )
    return model_type


def _read_original_t5(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor], model_type: str, where: str
) -> tuple[PretrainedConfig, dict[str, StoredTensor]]:
    """Return the config and tensors of a published T5 under the names of the model it is read as.

    It has no prompt and no head, which start new. Of its decoder, only the first layer is used.
    """
    # Names in a T5ForSequenceClassification or a T5ForTokenClassification.
    if any(key.startswith(("transformer.", "classification_head.")) for key in stored):
        raise ModelError(
            f"{where} is a T5 with transformers' own classification head, "
            f"{', '.join(config.architectures or ())}, which megakd cannot read; use the T5 that "
            "it was fine-tuned from, with finetune, or another family"
        )
    has_decoder = any(key.startswith("decoder.block.0.") for key in stored)
    if stored and model_type == EncT5Config.model_type and not has_decoder:
        raise ModelError(
            f"{where} holds only the encoder of T5, and {model_type} needs the first decoder "
            f"layer; set {where.partition('.')[0]}.architecture: {T5EncoderConfig.model_type}"
        )
    keys = {key: getattr(config, key) for key in T5_KEYS}
    names = {key: T5_EMBEDDINGS.get(key, key) for key in stored}
    renamed = {name: stored[key] for key, name in names.items() if name is not None}
    return READ_T5_AS[model_type](**keys), renamed


def _text_part(config: PretrainedConfig, keys: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config of the decoder in a model that also reads images or sound, if it has one.

    The keys are those of the config file.
    """
    text = config.get_text_config(decoder=True)
    if text is config or class_name(text, "causal_lm") is None:
        return config
    part = next((v for k, v in keys.items() if k.startswith("text_") and isinstance(v, dict)), {})
    if "tie_word_embeddings" in keys and "tie_word_embeddings" not in part:
        text.tie_word_embeddings = keys["tie_word_embeddings"]
    return text


def _with_named_outputs(config: PretrainedConfig) -> PretrainedConfig:
    # Outputs are read by name, and a loss asks for what else it reads.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config


def _checked_config(make: Callable[[], PretrainedConfig], where: str) -> PretrainedConfig:
    try:
        config = _with_named_outputs(make())
    except (AttributeError, KeyError) as error:
        raise ModelError(
            f"{where}: a value has the wrong form ({type(error).__name__}: {one_line(error)}); "
            "compare the config with that of another model of its type (id2label is a mapping from "
            "numbers to names)"
        ) from error
    except CONFIG_ERRORS as error:
        raise ModelError(f"{where}: {one_line(error)}") from error
    token = getattr(config, "pad_token_id", None)
    if counts_padding(config) and not isinstance(token, int):
        raise ModelError(
            f"{where}: pad_token_id must be a whole number (got {token!r}), because a "
            f"{config.model_type} model counts positions from it; set pad_token_id to the number "
            "of the padding token of the tokenizer"
        )
    # A layer of a cut model may have no heads or neurons left.
    if hasattr(config, HEAD_COUNTS) or narrow_maps(config) is not None:
        return config
    for key in SIZES:
        size = vars(config).get(config.attribute_map.get(key, key))
        is_listed = isinstance(size, list | tuple)  # by layer
        is_size = isinstance(size, int) and 1 <= size <= LARGEST_SIZE
        if not (size is None or is_listed or is_size):
            raise ModelError(
                f"{where}: {key} must be a whole number from 1 to {LARGEST_SIZE:,} (got {size!r})"
            )
    keys = [config.attribute_map.get(k, k) for k in ("hidden_size", "num_attention_heads")]
    width, heads = map(vars(config).get, keys)
    if not stated(config, "head_dim") and heads and width and width % heads:
        raise ModelError(f"{where}: {keys[0]} {width} is not divisible by {keys[1]} {heads}")
    return config


def _source(
    config: PretrainedConfig, task: TaskConfig, where: str, *, folder: Path | None, **facts: Any
) -> ModelSource:
    try:
        family = for_task(config, task.type)
    except ModelError as error:
        raise ModelError(f"{where}{'' if folder else '.config'}: {error}") from None
    return ModelSource(config=config, architecture=family, where=where, folder=folder, **facts)


def _folder_of(spec: str, where: str, patterns: Sequence[str]) -> Path:
    path = expand_path(spec)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ModelError(f"{where}: {path} is a file; give the folder that holds the model")
    if path.is_absolute() or spec.startswith((".", "~")) or len(path.parts) > 2:
        raise ModelError(f"{where}: {path} does not exist")
    silent = silent_hub()
    try:
        return Path(
            snapshot_download(spec, allow_patterns=[*patterns], ignore_patterns=[*NOT_FROM_HUB])
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where}: {spec} is not a local folder and cannot be downloaded from the Hub "
            f"({silent or one_line(error)}); check the name and the network, or give a folder"
        ) from error


def _read_config(folder: Path, where: str, *, trust_remote_code: bool, hint: str) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
        model_type = keys["model_type"]
    except FileNotFoundError:
        if (folder / ADAPTERS).is_file():
            raise ModelError(
                f"{where}: {folder} has adapters alone ({ADAPTERS}); merge them into their model "
                "(merge_and_unload of peft) and give that folder"
            ) from None
        raise ModelError(f"{where}: {file} does not exist{hint}") from None
    except OSError as error:
        raise ModelError(f"{where}: {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{where}: {file} is not a model config: {error!r}") from error
    if not isinstance(model_type, str):
        raise ModelError(
            f"{where}: {file}: model_type must be a text, such as bert (got {model_type!r})"
        )
    runs_code = "auto_map" in keys and model_type not in CONFIG_MAPPING and NARROW not in keys
    if runs_code and not trust_remote_code:
        raise ModelError(
            f"{where}: {folder} is a {model_type!r} model, which runs its own code; set "
            f"{where.partition('.')[0]}.trust_remote_code: true if you trust that code"
        )
    return keys


def _fill(
    model: PreTrainedModel, match: Match, where: str, packed: Mapping[str, Fp8Linear]
) -> None:
    """Copy the stored tensors into the model in disk order; each rank reads its own part.

    Raise if a node has other weights in its files than the node of rank 0.
    """
    tensors, reader = model.state_dict(keep_vars=True), WeightReader(where)
    if is_sharded(model):
        stored = [tensor for _, tensor in match.in_disk_order()]
        samples = gather((raise_on_all(lambda: reader.sample(stored)), node_name()))
        other = next((rank for rank, one in enumerate(samples) if one[0] != samples[0][0]), None)
        if other is not None:
            raise ModelError(
                f"{where}: {stored[0].file.parent} holds other weights for rank {other} on "
                f"{samples[other][1]} than for rank 0 on {samples[0][1]}; give all nodes the same "
                "files"
            )
    for name, tensor in match.in_disk_order():
        fill = packed[name].fill if name in packed else partial(set_values, tensors[name])
        fill(partial(reader.part, tensor))


def _has_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or any(path.glob("*.gguf"))


def _log_match(source: ModelSource, match: Match, task: TaskConfig) -> None:
    if source.folder is None or not is_first_rank():
        return
    # A classifier is trained for its new head, and a language model should come with its own.
    level = logging.WARNING if task.type in LANGUAGE_TASKS else logging.INFO
    for severity, text, names in (
        (level, "%s: %d weights are newly initialized, such as %s", match.missing),
        (logging.INFO, "%s: %d stored weights are not used, such as %s", match.unused),
    ):
        if names:
            logger.log(severity, text, source.where, len(names), listed(names, 8))


def check_finite(model: PreTrainedModel, source: ModelSource) -> None:
    """Raise if a model's weights would make every loss NaN, before the learning rate is blamed."""
    bad = names_of_bad_weights(model)
    if bad:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"{source.where}: {len(bad)} weight tensors of {source.name} are not finite (NaN or "
            f"infinite) in {dtype}, the first is {bad[0]}; fetch or export the model again, or set "
            "the dtype to bf16 or fp32 if fp16 is too narrow for the weights"
        )
