"""Export of a finished model as a Hugging Face folder that transformers loads without megakd."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megakd.data.encoding import save_tokenizer
from megakd.errors import ModelError
from megakd.models.architectures import (
    AUTO_CLASSES,
    CUT_FILE,
    NARROW,
    OWN_MODELS,
    T5_FILE,
    class_name,
    class_of,
    config_in,
    context_length,
    narrow_maps,
    register_own_models,
)
from megakd.models.end_tokens import generation_of
from megakd.models.modeling import modeling_cut
from megakd.models.weights import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    StoredTensor,
    WeightReader,
    check_weight_files,
    names_in_fp32,
    stored_tensors,
)
from megakd.process.files import write_content, write_json
from megakd.process.seals import sealed_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


CONFIG = "config.json"
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of the files of `write_weights`."""
SHARD_BYTES = 1_000_000_000
"""Size of a file of weights, which is in memory until it is written."""
_ROTARY_KEYS_OF_4 = ("rope_theta", "partial_rotary_factor")
"""Keys of `rope_parameters` that transformers 4 looks for in the config itself."""
_WHOLE = "original_max_position_embeddings"
Extra = Mapping[str, str | bytes | Callable[[], str | bytes]]


class ModelContent(NamedTuple):
    """A model to write.

    state: names and tensors; every rank must iterate to the end.
    extra: small files that belong to the folder, by name: README.md, result.json. A function is
        called after the weights are written.
    """

    config: PretrainedConfig
    state: Iterator[tuple[str, Tensor]]
    tokenizer: PreTrainedTokenizerBase | None = None
    architecture: str | None = None
    extra: Extra = MappingProxyType({})


def write_model_folder(folder: Path, model: ModelContent) -> None:
    """Write a model folder completely or not at all; call on the rank that writes.

    If transformers lacks the class of the model, the file of the class is written beside the
    weights, so that plain transformers loads the folder with `trust_remote_code=True`. The folder
    is replaced as a whole after everything is written and synced. At most one file of weights is
    held at a time. The state is consumed even if writing fails, because it may contain collectives.
    """
    try:
        with sealed_folder(folder) as temporary:
            fill_model_folder(temporary, model)
    finally:
        deque(model.state, maxlen=0)


def fill_model_folder(folder: Path, model: ModelContent) -> None:
    """Write the files of `write_model_folder` into a folder that the caller seals."""
    fill_serving_folder(folder, model)
    file = file_of_code(model.config)
    if file is not None:
        shutil.copyfile(file, folder / file.name)
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder, context=context_length(model.config))
    for name, content in model.extra.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_content(folder / name, content() if callable(content) else content)


def fill_serving_folder(
    folder: Path, model: ModelContent, *, shard_bytes: int | None = None
) -> None:
    """Write the weights and the config into a folder, which an inference server can read.

    Names and bytes of the tensors are those of `fill_model_folder`.
    """
    config = copy.deepcopy(model.config)
    config.dtype = write_weights(folder, model.state, shard_bytes=shard_bytes)
    if model.architecture is not None:
        config.architectures = [model.architecture]
    register_own_models()
    # That of the folder that the config was read from, whose files of code are not copied.
    vars(config).pop("auto_map", None)
    file, is_narrow = file_of_code(config), narrow_maps(config) is not None
    if file is not None:
        classes = {
            auto.__name__: auto._model_mapping.get(type(config), None)  # noqa: SLF001
            for auto in (AutoModel, *AUTO_CLASSES.values())
        }
        config.auto_map = {
            name: f"{file.stem}.{(modeling_cut.narrow_class(cls) if is_narrow else cls).__name__}"
            for name, cls in {**classes, "AutoConfig": type(config)}.items()
            if isinstance(cls, type)
        }
    # save_pretrained refuses the generation keys that older configs on the Hub carry.
    keys = json.loads(config.to_json_string())
    if is_narrow:  # transformers 4 has no class of it
        keys["model_type"] = modeling_cut.narrow_class(type(config)).model_type
    else:
        keys |= rotary_keys_of_4(keys)
    write_json(folder / CONFIG, keys)
    decoder = class_name(config, "causal_lm")
    # Code of a folder may have the type of a stock model, and another class of its config.
    decoder = decoder or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if decoder in (config.architectures or ()):
        settings = generation_of(config, model.tokenizer)
        settings.to_json_file(folder / "generation_config.json")


