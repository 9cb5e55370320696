"""`megakd export --vocabulary task`: a folder for transformers, scored before and after."""

from __future__ import annotations

import json
import re

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_run import read

TOKENS = r"tokens: (\d+) before, (\d+) now; weights: ([\d.]+k) before, ([\d.]+k) now"


def test_an_export_with_the_tokens_of_the_task_answers_as_before(one_rank, whole_run, tmp_path):
    out, to = whole_run.out, tmp_path / "small"

    outcome = one_rank.megakd("export", whole_run.config, "--to", to, "--vocabulary", "task")

    assert outcome.code == 0, outcome.err
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


def test_a_run_without_texts_is_refused(one_rank, whole_run, tmp_path):
    words = ("--to", tmp_path / "x", "--vocabulary", "task", "task.streaming=true")
    outcome = one_rank.megakd("export", whole_run.config, *words)

    assert outcome.code == 2
    assert not (tmp_path / "x").exists()
