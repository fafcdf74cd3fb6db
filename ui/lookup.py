"""Tools that a service executes (`shoal serve --tools`), called between a question and its answer: the model's call goes to the
service, what it gives goes to the model, and both stand above the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai

from ui import talk
from ui.talk import Card, Message, Said, Settings

MOST_CALLS = 4  # in a row: a model may go on for ever
AT = "/shoal/tools"
_CJK = re.compile(r"[\u3400-\u9fff]")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """What a service executes, as a chat takes it, and what the model is told of who asks, also by language."""

    listed: tuple[dict[str, Any], ...]
    system: str
    systems: Mapping[str, str] = field(default_factory=dict)


def place(tools: Tools | None, question: str, tab: str | None) -> tuple[str, str]:
    """Of a conversation of a tab that begins with this question: what the model is told of who asks, and the name of the place
    of its calls, in its language where there is one. What a tab's calls change there changes nothing for others."""
    name, language = f"chat-{tab or 'none'}", "zh" if _CJK.search(question) else "en"
    if tools is None:
        return "", name
    return (tools.systems[language], f"{language}-{name}") if language in tools.systems else (tools.system, name)


async def read(api: openai.AsyncOpenAI) -> Tools | None:
    """The service's tools; None where it executes none."""
    try:
        answer: httpx.Response = await api.get(AT, cast_to=httpx.Response)
        told = answer.json()
        return Tools(tuple(told["data"]), str(told["system"]), dict(told["systems"]))
    except (openai.OpenAIError, ValueError, LookupError, TypeError):
        return None


async def stream(
    api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings, tools: Tools | None, chat: str
) -> AsyncGenerator[Said, None]:
    """`talk.stream`, and in between the calls that the model makes of `tools` [none], in the place of `chat`."""
    done: list[Message] = []
    given = settings if tools is None else replace(settings, tools=tools.listed)
    while True:
        last = Said("")
        async with aclosing(talk.stream(api, card, [*asked, *done], given)) as states:
            async for state in states:
                last = replace(state, before=tuple(done))
                if not last.calls:
                    yield last
        if not last.calls or last.fault:
            return
        calls = sum("tool_calls" in message for message in done)
        if tools is None or calls == MOST_CALLS:
            yield replace(last, fault=f"The model called a tool {calls + 1} times, and was stopped.")
            return
        done.append({"role": "assistant", "content": last.text or None, "tool_calls": list(last.calls)})
        for call in last.calls:
            result = await _called(api, chat, call["function"])
            done.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result, ensure_ascii=False)})
        yield replace(last, text="", below="", whole=False, calls=(), before=tuple(done))


async def _called(api: openai.AsyncOpenAI, chat: str, function: dict[str, str]) -> Any:
    """What a tool gives, or why it gave nothing: the model is told either."""
    try:
        arguments = json.loads(function["arguments"])
        if not _NAME.fullmatch(function["name"]):
            return {"error": "no such tool"}
        path = f"{AT}/{chat}/{function['name']}"
        answer: httpx.Response = await api.post(path, body={"arguments": arguments}, cast_to=httpx.Response)
        return answer.json()["given"]
    except openai.OpenAIError as error:
        return {"error": talk.reason(error)}
    except (ValueError, LookupError) as error:
        return {"error": f"arguments that are no JSON: {error}"}
