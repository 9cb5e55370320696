"""`linear_kd_loss` against the fp64 reference, its masks and its reductions."""

import math
from dataclasses import replace

import pytest
import torch

import megakd_kernels as mk

ALL = {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2}
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
# A chunk of two or three rows, so that 13 rows make several and a ragged last one.
TINY_CHUNK_MB = 0.0008


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("ids", "temperature"), [((37, 37), 1.0), ((37, 41), 2.5), ((41, 37), 2.5)], ids=str
)
@pytest.mark.parametrize("divergence", [*mk.DIVERGENCES, ALL], ids=str)
def test_chunks_match_the_double_precision_reference(
    make_problem, distance, divergence, temperature, ids, dtype
):
    problem = make_problem(vs=ids[0], vt=ids[1], dtype=dtype, bias=True)
    token_weight = torch.linspace(0.5, 2, 13)
    token_weight[4] = 0
    options = {
        "divergence": divergence, "temperature": temperature, "beta": 0.3,
        "ce_weight": 0.7, "kd_weight": 1.3, "token_weight": token_weight,
    }  # fmt: skip

    got, gradients = problem.solve(impl="chunked", chunk_mb=TINY_CHUNK_MB, **options)
    expected, truth = problem.to(torch.float64).solve(impl="reference", **options)

    is_fp32 = dtype == torch.float32
    assert distance(got.loss.detach(), expected.loss.detach()) < (1e-5 if is_fp32 else 1e-4)
    for gradient, true_gradient in zip(gradients, truth, strict=True):
        assert gradient.dtype == dtype
        assert distance(gradient, true_gradient) < (2e-5 if is_fp32 else 5e-3)
    assert distance(got.divergence_sums, expected.divergence_sums) < 1e-5
    assert got.ce_sum.item() == pytest.approx(expected.ce_sum.item(), rel=1e-5)
    assert got.n_valid.item() == expected.n_valid.item() == 10
    assert got.agreement.item() == expected.agreement.item()


