"""What stands in the bubbles of a conversation: a state of an answer as a message of the page, and the page's messages as the
API's.

Notable: what the page shows of an answer is Markdown made of it, with a line of facts below; the answer itself rides along
in the message's metadata, and is what the model is told that it said.
"""

from __future__ import annotations

import base64
import html
import json
import mimetypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ui.talk import Message, Said
from ui.words import markdown

FAULT = "fault"  # `id` in the metadata of a message that says why there is no answer
# stands for one that this server does not have (`uploads.Uploads.own`)
LOST_PICTURE = Path(__file__).parent / "lost.png"
MARK = "\x1e"  # before and after the calls in what rides along with an answer
PICTURE = "[picture]"  # what the model is told instead
ID = re.compile(r"[\w.:-]{1,100}")  # of an answer
_GROUP = re.compile(r'<div class="votes( kept)? answer-([\w.:-]{1,100})" role="group">.*?</div>')


def messages(history: Iterable[Message], new: Message, system: str = "") -> list[Message]:
    """The API's messages for what the page shows and the textbox's `new` ({"text", "files"}); a question that got no answer
    is left out. `system` comes first, if there is one."""
    return conversation([*history, {"role": "user", "content": _parts(new)}], system)


def conversation(shown: Iterable[Message], system: str = "") -> list[Message]:
    """The API's messages for what the page shows, of which the last is the question."""
    asked: list[Message] = []
    for message in shown:
        metadata = message.get("metadata") or {}
        if asked and asked[-1]["role"] == "user" and (message["role"] == "user" or metadata.get("id") == FAULT):
            asked.pop()  # it got no answer
        if message["role"] == "user":
            asked.append({"role": "user", "content": _content(message["content"])})
        elif metadata.get("id") != FAULT:
            asked += told(metadata.get("log", ""))
    return [*([{"role": "system", "content": system}] if system else []), *asked]


def first(shown: Iterable[Message]) -> str:
    """The words of the first question that the page shows."""
    content = next((one["content"] for one in shown if one["role"] == "user"), "")
    return "\n".join(filter(None, map(_text, content if isinstance(content, list) else [content])))


def lacks_picture(message: Message) -> bool:
    """Whether a message of the page has a picture that this server does not have."""
    return any(not isinstance(part, str) and _path(part) == str(LOST_PICTURE) for part in message["content"])


def said(state: Said) -> Message:
    """A state as a message of the page: the answer, with a line of facts below it, or why there is no more of it, or none."""
    if not state.text and state.fault:
        return faulty(state.fault)
    if not state.text and not state.whole and not state.before:
        what = (
            "The service takes no question now, and is asked again" if state.refused else "Waiting for the first word"
        )
        return none_yet(_idle(what, state.waits or 0.0))
    parts = [{"type": "text", "text": looked_up(state.before) + markdown(state.text)}]
    below = beneath(state)
    if below and state.id:
        below += votes(state.id, kept=state.kept)
    if below:
        parts.append({"type": "text", "text": below})
    return {"role": "assistant", "content": parts, "metadata": {"log": logged(state.text, state.before)}}


def looked_up(before: Iterable[Message]) -> str:
    """Calls and what they gave, as markup above an answer; empty without any."""
    rows = []
    for message in before:
        if message["role"] == "tool":
            rows.append(f'<div class="given">{html.escape(message["content"])}</div>')
        for call in message.get("tool_calls") or ():
            one = call["function"]
            rows.append(f'<div class="call">{html.escape(one["name"])} {html.escape(one["arguments"])}</div>')
    # in one line: Markdown would make paragraphs of several
    return f'<div class="lookup">{"".join(rows)}</div>\n\n'.replace("`", "&#96;") if rows else ""


def logged(text: str, before: Iterable[Message]) -> str:
    """An answer with the calls before it, as it rides along with a message of the page."""
    some = list(before)
    return f"{MARK}{json.dumps(some)}{MARK}{text}" if some else text.lstrip(MARK)


def told(log: str) -> list[Message]:
    """What `logged` made as messages of the API, the answer last. From a browser may come anything: what is no call and no
    result is left out."""
    if not log.startswith(MARK):
        return [{"role": "assistant", "content": log}]
    calls, _, text = log[1:].partition(MARK)
    try:
        some = json.loads(calls)
    except (ValueError, RecursionError):
        some = []
    before = [one for one in some if _is_call(one) or _is_result(one)] if isinstance(some, list) else []
    return [*before, {"role": "assistant", "content": text}]


