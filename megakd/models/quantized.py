"""Frozen teachers in fewer bits: quantized folders, GGUF files, and linear layers as bytes.

transformers opens them. Their answers are exact for the quantized model: the losses read its hidden
states as those of any other model. How far it is from the model that it was made from is not known
here. A GGUF file, that of llama.cpp, is dequantized; it also has the config and the tokenizer.

ZeRO 3 shards and gathers the bytes, half of those of bf16. Products have 8-bit inputs, of which
every row is scaled, and sums in fp32 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
Embeddings, norms and the output matrix stay in bf16: 8-bit logits would spoil gradients.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GgufConfig, PretrainedConfig

from megakd.config.deepspeed import zero_stage
from megakd.config.task import LANGUAGE_TASKS, TaskType
from megakd.engine.sharding import set_values
from megakd.errors import ConfigError, ModelError, one_line
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.fitting import GGUF, ModelSource, method_of, quantization_keys
from megakd.models.small_copy import TOKENS, copy_that_runs, logits_of, without_values

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
        text = source.config.get_text_config()
        model.config.get_text_config().pad_token_id = getattr(text, "pad_token_id", None)
        with torch.no_grad():  # some methods prepare the weights in the first forward of the model
            model(input_ids=torch.ones((1, 2), dtype=torch.long, device=device))
    except Exception as error:  # each method fails in its own way
        raise ModelError(
            f"{source.where}: transformers cannot open {source.folder}, which is quantized: "
            f"{one_line(error)}"
        ) from error
    weights = {name: weight for name, weight in model.named_parameters() if weight.itemsize < 2}
    dtypes = {name.removesuffix(".weight"): weight.dtype for name, weight in weights.items()}
    if dtypes and _computes_with(dtypes, source.config, task.type) is False:
        raise ModelError(
            f"{source.where}: {source.folder} is quantized ({source.quantization}), and the code "
            f"of a {source.config.model_type} model reads weights of its linear layers; give the "
            "model in fp32, bf16 or fp16"
        )
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


FP8 = torch.float8_e4m3fn

LARGEST, SMALLEST = 448.0, 1e-12
"""The largest number of 8 bits, and the least maximum of a row."""

MULTIPLE = 16
"""Of both sizes of a matrix, which the products of 8 bits need."""

LEAST_CAPABILITY = (8, 9)


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight and scales are bytes.

    DeepSpeed would round scales that are floating-point parameters to bf16.

    weight: [O, I] int8, the 8-bit numbers; T5 casts hidden states to any other dtype of a weight.
    scale: [O, 4] uint8, the fp32 factor of each row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        device = linear.weight.device
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(self.out_features, 4, dtype=torch.uint8, device=device)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Return [..., O] in the dtype of the input [..., I]."""
        product: Tensor = _Product.apply(input.flatten(0, -2), self.weight, self.scale, scaled_rows)
        product = product.unflatten(0, input.shape[:-1])
        return product if self.bias is None else product + self.bias

    def fill(self, read: Callable[[int, int], Tensor]) -> None:
        """Set the weight; each rank reads the rows of its part, whose maxima give the scales.

        read: returns the elements of the flattened weight from a first to before a last one.
        """
        width = self.in_features

        def packed(first: int, last: int) -> tuple[Tensor, Tensor]:
            return scaled_rows(read(first * width, last * width).reshape(-1, width))

        def weights(start: int, stop: int) -> Tensor:
            first = start // width
            numbers = packed(first, -(-stop // width))[0].view(torch.int8).flatten()
            return numbers[start - first * width : stop - first * width]

        def scales(start: int, stop: int) -> Tensor:
            first = start // 4
            numbers = packed(first, -(-stop // 4))[1].view(torch.uint8).flatten()
            return numbers[start - first * 4 : stop - first * 4]

        set_values(self.weight, weights)
        set_values(self.scale, scales)


def scaled_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [N, I] in 8 bits and their fp32 scales [N, 1]."""
    scales = rows.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST
    return (rows.float() / scales).to(FP8), scales


class _Product(torch.autograd.Function):
    """Rows [N, I] times an 8-bit weight; the gradient of the rows is computed in their dtype."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, scale: Tensor, scaled: Callable[..., Any]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        numbers, factors = scaled(rows)
        # torch has no public product of 8 bits.
        return torch._scaled_mm(  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
            numbers,
            weight.view(FP8).T,
            scale_a=factors,
            scale_b=scale.view(torch.float32).T,
            out_dtype=rows.dtype,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        whole = weight.view(FP8).to(gradient.dtype) * scale.view(torch.float32).to(gradient.dtype)
        return gradient @ whole, None, None, None


def pack_linears(model: nn.Module, source: ModelSource, missing: Collection[str]) -> None:
    """Replace the linear layers of a model without values; those without stored weights stay."""
    for name, linear in list(_linears(model, source)):
        if f"{name}.weight" not in missing:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(linear))


def packed_linears(model: nn.Module) -> dict[str, Fp8Linear]:
    """Return the 8-bit layers of a model by the names of their weights."""
    parts = model.named_modules()
    return {f"{name}.weight": part for name, part in parts if isinstance(part, Fp8Linear)}


def _linears(model: nn.Module, source: ModelSource) -> Iterator[tuple[str, nn.Linear]]:
    for path in source.architecture.layer_paths(source.config):
        for name, part in model.get_submodule(path).named_modules(prefix=path):
            # Other classes compute something else; weights that stay in fp32 are wanted exactly.
            if type(part) is nn.Linear and part.weight.dtype == model.dtype:
                sizes = part.in_features, part.out_features
                if not any(size % MULTIPLE for size in sizes):
                    yield name, part


def check_fp8(source: ModelSource, task: TaskType, *, is_trained: bool) -> None:
    """Raise if a model cannot have 8-bit layers; no weights are read."""
    owner = source.where.removesuffix(".model")
    reason = None
    if source.quantization is not None:
        reason = f"its weights are quantized ({source.quantization})"
    elif source.architecture.experts is not None:
        reason = "it is a mixture of experts"
    elif source.folder is None and not is_trained:
        reason = "it has no stored weights"
    else:
        names = [name for name, _ in _linears(without_values(source.config, task), source)]
        if not names:
            reason = f"its layers have no linear maps whose sizes are multiples of {MULTIPLE}"
        elif not _computes_with(dict.fromkeys(names, torch.int8), source.config, task):
            reason = "its code reads weights of its linear layers, which would be bytes"
    if reason is not None:
        raise ModelError(
            f"{owner}.dtype: fp8 is not supported for {source.name}: {reason}; use bf16"
        )


def _computes_with(
    weights: Mapping[str, torch.dtype], config: PretrainedConfig, task: TaskType
) -> bool | None:
    """Return whether the code of a model leaves weights of other dtypes to their linear layers.

    A small copy decides, whose layers compute as before while such weights are 0; None: none runs.
    """
    model = copy_that_runs(config, task, tokens=TOKENS)
    if model is None:
        return None
    try:
        with torch.no_grad():
            exact = logits_of(model, TOKENS)
            for name, part in model.named_modules():
                if name in weights and isinstance(part, nn.Linear):
                    plain, empty = part.weight, torch.zeros_like(part.weight, dtype=weights[name])
                    part.forward = partial(nn.functional.linear, weight=plain, bias=part.bias)
                    part.weight = nn.Parameter(empty, requires_grad=False)
            return torch.allclose(logits_of(model, TOKENS), exact, rtol=1e-4, atol=1e-6)
    except Exception:  # noqa: BLE001 - code that computes with bytes fails in its own way
        return False


def check_fp8_device(device: torch.device, where: str) -> None:
    """Raise if a GPU has no products of 8 bits."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ConfigError(
            f"{where}: fp8 needs a GPU of compute capability 8.9 or higher, and "
            f"{torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; use bf16"
        )


def fp8_bytes(source: ModelSource, task: TaskType, itemsize: int) -> float:
    """Return the mean bytes of a weight of a model with 8-bit layers."""
    model = without_values(source.config, task)
    count = sum(weight.numel() for weight in model.parameters())
    parts = [linear for _, linear in _linears(model, source)]
    packed = sum(part.weight.numel() for part in parts)
    scales = 4 * sum(part.out_features for part in parts)
    return (packed + scales + (count - packed) * itemsize) / count
