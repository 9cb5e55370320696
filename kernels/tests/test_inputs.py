"""Tensors that do not fit are refused with the values; labels never read outside a row."""

from dataclasses import replace

import pytest
import torch

import megakd_kernels as mk
from megakd_kernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])


@IMPLS
@pytest.mark.parametrize("label", [37, -1, 10**6])
def test_a_label_outside_the_vocabulary_is_refused(make_problem, impl, label):
    problem = make_problem()
    labels = problem.labels.clone()
    labels[5] = label

    with pytest.raises(
        ValueError, match=rf"label {label} is not one of the student's ids, 0 to 36"
    ):
        problem.solve(labels=labels, ce_weight=1.0, impl=impl)

    assert torch.isfinite(problem.solve(labels=labels, impl=impl)[0].loss)


@IMPLS
def test_where_labels_are_not_looked_at_a_wrong_one_spoils_its_row_alone(
    make_problem, impl, monkeypatch
):
    monkeypatch.setattr("megakd_kernels.inputs.check_labels", lambda *_: None)
    problem = make_problem()
    labels = problem.labels.clone()
    labels[5] = 10**6

    output, gradients = problem.solve(labels=labels, ce_weight=1.0, impl=impl)
    _, expected = problem.solve(ce_weight=1.0, impl=impl)

    assert output.loss.isnan()
    assert gradients[0][5].isnan().all()
    others = torch.arange(13) != 5
    torch.testing.assert_close(gradients[0][others], expected[0][others])


@IMPLS
@pytest.mark.parametrize("looks", [True, False])
def test_a_row_without_weight_may_hold_any_label(make_problem, impl, looks, monkeypatch):
    monkeypatch.setattr("megakd_kernels.inputs.may_look_at", lambda _: looks)
    problem = make_problem()
    labels, weight = problem.labels.clone(), (torch.arange(13) != 5).float()
    options = {"token_weight": weight, "ce_weight": 1.0, "impl": impl}
    expected = problem.solve(labels=labels, **options)
    labels[5] = 10**6

    torch.testing.assert_close(problem.solve(labels=labels, **options), expected)


@IMPLS
@pytest.mark.parametrize("looks", [True, False])
def test_a_row_that_is_not_valid_may_hold_any_label(impl, looks, monkeypatch):
    monkeypatch.setattr("megakd_kernels.inputs.may_look_at", lambda _: looks)
    student, teacher = torch.randn(2, 3, 5)
    options = {
        "t_squared": True, "ce_weight": 1.0, "impl": impl, "valid": torch.tensor([1, 0, 1]).bool()
    }  # fmt: skip

    losses = [
        mk.kd_loss_from_logits(student, teacher, torch.tensor([1, label, 2]), **options).loss
        for label in (0, 999)
    ]

    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_integers_are_refused(make_problem, dtype):
    problem = make_problem()

    with pytest.raises(ValueError, match=f"labels are {dtype}; they must be integer ids"):
        problem.solve(labels=problem.labels.to(dtype))


def test_labels_of_any_integer_type_mean_the_same(make_problem):
    problem = make_problem()

    short, _ = problem.solve(labels=problem.labels.to(torch.int16), ce_weight=1.0)

    assert torch.equal(short.loss, problem.solve(ce_weight=1.0)[0].loss)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_zero3_shard_is_recognised_and_explained(make_problem, which):
    problem = make_problem()
    shard = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    shard.ds_shape = torch.Size([37, 6])
    problem = replace(problem, **{f"{which}_weight": shard})

    with pytest.raises(
        ValueError, match=rf"{which}_weight is a ZeRO-3 shard: \[0\] here, \[37, 6\].*Gathered"
    ):
        problem.loss(problem.student_hidden, problem.student_weight)


def test_a_projection_that_is_a_shard_is_recognised_too():
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_shape = torch.Size([3, 2])

    with pytest.raises(ValueError, match="projection is a ZeRO-3 shard"):
        mk.hidden_mse_projection_loss(torch.ones(4, 2), shard, torch.ones(4, 3), valid=None)


def test_a_gathered_parameter_is_no_shard(make_problem):
    problem = make_problem()
    weight = torch.nn.Parameter(problem.student_weight)
    weight.ds_shape = weight.shape

    output = problem.loss(problem.student_hidden, weight)

    assert output.loss == problem.loss(problem.student_hidden, problem.student_weight).loss


def test_weights_of_rows_that_ask_for_a_gradient_are_refused(make_problem):
    with pytest.raises(ValueError, match="token_weight requires grad"):
        make_problem().solve(token_weight=torch.ones(13, requires_grad=True))