def _is_call(one: Any) -> bool:
    if not (isinstance(one, dict) and one.get("role") == "assistant" and isinstance(one.get("tool_calls"), list)):
        return False
    functions = [call.get("function") for call in one["tool_calls"] if isinstance(call, dict)]
    texts = [function.get(key) for function in functions if isinstance(function, dict) for key in ("name", "arguments")]
    return len(texts) == 2 * len(one["tool_calls"]) > 0 and all(isinstance(text, str) for text in texts)


def _is_result(one: Any) -> bool:
    texts = (
        (one.get("content"), one.get("tool_call_id")) if isinstance(one, dict) and one.get("role") == "tool" else (0,)
    )
    return all(isinstance(text, str) for text in texts)


def votes(id_: str, *, kept: bool) -> str:
    """What stands below the answer `id_`, as markup; `kept`: so are its texts, and a better answer can be learned from."""
    if not ID.fullmatch(id_):
        return ""
    # of classes and titles, since Gradio lets no other attributes through; `vote.js` adds those for readers of the screen
    return (
        f'<div class="votes{" kept" if kept else ""} answer-{html.escape(id_)}" role="group">'
        '<button type="button" class="up" title="Good answer"></button>'
        '<button type="button" class="down" title="Bad answer"></button>'
        '<button type="button" class="better">Write the better answer</button>'
        '<span class="told" role="status"></span></div>'
    )


def without_votes(markup: str) -> tuple[str, dict[str, Any]]:
    """`markup` without buttons, and of which answer they were: `id`, and whether it is `kept`."""
    found = _GROUP.search(markup)
    if found is None:
        return markup, {}
    return markup.replace(found[0], ""), {"id": found[2], "kept": found[1] is not None}


def fault(line: str) -> str:
    """Why something is not there, as markup."""
    return f'<div class="fault" role="alert">{html.escape(line)}</div>'


def note(line: str) -> str:
    """What happened to an answer, as markup."""
    return f'<div class="facts">{html.escape(line)}</div>'


def beneath(state: Said) -> str:
    """The line below an answer as markup; empty for none. While an answer comes its line is hidden, and when it is stopped, it
    stays and is shown (`style.css`, `chat.js`)."""
    if state.fault:
        return fault(state.fault)
    kind = "facts" if state.whole else "sofar"
    below = f'<div class="{kind}">{html.escape(state.below)}</div>' if state.below else ""
    return below + (_idle("No further word", state.waits) if state.waits else "")


def _idle(what: str, seconds: float) -> str:
    """For how long nothing came; who hears the page is not told every second."""
    return f'<div class="waiting">{what}<span aria-hidden="true">, {seconds:.0f} s</span></div>'


def faulty(why: str) -> Message:
    """Why there is no answer, in one line, as a message of the page."""
    return none_yet(fault(why))


def none_yet(markup: str) -> Message:
    """A message of the page that says what is with the answer, and is none."""
    return {"role": "assistant", "content": [{"type": "text", "text": markup}], "metadata": {"id": FAULT}}


def _parts(new: Message) -> list[Any]:
    return [*({"path": file} for file in new.get("files") or []), new.get("text") or ""]


def _content(content: Any) -> str | list[Message]:
    """A user's content in either of Gradio's forms as the API's: plain text, or images as data URLs and then text."""
    items = content if isinstance(content, list) else [content]
    text = "\n".join(filter(None, map(_text, items)))
    images: list[Message] = [
        {"type": "image_url", "image_url": {"url": _data_url(path)}}
        for path in map(_path, items)
        if path not in ("", str(LOST_PICTURE))
    ]
    if not images:
        return text
    return [*images, {"type": "text", "text": text}] if text else images


def _text(item: Any) -> str:
    if isinstance(item, str):
        return item
    return PICTURE if _path(item) == str(LOST_PICTURE) else item.get("text", "")


def _path(item: Any) -> str:
    """Of a file; empty for text. A string is always text: what somebody types is never opened."""
    return "" if isinstance(item, str) else item.get("path") or item.get("file", {}).get("path", "")


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
