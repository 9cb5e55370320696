"""Folders of encoded data: the rows of a run, resumed shard by shard, refused with a reason."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from tiny_runs import reviews, write_jsonl

from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.data import encoded_folder
from megakd.data.encoded_folder import MANIFEST, as_encoded, facts_of, open_splits, write_encoded
from megakd.data.encoding import encode_splits
from megakd.data.splits import load_splits
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import DataError


class Data:
    """The data of a run, loaded and encoded by the run itself and by way of a folder."""

    def __init__(self, folder, kind, count=57, **keys):
        write_jsonl(folder / "rows.jsonl", reviews(count, "train"))
        write_jsonl(folder / "more.jsonl", reviews(9, "more"))
        self.cache, self.folder = folder / "cache", folder / "encoded"
        names = {"dataset": str(folder / "rows.jsonl"), "text_columns": ("text",)}
        sets = {"more": str(folder / "more.jsonl")}
        recipe = TokenizerConfig(type="bpe" if kind == "causal_lm" else "wordpiece", vocab_size=300)
        base = {"max_length": 16, "tokenizer": recipe, "evaluation_sets": sets, **names}
        self.task = TaskConfig(**{"type": kind, **base, **keys})
        self.splits = load_splits(self.task, seed=1, cache_dir=self.cache)
        self.tokenizer = load_tokenizer(
            self.task, self.splits, model_folders=[], cache_dir=self.cache
        )

    def facts(self, **changes):
        task = dataclasses.replace(self.task, **changes)
        return facts_of(task, self.tokenizer, seed=1)

    def write(self, **changes):
        facts = self.facts(**changes)
        write_encoded(self.folder, self.splits, self.tokenizer, self.task, facts=facts)

    def by_the_run(self):
        return encode_splits(self.splits, self.tokenizer, self.task, cache_dir=self.cache)

    def from_folder(self, **changes):
        return as_encoded(
            self.folder, open_splits(self.folder), self.tokenizer, self.facts(**changes)
        )


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of ten texts."""
    monkeypatch.setattr(encoded_folder, "TEXTS_PER_SHARD", 10)


@pytest.fixture
def written(tmp_path):
    """A classification whose folder is written."""
    data = Data(tmp_path, "classification")
    data.write()
    return data


def plain(encoded):
    """All rows of encoded data as Python values."""
    sets = {name: rows.to_dict() for name, rows in encoded.evaluation_sets.items()}
    return {"train": encoded.train.to_dict(), "held": encoded.validation.to_dict(), **sets}


@pytest.mark.parametrize("kind", ["classification", "mlm", "causal_lm"])
@pytest.mark.usefixtures("small_shards")
def test_the_folder_has_the_rows_and_the_key_of_the_run(tmp_path, kind):
    data = Data(tmp_path, kind)
    data.write()

    actual, expected = data.from_folder(), data.by_the_run()

    assert plain(actual) == plain(expected)
    assert actual.content_hash == expected.content_hash
    assert actual.tokens_per_row == expected.tokens_per_row
    assert len(list(data.folder.glob("train-*.arrow"))) > 2


def watched_shards(monkeypatch, stop_after=None):
    """The names of the shards from now on; the one after so many is cut short by Ctrl+C."""
    written, write_tables = [], encoded_folder.write_tables

    def write(path, tables):
        if len(written) == stop_after:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        write_tables(path, tables)

    monkeypatch.setattr(encoded_folder, "write_tables", write)
    return written