def logits_loss(divergence):
    def loss(student, teacher, impl):
        options = {"divergence": divergence, "t_squared": True, "impl": impl}
        return mk.kd_loss_from_logits(student, teacher, **options).loss

    return loss


def relation_loss(student, teacher, impl):
    return mk.relation_kl_loss(student[None], teacher[None], heads=2, valid=None, impl=impl)


def statistics(student, teacher, impl):
    weight = torch.eye(8, device=DEVICE)
    return mk.linear_stats(student, weight, teacher, weight, impl=impl).teacher_entropy_sum


def top_logits(student, teacher, impl):
    ids, weight = torch.arange(8, device=DEVICE).expand(3, 8), torch.eye(8, device=DEVICE)
    options = {"mode": "renorm", "t_squared": True, "impl": impl}
    return mk.topk_kd_loss(student, weight, ids, teacher.log_softmax(-1), **options).loss


def of_states(loss):
    return lambda student, teacher, impl: loss(student, None, teacher, valid=None, impl=impl)


LOSSES = {
    **{name: logits_loss(name) for name in mk.DIVERGENCES},
    "hidden_mse": of_states(mk.hidden_mse_projection_loss),
    "hidden_cosine": of_states(mk.hidden_cosine_projection_loss),
    "relation_kl": relation_loss,
    "entropy": statistics,
    "topk": top_logits,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference", "triton"])
@pytest.mark.parametrize("spoilt", ["one value", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_of_a_row_that_counts_is_seen_in_the_loss(name, spoilt, impl):
    generator = torch.Generator().manual_seed(0)
    part = (1, 1) if spoilt == "one value" else ...
    for which in ("teacher", "student"):
        models = {
            model: torch.randn(3, 8, generator=generator).to(DEVICE)
            for model in ("student", "teacher")
        }
        models[which][part] = torch.nan
        if name == "topk" and which == "teacher" and DEVICE == "cpu":
            with pytest.raises(ValueError, match="topk_logprobs of row"):
                LOSSES[name](*models.values(), impl)
        elif name != "entropy" or which == "teacher":
            assert LOSSES[name](*models.values(), impl).isnan(), which


def test_rows_in_another_order_are_refused_and_flat_ones_are_not():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    heads = {"student_weight": torch.randn(6, 4), "teacher_weight": torch.randn(6, 5)}
    rows = {"labels": torch.arange(6).reshape(2, 3), "token_weight": torch.rand(2, 3)}
    given = {"student_hidden": student, "teacher_hidden": teacher, **heads, **rows}
    calls = {
        mk.linear_kd_loss: given | {"t_squared": True},
        mk.linear_stats: given,
        mk.kd_loss_from_logits: {
            "student_logits": student,
            "teacher_logits": student + 1,
            "t_squared": True,
            **rows,
        },
        mk.hidden_mse_projection_loss: {
            "student_hidden": student,
            "projection": None,
            "teacher_hidden": student + 1,
            "valid": torch.tensor([[True, False, True], [False, True, True]]),
        },
    }
    for loss, inputs in calls.items():
        expected = loss(**inputs)
        for name in {"labels", "token_weight", "valid", "teacher_hidden"} & inputs.keys():
            turned = inputs[name].transpose(0, 1)
            with pytest.raises(ValueError, match=r"one entry per row|last dimension may differ"):
                loss(**inputs | {name: turned})
            if name != "teacher_hidden" or loss in (mk.linear_kd_loss, mk.linear_stats):
                flat = inputs[name].flatten(0, 1)
                torch.testing.assert_close(loss(**inputs | {name: flat}), expected)


def test_kernels_are_refused_without_a_gpu(make_problem, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("megakd_kernels.settings.HAS_TRITON", True)

    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; use 'chunked'"):
        make_problem().solve(impl="triton")


def test_without_triton_asking_for_it_is_refused(make_problem, monkeypatch):
    monkeypatch.setattr("megakd_kernels.settings.HAS_TRITON", False)

    with pytest.raises(ValueError, match="impl 'triton': the package triton is not installed"):
        make_problem().solve(impl="triton")


def test_rows_that_do_not_count_are_left_out_of_the_products(make_problem, monkeypatch):
    problem = make_problem(bias=True)
    options = {"ce_weight": 1.0, "temperature": 2.0, "divergence": {"jsd": 1.0, "forward_kl": 1.0}}
    seen = []
    rows = ops._linear_rows

    def watched(student, *others):
        seen.append(len(student.hidden))
        return rows(student, *others)

    monkeypatch.setattr(ops, "_linear_rows", watched)
    output, gradients = problem.solve(**options)
    monkeypatch.setattr(ops, "_linear", watched)
    expected, expected_gradients = problem.solve(**options)

    assert seen == [11, 13]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)
