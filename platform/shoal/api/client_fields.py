"""Fields that well-known clients send, mostly in histories, and that change no answer here: one table for all protocols. Each
may have any value; `wire` leaves it out and names it in ``X-Shoal-Unused``. What would change the answer is not in it."""

from __future__ import annotations

_OF_TOOLS = frozenset({"cache_control", "defer_loading"})  # every prompt's beginning is cached, and all tools are shown

IGNORED = {
    # Chat Completions: what the openai client's parse, litellm, vLLM, DeepSeek, OpenRouter and Gemini's endpoint add
    "chat": frozenset({"prompt_cache_options"}),
    "chat.message": frozenset(
        {
            "annotations", "parsed", "provider_specific_fields", "reasoning", "reasoning_content", "reasoning_details",
            "reasoning_items", "thinking_blocks",
        }
    ),
    "chat.part": frozenset({"prompt_cache_breakpoint"}),
    "chat.call": frozenset({"caller", "extra_content", "index", "provider_specific_fields"}),
    "chat.call.function": frozenset({"parsed_arguments", "provider_specific_fields"}),
    "chat.tool": _OF_TOOLS,
    # Responses: what its own answers have, the openai client's parse, and Codex
    "responses": frozenset({"client_metadata", "prompt_cache_options"}),
    "responses.reasoning": frozenset({"context"}),
    "responses.item": frozenset({"created_by", "phase"}),
    "responses.call": frozenset({"async", "caller", "created_by", "namespace", "parsed_arguments"}),
    "responses.output": frozenset({"caller", "created_by", "name", "namespace"}),  # call_id says whose it is
    "responses.text": frozenset({"annotations", "logprobs", "parsed", "prompt_cache_breakpoint"}),
    "responses.tool": _OF_TOOLS,
    # Messages: what its own answers have, the anthropic client's parse, Claude Code, and Bedrock's and Vertex's clients
    "messages": frozenset(
        {
            "anthropic_beta", "anthropic_version", "betas", "billing_policy", "diagnostics", "fallback_credit_token",
            "fallbacks",
        }
    ),
    "messages.text": frozenset({"citations", "parsed_output"}),
    "messages.use": frozenset({"caller", "parsed_input", "toolset_name"}),
    "messages.cache_control": frozenset({"scope"}),
    "messages.thinking": frozenset({"block_binding"}),
    "messages.tool": frozenset({"defer_loading"}),
}  # fmt: skip
