"""The tests of a GPU on this CPU: whoever has one for an hour shall not find there that a test cannot run. One case of each, as
the interpreter is slow; what takes long there is run without the kernels. What they hold is held more widely beside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal import Model
from shoal.model.gpu import launch
from tests.gpu import test_engine_on_gpu, test_kernels_on_gpu, test_model_on_gpu
from tests.gpu.conftest import fp32_is_fp32  # noqa: F401  # around each test here, too: some set TF32

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

MODULES = test_engine_on_gpu, test_kernels_on_gpu, test_model_on_gpu
KERNELS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_kernels_on_gpu.test_attention_is_that_of_torch_in_float64,
     {"kind": "H", "dtype": torch.bfloat16, "off": 2**-6, "kv": torch.int8, "busy": 1, "few": 0}),
    (test_kernels_on_gpu.test_the_last_to_arrive_reads_what_all_have_stored, {"times": 1, "few": 0}),
    (test_kernels_on_gpu.test_each_row_gets_what_its_adapter_adds,
     {"inputs": 48, "outputs": 130, "ranks": (3, 0, 17), "dtype": torch.bfloat16}),
    (test_kernels_on_gpu.test_prompts_beside_others_are_those_of_the_cpu, {"kind": "S"}),
    (test_kernels_on_gpu.test_the_device_is_one_for_the_kernels, {}),
    (test_kernels_on_gpu.test_int8_passes_its_self_test, {}),
    (test_model_on_gpu.test_forward_and_backward_equal_the_reference, {"dtype": torch.bfloat16, "summary": "mean"}),
    (test_model_on_gpu.test_a_net_trains_as_on_the_cpu, {}),
    (test_model_on_gpu.test_scores_stay_exact_under_autocast, {}),
]  # fmt: skip
TORCH: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_engine_on_gpu.test_answers_are_those_of_the_cpu, {"limits": {"units": 60, "max_batch": 6}}),
    (test_engine_on_gpu.test_bfloat16_stays_near_float32, {}),
    (test_engine_on_gpu.test_what_is_served_stays_near_what_a_cpu_says, {"dtype": "auto"}),
    (test_model_on_gpu.test_the_router_is_exact_where_fp32_is_tf32, {}),
    (test_model_on_gpu.test_compiled_layers_train_as_they_do_alone, {"recompute": "selective"}),
    (test_model_on_gpu.test_logits_and_pages_are_those_of_the_cpu, {}),
    (test_model_on_gpu.test_int8_on_a_gpu_is_the_arithmetic_of_the_cpu, {}),
    (test_model_on_gpu.test_int8_kernels_of_a_gpu_give_the_reference_to_the_bit, {"name": "float"}),
]


@pytest.mark.parametrize(("test", "given"), KERNELS + TORCH, ids=lambda x: getattr(x, "__name__", ""))
def test_a_test_of_a_gpu_can_run(
    test: Callable[..., None], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "DEVICE", "cpu")
    moved = Model.to
    monkeypatch.setattr(Model, "to", lambda self, device: moved(self, "cpu"))  # `on_gpu` says where to by itself
    if test in dict(TORCH):
        monkeypatch.setattr(launch, "ON", set())
    fixtures = {"monkeypatch": monkeypatch, "caplog": caplog}
    given = given | {name: each for name, each in fixtures.items() if name in inspect.signature(test).parameters}
    test(**given)


def test_each_of_them_is_rehearsed() -> None:
    there = {
        each
        for module in MODULES
        for name, each in inspect.getmembers(module, inspect.isfunction)
        if name[:5] == "test_"
    }
    assert there == {*dict(KERNELS), *dict(TORCH)}
