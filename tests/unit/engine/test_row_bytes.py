"""What a row of a prompt is said to need, beside what torch's attention takes: every tensor that it makes is counted."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal import presets
from shoal.engine.sizes import prompt_bytes, row_bytes
from shoal.model import paged
from shoal.model.cache import PagedStep, Rows
from shoal.model.reach import ALL, Reach
from tests.trees import tree_leaves

KEYS, WINDOW, PAGE, DIM = 2048, 256, 64, 8


class Held(TorchDispatchMode):
    """Bytes that tensors made within it hold, and the most that they have held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (at := each.untyped_storage())._cdata not in self.of:
                self.of[at._cdata] = at.nbytes()
                weakref.finalize(at, self.of.pop, at._cdata)
        self.most = max(self.most, sum(self.of.values()))
        return made


def taken(rows: int, reach: Reach, heads: int, kv_heads: int, dtype: torch.dtype) -> int:
    """Bytes that attention takes at once for the last `rows` of a prompt."""
    at = Rows(torch.arange(KEYS - rows, KEYS), [0, rows], PAGE, PAGE, ends=[KEYS - 1])
    tables = torch.arange(1, KEYS // PAGE + 1)[None]
    step = PagedStep(at.positions, at.positions, tables, [0, rows], PAGE, PAGE, shared=at)
    kv = torch.zeros(KEYS // PAGE + 1, kv_heads, PAGE, 2 * DIM, dtype=dtype)
    q = torch.zeros(rows, heads, DIM, dtype=dtype)
    with torch.inference_mode(), Held() as held:
        paged.paged_attention(q, kv, torch.zeros(len(kv), kv_heads, 1, DIM), step, reach)
    return held.most


def reach_of(kind: str, heads: int) -> Reach:
    return {
        "D": Reach(ALL, 0, 0, None, dense=ALL),
        "L": Reach(WINDOW, 0, 0, None),
        "H": Reach(WINDOW, 2, 1, torch.full((heads,), 0.5)),
        "S": Reach(WINDOW, 2, 1, None, torch.zeros(heads), dense=64),
        "S within its dense length": Reach(WINDOW, 2, 1, None, torch.zeros(heads), dense=KEYS),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["D", "L", "H", "S", "S within its dense length"])
def test_what_is_counted_is_what_attention_takes(kind: str, dtype: torch.dtype) -> None:
    """Of each row, and once of a prompt; where few heads share a KV head, and where there are many of these."""
    for heads, kv_heads in ((8, 8), (8, 4), (32, 8), (8, 1)):
        config = dataclasses.replace(
            presets.get("tiny").model, heads=heads, kv_heads=kv_heads, width=heads * DIM, attn_pattern=kind[0], page=PAGE,
            block=PAGE, window=WINDOW, top_k=2, max_length=KEYS, dense_length=KEYS if "within" in kind else 64,
        )  # fmt: skip
        few, many = (taken(rows, reach_of(kind, heads), heads, kv_heads, dtype) for rows in (128, 512))
        row = row_bytes(config, dtype.itemsize, kernels=False)
        beside = row_bytes(dataclasses.replace(config, max_length=PAGE), dtype.itemsize, kernels=False)
        assert (many - few) / 384 <= row, (heads, kv_heads)
        if kind != "S within its dense length" or heads // kv_heads > 1:
            assert (many - few) / 384 >= 0.8 * (row - beside), (heads, kv_heads)
        assert many <= 512 * row + prompt_bytes(config, dtype, dtype, kernels=False)
