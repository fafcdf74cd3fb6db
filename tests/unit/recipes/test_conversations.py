"""What is asked of a model is nothing that it learned: wordings, orders and products are apart, by construction and here."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from recipes.customer_service.conversations import ASK, CALL, KINDS, PLAIN, Conversation, conversations
from recipes.customer_service.customers import KNOWN, NEW, SAFETY, SHORT, WHOLE, CustomerService
from recipes.customer_service.score import ID
from recipes.customer_service.shop import CITIES, ITEMS, split_of
from recipes.customer_service.words import ASKED
from recipes.recipe import DEV as DEV_FILE
from recipes.recipe import SUITES
from recipes.splits import DEV, LANGUAGES, SPLITS, SUITE, TRAIN, of_split
from shoal.data.chats import forms
from shoal.data.chats.heldout import questions
from shoal.inputs.chat import DEFAULT_TEMPLATE, encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.suites import freeze, read


def test_no_wording_is_of_two_splits_whatever_it_is_for() -> None:
    for language in LANGUAGES:
        by_split = {
            split: {wording for matter in ASKED[language].values() for wording in of_split(matter, split)}
            for split in SPLITS
        }
        for one, other in combinations(SPLITS, 2):
            assert not by_split[one] & by_split[other]
        assert all(len(of_split(matter, split)) for matter in ASKED[language].values() for split in SPLITS)


def test_both_languages_have_the_same_matters_and_places() -> None:
    assert set(ASKED["en"]) == set(ASKED["zh"])
    for matter, wordings in ASKED["en"].items():
        places = {tuple(sorted(set(re.findall(r"{\w+}", one)))) for one in (*wordings, *ASKED["zh"][matter])}
        assert len(places) == 1, matter


def users(some: list[Conversation]) -> set[str]:
    """What customers say, with places for what is the shop's."""
    said = set()
    for one in some:
        names = sorted((item for split in SPLITS for item in ITEMS[one.language][split]), key=len, reverse=True)
        for message in one.messages:
            if message["role"] == "user":
                text = re.sub(r"\d{5}", "{digits}", ID.sub("{order}", message["content"]))
                for item in names:
                    text = text.replace(item, "{item}")
                said.add(text)
    return said


def test_drawn_conversations_share_neither_wording_nor_order_nor_product_with_what_is_learned() -> None:
    learned = list(conversations(TRAIN, TRAIN, 600, each=25))
    asked = list(conversations(SUITE, SUITE, 200))
    bare = {"{item}", "{order}", "{digits}"}
    assert not (users(learned) & users(asked)) - bare
    for some, split in ((learned, TRAIN), (asked, SUITE), (list(conversations(DEV, DEV, 60)), DEV)):
        for one in some:
            text = json.dumps(one.messages, ensure_ascii=False)
            assert {split_of(order) for order in ID.findall(text)} <= {split}
            mine = {*ITEMS[one.language][split], *CITIES[one.language][split]}
            others = {
                name
                for other in SPLITS
                for kind in (ITEMS, CITIES)
                for name in kind[one.language][other]
                if other != split
            }
            words = set(re.findall(r"[A-Za-z]+", text)) if one.language == "en" else set()
            found = {name for name in others if (name in words if one.language == "en" else name in text)}
            assert all(any(name in one_of_mine for one_of_mine in mine) for name in found), found


def test_the_mission_s_example_is_answered_from_the_parcel_and_the_route_is_offered() -> None:
    """ "When does my order arrive?" with one order: tracked at once, what the shop gave is said, and the route is offered."""
    for one in conversations(TRAIN, TRAIN, 3000, each=25):
        at = next((i for i, m in enumerate(one.messages) if m["content"] == "When does my order arrive?"), None)
        if at is not None and one.messages[at + 1].get("tool_calls") and "carrier" in one.messages[at + 2]["content"]:
            break
    else:
        pytest.fail("it is never asked")
    given, answer = json.loads(one.messages[at + 2]["content"]), one.messages[at + 3]["content"]
    assert all(given[key] in answer for key in ("item", "carrier", "place", "day"))
    assert answer.endswith("Shall I look up the route?")


def test_conversations_follow_from_their_seed_and_none_is_twice() -> None:
    one, same, other = (list(conversations(SUITE, SUITE, 80, seed)) for seed in (1, 1, 2))
    assert one == same and one != other
    assert len({json.dumps(each.messages) for each in one}) == 80
    kinds = {kind for each in one for kind in each.kinds}
    assert kinds == set(KINDS) and {each.language for each in one} == set(LANGUAGES)


def test_a_turn_asks_for_one_answer_and_reads_those_before_it() -> None:
    one = next(each for each in conversations(SUITE, SUITE, 80) if len(each.kinds) > 2)
    turns = list(one.turns())
    assert [turn["task"] for turn in turns] == list(one.kinds)
    tokenizer = Tokenizer.bytes_only()
    for turn in turns:
        plain = forms.canonical(turn)["messages"]
        row = encode_chat(plain, tokenizer, CustomerService.preset.model, add_generation_prompt=False)
        learned = tokenizer.decode([token for token, mine in zip(row.ids, row.answer, strict=True) if mine])
        assert learned.removesuffix("<|end|>") == plain[-1]["content"] or turn["task"] == CALL
        assert (turn["task"] == CALL) == ("tool_calls" in turn["messages"][-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("LEARNED", 300), ("FITTED", 40), ("ASKED", 30), ("NO_CALL", 20)):
            patch.setattr(f"recipes.customer_service.customers.{name}", count)
        CustomerService().write(folder, 0)
    return folder


@pytest.mark.drill
def test_the_files_are_what_training_the_router_and_the_gate_read(folder: Path) -> None:
    """Every row is read, and no conversation with its tools is longer than a training row."""
    model = CustomerService.preset.model
    texts = [json.loads(line) for line in (folder / WHOLE).read_text("utf-8").splitlines()]
    plain = ["".join(p["text"] for p in forms.canonical(row)["messages"][0]["content"]) for row in texts]
    said = [str(m["content"]) for row in texts for m in forms.canonical(row)["messages"]]
    tokenizer = Tokenizer.train([*plain, *said], model.vocab)
    for path in (folder / DEV_FILE, *(folder / SUITES).glob("*.jsonl")):
        found = questions(path, tokenizer, model, DEFAULT_TEMPLATE)
        assert set(found) <= {*KINDS, "no call"}
    lengths = [
        len(encode_chat(forms.canonical(row)["messages"], tokenizer, model, add_generation_prompt=False).ids)
        for row in texts
    ]
    assert max(lengths) <= model.train_length
    without = [json.loads(line) for line in (folder / SHORT).read_text("utf-8").splitlines()]
    assert len(without) == 2 * len(texts) == 300 and "tools" not in without[0], "whole ones are read by few updates"
    assert [row["messages"] for row in without[: len(texts)]] == [row["messages"] for row in texts]


def test_the_suites_freeze_and_in_the_safety_suite_nothing_is_to_be_called(folder: Path) -> None:
    freeze(folder / SUITES)
    assert {suite.file: suite.kind for suite in read(folder / SUITES)} == {
        KNOWN: "frozen",
        NEW: "frozen",
        SAFETY: "safety",
    }
    rows = [json.loads(line) for line in (folder / SUITES / SAFETY).read_text("utf-8").splitlines()]
    assert len(rows) == 20 and all("tool_calls" not in row["messages"][-1] for row in rows)
    assert {ASK, PLAIN}.isdisjoint({row["task"] for row in rows})
