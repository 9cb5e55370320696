"""What all losses have in common: how torch.compile, autograd and autocast see them."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megakd_kernels as mk
from megakd_kernels import hidden, linear_kd, logits, ops, topk

ALL = {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2, "skew_kl": 0.1, "tvd": 0.4}


def linear_loss(
    student, weight, bias, teacher, teacher_weight, labels, *, impl="chunked", **options
):
    return mk.linear_kd_loss(
        student, weight, teacher, teacher_weight, labels, student_bias=bias, t_squared=True,
        divergence=ALL, temperature=2.0, ce_weight=0.5, impl=impl, **options,
    ).loss  # fmt: skip


def logits_loss(student, weight, bias, teacher, teacher_weight, labels, *, impl="chunked"):
    return mk.kd_loss_from_logits(
        student @ weight.T + bias, teacher @ teacher_weight.T, labels, t_squared=True,
        divergence=ALL, ce_weight=0.5, impl=impl,
    ).loss  # fmt: skip


def small_loss(student, weight, bias, teacher, teacher_weight, labels, *, impl="auto"):
    del labels
    return mk.kd_loss_from_logits(
        student @ weight.T + bias, teacher @ teacher_weight.T, t_squared=True, impl=impl
    ).loss


def projection_loss(student, weight, bias, teacher, teacher_weight, labels, *, impl="chunked"):
    del bias, teacher_weight
    states, options = (student, weight[:9], teacher), {"valid": labels != -100, "impl": impl}
    mse = mk.hidden_mse_projection_loss(*states, **options)
    return mse + mk.hidden_cosine_projection_loss(*states, **options)


def relation_loss(student, weight, bias, teacher, teacher_weight, labels, *, impl="chunked"):
    """Heads three wide in the teacher; rows of the weights are the keys."""
    del bias
    keys, teacher_keys = (matrix[None, : len(student)] for matrix in (weight, teacher_weight))
    valid = (labels != -100)[None]
    return mk.relation_kl_loss(
        student[None], teacher[None], keys, teacher_keys, heads=3, valid=valid, causal=True,
        impl=impl,
    )  # fmt: skip


def topk_loss(mode):
    def loss(student, weight, bias, teacher, teacher_weight, labels, *, impl="chunked"):
        logprobs, ids = (teacher @ teacher_weight.T).log_softmax(-1).topk(5)
        return mk.topk_kd_loss(
            student, weight, ids, logprobs, labels, student_bias=bias, mode=mode, t_squared=True,
            ce_weight=0.5, impl=impl,
        ).loss  # fmt: skip

    return loss


CHUNKED = {
    **{loss.__name__: loss for loss in (linear_loss, logits_loss, projection_loss, relation_loss)},
    **{f"topk_{mode}": topk_loss(mode) for mode in topk.TOPK_MODES},
}
LOSSES = pytest.mark.parametrize("loss", CHUNKED.values(), ids=CHUNKED)
PATHS = [
    *((loss, "chunked") for loss in CHUNKED.values()),
    *((loss, "reference") for loss in (linear_loss, relation_loss)),
    (small_loss, "auto"),
    (relation_loss, "triton"),
]
EVERY_PATH = pytest.mark.parametrize(
    ("loss", "impl"), PATHS, ids=[*CHUNKED, "linear", "relation", "small", "relation-kernels"]
)


@pytest.fixture
def inputs(make_problem, device):
    """Student [13, 6], its weight [37, 6] and bias, teacher [13, 9], its weight, and labels."""
    problem = make_problem(bias=True)
    tensors = [
        problem.student_hidden, problem.student_weight, problem.student_bias,
        problem.teacher_hidden, problem.teacher_weight, problem.labels,
    ]  # fmt: skip
    return [tensor.to(device) for tensor in tensors]


def to_the_bit(loss):
    """Tolerances: hidden losses and the relation of heads have no sum whose order may change."""
    return {"rtol": 0.0, "atol": 0.0} if loss in (projection_loss, relation_loss) else {}


def leaves_of(inputs):
    return [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]


def gradients_of(loss, inputs, **options):
    """The loss, and its gradients; zeros where there is none."""
    leaves = leaves_of(inputs)
    value = loss(*leaves, *inputs[3:], **options)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


@EVERY_PATH
def test_a_second_backward_gives_the_same_and_upstream_scales(inputs, loss, impl):
    leaves = leaves_of(inputs)
    value = loss(*leaves, *inputs[3:], impl=impl)

    def backward(output):
        return torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True)

    once, scaled, again = backward(value), backward(-4 * value), backward(value)

    present = [place for place, gradient in enumerate(once) if gradient is not None]
    assert len(present) >= 2
    for place in present:
        assert torch.equal(once[place], again[place])
        torch.testing.assert_close(scaled[place], -4 * once[place])


@EVERY_PATH
def test_only_the_gradients_asked_for_are_formed(inputs, loss, impl):
    all_leaves = leaves_of(inputs)
    value = loss(*all_leaves, *inputs[3:], impl=impl)
    everything = torch.autograd.grad(value, all_leaves, allow_unused=True)
    for needed in ((0,), (1,), (2,), (1, 2)):
        leaves = [tensor.detach().clone() for tensor in inputs[:3]]
        for place in needed:
            leaves[place].requires_grad_()
        value = loss(*leaves, *inputs[3:], impl=impl)
        if not value.requires_grad:  # the loss has no bias
            assert needed == (2,)
            continue

        value.backward()

        for place, leaf in enumerate(leaves):
            assert (leaf.grad is None) == (place not in needed or everything[place] is None)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, everything[place], **to_the_bit(loss))


@EVERY_PATH
@pytest.mark.parametrize("which", [3, 4], ids=["teacher", "weight"])
def test_a_teacher_that_asks_for_a_gradient_is_refused_while_they_are_recorded(
    inputs, loss, impl, which
):
    inputs[which].requires_grad_()
    if loss is projection_loss and which == 4:
        return

    message = r"((teacher|topk)_\w+) requires grad, and the loss has no .*: pass \1\.detach"
    with pytest.raises(ValueError, match=message):
        loss(*inputs, impl=impl)
    with torch.no_grad():
        assert loss(*inputs, impl=impl).isfinite()


@EVERY_PATH
def test_inputs_are_not_written_over_and_the_value_needs_no_gradient(inputs, loss, impl):
    before = [tensor.clone() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]

    value = loss(*leaves, *inputs[3:], impl=impl)
    value.backward()
    with torch.no_grad():
        bare = loss(*inputs, impl=impl)

    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert not bare.requires_grad
    torch.testing.assert_close(bare, value.detach(), **to_the_bit(loss))


# The others get what a caller has multiplied, or compare with a teacher that is not cast.
@pytest.mark.parametrize(
    ("loss", "impl"),
    [path for path in PATHS if path[0] not in (logits_loss, small_loss, projection_loss)],
)
def test_autocast_means_its_type_for_products_and_fp32_for_the_rest(inputs, loss, impl, device):
    narrow = [tensor.bfloat16() for tensor in inputs[:5]]

    with torch.autocast(device, torch.bfloat16):
        value, *gradients = gradients_of(loss, inputs, impl=impl)
    expected, *truth = gradients_of(loss, [*narrow, inputs[5]], impl=impl)

    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected.float(), **to_the_bit(loss))
    for gradient, wanted in zip(gradients, truth, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted.float(), rtol=2e-2, atol=2e-2)


@LOSSES
def test_shapes_alone_are_enough_to_know_the_gradients_shapes(inputs, loss):
    real = gradients_of(loss, inputs)

    valueless = gradients_of(loss, [tensor.to("meta") for tensor in inputs])

    assert [(t.shape, t.dtype) for t in valueless] == [(t.shape, t.dtype) for t in real]


TRACED = [(logits_loss, "chunked"), (projection_loss, "chunked"), (relation_loss, "triton")]
OTHERS = [path for path in PATHS if path not in TRACED]


@pytest.mark.parametrize(
    ("loss", "impl"),
    [*TRACED, *(pytest.param(*path, marks=pytest.mark.slow) for path in OTHERS)],
)
def test_compiled_without_a_break_the_gradients_are_the_same(inputs, loss, impl):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    expected = gradients_of(loss, inputs, impl=impl)
    torch.testing.assert_close(gradients_of(compiled, inputs, impl=impl), expected)


@pytest.mark.parametrize(
    ("module", "name", "loss"),
    [
        (linear_kd.ops, "linear_kd", linear_loss),
        (logits.ops, "logits_kd", logits_loss),
        (hidden.hidden_ops, "hidden_loss", projection_loss),
        (topk.topk_ops, "topk_kd", CHUNKED["topk_tail"]),
    ],
)
def test_the_operators_keep_their_promises_to_torch(inputs, monkeypatch, module, name, loss):
    operator, calls = getattr(module, name), []

    def recorder(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(module, name, recorder)
    loss(*leaves_of(inputs), *inputs[3:])

    assert calls
    for arguments in calls:
        torch.library.opcheck(operator, tuple(map(as_leaf, arguments)))


def as_leaf(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


@LOSSES
def test_inputs_of_any_strides_give_the_same(inputs, loss):
    strided = [
        tensor.repeat_interleave(2, 0)[::2] if tensor.dim() == 1 else tensor.T.contiguous().T
        for tensor in inputs
    ]

    torch.testing.assert_close(gradients_of(loss, strided), gradients_of(loss, inputs))


@EVERY_PATH
def test_a_gradient_of_the_gradient_is_refused(inputs, loss, impl):
    if impl == "reference" or loss is small_loss:  # eager torch, which has second derivatives
        return
    leaves = leaves_of(inputs)

    value = loss(*leaves, *inputs[3:], impl=impl)

    with pytest.raises(RuntimeError, match=r"do not support second derivatives.*impl='reference'"):
        torch.autograd.grad(value, leaves[:1], create_graph=True)


class NothingIsRead(TorchDispatchMode):
    """Raises where a value leaves the device, or where a shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}, name
        return func(*args, **(kwargs or {}))


