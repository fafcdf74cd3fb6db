"""What may be in a request body: one model a route, one line a field. `wire` says how they are read and refused."""

# long: one line for each field of a dozen routes, which are compared with each other
from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from shoal.api.client_fields import IGNORED
from shoal.api.wire import Wire
from shoal.config import FULL
from shoal.engine.events import MAX_DRAFTS

Refused = Mapping[str, tuple[tuple[Any, ...], str]]  # as `Wire.refused`
Hints = Mapping[str, tuple[Any, ...]]  # as `Wire.hints`
NAME = r"^[A-Za-z0-9_-]{1,64}$"  # of a function, and of a schema

_HINT = "taken, changes nothing: "


def tagged(text: str, tag_of: Any) -> Discriminator:
    """What tells the members of a union apart by their tags; `text` is said where none fits."""
    return Discriminator(tag_of, custom_error_type="allowed", custom_error_message=text)


def text_or_list(value: Any) -> str | None:
    """The tag of a text, or of a list."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def by_type(*kinds: str) -> Discriminator:
    """What tells apart objects of these types by their field ``type``; the tag of each is its type in angle brackets."""

    def tag(value: Any) -> str | None:
        kind = value.get("type") if isinstance(value, dict) else None
        return f"<{kind}>" if isinstance(kind, str) and kind in kinds else None

    return tagged(f"objects of type {', '.join(kinds)}", tag)


def choice_tag(value: Any) -> str | None:
    """The tag of what `tool_choice` is: a text, a tool, or several that are allowed."""
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return "<allowed_tools>"
    return text_or_object(value)


def text_or_object(value: Any) -> str | None:
    """The tag of a text, or of an object."""
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


def refusal_as_text(part: Any, kind: str) -> Any:
    """A part of an assistant's content as one of type `kind` where it is a refusal."""
    if isinstance(part, dict) and part.get("type") == "refusal" and set(part) == {"type", "refusal"}:
        return {"type": kind, "text": part["refusal"]}
    return part


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    names = {str: "<texts>", int: "<ids>", list: "<lists>"}
    return names.get(type(first))


# ---- messages --------------------------------------------------------------------------------------------------------


class CacheControl(Wire):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"
    ignored: ClassVar[frozenset[str]] = IGNORED["messages.cache_control"]


class Cached(Wire):
    """What a client may mark as worth caching."""

    cache_control: CacheControl | None = Field(None, description=_HINT + "every prompt's beginning is cached")
    hints: ClassVar[Hints] = {"cache_control": (None,)}


class ImageUrl(Wire):
    url: str = Field(description="data:image/png;base64,... ; URLs are not fetched")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description=_HINT + "images have one size")
    hints: ClassVar[Hints] = {"detail": ("auto",)}


class TextPart(Cached):
    type: Literal["text"]
    text: str
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.part"]


class ImagePart(Cached):
    type: Literal["image_url"]
    image_url: ImageUrl
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.part"]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    tagged("parts of type text or image_url", _part_tag),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    tagged("text, or a list of parts", text_or_list),
]
Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    tagged("text, or a list of texts", text_or_list),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[int], Tag("<ids>")]
    | Annotated[list[list[int]], Tag("<lists>")],
    tagged("text, a list of texts, token ids, or a list of lists of token ids; not empty", _prompt_tag),
]


class CalledFunction(Wire):
    name: str
    arguments: str = Field(description="JSON, as text")
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.call.function"]


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.call"]


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is read as system; tool answers a call of an assistant message before it"
    )
    content: Content | None = Field(None, description="needed, unless an assistant message has tool_calls")
    tool_calls: list[ToolCall] = Field(default_factory=list, description="of an assistant message")
    tool_call_id: str | None = Field(None, description="of a tool message: the call that it answers")
    name: str | None = Field(None, max_length=256, description=_HINT + "the chat template has no names")
    refusal: str | None = Field(None, description="of an assistant message without content: read as that")
    hints: ClassVar[Hints] = {"name": ()}
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.message"]
    refused: ClassVar[Refused] = {
        "audio": ((), "the model reads text and images"),
        "images": (([],), "send images as parts of a user's content"),
        "function_call": ((), "use tool_calls"),
    }

    @model_validator(mode="before")
    @classmethod
    def _refused_is_said(cls, values: Any) -> Any:
        """What an assistant refused is what it said, as a field or as a part."""
        if not isinstance(values, dict) or values.get("role") != "assistant":
            return values
        content = values.get("content", values.get("refusal"))
        if isinstance(content, list):
            content = [refusal_as_text(part, "text") for part in content]
        kept = {name: value for name, value in values.items() if name != "refusal"}
        return kept if content is None else {**kept, "content": content}


