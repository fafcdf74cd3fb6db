"""Conversations kept by the browser: what goes in comes out, and what a browser made up comes to nothing."""

from __future__ import annotations

import json
import re

import gradio as gr
import pytest

from ui import bubbles, history, talk
from ui.app import build
from ui.assistants import ASSISTANTS
from ui.talk import Said

SHOWN = [
    {"role": "user", "content": [{"type": "text", "text": "a < b?"}]},
    bubbles.said(Said("yes & no", "depth full · 3 tokens", whole=True)),
]


def test_a_conversation_comes_back_as_it_was_shown() -> None:
    chats = history.save([], "a", SHOWN)
    assert history.load(json.loads(json.dumps(chats)), "a") == SHOWN
    assert bubbles.messages(history.load(chats, "a"), {"text": "and?"})[:2] == [
        {"role": "user", "content": "a < b?"},
        {"role": "assistant", "content": "yes & no"},
    ]


def test_an_answer_replaces_the_conversation_it_belongs_to_and_a_new_one_comes_first() -> None:
    chats = history.save([], "a", SHOWN)
    chats = history.save(chats, "a", SHOWN + SHOWN)
    assert len(chats) == 1 and len(history.load(chats, "a")) == 4
    chats = history.save(chats, "b", SHOWN)
    assert [key for _, key in history.titles(chats)] == ["b", "a"]
    assert history.save(chats, "b", []) == chats[1:]  # cleared
    assert history.new_key() != history.new_key()


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    chats: list[history.Chat] = []
    for number in range(history.MOST_CHATS + 3):
        chats = history.save(chats, str(number), SHOWN)
    assert len(chats) == history.MOST_CHATS
    monkeypatch.setattr(history, "MOST_CHARACTERS", 30)
    assert len(history.save(chats, "new", SHOWN)) == 2  # of 14 characters each


def test_pictures_are_not_kept_and_no_file_can_be_named() -> None:
    shown = [
        {
            "role": "user",
            "content": [{"type": "file", "file": {"path": "/etc/passwd"}}, {"type": "text", "text": "see"}],
        }
    ]
    chats = history.save([], "a", shown)
    assert "passwd" not in json.dumps(chats)
    assert history.load(chats, "a")[0] == {"role": "user", "content": [{"type": "text", "text": "[picture]\nsee"}]}


def test_of_which_answer_a_vote_is_comes_back_and_a_made_up_one_does_not() -> None:
    shown = [SHOWN[0], bubbles.said(Said("yes", "depth full", whole=True, id="chatcmpl-1", kept=True))]
    chats = history.save([], "a", shown)
    assert "Write the better answer" not in json.dumps(chats) and history.load(chats, "a") == shown
    assert ' kept answer-chatcmpl-1"' in shown[1]["content"][1]["text"]
    for wrong in ('1" onclick="x', "a b", "", 7, None, ["a"]):
        chats[0]["messages"][1]["id"] = wrong
        assert "votes" not in json.dumps(history.load(chats, "a")), wrong


def line(message: talk.Message) -> str:
    return re.sub("<[^>]*>", "", message["content"][-1]["text"])


def test_what_a_page_was_left_with_is_not_said_to_have_been_stopped() -> None:
    """As `chat.js` marks an answer that the user has stopped."""
    asked = {"role": "user", "content": [{"type": "text", "text": "Go on."}]}
    coming = bubbles.said(Said("Well", "depth full · 1 token · first after 0.10 s, stopped after 1.20 s", waits=7.0))
    stopped = json.loads(json.dumps(coming).replace('sofar\\"', 'sofar stopped\\"'))
    waiting = bubbles.said(Said("", waits=4.0))
    loaded = [history.load(history.save([], "a", [asked, answer]), "a")[1] for answer in (coming, stopped, waiting)]
    assert line(loaded[0]) == (
        "depth full · 1 token · first after 0.10 s, cut off after 1.20 s, when the page was left"
    )
    assert line(loaded[1]).endswith("first after 0.10 s, stopped after 1.20 s")
    assert line(loaded[2]) == "The page was left before the first word."
    assert line(history.load(history.save([], "a", [asked]), "a")[1]) == "The page was left before the first word."
    assert bubbles.conversation([*history.load(history.save([], "a", [asked]), "a"), asked]) == [
        {"role": "user", "content": "Go on."}
    ], "a question without an answer is not heard"


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "x",
        [1],
        [{"id": "a"}],
        [{"id": "a", "messages": []}],
        [{"id": "a", "messages": [{"role": "user", "text": {"path": "/etc/passwd"}, "below": ""}]}],
        [{"id": "a", "messages": [{"role": "system", "text": "x", "below": ""}]}],
        [{"id": 1, "messages": [{"role": "user", "text": "x", "below": ""}]}],
    ],
)
def test_what_is_no_conversation_is_left_out(stored: object) -> None:
    assert history.checked(stored) == [] and history.load(stored, "a") == [] and history.titles(stored) == []


def test_markup_in_what_comes_back_is_shown_and_not_obeyed() -> None:
    stored = [{"id": "a", "messages": [{"role": "assistant", "text": "<img src=x>", "below": "<script>"}]}]
    text = json.dumps(history.load(stored, "a")[0]["content"])
    assert "<img" not in text and "<script" not in text


def test_the_export_reads_well_and_trains_well() -> None:
    shown = [*SHOWN, {"role": "user", "content": "lost"}, bubbles.faulty("the server is gone")]
    assert history.as_markdown(SHOWN) == "**You**\n\na < b?\n\n**Shoal**\n\nyes & no\n\n*depth full · 3 tokens*\n"
    assert json.loads(history.as_json(shown, "Be kind."))["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a < b?"},
        {"role": "assistant", "content": "yes & no"},
    ]


def test_what_is_saved_comes_from_the_page_as_it_stood_at_one_moment() -> None:
    """A key that the server remembers may be that of a conversation which the page shows only later: it would lose its text."""
    url = "http://127.0.0.1:9/v1"  # where nothing answers
    pages = build(url, None, "/ui", talk.client(url))
    saves = [event for event in pages.fns.values() if event.name == "save"]
    assert len(saves) == len(ASSISTANTS)
    assert not any(isinstance(given, gr.State) for event in saves for given in event.inputs)
