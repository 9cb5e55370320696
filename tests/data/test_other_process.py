"""What does not depend on the process, its hash seed, or the place of the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from chat_tokenizers import chat_tokenizer
from datasets import Dataset
from other_process import said_elsewhere
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data.arrow import rows_key
from megakd.data.encoding import tokenizer_content
from megakd.data.loader import RowOrder
from megakd.data.pydocs import pydocs_rows
from megakd.data.step_layout import StepShape
from megakd.data.vocabularies import train_tokenizer

SENTENCES = [
    "The student reads the letter of the teacher!",
    "Letters, students and teachers: 42 naïve words.",
    "A student writes to another student.",
]
KINDS = ("wordpiece", "bpe", "unigram")


def facts_of(folder: Path) -> str:
    """Keys of encoded rows, the order of a loader, the hash of a corpus and trained tokenizers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    corpus = TaskConfig(type="causal_lm", dataset="pydocs")
    result = pydocs_rows(corpus, cache_dir=folder / "cache", roots=[folder / "site-packages"])
    trained = [
        train_tokenizer(lambda: SENTENCES * 5, kind=kind, vocab_size=400, for_encoder=True)
        for kind in KINDS
    ]
    facts = [tokenizer_content(tokenizer), rows_key(rows), result.source_hash]
    facts.append(str(RowOrder(np.arange(50), StepShape(5, 1), seed=3)(13).tolist()))
    return json.dumps([*facts, *(made.backend_tokenizer.to_str() for made in trained)])


def write(folder: Path, packages: tuple[str, ...]) -> Path:
    for name in packages:
        (folder / "site-packages" / name).mkdir(parents=True)
        text = "\n".join(f'def f{n}():\n    """Of {name}: {SENTENCES[n]}"""' for n in range(3))
        (folder / "site-packages" / name / "m.py").write_text(text, encoding="utf-8")
    chat_tokenizer("chatml").save_pretrained(folder / "tokenizer")
    return folder


def test_keys_order_corpus_and_trained_tokenizers_do_not_depend_on_the_process(tmp_path):
    here = write(tmp_path / "here", ("other", "sympy", "torch"))
    there = write(tmp_path / "moved" / "there", ("torch", "sympy", "other"))

    assert said_elsewhere(__file__, "facts_of", there) == facts_of(here)
