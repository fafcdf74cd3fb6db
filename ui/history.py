"""Conversations as the browser keeps them (`kept.js`): text only. Also how one is exported.

What comes back from a browser may be anything, and a page's message can name a file of this machine: so `load` makes messages
anew, of text alone. Pictures are not kept.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

from ui import bubbles
from ui.talk import Message, Said

STORED_AS = "shoal"  # the browser encrypts with it, so that a restart of the server can still read; it hides nothing

LEFT = "The page was left before the first word."

_TAG = re.compile(r"<[^>]*>")
_WAITING = re.compile(r'<div class="waiting">.*?</div>')
_SO_FAR = '<div class="sofar">'  # of an answer that comes; `chat.js` marks one that was stopped


def made(key: str, shown: Iterable[Message]) -> str:
    """What the page shows as a conversation with `key`, in JSON for `kept.js`."""
    return json.dumps({"id": key, "messages": [_plain(message) for message in shown]})


def load(stored: Any) -> list[Message]:
    """The messages of a conversation in JSON, as `made` gives it, for the page; none where it is no such thing."""
    try:
        chat = json.loads(stored)
    except (TypeError, ValueError):
        return []
    kept = chat["messages"] if _is_chat(chat) else []
    shown: list[Message] = []
    for number, message in enumerate(kept):
        shown.append(_shown(message))
        if message["role"] == "user" and all(after["role"] == "user" for after in kept[number + 1 : number + 2]):
            shown.append(bubbles.none_yet(bubbles.note(LEFT)))
    return shown


def as_markdown(shown: Iterable[Message]) -> str:
    lines = []
    for message in map(_plain, shown):
        text = _answer(message["text"])
        who = "You" if message["role"] == "user" else "Shoal"
        below = f"\n\n*{message['below']}*" if message["below"] else ""
        lines.append(f"**{who}**\n\n{text}{below}\n")
    return "\n".join(lines)


def as_json(shown: Iterable[Message], system: str) -> str:
    """In the form of a fine-tuning row: ``{"messages": [{"role", "content"}...]}``; questions without an answer left out."""
    messages = [{"role": "system", "content": system}] if system else []
    for message in map(_plain, shown):
        if message["fault"]:
            del messages[-1:]
        else:
            said = bubbles.told(message["text"]) if message["role"] == "assistant" else []
            messages += said or [{"role": message["role"], "content": message["text"]}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _plain(message: Message) -> Message:
    metadata = message.get("metadata") or {}
    parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
    texts = [part if isinstance(part, str) else part.get("text", bubbles.PICTURE) for part in parts]
    if message["role"] == "user":
        return {"role": "user", "text": "\n".join(texts), "below": "", "fault": False}
    if metadata.get("id") == bubbles.FAULT:
        coming, error = bool(_WAITING.match(texts[0])), texts[0].startswith('<div class="fault"')
        said = LEFT if coming else _bare(texts[0])
        return {"role": "assistant", "text": said, "below": "", "fault": True, "error": error}
    markup, of = bubbles.without_votes(texts[1] if len(texts) > 1 else "")
    below = _bare(_WAITING.sub("", markup))
    if markup.startswith(_SO_FAR):  # a page that is still there when the answer ends writes that
        below = below.replace(", stopped after ", ", cut off after ") + ", when the page was left"
    return {"role": "assistant", "text": metadata.get("log", ""), "below": below, "fault": False, **of}


def _shown(message: Message) -> Message:
    if message["role"] == "user":
        return {"role": "user", "content": [{"type": "text", "text": message["text"]}]}
    if message.get("fault"):
        return (
            bubbles.faulty(message["text"])
            if message.get("error", True)
            else bubbles.none_yet(bubbles.note(message["text"]))
        )
    id_, kept = message.get("id"), message.get("kept") is True
    known = id_ if isinstance(id_, str) and bubbles.ID.fullmatch(id_) else ""
    *before, last = bubbles.told(message["text"])
    return bubbles.said(Said(last["content"], message["below"], whole=True, id=known, kept=kept, before=tuple(before)))


def _answer(text: str) -> str:
    """The words of an answer, without calls before it."""
    return str(bubbles.told(text)[-1]["content"])


def _bare(markup: str) -> str:
    return html.unescape(_TAG.sub("", markup))


def _is_chat(chat: Any) -> bool:
    return (
        isinstance(chat, dict)
        and isinstance(chat.get("id"), str)
        and isinstance(chat.get("messages"), list)
        and bool(chat["messages"])
        and all(
            isinstance(message, dict)
            and message.get("role") in ("user", "assistant")
            and isinstance(message.get("text"), str)
            and isinstance(message.get("below"), str)
            for message in chat["messages"]
        )
    )
