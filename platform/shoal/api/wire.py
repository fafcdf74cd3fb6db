"""What comes over the wire: request bodies, checked field by field; errors in OpenAI's envelope; SSE lines.

Notable: nothing is accepted and ignored. A field is known and used; or it is known to OpenAI's API but not here, and then
only its "off" values pass and anything else is a 400 that says why; or it is unknown, and a 400 asks "did you mean". A
null means "not given". Ranges are checked where the values are used (`engine.events.Sampling`), so each is written once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from shoal.errors import RequestError, did_you_mean

W = TypeVar("W", bound="Wire")

DONE = b"data: [DONE]\n\n"


# ---- errors ----------------------------------------------------------------------------------------------------------


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"


class NotFoundError(RequestError):
    status = 404
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class MediaTypeError(RequestError):
    status = 415
    code = "unsupported_media_type"


_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


def envelope(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every error, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(payload) + b"\n\n"


def dumps(payload: Any) -> bytes:
    """Compact UTF-8 JSON; raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


# ---- request bodies --------------------------------------------------------------------------------------------------


class Wire(BaseModel):
    """A part of a request body. `refused`: field of OpenAI's API -> (the values that mean "off", why nothing else)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in cls.refused:
                hint = did_you_mean(name, cls.model_fields) or f"known: {', '.join(sorted(cls.model_fields))}"
                raise _problem("unknown field", name, hint)
            elif value is not None and not any(
                value == off and type(value) is type(off) for off in cls.refused[name][0]
            ):
                raise _problem("not supported", name, cls.refused[name][1])
        return kept


def parse(kind: type[W], body: bytes) -> W:
    """A `kind` from JSON bytes. Raises RequestError with `param` set to the path of the field at fault."""
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError("the body is not valid JSON", got=str(error), allowed="a UTF-8 JSON object") from None
    if not isinstance(values, dict):
        raise RequestError("body", got=type(values).__name__, allowed="a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = _path([*first["loc"], *((first["ctx"]["name"],) if first["type"] == "shoal" else ())])
        shown = first["input"] if isinstance(first["input"], (str, int, float, bool)) else type(first["input"]).__name__
        got = None if first["type"] in ("shoal", "missing") else str(shown)[:80]
        raise RequestError(f"{path}: {first['msg']}", param=path, got=got) from None


def _problem(kind: str, name: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("shoal", "{kind}; {why}", {"name": name, "kind": kind, "why": why})


def _path(loc: list[int | str]) -> str:
    """``messages[0].content`` of a pydantic location; the tags of unions (in angle brackets) are left out."""
    path = ""
    for item in loc:
        if isinstance(item, int):
            path += f"[{item}]"
        elif not item.startswith("<"):
            path += f".{item}" if path else item
    return path[:200]


def _tagged(text: str, tag_of: Any) -> Discriminator:
    return Discriminator(tag_of, custom_error_type="allowed", custom_error_message=f"allowed: {text}")


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    names = {str: "<texts>", int: "<ids>", list: "<lists>"}
    return names.get(type(first))


class ImageUrl(Wire):
    url: str = Field(description="data:image/png;base64,... ; URLs are not fetched")
    detail: Literal["auto"] = "auto"  # the model sees every image at one size


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    _tagged("parts of type text or image_url", _part_tag),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    _tagged("text, or a list of parts", _text_or_list),
]
Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    _tagged("text, or a list of texts", _text_or_list),
]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[int], Tag("<ids>")]
    | Annotated[list[list[int]], Tag("<lists>")],
    _tagged("text, a list of texts, token ids, or a list of lists of token ids; not empty", _prompt_tag),
]


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is read as system")
    content: Content
    refused = {
        "name": ((), "the chat template has no names"),
        "refusal": ((), "only text is read back"),
        "annotations": (([],), "only text is read back"),
        "audio": ((), "the model reads text and images"),
        "tool_calls": (([],), "tools are not supported yet"),
        "tool_call_id": ((), "tools are not supported yet"),
        "function_call": ((), "tools are not supported yet"),
    }


class StreamOptions(Wire):
    include_usage: bool = Field(False, description="one more chunk at the end, with the usage and no choices")
    refused = {"include_obfuscation": ((False,), "chunks are sent as they are")}


class ResponseFormat(Wire):
    type: Literal["text"] = Field(description="json_object and json_schema are not supported yet")


class GenerationRequest(Wire):
    """What chat and completions have in common. Names and defaults are OpenAI's, then vLLM's, then Shoal's own."""

    model: str = Field(description="name of the served model, as /v1/models lists it")
    temperature: float = Field(1.0, description="0 is greedy")
    top_p: float = 1.0
    n: int = Field(1, description="answers to each prompt; with a seed they differ by a seed derived from it")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts = Field(default_factory=list, description="texts that end the answer and are not part of it")
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(
        default_factory=dict, description="token id -> added to its logit, -100 to 100"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="written to the access log beside the request id")

    top_k: int = Field(0, description="0: all")
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False

    depth: str | int | None = Field(None, description="auto (the router decides), an exit name, or an exit's layers")
    quality_tolerance: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="nats/token: the smallest exit whose calibrated bound is within it"
    )


_TOOLS = "tools are not supported yet"
_STORED = "nothing is stored here"


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, description="default: what the prompt leaves of the context")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, description="0 to 20; needs logprobs")
    reasoning_effort: Literal["low", "medium", "high"] | None = Field(
        None, description="low: depth shallow; medium: auto; high: full. Not together with depth"
    )
    response_format: ResponseFormat | None = None
    refused = {
        "tools": (([],), _TOOLS),
        "tool_choice": (("none",), _TOOLS),
        "parallel_tool_calls": ((), _TOOLS),
        "functions": (([],), _TOOLS),
        "function_call": (("none",), _TOOLS),
        "modalities": ((["text"],), "answers are text"),
        "audio": ((), "answers are text"),
        "prediction": ((), "predicted outputs are not supported"),
        "web_search_options": ((), "the server fetches nothing"),
        "store": ((False,), _STORED),
        "metadata": (({},), _STORED),
        "service_tier": (("auto", "default"), "there is one tier"),
        "verbosity": (("medium",), "the model has no such setting"),
        "prompt_cache_key": ((), "the prefix cache needs no key"),
        "safety_identifier": ((), "use `user`"),
    }


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    max_tokens: int = 16
    logprobs: int | None = Field(None, description="alternatives for each token, 0 to 20")
    echo: bool = Field(False, description="put the prompt before the answer; not yet together with logprobs")
    refused = {
        "suffix": (("",), "the model was not trained to fill in the middle"),
        "best_of": ((1,), "use n, and choose by logprobs"),
    }


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, description="instead of prompt")
    add_generation_prompt: bool = Field(True, description="for messages: open the assistant's turn at the end")
    add_special_tokens: bool = Field(True, description="text has none to add, so both values give the same ids")


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[int]
