"""Benchmarks that train students: valid and alike runs, and the numbers of their reports."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import reports
import yaml
from tiny_books import write_real_data

from lib import books, launching, stories
from lib.data import BOOKS, bert
from lib.launching import UnusableError
from lib.tables import columns_of
from megakd.errors import CheckpointError
from methods import homodistil, mixed_vocabulary, shrink

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnop", k=RNG.randint(2, 7))) for _ in range(300)]
ARMS = ("alone", "dual", "dual_tables", "down", "up", "matrices", "version_2", "version_2_pieces")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two books and a task, as the folder of real data has them."""
    return write_real_data(tmp_path / "data", BOOKS, WORDS)


def words(data: Path, *more: str) -> list[str]:
    out = str(data.parent / "out")
    return ["--data", str(data), "--out", out, "--tasks", "clinc150", "--quick", *more]


def report_of(student: dict, *, metric: str = "accuracy", seconds: dict, **more) -> dict:
    stages = [{"name": name, "seconds": value} for name, value in seconds.items()]
    scores = reports.entries("student", student) | {f"teacher.{metric}": 0.9}
    same = {"metric_name": metric, "baselines": [], "stages": stages, "student__parameters": 100}
    return reports.report_of(**same, **scores, **more)


def held_out(metric: str, **models: float) -> dict:
    scored = {f"{model}.held_out.{metric}": value for model, value in models.items()}
    return {"evaluation_sets": ["held_out"], **scored}


def test_every_run_of_homodistil_is_a_valid_config_of_the_same_text_steps_and_rate(data, load):
    given = homodistil.parse(words(data, "--seeds", "1"))
    launching.write_leg_configs(given.out, homodistil.trees(given))

    pruning = load(homodistil.pruning_legs(given))
    short, long = load(homodistil.teacher_legs(given)).values()
    tasks = load(homodistil.task_legs(given))

    assert [(c.method.schedule, c.method.pruning_end) for c in pruning.values()] == [
        *(("cubic", None), ("one_shot", None), ("one_shot", None), ("cubic", 7)),
    ]
    assert pruning["homodistil-1"].baselines == ("random", "alone")
    assert [name for name, c in pruning.items() if c.objective] == ["one_shot_alone-1"]
    assert len({(c.train, str(c.task.train_files)) for c in pruning.values()}) == 1
    assert (short.task.max_length, long.task.max_length) == (given.sizes.short, given.sizes.length)
    assert long.student.model == str(given.out / "teacher-short" / "final")
    assert len(tasks) == 7
    assert all(c.eval.keep_best is False for c in (*pruning.values(), *tasks.values()))


def test_the_variants_of_the_decoder_differ_in_the_method_alone(data, load):
    given = homodistil.parse(["--data", str(data), "--decoder", "--steps", "1000", "--seeds", "1"])
    given.out = data / "out"
    launching.write_leg_configs(given.out, homodistil.trees(given))

    result = load(homodistil.pruning_legs(given))

    assert len({(config.train, config.task.dataset) for config in result.values()}) == 1
    scores = {name: result[f"{name}-1"].method.score for name in ("late", *homodistil.SCORES)}
    assert [*scores.values()] == ["sensitivity", "platon", "magnitude", "random"]
    assert result["late-1"].method.pruning_end == 700
    assert result["one_shot-1"].method.pruning_start == 20


def test_a_piece_of_text_is_learned_or_held_out_and_the_sample_is_held_out(data, tmp_path):
    books.write_text(data, tmp_path / "text", books.QUICK._replace(pieces=None))

    train, some, sample = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "text" / f"{n}.jsonl" for n in ("train", "held_out", "sample"))
    )
    assert not {*train} & {*some}
    assert len(some) == pytest.approx(len(train) / 19, abs=2)
    assert len(sample) >= 2
    assert all(any(piece.startswith(part) for piece in some) for part in sample)


