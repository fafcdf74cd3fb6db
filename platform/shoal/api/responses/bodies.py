"""What may be in the body of the Responses API: as `api.bodies`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, Tag, model_validator

from shoal.api.bodies import (
    NAME,
    Effort,
    Hints,
    Metadata,
    Refused,
    by_type,
    choice_tag,
    refusal_as_text,
    tagged,
    text_or_list,
)
from shoal.api.client_fields import IGNORED
from shoal.api.wire import Unread, Wire

_HINT = "taken, changes nothing: "
LOGPROBS = "message.output_text.logprobs"
KEPT = "texts are not kept here: send the items of the turns before as `input`"
NO_TALKS = "there are none here: go on by previous_response_id, or send the items of the turns before as `input`"


# ---- input -----------------------------------------------------------------------------------------------------------


class InputText(Wire):
    type: Literal["input_text"]
    text: str
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.text"]


class InputImage(Wire):
    type: Literal["input_image"]
    image_url: str = Field(description="data:image/png;base64,... ; URLs are not fetched")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description=_HINT + "images have one size")
    hints: ClassVar[Hints] = {"detail": ("auto",)}
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.text"]
    refused: ClassVar[Refused] = {"file_id": ((), "no files are kept here")}


class OutputText(Wire):
    """As an answer had it."""

    type: Literal["output_text"]
    text: str
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.text"]


Part = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[OutputText, Tag("<output_text>")],
    by_type("input_text", "input_image", "output_text"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    tagged("text, or a list of parts", text_or_list),
]


class Item(Wire):
    """`id` and `status` are what an answer's item had."""

    id: str | None = Field(None, max_length=256)
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.item"]


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _refused_is_said(cls, values: Any) -> Any:
        """What an assistant refused is what it said."""
        if isinstance(values, dict) and values.get("role") == "assistant" and isinstance(values.get("content"), list):
            return {**values, "content": [refusal_as_text(part, "output_text") for part in values["content"]]}
        return values


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as text")
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.call"]


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.output"]


class ReasoningItem(Unread):
    type: Literal["reasoning"] = Field(description=_HINT + "thoughts are not read back")


class ItemReference(Wire):
    type: Literal["item_reference"] = "item_reference"
    id: str = Field(max_length=256, description="of an item of a stored response: it is read in its place")


_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _item_tag(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or ("message" if "role" in value else "item_reference" if "id" in value else None)
    return f"<{kind}>" if kind in _ITEMS else None


AnyItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    tagged(f"items of type {', '.join(_ITEMS)}", _item_tag),
]
Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[AnyItem], Field(min_length=1), Tag("<list>")],
    tagged("text, or a list of items", text_or_list),
]


# ---- tools and settings ----------------------------------------------------------------------------------------------


class FunctionTool(Wire):
    type: Literal["function"] = Field(
        description="others are the server's own, which has none, but for the offer to search"
    )
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}}, description="JSON schema of the arguments"
    )
    strict: bool = Field(False, description="calls that the model makes by itself follow the parameters too")
    refused: ClassVar[Refused] = {
        "allowed_callers": ((["direct"],), "tools are the client's"),
        "async": ((False,), "tools are the client's"),
        "output_schema": ((), "put it into the description"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.tool"]


class OfferedSearch(Unread):
    """Codex offers it in every request; a model that may search and does not is what it gets."""

    type: Literal["web_search"] = Field(
        description=_HINT + "the server fetches nothing; forced by tool_choice it is refused"
    )


def _tool_tag(value: Any) -> str | None:
    search = isinstance(value, dict) and value.get("type") == "web_search"
    return "<web_search>" if search else "<function>"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[OfferedSearch, Tag("<web_search>")],
    tagged("tools of type function", _tool_tag),
]


class NamedFunction(Wire):
    type: Literal["function"]
    name: str


class AllowedFunctions(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(
        min_length=1, description="the model is shown these of `tools`, and calls no others"
    )


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedFunction, Tag("<object>")]
    | Annotated[AllowedFunctions, Tag("<allowed_tools>")],
    tagged('none, auto, required, or {"type": "function", "name": ...}', choice_tag),
]


