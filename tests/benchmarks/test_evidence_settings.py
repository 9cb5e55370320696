"""The settings of the evidence: their splits are the rows of the data."""

from __future__ import annotations

import csv

from evidence_settings import SETTINGS, read_table


def test_splits_are_disjoint_and_keep_every_row_text(tmp_path):
    folder = tmp_path / "banking77"
    folder.mkdir()
    for name, count in {"train": 1100, "test": 5}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = ((f'say "{number}",\n twice', "a") for number in range(count))
            csv.writer(file).writerows([("text", "category"), *rows])

    SETTINGS["banking77-few"].write_splits(tmp_path, tmp_path / "out")

    found = {
        split: [
            text
            for text, _ in read_table(
                tmp_path / f"out/{split}.csv", ("text", "label"), delimiter=","
            )
        ]
        for split in ("train", "validation", "test")
    }
    assert {split: len(texts) for split, texts in found.items()} == {
        "train": 100,
        "validation": 1000,
        "test": 5,
    }
    assert not {*found["train"]} & {*found["validation"]}
    assert found["test"][3] == 'say "3",\n twice'
