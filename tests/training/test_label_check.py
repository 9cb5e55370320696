"""Generic labels of a teacher: told, checked against the data, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import run_in
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from whole_run import WholeRun, finish

from megakd.training.label_check import label_fit


def answers(given: list[int], classes: int) -> torch.Tensor:
    return functional.one_hot(torch.tensor(given), classes).float()


def test_chance_is_one_over_the_classes_that_occur_however_many_rows_each_has():
    labels = [0] * 90 + [1] * 10 + [-100] * 5  # rows without a label do not count

    constant = label_fit(answers([0] * 105, 3), labels)

    assert (constant.score, constant.chance, constant.rows) == (0.5, 0.5, 100)
    assert not constant.is_good("abc")  # though 90 % of the rows are right


def test_the_margin_shrinks_with_the_rows_and_not_below_five_points():
    few, many = (label_fit(answers([0, 1] * n, 2), [0, 1] * n) for n in (4, 5000))

    # A guesser on 4 rows of each class: sqrt(2 * 0.25 / 4) / 2.
    assert few.margin == pytest.approx(2 * np.sqrt(0.5 / 4) / 2)
    assert many.margin == 0.05
    assert few.is_good("ab")
    assert many.is_good("ab")


def test_two_classes_that_changed_places_are_found_and_those_a_little_confused_are_not():
    """The score is far above chance, and yet the order is wrong."""
    labels = [0, 1, 2, 3, 4] * 20
    swapped = [{3: 4, 4: 3}.get(label, label) for label in labels]
    confused = [0] * 11 + [1] * 9 + [1] * 8 + [0] * 12  # one row more: right the other way

    fit = label_fit(answers(swapped, 5), labels)

    assert fit.score == pytest.approx(0.6)
    assert (fit.better, fit.better_score) == ((0, 1, 2, 4, 3), 1.0)
    assert not any(fit.is_good(names) for names in ("abcde", "01234"))
    assert label_fit(answers(confused, 2), [0] * 20 + [1] * 20).better is None


def test_a_model_no_better_than_chance_may_teach_classes_that_are_numbers():
    """Their order is said by the data; names are in the order of the alphabet."""
    guessed = label_fit(answers([0, 1, 1, 0] * 10, 2), [0, 0, 1, 1] * 10)

    assert (guessed.is_good("01"), guessed.is_good("ab")) == (True, False)


@pytest.fixture
def generic(whole_run: WholeRun, tmp_path: Path) -> Path:
    """A good teacher that does not say what its labels are called."""
    folder = Path(shutil.copytree(whole_run.teacher, tmp_path / "generic"))
    (folder / "checksums.json").unlink()
    path = folder / "config.json"
    names = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    return folder


def turned_round(folder: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data.flip(0)
    model.save_pretrained(folder)
    return folder


def written(whole_run: WholeRun, folder: Path, **teacher: object) -> Path:
    return run_in(folder, whole_run.task, teacher=teacher, method={"name": "single"})


def test_a_good_teacher_with_generic_labels_is_told_with_both_lists_and_checked_once(
    one_rank, whole_run, generic, tmp_path
):
    config = written(whole_run, tmp_path, model=str(generic))

    outcome = finish(one_rank, config)

    assert (
        "teacher.model: the labels LABEL_0, LABEL_1 are read as the labels negative, positive of "
        "the data" in outcome.err
    )
    assert "checking the order of the generic labels on 26 rows" in outcome.err
    (tmp_path / "out" / "report.json").unlink()
    again = finish(one_rank, config)
    assert "checking the order" not in again.err
    assert "are read as the labels" in again.err


@pytest.mark.parametrize("command", ["train", "cache"])
def test_a_teacher_whose_labels_stand_the_other_way_round_teaches_nobody(
    one_rank, whole_run, generic, tmp_path, command
):
    cache = tmp_path / "cache"
    teacher = {"model": str(turned_round(generic)), "cache": str(cache)}
    config = written(whole_run, tmp_path, **teacher)

    outcome = one_rank.megakd(command, config, code=2)

    assert "the order LABEL_1 is negative, LABEL_0 is positive gives" in outcome.err
    assert "or set teacher.label_order to data if this order is right" in outcome.err
    assert not cache.exists()
    assert not (tmp_path / "out" / "stages").exists()


def test_the_order_can_be_vouched_for(one_rank, whole_run, generic, tmp_path):
    teacher = {"model": str(turned_round(generic)), "label_order": "data"}

    outcome = finish(one_rank, written(whole_run, tmp_path, **teacher))

    assert (
        "are read as the labels negative, positive of the data, in this order, as configured"
        in outcome.err
    )
    assert "checking the order" not in outcome.err
