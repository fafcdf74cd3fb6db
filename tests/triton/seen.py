"""Attention by its kernel, and what that was given.

Letters: N rows, H query heads, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.model.gpu import launch
from shoal.model.reach import ALL, Reach
from tests.triton.stored import Stored

KINDS = {
    "H": Reach(10, 3, 1, torch.linspace(0.2, 0.8, 4)),
    "S": Reach(10, 3, 1, None, torch.linspace(-1, 2, 4)),
    "L": Reach(10, 0, 0, None),
    "D": Reach(ALL, 0, 0, None, dense=ALL),
}


@torch.no_grad()
def attended(case: Stored, reach: Reach) -> Tensor:
    """[N, H, d]."""
    return launch.attend(case.q, case.kv, case.summaries, case.step, reach)


NOBODY = -7  # wrote a list: a piece without keys needs none


class Seen:
    """In place of a kernel: it runs as ever, and what it was given is kept, by name. Memory that it writes before it reads is
    such that to read it first would be seen."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.given = kernel, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> None:
            self.given.append(dict(zip(self.kernel.arg_names, args, strict=False)) | named)
            self.given[-1]["chosen"].fill_(NOBODY)
            for name in ("z", *(("part", "stats") if not named["ALONE"] else ())):
                self.given[-1][name].fill_(torch.nan)
            self.kernel[grid](*args, **named)

        return run
