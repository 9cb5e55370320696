"""`megakd predict` and `megakd export --format onnx`, on models that a run has written."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_runs import pairs_task, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import finish_in, logits_by_hand

from megakd.cli import main
from megakd.commands import predict, scored_models
from megakd.errors import DataError
from megakd.models import onnx

TEXTS = ("a good fine film", "the poor ugly cat and it was awful", "")


def answers(answer):
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.fixture(scope="module")
def exported(one_rank, whole_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "graph"
    outcome = one_rank.megakd("export", whole_run.config, "--to", folder, "--format", "onnx")
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_a_classifier_answers_with_the_probabilities_of_plain_transformers(one_rank, whole_run):
    final = whole_run.out / "final"

    result = answers(one_rank.megakd("predict", final, *TEXTS, "--json"))

    for text, answer in zip(TEXTS, result, strict=True):
        model, logits = logits_by_hand(final, [text])
        shares = logits[0].softmax(-1)
        assert answer["label"] == model.config.id2label[int(shares.argmax())]
        assert list(answer["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
    lines = one_rank.megakd("predict", final, *TEXTS).out.splitlines()
    assert lines == [f"{one['label']}\t{one['probability']:.3f}" for one in result]


def test_the_graph_takes_the_place_of_the_weights_and_answers_alike(one_rank, whole_run, exported):
    folder, answer = exported

    assert answer.out.splitlines()[0] == str(folder)
    assert (folder / "model.onnx").is_file()
    assert not list(folder.glob("*.safetensors*"))
    torch_answers = answers(one_rank.megakd("predict", whole_run.out / "final", *TEXTS, "--json"))
    onnx_answers = answers(one_rank.megakd("predict", folder, *TEXTS, "--json"))
    for one, other in zip(torch_answers, onnx_answers, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


def test_int8_makes_the_graph_smaller_and_prints_both_scores(
    one_rank, whole_run, exported, tmp_path, monkeypatch, capsys, caplog
):
    small, whole = tmp_path / "int8", exported[0] / "model.onnx"
    # A second export of the same model would take seconds.
    monkeypatch.setattr(onnx, "_export", lambda model, names, graph: shutil.copy(whole, graph))

    words = ("export", str(whole_run.config), "--to", str(small), "--format", "onnx", "--int8")
    assert main(words) == 0

    shown = capsys.readouterr().out
    assert re.search(r"\naccuracy on \d+ held-out rows: .* in fp32, .* one by one, .*\n", shown)
    assert [path.name for path in small.glob("*.onnx*")] == ["model.onnx"]
    assert (small / "model.onnx").stat().st_size < whole.stat().st_size
    assert len(answers(one_rank.megakd("predict", small, *TEXTS, "--json"))) == len(TEXTS)

    def gone(config):
        raise DataError("the rows are gone")

    monkeypatch.setattr(scored_models, "splits_of", gone)
    assert main((*words[:3], str(tmp_path / "unscored"), *words[4:])) == 0
    assert "held-out" not in capsys.readouterr().out
    assert "the int8 graph is not scored: the rows are gone" in caplog.text


def test_a_label_with_a_line_break_stays_on_its_line(one_rank, whole_run, tmp_path):
    final = Path(shutil.copytree(whole_run.out / "final", tmp_path / "final"))
    (final / "checksums.json").unlink()
    config = final / "config.json"
    config.write_text(config.read_text().replace('"positive"', '"posi\\ntive"'))

    lines = one_rank.megakd("predict", final, *TEXTS).out.splitlines()

    assert lines[0].startswith("posi\\ntive\t")
    assert len(lines) == len(TEXTS)


def test_a_pair_is_two_texts_with_a_tab_and_a_score_is_a_number(one_rank, tmp_path):
    finish_in(one_rank, tmp_path, pairs_task(tmp_path))
    final = tmp_path / "out/final"

    (result,) = answers(one_rank.megakd("predict", final, "good film\tthe film", "--json"))

    _, logits = logits_by_hand(final, ["good film"], ["the film"])
    assert result["value"] == pytest.approx(float(logits), abs=1e-5)


def test_a_decoder_continues_and_a_masked_model_fills_its_masks(one_rank, tmp_path):
    text = write_text(tmp_path / "text.txt")
    for kind in ("causal_lm", "mlm"):
        finish_in(one_rank, tmp_path / kind, {"type": kind, "dataset": str(text)})
    decoder, masked = (tmp_path / kind / "out" / "final" for kind in ("causal_lm", "mlm"))

    (result,) = answers(
        one_rank.megakd("predict", decoder, "the cat", "--max_new_tokens", "5", "--json")
    )
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    given = tokenizer("the cat", return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(decoder).generate(**given, max_new_tokens=5)
    rest = tokens[0, given["input_ids"].shape[1] :]
    assert result["text"] == tokenizer.decode(rest, skip_special_tokens=True)

    (result,) = answers(one_rank.megakd("predict", masked, "the [MASK] sees", "--json"))
    assert [len(tokens) for tokens in result["tokens"]] == [5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "nowhere", "text"), "nowhere is not a folder"),
        (("predict", "{tokenless}", "text"), "has no tokenizer"),
        (("predict", "{tokenless}", "text", "--max_new_tokens", "0"), "must be at least 1 (got 0)"),
        (("export", "{config}", "--to", "{tokenless}/x", "--int8"), "--int8 needs --format onnx"),
    ],
)
def test_what_cannot_answer_is_refused(one_rank, whole_run, tmp_path, words, message):
    tokenless = tmp_path / "tokenless"
    shutil.copytree(
        whole_run.out / "final", tokenless, ignore=shutil.ignore_patterns("tok*", "check*")
    )
    names = {"tokenless": tokenless, "config": whole_run.config}

    outcome = one_rank.megakd(*(word.format(**names) for word in words), code=2)

    assert message in outcome.err


def test_a_line_that_is_not_utf_8_is_told_with_its_number(monkeypatch, tmp_path):
    lines = io.TextIOWrapper(io.BytesIO(b"good\nbad \xff\n"))
    monkeypatch.setattr("sys.stdin", lines)
    arguments = argparse.Namespace(model=tmp_path, texts=[], max_new_tokens=1, json=False)

    with pytest.raises(DataError, match=r"text 2 is not UTF-8: 'bad "):
        predict.run(arguments)
