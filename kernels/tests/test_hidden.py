"""Hidden-state losses through a projection, against hand values, autograd and NaN padding."""

import math

import pytest
import torch

import megakd_kernels as mk
from megakd_kernels import formed, hidden_ops

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
LOSSES = pytest.mark.parametrize(
    "loss",
    [mk.hidden_mse_projection_loss, mk.hidden_cosine_projection_loss],
    ids=["mse", "cosine"],
)


@pytest.fixture
def states(device):
    """student [2, 4, 3], projection [5, 3], teacher [2, 4, 5], valid [2, 4]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3), (5, 3), (2, 4, 5)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    return [tensor.to(device) for tensor in (*tensors, valid)]


@IMPLS
def test_mse_is_a_sum_over_positions_of_means_over_the_width(impl):
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0], [0, 0]])

    loss = mk.hidden_mse_projection_loss(student, None, teacher, valid=None, impl=impl)

    assert loss.item() == pytest.approx(4 / 2 + 25 / 2)


@IMPLS
def test_cosine_is_a_sum_over_positions_of_one_minus_cosine(impl):
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    teacher = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, -1.0]])

    loss = mk.hidden_cosine_projection_loss(student, None, teacher, valid=None, impl=impl)

    assert loss.item() == pytest.approx(0 + (1 - math.sqrt(0.5)) + 2)


@IMPLS
def test_projection_has_the_layout_of_a_linear_layer(states, impl):
    student, _, teacher, valid = states
    layer = torch.nn.Linear(3, 5, bias=False, dtype=torch.float64)

    loss = mk.hidden_mse_projection_loss(student, layer.weight, teacher, valid=valid, impl=impl)

    expected = (layer(student) - teacher).square().mean(-1)[valid].sum()
    torch.testing.assert_close(loss, expected)


@IMPLS
@LOSSES
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_equal_states_have_no_loss_and_no_gradient(states, impl, loss, scale):
    teacher = states[2] * scale
    student = teacher.clone().requires_grad_()

    value = loss(student, None, teacher, valid=None, impl=impl)

    assert value.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-12


@IMPLS
@LOSSES
@pytest.mark.parametrize("projected", [True, False])
def test_gradients_are_the_derivatives_of_the_loss(states, impl, loss, projected, monkeypatch):
    student, projection, teacher, valid = states
    monkeypatch.setattr(hidden_ops, "CHUNK_MB", 0.0003)
    leaves = [student.requires_grad_()]
    if projected:
        leaves.append(projection.requires_grad_())
    target = teacher if projected else teacher[..., :3]

    def value(student, projection=None):
        return loss(student, projection, target, valid=valid, impl=impl)

    assert torch.autograd.gradcheck(value, leaves)


@IMPLS
@LOSSES
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_invalid_positions_may_hold_anything(states, impl, loss, garbage):
    student, projection, teacher, valid = states
    spoiled = [tensor.clone() for tensor in (student, teacher)]
    for tensor in spoiled:
        tensor[~valid] = garbage
    results = []
    for hidden_states, target in ((student, teacher), spoiled):
        leaves = [hidden_states.clone().requires_grad_(), projection.clone().requires_grad_()]
        value = loss(*leaves, target, valid=valid, impl=impl)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))

    clean, dirty = results

    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[1][~valid].eq(0).all()


@IMPLS
@LOSSES
def test_without_a_valid_position_loss_and_gradients_are_zero(states, impl, loss):
    student, projection, teacher, valid = states
    leaves = [student.requires_grad_(), projection.requires_grad_()]

    value = loss(*leaves, teacher, valid=torch.zeros_like(valid), impl=impl)

    assert value.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(value, leaves))


@IMPLS
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_zero_vector_has_cosine_loss_one_and_no_gradient(impl, who):
    vectors = {"student": torch.ones(2, 3), "teacher": torch.full((2, 3), 2.0)}
    vectors[who][0] = 0
    student = vectors["student"].requires_grad_()

    loss = mk.hidden_cosine_projection_loss(
        student, None, vectors["teacher"], valid=None, impl=impl
    )

    assert loss.item() == pytest.approx(1)
    assert torch.autograd.grad(loss, student)[0][0].eq(0).all()


@LOSSES
@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_match_the_double_precision_reference(
    states, loss, impl, *, projected, dtype, distance, monkeypatch
):
    monkeypatch.setattr(hidden_ops, "CHUNK_MB", 0.0003)
    monkeypatch.setattr(hidden_ops, "KERNEL_CHUNK_MB", 0.00006)
    student, projection, teacher = (tensor.to(dtype) for tensor in states[:3])
    leaves = [student.requires_grad_()] + [projection.requires_grad_()] * projected
    teacher = teacher if projected else teacher[..., :3]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def value_of(leaves, target, **options):
        projection = leaves[1] if projected else None
        return loss(leaves[0], projection, target, valid=states[3], **options)

    value = value_of(leaves, teacher, impl=impl)
    expected = value_of(truth, teacher.double(), impl="reference")

    assert value.dtype == torch.float32
    assert distance(value.detach(), expected.detach()) < 1e-5
    pairs = zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, truth), strict=True
    )
    for gradient, true_gradient in pairs:
        assert gradient.dtype == dtype
        assert distance(gradient, true_gradient) < (2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_projected_states_of_all_rows_never_exist(kind, monkeypatch, largest_tensor):
    monkeypatch.setattr(hidden_ops, "CHUNK_MB", 0.05)
    student, teacher, projection = torch.randn(4000, 2), torch.randn(4000, 40), torch.randn(40, 2)
    valid = torch.ones(4000, dtype=torch.bool)

    with largest_tensor() as largest:
        hidden_ops.hidden_loss._init_fn(
            student, projection, teacher, valid, [True, True], kind, "chunked"
        )

    assert 0 < largest.numel <= 4000 * 40 / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p, t, v: (s, None, t, v), "student is 3 wide and the teacher 5; pass a proj"),
        (lambda s, p, t, v: (s, p.T, t, v), r"projection is \[3, 5\].* need \[5, 3\]"),
        (lambda s, p, t, v: (s[:1], p, t, v), "only the last dimension may differ"),
        (lambda s, p, t, v: (s, p, t, v[0, 1:]), r"valid is \[3\]; it must be \[2, 4\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_their_shapes(states, change, message):
    student, projection, teacher, valid = change(*states)
    with pytest.raises(ValueError, match=message):
        mk.hidden_mse_projection_loss(student, projection, teacher, valid=valid)


@LOSSES
@pytest.mark.parametrize("impl", ["triton"])
def test_kernels_read_states_whose_columns_are_not_adjacent(states, loss, impl):
    student, _, teacher, valid = states
    student, teacher = student.float()[0], teacher.float()[0, :, :3]
    turned = [states.T.contiguous().T.requires_grad_() for states in (student, teacher)]

    value = loss(turned[0], None, turned[1].detach(), valid=valid[0], impl=impl)

    torch.testing.assert_close(value, loss(student, None, teacher, valid=valid[0]))


def test_an_upstream_gradient_is_not_rounded_to_the_dtype_of_the_formed_one():
    scaled = formed._scaled(
        torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(1.001), torch.float32
    )

    torch.testing.assert_close(scaled, torch.full((2, 2), 1.001))
