"""The benchmark of caches: its runs are valid and alike, its numbers are right."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cache_draws  # noqa: E402
from launching import write_config  # noqa: E402


@pytest.fixture
def given(tmp_path) -> argparse.Namespace:
    return cache_draws.parse(["--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_variants_are_valid_and_differ_in_the_cache_alone(given):
    write_config(given.out / "run.yaml", cache_draws.config(given))

    found = {}
    for name in cache_draws.VARIANTS:
        leg = cache_draws.leg(given, name, 7)
        found[name] = load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"])

    assert {config.seed for config in found.values()} == {7}
    assert len({(c.train, c.objective, c.task.dataset) for c in found.values()}) == 1
    teachers = {name: config.teacher for name, config in found.items()}
    assert teachers["full"].cache is None
    assert (teachers["top_8"].cache_top_k, teachers["top_8"].cache_draws) == (8, None)
    assert (teachers["draws_16"].cache_draws, teachers["draws_16"].cache_seed) == (16, 7)


def test_every_seed_has_its_own_draws_and_the_most_likely_tokens_are_shared(given):
    draws, best = (
        {cache_draws.cache_folder(given, name, seed) for seed in (1, 2)}
        for name in ("draws_16", "top_8")
    )

    assert (len(draws), len(best)) == (2, 1)


def test_the_divergence_is_that_of_full_logits(tmp_path):
    words = ("a", "b", "c")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    sizes = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=1.0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in ("teacher", "student", "tokenizer")]

    found = cache_draws.divergence(*folders, ["a b c", "b"])

    logits = [
        torch.cat([LlamaForCausalLM.from_pretrained(f)(torch.tensor([ids])).logits[0]
                   for ids in ([0, 1, 2], [1])])
        for f in folders[:2]
    ]  # fmt: skip
    p, q = (one.double().softmax(-1) for one in logits)
    assert found == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-6)
    assert cache_draws.divergence(folders[0], folders[0], folders[2], ["a b"]) == 0


def test_the_bytes_are_those_of_all_files(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "ids.npy").write_bytes(bytes(1000))
    (tmp_path / "cache.json").write_text(json.dumps({"rows": 2}))
    extra = (tmp_path / "cache.json").stat().st_size

    assert cache_draws.bytes_per_token(tmp_path) == (1000 + extra) / (2 * cache_draws.LENGTH)


def test_the_table_has_divergences_and_sizes(capsys):
    scores = {"full": [0.1, 0.3], "draws_16": [0.2, 0.2]}

    cache_draws.show(scores, {"draws_16": 80.1}, "the command")

    said = capsys.readouterr().out
    assert "full  0.2000 ±0.1414" in said
    assert "draws_16  0.2000 ±0.0000             80.1" in said
    assert "bytes per token: draws_16 80.1" in said
