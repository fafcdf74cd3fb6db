"""``/v1/responses``: OpenAI's newer protocol over the same engine call as a chat. Kept is what is stored, in a capture."""
