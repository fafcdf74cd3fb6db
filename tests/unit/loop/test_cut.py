"""A cut: right answers only, people on one side, nothing that a suite asks, and files that nobody changes."""

import json
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import Model
from shoal.cli import main
from shoal.data.chats.rows import group_of, read_chats
from shoal.errors import DataError
from shoal.evaluate.halves import asked_groups
from shoal.loop.asked import Asked, forbidden
from shoal.loop.capture import Capture, Forgotten
from shoal.loop.cut import (
    MANIFEST,
    RECENT,
    TRAIN,
    Settings,
    asked_of_both,
    cut,
    mixed,
    name_of,
    read,
)  # fmt: skip
from shoal.loop.labels import Found, Kept, Labelled, Said, kept_texts, labelled, read_imports, said
from shoal.loop.learned import before, forget
from shoal.loop.paired import LEAST_RECENT
from shoal.loop.suites import freeze, looked_at
from shoal.loop.texts import Texts
from shoal.loop.votes import Vote, Votes


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def kept(count: int, people: int = 20) -> list[Kept]:
    return [
        Kept(f"id-{i}", chat(f"Where is my order number {i}?"), "I know", f"p{i % people}", at=i) for i in range(count)
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def corrected(count: int, people: int = 20) -> Found:
    return labelled(kept(count, people), {f"id-{i}": Said("down", f"It is in box {i}.") for i in range(count)}, {})


# --- labels -------------------------------------------------------------------------------------------------------------


def test_the_best_label_counts_and_an_unrated_answer_is_never_one() -> None:
    given_votes = {
        "id-0": Said("down", "corrected"), "id-1": Said("up"), "id-2": Said("down"), "id-4": Said("up", "corrected too"),
    }  # fmt: skip
    found = labelled(kept(6), given_votes, {"id-0": "imported", "id-3": "imported"})
    assert {(row.id, row.label, row.answer) for row in found.rows} == {
        ("id-0", "correction", "corrected"), ("id-1", "up", "I know"), ("id-3", "imported", "imported"),
        ("id-4", "correction", "corrected too"),
    }  # fmt: skip
    assert found.left_out == {"disliked, and nobody said what is right": 1, "unrated": 1} and found.texts == 6
    taught = labelled(kept(6), given_votes, {"id-3": "imported"}, lambda messages: f"taught {messages[-1]['content']}")
    assert [row.label for row in taught.rows] == [
        "correction",
        "teacher",
        "teacher",
        "imported",
        "correction",
        "teacher",
    ]


def test_what_would_teach_wrong_is_left_out() -> None:
    scrubbed = Kept("a", chat("Who?"), "Ask [email]", "p", scrubbed=True)
    mixed = Kept("b", chat("Who is it?"), "two authors", "p", resumed=True)
    twice = [Kept(name, chat("Where is it?"), "there", "p") for name in ("c", "d")]
    found = labelled([scrubbed, mixed, *twice], {name: Said("up") for name in "abcd"}, {})
    assert [row.id for row in found.rows] == ["c"] and sum(found.left_out.values()) == 3
    # A person's own words have nothing of the answer that was scrubbed.
    assert labelled([scrubbed], {"a": Said("down", "Ask us")}, {}).rows[0].answer == "Ask us"


def test_labels_of_label_studio_argilla_and_chats_are_read(tmp_path: Path) -> None:
    studio = [
        {"data": {"id": "a", "text": "q"}, "annotations": [{"result": [{"value": {"text": ["one"]}}]}]},
        {"data": {"text": "new q"}, "annotations": [{"result": [{"value": {"text": ["new a"]}}]}]},
        {"data": {"id": "no"}, "annotations": [{"was_cancelled": True, "result": [{"value": {"text": ["x"]}}]}]},
    ]
    (tmp_path / "studio.json").write_text(json.dumps(studio))
    by_id, chats = read_imports(tmp_path / "studio.json", Counter())
    assert by_id == {"a": "one"} and [(row.messages[0]["content"], row.answer) for row in chats] == [("new q", "new a")]
    argilla = [
        {
            "fields": {"prompt": "q"},
            "metadata": {"id": name},
            "responses": {"answer": [{"value": said, "status": status}]},
        }
        for name, said, status in (("b", "two", "submitted"), ("c", "x", "discarded"))
    ]
    (tmp_path / "argilla.jsonl").write_text("".join(json.dumps(row) + "\n" for row in argilla))
    assert read_imports(tmp_path / "argilla.jsonl", Counter())[0] == {"b": "two"}
    (tmp_path / "chats.jsonl").write_text(json.dumps({"instruction": "Do it.", "output": "Done."}) + "\n")
    assert read_imports(tmp_path / "chats.jsonl", Counter())[1][0].answer == "Done."
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in
             (("user", "Who?"), ("assistant", "We."), ("system", "Be brief."))]  # fmt: skip
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (of,) = read_imports(tmp_path / "parts.jsonl", Counter())[1]
    assert of.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "We."}]
    unused = Counter[str]()
    read_imports(tmp_path / "studio.json", unused)
    read_imports(tmp_path / "argilla.jsonl", unused)
    assert unused == {"imported, but nobody submitted an answer": 2}
    for text in ("nonsense", '{"messages": []}\n', '{"annotations": 3}\n', json.dumps({"messages": chat("q")})):
        (tmp_path / "wrong.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"wrong\.jsonl"):
            read_imports(tmp_path / "wrong.jsonl", Counter())


# --- cuts ---------------------------------------------------------------------------------------------------------------


@given(people=st.integers(2, 40), seed=st.integers(0, 1_000))
def test_a_person_is_on_one_side(people: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("cut") / "cut"
    try:
        made = cut(corrected(80, people), out, Settings(heldout=0.4, seed=seed))
    except DataError as error:  # with so few people one side may be empty: that is said, and nothing is written
        assert "no row" in error.message and not out.exists()
        return
    sides = [{row["group"] for row in rows(out / name)} for name in (TRAIN, RECENT)]
    assert not sides[0] & sides[1] and made["train"] + made["recent"] == 80
    assert set(made["persons"]) == sides[0] | sides[1] and name_of("id-3") in made["requests"]


def test_nothing_that_a_suite_asks_is_trained_on(tmp_path: Path) -> None:
    """Whatever the case and the signs, and where 13 words are the same."""
    long = "I would like to know on which day of next week the blue kettle that I ordered in May arrives"
    asked = ["where is MY order, number 3", f"Hello! {long}, please"]
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "shop.jsonl").write_text(
        "".join(json.dumps({"messages": [*chat(text), {"role": "assistant", "content": "x"}]}) + "\n" for text in asked)
    )
    freeze(tmp_path / "suites")
    found = corrected(60)
    found.rows.append(
        Labelled([*chat(f"Tell me: {long}"), {"role": "assistant", "content": "Monday."}], "correction", "z")
    )
    made = cut(found, tmp_path / "cut", Settings(), never=forbidden(tmp_path / "suites", []))
    said = (tmp_path / "cut" / TRAIN).read_text() + (tmp_path / "cut" / RECENT).read_text()
    assert "number 3?" not in said and "kettle" not in said and "number 30?" in said
    assert made["left_out"]["asked by a suite"] == 2
    second = cut(
        corrected(60), tmp_path / "second", Settings(seed=5), never=forbidden(None, [tmp_path / "cut" / RECENT])
    )
    held = {row["messages"][0]["content"] for row in rows(tmp_path / "cut" / RECENT)}
    assert second["train"] and not held & {row["messages"][0]["content"] for row in rows(tmp_path / "second" / TRAIN)}


def test_of_a_talk_the_last_answer_alone_is_learned(tmp_path: Path) -> None:
    """What the model said before it, and nobody rated, is only read."""
    model = Model.from_preset("test")

    def talk(number: int) -> list[dict[str, Any]]:
        return [*chat(f"Is {number} there?"), {"role": "assistant", "content": "UNRATED"}, *chat("And its price?")]

    texts = [Kept(f"id-{i}", talk(i), "I know", f"p{i}", at=i) for i in range(30)]
    found = labelled(texts, {one.id: Said("down", f"It is {i}.") for i, one in enumerate(texts)}, {})
    found.rows.append(Labelled([*talk(90), {"role": "assistant", "content": "Imported."}], "imported", "z"))
    cut(found, tmp_path / "cut", Settings(heldout=0.3))
    learned: list[str] = []
    for name in (TRAIN, RECENT):
        read = read_chats(tmp_path / "cut" / name, model.tokenizer, model.config, limit=10_000)
        for ids, answer, _ in map(read.row, range(len(read))):
            learned.append(model.tokenizer.decode(ids[answer].tolist()))
    by_people = [text for text in learned if "Imported" in text]
    assert len(learned) == 31 and all("UNRATED" in text for text in by_people), (
        "of an import people vouch for the whole"
    )
    assert not any("UNRATED" in text for text in learned if text not in by_people)


def test_what_is_held_out_is_not_trained_on_as_an_old_chat_or_in_almost_the_same_words(tmp_path: Path) -> None:
    found, old = corrected(60), tmp_path / "old.jsonl"
    answer = {"role": "assistant", "content": "an old answer"}
    old.write_text(
        "".join(json.dumps({"messages": [*chat(f"Where is my order number {i}"), answer]}) + "\n" for i in range(60))
    )
    near = "tell me when the blue kettle that I ordered from you in May arrives"
    for i, begin in enumerate(["Please", "Hello", "Well", "So", "Hey", "Now", "Sorry", "Oh"]):
        more = [*chat(f"{begin}, {near}!"), {"role": "assistant", "content": f"On day {i}."}]
        found.rows.append(Labelled(more, "correction", f"q{i}", f"near-{i}"))
    suite = Asked()
    suite.add(chat("Where is my order number 3?"))
    talk = [*chat("Hello"), {"role": "assistant", "content": "Hello!"}, *chat("where is my order, number 3?")]
    found.rows.append(Labelled([*talk, {"role": "assistant", "content": "There."}], "correction", "z", "talk"))
    made = cut(found, tmp_path / "cut", Settings(heldout=0.5), replay=old, never=suite)
    train, recent = (rows(tmp_path / "cut" / name) for name in (TRAIN, RECENT))
    held = [row["messages"][0]["content"] for row in recent]
    asked_again = [row for row in train if row["messages"][0]["content"] + "?" in held]
    assert held and not asked_again and 0 < made["replay"] < 60
    both = [[row for row in some if "kettle" in str(row)] for some in (train, recent)]
    assert bool(both[0]) != bool(both[1]), "thirteen words are the same"
    assert "talk" not in {row.get("id") for row in [*train, *recent]}, "a later turn asks what the suite does"


def test_turns_of_one_talk_are_on_one_side_where_nothing_else_is_known_of_it(tmp_path: Path) -> None:
    """Its rows were dropped, or are kept for fewer days than texts are."""
    texts = []
    for i in range(30):
        said = [chat(f"order {i}, turn {turn}")[0] for turn in range(3)]
        texts += [Kept(f"{i}-{turn}", said[: turn + 1], "so", at=3 * i + turn) for turn in range(3)]
    found = labelled(texts, {one.id: Said("down", f"right: {one.id}") for one in texts}, {})
    cut(found, tmp_path / "cut", Settings(heldout=0.4))
    sides = [{row["messages"][0]["content"] for row in rows(tmp_path / "cut" / name)} for name in (TRAIN, RECENT)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    imported = tmp_path / "imported.jsonl"
    of = [{"messages": [*texts[turn].messages, {"role": "assistant", "content": "a"}], "group": "g"} for turn in (0, 1)]
    imported.write_text("".join(json.dumps(one) + "\n" for one in of))
    assert len({row.person for row in read_imports(imported, Counter())[1]}) == 1, (
        "a group of the file's own is one as well"
    )


def test_copies_and_near_copies_count_once(tmp_path: Path) -> None:
    words = "The parcel with the blue kettle and the two red cups that I ordered last May from your shop in the old town has"
    found = corrected(40)
    for i in range(3):
        more = [*chat(f"{words} not come yet, day {i}."), {"role": "assistant", "content": "It comes today."}]
        found.rows.append(Labelled(more, "correction", f"q{i}"))
    found.rows.append(found.rows[0])
    made = cut(found, tmp_path / "cut", Settings())
    assert made["left_out"] == {"a copy of another": 1, "nearly a copy of another": 2}


def test_of_its_own_answers_it_learns_few_and_is_measured_on_none(tmp_path: Path) -> None:
    found = labelled(kept(200, 50), {f"id-{i}": Said("up") if i % 2 else Said("down", "no") for i in range(200)}, {})
    made = cut(found, tmp_path / "cut", Settings(up=0.2))
    assert made["labels"]["up"] <= 0.2 * made["train"] < made["labels"]["up"] + 1
    assert {row["label"] for row in rows(tmp_path / "cut" / RECENT)} == {"correction"}


def test_new_rows_come_as_often_as_their_share_asks_for_and_old_ones_are_asked_as_well(tmp_path: Path) -> None:
    def chat(text: str, **more: object) -> dict[str, object]:
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return {"messages": said, "task": "chat"} | more

    old = tmp_path / "old.jsonl"
    several = [chat(f"what is number {number}?") for number in range(400)] + [chat("and?", augmented="wording")]
    old.write_text("".join(json.dumps(row) + "\n" for row in several))
    folder = tmp_path / "cut"
    made = cut(corrected(60), folder, Settings(), replay=old)
    assert made["replay"] == 401
    times, left_out = mixed(folder, tmp_path / "mix.jsonl", 0.25)
    assert left_out == 0
    lines = (tmp_path / "mix.jsonl").read_text().splitlines()
    new = [line for line in lines if json.loads(line)["label"] != "replay"]
    assert len(new) == times * made["train"] and len(lines) - len(new) == 401 and len(set(new)) == made["train"]
    share = sum(map(len, new)) / sum(map(len, lines))
    assert times > 1 and abs(share - 0.25) < 0.25 / times
    asked_of_both(folder, tmp_path / "asked.jsonl")
    kept = (tmp_path / "asked.jsonl").read_text().splitlines()
    gated = looked_at(folder / RECENT)
    new = [line for line in (folder / RECENT).read_text().splitlines() if group_of(json.loads(line)) not in gated]
    assert 0 < len(new) < made["recent"] and kept[: len(new)] == new, "the gate asks about the router what it never saw"
    assert len(kept) == len(new) + 400 and not any("augmented" in line for line in kept)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(chat(f"held {number}, of the old?")) + "\n" for number in range(40)))
    never = Asked()
    never.add([{"role": "user", "content": "Held 7, of the old"}])
    half = asked_groups(held)
    asked_of_both(folder, tmp_path / "asked.jsonl", held=held, never=never)
    kept = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()][len(new) :]
    assert all(group_of(row) not in half for row in kept), "what evaluation asks is left to it"
    ours = {f"held {number}, of the old?" for number in range(40)}
    said = {row["messages"][0]["content"] for row in kept}
    fits = {text for text in ours if group_of(chat(text)) not in half}
    assert said == fits - {"held 7, of the old?"} and len(fits) == 20
    asked_of_both(folder, tmp_path / "asked.jsonl", held=tmp_path / "none.jsonl")
    assert len((tmp_path / "asked.jsonl").read_text().splitlines()) == len(new) + 400
    held.write_text("".join(json.dumps(chat(f"held {n}?", task="chat" if n % 2 else "code")) + "\n" for n in range(40)))
    for tasks, asked_about in ({"code"}, {"code"}), ({"law"}, {"chat", "code"}):
        asked_of_both(folder, tmp_path / "asked.jsonl", held=held, tasks=tasks)
        kept = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
        assert {row["task"] for row in kept[len(new) :]} == asked_about and len(kept) > len(new)
    bare = tmp_path / "bare"
    cut(corrected(60), bare, Settings())
    assert mixed(bare, tmp_path / "mix.jsonl", 0.25) == (1, 0)
    assert (tmp_path / "mix.jsonl").read_text() == (bare / TRAIN).read_text()


