"""The sources of rows: functions of (config, seed, step) with the given probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.config.rollout import RolloutConfig
from megakd.rollouts.batches import REPLAYED_STEPS, RolloutDraws


def _draws(seed: int = 0, **given: object) -> RolloutDraws:
    return RolloutDraws(RolloutConfig(max_new_tokens=4, **given), seed=seed)  # type: ignore[arg-type]


def test_rows_have_one_source_per_step_or_one_each() -> None:
    mix = {"rollout": 0.5, "data": 0.5}
    by_step, by_row = _draws(mix=mix), _draws(mix=mix, mix_per="row")

    assert all(len(set(by_step.sources(step, 64))) == 1 for step in range(20))
    assert all(set(by_row.sources(step, 64)) == {"rollout", "data"} for step in range(20))


@pytest.mark.parametrize("mix_per", ["step", "row"])
def test_the_shares_of_many_steps_are_those_of_the_config(mix_per: str) -> None:
    draws = _draws(mix={"rollout": 0.5, "replay": 0.3, "data": 0.2}, mix_per=mix_per)

    drawn = np.concatenate([draws.sources(step, 4) for step in range(3000)])

    shares = {source: (drawn == source).mean() for source in ("rollout", "replay", "data")}
    assert shares == pytest.approx({"rollout": 0.5, "replay": 0.3, "data": 0.2}, abs=0.03)


@given(step=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
def test_a_step_does_not_depend_on_what_was_asked_before(step: int, seed: int) -> None:
    mix = {"rollout": 0.4, "replay": 0.4, "data": 0.2}
    used, fresh = _draws(seed, mix=mix), _draws(seed, mix=mix)
    for earlier in range(0, step, 7):
        used.sources(earlier, 3)
        used.replayable(earlier)

    assert used.sources(step, 5).tolist() == fresh.sources(step, 5).tolist()
    assert used.replayable(step) == fresh.replayable(step)


@given(seed=st.integers(0, 2**32 - 1), mix_per=st.sampled_from(["step", "row"]))
def test_every_replayed_step_has_generated_texts(seed: int, mix_per: str) -> None:
    draws = _draws(seed, mix={"rollout": 0.3, "replay": 0.7}, mix_per=mix_per)

    for step in range(30):
        for earlier in draws.replayable(step):
            assert earlier < step
            assert "rollout" in draws.sources(earlier, 3)
        if "replay" in draws.sources(step, 3):
            assert draws.replayable(step)


def test_what_later_steps_replay_is_new_or_was_already_replayable() -> None:
    """So the texts before a step that a resumed run may read are those that this step replays."""
    draws = _draws(mix={"rollout": 0.7, "replay": 0.3})

    for step in range(0, 400, 50):
        kept = draws.replayable(step)
        assert len(kept) <= REPLAYED_STEPS
        for later in range(step, 400):
            assert set(draws.replayable(later)) <= {*kept, *range(step, later)}
    assert len(draws.replayable(400)) == REPLAYED_STEPS


def test_the_first_text_is_new_even_if_all_rows_are_replayed() -> None:
    draws = _draws(mix={"replay": 1.0})

    assert set(draws.sources(0, 3)) == {"rollout"}
    assert set(draws.sources(1, 3)) == {"replay"}


def test_steps_before_the_first_step_of_the_section_use_the_data() -> None:
    draws = _draws(from_step=3)

    assert [draws.sources(step, 1)[0] for step in range(5)] == ["data"] * 3 + ["rollout"] * 2


def test_the_seed_of_a_text_differs_by_run_step_and_row() -> None:
    seeds = {
        _draws(seed).seed_of(step, row)
        for seed in range(3)
        for step in range(10)
        for row in range(10)
    }

    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
