"""The benchmark of teachers: the choice of a score, and its correlations."""

from __future__ import annotations

import pytest

from methods.match import CHOOSING, TESTING, chosen, correlations


def test_the_score_is_chosen_with_its_sign_on_one_half_of_the_settings():
    known = {name: {"gap": 0.5, "kl": -0.9} for name in CHOOSING}
    known |= {name: {"gap": 1.0, "kl": 0.1} for name in TESTING}

    assert chosen(known) == ("kl", -1.0)


def test_ranks_are_correlated_with_the_outcomes():
    scored = {name: {"gap": float(n), "kl": -float(n)} for n, name in enumerate("abc")}

    assert correlations({"a": 1, "b": 2, "c": 9}, scored) == pytest.approx({"gap": 1, "kl": -1})
