"""What the host sends to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pins(device: torch.device) -> bool:
    """Must what is sent to `device` lie in pinned memory? CUDA may wait for its stream before it copies from any other."""
    return device.type == "cuda" and torch.cuda.is_available()


def sent(values: np.ndarray | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values` on `device`, in `dtype` [torch's choice]. On a CPU an array is seen and not copied; elsewhere it may be changed
    at once.

    The pinned memory is let go of here, while it may still be copied from: torch notes the stream of each copy that is not
    waited for (`CachingHostAllocator_recordEvent` in `aten/src/ATen/native/cuda/Copy.cu`), and gives the memory to nobody else
    until an event behind that copy has come (`record_event` and `free` in `ATen/core/CachingHostAllocator.h`)."""
    made = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return _ready(made, device).to(device, non_blocking=True)


def send(values: np.ndarray, to: Tensor) -> None:
    """`values` into the memory of `to`; they may be changed at once, as those of `sent`."""
    to.copy_(_ready(torch.from_numpy(values), to.device), non_blocking=True)


def _ready(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory() if pins(device) else values
