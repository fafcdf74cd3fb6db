"""The release as a stranger gets it: sdist and wheel are built of what is tracked, and the wheel is installed where no checkout
is. `shoal` and `ui` come from the wheel alone; the libraries are those of this environment, to save minutes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import shoal

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]  # two builds, and kernels compiled anew


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert names, "this test needs git: it builds what is tracked"
    return names


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that is made of it."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(sources)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing of ours but `env`, an environment that has the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("home")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=bare(), capture_output=True, timeout=120, check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # a folder that a .pth names is searched, but its own .pth files, one of which leads to this checkout, are not read
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(site) / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return folder


def bare(**more: str) -> dict[str, str]:
    """The environment of who has never seen this checkout."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")
    }
    return {**kept, **more}


def run(home: Path, *words: str, seconds: float = 120) -> str:
    """What a command of the environment prints."""
    command = [str(home / "env" / "bin" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=home, env=bare(), capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_all_of_both_packages_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {name.removeprefix("platform/") for name in tracked() if name.startswith("platform/shoal/")}
    pages = {name for name in tracked() if name.startswith("ui/")}
    assert held == package | pages


def test_the_sdist_holds_what_the_documentation_names(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    folders = ("platform/shoal/", "ui/", "jobs/", "serve_configs/", "clusters/", "examples/", "docs/", "tests/")
    assert {name for name in tracked() if name.startswith(folders)} <= held
    assert {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= held


def test_the_wheel_names_its_version_and_its_extras(wheel: Path) -> None:
    assert wheel.name == f"shoal-{shoal.__version__}-py3-none-any.whl"
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert {f"Provides-Extra: {extra}" for extra in ("ray", "ui", "cpu", "s3", "track")} <= set(text.splitlines())


def test_what_is_imported_is_the_wheel_s(home: Path) -> None:
    script = "import json, shoal, ui, shoal.data.sources.demo; print(json.dumps([shoal.__file__, ui.__file__]))"
    assert all(Path(path).is_relative_to(home / "env") for path in json.loads(run(home, "python", "-c", script)))


def test_the_command_explains_itself(home: Path) -> None:
    assert "quickstart" in run(home, "shoal", "--help")
    assert "layers: 8" in run(home, "shoal", "show-config", "tiny")
    assert run(home, "shoal", "--version") == f"shoal {shoal.__version__}\n"


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    run(home, "python", "-c", "from shoal import Model; Model.from_preset('test').save('model')")
    return home / "model"


@contextmanager
def service(home: Path, *words: str) -> Iterator[str]:
    """URL of `shoal serve` from the wheel; it must end well when it is told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(home / "env" / "bin" / "shoal"), "serve", "--model", "model", "--port", port, *words]
    said = home / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(command, cwd=home, env=bare(), stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or not lines[-1].startswith("API "):  # Ray may say something before
                lines.append(process.stdout.readline())
                assert lines[-1], "".join(lines) + said.read_text()[-3000:]
            yield lines[-1].split()[1].removesuffix("/v1")
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()


def look(url: str) -> None:
    """The API answers, and the page comes whole: what it is made of lies in the wheel."""
    with httpx.Client(base_url=url, timeout=60, follow_redirects=True) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["test"]
        asked = {"model": "test", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] <= 3
        page = http.get("/ui")
        assert page.status_code == 200 and page.url.path == "/ui/"
        for part in ("stream.js", "mend.js"):
            text = (ROOT / "ui" / part).read_text(encoding="utf-8").strip().splitlines()[-1].strip()
            assert text in page.text, part
        assert http.get("/favicon.ico").content == (ROOT / "ui" / "icon.svg").read_bytes()
        assert http.get("/ui/service").status_code == 200


@pytest.mark.smoke
def test_it_serves_a_model_and_the_pages_from_one_process(home: Path, model: Path) -> None:
    with service(home, "--no-ray") as url:
        look(url)


@pytest.mark.ray
def test_it_serves_them_on_ray(home: Path, model: Path) -> None:
    with service(home) as url:
        look(url)