def test_a_pruned_student_and_a_baseline_of_its_run_have_their_loss_jump_and_seconds():
    kls = [{"step": n, "teacher_kl": kl} for n, kl in enumerate((0.1, 0.3, 0.2))]
    seconds = {"pruning-1": 3.0, "student": 4.0, "random": 6.0, "alone": 5.0}
    scored = held_out("loss", teacher=3.0, student=4.5, random=5.0, alone=6.0)
    report = report_of({}, seconds=seconds, pruning=kls, **scored)

    def of(name: str) -> dict:
        return homodistil.numbers({"homodistil-1": report, "late-1": None}, name, 1)

    assert of("homodistil") == {
        "loss": 4.5,
        "seconds": 7.0,
        "parameters": 100,
        "largest jump": pytest.approx(0.2),
    }
    assert of("alone") == {"loss": 6.0, "seconds": 5.0}
    assert (of("teacher"), of("late")) == ({"loss": 3.0}, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("homodistil", "| HomoDistil, homodistil |"),
        ("mixed_vocabulary", "| mixed vocabulary, books, version_2 |"),
    ],
)
def test_the_whole_chain_runs_and_a_second_start_repeats_nothing(data, run, name, shown):
    command = words(data, "--seeds", "1", "--ranks", "1", "--jobs", "1")

    first, second = (run(f"methods.{name}", *command) for _ in range(2))

    assert first.returncode == 0, first.stderr
    assert "has not finished" not in first.stdout
    assert shown in first.stdout
    assert "tokens/s" not in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.parametrize("text", ["books", "pydocs", "stories"])
def test_the_arms_of_a_mixed_vocabulary_differ_in_the_method_alone(data, load, text):
    teacher = data.parent / "teacher"
    teacher.mkdir()
    shape = bert(4, 4, 4, intermediate_size=4, max_position_embeddings=4)
    (teacher / "config.json").write_text(json.dumps(shape))
    given = mixed_vocabulary.parse(
        words(data, "--seeds", "1,2", "--text", text, "--teacher", str(teacher))
    )
    mixed_vocabulary.make_teacher(given)
    launching.write_leg_configs(given.out, mixed_vocabulary.trees(given))

    texts = load(mixed_vocabulary.student_legs(given))
    by_task = load(mixed_vocabulary.task_legs(given))

    assert [*texts] == [f"{arm}-{seed}" for seed in (1, 2) for arm in (*ARMS, "large_alone")]
    assert len({config.train for config in texts.values()}) == 1
    files = str(given.out / "text" / "train.jsonl") if text == "books" else None
    tasks = {(c.task.dataset, c.task.train_files, c.task.max_length) for c in texts.values()}
    datasets = {"pydocs": "runs/pydocs-texts", "stories": str(data.resolve() / stories.STORIES)}
    assert tasks == {(datasets.get(text), files, 16)}
    methods = [texts[f"{arm}-1"].method for arm in ARMS]
    assert [(m.version, m.direction, m.embeddings) for m in methods] == [
        *((1, "none", None), (1, "dual", None), (1, "dual", True)),
        *((1, "down", None), (1, "up", None), (1, "down", None)),
        *((2, "down", None), (2, "down", None)),
    ]
    assert [m.table for m in methods] == [*[None] * 6, "random", "pieces"]
    assert [m.teacher_learning_rate for m in methods] == [None, *[1e-4] * 7]
    assert methods[-1].teacher_steps == 5
    # A model of a task is read with its own tokenizer.
    assert len(by_task) == 4 + len(texts)
    assert {config.task.tokenizer for config in by_task.values()} == {None}
    patient = given.out / "alone-1" / "stages" / "patient_kd"
    assert by_task["clinc150-patient_kd-1"].student.model == str(patient)
    assert texts["large_alone-1"].task.tokenizer == str(teacher)


def test_a_teacher_that_is_not_there_is_named(data):
    command = [word for word in words(data) if word != "--quick"]
    with pytest.raises(UnusableError, match=r"make it with `python benchmarks methods\.homodistil"):
        mixed_vocabulary.main([*command, "--teacher", str(data / "no")])


def test_a_small_vocabulary_has_its_nats_time_and_tasks_by_seed():
    def of_text(nats: float, **stages: float) -> dict:
        scored = held_out("nats_per_character", student=nats, teacher=0.5, patient_kd=nats - 0.1)
        return report_of({}, seconds={"student": 4.0, **stages}, **scored)

    reports = {"sst2-version_2-1": report_of({"accuracy": 0.8}, seconds={}), "alone-2": None}
    reports["alone-1"] = of_text(2.0, patient_kd=6.0)
    reports["version_2-1"] = of_text(2.7, **{"mixed-teacher": 3.0})

    def of(model: str) -> dict:
        return columns_of(
            (1, 2), lambda seed: mixed_vocabulary.numbers(reports, ["sst2"], model, seed)
        )

    same = {"nats/char": {1: 2.7}, "seconds": {1: 7.0}, "parameters": {1: 100}}
    assert of("version_2") == {"sst2": {1: 80.0}, **same}
    assert (of("alone")["seconds"], of("patient_kd")["seconds"]) == ({1: 4.0}, {1: 6.0})
    assert of("patient_kd")["nats/char"][1] == pytest.approx(1.9)
    assert of("teacher") == {"nats/char": {1: 0.5}}


