"""Responses that are stored: what a turn goes on from, and OpenAI's routes of them.

Each key sees what it stored and nothing else. What is stored is what is read: a later turn has "[email]" where an address was,
and "[image]" for an image. Every gateway looks into the same folder, so it does not matter which of them answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from shoal.api.access import Access
from shoal.api.document import ASKED, answered, refused
from shoal.api.limits import Limits
from shoal.api.responses.bodies import KEPT, AnyItem, ItemReference, ResponsesRequest
from shoal.api.responses.items import read_items, response_of
from shoal.api.responses.shapes import InputItems, ResponseDeleted, ResponseOut
from shoal.api.sent import in_json
from shoal.api.service import Service
from shoal.api.storing import Storing, kept
from shoal.api.wire import NotFoundError
from shoal.errors import RequestError
from shoal.loop.texts import Stored

MOST, SOME = 100, 20  # items of a list
HERE = "/{response_id}"
_HINT = "taken, changes nothing: "
_READ: dict[str, Any] = {
    "include": {"type": "array", "items": {"type": "string"}, "description": _HINT + "there is no more to include"},
    "include_obfuscation": {"type": "boolean", "description": _HINT + "there is no stream"},
    "stream": {"enum": [False], "description": "a response that is stored has ended, and comes whole"},
}
_LIST: dict[str, Any] = {
    "after": {"type": "string", "description": "id of the last one of the page before"},
    "include": _READ["include"],
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST, "default": SOME},
    "order": {"enum": ["asc", "desc"], "default": "desc", "description": "desc: the newest first"},
}


# ---- going on --------------------------------------------------------------------------------------------------------


async def items_before(service: Service, access: Access, body: ResponsesRequest) -> list[AnyItem]:
    """The items of the turns that `body` goes on from, oldest first. Raises RequestError where nothing is kept, or these are
    not."""
    storing = service.storing
    may = storing is not None and storing.may_store(access)
    for name in ("store", "previous_response_id"):
        if getattr(body, name) and not may:
            raise RequestError(f"{name}: not supported; {KEPT}", param=name)
    if storing is None or body.previous_response_id is None:
        return []
    work = partial(_chain, storing, storing.owner(access), body.previous_response_id, service.limits)
    try:
        chain, whole = await kept(work)
    except RequestError as long:
        long.param = long.param or "previous_response_id"
        raise
    if not whole:
        what = "a response before it is stored no more" if chain else "no such response"
        do = "send the items of the turns before as `input`; each turn that is gone on from needs store: true"
        error = RequestError(what, param="previous_response_id", got=body.previous_response_id[:100], do=do)
        error.code = "previous_response_not_found"
        raise error
    if chain[0]["conversation"] is not None:
        access.columns["conversation"] = chain[0]["conversation"]
    return await kept(lambda: read_items([item for one in chain for item in _items(one)]))  # a thousand take a while


async def with_referred(service: Service, access: Access, body: ResponsesRequest) -> ResponsesRequest:
    """`body` with the items that are stored in place of the references to them. A reference to another one stays."""
    storing = service.storing
    named = [] if isinstance(body.input, str) else [item for item in body.input if isinstance(item, ItemReference)]
    if storing is None or not named or not storing.may_store(access):
        return body
    found = await kept(partial(_referred, storing, storing.owner(access), {item.id for item in named}, service.limits))
    items = [found.get(item.id, item) if isinstance(item, ItemReference) else item for item in body.input]
    return body.model_copy(update={"input": items})


def _referred(storing: Storing, owner: str, ids: set[str], limits: Limits) -> dict[str, AnyItem]:
    """The stored items of these ids, as far as they are there. Raises RequestError for more than a body may have."""
    found: dict[str, AnyItem] = {}
    size = 0
    for name in sorted({response for id_ in ids if (response := response_of(id_)) is not None}):
        one = storing.responses.get(owner, name)
        size += 0 if one is None else len(json.dumps(one))
        if size > limits.body_bytes:
            raise RequestError(
                "the items referred to are too long", param="input", allowed=f"{limits.body_bytes} bytes"
            )
        wanted = [] if one is None else [item for item in _items(one) if item["id"] in ids]
        found |= dict(zip((item["id"] for item in wanted), read_items(wanted), strict=True))
    return found


def _items(one: Stored) -> list[Any]:
    return [*one["items"], *one["response"]["output"]]


def _chain(storing: Storing, owner: str, id_: str, limits: Limits) -> tuple[list[Stored], bool]:
    """The response `id_` after those before it, oldest first, as far as they are there; and whether all are."""
    found = list(storing.responses.back(owner, id_, limits.body_bytes, limits.messages))
    return [one for one in reversed(found) if one is not None], None not in found


# ---- routes ----------------------------------------------------------------------------------------------------------


def add_stored(router: APIRouter, service: Service) -> None:
    """OpenAI's routes of a response."""

    def there(response_id: str) -> Storing:
        if service.storing is None:
            do = "send the items of the turns before as `input`: none is kept"
            raise NotFoundError("no such response", got=response_id[:100], do=do)
        return service.storing

    async def found(request: Request, id_: str) -> Stored:
        to = there(id_)
        return _there(await kept(partial(to.responses.get, to.owner(request.state.access), id_)), id_)

    @router.get(HERE, responses=answered(ResponseOut, 400, *ASKED), openapi_extra=_query(_READ))
    async def stored_response(request: Request, response_id: str) -> Response:
        """A stored response, as it was answered but for what was taken out of its texts."""
        asked = _asked(request, _READ)
        if asked.get("stream", "false") != "false":
            raise RequestError("stream", param="stream", got=asked["stream"][:20], allowed="false: it has ended")
        return await in_json(request, (await found(request, response_id))["response"])

    @router.get(HERE + "/input_items", responses=answered(InputItems, 400, *ASKED), openapi_extra=_query(_LIST))
    async def input_items(request: Request, response_id: str) -> Response:
        """What a stored response was given to: the items of the turns before it that are stored, and those of its own input."""
        after, limit, order = _page(_asked(request, _LIST))
        to = there(response_id)
        owner = to.owner(request.state.access)
        chain, _ = await kept(partial(_chain, to, owner, response_id, service.limits))
        *earlier, last = chain or [_there(None, response_id)]
        items = [item for one in earlier for item in _items(one)] + last["items"]
        items = items[::-1] if order == "desc" else items
        at = next((at + 1 for at, item in enumerate(items) if item["id"] == after), None) if after else 0
        if at is None:
            raise RequestError(
                "no such item", param="after", got=str(after)[:100], allowed="the id of one of the items"
            )
        page = items[at : at + limit]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return await in_json(request, {"object": "list", "data": page, **ends, "has_more": len(items) > at + limit})

    @router.delete(HERE, responses=answered(ResponseDeleted, *ASKED))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Its texts go, and no reader sees its row again; who goes on from a later turn is told that one is missing."""
        to = there(response_id)
        gone = await kept(partial(to.responses.delete, to.owner(request.state.access), response_id))
        _there({} if gone else None, response_id)
        return await in_json(request, {"id": response_id, "object": "response", "deleted": True})

    @router.post(HERE + "/cancel", responses=refused(400, *ASKED))
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Always refused: what is stored has ended, for nothing runs in the background here."""
        await found(request, response_id)
        do = "close the connection of one that runs; DELETE one that is stored"
        raise RequestError("cannot cancel a synchronous response", got=response_id[:100], do=do)


def _query(schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()]}


def _asked(request: Request, known: Mapping[str, Any]) -> dict[str, str]:
    """The query; hints are noted as unused. Raises RequestError for what is not `known`."""
    asked = {name.removesuffix("[]"): value for name, value in request.query_params.items()}
    odd = next((name for name in asked if name not in known), None)
    if odd is not None:
        raise RequestError("unknown parameter", param=odd[:100], allowed=[*known])
    access: Access = request.state.access
    access.unused += [name for name in asked if known[name].get("description", "").startswith(_HINT)]
    return asked


def _page(asked: Mapping[str, str]) -> tuple[str | None, int, str]:
    """after, limit, and order. Raises RequestError."""
    limit, order = asked.get("limit", str(SOME)), asked.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST:
        raise RequestError("limit", param="limit", got=limit[:20], allowed=f"1 to {MOST}")
    if order not in ("asc", "desc"):
        raise RequestError("order", param="order", got=order[:20], allowed="asc, or desc")
    return asked.get("after"), int(limit), order


def _there(stored: Stored | None, id_: str) -> Stored:
    if stored is None:
        do = "a response is stored with store: true, seen by the key that stored it, and deleted after some days"
        raise NotFoundError("no such response", got=id_[:100], do=do)
    return stored
