"""An engine on a GPU that is not there (`tests/fake_engine.py`): one device, no hidden read or copy, and the precisions, of
whole requests at 350m."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.engine.sizes import GPU_ROWS
from tests import fake_gpu
from tests.fake_engine import DENSE

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="streams of a GPU that is not there take a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has streams of its own"),
    pytest.mark.timeout(600),
]
FAULTS = {
    "leak": "FakeTensorDeviceMismatchError",
    "read": "DataDependentOutputException",
    "kernel": "_norm: a tensor of the host",
}
FEW = ("350m", "test:read")
MORE = (
    "350m:whole",
    "350m",
    "350m:int8",
    "350m:D",
    "350m:S",
    *(f"test:{fault}" for fault in ("copy", "pageable", "drift", *FAULTS)),
)
LOW, EXACT, WHOLE = "bfloat16", "float32", "int64"
KERNELS = {  # dtypes of what each is given, in its order
    "_norm": [LOW] * 5,  # what is normed, what is added, weight, sum, result
    "_swiglu": [LOW] * 2,
    "_store": [*[LOW] * 4, EXACT, EXACT, WHOLE, WHOLE, LOW, LOW, EXACT],  # .., rotation, places, q, memory, summaries
    "_summarise": [LOW, EXACT, WHOLE, WHOLE],
}
INT8 = {
    "_levels": [EXACT, "int8", EXACT], "_product": ["int8", "int8", *[EXACT] * 3], "_norm": [EXACT] * 5,
    "_swiglu": [EXACT] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_gpu.build(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="module")
def found(library: Path) -> dict[str, Any]:
    """What the program says of a few cases; each takes two seconds."""
    return said(library, FEW)


@pytest.fixture(scope="module")
def more(library: Path) -> dict[str, Any]:
    """And of others."""
    return said(library, MORE)


def said(library: Path, cases: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fake_engine", str(library), *cases]
    told = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def steps(found: dict[str, Any], kind: str) -> list[list[str]]:
    """What the host waited for in each step of a kind."""
    return [waits for each, waits in found["steps"] if each == kind]


def test_all_lies_on_the_device(found: dict[str, Any]) -> None:
    """Prompts in chunks of 8,192 rows."""
    one = found["350m"]
    assert one["devices"] == ["cuda:0"] and one["answers"] == 9 and one["rows"] == GPU_ROWS
    assert len(steps(one, "prompt")) >= 3, "of the long prompt"


@pytest.mark.drill
def test_sizes_follow_from_its_memory(more: dict[str, Any]) -> None:
    """Keys and values in what is free of 80 GB, less what a step needs. (By the definition: `test_sizes`.)"""
    whole = more["350m:whole"]
    assert whole["rows"] == GPU_ROWS
    assert 65.0e9 < whole["memory"] < 65.2e9, "70 GB are free, and 4.9 are for what a step needs"


def test_a_decoding_step_waits_for_one_copy(found: dict[str, Any]) -> None:
    """Whatever the depths, and whatever is asked of the sampler."""
    decodes_by_one_copy(found["350m"])


def decodes_by_one_copy(one: dict[str, Any]) -> None:
    assert {*map(tuple, steps(one, "decode"))} == {("tolist",)} and len(steps(one, "decode")) >= 2


def test_prompts_and_the_router_ask_the_device_for_one_thing(found: dict[str, Any]) -> None:
    """The depth, or a token, in one copy; what goes there lies in pinned memory, and is not waited for."""
    asked_for_one(found["350m"])


def asked_for_one(one: dict[str, Any]) -> None:
    assert {*map(tuple, steps(one, "prompt"))} == {("tolist",)}
    assert steps(one, "route") == [["tolist"] * 4], "two prompts, and two ways to draw"


@pytest.mark.drill
@pytest.mark.parametrize(("case", "dense"), [("350m:D", 2**20), ("350m:S", DENSE)])
def test_where_layers_read_all_a_prompt_is_gathered_alone_and_waits_for_no_more(
    more: dict[str, Any], case: str, dense: int
) -> None:
    """Its keys and values up to the last row that reads all before it, where more than 16 do; those of no request beside it."""
    one, beside = more[case], 0
    asked_for_one(one)
    assert one["steps"] == more["350m"]["steps"] and one["rows"] == GPU_ROWS
    for counts, ends, largest in one["sizes"]:
        lasts = [min(end, dense) for count, end in zip(counts, ends, strict=True) if min(end, dense) - end + count > 16]
        assert largest == 1024 * 32 * -(-max(lasts, default=0) // 32), "4 heads of 64 numbers, keys and values, in bf16"
        beside += max(counts, default=0) > 8000 and counts.count(1) > 1
    assert beside, "two at least decode beside a long prompt"


def test_weights_and_activations_are_bf16_and_what_decides_is_fp32(found: dict[str, Any]) -> None:
    """Kernels: rotation, summaries, scores and sums. Operators: logits and whatever is drawn from them. The router's are in
    fp64, as fp32 would be multiplied in TF32."""
    one = found["350m"]
    for name, given in KERNELS.items():
        assert one["kernels"][name] == [given], name
    for given in one["kernels"]["_attend"]:
        assert given[:8] == [LOW, LOW, EXACT, WHOLE, WHOLE, "int32", EXACT, "int32"] and given[-1] == LOW
        assert given[10:13] in ([LOW] * 3, [EXACT, EXACT, "int32"]), "sums of pieces, where there are any"
    assert one["kinds"]["mm"] == [f"{LOW} -> {EXACT}"], "logits"
    assert one["router"] == [f"torch.{EXACT}"] and one["kinds"]["tanh"] == ["float64 -> float64"]
    assert set(one["kinds"]["linear"]) == {f"{LOW} -> {LOW}", "float64 -> float64"}, "the network, and the router"
    for name in ("argmax", "topk", "log_softmax", "exp_", "cumsum", "amax", "index_add_"):
        assert not any(pair.startswith(LOW) for pair in one["kinds"][name]), name


@pytest.mark.drill
def test_int8_is_fp32_around_whole_numbers(more: dict[str, Any]) -> None:
    """And waits for no more than bf16 does."""
    one = more["350m:int8"]
    decodes_by_one_copy(one)
    asked_for_one(one)
    for name, given in INT8.items():
        assert one["kernels"][name] == [given], name
    assert not any(LOW in pair for pairs in one["kinds"].values() for pair in pairs)


def test_what_waits_is_found(found: dict[str, Any]) -> None:
    assert FAULTS["read"] in found["test:read"]["error"]


@pytest.mark.drill
@pytest.mark.parametrize("fault", FAULTS)
def test_what_leaks_or_waits_is_found(more: dict[str, Any], fault: str) -> None:
    assert FAULTS[fault] in more[f"test:{fault}"]["error"]
