"""`megakd match`: teachers against the student's start, by hand, by task, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_runs import config_of, model
from tiny_runs import bert, llama, pairs_task, run_in, text_task
from whole_run import finish, logits_by_hand, read, records

from megakd.config.file import dump_config

SINGLE = {"name": "single"}


def matched(one_rank, config: Path, *words: str) -> dict[str, Any]:
    outcome = one_rank.megakd("match", config, *words, "--json", code=0)
    return json.loads(outcome.out)


def test_a_classifier_is_compared_with_the_start_as_by_hand(one_rank, whole_run, tmp_path):
    student = whole_run.out / "final"
    models = {"teacher": {"model": str(whole_run.teacher)}, "student": {"model": str(student)}}

    actual = matched(one_rank, run_in(tmp_path, whole_run.task, method=SINGLE, **models))

    lines = (whole_run.reviews / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows]
    theirs, ours = (
        logits_by_hand(folder, texts)[1].log_softmax(-1) for folder in (whole_run.teacher, student)
    )
    truth = torch.tensor([row["label"] == "positive" for row in rows]).long()
    losses = [torch.nn.functional.nll_loss(answer, truth).item() for answer in (ours, theirs)]
    teacher = actual["teachers"]["teacher"]
    assert actual["start"]["metrics"]["loss"] == pytest.approx(losses[0], abs=1e-5)
    assert teacher["gap"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    by_hand = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert teacher["kl"] == pytest.approx(by_hand, abs=1e-5)
    entropy = -(theirs.exp() * theirs).sum(-1).mean().item()
    assert teacher["entropy"] == pytest.approx(entropy, abs=1e-5)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert teacher["same_top"] == teacher["overlap"] == pytest.approx(same)
    assert not (tmp_path / "out").exists()


def test_a_table_has_a_row_for_the_start_and_each_teacher_also_one_that_is_named_start(
    one_rank, whole_run, tmp_path
):
    pool = {"good": str(whole_run.teacher), "start": str(whole_run.out / "final")}
    teachers = [{"name": name, "model": folder} for name, folder in pool.items()]
    config = run_in(tmp_path, whole_run.task, teachers=teachers, method={"name": "skdbert"})

    outcome = one_rank.megakd("match", config)

    lines = outcome.out.splitlines()
    assert lines[0] == f"{whole_run.reviews}, validation: 26 rows"
    assert lines[1] == "start: new bert with random weights"
    titles = "accuracy loss gap KL entropy same top 1 top overlap vocabulary"
    assert " ".join(lines[2].split()) == titles
    assert [line.split()[0] for line in lines[3:6]] == ["start", "good", "start"]
    assert lines[4].endswith("same")
    scores = {line.split()[0]: float(line.split()[1]) for line in lines[4:6]}
    best = sorted(scores, key=lambda name: -scores[name])
    assert lines[6:] == [f"best teacher first, by accuracy: {', '.join(best)}"]


def test_a_teacher_that_the_run_has_trained_is_scored_and_another_is_refused(
    one_rank, whole_run, tmp_path
):
    result = matched(one_rank, whole_run.config)

    report = read(whole_run.out)["teacher"]["metrics"]
    assert result["teachers"]["teacher"]["metrics"] == pytest.approx(report)
    refused = one_rank.megakd("match", whole_run.config, f"output_dir={tmp_path / 'new'}", code=2)
    assert "teacher.finetune: the teacher is not trained" in refused.err
    assert not (tmp_path / "new").exists()


def test_regressors_have_the_difference_of_their_scores_alone(one_rank, tmp_path):
    task = pairs_task(tmp_path, tokenizer={"type": "wordpiece", "vocab_size": 320})
    config = run_in(tmp_path, task, teacher={"model": bert(2)}, method=SINGLE)

    result = matched(one_rank, config)

    assert result["metric"] == "mean_pearson_spearman"
    title = one_rank.megakd("match", config).out.splitlines()[2]
    assert title.split()[2:] == ["gap", "squared", "difference", "vocabulary"]
    teacher = result["teachers"]["teacher"]
    assert teacher["squared_difference"] > 0
    assert teacher.keys() == {"model", "metrics", "gap", "squared_difference", "vocabulary"}


@pytest.mark.parametrize(("task", "family"), [("mlm", bert), ("causal_lm", llama)])
def test_the_start_of_a_language_model_is_that_of_the_run(one_rank, tmp_path, task, family):
    config = run_in(
        tmp_path,
        text_task(tmp_path, task),
        teachers=[
            {"name": "equal", "model": family(1, initializer_range=0.5)},
            {"name": "deep", "model": family(2, width=24, initializer_range=0.5)},
        ],
        student={"model": family(1, initializer_range=0.5)},
        method={**SINGLE, "teacher": "deep"},
        objective=[{"loss": "soft_target_kl"}],
        eval={"losses": True, "eval_steps": 4},
    )

    whole = matched(one_rank, config)
    result = whole["teachers"]
    finish(one_rank, config)

    first = records(tmp_path / "out", "student")[0]
    assert result["deep"]["kl"] == pytest.approx(first["eval/soft_target_kl"], rel=1e-4)
    same = {"gap": 0, "kl": 0, "same_top": 1, "overlap": 1}
    assert {key: result["equal"][key] for key in same} == pytest.approx(same, abs=1e-5)
    assert result["deep"]["overlap"] < 0.5
    assert {*whole["ranking"]} == ({"equal", "deep"} if task == "causal_lm" else set())
    assert 0 < result["deep"]["entropy"] < math.log(320)


@pytest.mark.parametrize(("family", "word"), [("chatml", "same"), ("llama3", "different")])
def test_conversations_tell_whether_the_chat_templates_are_the_same(
    one_rank, tmp_path, family, word
):
    model(tmp_path / "student")
    model(tmp_path / "teacher", family=family)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config_of(tmp_path, max_length=512, end_tokens="accept")))

    result = matched(one_rank, path)["teachers"]["teacher"]

    assert (result["vocabulary"], result["chat_template"]) == ("same", word)
    assert result["kl"] == pytest.approx(0, abs=1e-6)


def test_a_start_made_of_the_teacher_is_told(one_rank, whole_run, tmp_path):
    def told(student: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
        models = {"teacher": {"model": str(whole_run.teacher)}}
        models["student"] = {"model": "from_teacher", **student}
        return matched(one_rank, run_in(tmp_path, whole_run.task, method=method, **models))

    kept = told({"layers": 1}, SINGLE)
    cut = told({}, {"name": "direct", "target_sparsity": 0.5})

    assert kept["start"]["model"].endswith(f"of teacher {whole_run.teacher}")
    assert kept["start"]["model"].startswith("layers ")
    assert cut["start"]["model"] == f"teacher {whole_run.teacher}, before direct cuts it"
    assert cut["teachers"]["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_teacher_is_refused(one_rank, whole_run, tmp_path):
    outcome = one_rank.megakd("match", run_in(tmp_path, whole_run.task), code=2)

    assert outcome.err.startswith("megakd: error: teacher: missing, and megakd match compares")