def test_a_router_is_fitted_to_no_question_that_the_gate_asks_or_a_suite_does(tmp_path: Path) -> None:
    """Two people may ask the same, and be answered otherwise; and a cut may be older than the suites."""
    rows = [
        Labelled(
            [*chat(f"What costs {n % 60}?"), {"role": "assistant", "content": f"{n}"}], "correction", f"p{n}", at=n
        )
        for n in range(120)
    ]
    cut(Found(rows=rows, texts=120), tmp_path / "cut", Settings(heldout=0.9))
    never = Asked()
    for number in range(20):
        never.add(chat(f"What costs {number}?"))
    half = looked_at(tmp_path / "cut" / RECENT)
    recent = [json.loads(line) for line in (tmp_path / "cut" / RECENT).read_text().splitlines()]
    gated = {row["messages"][0]["content"] for row in recent if group_of(row) in half}
    both = [row for row in recent if group_of(row) not in half and row["messages"][0]["content"] in gated]
    asked_of_both(tmp_path / "cut", tmp_path / "asked.jsonl", never=never)
    kept = [json.loads(line)["messages"] for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert both and kept and not any(messages[0]["content"] in gated for messages in kept)
    assert not any(never.holds(messages[:-1]) for messages in kept)


def test_who_is_forgotten_leaves_the_others_on_their_sides(tmp_path: Path) -> None:
    """A router that was fitted before is looked at by nothing that it was fitted to."""
    out, asked = tmp_path / "cut", tmp_path / "asked.jsonl"
    cut(corrected(200, people=100), out, Settings(heldout=0.5))
    before_it, people = looked_at(out / RECENT), sorted({row["group"] for row in rows(out / RECENT)})
    assert 0.3 < len(before_it) / len(people) < 0.7
    asked_of_both(out, asked)
    fitted = {group_of(row) for row in rows(asked)}
    assert fitted and fitted.isdisjoint(before_it)
    who = {name for number in range(100) if name_of(name := f"p{number}") in people[:7]}
    assert len(who) == 7 and forget(out, Forgotten(set(), who))
    assert looked_at(out / RECENT) == before_it - {group_of({"group": name_of(name)}) for name in who}
    assert fitted.isdisjoint(looked_at(out / RECENT))


def test_the_same_words_about_another_image_are_another_question() -> None:
    def about(image: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Is there a circle?"}]
        return [{"role": "user", "content": parts}]

    never = Asked()
    never.add(about("data:,one"))
    assert never.holds(about("data:,one")) and not never.holds(about("data:,two"))
    assert not never.holds(chat("Is there a circle?"))


@pytest.mark.parametrize(
    "row",
    [
        b"{",
        b"[1]",
        b'{"messages": ["a"]}',
        b'{"messages": "\xff"}',
        json.dumps({"messages": [*chat("x"), {"role": "assistant", "content": "a"}], "task": "\ud800"}).encode(),
        json.dumps({"messages": [*chat("\ud800"), {"role": "assistant", "content": "a"}]}).encode(),
    ],
)
def test_a_held_out_row_that_is_no_chat_is_said_in_a_line(row: bytes, tmp_path: Path) -> None:
    cut(corrected(60), tmp_path / "cut", Settings())
    held = tmp_path / "held.jsonl"
    held.write_bytes(row + b"\n")
    with pytest.raises(DataError, match="no chat"):
        asked_of_both(tmp_path / "cut", tmp_path / "asked.jsonl", held=held, tasks={"chat"})
    with pytest.raises(DataError, match="no chat"):
        cut(corrected(60), tmp_path / "another", Settings(), replay=held)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "share"), [(100, 0.2), (430, 0.2), (450, 0.49), (600, 0.37), (1_050, 0.21)])
