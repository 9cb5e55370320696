"""Any shapes, masks, mixtures and chunks: the chunked loss is the reference."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megakd_kernels as mk

FP64 = torch.float64


@dataclass(frozen=True)
class Shape:
    rows: int
    student_ids: int
    teacher_ids: int
    student_width: int
    teacher_width: int
    seed: int


SHAPES = st.builds(
    Shape, st.integers(0, 9), st.integers(2, 12), st.integers(2, 12), st.integers(1, 4),
    st.integers(1, 4), st.integers(0, 2**31),
)  # fmt: skip
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


def solve(shape, mask, options, impl):
    generator = torch.Generator().manual_seed(shape.seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=FP64)

    leaves = [random(shape.rows, shape.student_width), random(shape.student_ids,
              shape.student_width), random(shape.student_ids)]  # fmt: skip
    leaves = [leaf.requires_grad_() for leaf in leaves]
    teacher = (
        random(shape.rows, shape.teacher_width),
        random(shape.teacher_ids, shape.teacher_width),
    )
    labels = torch.randint(0, shape.student_ids, (shape.rows,), generator=generator)
    counted = torch.rand(shape.rows, generator=generator) < mask
    output = mk.linear_kd_loss(
        *leaves[:2], *teacher, torch.where(counted, labels, -100), student_bias=leaves[2],
        token_weight=random(shape.rows), impl=impl, **options,
    )  # fmt: skip
    return [*output], torch.autograd.grad(output.loss, leaves)


@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, mask=st.sampled_from([0.0, 0.5, 1.0]), options=OPTIONS)
def test_any_shape_and_option_gives_what_the_reference_gives(shape, mask, options):
    output, gradients = solve(shape, mask, options, "chunked")
    expected, truth = solve(shape, mask, options, "reference")

    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients, truth, rtol=1e-6, atol=1e-9)
