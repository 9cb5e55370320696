"""Meanings of keys: mixtures, terms on a source, budgets, rollouts, servers, folders."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import config_of, config_tree, dump_config, load_config
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.sections import (
    RolloutConfig,
    RolloutServerConfig,
    Sampling,
    TrainConfig,
    rollout_block,
)
from megakd.errors import ConfigError
from megakd.training.inputs import cache_folder

TEXT = ("task={type: causal_lm, dataset: rows.jsonl}", "objective=[{loss: soft_target_kl}]")


def loaded(run_file: Path, *overrides: str) -> RunConfig:
    return load_config(run_file, (*TEXT, *overrides))


def test_values_that_other_programs_read_mean_the_same(run_file):
    address = "rollout={max_new_tokens: 8, server: {url: ['http://a:8000/v1'], push: none}}"

    config = loaded(run_file, "student.lora={target_modules: all-linear}", address)

    assert config.student.lora.target_modules is None
    assert config.rollout.server.url == ("http://a:8000",)


def test_a_mixture_replaces_the_data_set(run_file):
    mixture = "task.mixture={a: {files: a.jsonl, weight: 1}, b: {files: [b.jsonl], weight: 0.5}}"

    task = loaded(run_file, "task.dataset=null", mixture).task

    assert task.mixture
    assert [part.weight for part in task.mixture.values()] == [1, 0.5]
    assert task.data_name == "a, b"


@pytest.mark.parametrize("key", ["on", "'on'"])
def test_a_loss_may_be_listed_once_for_each_source_of_texts(run_file, key):
    """The key `on` is text, also without quotes, and counts all targets if it is missing."""
    losses = [f"{{loss: soft_target_kl, {key}: {source}}}" for source in ("data", "rollouts")]
    objective = f"objective=[{{loss: soft_target_kl}}, {', '.join(losses)}]"

    config = loaded(run_file, objective, "rollout={max_new_tokens: 8, mix: 0.5}")

    terms = config.objective or ()
    assert [getattr(term, "on", "missing") for term in terms] == [None, "data", "rollouts"]


@pytest.mark.parametrize(
    ("override", "rows"),
    [("seed=1", 4), ("train.tokens_per_rank=4096", 32), ("eval.per_device_eval_batch_size=9", 9)],
)
def test_models_are_scored_on_as_many_rows_as_fit_into_the_budget(run_file, override, rows):
    train = "train={per_device_train_batch_size: 32, tokens_per_rank: 256}"

    assert loaded(run_file, "task.max_length=64", train, override).eval_rows() == rows


def test_the_shortest_rollout_generates_all_rows_from_the_student_as_it_is(run_file):
    rollout = loaded(run_file, "rollout={max_new_tokens: 8}").rollout

    assert (rollout.mix, rollout.max_staleness) == (1, 0)
    assert rollout.how == Sampling(8, temperature=1.0, top_p=1.0, top_k=None)


@pytest.mark.parametrize("is_served", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_no_text_is_staler_than_allowed_and_every_step_is_in_its_own_block(staleness, *, is_served):
    """A server generates the texts of a block one step before the block."""
    server = RolloutServerConfig(url=("http://a:1",), push="none")
    rollout = RolloutConfig(
        max_new_tokens=4, max_staleness=staleness, from_step=5, server=server if is_served else None
    )

    for step in range(5, 40):
        block = rollout_block(step, rollout)
        assert step in block
        assert all(rollout_block(other, rollout) == block for other in block)
        assert block[-1] - block[0] + rollout.works_ahead == staleness
        assert block[0] >= 5


@pytest.mark.parametrize(
    ("who", "server", "model"),
    [
        ("", "push: full, folder: w", "student"),
        ("", "push: full, folder: w, model: m", "m"),
        ("by: teacher, ", "push: none", "teacher"),
    ],
)
def test_the_served_model_is_the_one_that_generates_or_is_named(run_file, who, server, model):
    section = f"{{max_new_tokens: 4, {who}server: {{url: ['http://a:8000/'], {server}}}}}"

    config = loaded(run_file, f"rollout={section}")

    assert config.served_model == model
    assert config.rollout.server.url == ("http://a:8000",)


@pytest.mark.parametrize(("more", "model"), [("", "big"), (", model: m", "m")])
def test_a_served_teacher_answers_with_64_tokens_of_its_own_model(run_file, more, model):
    server = f"{{url: ['http://a:1']{more}}}"

    teacher = loaded(run_file, f"teacher={{model: big, server: {server}}}").teacher

    assert (teacher.server.top_k, teacher.served_model) == (64, model)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_folder_of_the_config_may_begin_with_the_home_folder_of_somebody(run_file, home):
    config = load_config(run_file, ["output_dir=~/runs/x", "teacher.cache=~/answers"])

    assert (config.output_dir, config.teacher.cache) == (home / "runs/x", home / "answers")
    text = message_of(run_file, "output_dir=~nosuchuser/x")
    assert "output_dir: ~nosuchuser is the home folder of a user that does not exist" in text
    assert "'~nosuchuser/x'" in text


ROWS = "task={type: causal_lm, dataset: d}; teacher.model=t; objective=null"
PATHS = [
    "output_dir=HERE",
    "task.dataset=HERE",
    "task.tokenizer=HERE",
    f"{ROWS}; task.chat_template=HERE",
    "task.dataset=null; task.train_files=HERE",
    "task.dataset=null; task.train_files=[a.csv, 'HERE/*.csv']",
    "task.evaluation_sets.hard=HERE",
    f"{ROWS}; task.dataset=null; task.mixture.a={{files: ['HERE'], weight: 1}}",
    "teacher.model=HERE",
    "student.model=${SCRATCH}/a",
    "student.deepspeed=HERE",
    "teacher.finetune=null; teacher.cache=HERE",
]


@pytest.mark.parametrize("overrides", PATHS)
def test_a_variable_in_any_path_is_put_in_where_it_is_set(run_file, home, monkeypatch, overrides):
    (home / "a").write_text('{"zero_optimization": {"stage": 0}}')  # a chat template too
    monkeypatch.setenv("SCRATCH", str(home))
    overrides = overrides.replace("HERE", "$SCRATCH/a").split("; ")

    written = dump_config(load_config(run_file, overrides))

    assert f"{home}/a" in written
    assert "SCRATCH" not in written


@pytest.mark.parametrize("value", [None, ""])
def test_paths_with_a_variable_that_is_not_set_are_refused(run_file, monkeypatch, value):
    monkeypatch.delenv("SCRATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SCRATCH", value)
    paths = [path.split("; ")[-1].replace("HERE", "$SCRATCH/a") for path in PATHS]

    message = message_of(run_file, *ROWS.split("; "), *paths)

    for path in paths:
        key = path.partition("=")[0]
        assert re.search(rf"{key}\S*: the variable SCRATCH is not set \(got '", message)


def test_a_dollar_sign_that_names_no_variable_of_a_path_stays(run_file, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.delenv("USD", raising=False)
    (home / "in$USD.csv").touch()

    config = loaded(run_file, "task.dataset=in$USD.csv", "task.label_column=$USD", "output_dir=a$5")

    assert (config.task.dataset, config.task.label_column) == ("in$USD.csv", "$USD")
    assert config.output_dir == Path("a$5")
    assert expand_path("in$USD.csv") == Path("in$USD.csv")


@pytest.mark.parametrize(
    ("value", "folder"),
    [("", ".cache/megakd"), ("$HOME/fast", "fast"), ("~", "."), ("~/fast/cache", "fast/cache")],
)
def test_the_cache_variable_may_be_empty_or_name_the_home_folder(home, monkeypatch, value, folder):
    monkeypatch.setenv("MEGAKD_CACHE", value)

    assert cache_folder() == home / folder


@pytest.mark.parametrize(
    ("text", "path"),
    [("~/model", "me/model"), ("model/~", "model/~"), ("~no-such-user/x", "~no-such-user/x")],
)
def test_the_home_folder_is_put_in_where_a_path_begins_with_it(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "me")

    assert expand_path(text) == Path(path)


NO_TRACKER = [(names, ()) for names in ("none", "None", "[none]", "[]", "null")]


@pytest.mark.parametrize(
    ("value", "trackers"),
    [*NO_TRACKER, ("wandb", ("wandb",)), ("[wandb, mlflow]", ("wandb", "mlflow"))],
)
def test_values_are_reported_to_one_tracker_several_or_none(run_file, value, trackers):
    assert load_config(run_file, [f"log.report_to={value}"]).log.report_to == trackers
    message = message_of(run_file, "log.report_to=[none, wandb]")
    assert "must be 'tensorboard', 'wandb', 'mlflow', " in message


LEARNT = {
    "output_dir": "out",
    "task": {"type": "causal_lm", "dataset": "rows.jsonl"},
    "teacher": {"model": "large"},
    "student": {"model": "small"},
    "method": {"name": "single"},
    "objective": [{"loss": "soft_target_kl"}],
}
WEIGHTS, ADAPTERS, OTHERS = (5e-5, "cosine", 0.03), (2e-4, "cosine", 0.03), (5e-5, "linear", 0.0)
ADAPTED = {"student": {"model": "small", "lora": {}}}
TUNED = {"teacher": {"model": "large", "finetune": {"max_steps": 3}}}
POOL = {"teacher": None, "teachers": [{"name": "a", "model": "b"}, {"name": "c", "model": "d"}]}
CLASSES = {"task": {"type": "classification", "dataset": "rows.jsonl"}}
UNTAUGHT = {"teacher": None, "objective": None, "method": {"name": "finetune"}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, WEIGHTS),
        ({"train": {"max_steps": 3}}, WEIGHTS),
        (ADAPTED, ADAPTERS),
        ({**ADAPTED, **TUNED}, WEIGHTS),  # the teacher inherits the rate for all its weights
        (
            {**ADAPTED, "teacher": {"model": "large", "finetune": {"learning_rate": 1e-5}}},
            ADAPTERS,
        ),
        ({**POOL, "method": {"name": "mean_of_teachers"}}, WEIGHTS),
        (CLASSES, OTHERS),
        (UNTAUGHT, OTHERS),
        ({**ADAPTED, "train": {"learning_rate": 5e-5}}, (5e-5, "cosine", 0.03)),
        ({"train": {"lr_scheduler_type": "linear", "warmup_ratio": 0}}, OTHERS),
    ],
)
def test_a_decoder_that_learns_from_a_teacher_has_defaults_of_its_own(sections, expected):
    config = config_of({**LEARNT, **sections})

    train = config.train
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio) == expected
    assert config_of(config_tree(config)) == config
    assert replace(config, train=TrainConfig()).train == TrainConfig()  # which has all its keys


def test_a_wrong_train_section_is_told_in_one_line_whatever_the_task():
    for section, problem in (([1], "must be a mapping"), ({"learning_rat": 1}, "unknown key")):
        with pytest.raises(ConfigError) as refused:
            config_of({**LEARNT, "train": section})
        assert problem in str(refused.value)
        assert "\n" not in str(refused.value)
