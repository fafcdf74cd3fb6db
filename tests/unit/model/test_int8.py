"""Kernels of INT8: all of them give the reference to the bit, so that which one runs is a matter of speed."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings

from shoal.errors import ResourceError
from shoal.model import int8, linears, quant
from tests.unit.model.rounding import SHAPES, case

pytest.importorskip("numba")
CPU = torch.device("cpu")
KERNELS = [*int8._ON_CPU, "int_mm"]  # the last is for CUDA, but its arithmetic can be had anywhere


@cache
def here() -> list[str]:
    """Those that are right on this machine. Asked in a test and not at import, where each process would compile."""
    return [*int8.trusted(CPU), "int_mm"]


def built(kernel: str, weight: torch.Tensor, scale: torch.Tensor) -> int8.Run:
    if kernel in ("fbgemm", "onednn") and kernel not in here():
        pytest.skip(f"torch's {kernel} fails its self-test on this machine, and is never served")
    return int8.KERNELS[kernel](weight, scale)


def test_our_own_kernels_are_right_on_every_machine() -> None:
    assert {"numba", "float"} <= {*here()}


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_a_kernel_equals_the_reference_to_the_bit(kernel, seed, rows, inputs, outputs, spread):
    x, weight, scale, _ = case(seed, rows, inputs, outputs, spread)
    assert torch.equal(built(kernel, weight, scale)(x), quant.int8_linear_reference(x, weight, scale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wide_layer_of_largest_values_does_not_overflow(kernel):
    """8-bit activations saturate the AVX2 kernels here, and sums beyond 2^24 do not fit fp32 as whole numbers."""
    x = torch.ones(2, 4160)
    x[1] = -1
    weight, scale = torch.full((5, 4160), 127, dtype=torch.int8), torch.full((5, 1), 0.01)
    assert torch.equal(built(kernel, weight, scale)(x), quant.int8_linear_reference(x, weight, scale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_in_its_row(kernel):
    x, weight, scale, _ = case(1, 5, 96, 65, 0.0)
    want = built(kernel, weight, scale)(x)
    x[1, 7], x[2, 0], x[3] = torch.nan, torch.inf, 0.0
    got = built(kernel, weight, scale)(x)
    assert not got[1].isfinite().any() and not got[2].isfinite().any()
    assert torch.equal(got[3], torch.zeros(65)) and torch.equal(got[[0, 4]], want[[0, 4]])


def test_a_row_does_not_depend_on_its_batch_mates():
    """Over the numbers of rows at which another kernel may take over."""
    x, weight, scale, _ = case(1, 80, 96, 65, 2)
    run = int8.pack(weight, scale)
    for name in here()[:3]:
        run.names = (name, *int8.trusted(CPU)[:2])
        alone = torch.cat([run(row[None]) for row in x])
        for rows in (2, 3, 8, 9, 64, 65, 80):
            assert torch.equal(run(x[:rows]), alone[:rows])
    assert run(x[:0]).shape == (0, 65)


def test_a_layer_reads_int8_rows_in_fp32_only():
    plain, small, exact = linears.Linear(96, 96), linears.Int8Linear(96, 96), torch.float32
    assert plain.matrix(128, exact) is not None and plain.matrix(129, exact) is None
    assert plain.matrix(1, torch.float64) is None
    plain.fake = True
    assert plain.matrix(1, exact) is None
    small.kernels.names = ("numba", "numba", "fbgemm")
    assert small.matrix(1, torch.float64) is None
    assert small.matrix(8, exact) is not None and small.matrix(9, exact) is None


def test_a_weight_that_moved_is_read_where_it_lies():
    x, weight, scale, _ = case(1, 3, 96, 64, 0.0)
    layer = linears.Int8Linear(96, 64)
    layer.load_state_dict({"weight": weight, "weight_scale": scale}, assign=True)
    assert torch.equal(layer(x), quant.int8_linear_reference(x, weight, scale))
    layer.weight.data = other = -weight
    assert torch.equal(layer(x), quant.int8_linear_reference(x, other, scale))


def test_a_weight_that_was_changed_in_place_is_read_as_it_is_now():
    """Kernels keep what follows from it: the sums of its rows, or a copy laid out anew. So do they of its scale."""
    x, weight, scale, _ = case(1, 3, 96, 64, 0.0)
    for name in here()[:3]:
        layer = linears.Int8Linear(96, 64)
        layer.load_state_dict({"weight": weight, "weight_scale": scale})
        for changed in ({"weight": weight // 2, "weight_scale": scale}, {"weight": weight, "weight_scale": 2 * scale}):
            layer.kernels.names = (name,) * 3
            layer(x)
            layer.load_state_dict(changed)
            layer.kernels.names = (name,) * 3
            assert torch.equal(layer(x), quant.int8_linear_reference(x, *changed.values())), name


def test_a_wrong_kernel_is_refused(monkeypatch):
    def saturating(weight, scale):
        def run(x):
            s = quant.token_scale(x)
            total = quant.token_levels(x, s).long() @ weight.long().T
            return total.clamp(-(2**15), 2**15 - 1).float() * scale.view(-1) * s

        return run

    def slightly_off(weight, scale):
        return lambda x: quant.int8_linear_reference(x, weight, scale * (1 + 2e-7))

    assert "relative error" in int8.self_test(saturating) and "relative error" in int8.self_test(slightly_off)
    monkeypatch.setattr(int8, "KERNELS", {"fbgemm": saturating, "onednn": slightly_off})
    with pytest.raises(ResourceError, match=r"no INT8 kernel passes.*fbgemm: relative error.*--precision auto"):
        int8.trusted.__wrapped__(CPU)


def test_a_kernel_that_cannot_be_built_here_is_left_out(monkeypatch):
    """Whatever class its error has: Triton's have none in common with torch's."""

    class OutOfResources(Exception):
        pass

    def missing(weight, scale):
        raise OutOfResources("shared memory")

    monkeypatch.setattr(int8, "KERNELS", {"fbgemm": missing, "float": int8.KERNELS["float"]})
    assert int8.trusted.__wrapped__(CPU) == ["float"]
    monkeypatch.setattr(int8, "KERNELS", {"fbgemm": missing})
    with pytest.raises(ResourceError, match="got 'fbgemm: shared memory'"):
        int8.trusted.__wrapped__(CPU)


def test_measuring_draws_nothing_from_the_generator_that_others_seed():
    """A run's own numbers must not depend on which layers had been measured before."""
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    int8.choice.__wrapped__(32, 16, CPU, 1)
    assert torch.equal(torch.rand(3), want)


