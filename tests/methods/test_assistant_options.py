"""What a config may not ask of a schedule of teacher assistants, found before anything loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.errors import ConfigError
from megakd.methods.assistants import AssistantOptions

RUN = """
output_dir: runs/x
task: {type: classification, dataset: pydocs}
teacher: {model: teacher}
student: {model: from_teacher}
method: {name: minidisc}
"""
METHODS = ("minidisc", "maxidisc", "direct")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", METHODS)
def test_the_schedules_are_one_switch_apart(run_file, name):
    method = load_config(run_file, [f"method.name={name}", "method.tradeoff=0.3"]).method

    assert isinstance(method, AssistantOptions)
    assert method.target_sparsity == 0.9
    assert method.tradeoff == 0.3
    assert method.sparsities == (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def test_direct_cuts_a_target_outside_the_grid(run_file):
    target = ["method.target_sparsity=0.77"]

    assert load_config(run_file, ["method.name=direct", *target]).method.used_sparsities == (0.77,)
    for name in ("minidisc", "maxidisc"):
        with pytest.raises(ConfigError, match=r"0.77 is not among method\.sparsities"):
            load_config(run_file, [f"method.name={name}", *target])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.tradeoff=-0.1", r"method.tradeoff: must be at least 0"),
        ("method.tradeoff=.inf", r"method.tradeoff: .*finite"),
        ("method.target_sparsity=1.0", r"method.target_sparsity: must be below 1"),
        ("method.target_sparsity=0", r"method.target_sparsity: must be above 0"),
        (
            "method.target_sparsity=0.77",
            r"0.77 is not among method.sparsities \(0.5, .*add the value",
        ),
        ("method.sparsities=[0.9, 1.2]", r"method.sparsities\[1\]: must be below 1"),
        (
            "method.sparsities=[0.9, 0.5]",
            r"method.sparsities: the sparsities must be in increasing order.*\[0.9, 0.5\]",
        ),
        (
            "method.sparsities=[0.5, 0.9, 0.9]",
            r"method.sparsities: the sparsities must be in increasing order",
        ),
        ("method.sparsities=[]", r"method.sparsities: .*at least 1"),
        (
            "baselines=[single]",
            r'method "minidisc" has no baseline "single" \(known: alone, direct\)',
        ),
        (
            "method={name: minidisc, target_may_win: false, target_sparsity: 0.5}",
            r"method.target_may_win: false leaves no candidate.*at least method.target_sparsity "
            r"0.5",
        ),
        ("method.iterations=0", r"method.iterations: must be at least 1"),
        ("method.allocation=even", r"method.allocation: .*global.*uniform"),
        ("student.model=bert-base", r'student.model: method "minidisc" cuts the student out'),
        ("teacher=null", r'teacher: missing, and method "minidisc" needs a teacher'),
        ("objective=[{loss: attention_mse}]", r"attention_mse compares attention head by head"),
        ("method.residual=1", r"method.residual: "),
        *(
            (
                f"objective=[{{loss: {loss}}}]",
                rf"objective: {loss} compares hidden states of the same width",
            )
            for loss in ("hidden_mse", "hidden_cosine", "embedding_mse", "relation_fsp")
        ),
        (
            "method.name=single",
            r'student.model: "from_teacher" needs a method that cuts.*\(got method "single"\)',
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(run_file, override, message):
    overrides = [override]
    if override == "method.name=single":
        overrides.append("objective=[{loss: soft_target_kl}]")
    if "hidden states of the same width" in message:
        overrides.append("method.residual=true")

    with pytest.raises(ConfigError, match=message):
        load_config(run_file, overrides)


def test_options_of_another_schedule_are_unknown_keys(run_file):
    with pytest.raises(ConfigError, match=r"method.iterations"):
        load_config(run_file, ["method.name=direct", "method.iterations=3"])


def test_importance_cannot_be_measured_on_a_stream(run_file):
    stream = ["task.type=mlm", "task.dataset=texts.jsonl", "task.streaming=true"]
    stream += ["task.tokenizer=tokenizer", "task.max_eval_examples=5", "train.max_steps=5"]

    with pytest.raises(ConfigError, match=r"method.importance_split: train cannot be read"):
        load_config(run_file, [*stream, "method.importance_split=train"])
