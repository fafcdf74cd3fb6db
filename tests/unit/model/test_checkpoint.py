"""The model directory: whole or absent, sharded or not, and what is damaged is named."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import Model
from shoal.errors import CheckpointError, ResourceError
from shoal.model import checkpoint, files
from shoal.model.router import Calibration, Router


@pytest.fixture(scope="module")
def model():
    return Model.from_preset("test", seed=1)


def test_model_directory_round_trip(model, tmp_path):
    single = model
    single.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    again = Model.load(tmp_path / "m")
    tokens = torch.randint(9, 265, (1, 20))
    assert torch.equal(again.logits(tokens), single.logits(tokens))
    assert again.tokenizer.sha256 == single.tokenizer.sha256 and again.config == single.config
    single.save(tmp_path / "m")  # replaces
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # nothing half-written stays


def test_damaged_model_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a model directory"):
        Model.load(tmp_path)
    Model.from_preset("test").save(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was cut short or changed: got '\d+ bytes'; allowed"):
        Model.load(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"), pytest.warns(UserWarning):
        Model.load(tmp_path / "m")
    Model.from_preset("tiny").save(tmp_path / "n")
    (tmp_path / "n" / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "n" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="tensor"), pytest.warns(UserWarning):
        Model.load(tmp_path / "n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not a model directory"):
        Model.from_preset("test").save(tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "config.json is not valid json"),
        ("config.json", '{"format": "other"}', "allowed: shoal-model version 1"),
        ("config.json", '{"format": "shoal-model", "version": 1}', "lacks a name or a model"),
        (
            "config.json",
            '{"format": "shoal-model", "version": 1, "name": "x", "model": {"vocb": 1}}',
            "unknown key vocb",
        ),
        ("tokenizer.json", None, "tokenizer"),
        ("chat_template.jinja", None, "cannot read .*chat_template.jinja"),
        ("router.json", None, "router.json"),
        ("router.json", '{"thresholds": 1}', "router.json: thresholds"),
    ],
)
def test_a_damaged_file_of_a_model_directory_is_named(tmp_path, file, text, says):
    """As a CheckpointError: the directory is at fault and not the command line. With a manifest or, as when somebody edits
    files by hand and removes it, without."""
    model = Model.from_preset("test")
    model.router = Router(model.config)
    model.save(tmp_path / "m")
    assert Model.load(tmp_path / "m").router is not None
    (tmp_path / "m" / file).unlink() if text is None else (tmp_path / "m" / file).write_text(text)
    with pytest.raises(CheckpointError, match=file if file != "config.json" else says):
        Model.load(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=says), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Model.load(tmp_path / "m")


def test_a_model_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    model = Model.from_preset("test", seed=1)
    model.save(tmp_path / "m")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match="no space"):
        Model.from_preset("test", seed=2).save(tmp_path / "m")
    with pytest.raises(ResourceError, match="no space"):
        Model.from_preset("test", seed=2).save(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(Model.load(tmp_path / "m").net.embed.weight, model.net.embed.weight)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a model directory"):
        model.save(tmp_path / "file")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def project(folder):
    """Somebody's work, whose config.json is not of our format."""
    folder.mkdir()
    (folder / "config.json").write_text('{"compiler": "fish"}')


def with_notes(folder):
    (folder / "thesis.txt").write_text("precious")


def with_a_folder(folder):
    (folder / "runs").mkdir()
    (folder / "runs" / "one.txt").write_text("precious")


def without_a_manifest(folder):
    (folder / "manifest.json").unlink()


def with_a_broken_manifest(folder):
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (project, "not a model directory that may be replaced: got 'no config.json of a shoal-model'"),
        (with_notes, "thesis.txt, which manifest.json does not list"),
        (with_a_folder, "runs, which manifest.json does not list"),
        (without_a_manifest, "no manifest.json"),
        (with_a_broken_manifest, "manifest.json is not valid json"),
    ],
)
def test_what_is_not_a_models_is_not_replaced(model, tmp_path, spoil, says):
    if spoil is not project:
        model.save(tmp_path / "m")
    spoil(tmp_path / "m")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        Model.from_preset("test", seed=2).save(tmp_path / "m")
    assert contents(tmp_path) == before


def test_where_the_new_model_cannot_take_the_place_the_old_one_is_put_back(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")
    before, rename = contents(tmp_path), Path.rename

    def failing(path, to):
        if path.name.endswith(".tmp") and Path(to).name == "m":  # files in it are renamed as well, and before
            assert not (tmp_path / "m").exists(), "the old one was taken away"
            raise OSError("the disk went away")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="went away"):
        Model.from_preset("test", seed=2).save(tmp_path / "m")
    assert contents(tmp_path) == before


