"""A vocabulary cut to a task's tokens: the same tokens and outputs, and nothing new is unknown."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SENTENCES, reviews, save_tokenizer
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

from megakd.errors import DataError, ModelError
from megakd.models.trimming import trim_vocabulary

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
def test_texts_of_the_task_have_the_same_outputs_and_all_others_no_new_unknown_token(
    tmp_path, case, tied
):
    folder = folder_of(case, tmp_path, tie_word_embeddings=tied)
    before, whole = outputs(case, folder, [*SENTENCES]), AutoTokenizer.from_pretrained(folder)

    trimmed = trim_vocabulary(folder, lambda: SENTENCES)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert trimmed.tokens == (len(whole), len(tokenizer))
    assert len(tokenizer) < len(whole)
    kept = whole.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    for one, other in zip(before, outputs(case, folder, [*SENTENCES]), strict=True):
        wanted = one if case == "classifier" else one[..., kept]
        torch.testing.assert_close(other, wanted, atol=0 if case == "classifier" else 1e-6, rtol=0)
    assert_nothing_is_newly_unknown(whole, tokenizer)


def assert_nothing_is_newly_unknown(whole: Any, trimmed: Any) -> None:
    letters = sorted({letter for text in (*SENTENCES, *OTHERS) for letter in text})
    drawn = random.Random(0)
    words = ["".join(drawn.choices(letters, k=8)) for _ in range(200)]
    for text in (*OTHERS, *words):
        unknown = (one.tokenize(text).count(one.unk_token) for one in (whole, trimmed))
        assert len({*unknown}) == 1
        assert trimmed.decode(trimmed(text)["input_ids"], skip_special_tokens=True) == whole.decode(
            whole(text)["input_ids"], skip_special_tokens=True
        )


def test_sizes_and_special_tokens_of_the_folder_are_renumbered(tmp_path):
    folder = folder_of("decoder", tmp_path)

    before, after = trim_vocabulary(folder, lambda: SENTENCES).parameters

    config = json.loads((folder / "config.json").read_text())
    model, tokenizer = (
        auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert config["vocab_size"] == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert (config["pad_token_id"], config["eos_token_id"]) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    assert after == sum(one.numel() for one in model.parameters()) < before


def test_a_cut_that_would_move_the_positions_of_a_model_is_refused(tmp_path):
    folder = folder_of("positions", tmp_path, pad_token_id=90)
    weights = (folder / "model.safetensors").read_bytes()

    with pytest.raises(ModelError, match=r"roberta model counts positions .* padding token, 90,"):
        trim_vocabulary(folder, lambda: SENTENCES)

    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0), "of the kind Unigram .* only WordP"),
        (
            models.WordPiece({"[UNK]": 0, "a": 1, "ab": 2}, unk_token="[UNK]"),  # noqa: S106
            "words with ab could become unknown, because the tokenizer has no piece ##b; keep",
        ),
        (
            models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>", unk_token="a"),  # noqa: S106
            "a BPE tokenizer that marks pieces inside words cannot be cut",
        ),
    ],
    ids=["unigram", "unspelled", "suffix"],
)
def test_a_tokenizer_that_cannot_be_cut_safely_is_refused(tmp_path, model, message):
    folder = folder_of("classifier", tmp_path)
    (folder / "tokenizer_config.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()

    with pytest.raises(DataError, match=message):
        trim_vocabulary(folder, lambda: ["a"])

    assert (folder / "model.safetensors").read_bytes() == weights
