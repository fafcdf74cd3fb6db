"""How much an engine takes where nobody says, by hand: of a model whose sizes all differ."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch

from shoal import presets
from shoal.config import GROUPS, ModelConfig
from shoal.engine.device import give_back
from shoal.engine.sizes import Needs, default_rows, default_units, prompt_bytes, row_bytes
from shoal.errors import ResourceError
from shoal.model.gpu import launch

TEST = presets.get("test").model
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_on_a_cpu_units_are_for_the_batch_or_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for one text at least, which must fit."""
    one = GROUPS * -(-TEST.context // TEST.page)
    free = [0]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free[0]))
    for units, batch, wanted in (
        (10**6, 3, 3 * one), (10 * one, 32, 10 * one // 4), (2 * one, 32, one), (1 + one, 1, one),
    ):  # fmt: skip
        free[0] = units * 1000
        assert default_units(TEST, batch, 1000, CPU) == 1 + wanted
    free[0] -= 1
    with pytest.raises(ResourceError, match="do not fit the memory"):
        default_units(TEST, 1, 1000, CPU)


class Card:
    """A GPU: what each process has of its memory, and what torch keeps there of memory that nothing holds any more."""

    total, context = 80 * 10**9, 5 * 10**8
    weights, unit = 10 * 10**9, 10**7

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: ModelConfig = TEST) -> None:
        self.config, self.process = config, 0
        self.held, self.kept = Counter[int](), Counter[int]()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.total))
        monkeypatch.setattr(
            torch.cuda, "empty_cache", lambda: self.kept.update({self.process: -self.kept[self.process]})
        )
        monkeypatch.setattr(launch, "able", lambda device: True)

    @property
    def free(self) -> int:
        return self.total - self.held.total() - self.kept.total() - self.context * len(self.held)

    def loaded(self, share: float, process: int = 0) -> int:
        """Bytes for keys and values of an engine that starts in `process`; its weights are there first."""
        self.process = process
        again = min(self.kept[process], self.weights)
        assert self.free >= self.weights - again
        self.kept[process] -= again
        self.held[process] += self.weights
        net = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=self.weights)], buffers=list)
        rows = default_rows(self.config, GPU, torch.bfloat16, share)
        needs = Needs.of(cast(Any, net), self.config, rows, GPU, torch.bfloat16)
        try:
            # the null unit is one of them
            taken = default_units(self.config, 8, self.unit, GPU, share, needs) * self.unit
        except ResourceError:
            self.gone(0, process)
            raise
        self.held[process] += taken
        return taken

    def gone(self, taken: int, process: int = 0) -> None:
        """An engine that had `taken` has ended."""
        self.held[process] -= self.weights + taken
        self.kept[process] += self.weights + taken


# of long texts, so that a row of a prompt is large
WIDE = dataclasses.replace(TEST, attn_pattern="HD", max_length=2**17, page=2**13)


@pytest.mark.parametrize("config", [TEST, WIDE], ids=["test", "wide"])
def test_on_a_gpu_an_engine_takes_its_share_and_no_more(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, steps and all; what steps need of it is at most an eighth."""
    card = Card(monkeypatch, config)
    most = int(0.9 * card.total)
    rows = default_rows(config, GPU, torch.bfloat16, 0.9)
    taken = card.loaded(0.9)
    prompt = prompt_bytes(config, torch.bfloat16, torch.bfloat16, True)
    assert rows * row_bytes(config, 2, True) + prompt + most // 16 + card.weights + taken <= most
    assert taken >= most * 7 // 8 - card.weights - card.unit


def test_new_weights_fit_beside_the_old_and_again_when_these_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, in one process, each with as much as the first; torch keeps what the others left."""
    card = Card(monkeypatch)
    pools = [card.loaded(0.45)]
    for _ in range(3):
        pools.append(card.loaded(0.45))
        card.gone(pools[-2])
    assert len({*pools}) == 1 and pools[0] > 0.2 * card.total


@pytest.mark.parametrize("share", [0.45, 0.5])
def test_two_replicas_have_a_half_each(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where halves are all there is, and a process needs memory for itself."""
    card = Card(monkeypatch)
    one, two = card.loaded(share, 0), card.loaded(share, 1)
    assert one == two and card.free > 0
    assert share == 0.5 or card.free > card.total // 8, "room for the steps of both"
    card.gone(one, 0)
    card.process = 0
    give_back()
    assert card.loaded(share, 2) == two, "what an engine has left is not kept from other processes"


def test_what_does_not_fit_a_gpu_is_one_line_that_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # a command in this process may have set it higher
    card = Card(monkeypatch)
    card.unit = 3 * 10**8
    with pytest.raises(ResourceError) as short:
        card.loaded(0.45)
    said = str(short.value)
    assert "57.9 GB" in said and "(gpu_share 0.45 of 80.0 GB, less 10.0 GB of weights, 2." in said and "\n" not in said
    card.unit = 10**8
    card.loaded(0.8)
    with pytest.raises(ResourceError, match=r"GB free beside the weights, less .* for steps\).*0\.45 each"):
        card.loaded(0.9, 1)
    assert not caplog.records
    card.unit = 10**7
    assert card.loaded(0.45, 1) > 0
    (line,) = caplog.records
    assert "others hold the rest" in line.getMessage()
