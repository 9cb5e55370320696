"""Int8 weights: within half a step of the originals, loaded whole, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_cuts import build, cut, logits, source_of, task_of, view_of, written
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import megakd
from megakd.errors import ModelError
from megakd.models import model_folder as export
from megakd.models.int8 import FORMAT, dequantize, load_int8, quantize, write_int8, write_restored
from megakd.models.model_folder import weight_bytes
from megakd.models.weights import SAFETENSORS
from megakd.storage.folders import CHECKSUMS, damage

State = dict[str, Tensor]
# One family of each kind: an encoder, a decoder, transposed weights, a class of megakd.
FAMILIES = ("bert", "llama", "gpt2", "enct5")
LARGEST = float(np.float32(2.0**120))
ROUNDING = 1 + 1e-4  # fp32 divides and multiplies with an error in the last digit
WORD = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def final(tmp_path: Path) -> Path:
    return written(build("bert"), tmp_path / "final")


@pytest.fixture
def int8(final: Path) -> Path:
    write_int8(final, final / "int8")
    return final / "int8"


def rewrite(
    folder: Path, change: Callable[[State], object], metadata: Mapping[str, str] | None = None
) -> None:
    """Change the tensors of a file, and remove the checksums that would tell."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    with safe_open(folder / SAFETENSORS, "pt") as file:
        known = file.metadata()
    state = load_file(folder / SAFETENSORS)
    change(state)
    save_file(state, folder / SAFETENSORS, metadata=dict(metadata or known))


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-LARGEST, LARGEST, width=32),
    )
)
def test_a_weight_moves_by_at_most_half_a_step_of_its_row(weights: np.ndarray) -> None:
    original = torch.from_numpy(weights)

    values, scale = quantize(original)

    moved = (dequantize(values, scale).double() - original.double()).abs().flatten(1)
    assert (moved <= scale.double()[:, None] / 2 * ROUNDING).all()
    assert values.int().abs().max() <= 127
    assert scale.shape == original.shape[:1]


def test_the_largest_weight_of_a_row_is_the_last_step_and_zeros_stay_zeros() -> None:
    values, scale = quantize(torch.tensor([[0.5, -2.54, 1.0], [127.0, 1.0, 0.4], [0.0] * 3]))
    assert values.tolist() == [[25, -127, 50], [127, 1, 0], [0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.02, 1.0, 0.0])
    assert not dequantize(values, scale)[2].any()


def test_a_sealed_folder_has_matrices_as_int8_with_scales_and_the_rest_unchanged(final, int8):
    full, state = load_file(final / SAFETENSORS), load_file(int8 / SAFETENSORS)
    with safe_open(int8 / SAFETENSORS, "pt") as file:
        metadata = file.metadata()

    matrices = {name for name, tensor in full.items() if tensor.ndim > 1}
    assert metadata == {"quantization": FORMAT}
    assert state.keys() == full.keys() | {f"{name}.scale" for name in matrices}
    assert {state[name].dtype for name in matrices} == {torch.int8}
    assert {state[f"{name}.scale"].dtype for name in matrices} == {torch.float32}
    assert all(torch.equal(state[name], full[name]) for name in full.keys() - matrices)
    assert weight_bytes(int8) < 0.5 * weight_bytes(final)  # rows of 24: scales and header count
    assert damage(int8) is None
    assert len(AutoTokenizer.from_pretrained(int8)) == len(AutoTokenizer.from_pretrained(final))


