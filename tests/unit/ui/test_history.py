"""Conversations kept by the browser: what goes in comes out, and what a browser made up comes to nothing."""

from __future__ import annotations

import json
import re

import pytest

from ui import bubbles, history, talk
from ui.talk import Said

SHOWN = [
    {"role": "user", "content": [{"type": "text", "text": "a < b?"}]},
    bubbles.said(Said("yes & no", "depth full · 3 tokens", whole=True)),
]


def again(shown: list[talk.Message]) -> list[talk.Message]:
    return history.load(history.made("a", shown))


def test_a_conversation_comes_back_as_it_was_shown() -> None:
    assert again(SHOWN) == SHOWN and json.loads(history.made("a", SHOWN))["id"] == "a"
    assert bubbles.messages(again(SHOWN), {"text": "and?"})[:2] == [
        {"role": "user", "content": "a < b?"},
        {"role": "assistant", "content": "yes & no"},
    ]
    assert again([]) == []


def test_pictures_are_not_kept_and_no_file_can_be_named() -> None:
    shown = [
        {
            "role": "user",
            "content": [{"type": "file", "file": {"path": "/etc/passwd"}}, {"type": "text", "text": "see"}],
        }
    ]
    assert "passwd" not in history.made("a", shown)
    assert again(shown)[0] == {"role": "user", "content": [{"type": "text", "text": "[picture]\nsee"}]}


def test_of_which_answer_a_vote_is_comes_back_and_a_made_up_one_does_not() -> None:
    shown = [SHOWN[0], bubbles.said(Said("yes", "depth full", whole=True, id="chatcmpl-1", kept=True))]
    kept = history.made("a", shown)
    assert "Write the better answer" not in kept and history.load(kept) == shown
    assert ' kept answer-chatcmpl-1"' in shown[1]["content"][1]["text"]
    for wrong in ('1" onclick="x', "a b", "", 7, None, ["a"]):
        chat = json.loads(kept)
        chat["messages"][1]["id"] = wrong
        assert "votes" not in json.dumps(history.load(json.dumps(chat))), wrong


def line(message: talk.Message) -> str:
    return re.sub("<[^>]*>", "", message["content"][-1]["text"])


def test_what_a_page_was_left_with_is_not_said_to_have_been_stopped() -> None:
    """As `chat.js` marks an answer that the user has stopped."""
    asked = {"role": "user", "content": [{"type": "text", "text": "Go on."}]}
    coming = bubbles.said(Said("Well", "depth full · 1 token · first after 0.10 s, stopped after 1.20 s", waits=7.0))
    stopped = json.loads(json.dumps(coming).replace('sofar\\"', 'sofar stopped\\"'))
    waiting = bubbles.said(Said("", waits=4.0))
    loaded = [again([asked, answer])[1] for answer in (coming, stopped, waiting)]
    assert line(loaded[0]) == (
        "depth full · 1 token · first after 0.10 s, cut off after 1.20 s, when the page was left"
    )
    assert line(loaded[1]).endswith("first after 0.10 s, stopped after 1.20 s")
    assert line(loaded[2]) == "The page was left before the first word."
    assert line(again([asked])[1]) == "The page was left before the first word."
    assert bubbles.conversation([*again([asked]), asked]) == [{"role": "user", "content": "Go on."}], (
        "a question without an answer is not heard"
    )


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "x",
        [],
        7,
        "[1]",
        "{}",
        '{"id": "a", "messages": []}',
        '{"id": "a", "messages": [{"role": "user", "text": {"path": "/etc/passwd"}, "below": ""}]}',
        '{"id": "a", "messages": [{"role": "system", "text": "x", "below": ""}]}',
        '{"id": 1, "messages": [{"role": "user", "text": "x", "below": ""}]}',
    ],
)
def test_what_is_no_conversation_is_left_out(stored: object) -> None:
    assert history.load(stored) == []


def test_markup_in_what_comes_back_is_shown_and_not_obeyed() -> None:
    stored = {"id": "a", "messages": [{"role": "assistant", "text": "<img src=x>", "below": "<script>"}]}
    text = json.dumps(history.load(json.dumps(stored))[0]["content"])
    assert "<img" not in text and "<script" not in text


def test_the_export_reads_well_and_trains_well() -> None:
    shown = [*SHOWN, {"role": "user", "content": "lost"}, bubbles.faulty("the server is gone")]
    assert history.as_markdown(SHOWN) == "**You**\n\na < b?\n\n**Shoal**\n\nyes & no\n\n*depth full · 3 tokens*\n"
    assert json.loads(history.as_json(shown, "Be kind."))["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a < b?"},
        {"role": "assistant", "content": "yes & no"},
    ]
