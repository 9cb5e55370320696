"""Losses and methods of other packages: the page's own code, and what breaks the contract."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megakd.config.file import config_of, config_tree, dump_config, load_config
from megakd.config.terms import Shape
from megakd.data.batch import Batch, LogitWarp, LossInputs, Outputs
from megakd.errors import ConfigError
from megakd.losses.objective import PluginLoss, build_objective, logits_of, teacher_needs
from megakd.stage import lower_is_better
from megakd.training.metrics import task_metrics

CONFIG = {
    "output_dir": "runs/x",
    "task": {"type": "classification", "dataset": "texts"},
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
    "method": {"name": "single"},
}
BASE = """
from pydantic.dataclasses import dataclass
from megakd.config.options import MethodOptions
from megakd.config.terms import STRICT, PluginTerm

strict = dataclass(config=STRICT, frozen=True, kw_only=True)

@strict
class Good(PluginTerm):
    unit = "examples"
    def total(self, student, teacher, batch):
        return student.logits.sum()

@strict
class NoUnit(PluginTerm):
    total = Good.total

@strict
class NoTotal(PluginTerm):
    unit = "examples"

class Plain(PluginTerm):
    unit, total = "examples", Good.total

@strict
class Vector(Good):
    def total(self, student, teacher, batch):
        return student.logits

@strict
class Inside(Good):
    reads_hidden_states = True

@strict
class NoRun(MethodOptions):
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def page(repository: Path, packages: Path) -> str:
    """docs/plugins.md; its files are written where they can be imported."""
    text = (repository / "docs" / "plugins.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python (\S+\.py)\n(.*?)```", text, re.DOTALL):
        (packages / name).write_text(code, encoding="utf-8")
    (packages / "broken_plugins.py").write_text(BASE, encoding="utf-8")
    importlib.invalidate_caches()
    return text


def shown(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def message_of(**sections: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of({**CONFIG, **sections})
    return str(caught.value)


def test_the_run_config_of_the_page_is_valid_and_survives_being_written(page, tmp_path):
    rest = {key: value for key, value in CONFIG.items() if key != "method"}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in rest.items()]
    path = tmp_path / "run.yaml"
    path.write_text("".join([*lines, *shown(page, "yaml")]), encoding="utf-8")

    config = load_config(path)

    assert config.objective[1].delta == 0.5
    assert config.method.label_steps == 50
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    options = {"weight": 0.5, "delta": 0.5, "reduction": "mean"}
    assert config_tree(config)["objective"][1] == {"loss": "my_losses:Huber", **options}


HUBER, WARM_UP = {"loss": "my_losses:Huber"}, {"name": "my_method:WarmUp"}
CACHED = {"model": "teacher", "cache": "answers"}
INSIDE = {"loss": "broken_plugins:Inside"}
TEXTS, ALONE = {"type": "causal_lm", "dataset": "texts"}, {"name": "finetune"}
# Sections of the run config, and the message.
REFUSED = [
    ({"objective": [HUBER | {"detla": 2}]}, '[0].detla = 2: unknown key; did you mean "delta"?'),
    ({"objective": [HUBER | {"reduction": "men"}]}, '(got "men"); did you mean "mean"?'),
    *(
        ({"objective": [{"loss": name}]}, message)
        for name, message in {
            "my_losses:Hubber": "module my_losses has no Hubber; did you mean my_losses:Huber?",
            "no_such_module:X": "module no_such_module cannot be imported",
            "huberr": 'unknown loss "huberr"',
            "broken_plugins:NoUnit": "NoUnit.unit must be examples, targets or tokens",
            "broken_plugins:NoTotal": "NoTotal has no total()",
            "broken_plugins:Plain": "Plain lacks the decorator @dataclass(config=STRICT",
            "json:loads": "loads is not a dataclass derived from PluginTerm",
        }.items()
    ),
    ({"method": WARM_UP | {"label_step": 2}}, "label_step = 2: unknown key; did you mean "),
    ({"method": {"name": "broken_plugins:NoRun"}}, "has no function run(config, lab)"),
    ({"method": {"name": "broken_plugins:Good"}}, "is not a dataclass derived from MethodOptions"),
    ({"eval": {"metric": "my_metrics:worst_labl"}}, "did you mean my_metrics:worst_label?"),
    ({"eval": {"metrics": ["json:loads"]}}, '[0]: "json:loads" is not a function(outputs'),
    ({"eval": {"metric": "no_such_module:x"}}, "module no_such_module cannot be imported"),
    ({"objective": [HUBER], "task": TEXTS}, "only task.type classification, regression, not causa"),
    ({"objective": [HUBER], "method": ALONE, "teacher": None}, "Huber compares with a teacher, an"),
    ({"method": WARM_UP, "teacher": None}, "WarmUp needs one; set teacher.model"),
    ({"objective": [INSIDE], "teacher": CACHED}, "Inside needs more than outputs, which teacher.c"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_a_plugin_is_checked_as_megakds_own_losses_methods_and_metrics_are(sections, message):
    assert message in message_of(**sections)


def test_a_metric_of_a_package_ranks_evaluations_as_it_says(monkeypatch):
    import my_metrics

    config = config_of({**CONFIG, "eval": {"metric": "my_metrics:worst_label"}})
    metrics = task_metrics(config.eval, "classification", ("accuracy",), ("a", "b"))
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    result = metrics.values(outputs, torch.tensor([0, 0, 1, 1]))

    assert result["my_metrics:worst_label"] == 0.5
    assert result["accuracy"] == 0.75
    assert metrics.main.higher_is_better
    monkeypatch.setattr(my_metrics.worst_label, "higher_is_better", False)
    again = task_metrics(config.eval, "classification", ("accuracy",), ("a", "b"))
    assert not again.main.higher_is_better
    assert lower_is_better("my_metrics:worst_label")
    assert not lower_is_better("gone_package:metric")


@pytest.mark.parametrize("returned", [np.zeros(2), "a text", None])
def test_a_metric_that_returns_no_number_is_refused_before_training(monkeypatch, returned):
    import my_metrics

    function = lambda outputs, labels: returned  # noqa: E731
    function.higher_is_better = True
    monkeypatch.setattr(my_metrics, "worst_label", function)
    config = config_of({**CONFIG, "eval": {"metric": "my_metrics:worst_label"}})

    message = r"the metric my_metrics:worst_label failed on outputs of shape \(32, 2\) .* a number"
    with pytest.raises(ConfigError, match=message):
        task_metrics(config.eval, "classification", ("accuracy",), ("a", "b"))


def test_its_sum_is_weighed_and_counted_like_any_other_and_ignores_empty_rows():
    term = config_of({**CONFIG, "objective": [{"loss": "my_losses:Huber", "weight": 3.0}]})
    objective = build_objective(term.objective, "classification", Shape(1, 4, 2), Shape(2, 8, 2))
    ours = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]], requires_grad=True)
    theirs = torch.zeros(3, 2)
    valid = torch.tensor([[True], [True], [False]])
    reading = LossInputs(
        student=Outputs(logits=ours),
        teacher=Outputs(logits=theirs),
        batch=Batch({}, torch.tensor([0, 1, -100]), valid),
        weights=objective.weights,
        per_unit={"examples": torch.tensor(0.5)},
    )

    (evaluated,) = objective([reading])

    each = functional.huber_loss(ours[:2], theirs[:2], reduction="none").mean(-1).sum()
    assert evaluated.sums["my_losses:Huber"].item() == pytest.approx(each.item())
    assert evaluated.total.item() == pytest.approx(3.0 * 0.5 * each.item())
    evaluated.total.backward()
    assert ours.grad[2].abs().sum() == 0


