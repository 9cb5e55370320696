"""`megakd encode`, which fills the cache that a run reads."""

from __future__ import annotations

import pytest
from chat_tokenizers import chat_tokenizer
from tiny_runs import run_in, write_reviews

from megakd.data.arrow import cache_folder


@pytest.mark.parametrize("kind", ["classification", "mlm"])
def test_a_run_reads_what_encode_has_written(one_rank, tmp_path, kind):
    texts = write_reviews(tmp_path / "texts", train=53)  # a number of rows that no other test has
    config = run_in(tmp_path, {"type": kind, "dataset": str(texts), "text_columns": ["text"]})

    answer = one_rank.megakd("encode", config, code=0)

    assert "encoding the rows of train" in answer.err
    assert f"{cache_folder()}: 53 training, 26 validation rows, " in answer.out
    assert " tokens per row" in answer.out
    assert not answer.loaded
    assert "encoding the rows" not in one_rank.train("--config", config, code=0).err


def test_of_a_stream_only_the_held_out_rows_are_encoded(one_rank, tmp_path):
    texts = write_reviews(tmp_path / "texts")
    chat_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    task = {"type": "causal_lm", "dataset": str(texts), "text_columns": ["text"]}
    settings = ("task.streaming=true", "train.max_steps=2", f"task.tokenizer={tmp_path}/tokenizer")

    answer = one_rank.megakd("encode", run_in(tmp_path, task), *settings, code=0)

    assert " validation rows" in answer.out
    assert "training" not in answer.out
