"""What may be in the bodies of the Messages API: as `api.bodies`, by Anthropic's names."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, Tag

from shoal.api.bodies import NAME, Cached, Hints, Refused, by_type, tagged, text_or_list
from shoal.api.client_fields import IGNORED
from shoal.api.wire import Unread, Wire

_HINT = "taken, changes nothing: "


# ---- messages --------------------------------------------------------------------------------------------------------


class TextBlock(Cached):
    type: Literal["text"]
    text: str
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.text"]


class ImageSource(Wire):
    type: Literal["base64"] = Field(description="URLs are not fetched, and no files are kept")
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]
    data: str


class ImageBlock(Cached):
    type: Literal["image"]
    source: ImageSource
    refused: ClassVar[Refused] = {"transformations": ((), "images have one size")}


class ToolUseBlock(Cached):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.use"]


ResultPart = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")], by_type("text", "image")
]
Result = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ResultPart], Tag("<list>")],
    tagged("text, or a list of blocks", text_or_list),
]
System = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Tag("<list>")],
    tagged("text, or a list of text blocks", text_or_list),
]


class ToolResultBlock(Cached):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Result = ""
    is_error: bool = Field(False, description="the model is told that the call failed")
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.use"]


class Thought(Unread):
    type: Literal["thinking", "redacted_thinking"] = Field(description=_HINT + "thoughts are not read back")


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[Thought, Tag("<thinking>")]
    | Annotated[Thought, Tag("<redacted_thinking>")],
    by_type("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Block], Tag("<list>")],
    tagged("text, or a list of blocks", text_or_list),
]


class Message(Wire):
    role: Literal["user", "assistant", "system"] = Field(description="system: text alone")
    content: Content


# ---- tools and settings ----------------------------------------------------------------------------------------------


class Tool(Cached):
    type: Literal["custom"] = Field("custom", description="others are the server's own, which has none")
    name: str = Field(pattern=NAME)
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the input")
    strict: bool = Field(False, description="calls that the model makes by itself follow the schema too")
    eager_input_streaming: bool = Field(False, description=_HINT + "a call's input is sent when it is whole")
    hints: ClassVar[Hints] = {**Cached.hints, "eager_input_streaming": (False,)}
    refused: ClassVar[Refused] = {
        "input_examples": (([],), "put them into the description"),
        "allowed_callers": ((["direct"],), "tools are the client's"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.tool"]


class ToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="of type tool")
    disable_parallel_tool_use: bool = False


class Metadata(Wire):
    user_id: str | None = Field(None, max_length=256, description="written to the access log beside the request id")


class Thinking(Wire):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.thinking"]


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="low: depth shallow; medium: auto; high and above: full. Not together with depth"
    )
    format: OutputFormat | None = None
    refused: ClassVar[Refused] = {"task_budget": ((), "the model is told of no budget: use max_tokens")}


class ContextEdit(Wire):
    type: str = Field(pattern=r"^clear_thinking_\d{8}$", description=_HINT + "thoughts are not read back")
    ignored: ClassVar[frozenset[str]] = frozenset({"keep"})


class ContextManagement(Wire):
    edits: list[ContextEdit] = Field(default_factory=list, description="nothing else of a chat is edited here")


# ---- bodies ----------------------------------------------------------------------------------------------------------


class CountRequest(Cached):
    model: str = Field(description="a name that /v1/models lists")
    messages: list[Message] = Field(min_length=1, description="the answer goes on with a last one of the assistant")
    system: System = ""
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = Field(
        None, description="default auto. any, or a tool: exactly one call, its input guided by its schema"
    )
    thinking: Thinking | None = Field(None, description=_HINT + "the model thinks in its layers: see depth")
    output_config: OutputConfig | None = None
    speed: Literal["standard", "fast"] = Field("standard", description=_HINT + "there is one speed")
    context_management: ContextManagement | None = Field(None, description=_HINT + "thoughts are not read back")
    hints: ClassVar[Hints] = {
        **Cached.hints,
        "thinking": (Thinking.model_validate({"type": "disabled"}),),
        "speed": ("standard",),
        "context_management": (ContextManagement.model_validate({}),),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED["messages"]
    refused: ClassVar[Refused] = {
        "compaction": ((), "nothing of a chat is summarised here"),
        "mcp_servers": (([],), "the server calls nothing"),
        "thread": ((), "no chats are kept here: send all messages, without it"),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "shoal", "messages": [{"role": "user", "content": "How deep is the sea?"}]}]
        }
    )


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1, description="more than the context has left is that")
    temperature: float = Field(1.0, description="0 is greedy")
    top_p: float = 1.0
    top_k: int = Field(0, description="0 or -1: all")
    stop_sequences: list[str] = Field(
        default_factory=list, description="texts that end the answer and are not part of it"
    )
    stream: bool = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] = "auto"  # there is one
    inference_geo: str | None = Field(None, max_length=64, description=_HINT + "it runs where it is asked")
    depth: str | int | None = Field(None, description="auto (the router decides), an exit name, or an exit's layers")
    quality_tolerance: float | None = Field(None, ge=0, allow_inf_nan=False, description="as of a chat")
    hints: ClassVar[Hints] = {**CountRequest.hints, "inference_geo": ()}
    refused: ClassVar[Refused] = {
        **CountRequest.refused,
        "container": ((), "the server runs no code"),
        "user_profile_id": ((), "use metadata.user_id"),
        "workspace_id": ((), "there are none"),
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "shoal",
                    "max_tokens": 64,
                    "system": "Be brief.",
                    "messages": [{"role": "user", "content": "How deep is the sea?"}],
                }
            ]
        }
    )

    @property
    def user(self) -> str | None:
        """For the access log and the turns of the engine."""
        return self.metadata.user_id if self.metadata else None
