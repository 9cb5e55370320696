"""Frozen teachers in fewer bits: with the quantization of their folder, or from a GGUF file.

transformers opens them. Their answers are exact for the quantized model: the losses read its hidden
states as those of any other model. How far it is from the model that it was made from is not known
here. A GGUF file, that of llama.cpp, is dequantized; it also has the config and the tokenizer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, GgufConfig, PretrainedConfig

from megakd.config.deepspeed import zero_stage
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.errors import ModelError, one_line
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.source import GGUF, ModelSource, method_of, quantization_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megakd.config.task import TaskConfig

logger = logging.getLogger(__name__)
PACKAGES: Mapping[str, str] = {
    GGUF: "gguf",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "quanto": "optimum.quanto",
    "torchao": "torchao",
}
"""By the method of quantization_config, the module that transformers needs for it."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def gguf_file(path: Path, where: str) -> Path | None:
    """Return the GGUF file that a path names, or that has the only weights of a folder.

    Raises:
        ModelError: there are several, or it is a part of a model.
    """
    is_file = path.is_file() and path.suffix == ".gguf"
    files = [path] if is_file else sorted(path.glob("*.gguf"))
    if not files or any(next(path.glob(pattern), None) for pattern in _OTHER_WEIGHTS):
        return None
    if _PART.search(files[0].name):
        raise ModelError(
            f"{where}: {files[0]} is a part of a model; join the parts with "
            "llama-gguf-split --merge, and give the whole file"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise ModelError(
            f"{where}: {path} holds {len(files)} GGUF files ({names}); give the path of one"
        )
    return files[0]


def gguf_config(file: Path, task: TaskConfig, where: str) -> PretrainedConfig:
    """Return the config of the model in a GGUF file.

    Raises:
        ModelError: transformers cannot read it, or opens it without the head of the task.
    """
    if task.type != "causal_lm":
        raise ModelError(
            f"{where}: {file} is a GGUF file, which is read for causal_lm alone (task.type is "
            f"{task.type}); give the model that it was made from"
        )
    _check_package(f"{where}: {file} is a GGUF file", GGUF)
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # a damaged file fails anywhere in the package
        raise ModelError(
            f"{where}: transformers cannot read {file}: {one_line(error)}; give the model that it "
            "was made from"
        ) from error


def _check_package(which: str, method: str) -> None:
    package = PACKAGES.get(method)
    if package is not None and find_spec(package.partition(".")[0]) is None:
        raise ModelError(
            f"{which}, for which transformers needs the package {package.replace('_', '-')}; "
            "install it, or give the model in fp32, bf16 or fp16"
        )


def check_quantized(source: ModelSource, ds: Mapping[str, Any] | None, *, is_frozen: bool) -> None:
    """Check that a quantized model is a teacher that every rank has whole.

    Args:
        ds: the DeepSpeed config of its engine.
        is_frozen: whether nothing trains it.

    Raises:
        ModelError: it cannot be used so, or a package is missing.
    """
    method = source.quantization
    if method is None:
        return
    which = f"{source.where}: {source.name} is quantized ({method})"
    if not is_frozen:
        raise ModelError(
            f"{which}, and its weights cannot be trained; give the model in fp32, bf16 or fp16 "
            "(a teacher without finetune may be quantized)"
        )
    check_whole(source, ds)
    _check_package(which, method)


def check_whole(source: ModelSource, ds: Mapping[str, Any] | None) -> None:
    """Raise if a quantized model would be shared among ranks."""
    if source.quantization is not None and ds is not None and zero_stage(ds) == 3:
        owner = source.where.removesuffix(".model")
        raise ModelError(
            f"{source.where}: {source.name} is quantized ({source.quantization}), and ZeRO 3 "
            f"cannot share its weights among ranks; set {owner}.deepspeed to a preset of stage 0, "
            f"such as teacher_zero0, or serve the model ({owner}.server)"
        )


def bytes_per_weight(source: ModelSource, count: int, itemsize: int) -> float:
    """Return the mean bytes of one of `count` weights in memory.

    Those in the files of a quantized model; without files, its config tells the bits. `itemsize`
    is that of the dtype of other weights; a GGUF file is dequantized.
    """
    if source.quantization in (None, GGUF):
        return itemsize
    folder = source.folder
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    if stored:
        return stored / count
    config = source.config
    matrices = 1 if getattr(config, "tie_word_embeddings", False) else 2
    whole = min(count, matrices * config.vocab_size * source.width)
    return (whole * itemsize + (count - whole) * _bits(config) / 8) / count


def _bits(config: PretrainedConfig) -> int:
    """Return the bits of a quantized weight as the keys of a method name them; 8: not known."""
    keys = quantization_keys(config)
    if keys.get("load_in_4bit") or method_of(config) == "mxfp4":
        return 4
    groups = (keys.get("config_groups") or {}).values()  # of compressed-tensors
    named = [(group.get("weights") or {}).get("num_bits") for group in groups]
    known = [n for n in (keys.get("bits"), *named) if isinstance(n, int)]
    return max(known, default=8)


def open_quantized(
    source: ModelSource, task: TaskConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Open a quantized model with transformers; each rank reads all of it.

    Raises:
        ModelError: transformers cannot open it, or the losses cannot read its output matrix.
    """
    folder, options = source.folder, dict[str, Any]()
    if folder is not None and source.quantization == GGUF:
        options = {"gguf_file": folder.name, "quantization_config": GgufConfig(dequantize=True)}
        folder = folder.parent
    try:
        model: PreTrainedModel = AUTO_CLASSES[task.type].from_pretrained(  # type: ignore[attr-defined]
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=source.trust_remote_code,
            **options,
        )
        with torch.no_grad():  # some methods prepare the weights in the first forward of the model
            model(input_ids=torch.ones((1, 2), dtype=torch.long, device=device))
    except Exception as error:  # each method fails in its own way
        raise ModelError(
            f"{source.where}: transformers cannot open {source.folder}, which is quantized: "
            f"{one_line(error)}"
        ) from error
    head = model.get_output_embeddings() if task.type in LANGUAGE_TASKS else None
    weight = getattr(head, "weight", None)
    if head is not None and not (isinstance(weight, nn.Parameter) and weight.is_floating_point()):
        raise ModelError(
            f"{source.where}: the output matrix of {source.folder} is quantized, and the losses "
            "multiply by it; give a model whose lm_head is not quantized, or serve it "
            f"({source.where.removesuffix('.model')}.server)"
        )
    logger.info(
        "%s is quantized (%s): soft targets are those of this model, whose distance from the "
        "original is not measured",
        *(source.where, source.quantization),
    )
    return model
