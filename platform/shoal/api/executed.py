"""Tools that the operator's own service executes for the chat pages (`shoal serve --tools URL`), each chat's apart.

    GET  URL/tools               the tools, as a chat takes them
    GET  URL/system              {"system": what the model is told of who asks, "systems": {"zh": the same in a language}}; may
                                 be missing, and `systems` too; a chat in one of these languages is named after it: zh-CHAT
    POST URL/shops/CHAT/NAME     call one, with a JSON object of arguments; what it gives is a JSON object

`recipes/customer_service/service.py` is one. Of a client nothing goes into an address but names of letters, digits, _ and -.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response

from shoal.api.document import ASKED, POSTED, refused
from shoal.api.service import Service
from shoal.api.wire import Wire
from shoal.errors import ConfigError, RequestError

SECONDS = 10.0  # that the service may take for a call
MOST_BYTES = 100_000  # of what it gives
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")


class NoToolsError(RequestError):
    """The service that executes tools does not answer, or not as it should."""

    status = 503


class CallRequest(Wire):
    arguments: dict[str, Any]


def checked(url: str) -> str:
    """`url` of a service of tools, without a slash at its end. Raises ConfigError."""
    if not _URL.fullmatch(url):
        raise ConfigError("args.tools", got=url, allowed="http://HOST:PORT, or https")
    return url.rstrip("/")


def tool_routes(service: Service, url: str) -> APIRouter:
    """The routes by which a page calls the tools at `url`."""
    router = APIRouter(prefix="/v1/shoal/tools", tags=["tools"])
    at = checked(url)

    @router.get("", response_model=dict[str, Any], responses=refused(*ASKED))
    async def listed() -> Response:
        """The tools that this service executes, and what a model is told of who asks, by language too."""
        async with httpx.AsyncClient(timeout=SECONDS) as http:
            tools = await _given(http.get(f"{at}/tools"))
            system = await _given(http.get(f"{at}/system"), missing={})
        systems = system.get("systems")
        return _answer({
            "object": "shoal.tools", "data": tools, "system": str(system.get("system", "")),
            "systems": systems if isinstance(systems, dict) else {},
        })  # fmt: skip

    @router.post("/{chat}/{name}", response_model=dict[str, Any], responses=refused(*POSTED))
    async def call(chat: str, name: str, request: Request) -> Response:
        """Calls a tool in the place of a chat, and gives what it gave."""
        for what, given_name in (("chat", chat), ("name", name)):
            if not _NAME.fullmatch(given_name):
                raise RequestError(what, param=what, got=given_name[:80], allowed="up to 64 letters, digits, _ and -")
        body = await service.read_body(request, CallRequest)
        try:
            arguments = _spelt(body.arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError("arguments", param="arguments", got=type(error).__name__, allowed="JSON") from error
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(timeout=SECONDS) as http:
            given = await _given(http.post(f"{at}/shops/{chat}/{name}", content=arguments, headers=headers))
        return _answer({"object": "shoal.tool_result", "name": name, "given": given})

    return router


def _spelt(value: Any) -> bytes:
    """As JSON that can be sent. Raises ValueError for a number that is none and half of a surrogate pair, RecursionError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _answer(told: dict[str, Any]) -> Response:
    return Response(_spelt(told), media_type="application/json")


async def _given(answer: Any, missing: Any = None) -> Any:
    """The JSON of an answer; `missing`, where there is some, of one that is not there. Raises RequestError for a call that was
    refused, NoToolsError."""
    try:
        told = await answer
        if told.status_code == 404 and missing is not None:
            return missing
        if told.status_code == 400:
            raise RequestError("arguments", got=str(told.json().get("error"))[:300], allowed="what the tool takes")
        told.raise_for_status()
        if len(told.content) > MOST_BYTES:
            raise ValueError(f"{len(told.content)} bytes")
        found = told.json()
        _spelt([[found]])  # as it stands in an answer, which has to be able to repeat it
        return found
    except (httpx.HTTPError, ValueError, AttributeError, RecursionError) as error:
        raise NoToolsError("the service of tools", got=type(error).__name__, do="see that it runs: --tools") from error