def shrink_given(folder: Path, *words: str):
    given = shrink.parse(["--data", str(folder), "--out", str(folder / "out"), *words])
    launching.write_config(given.out / "run.yaml", shrink.config(given))
    return given


@pytest.mark.parametrize("case", shrink.CASES)
def test_the_variants_of_shrink_are_valid_and_take_equal_steps(tmp_path, load, case):
    given = shrink_given(tmp_path, "--case", case)

    configs = load(shrink.leg(given, name, 7) for name in given.runs)

    assert len({(config.train, config.task.dataset) for config in configs.values()}) == 1
    methods = [config.method for config in configs.values()]
    steps = {(m.trial_steps, m.repair_steps + m.on_policy_steps) for m in methods}
    assert steps == {(60, 400), (None, 460)}
    alone = [m.candidates[0] for m in methods if len(m.candidates) == 1]
    assert alone == list(configs["shrink-7"].method.candidates)
    depths = [round(share * shrink.CASES[case].layers) for share in alone]
    assert depths == list(shrink.CASES[case].depths)
    assert configs["on_policy-7"].rollout is not None


def test_shrink_has_the_losses_of_its_teacher_its_baseline_and_the_cut_it_chose(tmp_path):
    log = [
        {"stage": "other", "eval/layers-2/loss": 1.0},
        {"stage": "trial-1", "eval/layers-2/loss": 5.0},
        {"stage": "trial-1", "eval/layers-2/loss": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    report = report_of({"loss": 2.0}, metric="loss", seconds={"trial-1": 2.0, "student": 3.0})
    report["stages"][0]["loss"] = 4.0
    report |= {"baselines": ["random"], "random.loss": 3.0}
    report["candidates"] = [
        {"shape": f"{layers} layers, 1 neurons", "metric": kl, "chosen": layers == 2}
        for layers, kl in {3: 0.7, 2: 0.6}.items()
    ]

    result = shrink.numbers(report, tmp_path)

    losses = {"loss": 2.0, "teacher": 0.9, "random": 3.0, "trial": 4.0, "cut": 5.0}
    divergences = {"KL of 3 layers": 0.7, "KL of 2 layers": 0.6}
    assert result == {**losses, **divergences, "layers": 2, "seconds": 5.0, "trial s": 2.0}


def test_a_finished_leg_is_not_started_again_and_one_of_other_settings_is_refused(
    data, monkeypatch
):
    given = shrink_given(data, "--runs", "layers-2")
    leg = shrink.leg(given, "layers-2", 1)
    leg.output.mkdir(parents=True)
    config = yaml.safe_load((given.out / "run.yaml").read_text())
    config["method"] |= {"candidates": [0.4], "trial_steps": None, "repair_steps": 460}
    text = yaml.safe_dump(config | {"seed": 1, "output_dir": str(leg.output)})
    (leg.output / "config.yaml").write_text(text)

    assert launching.finished(leg) is None
    report = reports.report_of(environment__ranks=1)
    (leg.output / "report.json").write_text(json.dumps(report))
    assert launching.report_of(leg, ranks=1) == json.loads(json.dumps(report))
    with pytest.raises(CheckpointError, match="finished run of another config"):
        launching.finished(leg._replace(overrides=(*leg.overrides, "train.max_steps=77")))


def test_a_tokenizer_of_llama2c_has_its_pieces_best_merge_first_and_unknown_characters_as_bytes(
    tmp_path,
):
    # Begins as every such file does; of the pieces the first has the best score.
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *bytes_, "bc", "ab", " ", "a", "b", "c"]
    content = struct.pack("<i", 7)
    for index, text in enumerate(texts):
        content += struct.pack("<fi", -float(max(0, index - 259)), len(text)) + text.encode()
    path = tmp_path / "tok.bin"
    path.write_bytes(content)
    pieces = stories.read_pieces(path)
    tokenizer = stories.stories_tokenizer(pieces)

    ids = tokenizer("a\né")["input_ids"]

    assert [piece.text for piece in pieces[259:]] == ["bc", "ab", "▁", "a", "b", "c"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["<s>", "▁", "a", "bc"]
    assert tokenizer.convert_ids_to_tokens(ids)[3:] == ["<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\né"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends in the middle of piece 264"):
        stories.read_pieces(path)
