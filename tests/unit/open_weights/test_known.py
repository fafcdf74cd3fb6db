"""Open weights by name: what the lock file says, and that nothing else is taken for them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.open_weights import known
from shoal.open_weights.convert import FETCHED, import_model
from tests.unit.open_weights.test_gguf import gguf_of

Make = Callable[[str], Path]


def test_a_name_is_imported_from_its_package_and_from_no_other(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the same form with a small model in it, where pip would have put it."""
    (name, entry), *_ = known.names().items()
    fetched = tmp_path / FETCHED
    fetched.mkdir()
    archive = fetched / entry["package"]["file"]
    with zipfile.ZipFile(archive, "w") as made:
        made.write(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf"), entry["checkpoint"])
        made.writestr(
            f"{entry['package']['name'].replace('-', '_')}-{entry['package']['version']}.dist-info/LICENSE", "terms"
        )
    lock = tmp_path / "lock.json"
    monkeypatch.setattr(known, "LOCK", lock)
    lock.write_text(json.dumps({name: entry}))
    kept = archive.read_bytes()
    with pytest.raises(DataError, match="sha256"):
        import_model(name, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    archive.write_bytes(kept)
    entry["package"]["sha256"] = hashlib.sha256(kept).hexdigest()
    lock.write_text(json.dumps({name: entry}))
    assert import_model(name, tmp_path / "model").family == "LlamaForCausalLM"
    assert (tmp_path / "model" / "LICENSE").read_text() == "terms"


def test_a_folder_of_a_known_name_keeps_what_it_says(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given the temperature of the package of that name."""
    (name, entry), *_ = known.names().items()
    checkpoint("qwen2").rename(tmp_path / name)
    told = json.loads((tmp_path / name / "generation_config.json").read_text())
    assert entry["generation"]["temperature"] != told.get("temperature")
    monkeypatch.chdir(tmp_path)
    import_model(name, "model")
    assert json.loads(Path("model", "source.json").read_text())["generation_config"] == told
