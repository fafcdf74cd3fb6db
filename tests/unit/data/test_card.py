"""The data card: numbers that add up, samples out of the shards, and a page that nothing can break out of."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from shoal.config import ModelConfig
from shoal.data import card, identities, parts
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.data.shards import TOKENIZER, Index
from shoal.data.sources.files import list_files
from shoal.data.tables import Parts
from shoal.inputs.tokenizer import Tokenizer

EVIL = '"><script src="http://evil.example/x.js">alert(1)</script><img src=x onerror=alert(2)>'
MIX = {"text": 0.5, "image": 0.25, "code": 0.25}


@pytest.fixture(scope="module")
def made(tmp_path_factory, png, config: ModelConfig) -> tuple[Path, Index, dict]:
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("<i>corpus")
    for n in range(30):
        (raw / f"note{n}.txt").write_text(f"{EVIL} is note {n}, and the sea was calm on day {n * 3}.\n" * (1 + n % 3))
        (raw / f"{n}.py").write_text(f"def f{n}(a):\n    return a * {n} + {n}\n\n\nprint(f{n}({n}), f{n}(2))\n")
        (raw / f"{n}.png").write_bytes(png((n, 200, 8 * n)))
    (raw / "x.bin").write_bytes(b"?")
    spec = SourceSpec("<b>raw</b>", str(raw), "<u>MIT</u>")
    work = Parts(tmp_path_factory.mktemp("work"), 1)
    found = parts.read_part(list_files(spec), work[0])
    (splits,), drops = identities.choose(work, Operators(near_dedup=False))
    tokenizer = Tokenizer.bytes_only()
    tokenizer.save(out / TOKENIZER)
    packed = parts.pack_part(work[0], splits, out, config, 0)
    packed.dropped(found.drops, found.first)
    packed.dropped(drops)
    documents: dict[str, dict[str, int]] = {"train": {}, "heldout": {}}
    for (split, modality, _, _), count in packed.documents.items():
        documents[split][modality] = count
    index = Index(
        length=config.train_length, vocab=265, patch=config.patch, image_size=config.image_size, tokenizer_sha256="",
        seed=0, mix=MIX, request={"mix": {**MIX, "film": 0.0}}, documents=documents,
        drops={name: dict(reasons) for name, reasons in packed.drops.items()}, shards=tuple(packed.shards),
    )  # fmt: skip
    report = card.report(out, index, packed, tokenizer, {"train": {"code": 3}}, 1.5)
    card.write(out, report)
    return out, index, report


def test_the_numbers_add_up(made: tuple[Path, Index, dict]) -> None:
    out, _, report = made
    assert json.loads((out / card.REPORT).read_text()) == report
    by_source = report["sources"]["<b>raw</b>"]
    tokens = {m: sum(report["tokens"][split].get(m, 0) for split in ("train", "heldout")) for m in MIX}
    assert by_source["by_modality"] == tokens and by_source["tokens"] == sum(tokens.values())
    documents = {m: sum(report["documents"][split].get(m, 0) for split in ("train", "heldout")) for m in MIX}
    assert {m: sum(of.values()) for m, of in report["lengths"].items()} == documents == dict.fromkeys(MIX, 30)
    assert report["realised_mix"] == pytest.approx(MIX, abs=0.01)
    assert report["drops"]["read"] == {"suffix .bin is not read": 1}
    assert card.left_out(report) == ["left out: 1 (read), suffix .bin is not read; the first is <b>raw</b>/x.bin"]
    assert "x.bin" in (out / card.CARD).read_text()


def test_the_first_rows_are_found_without_an_order_of_all(
    made: tuple[Path, Index, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that prepares held 20 bytes for each of the corpus's rows, 3.1 GB of 10 TB."""
    out, index, report = made
    monkeypatch.setattr("shoal.data.order.permutation", lambda count, *key: pytest.fail(f"{count} rows in order"))
    monkeypatch.setattr("shoal.data.order.SPAN", 1)
    assert card.realised_mix(out, index) == report["realised_mix"]


def test_lengths_are_of_whole_documents(made: tuple[Path, Index, dict]) -> None:
    _, _, report = made
    assert report["lengths"]["image"] == {"8-15": 30}  # 9 patches, 3 row ends, 2 tags and an end are 15
    assert set(report["lengths"]["text"]) == {"128-255", "256-511"}  # rows have 96 places


def test_samples_are_what_a_model_is_given(made: tuple[Path, Index, dict]) -> None:
    samples = made[2]["samples"]
    assert [s["modality"] for s in samples] == ["text"] * 3 + ["code"] * 3 + ["image"] * 3
    assert all("f" in s["text"] for s in samples if s["modality"] == "code")
    for sample in samples[6:]:
        pixels = Image.open(io.BytesIO(base64.b64decode(sample["image"].split(",")[1])))
        red, green, blue = pixels.getpixel((5, 5))
        assert pixels.size == (12, 12) and green == 200 and blue == 8 * red % 256


def test_the_page_shows_everything_and_escapes_all_of_it(made: tuple[Path, Index, dict]) -> None:
    page = (made[0] / card.CARD).read_text()
    assert "<script" not in page and "<img src=x" not in page and "<b>raw" not in page and "<i>corpus" not in page
    for shown in (
        "&lt;script src=",
        "&lt;b&gt;raw",
        "&lt;u&gt;MIT",
        "suffix .bin is not read",
        "50.0%",
        "8\N{EN DASH}15",
    ):
        assert shown in page, shown
    assert page.count('<img src="data:image/png;base64,') == 3