# ---- tools and formats -----------------------------------------------------------------------------------------------


class Function(Wire):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}}, description="JSON schema of the arguments"
    )
    strict: bool = Field(
        False, description="true: also calls that the model makes by itself (tool_choice auto) follow the parameters"
    )


class Tool(Wire):
    type: Literal["function"]
    function: Function
    ignored: ClassVar[frozenset[str]] = IGNORED["chat.tool"]


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedChoice(Wire):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools = Field(description="the model is shown these of `tools`, and calls no others")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedTool, Tag("<object>")]
    | Annotated[AllowedChoice, Tag("<allowed_tools>")],
    tagged('none, auto, required, or {"type": "function", "function": {"name": ...}}', choice_tag),
]


class JsonSchema(Wire):
    name: str = Field(pattern=NAME)
    description: str | None = Field(None, description="told to the model in a system message")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(True, description="the answer follows the schema either way")


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="for type json_schema")


class StructuredOutputs(Wire):
    """vLLM's name; give one of them."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="JSON schema that the answer follows")
    regex: str | None = Field(None, description="regular expression that the whole answer matches")
    choice: list[str] | None = Field(None, description="texts of which the answer is one")
    json_object: Literal[True] | None = None


class StreamOptions(Wire):
    include_usage: bool = Field(
        default=False, description="one more chunk at the end, with usage and depth, and no choices"
    )
    continuous_usage_stats: bool = Field(default=False, description="in every chunk the usage so far")
    include_obfuscation: bool = Field(default=False, description=_HINT + "chunks are sent as they are")
    hints: ClassVar[Hints] = {"include_obfuscation": (False,)}


NO_OPTIONS = StreamOptions.model_validate({})


# ---- bodies ----------------------------------------------------------------------------------------------------------


class GenerationRequest(Wire):
    """What chat and completions have in common. Names and defaults are OpenAI's, then vLLM's, then Shoal's own."""

    model: str = Field(description="a name that /v1/models lists")
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

    top_k: int = Field(0, description="0 or -1: all")
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    include_stop_str_in_output: bool = Field(
        False, description="the text of `stop` that ended the answer is part of it"
    )
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="the answer completes none of the runs of tokens that these are"
    )
    truncate_prompt_tokens: int | None = Field(
        None, description="the last so many tokens of the prompt are read; -1: as many as leave room for the answer"
    )
    return_token_ids: bool = Field(False, description="the ids of prompt and answer beside their texts")
    prompt_logprobs: int | None = Field(
        None, description="of each token of the prompt, with so many alternatives, 0 to 20; not in a stream"
    )

    depth: str | int | None = Field(None, description="auto (the router decides), an exit name, or an exit's layers")
    quality_tolerance: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="nats a token that the answer may lose against full depth, or the depth asked for. Where drafts pay, the "
        "first exit drafts it and usage.quality says what it lost, never more. Elsewhere a fixed depth loses nothing, and auto "
        "runs to the smallest exit at which prompts like its calibration's lose at most that in the mean: spent is 0 where "
        "that is full depth, else null",
    )
    speculative: int | None = Field(
        None,
        description=f"tokens drafted ahead a step, 0 to {MAX_DRAFTS}; without quality_tolerance never changes the answer, only "
        "its speed",
    )

    @property
    def streams(self) -> StreamOptions:
        """The options of a stream, given or not."""
        return self.stream_options or NO_OPTIONS


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, description="default: what the prompt leaves of the context")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, description="0 to 20; needs logprobs")
    reasoning_effort: Effort | None = Field(
        None, description="none to low: depth shallow; medium: auto; high and above: full. Not together with depth"
    )
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = Field(
        None, description="default auto. required, or a name: exactly one call, its arguments guided by their schema"
    )
    parallel_tool_calls: bool = Field(True, description="false: the answer ends with its first call")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="read by the chat template; what it does not know changes nothing"
    )
    add_generation_prompt: bool | None = Field(None, description="open the assistant's turn at the end [true]")
    continue_final_message: bool = Field(
        False, description="the answer goes on with the last message, which is the assistant's"
    )
    store: bool = Field(
        False,
        description=_HINT + "unless server and key allow texts to be kept: then both are, without usual personal data",
    )
    metadata: Metadata = Field(
        default_factory=dict,
        max_length=16,
        description=_HINT + "unless texts are stored; where numbers are captured, `workload` names their slice",
    )
    service_tier: str = Field("auto", max_length=64, description=_HINT + "there is one tier")
    verbosity: Literal["low", "medium", "high"] = Field("medium", description=_HINT + "the model has no such setting")
    prompt_cache_key: str | None = Field(None, max_length=1024, description=_HINT + "the prefix cache needs no key")
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] = Field(
        "in_memory", description=_HINT + "the prefix cache keeps what there is room for"
    )
    safety_identifier: str | None = Field(None, max_length=256, description=_HINT + "use `user`")
    hints: ClassVar[Hints] = {
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "prompt_cache_key": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "safety_identifier": (),
    }
    refused: ClassVar[Refused] = {
        "functions": (([],), "use tools"),
        "function_call": (("none",), "use tool_choice"),
        "modalities": ((["text"],), "answers are text"),
        "audio": ((), "answers are text"),
        "prediction": ((), "predicted outputs are not supported"),
        "web_search_options": ((), "the server fetches nothing"),
        "moderation": ((), "nothing is moderated here"),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED["chat"]
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "shoal",
                    "messages": [{"role": "user", "content": "How deep is the sea?"}],
                    "max_tokens": 64,
                    "depth": "auto",
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ]
        }
    )


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    max_tokens: int = Field(16, description="0 with echo: nothing but the prompt")
    logprobs: int | None = Field(None, description="alternatives for each token, 0 to 20")
    echo: bool = Field(
        False, description="put the prompt before the answer, with its logprobs where those are asked for"
    )
    best_of: int | None = Field(None, description="only as n: to choose, use n and logprobs")
    refused: ClassVar[Refused] = {"suffix": (("",), "the model was not trained to fill in the middle")}
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "shoal", "prompt": "def f(x):", "max_tokens": 32, "temperature": 0}]}
    )


