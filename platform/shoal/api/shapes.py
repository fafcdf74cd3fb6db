"""What answers look like: the JSON objects of OpenAI's API, as far as they are given here. Answers are plain dicts."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on


class PromptTokens(TypedDict):
    cached_tokens: int


class Quality(TypedDict):
    # nats a token that the answer lost against full depth, or the depth asked for, in the mean of all choices' tokens; null:
    # one ran less deep than full, by the router's choice, and full depth did not look at it
    spent: float | None
    allowed: float  # nats a token: quality_tolerance


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokens]  # left out of a chunk before they are known
    depth: str  # exit name the answer ran with; several, comma-separated, when the choices differ
    # of an answer with a tolerance: layers that ran one after the other for a token, and what it lost
    mean_depth: NotRequired[float]
    quality: NotRequired[Quality]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]  # null for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters from the start of the choice's text


class FunctionCall(TypedDict):
    name: str
    arguments: str  # JSON


class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None  # null beside tool_calls
    refusal: None
    tool_calls: NotRequired[list[Call]]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    index: int
    id: NotRequired[str]  # with type and name in the first of a call; more arguments follow
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


class RankedLogprob(TypedDict):
    logprob: float
    rank: int | None  # 1: the likeliest; null beyond the alternatives
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]  # by token id; null for the first token


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: NotRequired[list[int]]  # with return_token_ids


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Head):
    object: Literal["chat.completion.chunk"]
    prompt_token_ids: NotRequired[list[int]]  # of the first
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]  # there when include_usage is set: null until the last


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # text: base64 of float32, little-endian


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Adapted(TypedDict):
    minutes: float  # that the early exits learned
    agreement: dict[str, float]  # exit name -> share of places at which its likeliest token is full depth's


class ChatPage(TypedDict):
    path: str  # of the chat page that the model was made for
    system: str  # what that page says before a conversation, as the model was taught; may be empty
    examples: list[str]  # first messages; none: the page's own
    depth: str | int  # of requests that name none


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str  # the model's own name, where this one is an alias
    parent: str | None  # of an adapter: the model that it was trained from
    max_model_len: int  # tokens of prompt and answer together
    depths: dict[str, int]  # exit name -> layers, shallowest first
    quantization: str  # what is computed with: none or w8a8; both, comma-separated, where engines differ
    adapted: NotRequired[Adapted]  # where an imported model was given early exits, and it was measured what they say
    page: NotRequired[ChatPage]  # where the policy has words of a page


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    eos_token: str | None
    bos_token: None
    pad_token: str | None
    chat_template: str


class Status(TypedDict):
    status: str
    not_ready: NotRequired[list[str]]  # models that no engine serves, while others are served


class Version(TypedDict):
    version: str
    model: str


class StoredCompletion(ChatCompletion):
    metadata: dict[str, str]


class StoredList(TypedDict):
    object: Literal["list"]
    data: list[StoredCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredMessage(TypedDict):
    id: str
    role: str
    content: NotRequired[str | list[dict[str, str]] | None]
    tool_calls: NotRequired[list[Call]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class StoredMessages(TypedDict):
    object: Literal["list"]
    data: list[StoredMessage]
    first_id: str
    last_id: str
    has_more: bool


class Deleted(TypedDict):
    object: Literal["chat.completion.deleted"]
    id: str
    deleted: Literal[True]


class FeedbackSettings(TypedDict):
    object: Literal["shoal.feedback.settings"]
    captured: bool  # without it no vote is taken
    texts: bool  # whether better answers are, of this key, and `store` keeps texts
    texts_days: int | None  # for how long


class FeedbackTaken(TypedDict):
    object: Literal["shoal.feedback"]
    id: str
    rating: Literal["up", "down"] | None


class Error(TypedDict):
    message: str  # what, got, allowed, and what to do
    type: str
    param: str | None  # path of the field at fault
    code: str | None


class ErrorEnvelope(TypedDict):
    error: Error