class Format(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=NAME, description="for type json_schema, as the other fields")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = Field(None, description="told to the model in a system message")
    strict: bool = Field(True, description="the answer follows the schema either way")


class TextConfig(Wire):
    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] = Field("medium", description=_HINT + "the model has no such setting")
    hints: ClassVar[Hints] = {"verbosity": ("medium",)}


class Reasoning(Wire):
    effort: Effort | None = Field(
        None, description="none to low: depth shallow; medium: auto; high and above: full. Not together with depth"
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description=_HINT + "the model thinks in its layers"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    hints: ClassVar[Hints] = {"summary": (), "generate_summary": ()}
    ignored: ClassVar[frozenset[str]] = IGNORED["responses.reasoning"]
    refused: ClassVar[Refused] = {"mode": (("standard",), "there is one")}


class ResponseStreamOptions(Wire):
    include_obfuscation: bool = Field(False, description=_HINT + "events are sent as they are")
    hints: ClassVar[Hints] = {"include_obfuscation": (False,)}


class ResponsesRequest(Wire):
    model: str = Field(description="a name that /v1/models lists")
    input: Input = Field(description="a text, or items: of all turns so far, or of those after previous_response_id")
    instructions: str | None = Field(None, description="the system text; that of turns before does not count")
    store: bool = Field(
        False,
        description="keep input and answer, without usual personal data and images, to be gone on from and read: where server "
        "and key allow it, else 400",
    )
    previous_response_id: str | None = Field(
        None,
        max_length=256,
        description="a stored response: what was said up to it comes before `input`, as it is stored",
    )
    max_output_tokens: int | None = Field(None, ge=1, description="default: what the prompt leaves of the context")
    temperature: float = Field(1.0, description="0 is greedy")
    top_p: float = 1.0
    tools: list[AnyTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = Field(
        None, description="default auto. required, or a name: exactly one call, its arguments guided by their schema"
    )
    parallel_tool_calls: bool = Field(True, description="false: the answer ends with its first call")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    metadata: Metadata = Field(default_factory=dict, max_length=16, description="given back with the answer")
    user: str | None = Field(None, max_length=256, description="written to the access log beside the request id")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    depth: str | int | None = Field(None, description="auto (the router decides), an exit name, or an exit's layers")
    quality_tolerance: float | None = Field(None, ge=0, allow_inf_nan=False, description="as of a chat")
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: the oldest turns are left out where all do not fit the context"
    )
    top_logprobs: int | None = Field(None, ge=0, le=20, description="alternatives beside each token's log-probability")
    include: list[str] = Field(
        default_factory=list,
        max_length=32,
        description=f"{LOGPROBS}: log-probabilities of the answer's text; there is no more to include",
    )
    max_tool_calls: int | None = Field(None, description=_HINT + "it counts the server's own tools, which has none")
    service_tier: str = Field("auto", max_length=64, description=_HINT + "there is one tier")
    prompt_cache_key: str | None = Field(None, max_length=1024, description=_HINT + "the prefix cache needs no key")
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] = Field(
        "in_memory", description=_HINT + "the prefix cache keeps what there is room for"
    )
    safety_identifier: str | None = Field(None, max_length=256, description=_HINT + "use `user`")
    hints: ClassVar[Hints] = {
        "include": ([], [LOGPROBS]),
        "max_tool_calls": (),
        "service_tier": ("auto", "default"),
        "prompt_cache_key": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "safety_identifier": (),
    }
    refused: ClassVar[Refused] = {
        "conversation": ((), NO_TALKS),
        "background": ((False,), "an answer is sent to who asks for it"),
        "prompt": ((), "no prompts are kept here"),
        "context_management": (([],), "nothing of the input is edited here"),
        "moderation": ((), "nothing is moderated here"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED["responses"]
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "shoal",
                    "instructions": "Be brief.",
                    "input": "How deep is the sea?",
                    "max_output_tokens": 64,
                    "store": False,
                }
            ]
        }
    )
