"""`linear_kd_loss`: values against fp64, masks, reductions, gradients, memory and any shape."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megakd_kernels as mk
from megakd_kernels import ops

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


FP64 = torch.float64


MIXTURES = st.dictionaries(
    st.sampled_from(mk.DIVERGENCES), st.floats(-1, 2), min_size=1, max_size=3
)
OPTIONS = st.fixed_dictionaries(
    {
        "divergence": MIXTURES,
        "beta": st.floats(0, 1),
        "skew": st.floats(0, 0.9),
        "temperature": st.floats(0.3, 5),
        "t_squared": st.booleans(),
        "kd_weight": st.sampled_from([0.0, 1e-6, 1.0]),
        "ce_weight": st.sampled_from([0.0, 0.3]),
        "reduction": st.sampled_from(["sum", "mean"]),
        "softcap_s": st.none() | st.floats(0.5, 30),
        "logit_scale_t": st.floats(0.1, 3),
        "chunk_mb": st.sampled_from([1e-9, 4e-4, 1024]),
    }
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(st.integers(0, 9), *[st.integers(2, 12)] * 2, *[st.integers(1, 4)] * 2),
    seed=st.integers(0, 2**31), mask=st.sampled_from([0.0, 0.5, 1.0]), options=OPTIONS,
)  # fmt: skip
def test_any_shape_and_option_gives_what_the_reference_gives(
    make_problem, sizes, seed, mask, options
):
    problem, made = make_problem(*sizes, dtype=FP64, seed=seed, bias=True), torch.Generator()
    labels = torch.randint(0, sizes[1], sizes[:1], generator=made.manual_seed(seed))
    counted, weight = torch.rand(2, sizes[0], generator=made, dtype=FP64)
    options |= {"labels": torch.where(counted < mask, labels, -100), "token_weight": weight - 0.5}

    output, gradients = problem.solve(impl="chunked", **options)
    expected, truth = problem.solve(impl="reference", **options)

    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients, truth, rtol=1e-6, atol=1e-9)


SIX = {
    "forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2, "skew_kl": 0.7, "skew_rkl": 0.4, "tvd": 0.6,
}  # fmt: skip


@pytest.mark.parametrize("cuts", [(13,), (1, 12), (5, 4, 4)], ids=str)
def test_cutting_the_step_differently_gives_the_same_gradient(make_problem, cuts):
    problem = make_problem(dtype=torch.float64)
    options = {"divergence": SIX, "ce_weight": 1.0, "reduction": "num_items", "num_items": 11}
    whole, gradients = problem.solve(**options)

    loss, weight_gradient, start = 0, 0, 0
    for size in cuts:
        part = slice(start, start + size)
        micro_batch = replace(
            problem,
            student_hidden=problem.student_hidden[part],
            teacher_hidden=problem.teacher_hidden[part],
            labels=problem.labels[part],
        )
        output, (hidden_gradient, gradient) = micro_batch.solve(**options)
        torch.testing.assert_close(hidden_gradient, gradients[0][part])
        loss, weight_gradient, start = loss + output.loss, weight_gradient + gradient, part.stop

    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(weight_gradient, gradients[1])


def test_a_loss_scale_beyond_fp16_and_a_tiny_weight_lose_nothing(make_problem, distance):
    problem = make_problem(dtype=torch.float16)

    _, gradients = problem.solve(kd_weight=1e-9, upstream=2.0**20)
    _, expected = problem.to(torch.float64).solve(kd_weight=1e-9 * 2.0**20)

    for gradient, truth in zip(gradients, expected, strict=True):
        assert distance(gradient, truth) < 5e-3


def test_the_backward_reads_neither_weights_nor_hidden_states(make_problem):
    problem = make_problem(bias=True)
    _, expected = problem.solve(divergence=SIX, ce_weight=1.0)
    leaves = problem.leaves()
    loss = problem.loss(*leaves, divergence=SIX, ce_weight=1.0).loss

    # As when ZeRO-3 takes a gathered weight away again after the forward.
    for tensor in (*leaves, problem.teacher_hidden, problem.teacher_weight):
        tensor.data.fill_(math.nan)

    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize(
    ("impl", "divergence", "temperature"),
    [
        *(("chunked", name, 1.7) for name in mk.DIVERGENCES),
        ("chunked", SIX, 1.0),
        ("reference", SIX, 1.7),
    ],
    ids=str,
)
def test_gradients_are_the_derivatives_of_the_loss(make_problem, impl, divergence, temperature):
    problem = make_problem(n=4, vs=6, vt=5, hs=3, ht=2, dtype=torch.float64, bias=True)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.4}
    options |= {"impl": impl, "chunk_mb": 0.0002}

    assert torch.autograd.gradcheck(
        lambda *leaves: problem.loss(*leaves, **options).loss, problem.leaves()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_all_rows_never_exist(make_problem, dtype, monkeypatch, largest_tensor):
    n, v = 600, 500
    problem = make_problem(n=n, vs=v, vt=v, dtype=dtype)
    leaves = problem.leaves()
    options = {"divergence": SIX, "ce_weight": 1.0, "temperature": 2.0}
    monkeypatch.setattr(ops, "linear_kd", torch.no_grad()(ops.linear_kd._init_fn))

    with largest_tensor() as chunked:
        problem.loss(*leaves, chunk_mb=0.1, **options)
    with largest_tensor() as reference:
        problem.loss(*leaves, impl="reference", **options)

    assert 0 < chunked.numel <= n * v / 10
    assert reference.numel >= 500 * v  # rows that count


EVEN = dict.fromkeys(mk.DIVERGENCES, 0.5)
WARPS = {"softcap_s": 2.0, "softcap_t": 3.0, "logit_scale_s": 0.7, "logit_scale_t": 1.3}


@IMPLS
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_loss_is_that_of_the_warped_logits(make_problem, impl, with_teacher):
    problem = make_problem(dtype=torch.float64, vs=39)
    hidden = problem.student_hidden.clone().requires_grad_()
    raw = hidden @ problem.student_weight.T
    student = 2.0 * torch.tanh(0.7 * raw / 2.0)
    soft = 3.0 * torch.tanh(1.3 * problem.teacher_hidden @ problem.teacher_weight.T / 3.0)
    teacher = soft if with_teacher else None
    options = {"divergence": EVEN, "ce_weight": 1.0, "temperature": 2.0, "t_squared": True}
    expected = mk.kd_loss_from_logits(student, teacher, problem.labels, **options).loss
    (truth,) = torch.autograd.grad(expected, hidden)

    heads = (problem.teacher_hidden, problem.teacher_weight) if with_teacher else (None, None)
    output = mk.linear_kd_loss(
        hidden, problem.student_weight, *heads, problem.labels, impl=impl, **WARPS, **options
    )

    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(output.loss, hidden)[0], truth)
