"""int8 graphs that are scored on held-out rows, with the products that lose most left in fp32.

onnxruntime's dynamic quantisation has one scale for all numbers of a product's input, of all rows
of the batch: beside an outlier, the steps of all other numbers are coarse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.models.onnx import MOST_IN_ONE_FILE, OnnxModel, silent

logger = logging.getLogger(__name__)
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Shares of the products that stay in fp32, tried in this order."""
Logits = Callable[[Mapping[str, Tensor]], NDArray[np.float32]]


class HeldOut(NamedTuple):
    """Rows that a graph is scored on.

    name: what the scores of the rows measure.
    scores: returns [2, N] the scores of the rows, one by one and in batches of `batch_size`, from a
        function that returns logits; higher is better, NaN without a label.
    """

    name: str
    batch_size: int
    scores: Callable[[Logits], Tensor]


def quantize_graph(whole: Path, graph: Path, held_out: HeldOut | None) -> list[str]:
    """Replace the graph `whole` by an int8 `graph`; return lines with the scores of both.

    If the scores differ by more than two standard errors, the products whose inputs have the
    largest outliers stay in fp32, as few as cure it. If none do, a warning says so.
    """
    lines = [] if held_out is None else _cured(whole, graph, held_out)
    if held_out is None:
        _quantize(whole, graph, ())
    for path in whole.parent.glob(f"{whole.name}*"):
        path.unlink()
    return lines


def _cured(whole: Path, graph: Path, held_out: HeldOut) -> list[str]:
    wanted, products, kept = held_out.scores(OnnxModel(whole).logits), list[str](), 0
    scores, is_worse = wanted, True
    for share in (*SHARES, 0.0):
        products = products or (_by_outliers(whole, held_out) if share else [])
        kept = round(share * len(products))
        _quantize(whole, graph, products[:kept])
        scores = held_out.scores(OnnxModel(graph).logits)
        is_worse = _is_worse(wanted, scores)
        if not is_worse:
            break
    before, *after = (abs(float(one.nanmean())) for one in (wanted[1], *scores))
    count = int(wanted[1].isfinite().sum())
    line = (
        f"{held_out.name} on {count} held-out rows: {before:.4f} in fp32, "
        f"{after[0]:.4f} in int8 one by one, {after[1]:.4f} in batches of {held_out.batch_size}"
    )
    if is_worse:
        logger.warning("the int8 graph is worse by more than two standard errors: %s", line)
    if kept:
        line += f"; {kept} of {len(products)} products stay in fp32, because of outliers"
    return [line]


def _is_worse(wanted: Tensor, scores: Tensor) -> bool:
    for before, after in zip(wanted, scores, strict=True):
        labelled = before.isfinite()
        pair = torch.stack([before[labelled], after[labelled]])
        lost = float(pair[0].mean() - pair[1].mean())
        if not lost <= 2 * float(pair.std()) / pair.shape[1] ** 0.5:  # NaN is worse too
            return True
    return False


def _by_outliers(whole: Path, held_out: HeldOut) -> list[str]:
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
    session, outliers = OnnxModel(watched), dict.fromkeys(names, 0.0)

    def logits(inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        first, *rest = session.outputs(("logits", *names), inputs)
        for name, sizes in zip(names, map(np.abs, rest), strict=True):
            outliers[name] = max(outliers[name], float(sizes.max() / max(sizes.mean(), 1e-30)))
        return first

    held_out.scores(logits)
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