@pytest.mark.parametrize(
    ("family", "is_cut"), [*((name, False) for name in FAMILIES), ("bert", True), ("gpt2", True)]
)
def test_the_loaded_model_has_the_restored_weights_and_nearly_the_same_logits(
    tmp_path, family, is_cut
) -> None:
    model = build(family)
    if is_cut:  # Layers without any head or neuron have tensors without an element.
        model = cut(model, task_of(family), view_of(model, "empty"))
    write_int8(written(model, tmp_path / "final"), tmp_path / "int8")

    loaded = megakd.load_int8(str(tmp_path / "int8"))

    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        has_scales = tensor.ndim > 1 and tensor.numel() > 0
        expected = dequantize(*quantize(state[name])) if has_scales else state[name]
        assert torch.equal(tensor, expected), name
    assert (type(loaded), loaded.training) == (type(model), False)
    full = logits(model)
    assert (logits(loaded) - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype_is_loaded_in_fp32(tmp_path, dtype) -> None:
    model = build("bert").to(dtype)
    write_int8(written(model, tmp_path / "final"), tmp_path / "int8")

    loaded = load_int8(tmp_path / "int8")

    embedding = model.state_dict()[WORD]
    assert torch.equal(loaded.state_dict()[WORD], dequantize(*quantize(embedding)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_tied_weights_of_two_shards_are_written_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    model = build("llama", tie_word_embeddings=True)
    twice = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    final = written(model, tmp_path / "final", state=twice.items())
    index = json.loads((final / "model.safetensors.index.json").read_text())

    write_int8(final, tmp_path / "int8")

    loaded = load_int8(tmp_path / "int8")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= index["weight_map"].keys()
    assert "lm_head.weight" not in load_file(tmp_path / "int8" / SAFETENSORS)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not (tmp_path / "int8" / "model.safetensors.index.json").exists()


def test_equal_weights_have_equal_bytes(final, tmp_path) -> None:
    """A run that writes a missing file again compares the checksums."""
    folders = [tmp_path / str(number) for number in range(3)]

    for folder in folders:
        write_int8(final, folder)

    assert len({(folder / SAFETENSORS).read_bytes() for folder in folders}) == 1
    assert len({(folder / CHECKSUMS).read_bytes() for folder in folders}) == 1


def test_generation_settings_go_with_a_decoder(tmp_path) -> None:
    final = written(build("gpt2"), tmp_path / "final")
    settings = json.loads((final / "generation_config.json").read_text())
    (final / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    (final / CHECKSUMS).unlink()

    write_int8(final, tmp_path / "int8")

    assert load_int8(tmp_path / "int8").generation_config.eos_token_id == 7


def test_transformers_and_a_run_refuse_the_int8_folder_itself(int8) -> None:
    """Otherwise they would take the int8 values for weights."""
    with pytest.raises(ValueError, match=r"cannot be instantiated under `dtype=torch.int8`"):
        AutoModelForSequenceClassification.from_pretrained(int8)
    with pytest.raises(ModelError, match="is quantized; give the model in fp32"):
        source_of(int8, "classification")


def test_the_restored_folder_is_a_plain_model_with_the_same_weights(int8, tmp_path) -> None:
    write_restored(int8, tmp_path / "restored")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "restored").eval()
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(load_int8(int8)))
    assert source_of(tmp_path / "restored", "classification").stored_dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [WORD, "classifier.bias"])
def test_a_weight_that_is_not_finite_is_an_error_before_anything_is_written(
    final, int8, name, value
) -> None:
    before = (int8 / SAFETENSORS).read_bytes()
    rewrite(final, lambda state: state[name].view(-1)[0].fill_(value))

    with pytest.raises(ModelError, match=rf"{name} holds values that are not finite.*train the"):
        write_int8(final, int8)

    assert (int8 / SAFETENSORS).read_bytes() == before
    assert {path.name for path in final.iterdir() if path.name.startswith(".")} == set()


def test_a_weight_with_the_name_of_a_scale_is_refused(final, tmp_path) -> None:
    rewrite(final, lambda state: state.update({f"{WORD}.scale": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"has a weight .*\.scale, which is the name of a scale"):
        write_int8(final, tmp_path / "int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.bias"), r"1 weights are missing \(classifier.bias\)"),
        (lambda s: s.update(more=torch.ones(1)), r"1 weights are unknown to the model \(more\)"),
        (
            lambda s: s.update({"classifier.bias": torch.ones(9)}),
            r"of another shape \(classifier.bias \[9\] instead of \[3\]\); copy the folder again",
        ),
        (lambda s: s.pop(f"{WORD}.scale"), rf"{WORD}.scale is missing, and must be torch.float32"),
        (
            lambda s: s.update({f"{WORD}.scale": torch.ones(4)}),
            rf"{WORD}.scale is torch.float32 \[4\], and must be torch.float32 \[60\]",
        ),
    ],
    ids=["missing", "extra", "shape", "no scale", "scale of another shape"],
)
def test_a_file_that_does_not_belong_to_its_config_is_refused(int8, change, message) -> None:
    rewrite(int8, change)
    with pytest.raises(ModelError, match=message):
        load_int8(int8)


@pytest.mark.parametrize(
    ("sealed", "kept", "message"),
    [
        (True, -1, r"is damaged: the checksum of model.safetensors differs"),
        (False, -10, "is cut short or damaged"),
    ],
)
def test_a_damaged_file_is_refused_with_and_without_checksums(int8, sealed, kept, message) -> None:
    content = (int8 / SAFETENSORS).read_bytes()
    (int8 / SAFETENSORS).write_bytes(content[:kept] + bytes(sealed))
    if not sealed:
        (int8 / CHECKSUMS).unlink()

    with pytest.raises(ModelError, match=message):
        load_int8(int8)


def test_folders_of_another_format_or_without_weights_are_refused(final, int8, tmp_path) -> None:
    with pytest.raises(ModelError, match=rf"does not hold int8 weights of megakd .*give {int8}"):
        load_int8(final)
    with pytest.raises(ModelError, match=r"nowhere.model.safetensors does not exist; give the"):
        load_int8(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is stored as int8; give the folder of the model in"):
        write_int8(int8, tmp_path / "again")
    rewrite(int8, lambda _: None, {"quantization": "int4"})
    with pytest.raises(ModelError, match=r"'int4', not 'int8 per row, symmetric'"):
        load_int8(int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForNothing"]}, "names the architecture 'BertForNothing', which"),
        ({"architectures": ["AutoTokenizer"]}, "names the architecture 'AutoTokenizer', which"),
        (None, "config.json does not exist; copy the folder again"),
        ({"model_type": "nothing"}, "is not the config of a model that megakd can build"),
        ({"hidden_size": "wide"}, "is not the config of a model that megakd can build"),
    ],
)
def test_a_config_that_is_absent_or_cannot_be_built_is_refused(int8, changes, message) -> None:
    (int8 / CHECKSUMS).unlink()
    config = int8 / "config.json"
    keys = json.loads(config.read_text())
    config.unlink()
    if changes is not None:
        config.write_text(json.dumps(keys | changes))
    with pytest.raises(ModelError, match=message):
        load_int8(int8)
