"""POST /v1/score and /v1/rerank: cosines of the vectors that /v1/embeddings gives."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.anyio

SCORE, RERANK = "/v1/score", "/v1/rerank"
TEXTS = ["ab", "zzzz", "b"]


async def cosines(http: httpx.AsyncClient, one: list[str], many: list[str], **fields: Any) -> list[float]:
    reply = await http.post("/v1/embeddings", json={"model": "fish", "input": [*one, *many], **fields})
    rows = np.array([item["embedding"] for item in reply.json()["data"]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows[: len(one)] * rows[len(one) :]).sum(1).tolist()


async def test_a_score_is_the_cosine_of_two_embeddings(http: httpx.AsyncClient) -> None:
    for one, many in (("a", TEXTS), (["a"], TEXTS), (["x", "yy", "z"], TEXTS), ("a", "b")):
        reply = await http.post(SCORE, json={"model": "fish", "text_1": one, "text_2": many})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        first, second = ([given] if isinstance(given, str) else given for given in (one, many))
        wanted = await cosines(http, first, second)
        assert [item["index"] for item in answer["data"]] == [*range(len(second))]
        np.testing.assert_allclose([item["score"] for item in answer["data"]], wanted, atol=1e-12)
        tokens = sum(map(len, [*first, *second]))  # a letter a token
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_the_nearest_documents_come_first(http: httpx.AsyncClient) -> None:
    wanted = await cosines(http, ["a"], TEXTS)
    order = sorted(range(3), key=lambda at: -wanted[at])
    for fields, count in (({}, 3), ({"top_n": 0}, 3), ({"top_n": 2}, 2), ({"top_n": 9}, 3)):
        body = {"model": "fish", "query": "a", "documents": TEXTS, **fields}
        results = (await http.post(RERANK, json=body)).json()["results"]
        assert [item["index"] for item in results] == order[:count]
        assert [item["document"]["text"] for item in results] == [TEXTS[at] for at in order[:count]]
        np.testing.assert_allclose([item["relevance_score"] for item in results], [wanted[at] for at in order[:count]])
    bare = await http.post(RERANK, json={**body, "return_documents": False})
    assert {item["document"] for item in bare.json()["results"]} == {None}


async def test_depth_reaches_the_engine(http: httpx.AsyncClient) -> None:
    found = [
        (await http.post(SCORE, json={"model": "fish", "text_1": "a", "text_2": "zz", "depth": depth})).json()["data"]
        for depth in ("shallow", "full")
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        (SCORE, {"text_1": "", "text_2": "a"}, "text_1"),
        (SCORE, {"text_1": "a", "text_2": []}, "text_2"),
        (SCORE, {"text_1": ["a", "b"], "text_2": TEXTS}, "text_1"),
        (SCORE, {"text_1": "a", "text_2": ["x" * 385]}, "text_2"),
        (SCORE, {"text_1": "a", "text_2": [7]}, "text_2[0]"),
        (SCORE, {"text_1": "a"}, "text_2"),
        (SCORE, {"text_1": "a", "text_2": "b", "depth": "abyss"}, "depth"),
        (SCORE, {"text_1": "a", "text_2": "b", "text_3": "c"}, "text_3"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": ["b", ""]}, "documents"),
        (RERANK, {"query": "a", "documents": ["b"] * 2049}, "documents"),
        (RERANK, {"query": "", "documents": ["b"]}, "query"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    ],
)
async def test_what_cannot_be_compared_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, url: str, fields: dict[str, Any], param: str
) -> None:
    reply = await http.post(url, json={"model": "fish", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
