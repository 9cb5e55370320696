"""The benchmark of teachers: GRACE, the choice of a score, and valid configs."""

from __future__ import annotations

import numpy as np
import pytest

from methods.match import ANSWERS, CHOOSING, TESTING, chosen, correlations, grace


def test_grace_of_gradients_along_all_axes_is_their_square_times_the_dimension():
    """Normalised, they have S = I / d; a test gradient of length 3 then has 9 d."""
    axes = np.eye(8).repeat(ANSWERS, axis=0)
    gradients = 3.0 * np.concatenate([axes] * 50)

    assert grace(gradients) == pytest.approx(9 * 8, rel=0.05)


def test_grace_grows_with_the_square_of_the_gradients():
    gradients = np.random.default_rng(0).normal(size=(64 * ANSWERS, 32))

    assert grace(2 * gradients) == pytest.approx(4 * grace(gradients))


def test_the_score_is_chosen_with_its_sign_on_one_half_of_the_settings():
    known = {name: {"gap": 0.5, "kl": -0.9, "GRACE": -1.0} for name in CHOOSING}
    known |= {name: {"gap": 1.0, "kl": 0.1, "GRACE": 0.0} for name in TESTING}

    assert chosen(known) == ("kl", -1.0)


def test_ranks_are_correlated_with_the_outcomes():
    scored = {name: {"gap": float(n), "kl": -float(n)} for n, name in enumerate("abc")}

    assert correlations({"a": 1, "b": 2, "c": 9}, scored) == pytest.approx({"gap": 1, "kl": -1})
