"""Int8 weights of a finished model: one scale per row, in a folder of their own, and their loader.

    final/int8/model.safetensors    `<name>` as int8 [rows, ...] and `<name>.scale` as fp32 [rows]

Every floating-point tensor with at least two dimensions is stored in this form: symmetric, rounded
to nearest, weight = value * scale. All other tensors are stored unchanged. The format is megakd's
own: `compressed-tensors` rounds the scales of bf16 models to bf16, stores a tied head twice, and
transformers opens its int8 embeddings only with `run_compressed=False`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, initialization

from megakd.errors import ModelError, one_line
from megakd.models.model_folder import write_weights
from megakd.models.own_models import CONFIG_ERRORS, class_of, register_own_models
from megakd.models.weights import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    StoredTensor,
    WeightReader,
    check_weight_files,
)
from megakd.process.terminal import in_home
from megakd.storage.atomic import write_content
from megakd.storage.folders import CHECKSUMS, check_given, sealed_folder

INT8 = "int8"
"""Name of the folder below `final/`."""
FORMAT = "int8 per row, symmetric"
SCALE = ".scale"
_WHERE = "int8 weights"
INT8_METHOD = "megakd_int8"
"""What config.json names as the method that quantised the weights."""
# auto_map names a file that plain transformers runs; torch_dtype is an older name of dtype.
_FULL_PRECISION_KEYS = ("dtype", "torch_dtype", "quantization_config", "auto_map")
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
Places = Mapping[str, tuple[StoredTensor, StoredTensor | None]]
"""By name, where a tensor is stored, and its scale if the tensor is quantised."""


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and the scale of each row, so that weights are about values * scale.

    The weights [rows, ...] are finite. In fp32, |values * scale - weights| <= scale / 2, up to
    rounding in the last digits. The values are between -127 and 127 in the shape of the weights,
    and the fp32 scales [rows] are max |row| / 127, or 0 for a row of zeros.
    """
    rows = weights.to(torch.float32).flatten(1)
    largest = rows.abs().amax(1)
    # Below the smallest normal number, a scale has too few digits for the error bound.
    smallest = torch.finfo(torch.float32).tiny
    scale = torch.where(largest > 0, (largest / 127).clamp(min=smallest), largest)
    divisor = torch.where(scale > 0, scale, 1.0)
    values = (rows / divisor[:, None]).round_().to(torch.int8)
    return values.view(weights.shape), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weights of int8 values [rows, ...] and scales [rows]."""
    return values.to(torch.float32) * scale.view(-1, *[1] * (values.ndim - 1))


def write_int8(folder: Path, to: Path) -> None:
    """Write a finished model with int8 weights into a folder of its own, whole or not at all.

    The weights are in fp32, bf16 or fp16, and may be in shards. The folder also holds the config
    and the tokenizer. `load_int8` loads the folder. The config states the dtype int8, so that plain
    transformers refuses the folder by default; transformers would take the int8 values for weights.
    """
    check_given(folder, _WHERE)
    state = dict(_quantized(folder))
    with sealed_folder(to) as temporary:
        # One key: safetensors writes several in random order, and equal weights have equal files.
        save_file(state, temporary / SAFETENSORS, metadata={"quantization": FORMAT})
        keys = {"dtype": "int8", "quantization_config": {"quant_method": INT8_METHOD}}
        _write_companions(folder, temporary, keys)


def write_restored(folder: Path, to: Path) -> None:
    """Write a model folder with the fp32 weights that `load_int8` computes from an int8 folder."""
    places = _places(folder)
    with sealed_folder(to) as temporary:
        write_weights(temporary, _restored(places))
        _write_companions(folder, temporary, {"dtype": "float32"})


def load_int8(folder: str | Path) -> PreTrainedModel:
    """Return the model of an int8 folder with dequantised fp32 weights, in evaluation mode.

    Args:
        folder: folder `int8` of a finished run's `final/`, or a copy of that folder.

    Raises:
        ModelError: the folder is damaged or incomplete, or does not hold int8 weights of megakd.
    """
    folder = in_home(folder)
    places = _places(folder)
    model = _built(folder)
    tensors = model.state_dict(keep_vars=True)
    _check_fit(folder, places, tensors)
    with torch.no_grad():
        for name, tensor in _restored(places):
            tensors[name].copy_(tensor)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _quantized(folder: Path) -> Iterator[tuple[str, Tensor]]:
    stored = check_weight_files(folder, _WHERE)
    with torch.device("meta"):
        tensors = _built(folder).state_dict(keep_vars=True)
    reader = WeightReader(_WHERE)
    seen: set[int] = set()
    for name, place in stored.items():
        # Tied weights that lie in two shards are stored twice.
        if name in tensors and id(tensors[name]) in seen:
            continue
        seen.add(id(tensors.get(name)))
        tensor, where = reader.read(place), f"{folder}: {name}"
        if tensor.dtype == torch.int8 and tensor.ndim >= 2:
            raise ModelError(
                f"{where} is stored as int8; give the folder of the model in fp32 or bf16"
            )
        # A value of fp64 may exceed fp32.
        if tensor.is_floating_point() and not tensor.to(torch.float32).isfinite().all():
            raise ModelError(
                f"{where} holds values that are not finite, which int8 cannot express; train the "
                "model again, for example with a lower learning rate, or leave out save.int8"
            )
        if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
            yield name, tensor
            continue
        if name + SCALE in stored:
            raise ModelError(
                f"{folder} has a weight {name + SCALE}, which is the name of a scale in int8 "
                "weights; leave out save.int8"
            )
        values, scale = quantize(tensor)
        yield name, values
        yield name + SCALE, scale


def _places(folder: Path) -> Places:
    file = folder / SAFETENSORS
    if not file.is_file():
        raise ModelError(f"{file} does not exist; {_remedy(folder)}")
    check_given(folder, _WHERE)
    stored = check_weight_files(folder, _WHERE)
    with safe_open(file, "pt") as opened:
        stored_format = (opened.metadata() or {}).get("quantization")
    if stored_format != FORMAT:
        raise ModelError(
            f"{file} does not hold int8 weights of megakd (its metadata name the quantization "
            f"{stored_format!r}, not {FORMAT!r}); {_remedy(folder)}"
        )
    is_quantized = {n: p.dtype == torch.int8 and len(p.shape) >= 2 for n, p in stored.items()}
    scales = {name + SCALE for name in stored if is_quantized[name]}
    places: dict[str, tuple[StoredTensor, StoredTensor | None]] = {}
    for name, values in stored.items():
        if name in scales:
            continue
        scale = None
        if is_quantized[name]:
            scale, expected = stored.get(name + SCALE), values.shape[:1]
            if scale is None or (scale.shape, scale.dtype) != (expected, torch.float32):
                fault = "is missing" if scale is None else f"is {scale.dtype} {list(scale.shape)}"
                raise ModelError(
                    f"{file} is damaged: {name + SCALE} {fault}, and must be torch.float32 "
                    f"{list(expected)}; copy the folder again"
                )
        places[name] = values, scale
    return places


def _remedy(folder: Path) -> str:
    if (folder / INT8 / SAFETENSORS).is_file():
        return f"give {folder / INT8}"
    return (
        f"give the folder {INT8} below the final/ of a run with save.int8: true, or load a folder "
        "with full-precision weights by from_pretrained of transformers"
    )


def _restored(places: Places) -> Iterator[tuple[str, Tensor]]:
    reader = WeightReader(_WHERE)
    for name, (values, scale) in places.items():
        tensor = reader.read(values)
        yield name, tensor if scale is None else dequantize(tensor, reader.read(scale))


def _check_fit(folder: Path, places: Places, tensors: Mapping[str, Tensor]) -> None:
    filled = {id(tensors[name]) for name in places if name in tensors}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled]
    extra = [name for name in places if name not in tensors]
    wrong = [
        f"{name} {list(values.shape)} instead of {list(tensors[name].shape)}"
        for name, (values, _) in places.items()
        if name in tensors and values.shape != tuple(tensors[name].shape)
    ]
    problems = {"missing": missing, "unknown to the model": extra, "of another shape": wrong}
    for problem, names in problems.items():
        if names:
            raise ModelError(
                f"{folder}: config.json and {SAFETENSORS} do not belong together: {len(names)} "
                f"weights are {problem} ({', '.join(names[:3])}); copy the folder again, or write "
                "it again with megakd export and save.int8=true"
            )


def _built(folder: Path) -> PreTrainedModel:
    register_own_models()
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{file} does not exist; copy the folder again")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = class_of(config, str(file))
        config.dtype = torch.float32
        vars(config).pop("quantization_config", None)
        with initialization.no_init_weights():
            model = model_class(config).float()
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"{file} is not the config of a model that megakd can build ({one_line(error)}); copy "
            "the folder again"
        ) from error
    model.tie_weights()
    return model


def _write_companions(folder: Path, to: Path, keys: Mapping[str, Any]) -> None:
    for path in (path for pattern in _COMPANIONS for path in folder.glob(pattern)):
        if path.name not in (SAFETENSORS_INDEX, CHECKSUMS):
            shutil.copyfile(path, to / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rest = {key: value for key, value in config.items() if key not in _FULL_PRECISION_KEYS}
    write_content(to / "config.json", json.dumps({**rest, **keys}, indent=2) + "\n")
