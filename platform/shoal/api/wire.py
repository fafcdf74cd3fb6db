"""How the wire speaks: bodies parsed field by field, errors in OpenAI's envelope, SSE lines. What may be in a body is in
`bodies`.

Notable: nothing is ignored in silence. A field is known and used; or it would change the answer and cannot be honoured, and
then only its "off" values pass and anything else is a 400 that says why; or it is unknown, and a 400 asks "did you mean". A
null means "not given". What changes nothing here is taken, and the answer's header names it: hints, and what clients put into
histories by themselves (`client_fields`). Ranges are checked where values are used (`engine.events.Sampling`), so each is
written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from shoal.api.json_text import dumps, loads, pieces, place_of
from shoal.errors import RequestError, did_you_mean

W = TypeVar("W", bound="Wire")

DONE = b"data: [DONE]\n\n"
MOST_FAULTS = 1000


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
    return _name_of(payload) + sse(payload)


def sse_pieces(payload: Mapping[str, Any]) -> Iterator[bytes]:
    """As `sse`, of what may be long."""
    yield b"data: "
    yield from pieces(payload)
    yield b"\n\n"


def named_sse_pieces(payload: Mapping[str, Any]) -> Iterator[bytes]:
    """As `named_sse`, of what may be long."""
    yield _name_of(payload)
    yield from sse_pieces(payload)


def _name_of(payload: Mapping[str, Any]) -> bytes:
    return f"event: {payload['type']}\n".encode()


# ---- request bodies --------------------------------------------------------------------------------------------------


def _end_lists_early(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for name, part in schema.items():
            if name != "metadata":
                _end_lists_early(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _end_lists_early(part)


class Wire(BaseModel):
    """A part of a request body. `refused`: field of OpenAI's API -> (the values that mean "off", why nothing else). `hints`:
    field that clients send and that changes nothing here -> the values that ask for nothing; with another it is named in the
    header ``X-Shoal-Unused``. `ignored`: fields that may have any value, which are named there unless they are empty."""

    model_config = ConfigDict(extra="forbid", strict=True)
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    hints: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[bool] = True  # False: of whatever else it holds nothing is read
    _ignored: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """With lists that end at their first error: one for each of a million items would take seconds, in which no other
        thread runs."""
        schema = handler(source)
        _end_lists_early(schema)
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _known_fields(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return validate(values)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept, ignored = {}, []
        for name, value in values.items():
            if name in known:
                if value is not None:
                    kept[name] = value
            elif name in cls.ignored:
                ignored += [name] if value else []
            elif not cls.reads or cls._is_other(values):
                continue
            elif name not in cls.refused:
                hint = did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
                raise _problem("unknown field", name, hint)
            elif value is not None and not any(
                value == off and type(value) is type(off) for off in cls.refused[name][0]
            ):
                raise _problem("not supported", name, cls.refused[name][1])
        made = validate(kept)
        made._ignored = tuple(ignored)
        return made

    @classmethod
    def _is_other(cls, values: Mapping[str, Any]) -> bool:
        """Whether `values` are of another type, which is at fault then, and not its fields."""
        kind = cls.model_fields.get("type")
        allowed = () if kind is None else get_args(kind.annotation)
        return bool(allowed) and "type" in values and values["type"] not in allowed


class Unread(Wire):
    """A part that no model here reads: whatever it holds, it is left out."""

    type: str
    reads: ClassVar[bool] = False


def unused(body: Wire) -> list[str]:
    """The fields of `body` that were given and change nothing, as ``messages[].name``, each once."""
    found: dict[str, None] = {}

    def look(part: Wire, path: str) -> None:
        if isinstance(part, Unread):
            found[f"{path}{part.type}"] = None
            return
        found.update(dict.fromkeys(f"{path}{name}" for name in part._ignored))
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
    """A `kind` from JSON bytes. Raises RequestError with `param` set to the path of the field at fault."""
    values = loads(body)
    if not isinstance(values, dict):
        raise RequestError("body", got=type(values).__name__, allowed="a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        if (faults := error.error_count()) > MOST_FAULTS:  # of an object of many wrong values; to tell each takes long
            raise RequestError("values in the body", got=f"{faults} wrong ones", do="send fewer at once") from None
        first = error.errors(include_url=False)[0]
        path = _path([*first["loc"], *((first["ctx"]["name"],) if first["type"] == "shoal" else ())])
        if first["type"] == "missing":
            raise RequestError(f"{path} is missing", param=path) from None
        if first["type"] == "shoal":
            raise RequestError(f"{path}: {first['msg']}", param=path) from None
        raise RequestError(path, param=path, got=_shown(first["input"]), allowed=_allowed(first)) from None


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
    "less_than_equal": "at most {le}",
}


def _path(loc: list[int | str]) -> str:
    """The place of a pydantic location; the tags of unions (in angle brackets) are left out."""
    return place_of([item for item in loc if isinstance(item, int) or not item.startswith("<")])
