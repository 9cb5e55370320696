"""The benchmark of mixed vocabularies: its runs are valid, its sizes and numbers are right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_books import write_real_data
from transformers import BertConfig, BertForMaskedLM

from lib.books import Sizes
from lib.data import BOOKS
from lib.launching import UnusableError, write_leg_configs
from methods import mixed_vocabulary as mixed
from methods.mixed_vocabulary import Found

TEACHER = Sizes()
ARMS = ("alone", "dual", "dual_tables", "down", "up", "version_2")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two books and a task, as the folder of real data has them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    return write_real_data(tmp_path / "data", BOOKS, words)


@pytest.fixture
def teacher(tmp_path) -> Path:
    """The config of a pretrained teacher; its weights are not read."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    shape = {
        "num_hidden_layers": TEACHER.layers,
        "hidden_size": TEACHER.width,
        "intermediate_size": 4 * TEACHER.width,
        "num_attention_heads": TEACHER.heads,
        "max_position_embeddings": TEACHER.length,
    }
    keys = {"model_type": "bert", "vocab_size": TEACHER.vocabulary, "dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def words(data: Path, *more: str) -> list[str]:
    out = str(data.parent / "out")
    return ["--data", str(data), "--out", out, "--tasks", "clinc150", *more]


@pytest.fixture
def configs(data, teacher, load):
    """Return the configs of the runs on text and on tasks, by name."""

    def of(*more: str):
        given = mixed.parse(words(data, "--teacher", str(teacher), *more))
        mixed.make_teacher(given)
        write_leg_configs(given.out, mixed.trees(given))
        return given, load(mixed.student_legs(given)), load(mixed.task_legs(given))

    return of


@pytest.mark.parametrize("text", ["books", "pydocs"])
def test_every_run_is_a_valid_config_of_the_same_text_steps_and_rate(configs, teacher, text):
    given, texts, by_task = configs("--seeds", "1,2", "--quick", "--text", text)
    assert [*texts] == [f"{arm}-{seed}" for seed in (1, 2) for arm in (*ARMS, "large_alone")]
    assert len({config.train for config in texts.values()}) == 1
    tasks = [config.task for config in texts.values()]
    files = str(given.out / "text" / "train.jsonl") if text == "books" else None
    assert {(task.dataset, task.train_files) for task in tasks} == {
        ("pydocs" if text == "pydocs" else None, files)
    }
    assert {(task.max_length, task.whole_word_masking) for task in tasks} == {(16, True)}
    assert all(config.eval.keep_best is False for config in texts.values())
    # A model of a task is read with its own tokenizer.
    assert len(by_task) == 4 + len(texts)
    assert {config.task.tokenizer for config in by_task.values()} == {None}
    assert by_task["clinc150-teacher-1"].student.model == str(teacher)
    patient = given.out / "alone-1" / "stages" / "patient_kd"
    assert by_task["clinc150-patient_kd-1"].student.model == str(patient)
    assert texts["large_alone-1"].task.tokenizer == str(teacher)


def test_the_arms_differ_in_the_method_alone(configs):
    _, texts, _ = configs("--seeds", "3")
    small = [texts[f"{arm}-3"] for arm in ARMS]
    methods = [config.method for config in small]
    assert [(m.version, m.direction, m.embeddings) for m in methods] == [
        (1, "none", None),
        (1, "dual", None),
        (1, "dual", True),
        (1, "down", None),
        (1, "up", None),
        (2, "down", None),
    ]
    assert [config.baselines for config in small] == [("patient_kd",), *[()] * 5]
    assert [m.teacher_learning_rate for m in methods] == [None, *[1e-4] * 5]
    assert methods[-1].teacher_steps == 500
    assert len({(str(config.student), config.teacher.model) for config in small}) == 1


def parameters(shape: dict, vocabulary: int) -> int:
    """Return the number of weights of a masked language model of a shape."""
    keys = {key: value for key, value in shape.items() if key != "model_type"}
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(vocab_size=vocabulary, **keys))
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_small_student_takes_under_7_mb_and_a_tenth_of_the_large_one(data, teacher):
    given = mixed.parse(words(data, "--teacher", str(teacher)))
    small = parameters(mixed.small_shape(given), given.student.vocabulary)
    large = parameters(mixed.large_shape(teacher), TEACHER.vocabulary)
    assert 4 * small < 7e6
    assert large >= 10 * small


