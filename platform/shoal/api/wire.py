"""How the wire speaks: bodies parsed field by field, errors in OpenAI's envelope, SSE lines. What may be in a body is in
`bodies`.

Notable: nothing is accepted and ignored. A field is known and used; or it is known to OpenAI's API but not here, and then
only its "off" values pass and anything else is a 400 that says why; or it is unknown, and a 400 asks "did you mean". A
null means "not given". A hint that changes nothing here is taken, and the answer's header names it. Ranges are checked where
values are used (`engine.events.Sampling`), so each is written once.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from shoal.errors import RequestError, did_you_mean

W = TypeVar("W", bound="Wire")

DONE = b"data: [DONE]\n\n"
MOST_COMMAS = 2**20 + 2**16  # in a body: as many as `Limits.tokenized` ids or characters need, and room
MOST_COLONS = 2**17


# ---- errors ----------------------------------------------------------------------------------------------------------


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    status = 403
    code = "insufficient_permissions"


class NotFoundError(RequestError):
    status = 404
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class MethodError(RequestError):
    status = 405
    code = "method_not_allowed"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class MediaTypeError(RequestError):
    status = 415
    code = "unsupported_media_type"


class OverloadedError(RequestError):
    status = 503
    code = "overloaded"


class RateLimitError(RequestError):
    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, what: str, *, retry_after: float, allowed: str) -> None:
        super().__init__(what, allowed=allowed, do=f"try again in {math.ceil(retry_after)} s")
        self.retry_after = retry_after


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def envelope(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every error, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(payload) + b"\n\n"


def named_sse(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {payload['type']}\n".encode() + sse(payload)


def dumps(payload: Any) -> bytes:
    """Compact UTF-8 JSON; raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


# ---- request bodies --------------------------------------------------------------------------------------------------


class Wire(BaseModel):
    """A part of a request body. `refused`: field of OpenAI's API -> (the values that mean "off", why nothing else). `hints`:
    field that clients send and that changes nothing here -> the values that ask for nothing; with another it is named in the
    header ``X-Shoal-Unused``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    hints: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in values.items():
            if name in known:
                if value is not None:
                    kept[name] = value
            elif name not in cls.refused:
                hint = did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
                raise _problem("unknown field", name, hint)
            elif value is not None and not any(
                value == off and type(value) is type(off) for off in cls.refused[name][0]
            ):
                raise _problem("not supported", name, cls.refused[name][1])
        return kept


def unused(body: Wire) -> list[str]:
    """The fields of `body` that were given and change nothing, as ``messages[].name``, each once."""
    found: dict[str, None] = {}

    def look(part: Wire, path: str) -> None:
        for name in type(part).model_fields:
            if name not in part.model_fields_set:
                continue
            value, at = getattr(part, name), f"{path}{name}"
            if name in part.hints and value not in part.hints[name]:
                found[at] = None
            elif isinstance(value, Wire):
                look(value, f"{at}.")
            elif isinstance(value, list) and value and isinstance(value[0], Wire):
                for each in value:
                    look(each, f"{at}[].")

    look(body, "")
    return [*found]


def parse(kind: type[W], body: bytes) -> W:
    """A `kind` from JSON bytes. Raises RequestError with `param` set to the path of the field at fault.

    Commas and colons are counted first, those in texts too: each small value costs about a hundred bytes and a hundred
    nanoseconds, a named one some microseconds, and meanwhile no other thread of this process runs.
    """
    must_be_few(body)
    try:
        values = pydantic_core.from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise RequestError("the body is not valid JSON", got=str(error), allowed="a UTF-8 JSON object") from None
    if not isinstance(values, dict):
        raise RequestError("body", got=type(values).__name__, allowed="a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = _path([*first["loc"], *((first["ctx"]["name"],) if first["type"] == "shoal" else ())])
        if first["type"] == "missing":
            raise RequestError(f"{path} is missing", param=path) from None
        if first["type"] == "shoal":
            raise RequestError(f"{path}: {first['msg']}", param=path) from None
        raise RequestError(path, param=path, got=_shown(first["input"]), allowed=_allowed(first)) from None


def must_be_few(text: bytes) -> None:
    """Raises RequestError for JSON with more values than may be read (`parse` says why)."""
    for what, mark, most in (("commas", b",", MOST_COMMAS), ("colons", b":", MOST_COLONS)):
        if (count := text.count(mark)) > most:
            raise RequestError("too many values in the body", got=f"{count} {what}", allowed=f"at most {most}")


def _problem(kind: str, name: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("shoal", "{kind}; {why}", {"name": name, "kind": kind, "why": why})


def _shown(value: Any) -> Any:
    """What was given, short: a body may be large."""
    if isinstance(value, str):
        return value[:80]
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return value["type"][:80]
    if isinstance(value, (list, dict)) and value:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return value


def _allowed(error: ErrorDetails) -> str:
    """What would do, in our words where pydantic's are those of Python or of its own classes."""
    words = _WORDS.get(error["type"])
    return error["msg"] if words is None else words.format(**error.get("ctx", {}))


_WORDS = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text of the pattern {pattern}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
}


def _path(loc: list[int | str]) -> str:
    """``messages[0].content`` of a pydantic location; the tags of unions (in angle brackets) are left out."""
    path = ""
    for item in loc:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not item.startswith("<"):
            path += f".{item}" if path else item
    return path[:200]
