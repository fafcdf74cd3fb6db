"""Training on a GPU that is not there (`tests/fake_gpu.py`): one device, one wait an update, no T x T, and the precisions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.model.gpu import sparse
from tests import fake_gpu

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="streams of a GPU that is not there take a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has streams of its own"),
    pytest.mark.timeout(600),
]
LENGTH = 16_384
FEW, MORE = "350m/4", "350m/8"  # a layer or two in each group: where one says what is asked, 24 say no more


Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Exit status and words of the program, asked so. One process imports torch for all."""
    folder = tmp_path_factory.mktemp("said")
    library = fake_gpu.build(tmp_path_factory.getbasetemp().parent)
    command = [sys.executable, "-m", "tests.fake_gpu", str(library)]
    told = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        given, answered = process.stdin, process.stdout
        assert given is not None and answered is not None

        def ask(*asked: object) -> tuple[int, str]:
            said = folder / "said"
            print(said, *asked, file=given, flush=True)
            return int(answered.readline()), said.read_text()

        try:
            yield ask
        finally:
            given.close()


def found(run: Run, *asked: object) -> dict[str, Any]:
    status, said = run(*asked)
    assert status == 0, said
    values: dict[str, Any] = json.loads(said.splitlines()[-1])
    return values


@pytest.fixture(scope="module")
def long_row(run: Run) -> dict[str, Any]:
    """An update of 350m on two rows of 16,384 tokens."""
    return found(run, FEW, LENGTH)


def test_an_update_stays_on_the_device_and_waits_for_it_once(long_row: dict[str, Any]) -> None:
    """Forward, losses at all exits, backward, norm, clip and optimizer. Then a checkpoint's copy and the model for export, on
    the host."""
    assert long_row["reads"] == 1 and long_row["devices"] == ["cuda:0"]
    assert long_row["saved"][0] == long_row["exported"][0] == ["cpu"]
    assert long_row["exported"][1] == long_row["saved"][1] // 4, "weights, two moments and a count of each"


def test_no_tensor_of_t_times_t_numbers_is_made(long_row: dict[str, Any]) -> None:
    """The largest is a part of the logits; the scores of blocks, which are inside an operator, are made in strips."""
    assert long_row["largest"] < LENGTH**2 and "mm" in long_row["largest_of"]
    assert sparse.SCORED < LENGTH**2


def test_products_are_bf16_and_what_decides_is_fp32(long_row: dict[str, Any]) -> None:
    """Norms (rsqrt), softmax of logits, scores of blocks, logits, weights, gradients and moments in fp32."""
    kinds = long_row["kinds"]
    assert set(kinds["aten.mm"]) == {"bfloat16 -> bfloat16", "bfloat16 -> float32"}, "the last are logits"
    assert set(kinds["shoal.near"]) == set(kinds["shoal.chosen"]) == {"bfloat16 -> bfloat16"}
    for name in ("aten.rsqrt", "aten._log_softmax", "aten.nll_loss_forward", "aten._log_softmax_backward_data"):
        assert kinds[name] == ["float32 -> float32"], name
    assert kinds["shoal.choose"] == ["float32 -> int32"] and long_row["states"] == ["torch.float32"]


@pytest.mark.drill
def test_a_layer_launches_as_many_kernels_as_the_page_says(run: Run, long_row: dict[str, Any]) -> None:
    """In any number of layers, and at any length but for two of each further strip of scores. Before torch.compile, which joins
    most of them."""
    long, short = long_row["forward"], found(run, MORE, 4096)["forward"]
    assert (long, short) == (68, 66)
    page = " ".join(Path("docs/benchmarks/gpu.md").read_text().split())
    assert f"joins the operators between | some 1,500 | {long} of 350m |" in page
    assert f"at 4,096 tokens, where they are one, {short} (" in page


@pytest.mark.drill
def test_all_layers_of_a_kind_are_compiled_as_one_graph(run: Run) -> None:
    """In two micro-batches, with the three operators of attention in it; nothing is read or moved more."""
    row = found(run, FEW, LENGTH, "compile")
    assert row["graphs"] == row["reads"] == 1 and row["devices"] == ["cuda:0"]
    assert {"shoal.near", "shoal.choose", "shoal.chosen"} <= {
        name.removesuffix(".default") for name in row["operators"]
    }


@pytest.mark.drill
def test_fp32_is_fp32_throughout(run: Run) -> None:
    kinds = found(run, "test", 96, "float32")["kinds"]
    assert kinds["aten.mm"] == kinds["shoal.near"] == ["float32 -> float32"]


@pytest.mark.drill
@pytest.mark.parametrize("way", ["int8", "taught", "preferences", "images"])
def test_so_does_every_other_way_to_train(run: Run, way: str) -> None:
    """Rounded to INT8, held to a teacher, on preference pairs, and on images: one device, and one wait an update."""
    row = found(run, "test", 96, way)
    assert row["reads"] == 1 and row["devices"] == ["cuda:0"] and row["states"] == ["torch.float32"]


@pytest.mark.drill
def test_sparse_layers_make_no_t_times_t_either(run: Run) -> None:
    """With the gradient of their biases; shares of both sums of exp in fp32."""
    row = found(run, FEW, LENGTH, "sparse")
    assert row["reads"] == 1 and row["devices"] == ["cuda:0"] and row["largest"] < LENGTH**2
    assert "mm" in row["largest_of"] and row["kinds"]["aten.sigmoid_backward"] == ["float32 -> float32"]
    assert row["kinds"]["shoal.chosen_back"] == ["bfloat16 -> bfloat16"]


def wrong(row: dict[str, Any]) -> list[str]:
    """What of an update of one rank of two is not in the precision that it must be in."""
    kinds, low, exact = row["kinds"], ["bfloat16 -> bfloat16"], ["float32 -> float32"]
    wanted = dict.fromkeys(EXACT, exact) | dict.fromkeys(("shoal.near", "shoal.chosen", "c10d._allgather_base_"), low)
    found = [name for name, want in wanted.items() if kinds[name] != want]
    found += ["logits"] * (set(kinds["aten.mm"]) != {*low, "bfloat16 -> float32"})
    return found + ["states"] * (row["states"] != ["torch.float32"])


EXACT = (
    "aten.rsqrt", "aten.mean", "aten._log_softmax", "aten.nll_loss_forward", "aten._log_softmax_backward_data",
    "c10d._reduce_scatter_base_", "aten._foreach_norm",
)  # fmt: skip


@pytest.mark.drill
def test_of_several_ranks_what_decides_is_fp32_too(run: Run) -> None:
    """By FSDP's policy, where parameters come as bf16 and there is no autocast: norms, softmax and its gradient, logits,
    losses, sums of gradients over ranks, weights and moments. One device, and one wait an update. Softmax of attention and
    scores of blocks are inside kernels, and the router is fitted later: tests/triton and test_fake_engine hold these."""
    row = found(run, "test", 96, "shards")
    assert wrong(row) == [] and row["reads"] == 1 and row["devices"] == ["cuda:0"]


@pytest.mark.parametrize(("fault", "said"), [("leak", "FakeTensorDeviceMismatchError"), ("sync", "DataDependent")])
def test_what_leaks_or_waits_is_found(run: Run, fault: str, said: str) -> None:
    status, words = run("test", 96, fault)
    assert status != 0 and said in words
