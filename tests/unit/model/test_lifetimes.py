"""Kernels read no memory that was given back. numba frees an array after its last use and knows of no use through an address;
what lies there then is what another thread has written, so nothing shows on a quiet machine. Here the allocator overwrites
what is freed, or unmaps it, and other threads write there: each in a process of its own, which is told so at its start."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # a process of its own each, which compiles, on what may be a busy machine
ROOT = Path(__file__).parents[3]
PLATFORM = ROOT / "platform" / "shoal"
ADDRESSES = {"ctypes", "carray", "farray", "data_ptr", "addressof", "__array_interface__", "address_as_void_pointer"}
HOSTILE = {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "4096"}  # overwritten when freed; unmapped from 4 KiB on


def child(*args: str, **env: str) -> str:
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, *args], env=told, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def taken(source: str) -> list[str]:
    """Where a module takes the address of something."""
    nodes = ast.walk(ast.parse(source))
    return [f"{n.lineno}: {n.attr}" for n in nodes if isinstance(n, ast.Attribute) and n.attr in ADDRESSES]


def test_no_kernel_takes_an_address():
    """Only intrinsics make addresses, of the arrays that they are given (`tiles.start`)."""
    kernels = [path for path in PLATFORM.rglob("*.py") if {"numba", "compiled"} & imported(path)]
    assert {"integers.py", "floats.py", "attention.py", "decode.py", "tiles.py"} <= {p.name for p in kernels}
    assert [f"{p.name}:{place}" for p in kernels for place in taken(p.read_text("utf-8"))] == []
    assert taken("a = levels.ctypes.data") == ["1: ctypes"], "the pattern finds what it is for"
    made = {p.name: p.read_text("utf-8").count("ptrtoint(") for p in kernels}
    assert {name: count for name, count in made.items() if count} == {"tiles.py": 1}


def imported(path: Path) -> set[str]:
    """First names of the packages that a module imports, and the last ones of ours."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module.split(".")[0], node.module.split(".")[-1]}
    return names


def test_a_tile_takes_no_address_and_no_rows_that_lie_apart():
    import numba as nb
    import numpy as np

    from shoal.model.cpu import floats

    @nb.njit
    def through(x, w, out):
        floats._single(x, w, out, 0, 0, 0, 0)

    x, w, out = np.ones((1, 16), np.float32), np.ones((1, 16), np.float32), np.zeros((1, 1), np.float32)
    through(x, w, out)
    assert out[0, 0] == 16
    for bad in (x.__array_interface__["data"][0], np.ones((1, 32), np.float32)[:, ::2]):
        with pytest.raises(nb.TypingError, match="a tile reads arrays whose rows lie one after the other"):
            through(bad, w, out)


AT_LOAD = """
import sys
import pytest
import torch
from shoal import Model
from shoal.model import int8, linears
linears.prepack_(Model.from_preset("test", seed=1).quantized().net)
print("at load:", int8.self_test(int8.Numba), "numba" in int8.trusted(torch.device("cpu")), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.drill
def test_the_self_test_at_load_and_the_kernels_tests_pass_where_freed_memory_is_overwritten():
    here = [str(Path(__file__).with_name(name)) for name in ("test_int8.py", "test_fused.py")]
    quiet = "not without_numba and not cpus_without"  # those start processes of their own
    said = child("-c", AT_LOAD, "-x", "-p", "no:cacheprovider", "-k", quiet, *here, **HOSTILE)
    assert said.startswith("at load: None True\n") and " passed" in said


BESIDE = """
import random, threading, zlib
import torch
from shoal import Engine, Model, Request, Sampling
from shoal.model.linears import Int8Linear
torch.set_num_threads(1)
model = Model.from_preset("test", seed=3).quantized()
for module in model.net.modules():
    if isinstance(module, Int8Linear):
        module.kernels.names = ("numba",) * 3
rng = random.Random(0)
prompts = [[rng.randrange(20, 260) for _ in range(rng.randint(1, 90))] for _ in range(16)]
engine, stop = Engine(model), threading.Event()

def answers():
    sampling = Sampling(temperature=0, max_tokens=16, ignore_eos=True)
    return [done.tokens for done in engine.generate([Request(ids, sampling, depth="full") for ids in prompts])]

def compress(seed):
    mine = random.Random(seed)
    data = mine.randbytes(9000)
    while not stop.is_set():
        zlib.compress(data[: mine.randint(100, 9000)])

quiet = answers()
threads = [threading.Thread(target=compress, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
try:
    wrong = sum(got != want for _ in range(5) for got, want in zip(answers(), quiet))
finally:
    stop.set()
    for thread in threads:
        thread.join()
print(wrong)
"""


@pytest.mark.drill
def test_answers_beside_busy_threads_are_those_of_a_quiet_machine():
    """80 greedy answers in INT8 beside four threads that compress, all in two arenas: 11 % were wrong while tiles read memory
    that had been given back, so that all of them are right once in 10,000 runs."""
    assert child("-c", BESIDE, MALLOC_ARENA_MAX="2").split() == ["0"]
