"""What files and batches look like: OpenAI's objects, as far as they are given here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from shoal.api.bodies import Metadata, Refused
from shoal.api.wire import Wire

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OPEN = ("validating", "in_progress", "finalizing")  # as they are kept: "cancelling" is one of these that is to end
Purpose = Literal["batch", "batch_output"]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchError(TypedDict):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchError]


class Batch(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    errors: BatchErrors | None  # why it failed as a whole
    input_file_id: str
    completion_window: Literal["24h"]
    status: Status
    output_file_id: str | None
    error_file_id: str | None  # of lines that were refused or failed
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchRequest(Wire):
    input_file_id: str = Field(description="of a file of purpose batch: a request a line", max_length=100)
    endpoint: Endpoint = Field(description="that all lines are for")
    completion_window: Literal["24h"] = Field(description="what is not answered by then is listed as expired")
    metadata: Annotated[Metadata, Field(max_length=16)] | None = Field(None, description="given back with the batch")
    refused: ClassVar[Refused] = {"output_expires_after": ((), "files are kept until they are deleted")}
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-18a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
            ]
        }
    )