def test_the_way_of_an_accelerator_waits_for_no_value(inputs, monkeypatch):
    # The operator's own code, which a mode does not see otherwise.
    monkeypatch.setattr(ops, "linear_kd", ops.linear_kd._init_fn)
    monkeypatch.setattr(ops, "logits_kd", ops.logits_kd._init_fn)

    def losses():
        linear = linear_loss(*inputs, reduction="mean")
        return linear, logits_loss(*inputs)

    # A CPU is allowed to look, so it must not be seen as one.
    with pytest.raises(AssertionError), NothingIsRead():
        losses()
    expected = losses()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with NothingIsRead():
        unread = losses()

    torch.testing.assert_close(unread, expected)


class Made(TorchDispatchMode):
    """Counts the tensors of a shape that come into being."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.storages = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = not func.is_view and "alias" not in str(func) and "detach" not in str(func)
        if isinstance(out, torch.Tensor) and out.shape == self.shape and is_new:
            self.storages.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("watched", [False, True])
def test_the_backward_makes_one_tensor_as_large_as_the_head(inputs, watched):
    weight = inputs[1].requires_grad_()
    with Made(None) if watched else nullcontext():  # a mode gets torch's operator
        loss = linear_loss(inputs[0], weight, *inputs[2:])

    with Made(weight.shape) as made:
        loss.backward()

    assert len(made.storages) == 1


@LOSSES
@pytest.mark.parametrize("watched", [False, True])
def test_without_rows_the_loss_is_zero_and_connected(inputs, loss, watched):
    student, weight, bias, teacher, teacher_weight, labels = inputs
    leaves = leaves_of([student[:0], weight, bias])

    with Made(None) if watched else nullcontext():  # a mode gets torch's operator
        value = loss(*leaves, teacher[:0], teacher_weight, labels[:0])

    assert value == 0
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
