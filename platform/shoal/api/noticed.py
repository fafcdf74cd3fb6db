"""What a policy puts to the answer of one request, streamed or not, in any protocol: before what the model says, so that what
was said when a stream broke has it as well.

    text    notice, then what raised flags call for, an empty line, and the answer
    JSON    a guided object is sent when it is whole: `notice` first, the urgency raised, the flags named
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shoal.api.bodies import ChatRequest, GenerationRequest, Message, TextPart
from shoal.api.calls import Delta, Reader
from shoal.api.policy import Policy, Raised, language_of
from shoal.api.served import ServedModel
from shoal.engine.events import Guide

NOTICE = "notice"  # field of a JSON answer


class Notice:
    """What is to be put before the answer to what `said`."""

    def __init__(self, policy: Policy, said: Iterable[str]) -> None:
        """`said`: all that who asks has said, the last thing last."""
        texts, urgency = list(said), policy.urgency
        self._policy = policy
        self._language = language_of(texts[-1]) if texts else "en"
        self.raised: Sequence[Raised] = urgency.found("\n\n".join(texts)) if urgency else ()

    @property
    def text(self) -> str:
        """Before an answer in words."""
        lines, urgency = [_in(self._policy.notice, self._language)], self._policy.urgency
        if urgency is not None and (least := urgency.least(self.raised)) is not None:
            words = ", ".join(one.words for one in self.raised if one.flag.level == least)
            lines.append(_in(urgency.told[least], self._language).replace("{words}", words))
        return "\n".join(lines) + "\n\n"

    def of_json(self, text: str) -> str:
        """An answer that is an object, with what is put to it; any other text behind the words."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            return self.text + text
        return _written(self.of_object(found)) or self.text + text

    def of_object(self, answer: dict[str, Any]) -> dict[str, Any]:
        put: dict[str, Any] = {NOTICE: _in(self._policy.notice, self._language)}
        urgency = self._policy.urgency
        if urgency is not None and self.raised:
            told = answer.get(urgency.red_flags)
            names = [*(told if isinstance(told, list) else ()), *(one.flag.name for one in self.raised)]
            put[urgency.field] = urgency.higher(answer.get(urgency.field), urgency.least(self.raised))
            put[urgency.red_flags] = [name for at, name in enumerate(names) if name not in names[:at]]
        return {NOTICE: put[NOTICE], **answer, **put}


class Noticed(Reader):
    """Another reader's deltas, with a notice put to them. `whole`: the answer is a guided object."""

    def __init__(self, inner: Reader, notice: Notice, *, whole: bool) -> None:
        self._inner, self._notice, self._whole = inner, notice, whole
        self._begun, self._held = False, ""

    def push(self, text: str) -> list[Delta]:
        return self._put(self._inner.push(text))

    def meant(self, said: str) -> bool:
        return self._inner.meant(said.removeprefix(self._notice.text))

    def finish(self, *, whole: bool) -> list[Delta]:
        deltas = self._put(self._inner.finish(whole=whole))
        if not self._whole:
            return deltas
        return [*deltas, {"content": self._notice.of_json(self._held)}]

    def _put(self, deltas: list[Delta]) -> list[Delta]:
        self.calls, self.cut = self._inner.calls, self._inner.cut
        if self._whole:
            self._held += "".join(delta.get("content", "") for delta in deltas)
            return [delta for delta in deltas if "content" not in delta]
        opening: list[Delta] = [] if self._begun else [{"content": self._notice.text}]
        self._begun = True
        return opening + deltas


def without_notices(body: ChatRequest, served: ServedModel) -> ChatRequest:
    """A chat as the model is to read it; a last answer that it goes on with is its own as it stands."""
    policy = served.policy
    if policy is None or not policy.notice:
        return body
    last = body.messages[-1:] if body.continue_final_message else []
    messages = without_notice(body.messages[: len(body.messages) - len(last)], policy) + last
    return body.model_copy(update={"messages": messages})


def notice_of(served: ServedModel, said: Iterable[str]) -> Notice | None:
    """What is to be put to the answer to what `said`, if anything. Its rule reads all of it: look at lengths first."""
    return Notice(served.policy, said) if served.policy is not None and served.policy.notice else None


def noticed(reader: Callable[[], Reader], notice: Notice | None, *, whole: bool) -> Callable[[], Reader]:
    """What reads an answer, and puts to it what is to be; `whole`: as one guided object."""
    return reader if notice is None else lambda: Noticed(reader(), notice, whole=whole)


def is_json(guide: Guide | None) -> bool:
    return guide is not None and guide.kind in ("json_schema", "json_object")


def depth_by_policy(
    given: str | int | None, body: GenerationRequest, served: ServedModel, workload: str | None
) -> str | int | None:
    """What the request asks for, or else what the policy has for its workload; a tolerance is such a wish as well."""
    if given is not None or served.policy is None or body.quality_tolerance is not None:
        return given
    return served.policy.depth_of(workload)


def said_by_user(messages: Sequence[Message]) -> list[str]:
    """The texts of the user's messages, of each in one: a sentence may go on from part to part, but a "no" at the end of one
    takes nothing back in the next."""
    return [" / ".join(some) for message in messages if message.role == "user" and (some := _texts(message))]


def without_notice(messages: Sequence[Message], policy: Policy) -> list[Message]:
    """A chat as the model is to read it: what was put to its answers is no word of its own."""
    return [_bare(message, policy) if message.role == "assistant" else message for message in messages]


def _bare(message: Message, policy: Policy) -> Message:
    content = message.content
    if isinstance(content, str):
        text = _bare_text(content, policy)
        return message.model_copy(update={"content": text if text or not message.tool_calls else None})
    if content and isinstance(content[0], TextPart):
        first = content[0].model_copy(update={"text": _bare_text(content[0].text, policy)})
        return message.model_copy(update={"content": [first, *content[1:]]})
    return message


def _bare_text(text: str, policy: Policy) -> str:
    text = policy.without(text)
    return _bare_object(text, policy) if text.startswith("{") else text


def _bare_object(text: str, policy: Policy) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(found, dict) or found.get(NOTICE) not in policy.notice.values():
        return text
    return _written({name: value for name, value in found.items() if name != NOTICE}) or text


def _written(answer: dict[str, Any]) -> str:
    """As JSON that can be sent, half of a surrogate pair by its number; empty for a number that Python has made infinite."""
    try:
        spelt = json.dumps(answer, ensure_ascii=False, allow_nan=False)
        spelt.encode()
    except UnicodeEncodeError:
        return json.dumps(answer)
    except ValueError:
        return ""
    return spelt


def _texts(message: Message) -> list[str]:
    if message.content is None or isinstance(message.content, str):
        return [message.content or ""]
    return [part.text for part in message.content if isinstance(part, TextPart)]


def _in(texts: dict[str, str], language: str) -> str:
    return texts.get(language) or next(iter(texts.values()))
