"""``/v1/responses``: OpenAI's newer protocol over the same engine call as a chat. Nothing is kept between requests."""
