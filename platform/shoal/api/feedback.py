"""Routes of what is said of answers, and of the texts that were stored: OpenAI's stored completions, and votes.

Each key sees what it stored and nothing else; without keys all is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from shoal.api.document import ASKED, POSTED, answered, body_of, refused
from shoal.api.sent import in_json
from shoal.api.service import Service
from shoal.api.shapes import Deleted, FeedbackSettings, FeedbackTaken, StoredCompletion, StoredList, StoredMessages
from shoal.api.storing import FeedbackRequest, StoredUpdate, Storing, kept
from shoal.api.wire import NotFoundError
from shoal.errors import RequestError
from shoal.loop.texts import Stored, clean
from shoal.loop.votes import Vote

MOST, SOME = 100, 20  # of a list
_SCHEMAS: dict[str, Any] = {
    "after": {"type": "string", "description": "id of the last one of the page before"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST, "default": SOME},
    "model": {"type": "string"},
    "order": {"enum": ["asc", "desc"], "default": "asc"},
}
_QUERY = {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in _SCHEMAS.items()]}
HERE = "/chat/completions/{id}"


def feedback_routes(service: Service) -> APIRouter:
    """Where nothing is captured each says so."""
    router, storing = APIRouter(prefix="/v1", tags=["feedback"]), service.storing

    def there() -> Storing:
        if storing is None:
            raise NotFoundError("nothing is captured", do="start the service with --capture DIR, or args.capture")
        return storing

    @router.get("/shoal/feedback", responses=refused(*ASKED))
    async def settings(request: Request) -> FeedbackSettings:
        """What this key may say of answers here."""
        texts = storing is not None and storing.may_store(request.state.access)
        return {
            "object": "shoal.feedback.settings",
            "captured": storing is not None,
            "texts": texts,
            "texts_days": storing.texts_days if storing is not None and texts else None,
        }

    @router.post("/shoal/feedback", openapi_extra=body_of(FeedbackRequest), responses=answered(FeedbackTaken, *POSTED))
    async def give(request: Request) -> Response:
        """A vote on an answer, or the better answer. Of one `user` of a key the newest counts; none withdraws."""
        body, to, access = await service.read_body(request, FeedbackRequest), there(), request.state.access
        if (body.correction or body.comment) and not to.may_store(access):
            name = "correction" if body.correction else "comment"
            do = "leave it out: texts need --capture-texts, and texts=yes of the key"
            raise RequestError("texts are not kept here", param=name, do=do)
        texts = {
            name: given and clean(given) for name, given in (("correction", body.correction), ("comment", body.comment))
        }
        await to.need_own(access, body.id)
        whose = to.voter(access, body.user)
        await to.vote(Vote(body.id, whose, body.rating, body.score, texts["correction"], texts["comment"]))
        return await in_json(request, {"object": "shoal.feedback", "id": body.id, "rating": body.rating})

    _add_stored(router, service, there)
    return router


def _add_stored(router: APIRouter, service: Service, there: Callable[[], Storing]) -> None:
    """OpenAI's routes of stored completions."""

    async def found(request: Request, id_: str) -> Stored:
        to = there()
        stored = await kept(partial(to.texts.get, to.owner(request.state.access), id_))
        return _there(stored, id_)

    @router.get("/chat/completions", responses=answered(StoredList, 400, *ASKED), openapi_extra=_QUERY)
    async def stored_completions(request: Request) -> Response:
        """The stored completions of the key, by the time of their answer; ``metadata[NAME]=VALUE`` chooses among them."""
        to, owner = there(), there().owner(request.state.access)
        after, limit, model, order, tags = _asked(request.query_params)

        def chosen() -> list[Stored]:
            every = to.texts.all(owner, newest=order == "desc")
            return [one for one in every if _fits(one, model, tags)]

        every = await kept(chosen)
        at = next((at + 1 for at, one in enumerate(every) if one["id"] == after), None) if after else 0
        if at is None:
            raise NotFoundError(
                "no such completion", param="after", got=str(after)[:100], do="GET /v1/chat/completions"
            )
        page = [_shown(one) for one in every[at : at + limit]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return await in_json(request, {"object": "list", "data": page, **ends, "has_more": len(every) > at + limit})

    @router.get(HERE, responses=answered(StoredCompletion, *ASKED))
    async def stored_completion(request: Request, id: str) -> Response:
        return await in_json(request, _shown(await found(request, id)))

    @router.get(HERE + "/messages", responses=answered(StoredMessages, *ASKED))
    async def stored_messages(request: Request, id: str) -> Response:
        """What the answer was given to."""
        one = await found(request, id)
        data = [{"id": f"{id}-{at}", **message} for at, message in enumerate(one["messages"])]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}
        return await in_json(request, {"object": "list", "data": data, **ends})

    @router.post(HERE, openapi_extra=body_of(StoredUpdate), responses=answered(StoredCompletion, *POSTED))
    async def tag(request: Request, id: str) -> Response:
        """Other metadata in place of what is there."""
        body, to, access = await service.read_body(request, StoredUpdate), there(), request.state.access
        one = _there(await kept(partial(to.texts.tag, to.owner(access), id, body.metadata)), id)
        rating: Any = body.metadata.get("rating")
        if rating in ("up", "down"):
            await to.vote(Vote(id, one["subject"], rating))
        return await in_json(request, _shown(one))

    @router.delete(HERE, responses=refused(*ASKED))
    async def delete(request: Request, id: str) -> Deleted:
        """Its texts go, and no reader sees its row again."""
        to = there()
        gone = await kept(partial(to.texts.delete, to.owner(request.state.access), id))
        _there({} if gone else None, id)
        return {"object": "chat.completion.deleted", "id": id, "deleted": True}


def _asked(query: Mapping[str, str]) -> tuple[str | None, int, str | None, str, dict[str, str]]:
    """after, limit, model, order, and the metadata that is asked for. Raises RequestError."""
    tags = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[") and name.endswith("]")}
    known = ("after", "limit", "model", "order")
    odd = next((name for name in query if name not in known and not name.startswith("metadata[")), None)
    if odd is not None:
        raise RequestError("unknown parameter", param=odd[:100], allowed=[*known, "metadata[NAME]"])
    limit, order = query.get("limit", str(SOME)), query.get("order", "asc")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST:
        raise RequestError("limit", param="limit", got=limit[:20], allowed=f"1 to {MOST}")
    if order not in ("asc", "desc"):
        raise RequestError("order", param="order", got=order[:20], allowed="asc, or desc")
    return query.get("after"), int(limit), query.get("model"), order, tags


def _there(stored: Stored | None, id_: str) -> Stored:
    if stored is None:
        raise NotFoundError("no such completion", param="id", got=id_[:100], do="GET /v1/chat/completions lists yours")
    return stored


def _fits(one: Stored, model: str | None, tags: dict[str, str]) -> bool:
    fits = model is None or one["completion"]["model"] == model
    return fits and all(one["metadata"].get(name) == value for name, value in tags.items())


def _shown(one: Stored) -> dict[str, Any]:
    """A stored completion as OpenAI's clients read one."""
    return {**one["completion"], "metadata": one["metadata"]}