def test_an_empty_folder_and_the_one_that_a_link_leads_to_are_taken(model, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for seed in (1, 2):
        Model.from_preset("test", seed=seed).save(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m"] and (tmp_path / "link").is_symlink()
    assert torch.equal(Model.load(tmp_path / "m").net.embed.weight, Model.from_preset("test", seed=2).net.embed.weight)


def test_int8_weights_of_another_kind_are_named(tmp_path):
    """As 32-bit numbers they would fill another kernel's registers: the sum, not the load, would be wrong."""
    model = Model.from_preset("test").quantized()
    state = model.net.state_dict()
    state["embed.weight"] = state["embed.weight"].to(torch.int32)
    checkpoint.save(tmp_path / "m", config=model.config, state=state, tokenizer=model.tokenizer, name="m")
    with pytest.raises(CheckpointError, match=r"tensor embed\.weight .*got torch\.int32; allowed: torch\.int8"):
        Model.load(tmp_path / "m")


def test_a_router_that_looks_twice_comes_back_with_the_tables_of_both(tmp_path):
    model = Model.from_preset("test")
    assert checkpoint.routers(tmp_path / "m") == (False, None)
    model.router = Router(model.config)
    model.router.calibration = Calibration(default_tolerance=0.07, thresholds=[(0.1, 0.2)])
    model.save(tmp_path / "m")
    assert checkpoint.routers(tmp_path / "m") == (True, None)
    model.router.later = Router(model.config)
    model.router.later.calibration = Calibration(after=1, offset=0.5)
    model.save(tmp_path / "m")
    assert checkpoint.routers(tmp_path / "m") == (True, 1)
    again = Model.load(tmp_path / "m").router
    assert again.calibration == model.router.calibration and again.later.calibration == model.router.later.calibration
    state = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert again.state_dict().keys() == state.keys() and not any(each.requires_grad for each in again.parameters())
    tables = json.loads((tmp_path / "m" / "router.json").read_text())
    first = {name: tensor for name, tensor in state.items() if not name.startswith("later.")}
    for given, told, says in (
        (first, tables, "lacks the weights of later"),
        (state, {**tables, "later": None}, "later.after: got 0; allowed: 1 or more"),
        (state, {**tables, "later": {"after": 0}}, "later.after: got 0; allowed: 1 or more"),
        ({**first, "more": torch.ones(1)}, {}, "the router has an unknown tensor more: export the model again"),
        ({name: first[name] for name in first if name != "mean.bias"}, {}, r"the router lacks tensor mean\.bias"),
        ({**first, "mean.bias": torch.ones(7)}, {}, r"tensor mean\.bias of .*: got \[7\]; allowed: '?\[2\]"),
        (
            {**first, "mean.bias": torch.ones(2).int()},
            {},
            r"mean\.bias of .*: got torch\.int32; allowed: torch\.float32",
        ),
    ):
        (tmp_path / "router.json").write_text(json.dumps(told))
        with pytest.raises(CheckpointError, match=says):
            checkpoint._router(tmp_path, model.config, given)
    assert checkpoint._router(tmp_path, model.config, {}) is None, "whatever tables lie there"
    (tmp_path / "router.json").write_text("{}")
    short = {name: tensor.bfloat16() for name, tensor in first.items()}
    again = checkpoint._router(tmp_path, model.config, short)
    assert {each.dtype for each in again.state_dict().values()} == {torch.float32}, "of any float"
    assert all(torch.equal(tensor.bfloat16(), short[name]) for name, tensor in again.state_dict().items())


def test_what_a_model_was_imported_from_travels_with_its_licences(model, tmp_path):
    """Whatever bytes they are of; `source.json` says the rest. What has no base is its own."""
    parts = {"config": model.config, "state": model.net.state_dict(), "tokenizer": model.tokenizer, "name": "m"}
    source = {"family": "fish", checkpoint.LICENCES: {"LICENSE": b"caf\xe9".decode("utf-8", "surrogateescape")}}
    checkpoint.save(tmp_path / "m", source=source, base="0123", **parts)
    assert (tmp_path / "m" / "LICENSE").read_bytes() == b"caf\xe9"
    assert json.loads((tmp_path / "m" / "source.json").read_text()) == {"family": "fish"}
    found = checkpoint.read(tmp_path / "m", verify=True)
    assert (found.source, found.base) == (source, "0123")
    checkpoint.save(tmp_path / "own", **parts)
    found = checkpoint.read(tmp_path / "own")
    assert (found.source, found.base) == (None, files.weights_sha256(tmp_path / "own"))
    assert not (tmp_path / "own" / "source.json").exists()


# Files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(model, tmp_path):
    """The model's directory with its weights in many small files."""
    checkpoint.save(
        tmp_path / "m", config=model.config, state=model.net.state_dict(), tokenizer=model.tokenizer, name="cut",
        shard_bytes=100_000,
    )  # fmt: skip
    return tmp_path / "m"


def test_weights_in_many_files_are_the_same_weights(model, cut):
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))] and len(names) > 3
    assert not (cut / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.net.state_dict().values())
    largest = max(t.nbytes for t in model.net.state_dict().values())
    for name in names:
        assert sum(t.nbytes for t in load_file(cut / name).values()) <= max(100_000, largest)
    again = Model.load(cut, verify=True).net.state_dict()
    assert again.keys() == model.net.state_dict().keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.net.state_dict().items())
    assert files.weight_bytes(cut) == sum((cut / name).stat().st_size for name in names)


