"""`kd_loss_from_logits`: the classifier's entry to the same losses, and terms of weight 0."""

import math

import pytest
import torch

import megakd_kernels as mk

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
# The interpreter computes with numpy, which speaks up about -inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALL = {"jsd": 0.2, "forward_kl": 0.5, "reverse_kl": 0.3}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return student, teacher, torch.tensor([0, 4, -100, 2, -100, 1])


@IMPLS
def test_unlabelled_rows_learn_from_the_teacher_where_valid_says_so(logits, impl):
    student, teacher, labels = logits
    valid = torch.tensor([True, True, True, True, True, False])

    output = mk.kd_loss_from_logits(
        student, teacher, labels, t_squared=True, ce_weight=1.0, valid=valid, impl=impl
    )

    soft = mk.kd_loss_from_logits(student[:5], teacher[:5], t_squared=True)
    hard = torch.nn.functional.cross_entropy(student[:4], labels[:4], reduction="sum")
    torch.testing.assert_close(output.divergence_sums[0], soft.loss.detach())
    torch.testing.assert_close(output.ce_sum, hard.detach())
    assert output.n_valid.item() == 5
    gradient = torch.autograd.grad(output.loss, student)[0]
    expected = torch.autograd.grad(soft.loss + hard, student)[0]
    torch.testing.assert_close(gradient, expected)


@IMPLS
def test_an_unlabelled_row_may_exclude_any_id(impl):
    student = torch.tensor([[-math.inf, 1.0], [0.5, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 2.0], [1.0, 0.0]])

    output = mk.kd_loss_from_logits(
        student, teacher, torch.tensor([-100, 1]), t_squared=True, ce_weight=1.0,
        valid=torch.tensor([True, True]), impl=impl,
    )  # fmt: skip

    assert output.loss.isfinite()
    assert output.ce_sum.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert torch.autograd.grad(output.loss, student)[0].isfinite().all()


@IMPLS
def test_invalid_rows_may_hold_anything(logits, impl):
    student, teacher, labels = logits
    valid = torch.tensor([True, True, False, True, True, True])
    spoiled = [tensor.detach().clone() for tensor in (student, teacher)]
    for tensor in spoiled:
        tensor[2] = math.nan
    spoiled[0].requires_grad_()
    options = {
        "t_squared": True, "ce_weight": 1.0, "valid": valid, "impl": impl, "divergence": ALL,
    }  # fmt: skip

    clean = mk.kd_loss_from_logits(student, teacher, labels, **options)
    output = mk.kd_loss_from_logits(*spoiled, labels, **options)

    assert all(torch.equal(a, b) for a, b in zip(output, clean, strict=True))
    gradient = torch.autograd.grad(output.loss, spoiled[0])[0]
    assert torch.equal(gradient, torch.autograd.grad(clean.loss, student)[0])
    assert gradient[2].eq(0).all()


@IMPLS
def test_sums_follow_the_order_of_the_mapping(logits, impl):
    student, teacher, _ = logits

    output = mk.kd_loss_from_logits(student, teacher, divergence=ALL, t_squared=True, impl=impl)

    alone = [
        mk.kd_loss_from_logits(student, teacher, divergence=name, t_squared=True).loss.item()
        for name in ALL
    ]
    assert output.divergence_sums.tolist() == pytest.approx(alone)


@IMPLS
@pytest.mark.parametrize(("temperature", "classes"), [(1.0, 5), (3.0, 4)])
def test_gradients_are_the_derivatives_of_the_loss(logits, impl, temperature, classes):
    student, teacher, labels = logits

    def loss(leaf):
        return mk.kd_loss_from_logits(
            leaf, teacher[:, :classes], labels, divergence=ALL, temperature=temperature,
            t_squared=True, ce_weight=0.5, impl=impl, chunk_mb=0.0002,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [student])


@IMPLS
def test_the_logits_given_are_not_overwritten(logits, impl):
    before = [tensor.detach().clone() for tensor in logits]

    mk.kd_loss_from_logits(*logits, t_squared=True, ce_weight=1.0, impl=impl).loss.backward()

    assert all(torch.equal(a, b) for a, b in zip(before, logits, strict=True))
    with torch.no_grad():
        mk.kd_loss_from_logits(*logits, t_squared=True, ce_weight=1.0, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(before, logits, strict=True))


