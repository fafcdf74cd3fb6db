"""The gate, a release and a cut with models, a corpus and chats in S3: as with those on the disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import Model, presets
from shoal.cli import main
from shoal.data import models
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.capture import Capture
from shoal.loop.release import Release
from shoal.loop.suites import freeze
from shoal.stages.corpus import Curate
from tests.corpus import write_chats, write_corpus
from tests.s3 import Service, service, upload


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture
def two(tmp_path: Path, s3: Service) -> list[Path]:
    """A stable model and another, with the tokenizer of a corpus beside them, all of them in the bucket too."""
    data = write_corpus(tmp_path / "data", presets.get("test"), heldout=40)
    upload(data, "s3://ocean/data", s3.inside)
    folders = []
    for seed, name in enumerate(("stable", "new")):
        model = Model.from_preset("test", seed=seed)
        model.tokenizer = Tokenizer.load(data / "tokenizer.json")
        model.save(tmp_path / name)
        models.put(tmp_path / name, f"s3://ocean/{name}", s3.inside)
        folders.append(tmp_path / name)
    return folders


def judged(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command says of two models, but their places and what differs by the clock."""
    main(["gate", "--json", "--no-recent", *words])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    for name in ("seconds", "uses"):
        del told[name]
    return {**told, "candidate": told["candidate"]["weights_sha256"], "stable": told["stable"]["weights_sha256"]}


@pytest.mark.drill
@pytest.mark.usefixtures("untimed")
def test_models_and_a_corpus_in_s3_are_judged_as_those_on_the_disk(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "suites").mkdir()
    write_chats(tmp_path / "suites" / "shop.jsonl", rows=3)
    freeze(tmp_path / "suites", 2)
    stable, new = two
    suites = ["--suites", str(tmp_path / "suites")]
    here = judged([*suites, "--model", str(new), "--against", str(stable), "--data", str(tmp_path / "data")], capsys)
    there = ["--model", "s3://ocean/new", "--against", "s3://ocean/stable", "--data", "s3://ocean/data"]
    assert judged([*suites, *there], capsys) == here
    assert {check["name"] for check in here["checks"]} >= {"bits per byte, text", "bits per byte, code"}
    assert main(["gate", *suites, "--model", "s3://ocean/nothing", "--against", "s3://ocean/stable"]) == 1
    assert "s3://ocean/nothing holds no model" in capsys.readouterr().err


def test_a_model_of_another_shape_is_called_by_its_address(
    two: list[Path], s3: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Model.load(two[0])
    other.chat_template = f"{other.chat_template} "
    other.save(tmp_path / "other")
    models.put(tmp_path / "other", "s3://ocean/other", s3.inside)
    (tmp_path / "suites").mkdir()
    write_chats(tmp_path / "suites" / "shop.jsonl", rows=3)
    freeze(tmp_path / "suites")
    words = ["gate", "--suites", str(tmp_path / "suites"), "--model", "s3://ocean/other", "--against"]
    assert main([*words, "s3://ocean/stable"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        "Refused: s3://ocean/other: chat template: got 'another'; allowed: that of s3://ocean/stable"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").symlink_to(tmp_path / "other")  # a name that is a letter of the words
    words[-2] = "./e"
    assert main([*words, "stable"]) == 1
    assert capsys.readouterr().out.startswith("Refused: e: chat template: got 'another'; allowed: that of stable")


def test_a_version_is_added_from_s3(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["release", "add", "--release", str(tmp_path / "release"), "--model"]
    assert main([*words, "s3://ocean/new", "--fp32", "s3://ocean/stable", "--json"]) == 0
    version = Release(tmp_path / "release").stable()
    for folder, made in ((two[1], version.served), (two[0], version.parent)):
        assert {path.name: path.read_bytes() for path in made.iterdir()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }
    capsys.readouterr()
    assert main([*words, "s3://ocean/nothing"]) == 1
    assert "s3://ocean/nothing holds no model" in capsys.readouterr().err


def test_a_cut_replays_chats_that_are_in_s3(s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats").mkdir()
    chats = write_chats(tmp_path / "chats" / "sft-train.jsonl")
    upload(tmp_path / "chats", "s3://ocean/data", s3.inside)
    Capture(tmp_path / "captured", create=True)
    replayed = list[bytes]()

    def cut(*_: object, replay: Path, **__: object) -> None:
        replayed.append(replay.read_bytes())
        raise StopIteration

    monkeypatch.setattr("shoal.loop.cut.cut", cut)
    with pytest.raises(StopIteration):
        curate = Curate(
            capture=str(tmp_path / "captured"), out=tmp_path / "cut", replay="s3://ocean/data/sft-train.jsonl"
        )
        curate.run()
    assert replayed == [chats.read_bytes()]
