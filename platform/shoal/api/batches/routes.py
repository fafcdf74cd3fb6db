"""The routes of files and batches. Without a folder to keep them in, each says so."""

from __future__ import annotations

import asyncio
import re
from typing import IO, Any, get_args

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from shoal.api.access import Access
from shoal.api.batches import upload
from shoal.api.batches.shapes import Batch, BatchList, BatchRequest, FileDeleted, FileList, FileObject, Purpose
from shoal.api.batches.store import ANYBODY, Page, Store, room
from shoal.api.batches.worker import Worker
from shoal.api.client import ClientGone, while_connected
from shoal.api.document import POSTED, answered, body_of, refused
from shoal.api.sent import SEND_SECONDS, in_json
from shoal.api.service import Service
from shoal.api.wire import NotFoundError
from shoal.errors import RequestError

PURPOSES: tuple[str, ...] = get_args(Purpose)
CHUNK = 2**18
KEPT = (400, 401, 404, 429, 500, 507)
HELD = (*POSTED, 409, 507)
MOST_FILES, MOST_BATCHES, SOME_BATCHES = 10_000, 100, 20

_FORM = {
    "type": "object",
    "properties": {
        "purpose": {"const": "batch"},
        "file": {"type": "string", "format": "binary", "minLength": 1, "description": "JSONL, a request a line"},
    },
    "required": ["purpose", "file"],
    "additionalProperties": False,
    "examples": [
        {
            "purpose": "batch",
            "file": '{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "shoal", "input": "sea"}}',
        }
    ],
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def _query(**fields: dict[str, Any]) -> dict[str, Any]:
    """The entry of a query that the route reads itself."""
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]}


_AFTER = {"type": "string", "description": "id of the last one of the page before", "pattern": "^[!-~]{1,100}$"}
_FILES = _query(
    after=_AFTER,
    limit={"type": "integer", "minimum": 1, "maximum": MOST_FILES, "default": MOST_FILES},
    order={"enum": ["asc", "desc"], "default": "desc"},
    purpose={"enum": [*PURPOSES]},
)
_BATCHES = _query(
    after=_AFTER, limit={"type": "integer", "minimum": 1, "maximum": MOST_BATCHES, "default": SOME_BATCHES}
)


class Kept:
    """What the routes have: where things are kept, and who runs them; neither where they are switched off."""

    def __init__(self, store: Store | None, worker: Worker | None) -> None:
        self._store, self.worker = store, worker

    @property
    def store(self) -> Store:
        """Raises NotFoundError where it is switched off."""
        if self._store is None:
            raise NotFoundError(
                "files and batches are switched off", do="start the service with --batches DIR, or args.batches"
            )
        return self._store

    def wake(self) -> None:
        """There is news for who runs the batches, where that is here."""
        if self.worker is not None:
            self.worker.wake()


def batch_routes(service: Service, kept: Kept) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    _add_files(router, service, kept)
    _add_batches(router, service, kept)
    return router


def _add_files(router: APIRouter, service: Service, kept: Kept) -> None:
    @router.post("/files", openapi_extra=_UPLOAD, responses=answered(FileObject, *HELD))
    async def upload_file(request: Request) -> Response:
        """Keeps a file of requests, one a line, for a batch."""
        store, most = kept.store, service.limits.file_bytes
        with store.new_file() as place:
            with room(), (place / "content").open("wb") as file:
                name, fields = await upload.receive(request, file, most)
            if "purpose" not in fields:
                raise RequestError("purpose is missing", param="purpose")
            if fields["purpose"] != "batch":
                raise RequestError("purpose", param="purpose", got=fields["purpose"][:80], allowed="batch")
            return await in_json(request, await run_in_threadpool(store.keep, place, _owner(request), name, "batch"))

    @router.get("/files", openapi_extra=_FILES, responses=answered(FileList, *KEPT))
    async def list_files(request: Request) -> Response:
        """The files of the key, the newest first."""
        store = kept.store
        asked = _asked(request, "after", "limit", "order", "purpose")
        purpose = _one_of(asked, "purpose", PURPOSES)
        page = Page(_limit(asked, MOST_FILES, MOST_FILES), asked.get("after"), _order(asked))
        return await in_json(request, _listed(*await run_in_threadpool(store.files, _owner(request), page, purpose)))

    @router.get("/files/{file_id}", responses=answered(FileObject, *KEPT))
    async def get_file(request: Request, file_id: str) -> Response:
        return await in_json(request, await run_in_threadpool(kept.store.file, _owner(request), file_id))

    @router.delete("/files/{file_id}", responses=answered(FileDeleted, *KEPT))
    async def delete_file(request: Request, file_id: str) -> Response:
        """Batches that read it go on."""
        await run_in_threadpool(kept.store.delete, _owner(request), file_id)
        return await in_json(request, {"id": file_id, "object": "file", "deleted": True})

    octets = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @router.get(
        "/files/{file_id}/content",
        response_class=Response,
        responses={200: {"description": "The file", **octets}, **refused(*KEPT)},
    )
    async def file_content(request: Request, file_id: str) -> Response:
        """The file as it was sent, or as a batch has written it."""
        file = await run_in_threadpool(kept.store.content, _owner(request), file_id)
        return _FileSent(file, request.state.access)


