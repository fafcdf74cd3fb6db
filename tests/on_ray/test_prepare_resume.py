"""Preparing that is killed, repeated and spread: the shards are byte for byte those of one undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from PIL import Image

from shoal import presets
from shoal.data.documents import SourceSpec
from shoal.data.shards import INDEX
from shoal.errors import DataError
from shoal.on_ray.prepare import WORK, prepare

# it starts two processes that import Ray
pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.usefixtures("shared_ray"), pytest.mark.timeout(600)]

PRESET = presets.get("test")
MIX = {"text": 0.6, "image": 0.2, "code": 0.2}
SEED = 5


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for n in range(300):
        (root / f"{n}.md").write_text(
            f"Log {n}: the boat {n * 7} left at {n % 24}, wind {n % 12}, and came home.\n" * 4
        )
        (root / f"{n}.py").write_text(
            f'def f{n}(a):\n    """Add {n} to it."""\n    return a + {n}\n\n\nprint(f{n}(1))\n'
        )
        Image.new("RGB", (12, 12), (n % 256, n // 2, 9)).save(root / f"{n}.png")
    return root


def ask(raw: Path, **other: object) -> dict:
    return {"sources": [SourceSpec("raw", str(raw), "CC0-1.0")], "mix": MIX, "preset": PRESET, "seed": SEED} | other


def contents(out: Path) -> dict[str, bytes]:
    """All files but the report, which holds the seconds that it took."""
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith("report.")}


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    prepare(out, **ask(raw))
    return contents(out)


SCRIPT = """
import sys
from shoal import presets
from shoal.data.documents import SourceSpec
from shoal.on_ray.prepare import prepare
from shoal.on_ray.resources import local_ray

out, raw = sys.argv[1:]
with local_ray():
    sources = [SourceSpec("raw", raw, "CC0-1.0")]
    mix = {"text": 0.6, "image": 0.2, "code": 0.2}
    prepare(out, sources=sources, mix=mix, preset=presets.get("test"), seed=5)
"""


def kill(out: Path, raw: Path, kind: str, many: int) -> Path:
    """Prepare in a process of its own, on this cluster; kill -9 as soon as `many` results of a `kind` are kept."""
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", SCRIPT, str(out), str(raw)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(list((out / WORK).glob(f"*.{kind}.json"))) < many:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        with pytest.raises(DataError, match="another prepare is writing"):
            prepare(out, **ask(raw))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(2)  # its tasks end a moment after it
    assert not (out / INDEX).exists()
    return out


@pytest.fixture(scope="module")
def killed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were killed while reading, and while packing."""
    return {kind: kill(tmp_path_factory.mktemp("killed"), raw, kind, 3) for kind in ("read", "pack")}


def results(out: Path) -> dict[str, int]:
    """Kept result -> when it was written."""
    return {p.name: p.stat().st_mtime_ns for p in (out / WORK).glob("*.json")}


@pytest.mark.parametrize("kind", ["read", "pack"])
def test_a_killed_run_goes_on_where_it_was_and_ends_in_the_same_bytes(
    raw: Path, undisturbed: dict[str, bytes], killed: dict[str, Path], tmp_path: Path, kind: str, monkeypatch
) -> None:
    out = tmp_path / "moved"
    shutil.copytree(killed[kind], out)
    had = results(out)
    assert len([name for name in had if f".{kind}." in name]) >= 3
    monkeypatch.setattr("shoal.on_ray.prepare.shutil.rmtree", lambda *args, **options: None)  # to look at the results
    prepare(out, **ask(raw))
    monkeypatch.undo()
    now = results(out)
    assert len(now) > len(had) and {name: now[name] for name in had} == had, "what was done is not done again"
    shutil.rmtree(out / WORK)
    assert contents(out) == undisturbed


def test_a_damaged_part_is_made_again(
    raw: Path, undisturbed: dict[str, bytes], killed: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(killed["pack"], out)
    for damaged in (min(out.glob("*.arrow")), min((out / WORK).glob("*.arrow"))):
        damaged.write_bytes(damaged.read_bytes()[:-64] + bytes(64))
    prepare(out, **ask(raw))
    assert contents(out) == undisturbed


def test_what_another_request_or_other_sources_left_is_not_mixed_in(
    raw: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "encode and pack" and done > total / 2:
            raise KeyboardInterrupt

    older, out = tmp_path / "older", tmp_path / "out"
    shutil.copytree(raw, older)
    (older / "0.md").write_text("This page was rewritten before the corpus was made again, and says so.\n" * 40)
    for other in ({"seed": SEED + 1}, {"sources": [SourceSpec("raw", str(older), "CC0-1.0")]}):
        with pytest.raises(KeyboardInterrupt):
            prepare(out, **ask(raw, **other), on_progress=interrupt)
    assert list(out.glob("*.arrow"))
    prepare(out, **ask(raw))
    assert contents(out) == undisturbed


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_the_shards_are_the_same_at_any_number_of_tasks_at_once(
    raw: Path, undisturbed: dict[str, bytes], tmp_path: Path, tasks: int
) -> None:
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=tasks)
    try:
        prepare(tmp_path, **ask(raw))
    finally:
        context.execution_options.resource_limits = limits
    assert contents(tmp_path) == undisturbed
