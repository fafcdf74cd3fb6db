"""The import arrows, and what each part can do without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    "recipes",
    "sandbox",
)

# Imports every module of the planes named, with some packages made impossible to import, and prints what was loaded.
IMPORT_ALL = """
import importlib, json, pkgutil, sys

names, blocked = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
for name in names:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name != "triton" or not found.name.startswith("shoal.model.gpu."):
                raise  # kernels alone may need Triton, which is imported where a GPU asks for them
print(json.dumps(sorted(sys.modules)))
"""


def loaded(*names: str, blocked: tuple[str, ...] = ()) -> set[str]:
    """Every module that is loaded once `names`, and all that lies inside them, are imported in a fresh Python."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps([names, blocked])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_the_arrows_point_down() -> None:
    lint = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "6 kept, 0 broken" in done.stdout, done.stdout


def test_all_planes_but_one_work_where_ray_is_not_installed() -> None:
    modules = loaded(*(f"shoal.{plane}" for plane in PLANES), "shoal.cli", blocked=("ray", "gradio"))
    assert {f"shoal.{plane}" for plane in PLANES} <= modules
    assert "shoal.engine.engine" in modules and "shoal.train.loop" in modules, "the walk went inside"


def test_the_engine_needs_no_http() -> None:
    loaded("shoal.engine", "shoal.train", "shoal.data", blocked=("ray", "fastapi", "starlette", "uvicorn", "pydantic"))


def test_what_must_start_quickly_does_not_load_torch_or_ray() -> None:
    """`shoal --help` and `import shoal` are instant; the gateway tokenises without torch."""
    modules = loaded("shoal.config", "shoal.presets", "shoal.cli", "shoal.inputs")
    assert "shoal.inputs.media" in modules
    assert not {"torch", "ray", "fastapi", "pyarrow"} & modules


def test_the_blocker_blocks() -> None:
    with pytest.raises(AssertionError, match="blocked: numpy"):
        loaded("shoal.inputs", blocked=("numpy",))


def test_all_works_where_vllm_is_not_installed() -> None:
    """Only an engine of its own in a serve config needs it."""
    planes = (*(f"shoal.{plane}" for plane in PLANES), "shoal.cli", "shoal.on_ray", "shoal.vllm_plugin.options")
    modules = loaded(*planes, blocked=("vllm", "transformers", "gradio"))
    assert "shoal.on_ray.engines" in modules and "shoal.vllm_plugin" in modules