@IMPLS
def test_low_precision_logits_are_computed_in_fp32(logits, impl, distance):
    student, teacher, labels = (t.detach() for t in logits)
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    truth = student.detach().double().requires_grad_()
    options = {"t_squared": True, "divergence": ALL, "ce_weight": 1.0}

    loss = mk.kd_loss_from_logits(student, teacher, labels, impl=impl, **options).loss
    expected = mk.kd_loss_from_logits(truth, teacher.double(), labels, **options).loss

    assert loss.dtype == torch.float32
    assert distance(loss.detach(), expected.detach()) < 1e-5
    gradients = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, truth)[0]
    # The interpreter truncates bf16 where a device rounds.
    assert distance(*gradients) < (1.2e-2 if impl == "triton" else 5e-3)


@IMPLS
def test_without_a_teacher_only_labelled_rows_can_agree(impl):
    student = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]])  # id 0 is the best of row 1

    output = mk.kd_loss_from_logits(
        student, None, torch.tensor([0, -100, 0]), t_squared=True, ce_weight=1.0,
        valid=torch.tensor([True, True, True]), impl=impl,
    )  # fmt: skip

    assert output.agreement.item() == 1
    assert output.row_agrees.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("turned", [True, False], ids=["columns apart", "a wider buffer"])
def test_strides_of_the_logits_do_not_matter(logits, impl, turned):
    student, teacher, labels = (tensor.detach().float() for tensor in logits)
    strange = [each.T.contiguous().T for each in (student, teacher)]
    if not turned:
        strange = [torch.nn.functional.pad(each, (0, 3))[:, :5] for each in (student, teacher)]
    options = {"t_squared": True, "ce_weight": 1.0, "divergence": ALL, "chunk_mb": 0.0002}
    valid = torch.zeros(2 * len(student), dtype=torch.bool)[::2]
    valid[1:] = True
    results = []
    for one, other, mask in ((student, teacher, valid.clone()), (*strange, valid)):
        leaf = one.requires_grad_()
        output = mk.kd_loss_from_logits(
            leaf, other, labels.long(), valid=mask, impl=impl, **options
        )
        results.append((output.loss.detach(), torch.autograd.grad(output.loss, leaf)[0]))

    torch.testing.assert_close(*results)


LABELS = torch.tensor([0, 2])


def logits_that_exclude(who):
    """Return logits [2, 3]; `who` gives id 1 no mass, and the other model gives it some."""
    student, teacher = torch.tensor([[[1.0, 0.2, 2.0]] * 2, [[0.4, 1.0, 0.1]] * 2])
    {"student": student, "teacher": teacher}[who][:, 1] = -math.inf
    return student.requires_grad_(), teacher


def loss_and_gradient(student, teacher, **options):
    loss = mk.kd_loss_from_logits(student, teacher, LABELS, t_squared=True, **options).loss
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@IMPLS
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["0", "0.0", "tensor"])
@pytest.mark.parametrize(("name", "who"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_infinite_divergences_of_weight_0_leave_the_rest(impl, zero, name, who):
    student, teacher = logits_that_exclude(who)
    hard, soft = {"ce_weight": 1.0}, {"divergence": {"jsd": 0.5}}

    actual = (
        loss_and_gradient(student, teacher, divergence=name, kd_weight=zero, **hard, impl=impl),
        loss_and_gradient(student, teacher, divergence={"jsd": 0.5, name: 0.0}, impl=impl),
    )

    torch.testing.assert_close(actual[0], loss_and_gradient(student, None, **hard))
    torch.testing.assert_close(actual[1], loss_and_gradient(student, teacher, **soft))


@IMPLS
def test_infinite_cross_entropy_of_weight_0_leaves_the_divergence(impl):
    student, teacher = logits_that_exclude("student")
    labels, zero = torch.tensor([1, 2]), torch.tensor(0.0)

    output = mk.kd_loss_from_logits(
        student, teacher, labels, divergence="jsd", t_squared=True, ce_weight=zero, impl=impl
    )

    expected = loss_and_gradient(student, teacher, divergence="jsd")
    assert output.ce_sum.isinf()
    actual = output.loss.detach(), torch.autograd.grad(output.loss, student)[0]
    torch.testing.assert_close(actual, expected)


@IMPLS
def test_rows_of_a_loss_have_no_nan_from_terms_of_weight_0(impl):
    student, teacher = logits_that_exclude("student")

    with torch.no_grad():
        rows = mk.kd_loss_from_logits(
            student, teacher, LABELS, divergence={"forward_kl": 0.0, "tvd": 1.0}, t_squared=True,
            ce_weight=1.0, kd_weight=0.0, reduction="none", impl=impl,
        ).loss  # fmt: skip
        expected = torch.nn.functional.cross_entropy(student, LABELS, reduction="none")

    torch.testing.assert_close(rows, expected)
