"""Real runs, the quickstart's seeds and the data that they read: valid configs, right numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import launching, stories
from megakd.config.file import load_config
from methods import cache_draws, on_policy, real_runs

ROOT = launching.ROOT
MERGED = (" a", "b", " ab", "c", "bc", "a")


def report(*, distilled: float, alone: float, metric: str = "accuracy", **stages: float) -> dict:
    def model(value: float, parameters: int) -> dict:
        return {"parameters": parameters, "metrics": {metric: value}}

    seconds = {"student": 12.0, "alone": 8.0, **stages}
    return {
        "metric_name": metric,
        "evaluated_on": "test",
        "teacher": model(0.9, 800),
        "student": model(distilled, 100),
        "baselines": {"alone": {metric: alone}},
        "stages": [{"name": name, "seconds": value} for name, value in seconds.items()],
    }


def valid(tree: dict, folder: Path):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **tree}))
    return load_config(path)


@pytest.mark.parametrize("name", list(real_runs.CASES))
def test_a_real_run_is_a_valid_config_with_a_baseline(name, tmp_path):
    assert valid(real_runs.CASES[name].config(tmp_path), tmp_path).baselines == ("alone",)


def test_minidisc_and_maxidisc_are_run_and_compared_seed_by_seed(monkeypatch, capsys, tmp_path):
    calls = []

    def trained(config, output, *, ranks, overrides):
        calls.append((output.parent.name, overrides[-2:]))
        if "maxidisc" in output.parent.name:
            return report(distilled=0.5, alone=0.4, trial=36.0) | {"baselines": {}}
        return report(distilled=0.6, alone=0.4, **{"teacher-finetune": 100.0})

    monkeypatch.setattr(real_runs, "trained", trained)
    monkeypatch.setattr(real_runs, "fetch_teacher", lambda: None)

    words = ["quickstart", "--seeds", "1,2", "--output", str(tmp_path), "--maxidisc", "seed=9"]
    assert real_runs.main(words) == 0

    assert calls == [
        (f"quickstart{kind}", ["seed=9", f"seed={seed}"])
        for seed in (1, 2)
        for kind in ("", "-maxidisc")
    ]
    shown = capsys.readouterr().out
    assert "distilled 0.6000; alone 0.4000; gain 0.2000; 800 to 100 parameters (8.0x)" in shown
    assert "training 120 s" in shown
    lines = shown.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.endswith("share"))
    assert lines[heading + 1].split() == ["1", "0.6", "0.5", "0.1", "12", "56", "0.2143"]


def test_maxidisc_tries_every_assistant_of_the_quickstarts_grid(tmp_path):
    overrides = [*real_runs.maxidisc(), f"output_dir={tmp_path}"]

    config = load_config(ROOT / real_runs.QUICKSTART, overrides)

    plain = load_config(ROOT / real_runs.QUICKSTART, [])
    assert (config.method.name, config.baselines) == ("maxidisc", ())
    assert config.method.sparsities == plain.method.sparsities
    assert config.method.target_sparsity == plain.method.target_sparsity
    assert config.teacher == plain.teacher


def write_llama2c(path: Path, pieces: tuple[str, ...]) -> Path:
    """Begins as every such file does; of the pieces the first has the best score."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *bytes_, *pieces]
    content = struct.pack("<i", 7)
    for index, text in enumerate(texts):
        encoded = text.encode()
        content += struct.pack("<fi", -float(max(0, index - 259)), len(encoded)) + encoded
    path.write_bytes(content)
    return path


