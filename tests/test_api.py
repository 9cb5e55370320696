"""megakd from Python: what a notebook does, call after call, and rows that it has."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from tiny_runs import config_tree, save_tokenizer, write_config, write_reviews
from transformers import BertConfig, BertForSequenceClassification

import megakd
from megakd.commands.predictions import pipeline_of, predict_texts
from megakd.data.python_rows import file_of_rows, sources_of_rows
from megakd.data.readers import files_table
from megakd.data.records import Record
from megakd.errors import ConfigError, MegakdError

NOTEBOOK = """
import json, logging, os, random, signal, sys, threading, time, warnings
import megakd
assert "torch" not in sys.modules and "transformers" not in sys.modules, "not light"
from megakd.config import file, run
assert "torch" not in sys.modules, "the config is not light"
from pathlib import Path

tree, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
import numpy, torch
root, ours = logging.getLogger(), logging.getLogger("megakd")
torch.manual_seed(5); random.seed(5)

def facts():
    return (list(root.handlers), root.level, ours.level, dict(os.environ), list(warnings.filters),
            torch.random.get_rng_state().tolist(), random.getstate(), torch.get_num_threads())

torch.random.initial_seed()
before = facts()
results = {}
first = megakd.train(tree, [f"output_dir={out}/first"])
assert facts() == before, "train changed the process"
second = megakd.train(megakd.load_config(sys.argv[1]), [f"output_dir={out}/second", "seed=7"])
again = megakd.train(tree, [f"output_dir={out}/first"])
results["metrics"] = [dict(run.metrics) for run in (first, again, second)]
results["evaluated"] = megakd.evaluate(sys.argv[1], overrides=[f"output_dir={out}/first"])
results["other"] = megakd.evaluate(tree, second.student)
results["peak"] = megakd.plan(tree, ranks=2, device="cpu").peak_bytes_per_rank
try:
    megakd.train(tree, ["train.max_steps=-1"])
except megakd.MegakdError as error:
    results["error"] = str(error)
try:
    megakd.evaluate(tree, out / "nowhere")
except megakd.MegakdError as error:
    results["missing"] = str(error)
third = megakd.train({**tree, "output_dir": out / "third"})
results["student"] = str(third.student)
results["report"] = third.report["method"]
rows = [{"text": t, "label": l} for t, l in (("a fine film", "good"), ("a dull film", "bad"))] * 20
short = ["train={max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0.001}",
         "teacher.finetune={max_steps: 2}", "task.max_length=16", "eval.latency=false"]
shape = {"config": {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16,
                    "num_attention_heads": 2, "intermediate_size": 32}}
taught = megakd.distil(third.student, shape, data=rows, output_dir=out / "taught", overrides=short)
shrunk = megakd.shrink(taught.student, data=rows, flops=0.5, output_dir=out / "shrunk",
                       overrides=short)
results["shrunk"] = [one.pipeline()("a fine film")[0]["label"] for one in (shrunk, taught)]
results["methods"] = [one.report["method"] for one in (shrunk, taught)]
results["shown"] = taught._repr_html_()
assert facts() == before, "a call changed the process"

