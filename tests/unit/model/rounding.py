"""Random layers for the tests of INT8."""

import torch
from hypothesis import strategies as st

from shoal.model import quant

SHAPES = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 9),
    "inputs": st.sampled_from([1, 8, 33, 64, 96, 257]),
    "outputs": st.sampled_from([1, 3, 16, 65]),
    "spread": st.floats(0, 3),
}


def case(seed: int, rows: int, inputs: int, outputs: int, spread: float) -> tuple[torch.Tensor, ...]:
    """Rows [rows, inputs] whose sizes differ by up to 10^(2 spread), a weight as int8 with its scale, and as it was."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) * torch.logspace(-spread, spread, rows)[:, None]
    exact = torch.randn(outputs, inputs, generator=g)
    return x, *quant.quantize_rows(exact), exact