def test_a_plugin_gets_hidden_states_of_both_models_and_is_named_without_a_single_number():
    inside = config_of({**CONFIG, "objective": [INSIDE]}).objective
    shapes = Shape(1, 4, 2), Shape(2, 8, 2)
    made = build_objective(inside, "classification", *shapes)
    assert made.needs.hidden_layers == (0, 1)
    assert teacher_needs(inside, *shapes).hidden_layers == (0, 1, 2)
    config = config_of({**CONFIG, "objective": [{"loss": "broken_plugins:Vector"}]})
    group = PluginLoss(config.objective[0], layers=1)
    batch = Batch({}, torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    answer = Outputs(logits=torch.zeros(1, 2))
    units = {"examples": torch.tensor(1.0)}
    reading = LossInputs(answer, answer, batch, {group.term.loss: 1.0}, units)

    with pytest.raises(ConfigError, match=r"broken_plugins:Vector returned shape \(1, 2\); total"):
        group(reading)


def test_logits_of_a_language_model_are_formed_at_its_targets():
    class Head:
        warp = LogitWarp()

        def read(self):
            return torch.eye(3, 2), torch.ones(3)

    read = logits_of(Outputs(hidden=torch.tensor([[1.0, 2.0]]), head=Head()))

    assert read.tolist() == [[2.0, 3.0, 1.0]]


def test_a_run_with_the_method_and_the_loss_of_the_page(one_rank, page, tmp_path):
    from tiny_runs import bert, write_config, write_reviews
    from tiny_runs import config_tree as tiny_tree

    task = {"type": "classification", "dataset": str(write_reviews(tmp_path / "reviews"))}
    tree = tiny_tree(
        tmp_path / "out",
        task,
        teacher={"model": bert(2), "finetune": {"max_steps": 2}},
        method={"name": "my_method:WarmUp", "label_steps": 2},
        objective=[{"loss": "soft_target_kl"}, {"loss": "my_losses:Huber"}],
        eval={"metric": "my_metrics:worst_label"},
    )
    config = write_config(tmp_path / "run.yaml", tree)

    outcome = one_rank.train("--config", config)
    planned = one_rank.megakd("plan", config)

    assert outcome.code == 0, outcome.err
    assert planned.code == 0, planned.err
    log = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "train/my_losses:Huber" in log
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["metric_name"] == "my_metrics:worst_label"
    assert 0 <= report["student.my_metrics:worst_label"] <= 1
    stages = [stage["name"] for stage in report["stages"]]
    assert stages == ["labels", "teacher-finetune", "student"]
