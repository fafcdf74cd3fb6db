"""The operators one by one, and as the pipeline that a config switches."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shoal.data import tables
from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.operators import decontaminate
from shoal.data.operators.clean import GENERATED
from shoal.data.operators.decontaminate import (
    AROUND,
    Decontaminate,
    Known,
    collect,
    merge,
    need_texts,
    table_of,
    without,
)
from shoal.data.operators.language import Language
from shoal.data.operators.pii import ALL, scrub, scrubbed
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.settings import PrepareConfig, prepare_config
from shoal.data.sources import files
from shoal.data.sources.files import list_files
from shoal.data.sources.images import image_fault
from shoal.errors import ConfigError, DataError, UsageError

GERMAN = (
    "Das Meer war ruhig, und die Boote lagen still am Strand. Niemand sprach, nur die M\u00f6wen waren zu h\u00f6ren. "
    * 2
)
ENGLISH = "The sea was calm, and the boats lay still on the beach. Nobody spoke, only the gulls were heard. " * 2
LICENSE = (
    "Permission is granted to any person who has a copy of this work to deal in it without any restriction of use."
)
ITEM = "Write a function that returns the sum of the first n odd numbers as an integer value"


# ---- language, personal data, generated code, images


def test_texts_of_another_language_are_dropped_and_code_has_none(document) -> None:
    keep = Language(["en"])
    assert keep(document(ENGLISH)) == document(ENGLISH)
    dropped = keep(document(GERMAN))
    assert isinstance(dropped, Skipped) and (dropped.operator, dropped.reason) == ("language", "language de")
    assert isinstance(keep(document(GERMAN, "code")), Document) and isinstance(keep(document("Ja.")), Document)
    assert isinstance(Language(["en", "de"])(document(GERMAN)), Document)
    with pytest.raises(ConfigError, match=r"operators\.languages: got 'english'"):
        Language(["english"])


@pytest.mark.parametrize(
    ("text", "clean", "kind"),
    [
        ("Write to Ann.Lee+x@mail.example.org, please", "Write to [email], please", "email"),
        ("from 8.8.8.8: ok", "from [ip]: ok", "ip"),
        ("at 2001:4860:4860::8888 now", "at [ip] now", "ip"),
        ("call +49 30 1234 5678.", "call [phone].", "phone"),
        ("call (555) 123-4567 or", "call [phone] or", "phone"),
        ("call 555-123-4567", "call [phone]", "phone"),
        ("call 1-800-555-0199!", "call [phone]!", "phone"),
        ("call 555 123 4567 now", "call [phone] now", "phone"),
        ("tel:1 (800) 555-0199", "tel:[phone]", "phone"),
        ("(800)555-0199", "[phone]", "phone"),
        ("555\u2011123\u20114567, 9 to 5", "[phone], 9 to 5", "phone"),
        ("addr:8.8.8.8", "addr:[ip]", "ip"),
        ("at 12:30:8.8.8.8 left", "at 12:30:[ip] left", "ip"),
        ("http://8.8.8.8:80/", "http://[ip]:80/", "ip"),
        ("addr:2001:4860:4860::8888: ok", "addr:[ip]: ok", "ip"),
        ("[2001:4860:4860::8888]:53", "[[ip]]:53", "ip"),
        ("::ffff:8.8.8.8", "::ffff:[ip]", "ip"),
        ("mailto:ann@ex\u00e4mple.de?subject=a", "mailto:[email]?subject=a", "email"),
        ("# by Ann <ANN@EXAMPLE.ORG>.", "# by Ann <[email]>.", "email"),
    ],
)
def test_personal_data_is_replaced_and_counted(document, text: str, clean: str, kind: str) -> None:
    counts: Counter[str] = Counter()
    assert scrub(document(text), ("email", "ip", "phone"), counts).text == clean
    assert counts == {kind: 1}
    others = tuple(k for k in ("email", "ip", "phone") if k != kind)
    assert scrub(document(text), others, counts).text == text  # each kind is switched by itself


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1 and 10.0.0.7 lead to nobody", "version 1.2.3.4.5", "@decorator", "a[1:2:3] = b[::2]", "12:30:45",
        "2024-01-15", "x = 1234567890123", "std::vector::size", "user@host", "3.14159 26535 89793",
        "y = x@self.weight + b", "x@self.info", "q@k.mT", "X.T@w.values", "a@b.to(device)", "a@x.at[0]", "s@base.T.flat",
        "pip install a==1.2.3.4", '__version__ = "1.2.3.4"', "version 8.8.8.8", "v8.8.8.8", "a[1:2, 3::4]", "dead::beef::cafe",
        "200 300 4000 500", "555 123 4567 89", "100 555 123 4567", "2023-555-123-4567", "978-0-306-40615-7",
    ],
)  # fmt: skip
def test_what_is_no_personal_data_is_left(document, text: str) -> None:
    assert scrub(document(text), ("email", "ip", "phone"), Counter()).text == text


@pytest.mark.parametrize(
    ("text", "clean", "kind"),
    [
        ("key sk-proj-abcDEF1234567890abcd.", "key [secret].", "secret"),
        ("sk_live_51Habcdefghijklmnop", "[secret]", "secret"),
        ("id=AKIA" + "IOSFODNN7EXAMPLE;", "id=[secret];", "secret"),
        ("token ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789", "token [secret]", "secret"),
        ("pay with 4111 1111 1111 1111, please", "pay with [card], please", "card"),
        ("5500-0000-0000-0004", "[card]", "card"),
        ("to DE89 3704 0044 0532 0130 00 today", "to [iban] today", "iban"),
        ("GB82WEST12345698765432", "[iban]", "iban"),
    ],
)
def test_secrets_and_numbers_of_cards_and_accounts_are_replaced(text: str, clean: str, kind: str) -> None:
    counts: Counter[str] = Counter()
    assert scrubbed(text, ALL, counts) == clean and counts == {kind: 1}
    assert scrubbed(text, tuple(k for k in ("secret", "iban", "card") if k != kind), counts) == text


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112", "DE88 3704 0044 0532 0130 00", "0000 0000 0000 0000", "sk-learn", "task-force-of-the-north-sea",
        "AKIA", "x = 1234567890123", "order 12345678901234567890", "978-0-306-40615-7", "risk-assessment-2024-of-the-board",
    ],
)  # fmt: skip
def test_numbers_whose_check_digits_are_wrong_and_words_are_left(text: str) -> None:
    assert scrubbed(text, ("secret", "iban", "card"), Counter()) == text


def test_questions_and_their_text_are_scrubbed_alike(document) -> None:
    asked = (("Who is a@b.org?", "Nobody at a@b.org"),)
    pipeline = Pipeline(Operators(pii=("email",)))
    broken = "Who is sch\u00c3\u00b6n@b.org, the sch\u00c3\u00b6n one of the two of them?"
    both = pipeline(document(f"Question: {broken} Answer: I", questions=((broken, "I"),)))
    assert isinstance(both, Document) and "\u00c3" not in both.text + both.questions[0][0], (
        "what was mended stays mended"
    )
    counts: Counter[str] = Counter()
    made = scrub(document("Question: Who is a@b.org? Answer: Nobody at a@b.org", questions=asked), ("email",), counts)
    assert made.questions == (("Who is [email]?", "Nobody at [email]"),) and "@" not in made.text
    assert counts == {"email": 2}


@pytest.mark.parametrize(
    ("head", "generated"),
    [
        ("# Generated by protoc. DO NOT EDIT.\n", True),
        ("// Code generated by mockgen. DO NOT EDIT.\n", True),
        ('"""This file is automatically generated; please don\'t"""\n', True),
        ("/* @generated */\n", True),
        ("# Auto-generated by Tools/scripts/generate_token.py\n", True),
        ('""" Python Character Mapping Codec cp037 generated from \'X.TXT\' with gencodec.py.\n', True),
        ('"""Parser engine for the grammar tables generated by pgen.\n', False),
        ("# An abstract syntax tree can be\n# generated by passing a flag.\n", False),
        ("# some of these names are\n# generated with Python 2.\n", False),
        ("# Please do not edit the wiki while this runs.\n", False),
    ],
)
def test_generated_files_are_told_from_files_that_speak_of_it(head: str, generated: bool) -> None:
    assert bool(GENERATED.search(head)) == generated


