"""The Triton row kernel against fp64 autograd: values, gradients, agreement."""

import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from megakd_kernels.row_plan import NO_BIASES, Biases, RowInputs, RowPlan, Warp
from megakd_kernels.triton.row_kd import TritonRows

# The interpreter computes with numpy, which speaks up where -inf meets -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd")
# Two whole blocks and a ragged one.
BLOCK, WIDTH = 64, 150
ALL_SIX = tuple((name, 0.3 + index) for index, name in enumerate(NAMES))


def plan_of(*names, width=WIDTH, **options):
    mixture = tuple((name, 1.0) if isinstance(name, str) else name for name in names)
    temperature = options.get("temperature", 1.0)
    defaults = {
        "beta": 0.3, "skew": 0.1, "temperature": 1.0, "value_scale": temperature**2,
        "shared": width, "with_ce": False, "with_gradient": True,
    }  # fmt: skip
    return RowPlan(mixture=mixture, **{**defaults, **options})


def rows_of(plan, biases=NO_BIASES):
    """The kernel with three steps over 150 ids."""
    return TritonRows(plan=plan, biases=biases, block=BLOCK)


@dataclass
class Case:
    """Rows of logits, which of them count, labels, and weights of the two losses."""

    student: torch.Tensor
    teacher: torch.Tensor | None
    valid: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    ce_weight: torch.Tensor

    def to(self, dtype):
        teacher = None if self.teacher is None else self.teacher.to(dtype)
        return replace(self, student=self.student.to(dtype), teacher=teacher)

    def inputs(self, plan):
        slope = plan.value_scale / plan.temperature
        return RowInputs(self.valid, self.labels, self.weight * slope, self.ce_weight)

    def run(self, plan, gradient="inside", *, biases=NO_BIASES):
        """The terms and the gradient, written over the student or `gradient`."""
        student = self.student.clone()
        teacher = None if self.teacher is None else self.teacher.clone()
        out = student if isinstance(gradient, str) else gradient
        kernel = rows_of(plan, biases)
        return kernel.run_(student, teacher, self.inputs(plan), out), out


