import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megakd.errors import ModelError
from megakd.models.weights import WeightReader, check_weight_files


def refusal(folder, **flags):
    with pytest.raises(ModelError) as caught:
        check_weight_files(folder, "teacher.model", **flags)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for key, name in names.items():
        save_file({key: torch.full((2,), ord(key))}, tmp_path / name)
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_whole_file_gives_its_tensors_with_shape_and_dtype(tmp_path):
    values = {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 2), "half": torch.ones(3).half()}
    values["whole"] = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    save_file(values, tmp_path / "model.safetensors")

    stored, reader = check_weight_files(tmp_path, "teacher.model"), WeightReader("teacher.model")

    for key, value in values.items():
        assert (stored[key].shape, stored[key].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(reader.read(stored[key]), value)
    for start, stop in [(0, 12), (5, 7), (4, 11), (12, 12)]:
        part = values["whole"].flatten()[start:stop]
        assert torch.equal(reader.part(stored["whole"], start, stop), part)


@pytest.mark.parametrize(("dimension", "places"), [(0, (2, 0)), (1, (3, 1, 2)), (1, ())])
def test_chosen_rows_and_columns_are_read_as_a_tensor_of_their_own(tmp_path, dimension, places):
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    save_file({"whole": whole}, tmp_path / "model.safetensors")
    stored = check_weight_files(tmp_path, "teacher.model")["whole"].chosen(dimension, places)
    reader, expected = (
        WeightReader("teacher.model"),
        whole.index_select(dimension, torch.tensor(places, dtype=torch.long)),
    )

    assert stored.shape == tuple(expected.shape)
    assert torch.equal(reader.read(stored), expected)
    for start in range(expected.numel() + 1):
        for stop in range(start, expected.numel() + 1):
            assert torch.equal(reader.part(stored, start, stop), expected.flatten()[start:stop])
    twice = stored.chosen(0, (1,)).rounded(torch.bfloat16)
    assert torch.equal(reader.read(twice), expected[1:2].bfloat16())


def test_shards_are_read_as_one_checkpoint(shards):
    stored = check_weight_files(shards, "teacher.model")
    reader = WeightReader("teacher.model")
    assert [int(reader.read(stored[key])[0]) for key in "aba"] == [97, 98, 97]


# Cut in the header's length, in the header, and in the data.
@pytest.mark.parametrize(("kept", "more"), [(4, b""), (40, b""), (-1, b""), (None, b"more")])
def test_a_file_that_is_cut_or_has_bytes_to_spare_is_named_with_its_bytes(folder, kept, more):
    file = folder / "model.safetensors"
    content = file.read_bytes()[:kept] + more
    file.write_bytes(content)

    expected = f"teacher.model: {file} ({len(content)} bytes) is cut short or damaged, "
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ([1], "is cut short or damaged"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "is cut short or damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "is cut short or damaged"),
        ({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, "holds a as F4, which can"),
    ],
    ids=["no offsets", "no mapping", "wrong size", "gap", "dtype"],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header, expected):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("model-2.safetensors", Path.unlink, "1 of them do not exist (model-2.safetensors)"),
        (
            "model-2.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            "model-2.safetensors (79 bytes) is cut short or damaged",
        ),
        (
            "model.safetensors.index.json",
            lambda file: file.write_text("[]"),
            "model.safetensors.index.json is not a weight index",
        ),
    ],
    ids=["missing", "damaged", "index"],
)
def test_shards_that_do_not_fit_their_index_are_refused(shards, name, damage, expected):
    damage(shards / name)
    assert expected in refusal(shards)


def test_folders_without_weights_are_told_apart(tmp_path):
    assert "absent does not exist" in refusal(tmp_path / "absent")
    assert "has no weights: neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "; convert pytorch_model.bin to safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer, not weights: run git lfs pull" in refusal(tmp_path)


def test_a_file_that_shrinks_after_the_check_is_named(folder):
    stored = check_weight_files(folder, "teacher.model")["b"]
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"safetensors ended after 19 of the 24 bytes of b"):
        WeightReader("teacher.model").read(stored)


def test_a_sample_tells_weights_of_the_same_shapes(tmp_path):
    def sample(name, number):
        (tmp_path / name).mkdir()
        values = {"a": torch.full((5, 2), number), "empty": torch.ones(0)}
        save_file(values, tmp_path / name / "model.safetensors")
        stored = check_weight_files(tmp_path / name, "teacher.model").values()
        return WeightReader("teacher.model").sample(stored)

    first, copied, other = (sample(f"{n}", n // 2 * 1.0) for n in range(3))

    assert first == copied != other
