"""Which tests are run on which modules: the nearest ones, file by file. Of these, a change is tried on those that reach its
lines. A group's tests say what its modules are for; a module is in one group. What is in model/gpu is in none: its
tests (`tests/triton`) run kernels in Triton's interpreter, which reads them from the disk."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    modules: list[str]  # in platform/shoal
    tests: list[str]  # in tests
    environment: dict[str, str] = field(default_factory=dict)
    without: str = ""  # tests that are none under this environment, as pytest's -k names them
    warm: bool = False  # its tests run compiled kernels, which are loaded once for all
    compiled: bool = False  # its lines run when numba compiles, so that nobody knows which tests reach them


def _in(folder: str, names: str) -> list[str]:
    return [f"{folder}/{name}" for name in names.split()]


def _tests(plane: str, names: str) -> list[str]:
    return [f"unit/{plane}/test_{name}" for name in names.split()]


GROUPS = {
    "order": Group(_in("data", "order pack"), _tests("data", "order pack")),
    "intervals": Group(_in("evaluate", "intervals halves"), _tests("evaluate", "intervals halves")),
    "optim": Group(["train/optim"], _tests("train", "optim")),
    "routes": Group(_in("on_ray", "routing scaling"), _tests("on_ray", "routing router scaling")),
    "auth": Group(_in("api", "auth limits"), _tests("api", "gate usage limits quotas")),
    "pace": Group(["engine/pace"], _tests("engine", "pace")),
    "text": Group(["engine/text"], _tests("engine", "text stop_strings")),
    "turns": Group(_in("engine", "shares turns"), _tests("engine", "shares turns")),
    "drafting": Group(_in("engine", "acceptance drafting price"), _tests("engine", "drafting")),
    "drafts": Group(
        _in("engine", "compared drafts signals tolerance"),
        [
            *_tests("engine", "layout drafts drafts_there never_above signals speculative tolerance"),
            "unit/api/test_reruns",
        ],
        warm=True,
    ),
    "sizes": Group(_in("engine", "images sizes"), _tests("engine", "images row_bytes sizes")),
    "graphs": Group(
        [*_in("engine", "device graphs layout told"), "model/places", "model/sending"],
        [
            *_tests("engine", "layout graphs graphs_with_drafts graphs_with_adapters kv_int8 sampler_there adapters"),
            *_tests("engine", "drafts_there"),
            *_tests("model", "places sending"),
            "flows/test_devices",
        ],
        warm=True,
    ),
    "pages": Group(["engine/pages"], _tests("engine", "pages")),
    "audits": Group(["engine/audits"], _tests("engine", "audits evidence"), warm=True),
    "events": Group(["engine/events"], _tests("engine", "events stop_strings")),
    "running": Group(_in("engine", "holding plan running"), _tests("engine", "holding plan running")),
    "cost": Group(_in("model", "cache cost reach"), _tests("model", "cache cost")),
    "sampler": Group(
        _in("engine", "filters penalties sampler"),
        _tests("engine", "filters sampler penalties guided sampler_there tolerance"),
        warm=True,
    ),
    "frontier": Group(["evaluate/frontier"], _tests("evaluate", "frontier")),
    "near": Group(["data/operators/near"], _tests("data", "near")),
    "parts": Group(_in("data", "parts batches"), _tests("data", "parts batches")),
    "identities": Group(_in("data", "identities tables"), _tests("data", "identities")),
    "router": Group(
        ["model/router"],
        [*_tests("model", "router whole"), *_tests("evaluate", "routing"), "flows/test_golden"],
        warm=True,
    ),
    "fitted": Group(["evaluate/routing"], _tests("evaluate", "routing"), warm=True),
    "failover": Group(["on_ray/failover"], _tests("on_ray", "failover"), warm=True),
    "answers": Group(
        _in("api", "answers requests"),
        _tests("api", "answers chat completions embeddings extensions requests tolerance tools usage wire"),
    ),
    "losses": Group(_in("train", "loss lora"), _tests("train", "loss lora")),
    "step": Group(["train/step"], [*_tests("train", "step"), "flows/test_golden"]),
    # tests of test_parallel are processes of their own
    "parallel": Group(["train/parallel"], _tests("train", "ranks")),
    "scheduler": Group(
        _in("engine", "door planning scheduler"),
        _tests("engine", "planning scheduler_by_hand scheduler holding plan running shares pace resume"),
        warm=True,
    ),
    "runner": Group(
        _in("engine", "naive runner speculative"),
        [*_tests("engine", "runner naive speculative properties guided signals"), "unit/model/test_whole"],
        warm=True,
    ),
    "engine": Group(
        _in("engine", "engine front guided metrics"),
        _tests("engine", "events refused prepared metrics guided naive oracle resume second_look faults front"),
        warm=True,
    ),
    "net": Group(
        _in("model", "attention block net reference"),
        [
            *_tests("model", "attention reference net whole other_shapes fused"),
            "unit/engine/test_drafts",
            "flows/test_golden",
        ],
        warm=True,
    ),
    "model": Group(
        _in("model", "model paged pieces"),
        [
            *_tests("model", "attention cache reference net paged properties whole cost router"),
            *_tests("engine", "naive runner adapters front pieces"),
        ],
        warm=True,
    ),
    "adapters": Group(
        _in("model", "adapter_files adapters"),
        [
            *_tests("model", "adapter_files adapters"),
            *_tests("engine", "adapters"),
            "unit/open_weights/test_served_adapter",
        ],
        warm=True,
    ),
    "smooth": Group(["model/smooth"], _tests("model", "smooth"), warm=True),
    "draw": Group(
        ["model/cpu/draw"],
        [*_tests("model", "loops"), *_tests("engine", "sampler runner")],
        {"NUMBA_DISABLE_JIT": "1"},
    ),
    "files": Group(
        _in("model", "checkpoint described digests files"), _tests("model", "checkpoint digests files replacing")
    ),
    "int8": Group(
        _in("model", "int8 linears quant slots"),
        [*_tests("model", "int8 linears quant slots whole fused"), *_tests("engine", "kv_int8")],
        warm=True,
    ),
    "loops": Group(
        _in("model/cpu", "attention compiled decode parts"),
        [*_tests("model", "loops fused whole slots"), *_tests("engine", "kv_int8")],
        {"NUMBA_DISABLE_JIT": "1"},
        without="batch_mates or code_is_kept or lie_now",  # of tiles, of numba's own files, of what is chosen in Python
    ),
    "tiles": Group(_in("model/cpu", "floats integers tiles"), _tests("model", "fused int8 lifetimes"), compiled=True),
    "cpu": Group(
        _in("model/cpu", "fused memory"),
        [*_tests("model", "fused memory"), *_tests("engine", "adapters sampler")],
        warm=True,
    ),
}
