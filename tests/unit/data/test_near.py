"""Near copies: those planted in Python's own library are found, real documents stay, however the work is shared."""

from __future__ import annotations

import math
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data import parts, tables
from shoal.data.documents import Document
from shoal.data.operators import near
from shoal.data.operators.grams import grams, placed, words
from shoal.data.sources import pysource
from shoal.data.tables import Parts, Span

EDITS = 0.1  # of the words
LICENSE = (
    "Permission is hereby granted to any person obtaining a copy of this software to deal in it without restriction. "
    * 3
)


def edited(text: str, rng: random.Random, vocabulary: list[str]) -> str:
    """The text with a tenth of its words left out, replaced, or followed by another."""

    def edit(match: re.Match[str]) -> str:
        if rng.random() >= EDITS:
            return match[0]
        return ("", rng.choice(vocabulary), f"{match[0]} {rng.choice(vocabulary)}")[rng.randrange(3)]

    return re.sub(r"\S+", edit, text)


def written(some: list[Document], folder: Path, count: int) -> Parts:
    """The documents as `count` parts, with their signatures."""
    places = Parts(folder, count)
    for number, path in enumerate(places):
        share = some[len(some) * number // count : len(some) * (number + 1) // count]
        signatures = near.Signatures()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, parts._SCHEMA) as writer:
            for row, document in enumerate(share):
                signatures.add(row, document)
            for start in range(0, len(share), 100):
                writer.write_batch(parts._batch(share[start : start + 100]))
        signatures.write(path.with_suffix(near.SIGNATURES))
    return places


