"""Facts of results, and the differences of two."""

from __future__ import annotations

from pathlib import Path

from megakd.process.record import differences, files_identity, flatten

MEGABYTE = 1 << 20


def test_a_tree_becomes_dotted_keys_with_list_items_by_position():
    tree = {"train": {"max_steps": 3}, "objective": [{"weight": 0.5}, {"weight": None}], "seed": 1}

    weights = {"objective.0.weight": 0.5, "objective.1.weight": None}
    assert flatten(tree) == {"train.max_steps": 3, **weights, "seed": 1}
    assert flatten({"pairs": ("1:2", "2:4")}) == flatten({"pairs": ["1:2", "2:4"]})


def test_differing_fields_are_named_with_both_values_also_where_one_side_has_none():
    text = differences({"a": 1, "b": "x", "c": 0}, {"a": 2, "b": "x", "d": None})

    assert text == "a: 1 there, 2 here; c: 0 there, absent here; d: absent there, None here"
    assert differences({"a": 1, "b": None}, {"b": None, "a": 1}) == ""
    many = differences(dict.fromkeys("abcdefgh", 1), dict.fromkeys("abcdefgh", 2))
    assert many.count("there") == 5
    assert many.endswith("; and 3 more")


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_another_name_size_or_byte_anywhere_is_another_identity(tmp_path):
    content = bytes(3 * MEGABYTE)
    middle = len(content) // 2
    variants = {
        "w.bin": content,
        "v.bin": content,
        "size/w.bin": content + b"\0",
        "first/w.bin": b"x" + content[1:],
        "middle/w.bin": content[:middle] + b"x" + content[middle + 1 :],
        "last/w.bin": content[:-1] + b"x",
    }

    result = [files_identity([write(tmp_path / name, c)]) for name, c in variants.items()]

    assert len(set(result)) == len(variants)
    assert files_identity([write(tmp_path / "same" / "w.bin", content)]) == result[0]
    # A file that is written anew is read anew.
    write(tmp_path / "other.bin", b"abd").replace(tmp_path / "w.bin")
    assert files_identity([tmp_path / "w.bin"]) != result[0]


def test_of_a_large_file_every_large_matrix_counts_and_the_last_byte(tmp_path):
    """Files of zeros, but for what was trained at some place in them."""
    size, matrix = 300 * MEGABYTE + 12_345, b"x" * 2 * MEGABYTE
    places = {0: b"", 1: matrix, 100 * MEGABYTE + 777: matrix, 200 * MEGABYTE: matrix}
    places |= {size - len(matrix): matrix, size - 1: b"x"}

    files = [write(tmp_path / str(at) / "w.bin", b"") for at in places]
    for path, (at, trained) in zip(files, places.items(), strict=True):
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(at)
            file.write(trained)

    assert len({files_identity([path]) for path in files}) == len(places)