def _add_batches(router: APIRouter, service: Service, kept: Kept) -> None:
    @router.post("/batches", openapi_extra=body_of(BatchRequest), responses=answered(Batch, *HELD))
    async def create_batch(request: Request) -> Response:
        """Runs the requests of a file, one a line, when nothing else is to do."""
        store = kept.store
        body = await service.read_body(request, BatchRequest)
        made = await run_in_threadpool(store.create, _owner(request), body)
        kept.wake()
        return await in_json(request, made)

    @router.get("/batches", openapi_extra=_BATCHES, responses=answered(BatchList, *KEPT))
    async def list_batches(request: Request) -> Response:
        """The batches of the key, the newest first."""
        store = kept.store
        asked = _asked(request, "after", "limit")
        page = Page(_limit(asked, SOME_BATCHES, MOST_BATCHES), asked.get("after"))
        return await in_json(request, _listed(*await run_in_threadpool(store.batches, _owner(request), page)))

    @router.get("/batches/{batch_id}", responses=answered(Batch, *KEPT))
    async def get_batch(request: Request, batch_id: str) -> Response:
        return await in_json(request, await run_in_threadpool(kept.store.batch, _owner(request), batch_id))

    @router.post("/batches/{batch_id}/cancel", responses=answered(Batch, *KEPT, 413, 415, 503))
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        """Ends a batch; what was answered until then is kept in its files."""
        found = await run_in_threadpool(kept.store.cancel, _owner(request), batch_id)
        kept.wake()
        return await in_json(request, found)


def _owner(request: Request) -> str:
    access: Access = request.state.access
    return ANYBODY if access.key is None else access.key.digest.hex()


def _asked(request: Request, *known: str) -> dict[str, str]:
    """The query. Raises RequestError for a field that is not `known`, or given twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known or name in found:
            raise RequestError("query", param=name[:80], got=name[:80], allowed=[f"{each} once" for each in known])
        found[name] = value
    return found


def _limit(asked: dict[str, str], usual: int, most: int) -> int:
    given = asked.get("limit")
    if given is None:
        return usual
    if not re.fullmatch("[0-9]{1,6}", given) or not 1 <= int(given) <= most:
        raise RequestError("limit", param="limit", got=given[:80], allowed=f"1 to {most}")
    return int(given)


def _order(asked: dict[str, str]) -> Any:
    return _one_of(asked, "order", ("asc", "desc")) or "desc"


def _one_of(asked: dict[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    if asked.get(name) not in (None, *allowed):
        raise RequestError(name, param=name, got=asked[name][:80], allowed=allowed)
    return asked.get(name)


def _listed(found: list[Any], more: bool) -> dict[str, Any]:
    ids = [each["id"] for each in found]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": found, **ends, "has_more": more}


class _FileSent(Response):
    """A file, which is closed with it. A client that leaves or reads nothing ends it."""

    media_type = "application/octet-stream"

    def __init__(self, file: IO[bytes], access: Access) -> None:
        self.status_code, self.background = 200, None
        self._file, self._access = file, access
        self._left = file.seek(0, 2)
        file.seek(0)
        self.init_headers({"Content-Length": str(self._left)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while self._left and (data := await asyncio.to_thread(self._file.read, min(CHUNK, self._left))):
                self._left -= len(data)
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(receive, stream())
        except ClientGone:
            self._access.error = "client_left"
        except TimeoutError:
            self._access.error = "client_stalled"
        finally:
            self._file.close()
