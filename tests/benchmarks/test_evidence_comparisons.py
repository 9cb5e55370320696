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
    bench, found = bench_of(tmp_path), COMPARISONS[comparison]
    place = place_of(bench, FEW, 1, {"soft": dict.fromkeys(KINDS, 0.4)})
    configs = {}
    for arm in found.arms:
        planned = Planned(
            name=arm, seed=1, basis="steps", steps=9, place=place, folder=tmp_path / "run"
        )
        tree = cell_config(bench, found.arms[arm], planned)
        path = write_config(tmp_path / "run.yaml", {"output_dir": str(tmp_path / "run"), **tree})
        configs[arm] = load_config(path)

    taught = {c.train for arm, c in configs.items() if named(arm) != found.labels}
    assert len(taught) == 1
    alone = dataclasses.replace(*taught, learning_rate=FEW.label_rate)
    assert {c.train for arm, c in configs.items() if named(arm) == found.labels} == {alone}
    silent = {named(arm) for arm in found.arms if not found.arms[arm].asks_teachers}
    assert silent == {found.labels}
    assert len({str(config.task) for config in configs.values()}) == 1
    assert len({str(config.student.model) for config in configs.values()}) == 1
    assert {config.seed for config in configs.values()} == {1}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_the_reference_the_plain_and_the_labels_arm_exist(comparison):
    found = COMPARISONS[comparison]
    for arm in found.arms:
        reference = found.reference_of(arm, found.arms)
        assert named(reference) == found.reference
        plain = arm_beside(found.arms, found.plain, arm)
        assert plain is not None
        assert named(plain) == found.plain
        assert {reference, plain} <= found.arms.keys()
    assert found.labels in {named(arm) for arm in found.arms}
    assert found.seeds.keys() <= SETTINGS.keys()
    # Settings after the first repeat the arms that decide.
    first, *others = found.seeds
    assert found.arms_in(first) == found.arms
    for setting in others:
        repeated = found.arms_in(setting)
        assert repeated.items() <= found.arms.items()
        assert {found.reference, found.plain, found.labels} <= {named(arm) for arm in repeated}
        assert {arm.after for arm in repeated.values()} <= {None, *repeated}


def test_the_rule_of_choice_has_the_default_of_the_method():
    assert MiniDiscConfig(name="minidisc").tradeoff == TRADEOFF