def write_weights(
    folder: Path, state: Iterable[tuple[str, Tensor]], *, shard_bytes: int | None = None
) -> torch.dtype:
    """Stream tensors into model.safetensors, or into shards of up to 1 GB with an index.

    Tied weights, which are two names of one memory, are written once. A shard is in memory until
    it is written; a single tensor may exceed `shard_bytes`.

    Returns:
        The dtype of most floating-point weights.
    """
    shards: list[dict[str, int]] = []
    waiting: dict[str, Tensor] = {}
    numbers: Counter[torch.dtype] = Counter()

    def write() -> None:
        # The final name contains the number of shards, which is not known yet.
        save_file(waiting, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in waiting.items()})
        waiting.clear()

    for name, tensor in _without_second_names(state):
        size = sum(one.nbytes for one in waiting.values()) + tensor.nbytes
        if waiting and size > (shard_bytes or SHARD_BYTES):
            write()
        waiting[name] = tensor
        numbers[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    write()
    _name_shards(folder, shards)
    return numbers.most_common(1)[0][0]


def weight_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Return the size on disk of a folder's weights, or the size that they have in a dtype."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if dtype is None:
        return size
    numbers = _numbers_in(folder, "*.safetensors")
    return size + sum(
        (dtype.itemsize - one.dtype.itemsize) * math.prod(one.shape) for one in numbers
    )


def dtypes_of(folder: Path) -> set[torch.dtype]:
    """Return the dtypes of the floating-point weights of a folder."""
    return {one.dtype for one in _numbers_in(folder, "model*.safetensors")}


def _numbers_in(folder: Path, pattern: str) -> list[StoredTensor]:
    files = [stored_tensors(file, str(folder)).values() for file in folder.glob(pattern)]
    return [one for stored in files for one in stored if one.dtype.is_floating_point]


def write_weights_as(dtype: torch.dtype, source: Path, folder: Path) -> None:
    """Write the weights of a model folder into another one in a dtype, which its config states.

    What transformers keeps in fp32 in this dtype is not rounded.

    Raises:
        ModelError: a weight is larger than the largest number of the dtype.
    """
    register_own_models()
    reader, config = WeightReader(str(source)), config_in(folder)
    with torch.device("meta"), initialization.no_init_weights():
        is_kept = names_in_fp32(cast("Any", class_of(config, str(source)))(config), dtype)

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, stored in check_weight_files(source, str(source)).items():
            tensor = reader.read(stored if is_kept(name) else stored.rounded(dtype))
            if tensor.dtype == torch.float16 and not tensor.isfinite().all():
                raise ModelError(
                    f"{name} of {source} is too large for fp16; set save.dtype: fp32 and start the "
                    "same command again"
                )
            yield name, tensor

    write_weights(folder, converted())
    keys = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, {**keys, "dtype": str(dtype).removeprefix("torch.")})


def file_of_code(config: PretrainedConfig) -> Path | None:
    """Return the file with the class of a model that transformers lacks; None: it has the class."""
    if narrow_maps(config) is not None:
        return CUT_FILE
    return T5_FILE if config.model_type in OWN_MODELS else None


def brings_code(folder: Path) -> bool:
    """Return true if transformers needs `trust_remote_code` and a file of the folder to load it."""
    keys = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return keys["model_type"] in OWN_MODELS or NARROW in keys


def needs_5(folder: Path) -> bool:
    """Return true if transformers 4 cannot load the folder, or would compute something else."""
    keys = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return brings_code(folder) or ("rope_parameters" in keys and "rope_theta" not in keys)


def hub_id(spec: str) -> str | None:
    """Return `spec` if it names a model on the Hub, or None if it is a local folder."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", spec) is not None
    return spec if is_id and not Path(spec).exists() else None


def rotary_keys_of_4(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys by which transformers 4 reads `rope_parameters`, if it has keys for them."""
    rope: dict[str, Any] = keys.get("rope_parameters") or {}
    old: dict[str, Any] = {}
    local = rope.get("sliding_attention") or {}
    if keys["model_type"] == "gemma3_text" and local.get("rope_type") == "default":
        old["rope_local_base_freq"], rope = local["rope_theta"], rope["full_attention"]
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key not in _ROTARY_KEYS_OF_4}
    if rope["rope_type"] == "longrope":
        old[_WHOLE] = rope[_WHOLE]
        if keys["model_type"] == "phi3":  # refuses further keys
            scaling = {"type": "longrope", **{k: rope[k] for k in ("short_factor", "long_factor")}}
    old |= {key: rope[key] for key in _ROTARY_KEYS_OF_4 if key in rope}
    return {**old, "rope_scaling": None if rope["rope_type"] == "default" else scaling}


def _without_second_names(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors as they are stored, under one name each if they share their memory."""
    seen: dict[tuple[Any, ...], weakref.ref[Any]] = {}
    for name, given in state:
        # Dense, on the CPU, and sharing memory with no other tensor that is stored.
        tensor = given.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        # The pointer identifies memory only while something keeps the memory alive.
        earlier = seen.get(identity)
        if earlier is not None and earlier() is not None and tensor.numel():
            continue
        seen[identity] = weakref.ref(tensor.untyped_storage())
        yield name, tensor


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SAFETENSORS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(size for names in shards for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
