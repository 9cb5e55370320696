"""The key `on` of a loss term: where it is known, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megakd.commands.methods import catalogue
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.errors import ConfigError

SKEW = {"loss": "soft_target_skew_kl", "on": "data"}
REVERSE = {"loss": "soft_target_skew_reverse_kl", "on": "rollouts"}


ROLLOUTS = {"max_new_tokens": 8, "prompt_tokens": 4}


def loaded(
    tmp_path: Path, *terms: object, task: str = "causal_lm", rollout: object = ROLLOUTS
) -> RunConfig:
    path = tmp_path / "run.yaml"
    tree = {
        "output_dir": str(tmp_path / "out"),
        "task": {"type": task, "dataset": "pydocs"},
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "method": {"name": "single"},
        "objective": list(terms),
        "rollout": rollout,
    }
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, [])


def test_the_pair_of_distillm_2_is_read(tmp_path):
    config = loaded(tmp_path, SKEW, REVERSE)

    assert [getattr(term, "on", None) for term in config.objective or ()] == ["data", "rollouts"]


def test_a_term_on_rollouts_is_refused_in_a_run_that_generates_no_texts(tmp_path):
    with pytest.raises(
        ConfigError, match=r"objective\[1\]\.on: rollouts, and .* no texts.* the section rollout"
    ):
        loaded(tmp_path, SKEW, REVERSE, rollout=None)

    assert loaded(tmp_path, SKEW, rollout=None).rollout is None


@pytest.mark.parametrize(
    ("term", "keys", "source"),
    [
        (REVERSE, {"mix": {"rollout": 0.5, "data": 0.5}}, "data"),
        (REVERSE, {"from_step": 3}, "data"),
        (SKEW, {}, "rollouts"),
    ],
)
def test_rows_that_no_term_learns_from_are_refused(tmp_path, term, keys, source):
    with pytest.raises(ConfigError, match=rf"objective: no term learns from {source}"):
        loaded(tmp_path, term, rollout=ROLLOUTS | keys)


def test_a_term_without_the_key_counts_all_targets(tmp_path):
    (term,) = loaded(tmp_path, {"loss": "hard_cross_entropy"}).objective or ()

    assert getattr(term, "on", "missing") is None


def test_the_key_is_a_string_also_without_quotes(tmp_path):
    config = loaded(tmp_path, SKEW, REVERSE)
    path = tmp_path / "run.yaml"
    assert "on" in path.read_text()
    path.write_text(path.read_text().replace("'on':", "on:").replace('"on":', "on:"))

    assert load_config(path, []) == config


@pytest.mark.parametrize("task", ["classification", "mlm"])
@pytest.mark.parametrize("loss", ["hard_cross_entropy", "soft_target_kl"])
def test_only_a_causal_lm_has_rollouts(tmp_path, task, loss):
    with pytest.raises(
        ConfigError,
        match=rf"objective\[0\]\.on: rollouts .* causal_lm .* task\.type is {task}; remove the key",
    ):
        loaded(tmp_path, {"loss": loss, "on": "rollouts"}, task=task, rollout=None)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "hidden_mse", "on": "data"}, r"objective\[0\].*\bon\b"),
        ({"loss": "soft_target_kl", "on": "rollout"}, r"objective\[0\].*on.*rollouts"),
    ],
)
def test_other_terms_and_other_sources_are_refused(tmp_path, term, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, term)


def test_a_loss_may_be_listed_once_for_each_source(tmp_path):
    kl = {"loss": "soft_target_kl"}

    config = loaded(tmp_path, kl, {**kl, "on": "data"}, {**kl, "on": "rollouts", "weight": 0.5})

    assert len(config.objective or ()) == 3
    with pytest.raises(ConfigError, match=r'"soft_target_kl" with on: data is listed 2 times'):
        loaded(tmp_path, kl, {**kl, "on": "data"}, {**kl, "on": "data", "weight": 0.5})


def test_the_list_of_losses_has_the_key_at_the_terms_of_a_language_model():
    for loss in ("hard_cross_entropy", "soft_target_kl", "soft_target_tvd"):
        assert "    on: null" in catalogue(loss, losses=True)
    assert "    on:" not in catalogue("hidden_mse", losses=True)
