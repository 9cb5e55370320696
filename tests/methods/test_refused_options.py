"""What a config may not ask of a method, found before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import bert, llama, write_config

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.errors import ConfigError

BASE = {
    "output_dir": "runs/x",
    "task": {"type": "classification", "dataset": "texts"},
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
}
TEXT = {"task": {"type": "mlm", "dataset": "texts"}}
CUT = {"student": {"model": "from_teacher"}}
POOL = {"teacher": None, "teachers": [{"name": n, "model": n} for n in ("small", "large")]}
METHODS: dict[str, dict[str, Any]] = {
    "minidisc": CUT,
    "maxidisc": CUT,
    "direct": CUT,
    "shrink": {
        **CUT,
        "task": {"type": "causal_lm", "dataset": "texts"},
        "teacher": {"model": llama(2)},
        "method": {"parameters": "4B"},
    },
    "homodistil": {
        **CUT,
        **TEXT,
        "method": {"target_width": 12, "pruning_end": 6},
        "train": {"max_steps": 8},
    },
    "mixed_vocabulary": {**TEXT, "student": {"model": bert(2, 8)}},
    "knowledge_selection": {},
    "single": POOL,
    "skdbert": POOL,
    "routed": {**POOL, "task": {**BASE["task"], "teacher_column": "expert"}},
}


def load(folder: Path, name: str, changes: str) -> RunConfig:
    """A run config of a method, with overrides that are separated by semicolons."""
    tree = {**BASE, **METHODS[name]}
    tree["method"] = {"name": name, **tree.get("method", {})}
    return load_config(
        write_config(folder / "run.yaml", tree), changes.split("; ") if changes else []
    )


WEIGHTS = "method.distribution=weights"
NONE = "objective=[{loss: hard_cross_entropy, weight: 0.0}, {loss: soft_target_kl}]"
STREAM = "task.type=mlm; task.dataset=t.jsonl; task.tokenizer=t; task.streaming=true; "
STREAM += "train.max_steps=5"
MANY = "teachers=[{name: small, model: small}, {name: large, model: large}]; teacher=null"
# By method: changes of its config, separated by semicolons, and a part of the message.
REFUSED = {
    "minidisc": [
        ("method.tradeoff=-0.1", "method.tradeoff: must be greater than or equal to 0"),
        ("method.target_sparsity=1.0", "method.target_sparsity: must be less than 1"),
        ("method.sparsities=[0.9, 0.5]", "in increasing order"),
        ("method.target_sparsity=0.77", "0.77 is not among method.sparsities (0.5, "),
        ("baselines=[single]", '"minidisc" has no baseline "single" (known: alone, dir'),
        ("student.model=bert-base", "method minidisc cuts its teacher"),
        ("student.layers=2", "student.layers: method minidisc chooses"),
        ("objective=[{loss: attention_mse}]", "attention_mse compares attention head"),
        (MANY, "one teacher"),
        *(
            (
                f"method.target_sparsity=0.8; method.sparsities={grid}",
                f"method.sparsities: ({grid[1:-1]}) has no sparsity below method.target_sparsity "
                "0.8, so that there is no assistant; add one, or set method.name to direct",
            )
            for grid in ("[0.8]", "[0.8, 0.9]")
        ),
    ],
    "maxidisc": [
        ("method.target_sparsity=0.77", "0.77 is not among method.sparsities (0.5, "),
        ("method.sparsities=[0.9]", "(0.9) has no sparsity below method.target_sparsity 0.9"),
        (
            "method.target_sparsity=0.5; method.sparsities=[0.25, 0.5, 0.75, 0.9]",
            "trains nothing above method.target_sparsity 0.5; remove 0.75, 0.9",
        ),
    ],
    "direct": [
        (
            "method.iterations=3",
            "method.iterations = 3: an option of minidisc, and not of method direct; remove the",
        ),
        *(
            (f"method.{key}={value}", "an option of maxidisc, minidisc, and not of method direct")
            for key, value in {"tradeoff": 0.2, "sparsities": [0.5, 0.9]}.items()
        ),
    ],
    "knowledge_selection": [
        ("method.policy=random_soft; method.action=hard", "random_soft has no selector"),
        ("method.policy=random_hard; method.exploration=0.5", "random_hard has no selector"),
        (
            "task={type: causal_lm, dataset: d}; train.tokens_per_rank=4096",
            "relation_fsp, which is a kind of knowledge without an objective, is averaged over",
        ),
        (f"{NONE}; method.policy=learned", "method.policy learned mult"),
        (f"{NONE}; method.policy=random_soft", "method.policy random_soft mult"),
        (MANY, "one of"),
    ],
    "skdbert": [
        (WEIGHTS, "method.weights: missing"),
        (f"{WEIGHTS}; method.weights={{small: -1, large: 1}}", "method.weights.small: must be"),
        (f"{WEIGHTS}; method.weights={{small: 0, large: 0}}", "every weight is 0"),
        (f"{WEIGHTS}; method.weights={{smal: 1, large: 1}}", 'did you mean "small"?'),
        (f"{WEIGHTS}; method.weights={{large: 1}}", "method.weights: no weight for small"),
        ("method.weights={small: 1, large: 1}", "uniform does not use weights"),
        ("teachers.0.name=large", 'the name "large" is used 2 times'),
        ("teachers.0.name=student", 'the name "student" is used 2 times in the run'),
        ("student={model: from_teacher, teacher: large}", "set student.layers"),
    ],
    "single": [
        ("", "set method.teacher to small or large"),
        ("method.teacher=huge", 'method.teacher: there is no teacher "huge"'),
    ],
    "routed": [
        ("teachers=[{name: math, model: a}]", "math is the only teacher"),
        ("teachers.0.finetune={}", "teachers[0].finetune: reads all training rows"),
        ("teachers.1.cache=c", "teachers[1].cache: reads all training rows"),
        (STREAM, "task.streaming: method routed counts rows"),
    ],
    "shrink": [
        ("method.parameters=null", "exactly one of parameters"),
        (
            "method.target_sparsity=0.5",
            "an option of direct, maxidisc, minidisc, and not of method",
        ),
        ("objective=[{loss: relation_kl}]", "attention cannot be compared"),
        ("student.model=bert-base", "method shrink cuts its teacher"),
        ("method.flops=0.5", "set exactly one of parameters"),
        *(
            (f"method.parameters={size}", "method.parameters")
            for size in ('""', "0.6Q", "-3M", "0", "1.5")
        ),
    ],
    "homodistil": [
        ("method.target_width=null", "method.target_width: must be a valid integer"),
        ("method.pruning_end=9", "pruning_end: 9 is after the end of the run"),
        ("student.layers=1", "student.layers: method homodistil chooses"),
        ("objective=[{loss: hidden_mse}]", "set projection: identity in the term"),
        ("objective=[{loss: relation_kl}]", "compares vectors whose width falls"),
        ("objective=[{loss: hidden_cosine}]", "hidden_mse with projection: identity"),
        ("task.type=classification", "homodistil prunes on text and needs"),
    ],
    "mixed_vocabulary": [
        ("task.type=causal_lm", "needs mlm"),
        ("method.p=1.5", "method.p"),
        ("method.version=2", "method.version"),
        ("method.student_vocabulary=10", "method.student_vocabulary"),
        ("task.streaming=true", "task.streaming"),
        ("objective=[{loss: hard_cross_entropy}]", "objective: mixed_vocabulary"),
        ("student.model=some/model", "starts from random weights"),
        ("student.model.config.vocab_size=50", "student.model.config.vocab_size: 50, and method.s"),
        ("method.projections=dual; method.epsilon=3.0", "(default null), because method.projectio"),
        (
            "method.teacher_learning_rate=0.1; train.learning_rate=0.0",
            "method.teacher_learning_rate: 0.1 follows the schedule of train.learning_rate",
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [(name, *refused) for name, cases in REFUSED.items() for refused in cases],
)
def test_what_a_method_cannot_do_is_refused_with_its_key(tmp_path, name, changes, message):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, name, changes)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("direct", "method.target_sparsity=0.77"),  # outside the grid
        ("maxidisc", "method.target_sparsity=0.8"),  # the default grid has sparsities above it
        ("minidisc", "method.iterations=1; method.sparsities=[0.9]"),  # trains the target alone
        ("knowledge_selection", "method.episodes=2; method.phase_steps=5"),
        ("knowledge_selection", "method.policy=random_soft; method.episodes=5"),  # the default
    ],
)
def test_what_has_an_effect_or_is_the_default_is_accepted(tmp_path, name, changes):
    assert load(tmp_path, name, changes).method.name == name
