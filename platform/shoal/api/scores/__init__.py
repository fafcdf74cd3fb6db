"""``/v1/score`` and ``/v1/rerank``, as vLLM has them: how near texts are, by the cosine of their embeddings.

Notable: no model of their own is behind them; a score is what `/v1/embeddings` would give, in one call.
"""