def test_as_many_people_are_held_out_as_the_gate_asks_for_where_there_are_so_many(
    count: int, share: float, seed: int, tmp_path: Path
) -> None:
    """Surely so, whatever the draw: a person's rows are drawn together."""
    made = cut(corrected(count, people=count // 2), tmp_path / "cut", Settings(seed=seed))
    assert made["recent"] / count == pytest.approx(share, abs=0.15 if share == 0.2 else 0.04)
    assert made["recent"] >= 1.1 * LEAST_RECENT or share == 0.2
    told = cut(corrected(count, people=count), tmp_path / "another", Settings(heldout=0.3, seed=seed))
    assert told["recent"] / count == pytest.approx(0.3, abs=0.15)


def test_what_measures_nothing_is_not_counted_among_what_the_gate_asks_for(tmp_path: Path) -> None:
    """Of 700 rows 140 are the model's own, and 60 ask what others ask."""
    found = labelled(
        [replace(one, messages=chat(f"Where is it, {max(60, number)}?")) for number, one in enumerate(kept(700, 700))],
        {f"id-{i}": Said("up") if i % 5 == 0 else Said("down", f"It is in box {i}.") for i in range(700)},
        {},
    )
    made = cut(found, tmp_path / "cut", Settings())
    assert made["recent"] >= LEAST_RECENT and made["left_out"]["held out, but asked in training by another person"] > 9


def test_the_old_mix_is_replayed_one_to_one(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    answer = {"role": "assistant", "content": "a"}
    old.write_text("".join(json.dumps({"messages": [*chat(f"old {i}"), answer]}) + "\n" for i in range(500)))
    made = cut(corrected(60), tmp_path / "cut", Settings(replay=1.0), replay=old)
    assert made["replay"] == made["train"] == sum(row["label"] == "replay" for row in rows(tmp_path / "cut" / TRAIN))
    again = cut(corrected(60), tmp_path / "again", Settings(replay=1.0), replay=old)
    assert again["sha256"] == made["sha256"], "the same rows, the same cut"


def test_a_cut_without_labels_says_what_there_was(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row with a label: got '5 texts: 5 unrated'; collect corrections"):
        cut(labelled(kept(5), {}, {}), tmp_path / "cut", Settings())
    with pytest.raises(DataError, match="of more people"):
        cut(corrected(20, people=1), tmp_path / "cut", Settings())
    assert list(tmp_path.iterdir()) == []


def test_a_cut_that_changed_is_refused(tmp_path: Path) -> None:
    made = cut(corrected(60), tmp_path / "cut", Settings())
    assert {key: read(tmp_path / "cut")[key] for key in ("train", "sha256")} == {
        key: made[key] for key in ("train", "sha256")
    }
    with pytest.raises(DataError, match="exists"):
        cut(corrected(60), tmp_path / "cut", Settings())
    with (tmp_path / "cut" / TRAIN).open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="not what it was"):
        read(tmp_path / "cut")
    (tmp_path / "cut" / MANIFEST).unlink()
    with pytest.raises(DataError, match="is no cut"):
        read(tmp_path / "cut")


def test_who_is_forgotten_goes_from_a_cut_and_it_is_said(tmp_path: Path) -> None:
    out = tmp_path / "cut"
    made = cut(corrected(60), out, Settings())
    assert forget(out, Forgotten({"nobody"}, {"nobody"})) == [] and read(out) == json.loads(
        (out / MANIFEST).read_text()
    )
    (line,) = forget(out, Forgotten({"id-5"}, {"p3"}))
    assert "4 rows" in line
    left = rows(out / TRAIN) + rows(out / RECENT)
    assert len(left) == 56 and not {row["id"] for row in left} & {"id-3", "id-5", "id-23", "id-43"}
    first, second = made["sha256"][TRAIN], read(out)["sha256"][TRAIN]
    assert forget(out, Forgotten({"id-9"}))
    assert before(out, [name_of("p3")]) == [first] and before(out, [name_of("id-9")]) == [first, second]
    assert before(out, [name_of("nobody")]) == [] and name_of("p3") not in read(out)["persons"]
    (out / MANIFEST).unlink()
    with pytest.raises(DataError, match="is no cut"):
        forget(out, Forgotten({"id-7"}, set()))


# --- the command --------------------------------------------------------------------------------------------------------


def captured(folder: Path, texts: list[Kept], votes: list[Vote]) -> tuple[Capture, list[str]]:
    """A capture with these texts and votes (of "id-N"), and the ids that they have there."""
    capture, ids = Capture(folder, create=True), [f"chatcmpl-{number:032x}" for number in range(len(texts))]
    for name, one in zip(ids, texts, strict=True):
        choices = [{"message": {"role": "assistant", "content": one.answer}}]
        Texts(capture).put("key", one.subject, one.messages, {"id": name, "choices": choices}, {})
    for vote in votes:
        Votes(capture).put(replace(vote, id=ids[int(vote.id.removeprefix("id-"))]))
    return capture, ids


def test_votes_and_texts_of_a_capture_are_read_and_the_forgotten_are_not(tmp_path: Path) -> None:
    texts = kept(6, 3)
    texts[4] = replace(texts[4], answer="Write to ann@example.com for it.")
    votes = [Vote("id-1", "p1", rating="down"), Vote("id-1", "p1", rating="down", correction="better")]
    votes += [Vote("id-2", "p2", rating="up"), Vote("id-2", "p2")]
    votes += [Vote("id-3", "p0", correction="so"), Vote("id-3", "other", rating="down")]
    capture, ids = captured(tmp_path / "capture", texts, votes)
    assert said(capture) == {ids[1]: Said("down", "better"), ids[3]: Said("down", "so")}
    found = kept_texts(capture)
    assert [one.answer for one in found[:1]] == ["I know"] and found[1].messages == texts[1].messages
    assert [one.scrubbed for one in found] == [False, False, False, False, True, False]
    assert [one.person for one in found[:3]] == ["p0", "p1", "p2"]
    (tmp_path / "capture" / "forgotten.jsonl").write_text(f'{{"subject": "p1"}}\n{{"id": "{ids[2]}"}}\n')
    assert [one.id for one in kept_texts(capture)] == [ids[0], ids[3], ids[5]]


class Teacher(BaseHTTPRequestHandler):
    """Answers what it is asked, but for number 7, which it refuses."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        refused = "number 7?" in question
        message = {"role": "assistant", "content": f"taught: {question}"}
        answer = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}, "model": body["model"]}
        data = json.dumps({"error": "no"} if refused else answer).encode()
        self.send_response(400 if refused else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def test_the_command_with_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured(tmp_path / "capture", kept(60), [Vote("id-1", "p1", "down", correction="In box 1.")])
    words = ["curate", "--capture", str(tmp_path / "capture"), "--out", str(tmp_path / "cut"), "--json"]
    assert main([*words, "--teacher", "http://127.0.0.1:9/v1"]) == 2
    assert main(words) == 1
    assert "no row" in capsys.readouterr().err
    server = HTTPServer(("127.0.0.1", 0), Teacher)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert main([*words, "--teacher", url, "--teacher-model", "large"]) == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    told = json.loads(capsys.readouterr().out)
    assert told["train"] + told["recent"] == 59 and told["left_out"] == {"unrated": 1}
    assert told["labels"]["correction"] == 1 or told["labels"] == {"teacher": told["train"]}
    assert main(words) == 1
    assert "exists" in capsys.readouterr().err
