"""What happens to the files of an import or an export while it works: nothing of it becomes part of a model, or is lost."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CheckpointError
from shoal.open_weights import convert
from shoal.open_weights.convert import export_model, import_model
from shoal.open_weights.gguf import Gguf
from shoal.open_weights.sources import Folder
from shoal.train.plan import run_beside
from tests.unit.open_weights.test_gguf import gguf_of

Make = Callable[[str], Path]


def _at_the_third(module: Any, name: str, what: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `what` happen in the middle, when a method is called for the third time."""
    real, calls = getattr(module, name), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            what()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, called)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    form: str, checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one checkpoint and half of another were a model; and a file that was cut short ended the process (SIGBUS)."""
    source = checkpoint("smollm2" if form == "gguf" else "qwen2")
    path = gguf_of(source, tmp_path / "tiny.gguf") if form == "gguf" else source / "model.safetensors"
    whole = path.read_bytes()
    there = {each.name for each in tmp_path.iterdir()}
    for written in (whole[:-40] + b"\0" * 40, whole[:100]):
        path.write_bytes(whole)
        os.utime(path, (1, 1))
        with monkeypatch.context() as patch:
            patch_at = Gguf if form == "gguf" else Folder
            _at_the_third(patch_at, "read", lambda written=written: path.write_bytes(written), patch)
            with pytest.raises(
                CheckpointError, match=rf"{path.name} was changed while it was read: wait until it is whole"
            ):
                import_model(path if form == "gguf" else source, tmp_path / "model")
    assert {each.name for each in tmp_path.iterdir()} == there, "nothing is left"


def test_an_export_takes_nobodys_place_and_no_two_models_for_one(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(checkpoint("qwen2"), tmp_path / "model")
    for what, says in (
        (lambda: shutil.copytree(tmp_path / "model", tmp_path / "out"), "out: got 'something that is there'"),
        (
            lambda: (tmp_path / "model" / "chat_template.jinja").touch(),
            "chat_template.jinja was changed while it was read",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(convert.proof, "hold", lambda *_: None)
            _at_the_third(convert.depths, "origin", what, patch)
            with pytest.raises(CheckpointError, match=says):
                export_model(tmp_path / "model", tmp_path / "out", check=False)
        there = tmp_path / "out"
        assert not there.exists() or (there / "manifest.json").exists(), "the model that came there stays"
        shutil.rmtree(there, ignore_errors=True)


def test_no_export_goes_into_its_model(checkpoint: Make, tmp_path: Path) -> None:
    """The manifest lists no folder, so that the model could not be replaced any more."""
    source = checkpoint("qwen2")
    import_model(source, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for to in (tmp_path / "model" / "hf", tmp_path / "link" / "a b" / "hf\u00e9"):
        with pytest.raises(CheckpointError, match="got 'a place in the model'; choose one beside it"):
            export_model(tmp_path / "model", to, check=False)
    import_model(source, tmp_path / "model")
    export_model(tmp_path / "link", tmp_path / "a b" / "hf\u00e9", check=False)
    assert sorted(path.name for path in (tmp_path / "a b").iterdir()) == ["hf\u00e9"]


def test_the_folder_that_a_command_runs_in_is_not_replaced(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out .` had every later path of the command lead nowhere: what was learned got no router."""
    source = checkpoint("qwen2")
    import_model(source, tmp_path / "model")
    (tmp_path / "empty" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "in")
    for out in (".", "..", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="got 'the folder that the command runs in, or one around it'"):
            import_model(source, out)
    with pytest.raises(CheckpointError, match="the folder that the command runs in"):
        export_model(tmp_path / "model", ".", check=False)
    assert Path.cwd() == tmp_path / "empty" / "in" and not any(Path.cwd().iterdir())
    import_model(source, "model")
    assert (tmp_path / "empty" / "in" / "model" / "manifest.json").exists()
    assert run_beside("model/.") == run_beside("model/") == "model.run"
