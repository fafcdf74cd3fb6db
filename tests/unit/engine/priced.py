"""What an answer with a tolerance costs, computed again: whole forward passes of prompt and answer, without cache, pages or
batch, and the definition in `engine/tolerance.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shoal import Model, Request, Sampling
from shoal.engine.events import Finished, Guide, Token
from shoal.engine.guided import Grammars
from shoal.engine.running import Running
from shoal.engine.sampler import Sampler
from shoal.engine.text import TextStream

Told = list[Token | Finished]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "frequency_penalty": 0.5},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 2},
    "guided": {"temperature": 0.9, "guided": Guide("regex", "[a-f]{3,40}"), "ignore_eos": False},
}


def law(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """What a token is drawn from, where `logits` [V] are penalised and masked: temperature, top-k, top-p as defined."""
    z = logits.numpy() / sampling.temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[p < p[order[sampling.top_k - 1]]] = 0
    if sampling.top_p < 1:
        mass = np.cumsum(p[order]) / p.sum()
        last = order[int(np.searchsorted(mass, sampling.top_p))]
        p[p < p[last]] = 0
    whole: np.ndarray = p / p.sum()
    return whole


def prices(model: Model, request: Request, tokens: list[int], depths: list[int]) -> list[float]:
    """What each of `tokens` costs, as answer to `request`: from forward passes of the whole text, at the depth in layers that
    each was told with and at the first exit, and the definition in `tolerance.py`."""
    prompt, sampling = model.encode(request.prompt), request.sampling
    grammars = Grammars(model.tokenizer, model.config.vocab)
    running = Running(
        request=request, tokens=list(prompt.ids), prompt_len=len(prompt.ids), page=model.config.page,
        text=TextStream(model.tokenizer, ()), seed=sampling.seed or 0, order=(0, 0, 0), arrival=0.0,
        grammar=None if sampling.guided is None else grammars.compile(sampling.guided),
    )  # fmt: skip
    sampler, found = Sampler(model.forbidden(), model.tokenizer.ends), list[float]()
    whole = [*prompt.ids, *tokens]
    laws = {depth: model.logits(whole, depth, prompt.images) for depth in {*depths, model.config.exits[0]}}
    for place, (token, depth) in enumerate(zip(tokens, depths, strict=True), len(prompt.ids) - 1):
        full, exit_ = (laws[at][place : place + 1].clone() for at in (depth, model.config.exits[0]))
        (drawn,) = sampler.sample(full, [running])
        sampler.sample(exit_, [running])
        if token == drawn.token:
            found.append(0.0)
        elif sampling.temperature == 0:
            found.append(float(full.max() - full[0, token]))
        else:
            p, q = (law(row[0], sampling) for row in (full, exit_))
            with np.errstate(divide="ignore", invalid="ignore"):
                divergence = np.where(p > 0, p * np.log(p / q), 0).sum()
            found.append(divergence / (0.5 * np.abs(p - q).sum()))
        running.tokens.append(token)
    return found


def check(model: Model, request: Request, events: Told) -> float | None:
    """The answer spent what it says, and at every token at most its tolerance; where it says nothing, no token is another than
    that of its depth. Returns nats a token, None where nobody looked. `model`: with the request's adapter in its weights."""
    *tokens, end = events
    assert isinstance(end, Finished) and end.reason in ("length", "stop", "cancelled"), end
    said = [one for one in tokens if isinstance(one, Token)]
    assert len(said) == len(tokens)
    spent, wanted = 0.0, prices(model, request, [one.token for one in said], [one.depth for one in said])
    depths, layers = {one.depth for one in said}, model.config.asked(request.depth) or model.config.layers
    looked = [one.spent is not None for one in said]
    if not all(looked):
        assert not any(looked) and (not said or end.spent is None), "who looks at an answer looks at all of it"
        assert request.depth == "auto" and not request.adapter
        assert wanted == [0.0] * len(said)
        return None
    assert depths <= {layers}
    for count, (one, price) in enumerate(zip(said, wanted, strict=True)):
        assert one.spent is not None and one.spent - spent == pytest.approx(price, abs=1e-8)
        spent = one.spent
        assert spent <= request.quality_tolerance * count  # type: ignore[operator]
    if end.spent is None:
        assert not said and (request.depth == "auto" or end.reason == "cancelled")
        return None
    assert end.spent >= spent  # what ends an answer may have cost something, too
    assert end.spent <= request.quality_tolerance * len(said)  # type: ignore[operator]
    return end.spent / max(1, len(said))
