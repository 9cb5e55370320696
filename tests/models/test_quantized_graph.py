"""int8 graphs on held-out rows: their scores, and the products that stay in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megakd.models import onnx
from megakd.models.onnx import Logits, OnnxModel, Scores, quantize_graph

plain = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROWS, SIZES = 60, {"table": (50, 32), "first": (32, 24), "second": (24, 2)}


def write_graph(path: Path, outliers: tuple[str, str] | None = None) -> Path:
    """A table of embeddings and two products; `outliers`: of which weights and undone in which.

    The logits are the same: two numbers that the second weights read are larger, and these smaller.
    """
    drawn = np.random.default_rng(0)
    weights = {name: drawn.normal(size=size) for name, size in SIZES.items()}
    if outliers is not None:
        weights[outliers[0]][:, :2] *= 1e4
        weights[outliers[1]][:2] /= 1e4
    make = plain.helper
    ids, logits = (
        make.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("input_ids", plain.TensorProto.INT64, ["b", "t"]),
            ("logits", plain.TensorProto.FLOAT, ["b", 2]),
        )
    )
    nodes = [
        make.make_node("Gather", ["table", "input_ids"], ["embedded"], "gather"),
        make.make_node("MatMul", ["embedded", "first"], ["hidden"], "one"),
        make.make_node("ReduceMean", ["hidden", "axes"], ["pooled"], "mean", keepdims=0),
        make.make_node("MatMul", ["pooled", "second"], ["logits"], "two"),
    ]
    tables = [
        plain.numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in weights.items()
    ]
    tables.append(plain.numpy_helper.from_array(np.array([1]), "axes"))
    graph = make.make_graph(nodes, "graph", [ids], [logits], tables)
    opset = make.make_operatorsetid("", 18)
    plain.save(make.make_model(graph, opset_imports=[opset], ir_version=10), str(path))
    return path


def held_out(graph: Path) -> Scores:
    """Rows whose labels are what the fp32 graph answers."""
    drawn = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(SIZES["table"][0], (ROWS, 5), generator=drawn)}
    labels = torch.from_numpy(OnnxModel(graph).logits(inputs)).argmax(1)

    def scores(logits: Logits) -> torch.Tensor:
        def right(size: int) -> torch.Tensor:
            parts = (
                torch.from_numpy(logits({k: v[n : n + size] for k, v in inputs.items()}))
                for n in range(0, ROWS, size)
            )
            return (torch.cat(list(parts)).argmax(1) == labels).double()

        return torch.stack([right(1), right(20)])

    return scores


def products(graph: Path) -> int:
    """How many products are computed with int8."""
    nodes = plain.load(str(graph)).graph.node
    return sum(node.op_type == "MatMulInteger" for node in nodes)


def test_a_graph_that_keeps_its_score_is_quantised_whole(tmp_path: Path, caplog) -> None:
    whole = write_graph(tmp_path / "whole")

    (line,) = quantize_graph(whole, tmp_path / "int8", held_out(whole))

    assert line.startswith(f"accuracy on {ROWS} held-out rows: 1.0000 in fp32, ")
    assert "stay in fp32" not in line
    assert not caplog.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "whole"]
    assert products(tmp_path / "int8") == 2


@pytest.mark.parametrize(
    ("outliers", "kept"),
    [(("first", "second"), 1), (("table", "first"), 2)],
    ids=["layer", "table"],
)
def test_products_with_outliers_stay_in_fp32_where_that_keeps_the_score(
    tmp_path: Path, caplog, outliers: tuple[str, str], kept: int
) -> None:
    whole = write_graph(tmp_path / "whole", outliers)
    rows = held_out(whole)
    onnx._quantize(whole, tmp_path / "all", ())
    assert rows(OnnxModel(tmp_path / "all").logits).mean() < 0.8

    (line,) = quantize_graph(whole, tmp_path / "int8", rows)

    assert line.endswith(f"; {kept} of 3 products stay in fp32, because of outliers")
    assert not caplog.records
    assert rows(OnnxModel(tmp_path / "int8").logits).mean() > 0.9
    assert products(tmp_path / "int8") == 1


def test_a_graph_that_stays_worse_is_quantised_whole_under_a_warning(
    tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(onnx, "SHARES", (0.0, 0.01))
    whole = write_graph(tmp_path / "whole", ("first", "second"))

    (line,) = quantize_graph(whole, tmp_path / "int8", held_out(whole))

    assert f"worse by more than two standard errors: {line}" in caplog.text
    assert products(tmp_path / "int8") == 2


def test_a_graph_without_held_out_rows_is_quantised_whole(tmp_path: Path) -> None:
    assert quantize_graph(write_graph(tmp_path / "whole"), tmp_path / "int8", None) == []

    assert products(tmp_path / "int8") == 2


@pytest.mark.parametrize(
    ("right", "after", "is_worse"),
    [(58, 58, False), (58, 55, False), (58, 52, True), (60, 59, False), (60, 55, True)],
)
def test_a_score_beyond_two_standard_errors_is_worse(right: int, after: int, *, is_worse) -> None:
    before = torch.tensor([1.0] * right + [0.0] * (ROWS - right) + [torch.nan])
    later = torch.tensor([1.0] * after + [0.0] * (ROWS - after) + [torch.nan])

    assert onnx._is_worse(torch.stack([before] * 2), torch.stack([before, later])) is is_worse
    assert onnx._is_worse(before[None], torch.full_like(before, torch.nan)[None])
