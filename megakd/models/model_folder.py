"""Export of a finished model as a Hugging Face folder that transformers loads without megakd."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megakd.models.own_models import OWN_MODELS
from megakd.storage.atomic import write_content
from megakd.storage.folders import sealed_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
Extra = Mapping[str, str | bytes | Callable[[], str | bytes]]


def write_model_folder(
    folder: Path,
    *,
    config: PretrainedConfig,
    state: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    architecture: str | None = None,
    extra: Extra | None = None,
) -> None:
    """Write a model folder completely or not at all; call on the rank that writes.

    If transformers lacks the class of the model, the file of the class is written beside the
    weights, so that plain transformers loads the folder with `trust_remote_code=True`.

    Args:
        folder: replaced as a whole after everything is written and synced.
        state: names and tensors; each tensor is needed only until its shard of 5 GB is written. The
            iterator is consumed even if writing fails, because it may contain collectives.
        extra: small files that belong to the folder, by name: README.md, result.json. A function
            is called after the weights are written.
    """
    tensors = iter(state)
    try:
        with sealed_folder(folder) as temporary:
            fill_model_folder(
                temporary,
                config=config,
                state=tensors,
                tokenizer=tokenizer,
                architecture=architecture,
                extra=extra,
            )
    finally:
        deque(tensors, maxlen=0)


def fill_model_folder(
    folder: Path,
    *,
    config: PretrainedConfig,
    state: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    architecture: str | None,
    extra: Extra | None,
) -> None:
    """Write the files of `write_model_folder` into a folder that the caller seals."""
    dtype = write_weights(folder, state)
    _write_config(folder, _exported(config, dtype, architecture), tokenizer)
    if config.model_type in OWN_MODELS:
        file = OWN_MODELS[config.model_type].file
        shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for name, content in (extra or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_content(folder / name, content() if callable(content) else content)


def fill_serving_folder(
    folder: Path,
    *,
    config: PretrainedConfig,
    state: Iterable[tuple[str, Tensor]],
    architecture: str,
    shard_bytes: int,
) -> None:
    """Write the weights and the config for an inference server into a folder.

    Names and bytes of the tensors are those of `fill_model_folder`.
    """
    dtype = write_weights(folder, state, shard_bytes=shard_bytes)
    _write_config(folder, _exported(config, dtype, architecture), None)


def write_weights(
    folder: Path, state: Iterable[tuple[str, Tensor]], *, shard_bytes: int | None = None
) -> torch.dtype:
    """Stream tensors into model.safetensors, or into shards of up to 5 GB with an index.

    Tied weights, which are two names of one memory, are written once if they are in one shard. Each
    tensor is needed only until its shard is written, and a single tensor may exceed `shard_bytes`.

    Returns:
        The dtype of most floating-point weights.
    """
    shards: list[dict[str, int]] = []
    dtypes: Counter[torch.dtype] = Counter()
    for number, shard in enumerate(_shards(state, shard_bytes or SHARD_BYTES)):
        # The final name contains the number of shards, which is not known yet.
        save_file(shard, folder / f"{number}.part", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        for tensor in shard.values():
            dtypes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
        shard.clear()  # frees the tensors before the next shard is filled
    if not shards:
        raise ValueError(f"the model to be written to {folder} has no tensors")
    _name_shards(folder, shards)
    return dtypes.most_common(1)[0][0]


def weight_bytes(folder: Path) -> int:
    """Return the size on disk of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def brings_code(folder: Path) -> bool:
    """Return true if transformers needs `trust_remote_code` and a file of the folder to load it."""
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return keys["model_type"] in OWN_MODELS


def hub_id(spec: str) -> str | None:
    """Return `spec` if it names a model on the Hub, or None if it is a local folder."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", spec) is not None
    return spec if is_id and not Path(spec).exists() else None


def _exported(
    config: PretrainedConfig, dtype: torch.dtype, architecture: str | None
) -> PretrainedConfig:
    exported = copy.deepcopy(config)
    exported.dtype = dtype
    if architecture is not None:
        exported.architectures = [architecture]
    if config.model_type in OWN_MODELS:
        exported.auto_map = OWN_MODELS[config.model_type].auto_map
    return exported


def _write_config(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    # save_pretrained refuses the generation keys that older configs on the Hub carry.
    config.to_json_file(str(folder / "config.json"))
    own = OWN_MODELS[config.model_type].models if config.model_type in OWN_MODELS else {}
    ours = own.get("AutoModelForCausalLM")
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if (ours.__name__ if ours else stock) in (config.architectures or ()):
        _generation(config, tokenizer).to_json_file(folder / "generation_config.json")


def _generation(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """Return the model's generation settings, with the tokenizer's ids if the ids differ.

    A Llama config defaults to bos 1 and eos 2. With other ids in the tokenizer, a text would never
    end.
    """
    generation = GenerationConfig.from_model_config(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known: Any = getattr(generation, key)
        wanted = getattr(tokenizer, key, None)
        if wanted is not None and wanted not in (known if isinstance(known, list) else [known]):
            setattr(generation, key, wanted)
    return generation


def _shards(state: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield groups of tensors that fit into a shard; omit second names of the same memory."""
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[tuple[Any, ...]] = set()
    for name, given in state:
        tensor = _plain(given)
        # The pointer identifies memory only while `shard` keeps the tensor alive.
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        if identity in seen and tensor.numel():
            continue
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size, seen = {}, 0, set()
        shard[name] = tensor
        size += tensor.nbytes
        seen.add(identity)
    if shard:
        yield shard


def _plain(tensor: Tensor) -> Tensor:
    """Return a dense CPU tensor that shares memory with no other; copy only if necessary."""
    plain = tensor.detach().to("cpu").contiguous()
    return plain.clone() if plain.untyped_storage().nbytes() > plain.nbytes else plain


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(size for names in shards for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
