"""Language models: conversations, packed text and generated texts learn from their teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benches import Bench, furthest_students, taught_by
from served_models import Transformer
from server_stubs import Stub, serving
from tiny_runs import SENTENCES, llama, write_jsonl
from whole_run import read

EXPERTS = ("sums", "talk")
SOFT = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy", "weight": 0.1, "on": "data"}]
ROLLOUT = {"rollout": {"max_new_tokens": 5, "mix": 0.7}}


def rows() -> list[dict[str, Any]]:
    """Prompts with answers; the first two of three name sums, the third names talk."""

    def one(number: int) -> dict[str, Any]:
        n, place = divmod(number, 3)
        if place == 2:
            return {"prompt": f"say {n}", "completion": f" {SENTENCES[n % 4]}", "expert": "talk"}
        n = 2 * n + place
        return {"prompt": f"{n} + {n % 3} =", "completion": f" {n + n % 3}", "expert": "sums"}

    return [one(number) for number in range(30)]


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    """Two small decoders that were trained on different rows, and runs of a student."""
    folder = tmp_path_factory.mktemp("routed-texts")
    task = {"type": "causal_lm", "train_files": str(write_jsonl(folder / "rows.jsonl", rows()))}
    task |= {"validation_files": str(write_jsonl(folder / "held.jsonl", rows()[:6]))}
    task |= {"tokenizer": {"type": "bpe", "vocab_size": 300}, "max_length": 24}
    # Adam would turn rounding of tiny gradients into whole steps.
    train = {"per_device_train_batch_size": 6, "max_steps": 5, "adam_epsilon": 0.01}
    result = Bench(one_rank, folder, task, train=train)
    for seed, name in enumerate(EXPERTS):
        write_jsonl(folder / f"{name}.jsonl", [row for row in rows() if row["expert"] == name])
        student = {"model": llama(2, initializer_range=0.3)}
        result.run(name, {"name": "finetune"}, student=student, seed=seed)
        result.task = {**task, "tokenizer": str(folder / "sums" / "final")}
    teachers = result.teachers(*EXPERTS)
    result.shared |= {"teachers": teachers, "objective": SOFT, "method": {"name": "routed"}}
    return result


COLUMN = {"teacher_column": "expert"}
PACKED = {"train": {"tokens_per_rank": 40}}
CASES = {"padded": {}, "tokens": PACKED, "rollouts": ROLLOUT, "both": {**ROLLOUT, **PACKED}}


@pytest.fixture(scope="module")
def routed(bench) -> Path:
    """A run whose rows learn from both teachers, and whose texts are evaluated."""
    generation = {"max_new_tokens": 4, "rows": 4, "match": "exact"}
    evaluated = {"eval_steps": 5, "keep_best": False, "generation": generation}
    return bench.run("routed", task=COLUMN, eval=evaluated)


@pytest.mark.parametrize("case", CASES)
def test_two_names_of_one_teacher_teach_as_this_teacher_alone(bench, routed, case):
    method = {"name": "single", "teacher": "talk"}
    one, two = bench.teachers("talk"), bench.teachers("sums:talk", "talk")

    alone = bench.run(f"alone-{case}", teachers=one, method=method, **CASES[case])
    twice = bench.run(f"twice-{case}", task=COLUMN, teachers=two, **CASES[case])

    assert furthest_students(twice, alone) < 2e-6
    if case == "padded":
        assert furthest_students(routed, alone) > 1e-4


def test_the_student_without_its_adapters_may_be_one_of_the_teachers(bench):
    sums, talk = bench.teachers(*EXPERTS)
    student = {"model": sums["model"], "lora": {"r": 2}}

    given, other = (
        bench.run(out, task=COLUMN, teachers=[{**sums, "model": model}, talk], student=student)
        for out, model in {"lora": sums["model"], "base": "student_base"}.items()
    )

    assert furthest_students(other, given) < 2e-6


def sources(bench: Bench, **teachers: str | None) -> dict[str, Any]:
    """A task with a file of each expert, whose rows learn from the given teacher."""
    parts = {
        name: {"files": str(bench.folder / f"{name}.jsonl"), "weight": weight}
        | ({} if teachers[name] is None else {"teacher": teachers[name]})
        for name, weight in {"sums": 2.0, "talk": 1.0}.items()
    }
    return {"train_files": None, "mixture": parts}


def test_a_source_of_a_mixture_names_its_teacher_once(bench):
    given = bench.run("sources", task=sources(bench, sums="sums", talk="talk"))
    mixed = bench.run("both", task=sources(bench, sums=None, talk="talk") | COLUMN)

    counts = {name: entry["rows"] for name, entry in taught_by(given).items()}
    assert counts == {"sums": 20, "talk": 10}
    assert furthest_students(given, mixed) == 0


def test_served_teachers_are_asked_about_their_own_rows_alone(bench, routed):
    """With all tokens but one, the remaining probability is that of the last token."""
    folders = {name: bench.folder / name / "final" for name in EXPERTS}
    size = json.loads((folders["sums"] / "config.json").read_text())["vocab_size"]
    stubs = {n: Stub(name=n, model=Transformer(f)) for n, f in folders.items()}
    with serving(*stubs.values()) as urls:
        teachers = [
            {**spec, "server": {"url": [url], "model": spec["name"], "top_k": size - 1}}
            for spec, url in zip(bench.teachers(*EXPERTS), urls, strict=True)
        ]
        out = bench.run("served", task=COLUMN, teachers=teachers)

    assert furthest_students(out, routed) < 2e-5
    asked = {name: len(stub.of("/v1/completions")) for name, stub in stubs.items()}
    # One epoch: 20 rows name sums and 10 name talk; both servers get the same requests as a check.
    assert asked["sums"] - asked["talk"] == 10
    assert asked["talk"] < 30
    assert read(out)["pool.distribution"] == "routed"
    assert {"text_tokens", "text_truncated", "match"} <= read(routed)["stages"][0].keys()
