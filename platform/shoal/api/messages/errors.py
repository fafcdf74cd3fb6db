"""Errors as Anthropic's clients read them."""

from __future__ import annotations

from typing import Any

PATH = "/v1/messages"

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
          429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


def is_theirs(path: str) -> bool:
    """Is `path` one of this protocol, wherever a proxy put the app?"""
    return f"{path}/".find(f"{PATH}/") >= 0


def as_theirs(envelope: dict[str, Any], status: int, request_id: str) -> dict[str, Any]:
    """OpenAI's `envelope` of an error as that of this protocol; `param` and `code` stay in it."""
    error = {**envelope["error"], "type": _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")}
    if status == 400 and error["param"] == "thread":  # by which their client knows to go on without one
        error["details"] = {"error_code": "thread_unsupported_request"}
    return {"type": "error", "error": error, "request_id": request_id}