WITHOUT = """
import sys
sys.modules["numba"] = None
import torch
from shoal import Model
from shoal.model import int8
assert "numba" not in int8.trusted(torch.device("cpu")), "it was to be without"
print(Model.from_preset("test", seed=1).quantized().logits(list(range(20, 60)))[-1, :4].tolist())
"""
OTHER = """
import sys, torch
from shoal.model import int8
from shoal.model.cpu import integers
assert integers.instructions() == sys.argv[1], integers.instructions()
assert int8.self_test(int8.Numba) is None, int8.self_test(int8.Numba)
from shoal.model.cpu import fused
with torch.inference_mode():
    for kind, off in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, w = torch.randn(7, 64, dtype=kind), torch.randn(9, 64, dtype=kind)
        torch.testing.assert_close(fused.product(x, w), x @ w.T, atol=off, rtol=off)
print("same")
"""


def child(code, *args, **env):
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", code, *args], env=told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.drill
def test_without_numba_torch_computes_the_same():
    from shoal import Model

    with torch.inference_mode(False):
        want = Model.from_preset("test", seed=1).quantized().logits(list(range(20, 60)))[-1, :4]
    got = torch.tensor(eval(child(WITHOUT)))
    assert (got - want).abs().max() < 0.01 * want.abs().max().clamp(min=1)


@pytest.mark.drill
@pytest.mark.parametrize(
    ("way", "name", "features"),
    [
        ("avx2", "haswell", "+avx,+avx2,+fma"),
        ("plain", "x86-64", ""),
    ],
)
def test_cpus_without_the_newest_instructions_compute_the_same(way, name, features, tmp_path):
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("describes an x86-64")
    env = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert child(OTHER, way, **env) == "same"
