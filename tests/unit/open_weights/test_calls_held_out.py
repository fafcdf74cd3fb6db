"""Held-out chats that end with calls, or with answers of weight 0: what is asked, and what it is measured by."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.data.chats.heldout import Question, questions
from shoal.errors import DataError
from tests.unit.open_weights.taught import TOOLS, jinja, served, tokenizer
from tests.unit.open_weights.test_call_formats import ASK, FAMILIES, offer, read, rendered
from tests.unit.open_weights.test_calls_of_one_message import SHOWN_ALIKE, call, gave, rows, said


def asked(family: str, path: Path) -> Question:
    its = served(family)
    (question,) = questions(path, its.tokenizer, its.config, its.chat_template)["chat"]
    return question


@pytest.mark.parametrize("family", SHOWN_ALIKE)
def test_a_chat_asks_for_the_last_answer_that_is_learned(family: str, tmp_path: Path) -> None:
    """One of weight 0 is no reference, whether it is a call or a text; nor is it part of the row."""
    its, look = served(family), call("look", "abcdefghi", "{}")
    first = [ASK, said("", look), gave("abcdefghi", "two")]
    prompt = rendered(family, first, TOOLS)
    for more in (
        [],
        [ASK, said("", call("add_fish", "bcdefghij", '{"n": 1}'), weight=0)],
        [ASK, said("No.", weight=0)],
    ):
        question = asked(family, rows(tmp_path / "rows.jsonl", [*first, said("Two."), *more]))
        assert (question.prompt.ids, question.reference) == (prompt, "Two.")
        assert "Two." in its.tokenizer.decode(question.row.ids) and "No." not in its.tokenizer.decode(question.row.ids)
    question = asked(family, rows(tmp_path / "rows.jsonl", [*first, said("Two.", weight=0)]))
    assert question.prompt.ids == rendered(family, [ASK], TOOLS)
    assert read(offer(family).reader(), [question.reference])[1] == [("look", {})]
    with pytest.raises(DataError, match="no answer"):
        asked(family, rows(tmp_path / "rows.jsonl", [ASK, said("", look, weight=0)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_calls_that_are_messages_of_their_own_the_first_is_asked_for(family: str, tmp_path: Path) -> None:
    calls = [call("look", "abcdefghi", "{}"), call("add_fish", "bcdefghij", '{"n": 1}')]
    question = asked(family, rows(tmp_path / "rows.jsonl", [ASK, said("", *calls)]))
    assert question.prompt.ids == rendered(family, [ASK], TOOLS)
    wanted = [("look", {}), ("add_fish", {"n": 1})]
    form = tokenizer(family).calls
    assert form is not None
    assert read(offer(family).reader(), [question.reference])[1] == (wanted[:1] if form.one else wanted)


def test_a_call_that_the_template_does_not_show_as_an_answer_is_refused_with_its_line(tmp_path: Path) -> None:
    its = served("qwen2")
    template = jinja("qwen2").replace("{%- if add_generation_prompt %}", "{%- if add_generation_prompt %}Now: ")
    chat = [ASK, said("Well."), ASK, said("", call("look", "a", "{}"))]
    path = rows(tmp_path / "rows.jsonl", chat)
    with pytest.raises(DataError, match="line 1"):
        questions(path, its.tokenizer, its.config, template)
