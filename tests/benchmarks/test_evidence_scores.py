"""The scores of the evidence are those of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from evidence_scores import Answered, accuracy, mean_divergence
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(2, 7))
def test_the_divergence_is_zero_only_for_equal_answers(seed, rows, classes):
    random = np.random.default_rng(seed)
    teacher, student = random.normal(size=(2, rows, classes))

    assert mean_divergence(teacher, teacher + 3.0) == pytest.approx(0, abs=1e-12)
    assert mean_divergence(teacher, student) > 0


def test_the_divergence_is_that_of_the_definition():
    teacher, student = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)

    assert mean_divergence(teacher, student) == pytest.approx(expected)


def test_accuracy_compares_names_of_labels_in_the_order_of_the_model():
    answered = Answered(np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 9.0]]), ["no", "yes"])

    assert accuracy(answered, ["yes", "yes", "yes"]) == pytest.approx(200 / 3)