def _picture(kind: str, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "size", "fault"),
    [
        ("PNG", (24, 24), None), ("JPEG", (24, 24), None), ("WEBP", (24, 24), None),
        ("GIF", (24, 24), "image cannot be decoded"), ("TIFF", (24, 24), "image cannot be decoded"),
        ("PNG", (2, 24), "image is smaller than 4 pixels"),
        ("PNG", (4, 400), "image is more than 32 times as long as wide"),
        ("PNG", (5000, 4000), "image has too many pixels"),
    ],
)  # fmt: skip
def test_images_are_judged_by_their_headers(kind: str, size: tuple[int, int], fault: str | None) -> None:
    assert image_fault(_picture(kind, size)) == fault


# ---- decontamination


def collected(folder: Path, out: Path, count: int = 1) -> Decontaminate:
    """Of evaluation files that one task each reads, and `count` tasks merge."""
    out.mkdir()
    some, lengths = [], set()
    whole = list_files(SourceSpec("evaluation", str(folder)))
    for number, file in enumerate(piece for one in whole for piece in files.cut(one)):
        found = collect([file], path := out / f"{number}.part")
        some += [table_of(path, table) for table in range(found.tables)]
        lengths |= set(found.counts)
    need_texts(whole, len(some))
    paths = tuple(out / f"known-{number}" for number in range(count))
    for number, path in enumerate(paths):
        merge(some, tables.Span(number, count), path)
    return Decontaminate(Known(paths, tuple(lengths)))