@pytest.mark.parametrize("kind", ["mlm", "causal_lm"])
@pytest.mark.usefixtures("small_shards")
def test_a_stopped_call_goes_on_after_its_last_whole_shard(tmp_path, monkeypatch, kind):
    data = Data(tmp_path, kind)
    with monkeypatch.context() as patch:
        written = watched_shards(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            data.write()
    with pytest.raises(DataError, match=r"is not finished; start `megakd encode`"):
        data.from_folder()
    again = watched_shards(monkeypatch)

    data.write()

    assert plain(data.from_folder()) == plain(data.by_the_run())
    assert not set(written) & set(again)
    made = list(again)
    data.write()
    assert again == made  # a finished folder is left as it is


def test_a_call_that_has_written_no_shard_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    data = Data(tmp_path, "classification")
    with monkeypatch.context() as patch:
        watched_shards(patch, stop_after=0)
        with pytest.raises(KeyboardInterrupt):
            data.write()
    assert not list(data.folder.glob("*.arrow"))
    (data.folder / "train-00000-of-00001.arrow").write_bytes(b"killed")
    other = Data(tmp_path, "classification", max_length=5)

    other.write()

    assert plain(other.from_folder()) == plain(other.by_the_run())


def test_other_settings_texts_and_tokenizers_are_refused_with_both_values(written, tmp_path):
    with pytest.raises(DataError, match=r"task.max_length: 16 there, 32 here"):
        written.from_folder(max_length=32)
    with pytest.raises(DataError, match=r"task.max_length: 16 there, 32 here.*another folder"):
        written.write(max_length=32)
    written.tokenizer.add_tokens(["another"])
    with pytest.raises(DataError, match=r"tokenizer.tokens: \d+ there, \d+ here"):
        written.from_folder()
    shutil.rmtree(written.cache)
    with pytest.raises(DataError, match=r"holds data of other settings or texts \(.*key: "):
        Data(tmp_path, "classification", count=80).write()


def test_the_seed_counts_only_if_it_chooses_labels(written):
    fewer = dataclasses.replace(written.task, labelled_examples=10)

    first, second = (
        [facts_of(task, written.tokenizer, seed=seed) for task in (written.task, fewer)]
        for seed in (1, 2)
    )

    assert first[0] == second[0]
    assert first[1] != second[1]


def test_another_version_and_a_damaged_file_are_refused(small_shards, written, monkeypatch):
    shard = next(written.folder.glob("train-00001-*"))
    whole = shard.read_bytes()

    for content, damage in (
        (whole[:-1], f"{shard.name} has {len(whole) - 1} bytes"),
        (whole[:-1] + b"x", f"the checksum of {shard.name} differs"),
    ):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=f"is damaged: {damage}"):
            written.from_folder()
    shard.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(encoded_folder, "FORMAT", 2)
        with pytest.raises(DataError, match=r"has format 1, and this version .* reads format 2"):
            written.from_folder()
    with monkeypatch.context() as patch:
        patch.setattr(encoded_folder, "ROWS_VERSION", 999)
        with pytest.raises(DataError, match=r"other settings \(version.rows: \d+ there, 999 here"):
            written.from_folder()
    manifest = written.folder / MANIFEST
    manifest.write_text(manifest.read_text().replace("task.max_length", "task.max_lengths"))
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(its checksum differs\)"):
        open_splits(written.folder)


def test_a_folder_that_is_not_there_names_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_folder.socket, "gethostname", lambda: "node-7")

    with pytest.raises(DataError, match=r"nowhere does not exist on node-7; write it with"):
        open_splits(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thesis.tex", "mine", r"holds other files \(thesis.tex\); give an empty folder"),
        ("progress.json", "{", r"progress\.json is damaged .* remove "),
    ],
)
def test_a_folder_with_other_files_or_a_damaged_record_is_refused(tmp_path, name, content, message):
    data = Data(tmp_path, "classification")
    data.folder.mkdir()
    (data.folder / name).write_text(content)

    with pytest.raises(DataError, match=message):
        data.write()
    assert not (data.folder / MANIFEST).exists()


@pytest.mark.parametrize(("shard", "length"), [(1, 2), (3, 40), (12, 7)])
def test_packed_rows_do_not_depend_on_the_size_of_the_shards(tmp_path, monkeypatch, shard, length):
    data = Data(tmp_path, "causal_lm", count=13, max_length=length)
    monkeypatch.setattr(encoded_folder, "TEXTS_PER_SHARD", shard)
    data.write()

    assert plain(data.from_folder()) == plain(data.by_the_run())
