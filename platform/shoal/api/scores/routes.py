"""The routes of scoring."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from shoal.api.bodies import EmbeddingRequest
from shoal.api.document import POSTED, answered, body_of
from shoal.api.limits import Limits
from shoal.api.requests import embedding_ids, told_as
from shoal.api.scores.bodies import Compared, RerankRequest, ScoreRequest
from shoal.api.sent import in_json
from shoal.api.served import ServedModel
from shoal.api.service import Service
from shoal.api.shapes import EmbeddingUsage
from shoal.errors import RequestError


class Score(TypedDict):
    index: int
    object: Literal["score"]
    score: float  # cosine, -1 to 1


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    model: str
    data: list[Score]
    usage: EmbeddingUsage


class RankedDocument(TypedDict):
    text: str | None


class Ranked(TypedDict):
    index: int  # among the documents
    document: RankedDocument | None
    relevance_score: float  # cosine, -1 to 1


class Reranked(TypedDict):
    id: str
    model: str
    results: list[Ranked]  # the nearest first
    usage: EmbeddingUsage


def score_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    async def compared(
        request: Request, body: Compared, texts: dict[str, list[str]]
    ) -> tuple[ServedModel, dict[str, np.ndarray], EmbeddingUsage, dict[str, str]]:
        """The vectors of the `texts` of each field, all by the same weights, what they cost, and headers of the answer."""
        hosted = service.hosted(request, body.model)
        ids = await service.prepared(request, partial(_ids, texts, body, hosted.served, service.limits))
        vectors, headers = await service.embed(request, hosted.client, ids, body.pooled_at)
        tokens = sum(map(len, ids))
        split = await run_in_threadpool(_split, vectors, texts)
        return hosted.served, split, {"prompt_tokens": tokens, "total_tokens": tokens}, headers

    @router.post("/score", openapi_extra=body_of(ScoreRequest), responses=answered(ScoreList, *POSTED))
    async def score(request: Request) -> Response:
        """How near each of `text_2` is to `text_1`, or to its own of them: the cosine of their embeddings."""
        body = await service.read_body(request, ScoreRequest)
        texts = {"text_1": _listed(body.text_1, "text_1"), "text_2": _listed(body.text_2, "text_2")}
        one, many = texts.values()
        if len(one) not in (1, len(many)):
            allowed = f"1, or {len(many)} as of text_2"
            raise RequestError("texts of text_1", param="text_1", got=len(one), allowed=allowed)
        served, found, usage, headers = await compared(request, body, texts)
        scores = await run_in_threadpool(_cosines, found["text_1"], found["text_2"])
        data: list[Score] = [{"index": at, "object": "score", "score": value} for at, value in enumerate(scores)]
        whole: ScoreList = {
            "id": f"score-{uuid.uuid4().hex}", "object": "list", "model": served.name, "data": data, "usage": usage,
        }  # fmt: skip
        return await in_json(request, whole, headers)

    @router.post("/rerank", openapi_extra=body_of(RerankRequest), responses=answered(Reranked, *POSTED))
    async def rerank(request: Request) -> Response:
        """The documents by how near they are to the query, the nearest first."""
        body = await service.read_body(request, RerankRequest)
        served, found, usage, headers = await compared(
            request, body, {"query": [body.query], "documents": body.documents}
        )
        scores = await run_in_threadpool(_cosines, found["query"], found["documents"])
        order = sorted(range(len(scores)), key=lambda at: -scores[at])[: body.top_n or None]
        results: list[Ranked] = [
            {
                "index": at,
                "document": {"text": body.documents[at]} if body.return_documents else None,
                "relevance_score": scores[at],
            }
            for at in order
        ]
        whole: Reranked = {
            "id": f"rerank-{uuid.uuid4().hex}", "model": served.name, "results": results, "usage": usage,
        }  # fmt: skip
        return await in_json(request, whole, headers)

    return router


def _split(vectors: list[list[float]], texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The vectors of each field, which are taken out of `vectors`. Each is read and freed by itself: between two other threads
    run."""
    vectors.reverse()
    return {name: np.stack([np.asarray(vectors.pop(), np.float64) for _ in given]) for name, given in texts.items()}


def _listed(given: str | list[str], param: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise RequestError(param, param=param, got="nothing", allowed="a text, or a list of at least one")
    return texts


def _ids(texts: dict[str, list[str]], body: Compared, served: ServedModel, limits: Limits) -> list[list[int]]:
    """The token ids of all `texts`, by field. Raises RequestError naming the field; ContextLengthError."""
    found: list[list[int]] = []
    for name, given in texts.items():
        whole: dict[str, Any] = {"model": body.model, "input": given, "depth": body.depth}
        with told_as({"input": name}):
            found += embedding_ids(EmbeddingRequest.model_validate(whole), served, limits)
    return found


def _cosines(one: np.ndarray, many: np.ndarray) -> Sequence[float]:
    """Of each row of `many` with its row of `one`, or with the only one."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(many, axis=1)
    cosines: list[float] = ((one * many).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)).tolist()
    return cosines