def press():
    while not (out / "long" / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background
threading.Thread(target=press).start()
long = [f"output_dir={out}/long", "train.max_steps=80", "log.logging_steps=1"]
try:
    megakd.train(tree, long)
except KeyboardInterrupt as stop:
    print("stopped:", stop)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    megakd.train(tree, long)
Path(sys.argv[3]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Results of the notebook-like script."""
    folder = tmp_path_factory.mktemp("notebook")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(folder / "out", task, log={"report_to": ["tensorboard"]})  # the default
    paths = [write_config(folder / "run.yaml", tree), folder, folder / "results.json"]
    command = [sys.executable, "-c", NOTEBOOK, *map(str, paths)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert shown.returncode == 0, shown.stderr
    outcome = {"folder": folder, "output": shown.stdout + shown.stderr}
    return json.loads((folder / "results.json").read_text()) | outcome


def test_trainings_evaluations_and_plans_follow_one_another_in_one_process(results):
    first, again, second = results["metrics"]
    assert first == again
    assert results["evaluated"]["accuracy"] == pytest.approx(first["accuracy"])
    assert results["other"]["accuracy"] == pytest.approx(second["accuracy"])
    assert results["peak"] > 0


def test_a_result_names_the_student_and_holds_the_report(results):
    student = Path(results["student"])

    assert (student / "config.json").is_file()
    assert results["report"] == "finetune"
    assert student == results["folder"] / "third" / "final"
    assert results["methods"] == ["shrink", "single"]
    assert set(results["shrunk"]) <= {"good", "bad"}
    assert "<pre>single on " in results["shown"]


def test_a_mistake_is_an_error_of_megakd_and_the_next_call_works(results):
    assert results["error"].startswith('override "train.max_steps=-1": train.max_steps: must be')
    assert "nowhere" in results["missing"]


@pytest.fixture
def tree(tmp_path) -> dict:
    return config_tree(tmp_path, {"type": "classification", "dataset": "texts"})


def test_a_config_may_be_a_path_a_mapping_or_a_config(tmp_path, tree):
    path = write_config(tmp_path / "run.yaml", tree)

    config = megakd.load_config(path)

    assert config == megakd.load_config(str(path)) == megakd.load_config(tree)
    assert config == megakd.load_config({**tree, "output_dir": tmp_path})
    assert megakd.load_config(config) == config
    assert megakd.load_config(config, ["seed=7"]).seed == 7
    with pytest.raises(ConfigError, match=r"config: sed = 1: unknown key; did you mean .seed."):
        megakd.load_config({**tree, "sed": 1})
    with pytest.raises(ConfigError, match=r"config: <object .* is a object; a config holds"):
        megakd.load_config({**tree, "train": {"max_steps": object()}})
    changed = replace(config, task=replace(config.task, dataset=None, dataset_config="b"))
    with pytest.raises(ConfigError, match=r"task\.dataset_config: has no effect without"):
        megakd.load_config(changed)


@pytest.mark.parametrize(("config", "shown"), [(None, "null"), (3, "3"), (["a"], '["a"]')])
def test_what_is_no_config_is_refused_saying_what_is_one(config, shown):
    message = f"config is {shown}; give the path of a YAML file, a map"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        megakd.load_config(config)


@pytest.mark.parametrize("overrides", ["seed=7", {"seed": 7}, None, [3], [("seed", 7)]])
def test_what_is_no_list_of_overrides_is_refused(tree, overrides):
    with pytest.raises(ConfigError, match=r"overrides is .*; give a list of texts such as"):
        megakd.load_config(tree, overrides)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"rank": 2}, 'unknown option --rank=2; did you mean "--ranks"? (megakd plan --help'),
        ({"ranks": 2.5}, "argument --ranks: invalid int value: '2.5'"),
        ({"device": "gpu"}, "argument --device: invalid choice: 'gpu'"),
        ({"gbps": [3]}, "--gbps must be one or two numbers as in 400,45, got [3]"),
    ],
)
def test_an_option_that_plan_does_not_know_is_refused(tree, cluster, message):
    with pytest.raises(MegakdError) as refused:
        megakd.plan(tree, **cluster)

    assert message in str(refused.value)


def test_the_configs_of_the_page_are_valid(repository):
    page = (repository / "docs" / "python.md").read_text(encoding="utf-8")
    tree = re.search(r"megakd\.train\(\n(.*?)\n\)", page, re.DOTALL)[1]

    assert megakd.load_config(json.loads(re.sub(r",(\s*[}\]])", r"\1", tree))).method.name
    for name in re.findall(r"megakd\.(\w+)\(", page):
        assert callable(getattr(megakd, name))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert "train" in dir(megakd)
    assert megakd.__version__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        megakd.trian  # noqa: B018


def test_a_training_that_is_told_to_stop_saves_and_the_next_call_goes_on(results):
    out = results["folder"] / "long"

    output = re.search(r"stopped by (\w+), student saved at step (\d+)", results["output"])

    assert output is not None, results["output"]
    assert output[1] == "SIGINT"
    assert (out / "checkpoints" / "student" / f"step-{output[2]}").is_dir()
    assert f"student: resumed at step {output[2]}" in results["output"]
    assert (out / "report.json").is_file()


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


ROWS = [{"text": "fine", "label": "good"}, {"text": None, "label": "bad"}]
CLASSES = Dataset.from_list(
    [{"text": "fine", "label": 1}, {"text": None, "label": 2}],
    features=Features(text=Value("string"), label=ClassLabel(names=["unused", "good", "bad"])),
)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        pd.DataFrame([{"text": "fine", "label": "good"}, {"text": float("nan"), "label": "bad"}]),
        {"text": ["fine", None], "label": np.array(["good", "bad"])},
        (row for row in ROWS),
        CLASSES,
        CLASSES.with_format("torch"),
        CLASSES.with_format("pandas"),
        CLASSES.to_iterable_dataset(),
        IterableDataset.from_generator(lambda: iter(CLASSES), features=CLASSES.features),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_are_a_file_that_is_named_by_its_content_and_written_once(tmp_path, rows):
    rows = [*rows] if isinstance(rows, Iterator) else rows
    path = file_of_rows(rows, tmp_path)

    table = files_table([Path(path)], "data")
    assert [record.values for record in table.records() if isinstance(record, Record)] == ROWS
    declared = isinstance(rows, Dataset | IterableDataset)
    assert table.class_names == ({"label": ("unused", "good", "bad")} if declared else {})
    before = Path(path).stat().st_mtime_ns
    assert file_of_rows(rows, tmp_path) == path
    assert Path(path).stat().st_mtime_ns == before
    assert file_of_rows(ROWS[:1], tmp_path) != path
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no row"),
        (7, "is a int; give a path"),
        (["a text"], "row 1 is a str; a row is a mapping"),
        ([{"text": "a"}, {"text": {("a", "b"): 1}}], "row 2, column 'text': keys must be str"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "column 'text' occurs more than"),
        ({"text": ["a"], "label": [1, 2]}, "different numbers of rows: {'text': 1, 'label': 2}"),
        ({"text": "a", "label": 1}, "is a dict; give a path"),
        ({"text": {0: "a"}, "label": {0: 1}}, "is a dict; give a path"),
        ({"text": iter("a"), "label": [1]}, "is a dict; give a path"),
        ({"text": ["a"], "label": np.array(1)}, "is a dict; give a path"),
        ({}, "is a dict; give a path"),
        (DatasetDict({"sft": CLASSES}), r"in data has no split named 'train'; its splits are sft"),
        ({"test": ROWS}, "in data has no split named 'train'; its splits are test"),
        ({"train": ROWS, "text": ["a"]}, "data: names train and text: give rows by split"),
        ({"train": 7}, "is a int; give a path"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, rows, message):
    with pytest.raises(megakd.MegakdError, match=message):
        sources_of_rows(rows, tmp_path)

    assert [*tmp_path.glob("data-*")] == []


def test_the_configs_for_those_who_come_from_other_tools_are_valid(repository):
    page = (repository / "docs" / "coming-from.md").read_text(encoding="utf-8")
    trees = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]

    names = [megakd.load_config(tree).method.name for tree in trees]

    assert names == ["single", "finetune", "shrink"]


@pytest.mark.parametrize("make", [dict, DatasetDict])
def test_rows_by_split_are_a_file_each(tmp_path, make):
    parts = {name: Dataset.from_list(ROWS) for name in ("train", "dev", "test")}

    keys = sources_of_rows(make(parts), tmp_path)

    assert [*keys] == ["train_files", "validation_files", "test_files"]
    assert {*keys.values()} == {file_of_rows(ROWS, tmp_path)}
    frames = {"train": pd.DataFrame(ROWS), "test": "held-out.csv"}
    files = sources_of_rows(frames, tmp_path)
    assert files == {"train_files": keys["train_files"], "test_files": "held-out.csv"}


@pytest.fixture
def several(tmp_path) -> tuple[Path, Any]:
    """A model of three labels whose bias alone decides, and the config of a run that made it."""
    keys = {"problem_type": "multi_label_classification", "threshold": 0.7, "num_labels": 3}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=16, **keys))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([2.0, 0.5, 3.0])  # 0.88, 0.62, 0.95
    model.save_pretrained(tmp_path / "final")
    save_tokenizer(tmp_path / "final", ["a few words"], kind="wordpiece")
    tree = config_tree(tmp_path, {"type": "classification", "dataset": "data.csv"})
    return tmp_path / "final", megakd.load_config(tree)


def test_a_text_gets_every_label_whose_probability_reaches_the_threshold(several):
    folder, config = several

    assert predict_texts(folder, config, ["a few", ("words", "a")]) == [["LABEL_2", "LABEL_0"]] * 2
    [first] = pipeline_of(folder, config)(["a few words " * 9])
    assert [one["label"] for one in first] == ["LABEL_2", "LABEL_0"]
    assert predict_texts(folder, config, []) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [("a text", "is one text"), (["a", 7], "number 2 is 7"), ([("a", "b", "c")], "number 1 is")],
)
def test_what_is_no_text_gets_no_prediction(several, texts, message):
    with pytest.raises(megakd.MegakdError, match=message):
        predict_texts(*several, texts)


def test_the_name_of_a_file_of_rows_stays_over_versions_of_the_libraries(tmp_path):
    rows = [{"text": "schön", "label": 1, "more": [0.5, None]}]

    # As the line was written by the first version.
    line = '{"text": "schön", "label": 1, "more": [0.5, null]}\n'
    name = f"data-{hashlib.sha256(line.encode()).hexdigest()[:12]}.jsonl"
    assert Path(file_of_rows(rows, tmp_path)).name == name
    assert Path(file_of_rows(Dataset.from_list(rows), tmp_path)).name == name
    assert Path(file_of_rows(CLASSES, tmp_path)).name == "data-b87aaed19307.parquet"


def test_a_transform_of_a_dataset_gives_its_rows(tmp_path):
    half = [{"text": "half \ud800"}]
    assert lines(file_of_rows(half, tmp_path)) == half
    rows = CLASSES.with_transform(lambda batch: {"text": [f"{n}!" for n in batch["label"]]})

    assert lines(file_of_rows(rows, tmp_path)) == [{"text": "1!"}, {"text": "2!"}]


def test_values_are_those_of_a_file_and_others_matter_only_where_they_are_read(tmp_path):
    call = [{"name": "f", "arguments": {"a": 0}}, {"name": "g", "arguments": {"b": 1.5, "c": None}}]
    read = {
        "number": (np.int64(3), 3),
        "tensor": (torch.tensor([1, 2]), [1, 2]),
        "calls": (call, call),
        "none": ([pd.NA, pd.NaT, None], [None] * 3),
        "time": (pd.NaT, None),
        "path": (Path("a/b"), "a/b"),
        "uuid": (UUID(int=1), str(UUID(int=1))),
        "date": (date(2024, 1, 2), "2024-01-02"),
        "span": (pd.Timedelta(days=1), "1 days 00:00:00"),
        "moment": (np.datetime64("2024-01-02"), "2024-01-02 00:00:00"),
        "decimal": ([Decimal(2), Decimal("1.5"), Decimal("inf")], [2, 1.5, float("inf")]),
        "image": ({"bytes": b"x"}, {"bytes": {"bytes": "…"}}),
    }
    rows = pd.DataFrame([{key: value for key, (value, _) in read.items()}])

    assert lines(file_of_rows(rows, tmp_path)) == [{key: value for key, (_, value) in read.items()}]
    assert lines(file_of_rows(pd.Series(["a"]), tmp_path)) == [{"text": "a"}]


def test_two_sizes_or_none_are_refused_before_anything_is_written(tmp_path):
    for size in ({}, {"speedup": "2x", "parameters": "1M"}):
        with pytest.raises(megakd.MegakdError, match="the size of the student is one of"):
            megakd.shrink("model", data=ROWS, output_dir=tmp_path / "out", **size)

    assert not (tmp_path / "out").exists()
