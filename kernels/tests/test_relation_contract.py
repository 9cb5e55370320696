"""The relation loss as an operator: autograd, compile, autocast, dispatch, and bad input."""

import pytest
import torch

from megakd_kernels import relation_ops
from megakd_kernels.relation import relation_kl_loss

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
KEYS = pytest.mark.parametrize("keys", [False, True], ids=["self", "query-key"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def states():
    """Student [2, 10, 6] twice and teacher [2, 10, 10] twice, for two heads; valid [2, 10]."""
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 10, 6, generator=generator).to(DEVICE) for _ in range(2)]
    teacher = [torch.randn(2, 10, 10, generator=generator).to(DEVICE) for _ in range(2)]
    valid = (torch.rand(2, 10, generator=generator) > 0.2).to(DEVICE)
    return student, teacher, valid


def call(student, teacher, **options):
    """The loss of one tensor each (a self relation) or of two."""
    keys = {"student_keys": student[1], "teacher_keys": teacher[1]} if len(student) > 1 else {}
    options = {"heads": 2, "valid": None, **options}
    return relation_kl_loss(student[0], teacher[0], **keys, **options)


def leaves_of(student):
    return [tensor.detach().clone().requires_grad_() for tensor in student]


@IMPLS
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no-example", "no-position"])
def test_an_empty_batch_has_loss_zero_and_empty_gradients(impl, shape):
    student = [torch.zeros(*shape, 4, device=DEVICE, requires_grad=True)]

    loss = call(student, [torch.zeros(*shape, 6, device=DEVICE)], impl=impl)

    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (*shape, 4)


@IMPLS
@pytest.mark.parametrize("how", ["valid", "token_weight"])
def test_without_a_row_that_counts_loss_and_gradients_are_zero(states, impl, how):
    student, teacher, valid = states
    leaves = leaves_of(student)
    nothing = torch.zeros_like(valid) if how == "valid" else torch.zeros_like(valid).float()

    loss = call(leaves, teacher, impl=impl, **{how: nothing})

    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.eq(0).all()


@IMPLS
def test_tensors_of_any_strides_are_read_as_they_are(states, impl):
    student, teacher, valid = states
    plain = leaves_of(student)
    # Part of a fused projection, and positions last.
    fused = torch.cat([student[0], student[1], student[0]], dim=-1)
    strided = [fused[..., :6].requires_grad_(),
               student[1].mT.contiguous().mT.requires_grad_()]  # fmt: skip
    soft = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in teacher]
    masks = {"valid": valid.mT.contiguous().mT, "segments": valid.mT.contiguous().mT}

    loss = call(strided, soft, **masks, impl=impl)
    expected = call(plain, teacher, valid=valid, segments=valid.int(), impl=impl)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, strided), torch.autograd.grad(expected, plain)
    )


@IMPLS
def test_models_may_differ_in_type_and_keys_from_queries(states, impl):
    student, teacher, valid = states
    mixed = [student[0].bfloat16(), student[1]], [teacher[0], teacher[1].half()]
    widened = [[tensor.float() for tensor in side] for side in mixed]

    loss = call(*mixed, valid=valid, impl=impl)

    torch.testing.assert_close(loss, call(*widened, valid=valid, impl=impl))


@KEYS
@pytest.mark.parametrize("name", ["relation_kl", "relation_kl_flash"])
def test_operators_pass_the_checks_of_torch(states, keys, name):
    student, teacher, valid = states
    leaves = leaves_of(student)
    tensors = leaves[0], leaves[1] if keys else None, teacher[0], teacher[1] if keys else None
    wanted = {"wants_queries": True, "wants_keys": keys} if name == "relation_kl" else {}

    torch.library.opcheck(
        getattr(relation_ops, name),
        (*tensors, valid, valid.long(), valid.float()),
        {"heads": 2, "causal": True, **wanted},
    )


