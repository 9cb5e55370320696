"""Finished models, opened from their folders without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from megakd.errors import ModelError, one_line
from megakd.models.int8 import INT8_METHOD, load_int8
from megakd.models.loading import CONFIG_ERRORS
from megakd.models.own_models import class_of, register_own_models
from megakd.models.weights import gguf_hint
from megakd.storage.folders import check_given


def config_of_folder(folder: Path, where: str) -> PretrainedConfig:
    """Return the config of a finished model, of megakd or of transformers.

    Raises:
        ModelError: the folder is damaged, or its config is missing or cannot be read.
    """
    check_given(folder, where)
    register_own_models()
    file, final = folder / "config.json", folder / "final"
    if not file.is_file():
        remedy = f"; give {final}" if (final / file.name).is_file() else gguf_hint(folder)
        raise ModelError(f"{where}: {file} does not exist{remedy}")
    try:
        return AutoConfig.from_pretrained(folder)
    except CONFIG_ERRORS as error:
        raise ModelError(f"{where}: {file} cannot be read: {one_line(error)}") from error


def load_finished(
    folder: Path,
    where: str,
    *,
    config: PretrainedConfig | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the model of a folder as its config.json names it, of megakd or of transformers.

    Args:
        where: the key or option that asks for the model, for messages.
        config: what `config_of_folder` returned of the folder, which verifies it; default: read it.
        device: default: the CPU.
        dtype: default: the stored dtype; fp32 for int8 weights of megakd.

    Raises:
        ModelError: the folder is damaged or incomplete, its class does not exist, or it holds
            quantised weights of another library.
    """
    config = config or config_of_folder(folder, where)
    model_class: Any = class_of(config, f"{where}: {folder / 'config.json'}")
    place = device or torch.device("cpu")
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method == INT8_METHOD:
        restored = load_int8(folder)
        torch.nn.Module.to(restored, device=place, dtype=dtype)  # transformers types `to` wrongly
        return restored
    if method is not None:
        raise ModelError(
            f"{where}: {folder} is quantized ({method}); give the model in fp32, bf16 or fp16"
        )
    try:
        model = model_class.from_pretrained(folder, dtype=dtype or "auto")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{where}: {folder} cannot be loaded: {one_line(error)}") from error
    return model.to(place)