@IMPLS
def test_cross_entropy_alone_is_that_of_torch(make_problem, impl):
    problem = make_problem(dtype=torch.float64, bias=True)
    problem = replace(problem, teacher_hidden=None, teacher_weight=None)

    output, gradients = problem.solve(impl=impl, ce_weight=2.0)

    leaves = [problem.student_hidden, problem.student_weight, problem.student_bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = torch.nn.functional.cross_entropy(
        leaves[0] @ leaves[1].T + leaves[2], problem.labels, reduction="sum"
    )
    torch.testing.assert_close(output.loss, 2 * loss)
    torch.testing.assert_close(output.ce_sum, loss.detach())
    assert output.divergence_sums.shape == (0,)
    for gradient, expected in zip(gradients, torch.autograd.grad(2 * loss, leaves), strict=True):
        torch.testing.assert_close(gradient, expected)


@IMPLS
def test_outputs_are_the_parts_of_the_loss(make_problem, impl):
    output, _ = make_problem().solve(
        impl=impl, divergence=ALL, kd_weight=1.5, ce_weight=0.25, temperature=2.0
    )

    mixed = (output.divergence_sums * torch.tensor(list(ALL.values()))).sum()
    torch.testing.assert_close(output.loss.detach(), 1.5 * mixed + 0.25 * output.ce_sum)
    assert not any(part.requires_grad for part in output[1:])


@IMPLS
def test_what_several_scored_in_one_call_came_to_can_be_told_apart(make_problem, impl):
    first, second = make_problem(), make_problem(n=7)
    second = replace(
        second, student_weight=first.student_weight, teacher_weight=first.teacher_weight
    )
    names = ("student_hidden", "teacher_hidden", "labels")
    both = replace(
        first,
        **{name: torch.cat([getattr(one, name) for one in (first, second)]) for name in names},
    )
    options = {"impl": impl, "divergence": ALL, "ce_weight": 0.5, "chunk_mb": TINY_CHUNK_MB}

    output, _ = both.solve(token_weight=torch.tensor([2.0] * 13 + [0.5] * 7), **options)

    for one, rows, weight in ((first, slice(13), 2.0), (second, slice(13, 20), 0.5)):
        alone, _ = one.solve(**options)
        mine = output.row_divergences[:, rows].sum(1) / weight
        torch.testing.assert_close(mine, alone.divergence_sums)
        torch.testing.assert_close(output.row_ce[rows].sum() / weight, alone.ce_sum)
        assert output.row_agrees[rows].sum() == alone.agreement


@IMPLS
def test_agreement_counts_valid_rows_with_the_same_best_shared_id(impl):
    identity = torch.eye(4)
    student = identity[[0, 1, 2, 3]] + 0.1 * identity[[1, 2, 1, 0]]
    teacher = identity[[0, 2, 2, 3]]
    labels = torch.tensor([0, 0, 0, -100])

    output = mk.linear_kd_loss(
        student, identity, teacher, identity, labels, t_squared=True, impl=impl
    )

    assert output.agreement.item() == 2
    assert output.n_valid.item() == 3


@IMPLS
@pytest.mark.parametrize(
    ("mask", "garbage"), [("labels", math.nan), ("token_weight", math.inf), ("labels", 1e30)]
)
def test_rows_that_do_not_count_may_hold_anything(make_problem, impl, mask, garbage):
    problem = make_problem()
    options = {"impl": impl, "divergence": ALL, "ce_weight": 1.0}
    if mask == "token_weight":
        weight = (problem.labels != -100).float()
        options |= {"token_weight": weight, "labels": problem.labels.clamp(min=0)}
    spoiled = replace(
        problem,
        student_hidden=problem.student_hidden.clone(),
        teacher_hidden=problem.teacher_hidden.clone(),
    )
    spoiled.student_hidden[2::7] = garbage
    spoiled.teacher_hidden[2::7] = garbage

    clean, clean_gradients = problem.solve(**options)
    output, gradients = spoiled.solve(**options)

    assert all(torch.equal(a, b) for a, b in zip(output, clean, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, clean_gradients, strict=True))
    assert gradients[0][2::7].eq(0).all()


@IMPLS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_a_valid_row_loss_and_gradients_are_zero(make_problem, impl, reduction):
    problem = make_problem(bias=True)
    problem.student_hidden[:] = math.nan

    output, gradients = problem.solve(
        impl=impl, labels=torch.full((13,), -100), divergence=ALL, ce_weight=1.0,
        reduction=reduction,
    )  # fmt: skip

    assert output.loss.requires_grad
    assert not any(part.any() for part in output)
    assert all(gradient.eq(0).all() for gradient in gradients)


@IMPLS
def test_without_labels_every_row_counts(make_problem, impl):
    output, _ = make_problem().solve(impl=impl, labels=None)

    assert output.n_valid.item() == 13


@IMPLS
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_reductions_divide_loss_and_gradient(make_problem, impl, kind):
    problem = make_problem()

    total, gradients = problem.solve(impl=impl)
    mean, mean_gradients = problem.solve(impl=impl, reduction="mean")
    items, item_gradients = problem.solve(impl=impl, reduction="num_items", num_items=kind(50.0))

    torch.testing.assert_close(mean.loss, total.loss / 11)
    torch.testing.assert_close(items.loss, total.loss / 50)
    torch.testing.assert_close(mean_gradients[1], gradients[1] / 11)
    torch.testing.assert_close(item_gradients[0], gradients[0] / 50)
    assert torch.equal(items.divergence_sums, total.divergence_sums)


@IMPLS
def test_reduction_none_gives_a_value_per_row(make_problem, impl):
    problem = make_problem(n=12)
    total, _ = problem.solve(impl=impl, ce_weight=0.5)

    with torch.no_grad():
        rows = mk.linear_kd_loss(
            problem.student_hidden.reshape(3, 4, 6), problem.student_weight,
            problem.teacher_hidden.reshape(3, 4, 9), problem.teacher_weight,
            problem.labels.reshape(3, 4), t_squared=True, ce_weight=0.5, reduction="none",
            impl=impl,
        )  # fmt: skip

    assert rows.loss.shape == (3, 4)
    assert rows.loss[0, 2] == 0
    torch.testing.assert_close(rows.loss.sum(), total.loss.detach())


def test_weights_may_be_numbers_or_device_scalars(make_problem):
    problem = make_problem()

    numbers, gradients = problem.solve(kd_weight=0.3, ce_weight=0.7)
    tensors, tensor_gradients = problem.solve(
        kd_weight=torch.tensor(0.3, dtype=torch.float64), ce_weight=torch.tensor([0.7])
    )

    torch.testing.assert_close(tensors, numbers)
    torch.testing.assert_close(tensor_gradients, gradients)


@IMPLS
@pytest.mark.parametrize(("vs", "vt"), [(37, 40), (40, 37), (40, 40)], ids=str)
def test_padded_ids_never_get_probability(make_problem, impl, vs, vt):
    problem = make_problem(vs=vs, vt=vt, dtype=torch.float64)
    real = replace(
        problem,
        student_weight=problem.student_weight[:37],
        teacher_weight=problem.teacher_weight[:37],
    )

    output, gradients = problem.solve(impl=impl, divergence=ALL, vocab_size=37)
    expected, real_gradients = real.solve(impl="reference", divergence=ALL)

    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(gradients[0], real_gradients[0])
    torch.testing.assert_close(gradients[1][:37], real_gradients[1])
    assert gradients[1][37:].eq(0).all()
    # What this test is there to catch: the same with a row of zeros, logit 0, per padded id.
    padded = torch.cat([real.student_weight, torch.zeros(3, 6, dtype=torch.float64)])
    wide = torch.cat([real.teacher_weight, real.teacher_weight[:3]])
    wrong, _ = replace(real, student_weight=padded, teacher_weight=wide).solve(divergence=ALL)
    assert abs(wrong.loss - expected.loss) > 0.01


@IMPLS
def test_cross_entropy_runs_over_all_ids_of_the_student(make_problem, impl):
    problem = make_problem(vs=41, vt=37, dtype=torch.float64)
    problem.labels[0] = 40

    output, gradients = problem.solve(impl=impl, ce_weight=1.0, temperature=2.0)

    logits = problem.student_hidden @ problem.student_weight.T
    expected = torch.nn.functional.cross_entropy(logits, problem.labels, reduction="sum")
    torch.testing.assert_close(output.ce_sum, expected)
    assert gradients[1][40].abs().max() > 0.1


@IMPLS
def test_a_teacher_bias_shifts_its_logits(make_problem, impl):
    problem = make_problem(dtype=torch.float64)
    bias = torch.linspace(-2, 2, 37, dtype=torch.float64)
    one = torch.ones(13, 1, dtype=torch.float64)
    folded = replace(
        problem,
        teacher_hidden=torch.cat([problem.teacher_hidden, one], 1),
        teacher_weight=torch.cat([problem.teacher_weight, bias[:, None]], 1),
    )

    output, _ = problem.solve(impl=impl, teacher_bias=bias)

    torch.testing.assert_close(output.loss, folded.solve()[0].loss)


def test_bf16_logits_are_rounded_on_both_paths(make_problem):
    problem = make_problem()

    exact, _ = problem.solve(impl="reference")
    reference, truth = problem.solve(impl="reference", logits_dtype="bf16")
    chunked, gradients = problem.solve(impl="chunked", logits_dtype="bf16")

    torch.testing.assert_close(chunked.loss, reference.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients, truth, rtol=5e-2, atol=5e-2)
    assert chunked.loss != exact.loss
