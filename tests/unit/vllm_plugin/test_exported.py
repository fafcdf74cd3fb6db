"""What of an imported model is written for vLLM: where, for how long, and what is refused before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CheckpointError, ConfigError, ResourceError
from shoal.model import described
from shoal.open_weights import convert
from shoal.open_weights.convert import export_model, import_model
from shoal.vllm_plugin import PER_REQUEST, options
from shoal.vllm_plugin.exported import depth_of, exported, need_context
from tests.unit.open_weights.conftest import DATA, edit

HOLDS = """
import sys, tempfile
tempfile.tempdir = sys.argv[2]
from shoal.vllm_plugin.exported import exported
with exported(sys.argv[1], "full") as place:
    print(place, flush=True)
    sys.stdin.read()
"""
Usage = namedtuple("Usage", "total used free")


def imported(family: str, folder: Path, **given: Any) -> Path:
    """Of a name that leads elsewhere, where it is taken for a path."""
    shutil.copytree(DATA / family, folder / f"{family}-source")
    shutil.copytree(DATA / "tokenizer", folder / f"{family}-source", dirs_exist_ok=True)
    import_model(folder / f"{family}-source", folder / family, name="../../elsewhere", **given)
    return folder / family


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "for" / "temporary"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def weights(folder: Path) -> list[Path]:
    return [*folder.rglob("*.safetensors")]


def test_a_checkpoint_lies_where_no_name_of_a_model_leads_and_goes_with_its_block(
    tmp_path: Path, temporary: Path
) -> None:
    model = imported("llama", tmp_path)
    export_model(model, tmp_path / "as-export-does")
    with exported(model, "full") as place:
        assert place.is_relative_to(temporary)
        for path in (tmp_path / "as-export-does").iterdir():
            assert (place / path.name).read_bytes() == path.read_bytes()
    assert not weights(temporary) and [path.name for path in temporary.parent.iterdir()] == ["temporary"]


def test_two_that_start_at_once_share_it_and_the_next_start_finds_the_same_path(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the path vLLM knows what it has compiled."""
    model, written = imported("llama", tmp_path), []

    def counted(*given: Any, **more: Any) -> int:
        written.append(given)
        return export_model(*given, **more)

    monkeypatch.setattr(convert, "export_model", counted)
    with exported(model, "full") as one:
        with exported(model, "full") as two:
            assert one == two and len(written) == 1
        assert weights(one), "the first still reads it"
    assert not weights(temporary)
    with exported(model, "full") as again:
        assert again == one and len(written) == 2


def test_another_model_and_another_depth_are_elsewhere(tmp_path: Path, temporary: Path) -> None:
    one, two = imported("llama", tmp_path), imported("qwen3", tmp_path)
    with exported(one, "full") as a, exported(two, "full") as b, exported(one, 5) as c:
        assert len({a, b, c}) == 3
    edit(one / described.CONFIG, name="other")
    (one / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="not verified"), exported(one, "full") as d:
        assert d != a


@pytest.mark.drill
def test_what_a_killed_start_has_left_is_gone_with_the_next_start_of_any_model(tmp_path: Path, temporary: Path) -> None:
    one, two = imported("llama", tmp_path), imported("qwen3", tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(one), str(temporary)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as killed:  # fmt: skip
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        with exported(two, "full"):
            assert weights(left), "its process lives"
        killed.send_signal(signal.SIGKILL)
    assert weights(left)
    with exported(two, "full"):
        assert not weights(left)


def test_half_of_a_checkpoint_is_written_anew(tmp_path: Path, temporary: Path) -> None:
    model = imported("llama", tmp_path)
    with exported(model, "full") as place:
        whole = {path.name: path.read_bytes() for path in place.iterdir()}
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"half")
    with exported(model, "full") as place:
        assert {path.name: path.read_bytes() for path in place.iterdir()} == whole


def test_a_full_disk_is_a_line_before_a_weight_is_written(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = imported("llama", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ResourceError, match=r"disk space at .*; allowed: at least .* GiB"), exported(model, "full"):
        pass
    assert not weights(temporary)


def test_a_folder_that_others_may_write_in_is_not_served_from(tmp_path: Path, temporary: Path) -> None:
    model, root = imported("llama", tmp_path), temporary / f"shoal-vllm-{os.getuid()}"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(ResourceError, match="not this user's alone"), exported(model, "full"):
        pass
    root.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "theirs")
    with pytest.raises(ResourceError, match="not this user's alone"), exported(model, "full"):
        pass
    assert not [*(tmp_path / "theirs").iterdir()]


def test_a_depth_that_vllm_cannot_serve_is_refused_by_what_the_directory_says(tmp_path: Path) -> None:
    model = imported("llama", tmp_path)
    _, config = described.read_config(model)
    assert depth_of(model, config, {}) == "full"
    assert depth_of(model, config, {"hf_overrides": {"depth": config.layers}}) == config.layers
    for depth in (PER_REQUEST, "middle", 99, True, ["full"]):
        with pytest.raises(
            ConfigError, match=r"hf_overrides\.depth: got .*allowed: full, of a model that was imported"
        ):
            depth_of(model, config, {"hf_overrides": {"depth": depth}})
    (model / described.SOURCE).unlink()
    assert depth_of(model, config, {}) == PER_REQUEST
    with pytest.raises(ConfigError, match="allowed: full, per-request"):
        depth_of(model, config, {"hf_overrides": {"depth": "deepest"}})


def test_an_int8_directory_is_refused_by_what_it_says(tmp_path: Path) -> None:
    from shoal import Model

    Model.load(imported("llama", tmp_path)).quantized().save(tmp_path / "int8")
    with pytest.raises(CheckpointError, match="a quantised model"):
        depth_of(tmp_path / "int8", described.read_config(tmp_path / "int8")[1], {})


def test_vllm_is_told_the_context_that_the_model_was_imported_with(tmp_path: Path) -> None:
    """By its length vLLM chooses one of longrope's tables, and the model has one of them."""
    model = imported("llama", tmp_path, context=48)
    _, config = described.read_config(model)
    assert need_context(model, config, {}) == 48
    assert need_context(model, config, {"max_model_len": 32}) == 32
    for longest in (49, 0, -1, "auto"):
        with pytest.raises(ConfigError, match=r"max_model_len: got .*; allowed: 1 to 48; import"):
            need_context(model, config, {"max_model_len": longest})
    model = imported("phi3-longrope", tmp_path, context=48)
    _, config = described.read_config(model)
    assert need_context(model, config, {}) == need_context(model, config, {"max_model_len": 48}) == 48
    with pytest.raises(ConfigError, match="allowed: 48; import"):
        need_context(model, config, {"max_model_len": 32})


@pytest.mark.parametrize("given", [None, "middle", ["depth"]])
def test_overrides_that_are_no_mapping_are_a_line(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "known", lambda: {"hf_overrides"})
    with pytest.raises(ConfigError, match=r"args\.vllm\.hf_overrides: .*allowed: keys and values"):
        options.check({"hf_overrides": given})
