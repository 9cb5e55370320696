"""`megakd export --vocabulary task`: a folder for transformers, scored before and after."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from chat_runs import config_of, model
from tiny_runs import run_in, write_jsonl, write_text
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_run import finish, read

from megakd.config.file import dump_config
from megakd.models.int8 import load_int8

TOKENS = r"tokens: (\d+) before, (\d+) now; weights: ([\d.]+k) before, ([\d.]+k) now"


def test_an_export_with_the_tokens_of_the_task_answers_as_before(one_rank, whole_run, tmp_path):
    out, to = whole_run.out, tmp_path / "small"

    words = ("--to", to, "--vocabulary", "task", "save.int8=true")
    outcome = one_rank.megakd("export", whole_run.config, *words, code=0)

    folder, tokens, scores = outcome.out.splitlines()
    whole, kept = (AutoTokenizer.from_pretrained(one) for one in (out / "final", to))
    numbers = re.fullmatch(TOKENS, tokens)
    assert numbers
    assert folder == str(to)
    assert [int(n) for n in numbers.groups()[:2]] == [len(whole), len(kept)]
    accuracy = f"{read(out)['student']['metrics']['accuracy']:.1%}"
    assert scores == f"accuracy on validation (26 rows): {accuracy} before, {accuracy} now"
    model = AutoModelForSequenceClassification.from_pretrained(to)
    assert model.config.vocab_size == len(kept) < len(whole)
    assert json.loads((to / "checksums.json").read_text())
    small = load_int8(to / "int8").get_input_embeddings().weight
    assert len(small) == len(kept)


def test_rows_that_are_scored_keep_no_token(one_rank, whole_run, tmp_path):
    """Without test rows these are the validation rows, whose score would stay as it was."""
    data = Path(shutil.copytree(whole_run.reviews, tmp_path / "data"))
    rows = [{"text": "good", "label": "positive"}, {"text": "bad", "label": "negative"}]
    write_jsonl(data / "train.jsonl", rows * 32)
    words = ("--to", tmp_path / "small", "--vocabulary", "task", f"task.dataset={data}")

    outcome = one_rank.megakd("export", whole_run.config, *words, code=0)

    whole, kept = (
        AutoTokenizer.from_pretrained(one).get_vocab()
        for one in (whole_run.out / "final", tmp_path / "small")
    )
    assert {"good", "awful"} & whole.keys() == {"good", "awful"}
    assert {"good", "awful"} & kept.keys() == {"good"}
    assert "accuracy on validation (26 rows): " in outcome.out


def test_a_language_model_shows_no_loss_per_token_of_two_vocabularies(one_rank, tmp_path):
    splits = ("train", "validation")
    files = {f"{split}_files": str(write_text(tmp_path / f"{split}.txt")) for split in splits}
    task = {"type": "causal_lm", **files}
    config = run_in(tmp_path, task)
    finish(one_rank, config)

    outcome = one_rank.megakd("export", config, "--to", tmp_path / "x", "--vocabulary", "task")

    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 2
    words = ("--to", tmp_path / "y", "--vocabulary", "task")
    refused = one_rank.megakd("export", config, *words, "task.streaming=true", code=2)
    assert "conversations and streams have none" in refused.err


def test_conversations_are_refused_because_their_template_needs_tokens_too(one_rank, tmp_path):
    model(tmp_path / "teacher")
    path = tmp_path / "chat.yaml"
    path.write_text(dump_config(config_of(tmp_path, end_tokens="accept")))

    outcome = one_rank.megakd("export", path, "--to", tmp_path / "x", "--vocabulary", "task")

    assert outcome.code == 2
    assert "conversations and streams have none" in outcome.err
    assert not (tmp_path / "x").exists()
