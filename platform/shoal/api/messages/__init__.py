"""``/v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's protocol over the same engine call as a chat."""
