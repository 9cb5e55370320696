"""Statistics that are formed at the first access: the output is that of a loss formed at once."""

import copy
import pickle
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree

import megakd_kernels as mk
from megakd_kernels.deferred import DeferredOutput

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)


@pytest.fixture
def output(logits):
    return mk.kd_loss_from_logits(*logits, LABELS, t_squared=True, ce_weight=1.0)


@pytest.fixture
def formed(logits):
    return mk.kd_loss_from_logits(*logits, LABELS, t_squared=True, ce_weight=1.0, impl="reference")


def test_every_field_is_there_by_name_and_by_position(output, formed):
    assert isinstance(output, DeferredOutput)
    assert isinstance(output, mk.KDOutput)
    for index, name in enumerate(mk.KDOutput._fields):
        torch.testing.assert_close(getattr(output, name), getattr(formed, name))
        assert output[index] is getattr(output, name)


@pytest.mark.parametrize(
    "use",
    [
        tuple,
        list,
        lambda output: [*output],
        lambda output: output[:],
        lambda output: output + (),  # noqa: RUF005, the sum is what is tested
        lambda output: output._asdict().values(),
        lambda output: output._replace(),
        lambda output: output._make(output),
        lambda output: type(output)(*output),
        lambda output: pytree.tree_map(lambda part: part, output),
        pytree.tree_leaves,
        copy.copy,
        copy.deepcopy,
        lambda output: pickle.loads(pickle.dumps(output)),  # noqa: S301, its own bytes
    ],
)
def test_a_use_as_a_tuple_forms_the_statistics(output, formed, use):
    for pair in zip(use(output), formed, strict=True):
        torch.testing.assert_close(*pair)


def test_an_output_shows_and_compares_like_a_tuple(output):
    assert repr(output).startswith("KDOutput(loss=tensor(")
    assert output == output._replace()
    assert not output != output._replace()  # noqa: SIM202, the operator itself
    assert output != (1, 2)
    assert hash(output) == hash(tuple(output))
    assert output.ce_sum in output


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_change_in_place_before_the_first_access_changes_no_statistic(logits, has_teacher):
    student, teacher = logits
    options = {"t_squared": True, "ce_weight": 1.0}
    labels, valid = LABELS.clone(), torch.ones(3, dtype=torch.bool)
    given = (student, teacher if has_teacher else None, labels)
    before = [part.clone() for part in mk.kd_loss_from_logits(*given, valid=valid, **options)]

    output = mk.kd_loss_from_logits(*given, valid=valid, **options)
    student.neg_()
    teacher.neg_()
    labels.fill_(3)
    valid.logical_not_()

    assert all(torch.equal(*pair) for pair in zip(output, before, strict=True))


def test_statistics_keep_neither_the_graph_nor_the_logits_alive(logits):
    leaf, teacher = logits[0].requires_grad_(), logits[1]
    student = leaf * 2
    inner = weakref.ref(student)
    output = mk.kd_loss_from_logits(student, teacher, t_squared=True)

    statistics = output[1:]
    del output, student

    assert inner() is None
    assert not any(part.requires_grad for part in statistics)


def test_an_access_records_nothing_and_happens_once(logits):
    output = mk.kd_loss_from_logits(logits[0].requires_grad_(), logits[1], t_squared=True)

    assert output.row_divergences is output.row_divergences
    assert [part.requires_grad for part in output] == [True] + [False] * 7
