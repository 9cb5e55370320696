"""`megakd export --format onnx`, on a classifier that a run has written."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from onnxruntime import InferenceSession
from transformers import AutoTokenizer, CanineConfig, CanineForSequenceClassification
from whole_run import logits_by_hand

from megakd.cli import main
from megakd.commands import scored_models
from megakd.errors import DataError, ModelError
from megakd.models import onnx


@pytest.fixture(scope="module")
def exported(one_rank, whole_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "graph"
    outcome = one_rank.megakd("export", whole_run.config, "--to", folder, "--format", "onnx")
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_the_graph_takes_the_place_of_the_weights_and_answers_alike(whole_run, exported):
    folder, outcome = exported

    assert outcome.out.splitlines()[0] == str(folder)
    assert not list(folder.glob("*.safetensors*"))
    texts = ["a good fine film", "the poor ugly cat and it was awful", ""]
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    graph = InferenceSession(folder / "model.onnx")
    (logits,) = graph.run(None, {one.name: encoded[one.name] for one in graph.get_inputs()})
    _, expected = logits_by_hand(whole_run.out / "final", texts)
    assert logits == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_graph_of_weights_that_are_stored_in_16_bits_has_their_values(whole_run, tmp_path):
    worst = onnx.write_onnx(
        whole_run.out / "final", to=tmp_path / "model.onnx", stored_as=torch.bfloat16
    )

    inputs = AutoTokenizer.from_pretrained(whole_run.out / "final")(
        "a good film", return_tensors="pt"
    )
    model, _ = logits_by_hand(whole_run.out / "final", ["a"])
    exact = model(**inputs).logits
    rounded = model.bfloat16().float()(**inputs).logits
    logits = torch.from_numpy(onnx.OnnxModel(tmp_path / "model.onnx").logits(inputs))
    assert worst < 1e-4
    torch.testing.assert_close(logits, rounded, atol=1e-4, rtol=0)
    assert not torch.allclose(logits, exact, atol=1e-4)


def test_int8_makes_the_graph_smaller_and_prints_both_scores(
    whole_run, exported, tmp_path, monkeypatch, capsys, caplog
):
    small, whole = tmp_path / "int8", exported[0] / "model.onnx"
    # A second export of the same model would take seconds.
    monkeypatch.setattr(onnx, "_export", lambda model, names, graph: shutil.copy(whole, graph))

    words = ("export", str(whole_run.config), "--to", str(small), "--format", "onnx", "--int8")
    assert main(words) == 0

    shown = capsys.readouterr().out
    assert re.search(r"\naccuracy on \d+ held-out rows: .* in fp32, .* one by one, .*\n", shown)
    assert [path.name for path in small.glob("*.onnx*")] == ["model.onnx"]
    assert (small / "model.onnx").stat().st_size < whole.stat().st_size

    def gone(config):
        raise DataError("the rows are gone")

    monkeypatch.setattr(scored_models, "splits_of", gone)
    assert main((*words[:3], str(tmp_path / "unscored"), *words[4:])) == 0
    assert "held-out" not in capsys.readouterr().out
    assert "the int8 graph is not scored: the rows are gone" in caplog.text


def test_int8_without_a_graph_is_refused(one_rank, whole_run, tmp_path):
    words = ("export", whole_run.config, "--to", tmp_path / "x", "--int8")

    outcome = one_rank.megakd(*words, code=2)

    assert "--int8 needs --format onnx" in outcome.err


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (onnx._SHAPES, "it fails for texts of 1 to 32 tokens: max_pool1d"),
        pytest.param(
            [(2, 7), (1, 19)], "its graph takes inputs of the size", marks=pytest.mark.slow
        ),
    ],
)
def test_a_model_that_needs_longer_texts_or_fixed_sizes_is_refused_with_the_cause(
    monkeypatch, tmp_path, shapes, reason
):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hash_buckets": 64}
    config = CanineConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    CanineForSequenceClassification(config).save_pretrained(tmp_path)
    monkeypatch.setattr(onnx, "_SHAPES", shapes)

    with pytest.raises(ModelError, match=f"^a canine model cannot be expressed as ONNX .{reason}"):
        onnx.write_onnx(tmp_path)
