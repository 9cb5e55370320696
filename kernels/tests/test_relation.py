"""The relation loss on every path: values, masks, what must not matter, and bad input."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd_kernels import relation_chunked, relation_ops
from megakd_kernels.relation import relation_kl_loss
from megakd_kernels.relation_reference import Relation

IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference", "triton"])
TORCH_IMPLS = pytest.mark.parametrize("impl", ["chunked", "reference"])
KEYS = pytest.mark.parametrize("keys", [False, True], ids=["self", "query-key"])
MASKS = pytest.mark.parametrize(
    "masks",
    [(), ("valid",), ("causal",), ("segments",), ("valid", "causal", "segments")],
    ids="-".join,
)
# Kernels run on the GPU where there is one, else in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Problem:
    """Tensors of one call in fp64, and its options."""

    tensors: dict
    options: dict

    def solve(self, impl, dtype=torch.float32, *, upstream=1.0, **options):
        """The loss, and the gradients of the student's tensors."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        leaves = [tensors[name].requires_grad_() for name in tensors if "student" in name]
        loss = relation_kl_loss(**tensors, **{**self.options, "impl": impl, **options})
        return loss.detach(), torch.autograd.grad(upstream * loss, leaves)

    def change(self, change):
        return replace(self, tensors={name: change(t) for name, t in self.tensors.items()})


