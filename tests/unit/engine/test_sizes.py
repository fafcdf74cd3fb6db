"""How much an engine takes where nobody says, by hand: of a model whose sizes all differ."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from shoal import presets
from shoal.config import GROUPS
from shoal.engine.sizes import default_rows, default_units, row_bytes
from shoal.errors import ResourceError
from shoal.model.gpu import launch

# 4 heads over 2 for keys, of 24 dims; width 96, inside the MLP 256; window 32, context 1024
TINY = presets.get("tiny").model
TEST = presets.get("test").model
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("kernels", "change", "keys"),
    [
        (True, {}, 32),
        (False, {}, 1024),
        (True, {"attn_pattern": "HD"}, 1024),
        (True, {"attn_pattern": "HS", "dense_length": 64}, 64),
        (True, {"attn_pattern": "HS", "dense_length": 16}, 32),
        (True, {"attn_pattern": "HS", "dense_length": 4096}, 1024),
        (True, {"attn_pattern": "HL", "dense_length": 64}, 32),
    ],
)
def test_a_row_of_a_prompt_takes_what_a_layer_makes_of_it_and_a_mask_over_its_keys(
    kernels: bool, change: dict[str, Any], keys: int
) -> None:
    for each in (2, 4):
        numbers = 4 * 96 + 2 * (4 + 2 + 2) * 24 + 3 * 256
        sums = 2 * 4 * (24 + 2) * 4  # of two branches, four heads, in fp32
        mask = 2 * keys * (1 + each)  # two heads share a KV head; a bool, and the number that it becomes
        assert row_bytes(dataclasses.replace(TINY, **change), each, kernels) == each * numbers + sums + mask


def test_a_step_on_a_gpu_has_the_rows_that_half_of_the_rest_of_its_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At least as many as on a CPU, and 8,192 at most."""
    total = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total[0]))
    for kernels in (True, False):
        monkeypatch.setattr(launch, "able", lambda device, kernels=kernels: kernels)
        for rows, wanted in ((3000, 3000), (512, 512), (511, 512), (8192, 8192), (8193, 8192)):
            total[0] = 8 * rows * row_bytes(TINY, 2, kernels)
            assert default_rows(TINY, GPU, torch.bfloat16, 0.75) == wanted
            assert default_rows(TINY, CPU, torch.bfloat16, 0.75) == 512
    total[0] = 20 * 3000 * row_bytes(TINY, 4, False)
    assert default_rows(TINY, GPU, torch.float32) == default_rows(TINY, GPU, torch.float32, 0.9) in (2999, 3000)


def test_a_page_that_a_context_does_not_fill_counts_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = dataclasses.replace(TINY, max_length=1000)
    one = 4 * 63  # of four groups, 62.5 pages of 16
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    assert default_units(odd, 5, 1000, CPU) == 1 + 5 * one
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * one - 1))
    with pytest.raises(ResourceError, match="one text of 1000 tokens in 8 layers"):
        default_units(odd, 5, 1000, CPU)


def test_on_a_cpu_units_are_for_the_batch_or_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for one text at least, which must fit."""
    one = GROUPS * -(-TEST.context // TEST.page)
    free = [0]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free[0]))
    for units, batch, wanted in (
        (10**6, 3, 3 * one), (10 * one, 32, 10 * one // 4), (2 * one, 32, one), (one, 1, one),
    ):  # fmt: skip
        free[0] = units * 1000
        assert default_units(TEST, batch, 1000, CPU) == 1 + wanted
    free[0] -= 1
    with pytest.raises(ResourceError, match="do not fit the memory"):
        default_units(TEST, 1, 1000, CPU)


def test_on_a_gpu_keys_and_values_take_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine tenths of its memory, whatever the batch; where one text does not fit, that is said."""
    one = 4 * -(-TEST.context // TEST.page)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000_000, 100_000_000))
    assert [default_units(TEST, batch, 1000, GPU) for batch in (1, 64)] == [1 + 40_000] * 2
    with pytest.raises(ResourceError, match=r"40\.\d GB.*0\.0 GB that are free"):
        default_units(TEST, 1, 40_100_000_000 // one, GPU)


def test_on_a_gpu_a_step_has_8k_rows_or_what_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is outside `gpu_share`; masks over all of the context count where layers read it through torch."""
    c = TEST
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    plain = 2 * (4 * c.width + 2 * heads + 3 * c.ffn) + 8 * c.heads * (c.head_dim + 2)
    assert row_bytes(c, 2, kernels=True) == plain + c.heads // c.kv_heads * c.window * 3
    assert row_bytes(c, 2, kernels=False) == plain + c.heads // c.kv_heads * c.context * 3
    dense = dataclasses.replace(c, attn_pattern="D")
    assert row_bytes(dense, 2, kernels=True) == row_bytes(c, 2, kernels=False)
    monkeypatch.setattr(launch, "able", lambda device: True)
    for total, rows in ((10**12, 8192), (20 * 2000 * row_bytes(c, 2, kernels=True), 2000), (10**6, 512)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, total))
        assert default_rows(c, GPU, torch.bfloat16, 0.9) == pytest.approx(rows, abs=1)
    assert default_rows(c, CPU, torch.float32) == 512
