"""Kernels where Triton is not: a launch is held against what the kernel asks for, and then done in torch or written down."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.model.gpu import launch

FOLDER = Path(launch.__file__).parent
# constants that a program counts up to, and its warps: Triton takes powers of two alone
COUNTED = "WIDE TALL TILE ROWS COLUMNS DEEP RANKS GROUP EACH FULL BLOCKS TOTAL num_warps"


@cache
def kernels(module: str) -> dict[str, dict[str, bool]]:
    """What each kernel of `gpu/<module>.py` asks for, in order; true for a constant."""
    found = ast.parse((FOLDER / f"{module}.py").read_text("utf-8")).body
    return {
        each.name: {one.arg: one.annotation is not None for one in each.args.args}
        for each in found
        if isinstance(each, ast.FunctionDef)
    }


def held(asks: dict[str, bool], grid: tuple[int, ...], given: tuple[Any, ...], shape: dict[str, Any]) -> dict[str, Any]:
    """All that is given to a launch by name. Everything is given that is asked for, and nothing else; all tensors lie on one
    device, and constants say what these are."""
    values = [name for name, constant in asks.items() if not constant]
    assert shape.keys() - {"num_warps"} == asks.keys() - set(values)
    assert all(type(size) is int and size > 0 for size in grid), "CUDA launches no empty grid"
    named = dict(zip(values, given, strict=True)) | shape
    assert len({each.device for each in given if isinstance(each, Tensor)}) == 1
    for name in COUNTED.split():
        assert (size := named.get(name, 1)) > 0 and size & size - 1 == 0, name
    if "EXACT" in shape:
        assert shape["EXACT"] == (given[0].dtype == torch.float64)
    if "INT8" in shape:
        assert shape["INT8"] == (named["kv"].dtype == torch.int8)
    if "VARIANCE" in shape:
        assert shape["VARIANCE"] == (named["summaries"].shape[-1] > shape["D"])
    if "SCALE" in shape:
        assert shape["SCALE"] == pytest.approx(shape["D"] ** -0.5)
    if "D" in shape:
        assert named.get("WIDE", shape["D"]) >= shape["D"]
    if "G" in shape and "HEADS" in shape:
        assert shape["HEADS"] == shape["G"] * shape["KV_HEADS"]
    return named


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, *more: tuple[str, int], **runs: Callable[..., Any]) -> None:
    """Let `runs` stand in for kernels of `gpu/<module>.py`: each is called with the grid, and with what it is given. `more`:
    what else is read there."""

    class Kernel:
        def __init__(self, name: str) -> None:
            self.asks, self.run = kernels(module)[name], runs[name]

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **shape: (held(self.asks, grid, given, shape), self.run(grid, *given, **shape))[1]

    made = SimpleNamespace(**{name: Kernel(name) for name in runs}, **dict(more))
    monkeypatch.setitem(sys.modules, f"shoal.model.gpu.{module}", made)
    monkeypatch.setattr(f"shoal.model.gpu.{module}", made, raising=False)


def written_down(monkeypatch: pytest.MonkeyPatch, module: str, *more: tuple[str, int]) -> list[dict[str, Any]]:
    """What is launched of any kernel of `gpu/<module>.py` from here on: its "name", its "grid", and all that it was given."""
    told = list[dict[str, Any]]()

    def note(name: str, grid: tuple[int, ...], *given: Any, **shape: Any) -> None:
        told.append({"name": name, "grid": grid} | held(kernels(module)[name], grid, given, shape))

    stand_in(monkeypatch, module, *more, **{name: partial(note, name) for name in kernels(module)})
    return told
