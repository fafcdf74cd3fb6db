"""The import arrows, and what each part can do without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # one process imports all, three times over, on what may be a busy machine
ROOT = Path(__file__).parents[2]
PLANES = (
    "inputs",
    "model",
    "data",
    "train",
    "engine",
    "open_weights",
    "evaluate",
    "clients",
    "api",
    "sandbox",
)

# For each of some scenes, imports every module of the planes named, with some packages made impossible to import, and prints a
# line: what was loaded, or why it failed. Each is a copy of this process, which has what they all need and no scene is without.
IMPORT_ALL = """
import importlib, json, os, pkgutil, sys, traceback

scenes, first = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

def load(names):
    sys.meta_path.insert(0, Blocker())
    for name in names:
        module = importlib.import_module(name)
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                if error.name != "triton" or not found.name.startswith("shoal.model.gpu."):
                    raise  # kernels alone may need Triton, which is imported where a GPU asks for them
    return sorted(sys.modules)

for name in first:
    importlib.import_module(name)
for names, blocked in scenes:
    assert not {name.partition(".")[0] for name in sys.modules} & {*blocked, "shoal"}, "what all have must be no scene's"
    if not os.fork():
        try:
            print(json.dumps(load(names)), flush=True)
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    os.wait()
"""
LARGE = ("torch", "numba", "pyarrow.parquet")  # what nearly all planes need, and takes longest to import
PLANES_OF_OURS = (*(f"shoal.{plane}" for plane in PLANES), "recipes")
Scene = tuple[tuple[str, ...], tuple[str, ...]]  # what is imported, and which packages are not installed
WITHOUT: dict[str, Scene] = {
    "ray": ((*PLANES_OF_OURS, "shoal.cli"), ("ray", "gradio")),
    "http": (("shoal.engine", "shoal.train", "shoal.data"), ("ray", "fastapi", "starlette", "uvicorn", "pydantic")),
    "vllm": (
        (*PLANES_OF_OURS, "shoal.cli", "shoal.on_ray", "shoal.vllm_plugin.options"),
        ("vllm", "transformers", "gradio"),
    ),
}


def loaded(*scenes: Scene, first: tuple[str, ...] = ()) -> list[set[str] | str]:
    """Of each of `scenes`, every module that is loaded once all of it is imported after `first`, or its traceback."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps([scenes, first])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [each if isinstance(each, str) else set(each) for each in found]


def without(*names: str) -> dict[str, set[str]]:
    """Of scenes of `WITHOUT` what is loaded."""
    found = dict(zip(names, loaded(*(WITHOUT[name] for name in names), first=LARGE), strict=True))
    assert not [each for each in found.values() if isinstance(each, str)], found
    return found  # type: ignore[return-value]


def test_the_arrows_point_down() -> None:
    lint = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "6 kept, 0 broken" in done.stdout, done.stdout


@pytest.mark.drill
def test_all_planes_but_one_work_where_ray_is_not_installed() -> None:
    (found,) = without("ray").values()
    assert {*PLANES_OF_OURS} <= found
    assert "shoal.engine.engine" in found and "shoal.train.loop" in found, "the walk went inside"


@pytest.mark.drill
def test_the_engine_needs_no_http_and_all_works_where_vllm_is_not_installed() -> None:
    """Only an engine of its own in a serve config needs vLLM. What imports either is held by the arrows, too."""
    found = without("http", "vllm")
    assert "shoal.engine.engine" in found["http"]
    assert "shoal.on_ray.engines" in found["vllm"] and "shoal.vllm_plugin" in found["vllm"]


def test_what_must_start_quickly_does_not_load_torch_or_ray() -> None:
    """`shoal --help` and `import shoal` are instant; the gateway tokenises without torch, and its scribe does not."""
    quick = (("shoal.config", "shoal.presets", "shoal.cli", "shoal.inputs"), ("shoal.cli",), ("shoal.loop.scribe",))
    modules, command, scribe = loaded(*((names, ()) for names in quick))
    assert "shoal.inputs.media" in modules and "shoal.stages.release" in command and "shoal.loop.writer" in scribe
    assert not {"torch", "ray", "fastapi", "pyarrow"} & {*modules} and "numpy" not in command
    assert not {"torch", "tokenizers", "jinja2", "PIL"} & {*scribe}


def test_the_blocker_blocks() -> None:
    (said,) = loaded((("shoal.inputs",), ("numpy",)))
    assert isinstance(said, str) and "blocked: numpy" in said
