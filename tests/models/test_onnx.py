"""ONNX graphs of cut models of every family compute what torch computes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_cuts
import torch

from megakd.errors import ModelError
from megakd.models import onnx


@pytest.mark.parametrize(
    "family",
    [
        one if one == "bert" else pytest.param(one, marks=pytest.mark.slow)
        for one in tiny_cuts.FAMILIES
    ],
)
def test_a_graph_of_a_cut_gives_the_logits_of_torch_at_any_size(family, tmp_path):
    whole = tiny_cuts.build(family)
    view = tiny_cuts.view_of(whole, "ragged")
    model = tiny_cuts.cut(whole, tiny_cuts.task_of(family), view, tiny_cuts.order_of(whole))
    model.save_pretrained(tmp_path)
    tiny_cuts.tokenizer().save_pretrained(tmp_path)

    assert onnx.write_onnx(tmp_path) <= 1e-4

    graph = onnx.OnnxModel(tmp_path / onnx.MODEL)
    ids = torch.arange(24).reshape(4, 6) + 2
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    got = torch.from_numpy(graph.logits(inputs))
    if wanted.ndim == 3:
        wanted, got = wanted[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    model = tiny_cuts.build("bert")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(onnx, "_export", lambda *_: None)
    monkeypatch.setattr(onnx, "_differences", lambda *_: (0.01, 2.0))
    with pytest.raises(ModelError, match=r"they differ by 1\.0e-02"):
        onnx.write_onnx(tmp_path)


def test_a_graph_that_onnxruntime_cannot_open_is_refused(monkeypatch, tmp_path):
    tiny_cuts.build("bert").save_pretrained(tmp_path)
    monkeypatch.setattr(onnx, "_export", lambda model, names, graph: graph.write_bytes(b"none"))
    with pytest.raises(ModelError, match=r"onnxruntime cannot run the graph of this bert model \("):
        onnx.write_onnx(tmp_path)


def test_a_graph_whose_logits_are_no_numbers_is_refused(monkeypatch, tmp_path):
    model = tiny_cuts.build("bert")
    model.save_pretrained(tmp_path)

    class Broken:
        inputs = ("input_ids", "attention_mask")

        def __init__(self, graph):
            del graph

        def logits(self, inputs):
            return np.full((len(inputs["input_ids"]), model.config.num_labels), np.nan)

    monkeypatch.setattr(onnx, "_export", lambda *_: None)
    monkeypatch.setattr(onnx, "OnnxModel", Broken)
    with pytest.raises(ModelError, match="they differ by nan"):
        onnx.write_onnx(tmp_path)
