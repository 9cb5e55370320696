"""What a config may not ask of a method, found before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_config

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
        with pytest.raises(ConfigError, match=r"0.77 is not among method\.sparsities \(0.5, .*add"):
            load_config(run_file, [f"method.name={name}", *target])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.tradeoff=-0.1", r"method.tradeoff: must be at least 0"),
        ("method.tradeoff=.inf", r"method.tradeoff: .*finite"),
        ("method.target_sparsity=1.0", r"method.target_sparsity: must be below 1"),
        ("method.target_sparsity=0", r"method.target_sparsity: must be above 0"),
        ("method.sparsities=[0.9, 1.2]", r"method.sparsities\[1\]: must be below 1"),
        ("method.sparsities=[0.9, 0.5]", r"method.sparsities: .* increasing order.*\[0.9, 0.5\]"),
        ("method.sparsities=[0.5, 0.9, 0.9]", r"method.sparsities: .* increasing order"),
        ("method.sparsities=[]", r"method.sparsities: .*at least 1"),
        ("baselines=[single]", r'"minidisc" has no baseline "single" \(known: alone, direct\)'),
        (
            "method={name: minidisc, target_may_win: false, target_sparsity: 0.5}",
            r"method.target_may_win: false leaves .*at least method.target_sparsity 0.5",
        ),
        ("method={name: direct, iterations: 3}", r"method.iterations"),
        ("method.iterations=0", r"method.iterations: must be at least 1"),
        ("method.allocation=even", r"method.allocation: .*global.*uniform"),
        ("student.model=bert-base", r'student.model: method "minidisc" cuts the student out'),
        ("objective=[{loss: attention_mse}]", r"attention_mse compares attention head by head"),
        ("method.residual=1", r"method.residual: "),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(run_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [override])


@pytest.mark.parametrize("loss", ["hidden_mse", "hidden_cosine", "embedding_mse", "relation_fsp"])
def test_narrower_hidden_states_are_not_compared_themselves(run_file, loss):
    message = rf"objective: {loss} compares hidden states of the same width"
    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [f"objective=[{{loss: {loss}}}]", "method.residual=true"])


def test_importance_cannot_be_measured_on_a_stream(run_file):
    stream = ["task.type=mlm", "task.dataset=texts.jsonl", "task.streaming=true"]
    stream += ["task.tokenizer=tokenizer", "task.max_eval_examples=5", "train.max_steps=5"]

    with pytest.raises(ConfigError, match=r"method.importance_split: train cannot be read"):
        load_config(run_file, [*stream, "method.importance_split=train"])


MODELS: dict[str, dict[str, Any]] = {
    "one": {"teacher": {"model": "teacher"}, "student": {"model": "student"}},
    "cut": {"teacher": {"model": "teacher"}, "student": {"model": "from_teacher"}},
    "pool": {
        "teachers": [{"name": "a", "model": "a"}, {"name": "b", "model": "b"}],
        "student": {"model": "student"},
    },
}
SELECTION = {"name": "knowledge_selection"}
RANDOM = {**SELECTION, "policy": "random_hard"}
SKDBERT = {"name": "skdbert"}


def load(folder: Path, method: dict[str, Any], **sections: Any) -> Any:
    models = {"skdbert": "pool", "takd": "pool"}.get(method["name"], "one")
    tree = {
        "output_dir": str(folder / "out"),
        "task": {"type": "classification", "dataset": "pydocs"},
        **MODELS[models],
        "method": method,
    }
    return load_config(write_config(folder / "run.yaml", tree | sections))


UNUSED = {
    "a saved selector": ({**RANDOM, "selector": "s"}, "random_hard has no selector"),
    "episodes": ({**RANDOM, "episodes": 9}, "random_hard has no selector"),
    "action": ({**SELECTION, "policy": "all", "action": "hard"}, "all has no selector"),
    "threshold": ({**SELECTION, "threshold": 0.9}, "soft does not choose by a threshold"),
    "threshold of all": (
        {**SELECTION, "policy": "all", "threshold": 0.9},
        "method.policy all does not choose by a threshold",
    ),
    "gamma": ({**SELECTION, "selector": "s", "gamma": 0.5}, "a selector that has learned"),
    "pilot_steps": (
        {**SKDBERT, "distribution": "teacher_rank", "pilot_steps": 5},
        "teacher_rank trains no pilot student",
    ),
    "rank_exponent": ({**SKDBERT, "rank_exponent": 2.0}, "uniform ranks no teacher"),
    "rank_exponent of weights": (
        {**SKDBERT, "distribution": "weights", "weights": {"a": 1, "b": 1}, "rank_exponent": 2.0},
        "weights ranks no teacher",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_an_option_without_an_effect_is_refused_with_its_key_and_its_reason(tmp_path, case):
    method, reason = UNUSED[case]
    key, value = next((k, v) for k, v in reversed(method.items()))

    with pytest.raises(ConfigError) as refused:
        load(tmp_path, method)

    assert f"method.{key}: {value} has no effect (default " in str(refused.value)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "method",
    [
        {**RANDOM, "threshold": 0.9},
        {**SELECTION, "action": "hard", "threshold": 0.9},
        {**SELECTION, "selector": "s", "action": "hard"},
        {**SELECTION, "episodes": 2, "noise": 0.5, "hidden": 8},
        {**SKDBERT, "distribution": "student_rank", "pilot_steps": 5, "rank_exponent": 2.0},
        {**SKDBERT, "distribution": "teacher_rank", "rank_exponent": 0.5},
        {**SELECTION, "policy": "all", "episodes": 5},  # the default
    ],
)
def test_an_option_with_an_effect_or_with_its_default_is_accepted(tmp_path, method):
    assert load(tmp_path, method).method.name == method["name"]


NONE = [{"loss": "hard_cross_entropy", "weight": 0.0}, {"loss": "soft_target_kl"}]


@pytest.mark.parametrize("policy", ["learned", "random_soft", "random_hard"])
def test_a_kind_that_no_step_can_use_is_refused(tmp_path, policy):
    message = f"hard_cross_entropy has weight 0, and method.policy {policy} multiplies the weights"

    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {**SELECTION, "policy": policy}, objective=NONE)
    assert load(tmp_path, {**SELECTION, "policy": "all"}, objective=NONE)


CHAIN = {"name": "takd", "order": ["a", "b"]}


def test_only_the_first_teacher_of_a_chain_may_answer_from_a_cache(tmp_path):
    first = [{"name": "a", "model": "a", "cache": "x"}, {"name": "b", "model": "b"}]

    with pytest.raises(ConfigError, match=r"teachers\[0\].cache: .* trains a .* first teacher, b"):
        load(tmp_path, {**CHAIN, "order": ["b", "a"]}, teachers=first)
    assert load(tmp_path, CHAIN, teachers=first)


def test_a_student_may_not_start_from_a_teacher_that_is_taught_only_later(tmp_path):
    def of(teacher: str) -> dict[str, Any]:
        return {"model": "from_teacher", "layers": 1, "teacher": teacher}

    with pytest.raises(ConfigError, match=r"student.teacher: .* trains b.*student.teacher to a"):
        load(tmp_path, CHAIN, student=of("b"))
    assert load(tmp_path, CHAIN, student=of("a"))
