"""The comparisons of the evidence: arms are valid runs, and compared with the right arm."""

from __future__ import annotations

import dataclasses

import pytest
from stored_cells import FEW, bench_of
from tiny_runs import write_config

from evidence.comparisons import COMPARISONS, KINDS, TRADEOFF, arm_beside, named
from evidence.run import Planned, cell_config, place_of
from evidence.settings import SETTINGS
from megakd.config.file import load_config
from megakd.methods.minidisc import MiniDiscConfig


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_every_arm_is_a_valid_config_of_the_same_rows_and_optimizer(tmp_path, comparison):
    bench, result = bench_of(tmp_path), COMPARISONS[comparison]
    place = place_of(bench, FEW, 1, {"soft": dict.fromkeys(KINDS, 0.4)})
    configs = {}
    for arm in result.arms:
        planned = Planned(
            name=arm, seed=1, basis="steps", steps=9, place=place, folder=tmp_path / "run"
        )
        tree = cell_config(bench, result.arms[arm], planned)
        path = write_config(tmp_path / "run.yaml", {"output_dir": str(tmp_path / "run"), **tree})
        configs[arm] = load_config(path)

    taught = {c.train for arm, c in configs.items() if named(arm) != result.labels}
    assert len(taught) == 1
    alone = dataclasses.replace(*taught, learning_rate=FEW.label_rate)
    assert {c.train for arm, c in configs.items() if named(arm) == result.labels} == {alone}
    silent = {named(arm) for arm in result.arms if not result.arms[arm].asks_teachers}
    assert silent == {result.labels}
    assert len({str(config.task) for config in configs.values()}) == 1
    assert len({str(config.student.model) for config in configs.values()}) == 1
    assert {config.seed for config in configs.values()} == {1}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_the_reference_the_plain_and_the_labels_arm_exist(comparison):
    result = COMPARISONS[comparison]
    for arm in result.arms:
        reference = result.reference_of(arm, result.arms)
        assert {reference, arm_beside(result.arms, result.plain, arm)} <= result.arms.keys()
    assert result.labels in {named(arm) for arm in result.arms}
    assert result.seeds.keys() <= SETTINGS.keys()
    # Settings after the first repeat the arms that decide.
    for setting in result.seeds:
        repeated = result.arms_in(setting)
        assert {result.reference, result.plain, result.labels} <= {named(arm) for arm in repeated}
        assert {arm.after for arm in repeated.values()} <= {None, *repeated}


def test_the_rule_of_choice_has_the_default_of_the_method():
    assert MiniDiscConfig(name="minidisc").tradeoff == TRADEOFF