def test_a_teacher_or_data_that_is_not_there_is_named(data):
    with pytest.raises(UnusableError, match=r"make it with `python benchmarks methods\.homodistil"):
        mixed.main(words(data, "--teacher", str(data / "no")))
    (data / "clinc150" / "data_full.json").unlink()
    with pytest.raises(UnusableError, match=r"data_full\.json does not exist"):
        mixed.main(words(data, "--quick"))


def text_report(nats: float, *, teacher=True, parameters=100, stages=None) -> dict:
    named = {"student": nats, "teacher": 0.5, "patient_kd": nats - 0.1}
    metrics = {name: {"nats_per_character": value} for name, value in named.items()}
    return {
        "evaluation_sets": {"held_out": {"metrics": metrics}},
        "student": {"parameters": parameters, "bytes": 4 * parameters},
        "teacher": {"parameters": 1000} if teacher else None,
        "stages": [
            {"name": n, "seconds": s} for n, s in {"student": 4.0, **(stages or {})}.items()
        ],
    }


@pytest.fixture
def found() -> Found:
    """Two seeds of three arms; one task is not finished in the second seed."""
    reports: dict = {}
    for seed in (1, 2):
        reports[f"alone-{seed}"] = text_report(1.0 + seed, stages={"patient_kd": 6.0})
        before = {"mixed-teacher": 3.0}
        reports[f"version_2-{seed}"] = text_report(1.6 + seed * 1.1, stages=before)
        reports[f"large_alone-{seed}"] = text_report(0.9, teacher=False, parameters=1000)
    scores = {"alone": (0.5, 0.7), "version_2": (0.8, None), "large_alone": (0.8, 0.84)}
    for name, by_seed in scores.items():
        for seed, accuracy in enumerate(by_seed, start=1):
            done = {"metric_name": "accuracy", "student": {"metrics": {"accuracy": accuracy}}}
            done |= {"teacher": None}
            reports[f"sst2-{name}-{seed}"] = None if accuracy is None else done
    return Found(reports, [1, 2], ["sst2"], teacher_bytes=2_000_000)


def test_a_line_has_the_scores_sizes_and_times_of_its_model(found):
    lines = {model: mixed.numbers(found, model) for model in mixed.MODELS}

    first = {title: by[1] for title, by in lines["version_2"].items()}
    assert first["nats/char"] == pytest.approx(2.7)
    assert first["sst2"] == pytest.approx(80)
    assert first["parameters"] == 100
    assert first["MB"] == pytest.approx(4e-4)
    assert first["of teacher"] == pytest.approx(0.1)
    assert first["seconds"] == 7.0
    # The baseline and the teacher are read from the run of `alone`.
    patient, teacher = lines["patient_kd"], lines["teacher"]
    assert lines["alone"]["seconds"] == {1: 4.0, 2: 4.0}
    assert patient["nats/char"] == pytest.approx({1: 1.9, 2: 2.9})
    assert patient["seconds"] == {1: 6.0, 2: 6.0}
    assert (teacher["parameters"][1], teacher["MB"][1]) == (1000, 2.0)
    assert "seconds" not in teacher
    # Differences pair the seeds that both have.
    gains = mixed.less_alone(lines, "version_2", ["sst2"])
    assert gains["nats/char"] == pytest.approx({1: 0.7, 2: 0.8})
    assert gains["sst2"] == pytest.approx({1: 30.0})


@pytest.mark.slow
def test_the_whole_chain_runs_and_a_second_start_repeats_nothing(data, run):
    command = words(data, "--quick", "--seeds", "1", "--ranks", "1", "--jobs", "1")

    first, second = (run("methods.mixed_vocabulary", *command) for _ in range(2))

    assert first.returncode == 0, first.stderr
    assert "has not finished" not in first.stdout
    assert "| mixed vocabulary, books, version_2 |" in first.stdout
    assert "tokens/s" not in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
