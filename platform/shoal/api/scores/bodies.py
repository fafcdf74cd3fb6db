"""What may be in the bodies of scoring: as `api.bodies`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, Field

from shoal.api.bodies import Refused, Texts
from shoal.api.wire import Wire
from shoal.config import FULL


class Compared(Wire):
    model: str = Field(description="a name that /v1/models lists")
    user: str | None = Field(None, max_length=256, description="written to the access log beside the request id")
    depth: str | int | None = Field(None, description="exit whose hidden states are compared [full]")

    @property
    def pooled_at(self) -> str | int:
        return FULL if self.depth is None else self.depth


class ScoreRequest(Compared):
    text_1: Texts = Field(description="one text, compared with each of text_2; or as many as those, each with its own")
    text_2: Texts
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "shoal", "text_1": "the sea", "text_2": ["deep water", "def f(x):"]}]}
    )


class RerankRequest(Compared):
    query: str
    documents: list[str] = Field(min_length=1)
    top_n: int | None = Field(None, ge=0, description="so many of the best; 0 or nothing: all")
    return_documents: bool = Field(True, description="their texts beside their places")
    refused: ClassVar[Refused] = {"max_tokens_per_doc": ((0,), "cut the documents yourself")}
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "shoal", "query": "the sea", "documents": ["deep water", "def f(x):"], "top_n": 1}]
        }
    )
