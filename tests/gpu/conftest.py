"""Tests on a CUDA device. That they can run at all is held without one: tests/triton/test_rehearsal.py runs them on the CPU,
where `DEVICE` is that and the kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fp32_is_fp32() -> Iterator[None]:
    """Whatever a test before it has set for the process: TF32 is what `Model.on_gpu` and training multiply fp32 in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
