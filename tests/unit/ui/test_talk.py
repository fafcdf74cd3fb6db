"""The chat page's side of the conversation, without a page: history to messages, answers to Markdown, errors to one line."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from ui import talk

CARD = talk.Card("fish", 384, {"shallow": 1, "middle": 2, "full": 4}, "w8a8")


def user(*content: object) -> talk.Message:
    return {"role": "user", "content": list(content)}


def test_the_model_hears_its_own_words_and_not_what_the_page_shows() -> None:
    history = [user("hi"), talk.said("a < b", "depth full · 3 tokens")]
    assert talk.messages(history, {"text": "and?", "files": []}) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a < b"},
        {"role": "user", "content": "and?"},
    ]


def test_a_question_without_an_answer_is_left_out() -> None:
    history = [user("too long"), talk.fault(openai.APIConnectionError(request=httpx.Request("POST", "http://x")))]
    assert talk.messages(history, {"text": "short"}) == [{"role": "user", "content": "short"}]


def test_pictures_go_as_data_urls_before_the_text_in_both_forms_that_gradio_uses(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"png")
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    wanted = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    assert talk.messages([], {"text": "what?", "files": [str(path)]})[0]["content"] == wanted
    after = user({"type": "file", "file": {"path": str(path)}}, {"type": "text", "text": "what?"})
    assert talk.messages([after], {"text": "x"})[0]["content"] == wanted
    assert talk.messages([], {"text": "", "files": [str(path)]})[0]["content"] == wanted[:1]


def test_what_somebody_types_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    assert talk.messages([user(str(secret))], {"text": str(secret)}) == [
        {"role": "user", "content": str(secret)},
        {"role": "user", "content": str(secret)},
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b & c", "a &lt; b &amp; c"),
        ("<b>bold</b>", "&lt;b&gt;bold&lt;/b&gt;"),
        ("def f(x):\n    return x", "```python\ndef f(x):\n    return x\n```"),
        ("see:\n```\nx < y\n```", "see:\n```\nx < y\n```"),
    ],
)
def test_an_answer_is_shown_as_it_is(text: str, shown: str) -> None:
    assert talk.markdown(text) == shown


def test_the_facts_below_an_answer() -> None:
    usage = SimpleNamespace(completion_tokens=24, model_extra={"depth": "middle"})
    assert talk.facts(usage, CARD, first=0.5, total=2.8) == (
        "depth middle (2 of 4 layers) · 24 tokens · 10 tokens/s · first after 0.50 s"
    )
    usage = SimpleNamespace(completion_tokens=1, model_extra={"depth": "full"})
    assert talk.facts(usage, CARD, 0.1, 0.1) == "depth full (4 of 4 layers) · 1 token · first after 0.10 s"


def test_an_error_is_the_api_s_own_sentence_with_what_to_do_here() -> None:
    body = {"message": "15 tokens do not fit", "code": "context_length_exceeded"}
    response = httpx.Response(400, request=httpx.Request("POST", "http://x"))
    line = talk.reason(openai.BadRequestError("Error code: 400", response=response, body=body))
    assert line == "15 tokens do not fit. Clear the chat to start anew, or ask for fewer tokens."
