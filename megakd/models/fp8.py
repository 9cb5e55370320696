"""Linear layers of a frozen model in 8 bits: weights as bytes with a scale for every row.

ZeRO 3 shards and gathers the bytes, half of those of bf16. Products have 8-bit inputs, of which
every row is scaled, and sums in fp32 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
Embeddings, norms and the output matrix stay in bf16: 8-bit logits would spoil gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megakd.contract.tasks import TaskType
from megakd.engine.sharding import set_values
from megakd.errors import ConfigError, ModelError
from megakd.models.source import ModelSource
from megakd.models.valueless import without_values

FP8 = torch.float8_e4m3fn
LARGEST, SMALLEST = 448.0, 1e-12
"""The largest number of 8 bits, and the least maximum of a row."""
MULTIPLE = 16
"""Of both sizes of a matrix, which the products of 8 bits need."""
LEAST_CAPABILITY = (8, 9)


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight and scales are bytes.

    DeepSpeed would round scales that are floating-point parameters to bf16.

    weight: [O, I] uint8, the 8-bit numbers.
    scale: [O, 4] uint8, the fp32 factor of each row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        kind: dict[str, Any] = {"dtype": torch.uint8, "device": linear.weight.device}
        weight = torch.empty(self.out_features, self.in_features, **kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(self.out_features, 4, **kind)
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
            numbers = packed(first, -(-stop // width))[0].view(torch.uint8).flatten()
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
            if isinstance(part, nn.Linear):
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
    elif not [*_linears(without_values(source.config, task), source)]:
        reason = f"its layers have no linear maps whose sizes are multiples of {MULTIPLE}"
    if reason is not None:
        raise ModelError(
            f"{owner}.dtype: fp8 is not supported for {source.name}: {reason}; use bf16"
        )


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