def test_the_backward_operator_passes_the_checks_of_torch(states):
    student, teacher, valid = states
    relation = student[0], None, teacher[0], None, valid, None, valid.float()
    options = {"heads": 2, "causal": False}
    _, statistics = relation_ops.relation_kl_flash(*relation, **options)

    torch.library.opcheck(
        relation_ops.relation_kl_flash_backward,
        (torch.tensor(2.0, device=DEVICE), statistics, *relation),
        {**options, "wants_queries": True, "wants_keys": False},
    )


def test_the_environment_overrides_auto_alone(states, monkeypatch):
    student, teacher, valid = states
    monkeypatch.setenv("MEGAKD_KERNELS", "reference")
    monkeypatch.setattr("megakd_kernels.relation.relation_kl_reference", lambda relation: "eager")

    assert call(student, teacher, valid=valid) == "eager"
    assert call(student, teacher, valid=valid, impl="chunked") != "eager"


def test_what_kernels_cannot_compute_goes_by_tiles_unless_they_are_asked_for(states, monkeypatch):
    student, teacher, _ = states
    doubles = [student[0].double()], [teacher[0].double()]
    monkeypatch.setenv("MEGAKD_KERNELS", "triton")

    assert call(*doubles).dtype == torch.float64
    with pytest.raises(ValueError, match=r"computes in fp32 .* got torch.float64 and heads of 3"):
        call(*doubles, impl="triton")


def test_heads_too_wide_for_a_program_are_refused_by_kernels(states):
    wide = [torch.zeros(1, 2, 257, device=DEVICE)]

    assert call(wide, wide, heads=1).item() == 0
    with pytest.raises(ValueError, match=r"heads up to 128 wide.* 257 \(student\) and 257"):
        call(wide, wide, heads=1, impl="triton")


def test_keys_of_one_model_alone_are_refused(states):
    student, teacher, _ = states
    with pytest.raises(ValueError, match="student_keys are given and teacher_keys are not"):
        relation_kl_loss(student[0], teacher[0], student[1], heads=2, valid=None)
    with pytest.raises(ValueError, match="teacher_keys are given and student_keys are not"):
        relation_kl_loss(student[0], teacher[0], None, teacher[1], heads=2, valid=None)


@pytest.mark.parametrize("heads", [0, -2, 4, 3])
def test_heads_that_do_not_divide_a_width_are_refused_with_both_widths(states, heads):
    with pytest.raises(ValueError, match=f"heads is {heads}, the student 6 wide and the te"):
        call(*states[:2], heads=heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, v: ([s[0][:1]], [t[0]], v), r"\[1, 10, 6\] .* \[2, 10, 10\]"),
        (lambda s, t, v: ([s[0][0]], [t[0]], v), r"student_queries is \[10, 6\]"),
        (lambda s, t, v: ([s[0]], [t[0].long()], v), r"teacher_queries .* torch.int64"),
        (lambda s, t, v: ([s[0], s[1][..., :4]], t, v), r"student_keys is \[2, 10, 4\]"),
        (lambda s, t, v: ([s[0], s[1]], [t[0], t[1][:, 1:]], v), r"teacher_keys is \[2, 9, 10\]"),
        (lambda s, t, v: (s, [t[0], t[1].long()], v), r"teacher_keys is .* torch.int64"),
        (lambda s, t, v: (s, t, v[:, 1:]), r"valid is \[2, 9\] .* must be \[2, 10\]"),
        (lambda s, t, v: (s, t, v.float()), "valid is torch.float32"),
    ],
    ids=[
        "batch",
        "flat",
        "integers",
        "student-keys",
        "teacher-keys",
        "keys-integers",
        "mask",
        "additive-mask",
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_their_shapes(states, change, message):
    student, teacher, valid = change(*states)
    with pytest.raises(ValueError, match=message):
        call(student, teacher, valid=valid)


@pytest.mark.parametrize("name", ["segments", "token_weight"])
def test_one_entry_per_position_is_demanded_of_every_mask(states, name):
    with pytest.raises(ValueError, match=rf"{name} is \[2, 5\] .* must be \[2, 10\]"):
        call(*states[:2], **{name: torch.zeros(2, 5, device=DEVICE)})