def test_an_index_names_files_of_its_directory_only(cut):
    index = cut / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    (cut / "manifest.json").unlink()
    first = next(iter(good["weight_map"]))
    for name in ("../m/model-00001-of-00002.safetensors", "/etc/passwd", "..", "sub/x.safetensors", 3, "config.json"):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], first: name}}))
        with pytest.raises(CheckpointError, match=f"file of {first}: got"), pytest.warns(UserWarning):
            Model.load(cut)
    for broken in ({}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="has no weight_map"), pytest.warns(UserWarning):
            Model.load(cut)


def test_a_tensor_in_another_file_than_the_index_says_is_named(cut):
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    (cut / "manifest.json").unlink()
    names = sorted(set(index["weight_map"].values()))
    tensors = load_file(cut / names[0])
    lost = sorted(tensors)[0]
    save_file({key: t for key, t in tensors.items() if key != lost} | {"more": torch.ones(1)}, cut / names[0])
    either = rf"{names[0]} (lacks tensor {lost}|has, .* tensor more)"
    with pytest.raises(CheckpointError, match=either), pytest.warns(UserWarning):
        Model.load(cut)
    (cut / names[1]).unlink()
    (cut / names[0]).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{names[0]}"), pytest.warns(UserWarning):
        Model.load(cut)


def test_every_file_is_held_against_the_manifest(cut):
    listed = json.loads((cut / "manifest.json").read_text())["files"]
    assert listed.keys() == {path.name for path in cut.iterdir()} - {"manifest.json"}
    for name in listed.keys() - {"README.md", "config.json"}:
        path, whole = cut / name, (cut / name).read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=rf"{name} was cut short or changed: got '{len(whole) - 1} bytes'"):
            Model.load(cut)
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])  # one bit, as long as before
        with pytest.raises(CheckpointError, match=f"{name} was changed: another sha256"):
            Model.load(cut)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            Model.load(cut)
        path.write_bytes(whole)
    (cut / "README.md").write_text("my own card")  # people edit cards
    (cut / "notes.txt").write_text("mine")
    Model.load(cut, verify=True)
    (cut / "router.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"does not list router\.json"):
        Model.load(cut)


def test_a_router_is_given_to_weights_as_they_are_read_from_many_files(model, cut, monkeypatch):
    """In the order of the index, and the router of before is gone; all else stays."""
    write = files.save_weights
    monkeypatch.setattr(files, "save_weights", lambda directory, tensors, _: write(directory, tensors, 100_000))
    checkpoint.save(
        cut, config=model.config, state=model.net.state_dict(), tokenizer=model.tokenizer, name="cut", base="0123",
        chat_template=model.chat_template + " ", source={"family": "x", checkpoint.LICENCES: {"NOTICE": "free"}},
    )  # fmt: skip
    before = checkpoint.read(cut)
    (cut / "README.md").write_text("my own card")
    for seed in (1, 2):
        places = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
        streamed = dict(files.stream_weights(cut))
        assert list(streamed) == list(places) and len(set(places.values())) > 3
        assert all(torch.equal(tensor, streamed[name]) for name, tensor in before.net.state_dict().items())
        torch.manual_seed(seed)
        router = Router(model.config)
        checkpoint.give_router(cut, router)
        found = checkpoint.read(cut, verify=True)
        assert found.router is not None
        assert all(torch.equal(tensor, router.state_dict()[name]) for name, tensor in found.router.state_dict().items())
        assert all(
            torch.equal(tensor, found.net.state_dict()[name]) for name, tensor in before.net.state_dict().items()
        )
        parts = ("name", "config", "chat_template", "source", "base")
        assert [getattr(found, part) for part in parts] == [getattr(before, part) for part in parts]
        assert (cut / "README.md").read_text() == "my own card" and found.tokenizer.sha256 == before.tokenizer.sha256
    sorted(cut.glob("model-00002-of-*.safetensors"))[0].write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00002"):
        list(files.stream_weights(cut))


@pytest.mark.parametrize(
    "text", ["{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"../a": {"bytes": 1, "sha256": ""}}}', "["]
)
def test_a_manifest_that_is_none(cut, text):
    (cut / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Model.load(cut)
