"""The losses as operators: what torch.compile, autograd and a device that must not wait see."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megakd_kernels as mk
from megakd_kernels import hidden, linear_kd, logits, ops

ALL = {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2, "skew_kl": 0.1, "tvd": 0.4}


def linear_loss(student, weight, teacher, teacher_weight, labels, **options):
    return mk.linear_kd_loss(
        student, weight, teacher, teacher_weight, labels, t_squared=True, divergence=ALL,
        temperature=2.0, ce_weight=0.5, **options,
    ).loss  # fmt: skip


def logits_loss(student, weight, teacher, teacher_weight, labels):
    return mk.kd_loss_from_logits(
        student @ weight.T, teacher @ teacher_weight.T, labels, t_squared=True, divergence=ALL,
        ce_weight=0.5, impl="chunked",
    ).loss  # fmt: skip


def projection_loss(student, weight, teacher, teacher_weight, labels):
    valid = labels != -100
    states, options = (student, weight[:9], teacher), {"valid": valid, "impl": "chunked"}
    mse = mk.hidden_mse_projection_loss(*states, **options)
    return mse + mk.hidden_cosine_projection_loss(*states, **options)


LOSSES = pytest.mark.parametrize("loss", [linear_loss, logits_loss, projection_loss])


@pytest.fixture
def inputs(make_problem):
    problem = make_problem()
    return [
        problem.student_hidden, problem.student_weight, problem.teacher_hidden,
        problem.teacher_weight, problem.labels,
    ]  # fmt: skip


def gradients_of(loss, inputs):
    leaves = [inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()]
    value = loss(*leaves, *inputs[2:])
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@LOSSES
def test_shapes_alone_are_enough_to_know_the_gradients_shapes(inputs, loss):
    real = gradients_of(loss, inputs)

    valueless = gradients_of(loss, [tensor.to("meta") for tensor in inputs])

    assert [(t.shape, t.dtype) for t in valueless] == [(t.shape, t.dtype) for t in real]


@LOSSES
def test_compiled_without_a_break_the_gradients_are_the_same(inputs, loss):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(gradients_of(compiled, inputs), gradients_of(loss, inputs))


@pytest.mark.parametrize(
    ("module", "name", "loss"),
    [
        (linear_kd.ops, "linear_kd", linear_loss),
        (logits.ops, "logits_kd", logits_loss),
        (hidden.hidden_ops, "hidden_loss", projection_loss),
    ],
)
def test_the_operators_keep_their_promises_to_torch(inputs, monkeypatch, module, name, loss):
    operator, calls = getattr(module, name), []

    def recorder(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(module, name, recorder)
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_()]
    loss(*leaves, *inputs[2:])

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


@LOSSES
def test_without_rows_the_loss_is_zero_and_connected(inputs, loss):
    none = [inputs[0][:0], inputs[1], inputs[2][:0], inputs[3], inputs[4][:0]]

    value, hidden_gradient, weight_gradient = gradients_of(loss, none)

    assert value == 0
    assert hidden_gradient.shape == none[0].shape
    assert torch.equal(weight_gradient, torch.zeros_like(inputs[1]))


@LOSSES
def test_a_gradient_of_the_gradient_is_refused(inputs, loss):
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_()]

    value = loss(*leaves, *inputs[2:])

    with pytest.raises(RuntimeError, match=r"do not support second derivatives.*impl='reference'"):
        torch.autograd.grad(value, leaves[:1], create_graph=True)


class NothingIsRead(TorchDispatchMode):
    """Raises where a value leaves the device, or where a shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
def test_the_way_of_an_accelerator_waits_for_no_value(inputs, monkeypatch, logits_dtype):
    # The operator's own code, which a mode does not see otherwise.
    monkeypatch.setattr(ops, "linear_kd", ops.linear_kd._init_fn)
    monkeypatch.setattr(ops, "logits_kd", ops.logits_kd._init_fn)

    def losses():
        linear = linear_loss(*inputs, impl="chunked", logits_dtype=logits_dtype, reduction="mean")
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
        loss = linear_loss(inputs[0], weight, *inputs[2:], impl="chunked")

    with Made(weight.shape) as made:
        loss.backward()

    assert len(made.storages) == 1


@LOSSES
def test_no_rows_give_no_loss_to_an_operator_that_is_watched(inputs, loss):
    student, weight, teacher, teacher_weight, labels = inputs
    leaves = [student[:0].detach().requires_grad_(), weight.detach().requires_grad_()]

    with Made(None):  # a mode gets torch's operator
        value = loss(*leaves, teacher[:0], teacher_weight, labels[:0])

    value.backward()
    assert value == 0
    assert all((leaf.grad == 0).all() for leaf in leaves)