def test_pieces_have_their_usual_names_and_a_file_that_ends_early_is_refused(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", MERGED)

    pieces = stories.read_pieces(path)
    path.write_bytes(path.read_bytes()[:-1])

    assert [piece.text for piece in pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [piece.text for piece in pieces[259:]] == ["▁a", "b", "▁ab", "c", "bc", "a"]
    with pytest.raises(ValueError, match="ends in the middle of piece 264"):
        stories.read_pieces(path)


def test_the_better_merge_comes_first_and_an_unknown_character_is_its_bytes(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", ("bc", "ab", "▁", "a", "b", "c"))
    tokenizer = stories.stories_tokenizer(stories.read_pieces(path))

    ids = tokenizer("a\né")["input_ids"]

    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["<s>", "▁", "a", "bc"]
    assert tokenizer.convert_ids_to_tokens(ids)[3:] == ["<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\né"


def test_the_stories_model_knows_the_converted_tokenizer(shared_data, tmp_path):
    stories.write_stories_tokenizer(shared_data, tmp_path)
    texts = json.loads((shared_data / stories.STORIES).read_text(encoding="utf-8"))[:100]
    model = shared_data / stories.MODEL / "hf"
    loss = stories.nats_per_token(model, tmp_path / "tokenizer", texts)
    assert loss == pytest.approx(1.663, abs=0.005)


def test_the_variants_of_a_cache_are_valid_and_differ_in_the_cache_alone(tmp_path, load):
    given = cache_draws.parse(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    launching.write_config(given.out / "run.yaml", cache_draws.config(given))

    found = load(cache_draws.leg(given, name, 7) for name in cache_draws.VARIANTS)

    assert {config.seed for config in found.values()} == {7}
    assert len({(c.train, c.objective, c.task.dataset) for c in found.values()}) == 1
    teachers = {name: config.teacher for name, config in found.items()}
    assert teachers["full"].cache is None
    assert (teachers["top_8"].cache_top_k, teachers["top_8"].cache_draws) == (8, None)
    assert (teachers["draws_16"].cache_draws, teachers["draws_16"].cache_seed) == (16, 7)
    folders = [cache_draws.cache_folder(given, n, s) for n in ("top_8", "draws_16") for s in (1, 2)]
    assert len({*folders}) == 3  # the most likely tokens are the same for every seed


def test_the_divergence_of_a_cached_student_is_that_of_full_logits(tmp_path):
    vocabulary = {word: number for number, word in enumerate("abc")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    sizes = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=1.0)
    both = [LlamaForCausalLM(config).eval() for _ in range(2)]
    for model, name in zip(both, ("teacher", "student"), strict=True):
        model.save_pretrained(tmp_path / name)
    teacher, student = tmp_path / "teacher", tmp_path / "student"

    found = cache_draws.divergence(teacher, student, tmp_path, ["a b c"])

    ids = tokenizer.encode("a b c").ids
    p, q = (model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in both)
    assert found == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-6)
    assert cache_draws.divergence(teacher, teacher, tmp_path, ["a b"]) == 0


def test_the_sums_have_partial_sums_a_token_per_character_and_no_prompt_in_both_splits(tmp_path):
    on_policy.write_data(tmp_path)
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    for row in rows["validation"]:
        digits = [int(digit) for digit in row["prompt"].rstrip("=").split("+")]
        sums = [str(sum(digits[:count])) for count in range(2, len(digits) + 1)]
        assert row["completion"].split(",") == sums
    trained = {row["prompt"] for row in rows["train"]}
    assert len(trained) == len(rows["train"])
    assert not trained & {row["prompt"] for row in rows["validation"]}
    assert len(tokenizer("12+3=15,").input_ids) == 8


def test_the_students_of_sums_are_valid_take_equal_steps_and_only_two_write_texts(tmp_path):
    given = on_policy.parse(["--out", str(tmp_path)])
    arms = {name: on_policy.arm(given, name, tmp_path / "start") for name in on_policy.ARMS}

    for tree in (*arms.values(), on_policy.teacher_config(given), on_policy.half_way(given)):
        valid(tree, tmp_path)
    assert {name for name, tree in arms.items() if "rollout" in tree} == {"on_policy", "mixed"}
    assert len({tree["train"]["max_steps"] for tree in arms.values()}) == 1
