"""A vocabulary cut to a task's tokens: the same tokens and outputs, and nothing new is unknown."""

from __future__ import annotations

import copy
import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SENTENCES, reviews, save_tokenizer, write_jsonl
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "trim_vocabulary.py"
trim = runpy.run_path(str(SCRIPT))["trim"]
OTHERS = [row["text"] for row in reviews(40, "others")]
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
CASES = {
    "classifier": (AutoModelForSequenceClassification, BertConfig, "wordpiece"),
    "masked": (AutoModelForMaskedLM, BertConfig, "wordpiece"),
    "positions": (AutoModelForMaskedLM, RobertaConfig, "wordpiece"),
    "decoder": (AutoModelForCausalLM, LlamaConfig, "bpe"),
}


def folder_of(case: str, folder: Path, **keys: Any) -> Path:
    auto, config, kind = CASES[case]
    save_tokenizer(folder, [*SENTENCES, *OTHERS], kind=kind)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "eos")}
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 32, **SHAPE, **ids, **keys}
    torch.manual_seed(0)
    auto.from_config(config(**sizes)).save_pretrained(folder)
    return folder


def outputs(case: str, folder: Path, texts: list[str]) -> list[torch.Tensor]:
    # A copy, because results depend on where in memory weights begin.
    model = copy.deepcopy(CASES[case][0].from_pretrained(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_task_texts_have_the_same_outputs_and_others_no_new_unknown_token(tmp_path, case, tied):
    folder, to = folder_of(case, tmp_path / "whole", tie_word_embeddings=tied), tmp_path / "small"
    before, whole = outputs(case, folder, [*SENTENCES]), AutoTokenizer.from_pretrained(folder)

    line = trim(folder, to, [*SENTENCES])

    tokenizer, model = (auto.from_pretrained(to) for auto in (AutoTokenizer, CASES[case][0]))
    weights = sum(one.numel() for one in model.parameters())
    assert line.startswith(f"{len(tokenizer):,} tokens are kept; weights: ")
    assert line.endswith(f" -> {weights / 1e6:.2f}M")
    assert len(tokenizer) == model.config.vocab_size < len(whole)
    kept = whole.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    for one, other in zip(before, outputs(case, to, [*SENTENCES]), strict=True):
        wanted = one if case == "classifier" else one[..., kept]
        torch.testing.assert_close(other, wanted, atol=1e-6, rtol=0)
    assert_nothing_is_newly_unknown(whole, tokenizer)
    for role in ("pad", "eos"):
        name = f"{role}_token_id"
        assert getattr(model.config, name) == getattr(tokenizer, name)


def assert_nothing_is_newly_unknown(whole: Any, trimmed: Any) -> None:
    letters = sorted({letter for text in (*SENTENCES, *OTHERS) for letter in text})
    drawn = random.Random(0)
    words = ["".join(drawn.choices(letters, k=8)) for _ in range(200)]
    for text in (*OTHERS, *words):
        unknown, known = zip(*(read(one, text) for one in (whole, trimmed)), strict=True)
        assert unknown[0] == unknown[1]
        assert known[0] == known[1]


def read(tokenizer: Any, text: str) -> tuple[int, str]:
    """The number of unknown tokens of a text, and what is left of it."""
    unknown = tokenizer.tokenize(text).count(tokenizer.unk_token)
    return unknown, tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


def test_every_number_of_a_token_in_the_generation_config_follows(tmp_path):
    folder, to = folder_of("decoder", tmp_path / "whole"), tmp_path / "small"
    whole = AutoTokenizer.from_pretrained(folder)
    one, two, three = whole(OTHERS[0])["input_ids"][:3]
    others = {"max_new_tokens": three, "temperature": 0.5}

    def keys(one: int, two: int, three: int) -> dict[str, Any]:
        return others | {
            "eos_token_id": [one, two],
            "suppress_tokens": [three],
            "begin_suppress_tokens": [two, three],
            "bad_words_ids": [[one], [two, three]],
            "force_words_ids": [[[one, two]], [[three]]],
            "forced_decoder_ids": [[1, three]],
            "sequence_bias": [[[one, three], -1.5]],
        }

    (folder / "generation_config.json").write_text(json.dumps(keys(one, two, three)))

    trim(folder, to, [*SENTENCES])

    tokenizer = AutoTokenizer.from_pretrained(to)
    ids = tokenizer.convert_tokens_to_ids(whole.convert_ids_to_tokens([one, two, three]))
    assert ids[2] != three
    assert json.loads((to / "generation_config.json").read_text()) == keys(*ids)


def test_a_cut_that_would_move_the_positions_of_a_model_is_refused(tmp_path):
    folder = folder_of("positions", tmp_path / "whole", pad_token_id=90)

    with pytest.raises(SystemExit, match="outputs change: positions may follow the padding token"):
        trim(folder, tmp_path / "small", [*SENTENCES])


UNSPELLED = models.WordPiece({"[UNK]": 0, "a": 1, "ab": 2}, unk_token="[UNK]")  # noqa: S106
SUFFIX = {"end_of_word_suffix": "</w>", "unk_token": "a"}
WITH_SUFFIX = models.BPE({"a": 0, "b</w>": 1}, [], **SUFFIX)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0), "of this kind .Unigram. cannot be"),
        (UNSPELLED, "words with ab could become unknown; keep the whole vocabulary"),
        (WITH_SUFFIX, "of this kind .BPE. cannot be cut"),
    ],
    ids=["unigram", "unspelled", "suffix"],
)
def test_a_tokenizer_that_cannot_be_cut_safely_is_refused(tmp_path, model, message):
    folder = folder_of("classifier", tmp_path / "whole")
    (folder / "tokenizer_config.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)

    with pytest.raises(SystemExit, match=message):
        trim(folder, tmp_path / "small", ["a"])


def test_the_script_reads_columns_and_writes_a_folder_whole_or_not_at_all(tmp_path):
    folder, to = folder_of("classifier", tmp_path / "whole"), tmp_path / "small"
    write_jsonl(tmp_path / "rows.jsonl", [{"a": text, "b": None} for text in SENTENCES])
    texts = ("--texts", tmp_path / "rows.jsonl", "--columns", "a", "b")
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, texts), "--to", str(to)]

    first = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=False)

    assert re.fullmatch(rf"{re.escape(str(to))}\n\d+ tokens are kept; weights: .*\n", first.stdout)
    assert again.returncode == 2
    assert "exists; name a new folder" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "small", "whole"]
