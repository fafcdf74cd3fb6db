"""Preparing on Ray Data: raw files with bad ones among them to shards, index, report and fine-tuning rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from shoal import presets
from shoal.data.batches import ChatBatches, PretrainBatches, text_of
from shoal.data.documents import SourceSpec
from shoal.data.shards import INDEX, TOKENIZER, open_index
from shoal.errors import ConfigError, DataError
from shoal.inputs.tokenizer import Tokenizer
from shoal.on_ray.prepare import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]

PRESET = presets.get("test")
MIX = {"text": 0.5, "image": 0.2, "code": 0.3}
BAD = {"latin.txt": b"caf\xe9", "empty.md": b"", "tool.exe": b"MZ", "rows.jsonl": b"{broken\n"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for folder in ("notes", "lib", "pictures/images"):
        (root / folder).mkdir(parents=True)
    for n in range(40):
        (root / "notes" / f"{n}.md").write_text(f"Note {n}: the crew mended net {n} before the tide, and slept.\n" * 3)
        body = f'def f{n}(a):\n    """Add {n}."""\n    return a + {n}\n\n\nprint(f{n}({n} + 1))\n'
        (root / "lib" / f"m{n}.py").write_text(body)
        Image.new("RGB", (24, 24), (5 * n, 99, 9)).save(root / "pictures" / "images" / f"{n}.png")
    (root / "notes" / "same.md").write_text((root / "notes" / "0.md").read_text())
    (root / "lib" / "broken.py").write_text("def broken(:\n    pass  # and a comment to be long enough\n")
    words = [f"word{n * n % 83}" for n in range(80)]
    (root / "notes" / "long.md").write_text(" ".join(words))
    (root / "notes" / "near.md").write_text(" ".join([*words[:30], "another", *words[32:]]))
    odd = os.fsdecode(b"caf\xe9\n.md")  # not UTF-8, and of two lines
    (root / "notes" / odd).write_text("Note 40: whatever its name is, this is as good a document as any.\n")
    for name, data in BAD.items():
        (root / "notes" / name).write_bytes(data)
    rows = [{"image": f"images/{n}.png", "question": "what?", "answer": f"shade {n % 3}"} for n in range(40)]
    rows.append({"image": "images/gone.png"})
    (root / "pictures" / "images" / "torn.png").write_bytes(b"\x89PNG torn")
    rows.append({"image": "images/torn.png"})
    (root / "pictures" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def sources(raw: Path) -> list[SourceSpec]:
    return [
        SourceSpec("notes", str(raw / "notes"), "CC0-1.0"),
        SourceSpec("lib", str(raw / "lib"), "MIT"),
        SourceSpec("pictures", str(raw / "pictures"), "MIT", exclude=("images",)),
    ]


@pytest.fixture(scope="module")
def corpus(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out, told = tmp_path_factory.mktemp("out") / "corpus", []
    report = prepare(
        out, sources=sources(raw), mix=MIX, preset=PRESET, seed=3, on_progress=lambda *line: told.append(line)
    )
    assert [what for what, done, total in told if done == total] == [
        "read and clean",
        "find copies",
        "compare near copies",
        "draw the held-out side",
        "fit the tokenizer",
        "encode and pack",
        "draw chats",
    ]
    return out, report


def test_bad_files_are_counted_by_reason_and_nothing_else_is_lost(corpus: tuple[Path, dict]) -> None:
    _, report = corpus
    assert report["drops"] == {
        "dedup": {"equal to an earlier one": 1},
        "near dedup": {"nearly equal to an earlier one": 1},
        "image": {"image cannot be decoded": 1},
        "list": {"excluded by its source": 1},
        "quality": {"does not parse": 1},
        "read": {
            "broken JSON": 1, "empty": 1, "image file is missing": 1, "not UTF-8": 1, "suffix .exe is not read": 1,
        },
    }  # fmt: skip
    counts = [report["documents"][split] for split in ("train", "heldout")]
    assert {m: counts[0][m] + counts[1][m] for m in MIX} == {"text": 42, "code": 40, "image": 40}


def test_the_report_adds_up_and_is_what_lies_in_the_folder(corpus: tuple[Path, dict]) -> None:
    out, report = corpus
    index = open_index(out, length=PRESET.model.train_length)
    assert json.loads((out / "report.json").read_text()) == report
    assert report["tokens"]["train"]["text"] == index.total("tokens", "train", "text") > 0
    by_source = {name: source["tokens"] for name, source in report["sources"].items()}
    assert sum(by_source.values()) == sum(n for split in report["tokens"].values() for n in split.values())
    assert report["sources"]["lib"]["licenses"] == ["MIT"] and index.mix == MIX
    places = PRESET.model.train_length * sum(n for split in report["rows"].values() for n in split.values())
    assert report["packing"]["padding"] == pytest.approx(1 - sum(by_source.values()) / places)
    read = {name: passes * report["tokens"]["train"][name] for name, passes in report["passes"].items()}  # in an epoch
    assert {name: tokens / sum(read.values()) for name, tokens in read.items()} == pytest.approx(MIX, abs=0.01)
    assert report["realised_mix"] == pytest.approx(MIX, abs=0.01)
    lengths = {name: sum(of.values()) for name, of in report["lengths"].items()}
    assert lengths == {name: sum(report["documents"][split][name] for split in ("train", "heldout")) for name in MIX}
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_the_heldout_side_was_never_seen_by_training(corpus: tuple[Path, dict]) -> None:
    out, _ = corpus
    tokenizer = Tokenizer.load(out / TOKENIZER)
    for modality, mark in (("text", "Note "), ("code", "def f")):
        sides = [text_of(out, modality, split, tokenizer).decode() for split in ("train", "heldout")]
        numbers = [{part.split(":")[0].split("(")[0] for part in side.split(mark)[1:]} for side in sides]
        assert numbers[1] and not numbers[0] & numbers[1]
    train, heldout = ((out / f"sft-{split}.jsonl").read_text().splitlines() for split in ("train", "heldout"))
    asked = [{json.dumps(json.loads(row)["messages"][0]) for row in rows} for rows in (train, heldout)]
    assert asked[1] and not asked[0] & asked[1]


def test_training_reads_what_was_prepared(corpus: tuple[Path, dict]) -> None:
    out, report = corpus
    batch = PretrainBatches(out, batch_rows=200).at(0)[0]
    tokens = {name: sum(int((docs >= 0).sum()) for of, docs in zip(batch.modalities, batch.docs, strict=True) if of == name)
              for name in MIX}  # fmt: skip
    assert {name: n / sum(tokens.values()) for name, n in tokens.items()} == pytest.approx(MIX, abs=0.02)
    tokenizer = Tokenizer.load(out / TOKENIZER)
    chats = ChatBatches(out / "sft-train.jsonl", tokenizer, PRESET.model, batch_tokens=400, parts=2)
    assert chats.report["refused"] == {}
    assert chats.report["rows"] == sum(report["chats"]["train"].values())
    assert set(report["chats"]["train"]) == {"code", "summarisation", "image question"}  # templates: for the demo alone


@pytest.mark.drill
def test_the_same_request_gives_the_same_bytes_and_is_not_made_again(
    corpus: tuple[Path, dict], raw: Path, tmp_path: Path
) -> None:
    out, report = corpus
    again = {"sources": sources(raw), "mix": MIX, "preset": PRESET, "seed": 3}
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert prepare(out, **again) == report
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    prepare(tmp_path / "two", **again)
    for name in before:
        if not name.startswith("report."):  # they hold the seconds
            assert (tmp_path / "two" / name).read_bytes() == (out / name).read_bytes(), name


def test_another_request_for_a_finished_folder_is_refused_and_leaves_it(corpus: tuple[Path, dict], raw: Path) -> None:
    out, _ = corpus
    before = (out / INDEX).read_bytes()
    with pytest.raises(DataError, match="another request: got 'other mix, seed'"):
        prepare(out, sources=sources(raw), mix={"text": 1.0}, preset=PRESET, seed=4)
    assert (out / INDEX).read_bytes() == before


@pytest.mark.drill
def test_sources_of_no_use_are_one_line_and_leave_no_corpus(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff")
    (tmp_path / "none").mkdir()
    bad, none, gone = (SourceSpec(name, str(tmp_path / name)) for name in ("bad", "none", "gone"))
    for specs, error, said in [
        ([bad], DataError, "no document could be used.*not UTF-8"),
        ([none], DataError, "holds no file"),
        ([gone], DataError, "does not exist"),
        ([bad, bad], ConfigError, "source bad is given 2 times"),
    ]:
        with pytest.raises(error, match=said) as caught:
            prepare(tmp_path / "out", sources=specs, mix=MIX, preset=PRESET, seed=0)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / INDEX).exists()