def copies(places: Parts, total: int, tasks: int = 1, spans: int = 1, dropped: Collection[int] = ()) -> set[int]:
    """The numbers of the documents that are found, of `total`; candidates by so many tasks for each of `spans`."""
    pairs = []
    for span in (Span(number, spans) for number in range(spans)):
        for bands in near.shares(tasks):
            pairs.append(places.folder / f"pairs{len(pairs)}")
            near.candidates(places, bands, span, pairs[-1])
    found: set[int] = set()
    for number in range(len(places)):
        start, end = (total * n // len(places) for n in (number, number + 1))
        gone = np.array([n in dropped for n in range(start, end)], dtype=bool)
        found |= {start + row for row in near.confirmed(places, number, pairs, gone).tolist()}
    return found


@pytest.fixture(scope="module")
def library() -> list[tuple[str, str]]:
    """Pages of docstrings and sources of the standard library: modality and text. Codecs are left out: most are one table."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in [*sorted(root.glob("*.py")), *sorted(root.glob("[jlmu]*/*.py"))]:
        source = path.read_text(encoding="utf-8", errors="replace")
        if path.name.startswith("_sysconfigdata") or path.parts[-2] in ("lib2to3", "site-packages"):
            continue
        page = pysource.docstring_page(source, path.name)
        found += [("code", source[:40_000])] + ([("text", page[:40_000])] if page else [])
    return [item for item in found if len(words(item[1])) >= 60]


def test_planted_copies_are_found_and_real_documents_stay(library, document, tmp_path: Path) -> None:
    rng = random.Random(0)
    vocabulary = sorted({word for _, text in library[:100] for word in text.split()})
    real = [document(text, modality, id=f"s/{n}") for n, (modality, text) in enumerate(library)]
    copied = rng.sample(range(len(real)), 120)
    planted = [
        document(edited(real[n].text, rng, vocabulary), real[n].modality, id=f"s/copy{n}", group=f"copy{n}")
        for n in copied
    ]
    some = real + planted
    found = copies(written(some, tmp_path, 5), len(some))
    hits = sum(n >= len(real) for n in found)
    assert len(real) > 300
    assert hits >= 0.95 * len(planted)
    assert len(found) - hits < 0.01 * len(real)


@pytest.mark.parametrize(("tasks", "spans"), [(1, 1), (2, 3), (8, 1), (1, 16)])
def test_what_is_found_does_not_depend_on_how_many_tasks_spans_or_parts(
    tasks: int, spans: int, document, tmp_path: Path
) -> None:
    rng = random.Random(1)
    vocabulary = [f"word{n}" for n in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=80)) for _ in range(60)]
    texts += [edited(text, rng, vocabulary) for text in texts[:30]]
    some = [document(text, id=f"s/{n}") for n, text in enumerate(texts)]
    places = written(some, tmp_path, tasks + 1)
    assert copies(places, len(some), tasks, spans) == set(range(60, 90))
    assert copies(places, len(some), tasks, spans, dropped={61, 3}) == set(range(60, 90)) - {61}, "a dropped one is not"


def test_a_shared_header_or_a_template_makes_no_copy(document, tmp_path: Path) -> None:
    rng = random.Random(2)
    vocabulary = [f"word{n}" for n in range(3000)]
    headed = [LICENSE + " ".join(rng.choices(vocabulary, k=60)) for _ in range(40)]
    notes = [
        f"Note {n}: the crew of boat {n} mended net {n + 7} before tide {n}, and slept {n} hours." for n in range(60)
    ]
    some = [document(text, id=f"s/{n}") for n, text in enumerate(headed + notes)]
    assert copies(written(some, tmp_path, 3), len(some)) == set()


PARTS = ("bearing", "bracket", "coupling", "flange", "gasket", "gearbox", "housing", "impeller", "piston", "valve")
SHEET = """Product sheet of the {name}, series {a}. This product is made of stainless steel and comes with all parts.
Length {b} mm, width {c} mm, height {d}.{e} mm, weight {f}.{g} kg. It is tested before delivery at {h} bar and {i} degrees.
Keep it dry, do not expose it to the sun, and have it checked by a trained person once a year. Order number {j}, price {k} euros
without tax, {l} pieces a box. All rights of change are reserved, and errors and omissions are excepted in every language."""


def sheets(count: int, seed: int) -> list[str]:
    """Of one form, with figures of their own."""
    rng = random.Random(seed)
    return [
        SHEET.format(name=PARTS[n % len(PARTS)], **{letter: rng.randrange(2, 999) for letter in "abcdefghijkl"})
        for n in range(count)
    ]


@pytest.mark.parametrize("markup", ["", "<tr><td>{}</td></tr>"])
def test_sheets_of_one_form_with_other_figures_are_no_copies_and_an_edited_one_is(
    markup: str, document, tmp_path: Path
) -> None:
    """However small the figures are: the same number of another thing is not the same."""
    some = sheets(40, 1)
    some += [re.sub(r"\d+", lambda found: str(int(found[0]) % 10), text) for text in sheets(10, 2)]
    changed = [some[3].replace("tested", "checked"), some[7].replace("dry", "cool and dry"), some[9].upper()]
    changed = [re.sub(r"\w+", r"<b>\g<0></b>", markup.format(text)) if markup else text for text in changed]
    made = [document(text, id=f"s/{n}") for n, text in enumerate(some + changed)]
    assert copies(written(made, tmp_path, 3), len(made)) == {50, 51, 52}


def test_documents_that_share_a_line_are_not_compared_however_many_there_are(
    document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has lines that others have too, so the more documents there are, the more agree in a band by chance. Of these 1,220
    some 600 pairs were compared, and some 60 are now. What is a copy is found as before."""
    rng, compared = random.Random(3), Counter[str]()
    vocabulary = [f"word{n}" for n in range(3000)]
    lines = [" ".join(rng.choices(vocabulary, k=8)) for _ in range(4000)]
    texts = ["\n".join(rng.sample(lines, 30)) for _ in range(1200)]
    texts += [edited(text, rng, vocabulary) for text in texts[:20]]
    places = written([document(text, id=f"s/{n}") for n, text in enumerate(texts)], tmp_path, 3)
    alike = near.alike

    def counted(one: near.Counted, other: near.Counted) -> bool:
        compared["texts"] += 1
        return alike(one, other)

    monkeypatch.setattr(near, "alike", counted)
    found, few = copies(places, len(texts)), compared.total()
    assert len(found & set(range(1200, 1220))) >= 18
    monkeypatch.setattr(near, "LEAST_EQUAL", 0)
    assert found == copies(places, len(texts))
    assert few < 100 and compared.total() - few > 500, (few, compared)


def test_signatures_of_near_copies_agree_in_as_many_values_as_they_must() -> None:
    """Of two documents with a share j of common 5-grams each value agrees with this chance. Of the ways in which k values may
    agree, those count in which a band does."""
    values = near.BANDS * near.WIDTH

    def chance(j: float, least: int, most: int) -> float:
        ways = [math.comb(values, k) - math.comb(near.BANDS, k) * near.WIDTH**k for k in range(least, most)]
        return sum(count * j**k * (1 - j) ** (values - k) for k, count in enumerate(ways, least))

    for j in (near.SAME_GRAMS, 0.3, 0.42, 1.0):
        assert chance(j, 0, values + 1) == pytest.approx(1 - (1 - j**near.WIDTH) ** near.BANDS), "all that is found"
        assert chance(j, 0, near.LEAST_EQUAL) < 1.2e-5 * chance(j, 0, values + 1), "and not compared"


def test_what_is_short_or_asked_is_not_compared_and_code_is_no_copy_of_text(document, png, tmp_path: Path) -> None:
    text = " ".join(f"word{n}" for n in range(50))
    assert near.signature(document("only a few words")) is None
    assert near.signature(document(text, "image", image=png())) is None
    assert near.signature(document(text, questions=(("a", "b"),))) is None
    some = [document(text), document(text, "code", id="s/b"), document(text, id="s/c")]
    assert copies(written(some, tmp_path, 1), len(some)) == {2}


def test_a_corpus_without_words_has_no_copies(document, tmp_path: Path) -> None:
    assert copies(written([document("short")] * 3, tmp_path, 2), 3) == set()


def test_words_and_grams() -> None:
    assert words("The sea, the SEA!").tolist() == words("the sea the sea").tolist()
    assert len(words("\u6f6e\u6c34 tide")) == 3 and len(words("\u0e17\u0e30")) == 2
    assert len(grams(words("a b c"), 5)) == 0
    one, two = grams(words("a b c d e f"), 5).tolist()
    assert one != two and grams(words("f e d c b a"), 5)[0] not in (one, two)


def test_words_are_the_same_in_whatever_form_a_text_is() -> None:
    plain = words("The list of 1,000 caf\u00e9s is well known, he says").tolist()
    for other in (
        "the LIST  of 1000 caf\u00e9s\n is well-known; he says",
        "<p>The <b>list</b> of 1000 cafe\u0301s</p> is&nbsp;well known he says",
        "**The** _list_ of [1,000](http://a.b/c) caf\u00e9s is `well known`, he says",
        "\uff34he li\u00adst of 1000 caf\u00e9s is well\u200b known, he says",
        "\\textbf{The} \\emph{list} of 1000 caf\u00e9s\\nis well known, he says",
    ):
        assert words(other).tolist() == plain, other


@given(st.text(st.sampled_from("ab1,_<>&;[]()\\n`\u00ad\u0130\u0301\ufb01 \n"), max_size=60))
def test_words_stand_where_they_are_said_to(text: str) -> None:
    of, spans = placed(text)
    assert of.tolist() == words(text).tolist() and len(of) == len(spans)
    for word, (start, end) in zip(of.tolist(), spans.tolist(), strict=True):
        assert words(text[start:end]).tolist() == [word]


def test_near_copies_have_four_fifths_of_their_words_in_common() -> None:
    """And a fifth of their 5-grams, of both together."""
    text = np.arange(100, dtype=np.uint64)
    assert [near.nearly_equal(text, np.r_[text[:same], text[same:] + 1000]) for same in (80, 79)] == [True, False]
    # of 96 5-grams each, those of the first 36 words in order are 32: a fifth of 96 + 96 - 32
    assert [near.nearly_equal(text, np.r_[text[:same], text[same:][::-1]]) for same in (36, 35)] == [True, False]


def test_a_signature_says_how_many_words_there_are_and_needs_twenty(document, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [near.signature(document(" ".join(f"word{n}" for n in range(count)))) for count in (19, 20, 60)]
    assert some[0] is None and some[1][0] == 20 and some[2][0] == 60
    assert all(len(of) == 1 + 80 and of.dtype == np.uint32 for of in some[1:])
    monkeypatch.setattr(near, "CHUNK", 7)
    assert np.array_equal(near.signature(document(" ".join(f"word{n}" for n in range(60)))), some[2])


@pytest.mark.parametrize("count", range(1, 9))
def test_tasks_share_the_bands(count: int) -> None:
    found = near.shares(count)
    assert [band for share in found for band in share] == list(range(40))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_each_document_of_a_bucket_is_compared_with_the_sixteen_before_it() -> None:
    """Of a length that near copies may have; those of another bucket, between them, count for nothing."""
    keys, lengths = np.full(40, 7, dtype=np.uint64), np.full(40, 100, dtype=np.uint32)
    keys[1::2] = 8
    lengths[0] = 50  # too few beside 100
    pairs = near._pairs(keys, lengths).T.tolist()
    expected = {(i, j) for i in range(40) for j in range(1, i) if (i - j) % 2 == 0 and (i - j) // 2 <= 16}
    assert set(map(tuple, pairs)) == expected and len(pairs) == len(expected)


@given(st.lists(st.integers(0, 30), max_size=60), st.lists(st.integers(0, 30), max_size=60))
def test_words_in_common_are_counted_as_they_stand(one: list[int], other: list[int]) -> None:
    """Two texts are near copies by the definition, in Python's own counters."""
    a, b = (np.array(of, dtype=np.uint64) for of in (one, other))
    common = sum((Counter(one) & Counter(other)).values())
    runs = [{tuple(of[i : i + 5]) for i in range(len(of) - 4)} for of in (one, other)]
    enough = len(runs[0] & runs[1]) >= 0.2 * len(runs[0] | runs[1])
    assert near.nearly_equal(a, b) == (2 * common >= 0.8 * (len(one) + len(other)) and enough)


def test_documents_of_a_bucket_stay_in_their_order(tmp_path: Path) -> None:
    """Two signatures in turn, so many that a sort which is not stable mixes them."""
    signatures = near.Signatures()
    draws = np.random.default_rng(0).integers(0, 2**32, (2, 81), dtype=np.uint32)
    signatures._rows = [np.r_[np.uint32(3 * n), draws[n % 2]] for n in range(300)]
    signatures.write(tmp_path / "part.near")
    table = tables.read(tmp_path / "part.near")
    assert table["rows"].tolist() == [3 * n for n in range(300)]
    assert table["words"].tolist() == [draws[n % 2, 0] for n in range(300)]
    low = np.stack([table[name] for name in near.LOW], axis=1).view(np.uint8)
    assert np.array_equal(low, np.array([draws[n % 2, 1:] & 255 for n in range(300)]))
    for band in range(near.BANDS):
        keys, at = table[f"key{band}"], table[f"at{band}"].tolist()
        assert keys.tolist() == sorted(keys.tolist()) and len(set(keys.tolist())) == 2
        assert set(keys.tolist()) == {int(of[1 + 2 * band]) << 32 | int(of[2 + 2 * band]) for of in draws}
        first = int((keys == keys[0]).sum())
        assert at[:first] == sorted(at[:first]) and at[first:] == sorted(at[first:]) and sorted(at) == list(range(300))


def test_a_pair_counts_once_and_two_that_share_a_document_both() -> None:
    pairs = np.array([[3, 2, 2, 3, 2], [1, 1, 0, 1, 1]], dtype=np.uint64)
    assert near._once(pairs).tolist() == [[2, 2, 3], [0, 1, 1]]
    assert near._once(pairs[:, :0]).shape == (2, 0)


def test_a_signature_is_the_least_of_the_hashes_of_all_runs_of_five_words(document) -> None:
    text = " ".join(f"word{n}" for n in range(60))
    whole = near._START.copy()
    whole.update_batch([int(gram) & 0xFFFFFFFF for gram in grams(words(text), 5)])
    assert near.signature(document(text))[1:].tolist() == whole.hashvalues.tolist()
    single = []
    for gram in grams(words(text), 5):
        single.append(near._START.copy())
        single[-1].update_batch([int(gram) & 0xFFFFFFFF])
    assert np.array_equal(np.min([one.hashvalues for one in single], axis=0), whole.hashvalues)
    assert near.signature(document(text, "code"))[1:].tolist() != whole.hashvalues.tolist()


def test_pairs_are_told_by_part_and_row_later_ones_first_and_counted(
    document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts that agree in as many values as they must, and in one fewer."""
    text, other = (" ".join(f"{name}{n}" for n in range(50)) for name in ("word", "other"))
    places = written([document(each, id=f"s/{n}") for n, each in enumerate((other, text, other, text))], tmp_path, 2)
    out = tmp_path / "pairs"
    assert near.candidates(places, range(2), Span(0, 1), out) == 2
    table = {name: column.tolist() for name, column in tables.read(out).items()}
    assert table == {"part": [1, 1], "row": [0, 1], "other_part": [0, 0], "other_row": [0, 1]}
    gone = np.zeros(2, dtype=bool)
    for least, found in ((80, [0, 1]), (81, [])):
        monkeypatch.setattr(near, "LEAST_EQUAL", least)
        assert near.confirmed(places, 1, [out], gone).tolist() == found
    assert near.confirmed(places, 0, [out], gone).dtype == np.int64