def make_case(rows=4, width=WIDTH, shared=None, *, seed=0, spread=3.0, invalid=(2,)):
    """Random rows; rows that do not count hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    student, teacher = normal(rows, width) * spread, normal(rows, shared or width) * spread
    valid = torch.ones(rows, dtype=torch.bool)
    valid[list(invalid)] = False
    student[~valid], teacher[~valid] = NAN, NAN
    labels = torch.randint(0, width, (rows,), generator=generator)
    weight = (torch.rand(rows, generator=generator) + 0.5) * valid
    ce_weight = (torch.rand(rows, generator=generator) + 0.5) * valid
    tensors = (student, teacher, valid, labels, weight, ce_weight)
    return Case(*(tensor.to(DEVICE) for tensor in tensors))


class Answer(NamedTuple):
    """Return the expected values; rows that do not count are zeros."""

    divergences: torch.Tensor
    ce: torch.Tensor
    agrees: torch.Tensor
    gradient: torch.Tensor


def divergence(name, log_p, log_q, plan):
    """Per row, straight from the definition; 0 log 0 = 0."""

    def kl(log_a, log_b):
        present = log_a > -INF
        difference = torch.where(present, log_a, 0.0) - torch.where(present, log_b, 0.0)
        return (log_a.exp() * difference).sum(-1)

    def mixed(share):
        floor = torch.tensor(-1e4, dtype=log_p.dtype, device=log_p.device)
        a, b = torch.maximum(log_p, floor), torch.maximum(log_q, floor)
        return torch.logaddexp(a + math.log(share), b + math.log(1 - share))

    beta, skew = plan.beta, plan.skew
    if name == "jsd":
        return beta * kl(log_p, mixed(beta)) + (1 - beta) * kl(log_q, mixed(beta))
    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "skew_kl": lambda: kl(log_p, mixed(skew)),
        "skew_rkl": lambda: kl(log_q, mixed(1 - skew)),
        "tvd": lambda: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    }[name]()


def warp(logits, how):
    logits = logits * how.scale
    return logits if how.softcap == 0 else how.softcap * torch.tanh(logits / how.softcap)


def choice(logits):
    is_top = (logits == logits.detach().amax(-1, keepdim=True)).to(logits.dtype)
    return is_top / is_top.sum(-1, keepdim=True)


def answer(case, plan, dtype=torch.float64):
    valid = case.valid
    raw = case.student.to(dtype).clone().requires_grad_()
    logits = warp(raw[valid], plan.student_warp)
    divergences = torch.zeros(len(plan.mixture), len(valid), dtype=dtype, device=DEVICE)
    ce, agrees = torch.zeros_like(raw[:, 0]), torch.zeros_like(raw[:, 0])
    if case.teacher is not None:
        soft = warp(case.teacher.to(dtype)[valid], plan.teacher_warp)
        shared = logits[:, : plan.shared]
        log_q = F.log_softmax(shared / plan.temperature, -1)
        log_p = F.log_softmax(soft / plan.temperature, -1)
        values = [divergence(name, log_p, log_q, plan) for name, _ in plan.mixture]
        divergences[:, valid] = torch.stack(values) * plan.value_scale
        agrees[valid] = (choice(shared) * choice(soft)).sum(-1)
    if plan.with_ce:
        labels = case.labels[valid]
        ce = ce.masked_scatter(valid, F.cross_entropy(logits, labels, reduction="none"))
        if case.teacher is None:
            agrees[valid] = choice(logits).gather(1, labels[:, None])[:, 0]
    total = (ce * case.ce_weight).sum()
    for (_, weight), value in zip(plan.mixture, divergences, strict=True):
        total = total + weight * (value * case.weight).sum()
    (gradient,) = torch.autograd.grad(total, raw)
    return Answer(divergences.detach(), ce.detach(), agrees.detach(), gradient)


def row_errors(got, expected):
    """Per row (the last dimension for vectors), relative; 0 where both are the same."""
    got, expected = got.double(), expected.double()
    same = (got == expected).all(-1)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return torch.where(same, 0, error)


def check(case, plan, result, *, values=1e-5, gradients=2e-5):
    """Every row within the tolerance, or within three times what torch is off in fp32."""
    terms, gradient = result
    truth, single = answer(case, plan), answer(case, plan, torch.float32)

    def close(name, got, expected, torch_fp32, tolerance):
        got, limit = row_errors(got, expected), 3 * row_errors(torch_fp32, expected)
        worst = got - torch.clamp(torch.nan_to_num(limit), min=tolerance)
        assert (worst <= 0).all(), (name, got, limit)

    soft = terms.divergences[..., None], truth.divergences[..., None], single.divergences[..., None]
    close("divergences", *soft, values)
    close("ce", terms.ce[:, None], truth.ce[:, None], single.ce[:, None], values)
    torch.testing.assert_close(terms.agrees.double(), truth.agrees, rtol=1e-6, atol=0)
    if gradient is not None:
        close("gradient", gradient, truth.gradient, single.gradient, gradients)


@pytest.mark.parametrize(
    ("name", "temperature"),
    [*((name, 2.5) for name in NAMES), ("forward_kl", 1.0), ("jsd", 1.0), ("tvd", 1.0)],
)
def test_a_divergence_and_its_gradient_match_fp64(name, temperature):
    # At T = 1 the student has more ids than the teacher, and they get a gradient of zero.
    shared = WIDTH - 11 if temperature == 1.0 else WIDTH
    case = make_case(shared=shared)
    case.student[0, :shared] = case.teacher[0] + 40 + 1e-3 * case.student[0, :shared]
    case.student[1].sign_().mul_(80)
    case.teacher[1].sign_().mul_(80)
    case.student[3, :70], case.teacher[3, :70] = -INF, -INF
    plan = plan_of(name, temperature=temperature, shared=shared)

    terms, gradient = case.run(plan)

    check(case, plan, (terms, gradient))
    assert (gradient[:, shared:] == 0).all()
    assert (gradient[~case.valid] == 0).all()


@pytest.mark.parametrize(
    ("temperature", "shared"),
    [(1.0, WIDTH), (1.0, 100), (2.5, 100)],
    ids=["shared softmax", "fewer ids", "own temperature"],
)
def test_cross_entropy_over_all_ids_joins_a_mixture(temperature, shared):
    case = make_case(3, shared=shared)
    case.labels[:2] = torch.tensor([WIDTH - 1, 3])
    plan = plan_of(
        ("forward_kl", 0.5), ("jsd", 2.0), temperature=temperature, shared=shared, with_ce=True
    )

    check(case, plan, case.run(plan))


def test_all_six_divergences_of_bent_logits_match_fp64():
    case = make_case(4, spread=20.0)
    warps = {"student_warp": Warp(0.7, 30.0), "teacher_warp": Warp(1.3, 50.0)}
    plan = plan_of(*ALL_SIX, temperature=2.0, with_ce=True, **warps)

    check(case, plan, case.run(plan))


def test_scaled_logits_of_student_alone_and_of_teacher_alone_match_fp64():
    case = make_case(3, width=70)
    scaled = plan_of("reverse_kl", width=70, student_warp=Warp(0.25), with_ce=True)
    capped = plan_of("forward_kl", width=70, teacher_warp=Warp(1.0, 2.0))

    check(case, scaled, case.run(scaled))
    check(case, capped, case.run(capped))


@pytest.mark.parametrize(
    ("sides", "warp"),
    [("st", Warp(-0.7, 30.0)), ("s", Warp()), ("t", Warp())],
    ids=["both, bent", "student", "teacher"],
)
def test_a_bias_that_the_kernel_adds_gives_the_bits_of_biased_logits(sides, warp, same_values):
    case = make_case(2, invalid=(), shared=WIDTH - 11)
    student, teacher = torch.linspace(-2, 3, 2 * WIDTH, device=DEVICE).bfloat16().view(2, WIDTH)
    every_second = student.repeat_interleave(2)[::2]
    biases = Biases(every_second if "s" in sides else None, teacher[:-11] if "t" in sides else None)
    plan = plan_of(
        "forward_kl", ("jsd", 0.5), temperature=2.0, with_ce=True, shared=WIDTH - 11,
        student_warp=warp, teacher_warp=warp,
    )  # fmt: skip
    added = replace(
        case,
        student=case.student if biases.student is None else case.student + biases.student,
        teacher=case.teacher if biases.teacher is None else case.teacher + biases.teacher,
    )

    terms, gradient = case.run(plan, biases=biases)

    expected, expected_gradient = added.run(plan)
    same_values((*terms, gradient), (*expected, expected_gradient))


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_cross_entropy_needs_no_teacher(capped):
    case = replace(make_case(4), teacher=None)
    case.labels[0] = case.student[0].argmax()
    plan = plan_of(with_ce=True, student_warp=Warp(1.0, 5.0 if capped else 0.0))

    terms, gradient = case.run(plan)

    check(case, plan, (terms, gradient))
    assert terms.divergences.shape == (0, 4)


def test_half_precision_rows_are_computed_in_fp32():
    case = make_case(4).to(torch.float16)
    plan = plan_of(("reverse_kl", 0.5), ("skew_kl", 0.5), temperature=2.5, with_ce=True)
    wide = torch.full((4, WIDTH), NAN, device=DEVICE)

    terms, gradient = case.run(plan)
    other_terms, other = case.run(plan, gradient=wide)

    assert gradient.dtype == torch.float16
    check(case, plan, (terms, gradient), gradients=1e-3)
    check(case, plan, (other_terms, other))
    narrow, plain = case.to(torch.bfloat16), plan_of("forward_kl")
    # The interpreter truncates bf16 where a device rounds.
    check(narrow, plain, narrow.run(plain), gradients=1.2e-2)


def test_gradient_elsewhere_or_not_wanted_leaves_values_and_logits_alone():
    case = make_case(3)
    plan = plan_of("jsd", "forward_kl", with_ce=True)
    kernel = rows_of(plan)
    student, teacher = case.student.clone(), case.teacher.clone()
    elsewhere = torch.full_like(student, NAN)

    inside_terms, inside = case.run(plan)
    terms = kernel.run_(student, teacher, case.inputs(plan), elsewhere)
    bare = kernel.run_(student, teacher, case.inputs(plan), None)

    assert torch.equal(inside, elsewhere)
    assert all(torch.equal(one, other) for one, other in zip(inside_terms, terms, strict=True))
    torch.testing.assert_close(tuple(bare), tuple(terms), rtol=1e-6, atol=0)
    torch.testing.assert_close(student, case.student, rtol=0, atol=0, equal_nan=True)


def test_a_row_that_gives_mass_to_an_excluded_id_is_infinitely_far_away():
    case = make_case(3, invalid=())
    case.student[0, 5] = -INF
    case.teacher[1, 7] = -INF
    plan = plan_of("forward_kl", "reverse_kl", "jsd")

    terms, gradient = case.run(plan)

    infinite = torch.tensor([[True, False, False], [False, True, False], [False] * 3])
    assert torch.equal(terms.divergences.isinf().cpu(), infinite)
    check(replace(case, weight=case.weight * 0), plan, (terms, None))
    assert gradient[2].isfinite().all()
    assert not gradient.isnan().any()


def test_a_first_block_without_a_finite_logit_is_no_obstacle():
    case = make_case(3, invalid=())
    case.student[0, :BLOCK], case.teacher[0, :BLOCK] = -INF, -INF
    case.teacher[1, :BLOCK] = -INF
    plan = plan_of("forward_kl", "skew_rkl", with_ce=True)
    case.labels[:] = WIDTH - 1

    check(case, plan, case.run(plan))


def test_rows_without_a_probability_show_as_nan():
    case = make_case(3, invalid=())
    case.student[0, 3] = NAN
    case.student[1] = -INF
    case.teacher[2, 140] = INF
    plan = plan_of("forward_kl", "tvd")

    terms, gradient = case.run(plan)

    assert terms.divergences.isnan().all()
    assert gradient.isnan().any(1).all()


def test_agreement_is_the_chance_that_both_draw_the_same_of_equal_maxima():
    case = make_case(5, invalid=())
    for row, (own, other) in enumerate([((3, 140), (140,)), ((3,), (140,)), ((3,), (3, 70))]):
        case.student[row, list(own)] = 50.0
        case.teacher[row, list(other)] = 50.0
    # In one lane, but not at one id.
    case.student[3, 8], case.teacher[3, 9] = 50.0, 50.0
    case.student[4], case.teacher[4] = 0.0, 0.0  # collapsed
    plan = plan_of("forward_kl")

    terms, _ = case.run(plan, gradient=None)

    expected = [0.5, 0.0, 0.5, 0.0, 1 / case.student.shape[1]]
    assert terms.agrees.tolist() == pytest.approx(expected)


def test_a_valid_row_of_weight_zero_is_valued_and_gets_no_gradient():
    case = make_case(2, invalid=())
    case.weight[0], case.ce_weight[0] = 0.0, 0.0
    plan = plan_of("forward_kl", with_ce=True)

    terms, gradient = case.run(plan)

    check(case, plan, (terms, gradient))
    assert terms.divergences[0, 0] > 0.1
    assert (gradient[0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(240))
def test_random_rows_are_far_within_the_tolerance(seed):
    draw = random.Random(seed)
    width = draw.randint(1, 200)
    shared = draw.choice([width, draw.randint(1, width)])
    warps = [Warp(), Warp(), Warp(0.7, 20.0)]
    plan = plan_of(
        draw.choice(NAMES), width=width, shared=shared, temperature=draw.choice([1.0, 2.5]),
        with_ce=draw.random() < 0.4, student_warp=draw.choice(warps),
        teacher_warp=draw.choice(warps), beta=draw.uniform(0.05, 0.95),
        skew=draw.uniform(0.05, 0.5),
    )  # fmt: skip
    # The values of close models lose two digits to the rounding of their logits and exponentials.
    spread, values = draw.choice([(0.1, 1e-4), (3.0, 1e-6)])
    case = make_case(2, width, shared, seed=seed, spread=spread, invalid=())

    check(case, plan, case.run(plan), values=values, gradients=3e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [50257, 256000])
@pytest.mark.parametrize("name", NAMES)
def test_long_rows_match_fp64_on_a_device(name, width):
    case = make_case(5, width=width)
    plan = plan_of(name, width=width, temperature=2.0, with_ce=True)
    student = case.student.clone()

    terms = TritonRows(plan=plan).run_(student, case.teacher.clone(), case.inputs(plan), student)

    check(case, plan, (terms, student))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_int32_are_reached():
    # Row 2 begins 2^31 elements after row 0: 4.3 GB per buffer.
    width, stride = 1000, 2**30 + 64
    case = make_case(3, width=width, invalid=()).to(torch.bfloat16)
    plan = plan_of("jsd", width=width)
    rows = [torch.empty(2 * stride + width, dtype=torch.bfloat16, device=DEVICE) for _ in "st"]
    student, teacher = (row.as_strided((3, width), (stride, 1)) for row in rows)
    student.copy_(case.student)
    teacher.copy_(case.teacher)

    terms = TritonRows(plan=plan).run_(student, teacher, case.inputs(plan), student)

    check(case, plan, (terms, student), gradients=5e-3)


# Rows in wider buffers, none at all, refused.

SHARED = 130


def make_rows(**options):
    """Rows with fewer ids in the teacher, and a plan for them with cross-entropy."""
    case = make_case(4, shared=SHARED, seed=5)
    case.labels[:] = torch.tensor([0, WIDTH - 1, 7, 90])
    names = options.pop("names", ALL_SIX)
    return case, plan_of(*names, shared=SHARED, with_ce=True, **options)


def test_rows_of_a_wider_buffer_stay_within_their_columns(same_values):
    case, plan = make_rows(names=("tvd",))
    terms, gradient = case.run(plan)
    buffer = torch.full((4, WIDTH + 10), 7.0, device=DEVICE)
    rows = buffer[:, :WIDTH].copy_(case.student)

    wide_terms = rows_of(plan).run_(rows, case.teacher, case.inputs(plan), rows)

    same_values((rows, *wide_terms), (gradient, *terms))
    assert (buffer[:, WIDTH:] == 7.0).all()


def test_no_row_gives_no_values():
    case, plan = make_rows(names=("jsd", "tvd"))
    none = Case(*(tensor[:0] for tensor in vars(case).values()))

    terms, _ = none.run(plan)

    assert terms.divergences.shape == (2, 0)
    assert terms.ce.shape == terms.agrees.shape == (0,)


def test_rows_the_kernel_cannot_read_are_refused():
    case, plan = make_rows(names=("forward_kl",))
    kernel, inputs = rows_of(plan), case.inputs(plan)

    with pytest.raises(ValueError, match=r"student is torch.float64; .* fp32, bf16 or fp16"):
        kernel.run_(case.student.double(), case.teacher, inputs, None)
    with pytest.raises(ValueError, match="gradient has a column stride of 4"):
        kernel.run_(case.student, case.teacher, inputs, torch.empty(WIDTH, 4, device=DEVICE).T)
    with pytest.raises(ValueError, match="rows without a teacher need labels"):
        kernel.run_(case.student, None, inputs._replace(labels=None), None)
