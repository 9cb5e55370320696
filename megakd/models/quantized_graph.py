"""int8 graphs that are scored on held-out rows, with the products that lose most left in fp32.

onnxruntime's dynamic quantisation has one scale for all numbers of a product's input, of all rows
of the batch: beside an outlier, the steps of all other numbers are coarse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.models.onnx import MOST_IN_ONE_FILE, OnnxModel, silent

logger = logging.getLogger(__name__)
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Shares of the products that stay in fp32, tried in this order."""
Logits = Callable[[Mapping[str, Tensor]], NDArray[np.float32]]


Scores = Callable[[Logits], Tensor]
"""Returns [2, N] the scores of held-out rows, one by one and in batches, from a function of logits.

A score is 1 for a right label and 0 for another, or minus a loss; NaN without a label."""


def quantize_graph(whole: Path, graph: Path, scores: Scores | None) -> list[str]:
    """Write the graph `whole` as an int8 `graph`; return lines with the scores of both.

    If they differ by more than two standard errors, the products whose inputs have the largest
    outliers stay in fp32, as few as cure it. If none do, a warning says so.
    """
    if scores is None:
        _quantize(whole, graph, ())
        return []
    result = wanted = scores(OnnxModel(whole).logits)
    products, kept, is_worse = list[str](), 0, False
    for share in (*SHARES, 0.0):
        products = products or (_by_outliers(whole, scores) if share else [])
        kept = round(share * len(products))
        _quantize(whole, graph, products[:kept])
        result = scores(OnnxModel(graph).logits)
        is_worse = _is_worse(wanted, result)
        if not is_worse:
            break
    count, name = int(wanted[1].isfinite().sum()), "loss" if wanted.nansum() < 0 else "accuracy"
    means = [f"{abs(float(one.nanmean())):.4f}" for one in (wanted[1], *result)]
    line = (
        f"{name} on {count} held-out rows: {means[0]} in fp32, {means[1]} in int8 one by one, "
        f"{means[2]} in batches"
    )
    if is_worse:
        logger.warning("the int8 graph is worse by more than two standard errors: %s", line)
    if kept:
        line += f"; {kept} of {len(products)} products stay in fp32, because of outliers"
    return [line]


def _is_worse(wanted: Tensor, result: Tensor) -> bool:
    for before, after in zip(wanted, result, strict=True):
        labelled = before.isfinite()
        pair = torch.stack([before[labelled], after[labelled]])
        lost = float(pair[0].mean() - pair[1].mean())
        if not lost <= 2 * float(pair.std()) / pair.shape[1] ** 0.5:  # NaN is worse too
            return True
    return False


def _by_outliers(whole: Path, scores: Scores) -> list[str]:
    """Return the products and tables that are quantised, those with the largest outliers first."""
    import onnx

    model = onnx.load(str(whole), load_external_data=False)
    weights = {one.name for one in model.graph.initializer}
    numbers: dict[str, str] = {}  # by the node, the tensor whose numbers share a scale
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            numbers[node.name] = node.input[0]
        elif node.op_type == "Gather" and node.input[0] in weights:
            numbers[node.name] = node.output[0]
    names = list(dict.fromkeys(numbers.values()))
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    watched = whole.with_name(f"{whole.name}.watched")  # beside a file of weights
    onnx.save(model, str(watched))
    onnx_model, outliers = OnnxModel(watched), dict.fromkeys(names, 0.0)

    def logits(inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        first, *rest = onnx_model.outputs(inputs, ["logits", *names])
        for name, one in zip(names, rest, strict=True):
            sizes = np.abs(one)
            outliers[name] = max(outliers[name], float(sizes.max() / max(sizes.mean(), 1e-30)))
        return first

    scores(logits)
    watched.unlink()
    return sorted(numbers, key=lambda node: -outliers[numbers[node]])


def _quantize(whole: Path, graph: Path, kept: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = whole.parent.glob(f"{whole.name}*")
    with silent(logging.getLogger()):
        quantize_dynamic(
            whole,
            graph,
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(kept),
            use_external_data_format=sum(one.stat().st_size for one in files) > MOST_IN_ONE_FILE,
        )
