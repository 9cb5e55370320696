"""Functions of the row kernels against fp64."""

import pytest
import torch

pytest.importorskip("triton")

from megakd_kernels.triton.row_math import mixture_series


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_the_series_of_a_mixture_has_the_digits_of_fp32(share):
    gap = torch.linspace(-0.4, 0.4, 801, dtype=torch.float64)
    gap = gap[gap.abs() > 1e-3]

    first, *others = mixture_series(share)

    powers = list(enumerate(others, start=2))
    log = first * gap + sum(factor * gap**power for power, factor in powers)
    tilt = sum(power * factor * gap ** (power - 1) for power, factor in powers)
    excess = share * torch.expm1(gap)
    torch.testing.assert_close(log, torch.log1p(excess), rtol=3e-8, atol=0)
    torch.testing.assert_close(tilt, (1 - share) * excess / (1 + excess), rtol=3e-7, atol=0)
