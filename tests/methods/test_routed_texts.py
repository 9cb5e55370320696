"""Language models: conversations, packed text and generated texts learn from their teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from one_rank import OneRank
from routed_bench import furthest, taught_by, teachers_in
from served_models import Transformer
from server_stubs import Stub, serving
from tiny_runs import SENTENCES, config_tree, llama, write_config, write_jsonl
from whole_run import finish, read

EXPERTS = ("sums", "talk")
SOFT = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy", "weight": 0.1}]
ROLLOUT = {"max_new_tokens": 5, "mix": {"rollout": 0.5, "replay": 0.2, "data": 0.3}}


def rows() -> list[dict[str, Any]]:
    """Prompts with answers; the first two of three name sums, the third names talk."""

    def one(number: int) -> dict[str, Any]:
        n, place = divmod(number, 3)
        if place == 2:
            return {"prompt": f"say {n}", "completion": f" {SENTENCES[n % 4]}", "expert": "talk"}
        n = 2 * n + place
        return {"prompt": f"{n} + {n % 3} =", "completion": f" {n + n % 3}", "expert": "sums"}

    return [one(number) for number in range(30)]


class Bench:
    """Two small decoders that were trained on different rows, and runs of a student."""

    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder = one_rank, folder
        self.data = write_jsonl(folder / "rows.jsonl", rows())
        self.held = write_jsonl(folder / "held.jsonl", rows()[:6])
        for number, name in enumerate(EXPERTS):
            taught = [row for row in rows() if row["expert"] == name]
            texts = ({"text": r["prompt"] + r["completion"], "expert": name} for r in taught)
            write_jsonl(folder / f"{name}.jsonl", taught)
            write_jsonl(folder / f"{name}-texts.jsonl", texts)
            known = {"tokenizer": {"type": "bpe", "vocab_size": 300}} if number == 0 else {}
            self.finish(
                name,
                task=known,
                teachers=[],
                student={"model": llama(2, initializer_range=0.3)},
                method={"name": "finetune"},
                objective=[{"loss": "hard_cross_entropy"}],
                seed=number,
            )

    @property
    def task(self) -> dict[str, Any]:
        return {
            "type": "causal_lm",
            "train_files": str(self.data),
            "validation_files": str(self.held),
            "tokenizer": str(self.folder / "sums" / "final"),
            "max_length": 24,
        }

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        return teachers_in(self.folder, *names)

    def config(self, out: str, task: dict[str, Any] | None = None, **sections: Any) -> Path:
        given: dict[str, Any] = {"teachers": self.teachers(*EXPERTS), "objective": SOFT}
        keys = {k: v for k, v in (self.task | (task or {})).items() if v is not None}
        given |= {"method": {"name": "routed"}, **sections}
        tree = config_tree(self.folder / out, keys, **given)
        # Adam would turn rounding of tiny gradients into whole steps.
        usual = {"per_device_train_batch_size": 6, "max_steps": 5, "adam_epsilon": 0.01}
        tree["train"] |= usual | sections.get("train", {})
        return write_config(self.folder / f"{out}.yaml", tree)

    def finish(self, out: str, **keys: Any) -> Path:
        finish(self.one_rank, self.config(out, **keys))
        return self.folder / out


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("routed-texts"))


COLUMN = {"teacher_column": "expert"}
ROWS = {"rollout": {**ROLLOUT, "mix_per": "row"}}
PACKED = {"train": {"tokens_per_rank": 40}}
CASES = [
    pytest.param({}, id="padded"),
    pytest.param(PACKED, id="tokens"),
    pytest.param(ROWS, id="rollouts", marks=pytest.mark.slow),
    pytest.param({**ROWS, **PACKED}, id="packed-rollouts"),
]


@pytest.fixture(scope="module")
def routed(bench) -> Path:
    """A run whose rows learn from both teachers, and whose texts are evaluated."""
    generation = {"max_new_tokens": 4, "rows": 4, "match": "exact"}
    evaluated = {"eval_steps": 5, "keep_best": False, "generation": generation}
    return bench.finish("routed", task=COLUMN, eval=evaluated)


@pytest.mark.parametrize("sections", CASES)
def test_two_names_of_one_teacher_teach_as_this_teacher_alone(bench, routed, request, sections):
    case = request.node.callspec.id
    method = {"name": "single", "teacher": "talk"}
    alone = bench.finish(
        f"alone-{case}", teachers=bench.teachers("talk"), method=method, **sections
    )

    twice = bench.finish(
        f"twice-{case}", task=COLUMN, teachers=bench.teachers("sums:talk", "talk"), **sections
    )

    assert furthest(twice, alone) < 2e-6
    if case == "padded":
        assert furthest(routed, alone) > 1e-4


def test_texts_are_evaluated_without_a_teacher(routed):
    """Held-out rows name no teacher, so generated texts are only counted and compared."""
    metrics = read(routed)["stages"][0]["metrics"]

    assert {"text_tokens", "match"} <= metrics.keys()
    assert not [name for name in metrics if "soft_target" in name]


def test_the_student_without_its_adapters_may_be_one_of_the_teachers(bench):
    sums, talk = bench.teachers(*EXPERTS)
    student = {"model": sums["model"], "lora": {"r": 2}}
    base = {**sums, "model": "student_base"}

    given, other = (
        bench.finish(out, task=COLUMN, teachers=[teacher, talk], student=student)
        for out, teacher in {"lora": sums, "base": base}.items()
    )

    assert furthest(other, given) < 2e-6


def sources(bench: Bench, **teachers: str | None) -> dict[str, Any]:
    """A task with a file of each expert, whose rows learn from the given teacher."""
    parts = {
        name: {"files": str(bench.folder / f"{name}.jsonl"), "weight": weight}
        | ({} if teachers[name] is None else {"teacher": teachers[name]})
        for name, weight in {"sums": 2.0, "talk": 1.0}.items()
    }
    return {"train_files": None, "mixture": parts}


def test_a_source_of_a_mixture_names_its_teacher_once(bench):
    given = bench.finish("sources", task=sources(bench, sums="sums", talk="talk"))
    mixed = bench.finish("both", task=sources(bench, sums=None, talk="talk") | COLUMN)

    counts = {name: entry["rows"] for name, entry in taught_by(given).items()}
    assert counts == {"sums": 20, "talk": 10}
    assert furthest(given, mixed) == 0


def test_packed_documents_learn_from_their_teachers(bench):
    texts = [str(bench.folder / f"{name}-texts.jsonl") for name in EXPERTS]
    task = {"train_files": texts, "validation_files": None, "max_length": 32}

    out = bench.finish("packed", task=task | COLUMN, train={"tokens_per_rank": 80})

    # Some texts are held out.
    counts = {name: entry["rows"] for name, entry in taught_by(out).items()}
    assert 18 <= counts["sums"] <= 20
    assert 8 <= counts["talk"] <= 10


def test_served_teachers_are_asked_about_their_own_rows_alone(bench, routed):
    """With all tokens but one, the remaining probability is that of the last token."""
    folders = {name: bench.folder / name / "final" for name in EXPERTS}
    size = json.loads((folders["sums"] / "config.json").read_text())["vocab_size"]
    stubs = {n: Stub("vllm", name=n, model=Transformer(f)) for n, f in folders.items()}
    with serving(*stubs.values()) as urls:
        teachers = [
            {**spec, "server": {"url": [url], "model": spec["name"], "top_k": size - 1}}
            for spec, url in zip(bench.teachers(*EXPERTS), urls, strict=True)
        ]
        out = bench.finish("served", task=COLUMN, teachers=teachers)

    assert furthest(out, routed) < 2e-5
    asked = {name: len(stub.of("/v1/completions")) for name, stub in stubs.items()}
    # One epoch: 20 rows name sums and 10 name talk; both servers get the same requests as a check.
    assert asked["sums"] - asked["talk"] == 10
    assert asked["talk"] < 30
    assert read(out)["pool"]["distribution"] == "routed"