class EmbeddingRequest(Wire):
    model: str = Field(description="a name that /v1/models lists")
    input: Prompt = Field(description="each at least one token")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of float32, little-endian")
    dimensions: int | None = Field(None, description="the model's width: a shortened vector would mean nothing")
    user: str | None = Field(None, max_length=256, description="written to the access log beside the request id")
    depth: str | int | None = Field(
        None, description="exit whose hidden states are pooled: its name, or its layers [full]"
    )

    @property
    def pooled_at(self) -> str | int:
        return FULL if self.depth is None else self.depth

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "shoal", "input": ["the sea", "def f(x):"]}]})


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, description="instead of prompt")
    add_generation_prompt: bool = Field(True, description="for messages: open the assistant's turn at the end")
    add_special_tokens: bool = Field(True, description="text has none to add, so both values give the same ids")
    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "How deep is the sea?"}]})


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[int]
    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [81, 120]}]})


class LoadAdapterRequest(Wire):
    lora_name: str = Field(description="what requests will call it: letters, digits and . _ -")
    lora_path: str = Field(description="its directory, from the folder that the operator named")
    load_inplace: bool = Field(False, description="in place of the adapter of that name")
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "support", "lora_path": "runs/support/adapter"}]}
    )


class UnloadAdapterRequest(Wire):
    lora_name: str
    lora_int_id: int | None = Field(None, description=f"{_HINT}vLLM's number")
    hints: ClassVar[Hints] = {"lora_int_id": (None,)}
    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "support"}]})