def test_an_evaluation_item_is_taken_out_and_the_document_stays(document, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    rows = [
        {"prompt": ITEM, "tests": [{"say": "what the capital city of the small island is"}]},
        {"prompt": "too short", "license": f"{LICENSE} Its own last words."},
    ]
    (tmp_path / "sets" / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check, counts = collected(tmp_path / "sets", tmp_path / "runs"), Counter[str]()
    alone = [
        f"A page. {ITEM.upper()}! And more.",
        "Asked again: what the capital city of the small island is?",
        LICENSE,
    ]
    dropped = [check(document(text), counts) for text in alone]
    assert {(d.operator, d.reason) for d in dropped if isinstance(d, Skipped)} == {
        ("decontamination", "holds next to nothing but evaluation items")
    }
    kept = [" ".join(ITEM.split()[:12]) + " something else", "this is too short to say", ENGLISH, ""]
    assert all(check(document(text), counts) == document(text) for text in kept) and not counts
    book = "\n\n".join([ENGLISH] * 600 + [LICENSE] + [GERMAN] * 6 + [f"So: {ITEM}. Answer: n * n."] + [ENGLISH])
    left = check(document(book), counts)
    assert isinstance(left, Document) and left.text == "\n\n".join([ENGLISH] * 600 + [GERMAN] * 6 + [ENGLISH])
    assert counts == {"passages left out": 2}
    asked = (("Who asks?", "Nobody."), (ITEM, "n * n"))
    pairs = check(document("", questions=asked), counts)
    assert isinstance(pairs, Document) and (pairs.questions, pairs.text) == (
        asked[:1],
        "Question: Who asks? Answer: Nobody.",
    )
    assert isinstance(check(document("", questions=asked[1:]), counts), Skipped)


@pytest.mark.parametrize(
    "form",
    [
        lambda text: text.upper(), lambda text: "\n  ".join(text.split()), lambda text: ", ".join(text.split()),
        lambda text: " ".join(f"<b>{word}</b>" for word in text.split()), lambda text: text.replace(" ", "&nbsp;"),
        lambda text: " ".join(f"**{word}**" for word in text.split()), lambda text: text.replace(" ", "_"),
        lambda text: text.replace("sum", "[sum](https://example.org/sum)"), lambda text: json.dumps(text.replace(" ", "\n")),
        lambda text: " ".join(chr(0xFEE0 + ord(word[0])) + word[1:] if word[0].isascii() else word for word in text.split()),
        lambda text: unicodedata.normalize("NFD", text), lambda text: text.replace("integer", "in\u00adteger"),
        lambda text: text.replace("returns", r"\emph{returns}"),
        lambda text: text.replace("eturns", "e-\n  turns").replace("nteger", "n\u2010\nteger"),
        lambda text: text.replace("1,000", "1{,}000"),
    ],
)  # fmt: skip
def test_a_reformatted_item_is_found_whichever_side_has_the_form(form, document, tmp_path: Path) -> None:
    item = f"{ITEM} caf\u00e9 1,000"
    for number, (of_set, of_document) in enumerate([(item, form(item)), (form(item), item)]):
        (sets := tmp_path / f"sets{number}").mkdir()
        (sets / "bench.jsonl").write_text(json.dumps({"prompt": of_set}))
        check = collected(sets, tmp_path / f"runs{number}")
        left = check(document(f"{ENGLISH}\n\n{of_document}\n\n{ENGLISH}"), Counter())
        assert isinstance(left, Document) and left.text == f"{ENGLISH}\n\n{ENGLISH}"


@given(st.data())
def test_what_is_taken_out_is_what_stands_around_passages_and_nothing_else(data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("ab \n"), max_size=900))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    left = without(text, spans).split()
    kept = [True] * len(text)
    for start, end in spans:
        kept[start:end] = [False] * (end - start)
    far = [True] * len(text)
    for start, end in spans:
        far[max(0, start - AROUND) : end + AROUND] = [False] * (min(len(text), end + AROUND) - max(0, start - AROUND))
    letters = len("".join(left))
    assert sum(at and not char.isspace() for at, char in zip(far, text, strict=True)) <= letters
    assert letters <= sum(at and not char.isspace() for at, char in zip(kept, text, strict=True))


@pytest.mark.parametrize("count", [1, 7])
def test_runs_are_the_same_in_however_many_tables_files_and_spans_they_lie(
    document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    some = random.Random(5)
    items = [" ".join(f"w{some.randrange(40)}" for _ in range(some.randrange(6, 40))) for _ in range(60)]
    (folder := tmp_path / "sets").mkdir()
    (folder / "large.jsonl").write_text("".join(json.dumps({"a": item}) + "\n" for item in items[:40]))
    (folder / "small.txt").write_text("\n".join(items[40:]))
    pq.write_table(pa.table({"other": items[20:50]}), folder / "rows.parquet", row_group_size=7)
    plain = collected(folder, tmp_path / "plain")
    monkeypatch.setattr(decontaminate, "HELD", 30)
    monkeypatch.setattr(files, "CUT_BYTES", 500)
    cut = collected(folder, tmp_path / "cut", count)
    assert len(list((tmp_path / "cut").glob("*.runs"))) > 20, "no table is large"
    texts = [f"so {item.upper()}, he said" for item in items] + [
        " ".join(f"w{some.randrange(40)}" for _ in range(30)) for _ in range(60)
    ]
    found = [bool(plain.passages(text)) for text in texts]
    assert [cut.passages(text) for text in texts] == [plain.passages(text) for text in texts]
    least = [decontaminate.LEAST] * 50 + [decontaminate.GRAM] * 10  # the lines of one text are no items
    assert found[:60] == [len(item.split()) >= n for item, n in zip(items, least, strict=True)]
    assert not any(found[60:]), "what is drawn by chance is kept"


@pytest.mark.parametrize(
    ("data", "said"), [(b'{"a": "too short"}\n', "got 'no text'"), (b"{broken\n", "bench.jsonl: got 'broken JSON'")]
)
def test_an_evaluation_set_that_cannot_be_looked_for_is_an_error(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "bench.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=said):
        collected(tmp_path, tmp_path / "runs")


# ---- the pipeline and its config


def test_each_operator_can_be_switched(document, png) -> None:
    bad = {"unicode": "sch\u00c3\u00b6n " + ENGLISH, "quality": "short"}
    on, off = Pipeline(Operators()), Pipeline(Operators(unicode=False, quality=False, image=False))
    assert on(document(bad["unicode"])).text.startswith("sch\u00f6n")
    assert on.take_changes() == {"unicode": {"documents mended": 1}} and on.take_changes() == {}
    assert on(document(bad["quality"])).operator == "quality"
    assert on(document("", "image", image=b"x")).operator == "image"
    for some in (document(bad["unicode"]), document(bad["quality"]), document("", "image", image=b"x")):
        assert off(some) == some
    scrubbing = Pipeline(Operators(pii=("email",)))
    assert "[email]" in scrubbing(document(ENGLISH + "a@b.org")).text
    assert scrubbing.take_changes() == {"pii": {"email": 1}}
    assert Pipeline(Operators(languages=("en",)))(document(GERMAN)).operator == "language"


def test_a_config_names_sources_operators_and_s3_and_options_override_it(tmp_path: Path) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text(
        "source:\n  - notes=docs\n  - {name: lib, uri: 's3://b/lib', license: MIT, exclude: [tests]}\n"
        "seed: 3\noperators: {languages: [en], pii: [email], near_dedup: false}\ns3: {endpoint: 'http://127.0.0.1:9000'}\n"
    )
    config = prepare_config(path, seed=4, mix=None)
    assert config.source == (SourceSpec("notes", "docs"), SourceSpec("lib", "s3://b/lib", "MIT", exclude=("tests",)))
    assert (config.seed, config.mix, config.s3.endpoint) == (4, PrepareConfig().mix, "http://127.0.0.1:9000")
    assert config.operators == Operators(languages=("en",), pii=("email",), near_dedup=False)
    assert prepare_config(None, source=["a=b"]).source == (SourceSpec("a", "b"),)
    assert prepare_config(None) == PrepareConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("operator: {}", "unknown key operator.*did you mean 'operators'"),
        ("operators: {near: true}", "unknown key operators.near"),
        ("operators: {pii: [name]}", "operators.pii.*got 'name'"),
        ("operators: {pii: [email, email]}", "each kind once"),
        ("source: [notes]", "NAME=URI"),
        ("source: [{name: a}]", "missing key source.uri"),
        ("s3: {key: x}", "unknown key s3.key"),
    ],
)
def test_a_config_that_would_be_misread_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        prepare_config(tmp_path / "p.yaml")