def make(batch=2, length=21, *, heads=2, student=3, teacher=5, keys=False, masks=(), seed=0,
         spread=1.3):  # fmt: skip
    """Widths are those of one head; `masks` are any of valid, causal, segments, weight."""
    generator = torch.Generator().manual_seed(seed)

    def random(width):
        shape = (batch, length, heads * width)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Values that bf16 and fp16 hold, so that every type sees the same problem.
        return (noise * spread).to(torch.bfloat16).double().to(DEVICE)

    names = ["queries", "keys"] if keys else ["queries"]
    widths = {"student": student, "teacher": teacher}
    tensors = {f"{owner}_{name}": random(widths[owner]) for name in names for owner in widths}
    options = {"heads": heads, "valid": None, "causal": "causal" in masks}
    if "valid" in masks:
        options["valid"] = torch.rand(batch, length, generator=generator) > 0.3
    if "segments" in masks:
        options["segments"] = torch.randint(-1, 2, (batch, length), generator=generator)
    if "weight" in masks:
        options["token_weight"] = torch.rand(batch, length, generator=generator)
    options = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    return Problem(tensors, options)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several ragged tiles in problems as small as these."""
    monkeypatch.setattr(relation_chunked, "_CPU_TILE_BYTES", 3000)
    monkeypatch.setattr(relation_chunked, "_DEVICE_TILE_BYTES", 3000)


def by_hand(problem):
    """The loss, pair by pair."""
    tensors, options = problem.tensors, problem.options
    queries = tensors["student_queries"], tensors["teacher_queries"]
    keys = (
        tensors.get("student_keys", tensors["student_queries"]),
        tensors.get("teacher_keys", tensors["teacher_queries"]),
    )
    batch, length, _ = queries[0].shape
    total = 0.0
    for b in range(batch):
        for i in range(length):
            visible = [j for j in range(length) if sees(options, b, i, j)]
            for head in range(options["heads"]):
                log_q, log_p = (
                    relation_row(x[b, i], y[b, visible], head, options["heads"])
                    for x, y in zip(queries, keys, strict=True)
                )
                weight = options.get("token_weight", torch.ones(batch, length))[b, i]
                total += weight * (log_p.exp() * (log_p - log_q)).sum() / options["heads"]
    return total


def sees(options, b, i, j):
    valid, segments = options["valid"], options.get("segments")
    is_seen = valid is None or (valid[b, i] and valid[b, j])
    is_same = segments is None or segments[b, i] == segments[b, j]
    return is_seen and is_same and not (options["causal"] and j > i)


def relation_row(query, keys, head, heads):
    width = len(query) // heads
    part = slice(head * width, (head + 1) * width)
    return torch.log_softmax(keys[:, part] @ query[part] / math.sqrt(width), 0)


@TORCH_IMPLS
@KEYS
@MASKS
def test_loss_is_the_sum_over_rows_of_the_mean_over_heads(impl, keys, masks):
    problem = make(length=6, keys=keys, masks=(*masks, "weight"))

    loss, _ = problem.solve(impl, torch.float64)

    torch.testing.assert_close(loss, torch.as_tensor(by_hand(problem), device=DEVICE))


@TORCH_IMPLS
@KEYS
@pytest.mark.parametrize("masks", [(), ("valid", "causal", "segments", "weight")], ids="-".join)
def test_gradients_are_the_derivatives_of_the_loss(impl, keys, masks, monkeypatch):
    monkeypatch.setattr(relation_chunked, "_CPU_TILE_BYTES", 200)
    problem = make(batch=1, length=4, keys=keys, masks=masks)
    names = [name for name in problem.tensors if "student" in name]

    def value(*leaves):
        tensors = {**problem.tensors, **dict(zip(names, leaves, strict=True))}
        return relation_kl_loss(**tensors, **problem.options, impl=impl)

    leaves = [problem.tensors[name].requires_grad_() for name in names]

    assert torch.autograd.gradcheck(value, leaves)


# bf16 is truncated, not rounded, where the interpreter stores it.
TOLERANCES = {
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (1e-4, 1.2e-2),
    torch.float16: (1e-4, 1e-3),
}
EVERY = ("valid", "causal", "segments")


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {}),
        (torch.float32, {"batch": 2, "keys": True, "masks": ("segments", "weight")}),
        (torch.float32, {"batch": 2, "masks": (*EVERY, "weight")}),
        (torch.float32, {"batch": 2, "keys": True, "masks": (*EVERY, "weight")}),
        *((dtype, {"keys": True, "masks": EVERY[:2]}) for dtype in (torch.bfloat16, torch.float16)),
        # Widths of a head below, at and above a power of two; wider and narrower teachers.
        (torch.float32, {"heads": 1, "student": 16, "teacher": 3}),
        (torch.float32, {"heads": 2, "student": 17, "teacher": 33}),
        (torch.float32, {"heads": 3, "student": 5, "teacher": 40}),
    ],
    ids=str,
)
def test_any_heads_masks_and_types_match_double_precision_of_the_same_values(
    impl, dtype, sizes, distance
):
    problem = make(**{"batch": 1, "length": 17, **sizes})

    loss, gradients = problem.solve(impl, dtype)
    true_loss, true_gradients = problem.solve("reference", torch.float64)

    assert loss.dtype == torch.float32
    assert distance(loss, true_loss) < TOLERANCES[dtype][0]
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        assert distance(gradient, true_gradient) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
# Scores around +-80 (one-hot rows), and scores of thousands that share a large part.
@pytest.mark.parametrize(("spread", "shift"), [(9.0, 0.0), (1.0, 40.0)], ids=["80", "thousands"])
def test_large_scores_lose_no_more_than_three_times_eager_fp32(impl, spread, shift, distance):
    problem = make(1, 17, student=4, teacher=6, spread=spread).change(lambda t: t + shift)

    loss, (gradient,) = problem.solve(impl)
    eager_loss, (eager_gradient,) = problem.solve("reference")
    true_loss, (true_gradient,) = problem.solve("reference", torch.float64)

    assert distance(loss, true_loss) <= max(1e-5, 3 * distance(eager_loss, true_loss))
    # How a score is rounded is an error of its probability, and sums of other orders round
    # otherwise: which BLAS multiplies in the interpreter depends on the processor.
    rounding = largest_score(problem) * torch.finfo(torch.float32).eps / 2
    eager_error = distance(eager_gradient, true_gradient)
    assert distance(gradient, true_gradient) <= max(2e-5, rounding, 3 * eager_error)


def largest_score(problem):
    heads = problem.options["heads"]
    queries = problem.tensors["student_queries"].unflatten(-1, (heads, -1))
    scores = torch.einsum("bihd,bjhd->bhij", queries, queries) / math.sqrt(queries.shape[-1])
    return scores.abs().max().item()


@IMPLS
@KEYS
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(impl, keys):
    problem = make(1, 17, student=4, teacher=4, keys=keys, masks=("valid", "causal"))
    tensors = {name: problem.tensors[name.replace("teacher", "student")].clone()
               for name in problem.tensors}  # fmt: skip

    loss, gradients = replace(problem, tensors=tensors).solve(impl)

    assert loss.item() == 0
    for gradient in gradients:
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("seed", range(2))
def test_the_loss_is_never_negative_near_convergence(impl, seed):
    problem = make(batch=1, length=17, student=4, teacher=4, seed=seed)
    student = problem.tensors["student_queries"]
    tensors = {"student_queries": student, "teacher_queries": student * (1 + 1e-7)}

    loss, _ = replace(problem, tensors=tensors).solve(impl)

    assert loss.item() >= 0


@IMPLS
@pytest.mark.parametrize(("keys", "garbage"), [(False, math.nan), (True, 1e30)])
def test_invalid_positions_may_hold_anything(impl, keys, garbage):
    problem = make(batch=1, length=17, keys=keys, masks=("valid", "causal", "weight"))
    valid, weight = problem.options["valid"], problem.options["token_weight"]
    spoiled = problem.change(lambda t: t.masked_fill(~valid[..., None], garbage))

    clean = problem.solve(impl)
    dirty = spoiled.solve(impl, token_weight=weight.masked_fill(~valid, garbage))

    assert torch.equal(clean[0], dirty[0])
    for gradient, spoiled_gradient in zip(clean[1], dirty[1], strict=True):
        assert torch.equal(gradient, spoiled_gradient)
        assert spoiled_gradient[~valid].eq(0).all()


def draw_masks(data, batch, length):
    bits = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    grid = [torch.tensor(data.draw(bits), device=DEVICE).view(batch, length) for _ in range(2)]
    return {"valid": grid[0], "segments": grid[1].long(), "causal": data.draw(st.booleans())}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_tiles_match_the_reference_for_any_shape_and_mask(data, batch, length, heads, keys):
    problem = make(batch, length, heads=heads, student=2, teacher=3, keys=keys)
    options = draw_masks(data, batch, length)

    loss, gradients = problem.solve("chunked", torch.float64, **options)
    expected, true_gradients = problem.solve("reference", torch.float64, **options)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, true_gradients)


@KEYS
def test_tiles_never_hold_all_pairs_of_positions(keys, largest_tensor):
    heads, length = 8, 64
    problem = make(1, length, heads=heads, student=2, teacher=2, keys=keys, masks=("valid",))
    tensors = (problem.tensors.get(f"{owner}_{name}")
               for owner in ("student", "teacher") for name in ("queries", "keys"))  # fmt: skip
    weight = problem.options["valid"].double()
    relation = Relation(*tensors, problem.options["valid"], None, weight, heads, causal=False)

    with largest_tensor() as largest:
        relation_chunked.relation_sweep(relation, wants_queries=True, wants_keys=keys)

    assert 0 < largest.numel < heads * length * length / 8


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
)
def test_tensors_that_do_not_fit_are_refused_with_their_shapes(states, change, message):
    student, teacher, valid = change(*states)
    with pytest.raises(ValueError, match=message):
        call(student, teacher, valid=valid)


@pytest.mark.parametrize("name", ["segments", "token_weight"])
def test_one_entry_per_position_is_demanded_of_every_mask(states, name):
    with pytest.raises(ValueError, match=rf"{name} is \[2, 5\] .* must be \[2, 10\]"):
        call(*states[:2], **{name: torch.zeros(2, 5, device=DEVICE)})
