"""The oracle beside the engine, for ever: one request, no cache, no pages, no batch, no drafts; prompt and answer run again,
whole, for every token. It takes every option that a request has; what it shares with the engine is the sampler, the grammars
and the text stream, which have tests of their own against plain definitions.

Left out: what is about time and not about tokens (`deadline`, `priority`), an `answer` that has begun elsewhere, and the
router, whose choice the engine makes on sums of pages: a request of depth "auto" runs at full depth here.
"""

from __future__ import annotations

from shoal.engine.events import Completion, Finished, FinishReason, Request
from shoal.engine.guided import Grammars
from shoal.engine.running import Running
from shoal.engine.sampler import Sampler
from shoal.engine.text import TextStream
from shoal.errors import RequestError
from shoal.model.adapters import Adapter
from shoal.model.model import Model


def generate(model: Model, request: Request, adapter: Adapter | None = None) -> Completion:
    """The answer to `request` with `adapter`, as `Engine.generate` gives it but for times and cache hits. Raises RequestError
    as `Engine.prepare` does for what cannot be encoded or compiled."""
    prompt, sampling, config = model.encode(request.prompt), request.sampling, model.config
    depth = config.asked(request.depth) or config.layers
    running = Running(
        request=request, tokens=list(prompt.ids), prompt_len=len(prompt.ids), page=config.page, order=(0, 0, 0), arrival=0.0,
        text=TextStream(model.tokenizer, sampling.stop, sampling.include_stop, sampling.frame), seed=sampling.seed or 0,
        end_ids=model.tokenizer.ends,
        grammar=None if sampling.guided is None else Grammars(model.tokenizer, config.vocab).compile(sampling.guided),
    )  # fmt: skip
    sampler, answer = Sampler(model.forbidden(), model.tokenizer.ends), Completion(depth=depth)
    if sampling.prompt_logprobs is not None:
        rows = model.logits(running.tokens, depth, prompt.images, adapter)[:-1].clone()
        running.prompt_logprobs = [None, *sampler.score(rows, running.tokens[1:], sampling.prompt_logprobs)]
    reason: FinishReason | None = None
    error: RequestError | None = None
    while reason is None:
        (sampled,) = sampler.sample(model.logits(running.tokens, depth, prompt.images, adapter)[-1:].clone(), [running])
        if sampled.error is not None:
            reason, error = "error", sampled.error
        elif running.ends(sampled.token):
            reason = "stop"
        else:
            running.tokens.append(sampled.token)
            answer.tokens.append(sampled.token)
            answer.logprobs += [sampled.logprob] if sampled.logprob is not None else []
            text, stopped = running.text.push(sampled.token, may_stop=running.answered >= sampling.min_tokens)
            answer.text += text
            reason = "stop" if stopped else "length" if running.answered >= sampling.max_tokens else None
    answer.text += running.text.finish()
    answer.finish_reason = reason
    answer.finished = Finished(
        request.id, reason, depth=depth, prompt_tokens=running.prompt_len, completion_tokens=running.answered, error=error,
        prompt_logprobs=tuple(running.prompt_logprobs),
    )  # fmt: skip
    return answer
