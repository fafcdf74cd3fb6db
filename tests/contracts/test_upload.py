"""What `ray job submit --working-dir .` would send, by Ray's own packaging: enough to run a job, and little of it."""

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
MOST = 5 * 2**20  # bytes, of sources that are not compressed


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "working_dir.zip"
    create_package(str(ROOT), path, include_gitignore=True)
    return path


def test_the_upload_is_small(package: Path) -> None:
    assert package.stat().st_size < MOST


def test_the_upload_has_what_jobs_need_and_nothing_else(package: Path) -> None:
    names = zipfile.ZipFile(package).namelist()
    assert {name.split("/")[0] for name in names} <= {
        "platform", "recipes", "jobs", "ui", "serve_configs", "pyproject.toml", "Makefile", "LICENSE",
    }  # fmt: skip
    sent = {name for name in names if name.startswith("platform/")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "platform" / "shoal").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= sent
    assert {f"jobs/{stage}.py" for stage in ("prepare", "pretrain", "finetune", "quantize", "evaluate")} <= set(names)
