"""vLLM's asynchronous engine as an engine of ours: what a replica runs in place of `engine.front.AsyncEngine`.

    Request ─> routed (group 1, once) ─> SamplingParams, token ids, images ─> AsyncLLM ─> token ids ─> Token | Finished

Text, stop strings and deadlines are handled here by what our own engine uses for them, so an answer reads the same whichever
engine gave its tokens. vLLM runs in a process of its own; its death is told to whoever waits, and the replica is replaced.

An answer of a lost replica goes on here in one of two ways. Its tokens become a part of the prompt; or, where vLLM must know
them as an answer (`needs_replay`), the whole answer is generated again and what was already sent is checked and left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from shoal.api.served import ServedModel
from shoal.config import FULL
from shoal.engine.events import Event, Finished, Guide, Request, Sampling, Token, TokenLogprob
from shoal.engine.guided import need_bounded
from shoal.engine.metrics import Samples
from shoal.engine.text import TextStream
from shoal.errors import (
    ConfigError,
    EngineDeadError,
    GenerationError,
    QueueFullError,
    RequestError,
    first_line,
    frames,
    last_line,
)
from shoal.inputs.chat import Encoded
from shoal.vllm_plugin import PER_REQUEST
from shoal.vllm_plugin.counts import GAUGES, Counts
from shoal.vllm_plugin.images import as_image, collapsed
from shoal.vllm_plugin.options import cache_salt
from shoal.vllm_plugin.route import asked

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
Route = Callable[[Encoded, Request], int]


class VllmEngine:
    """One vLLM engine behind the methods that a replica asks of an engine."""

    def __init__(
        self, served: ServedModel, args: Any, *, layers: int, max_queue: int, route: Route | None = None
    ) -> None:
        """`args`: from `options.engine_args`; `layers`: that it runs; `max_queue`: requests beyond those that run, which may
        wait here; `route`: the layers of a request of depth "auto" (None: all). Raises ConfigError for an engine that does
        not start."""
        self._served, self._route, self._all = served, route, layers
        self._most = args.max_num_seqs + max_queue
        self._live: set[str] = set()
        self._counts = Counts()
        try:
            config = args.create_engine_config()
            self._llm = AsyncLLM.from_vllm_config(
                config, stat_loggers=[lambda _config, _index: self._counts], disable_log_stats=False
            )
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"vLLM does not start with {args.model}", got=_why(error)) from error
        self._context = config.model_config.max_model_len
        self._per_request = getattr(config.model_config.hf_config, "depth", None) == PER_REQUEST

    async def batches(
        self, request: Request, gap: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Event], None]:
        """As `AsyncEngine.batches`. A sampled answer that goes on after a lost replica has other draws than it would have had.
        Raises GenerationError where an answer that is generated again differs from what was sent."""
        began = time.monotonic()
        if len(self._live) >= self._most:
            self._counts.metrics.refused += 1
            raise QueueFullError("the engine's queue is full", allowed=f"{self._most} requests", do="try again")
        if request.id in self._live:
            raise RequestError("request id is in use", param="id", got=request.id)
        self._live.add(request.id)
        reason = "cancelled"  # by who reads, unless the end comes first
        try:
            async with aclosing(self._answer(request, began, gap)) as lists:
                async for events in lists:
                    if isinstance(events[-1], Finished):
                        reason = ""
                        self._counts.ended(events[-1])
                    yield events
        except RequestError:
            reason = "error"
            raise
        finally:
            self._live.discard(request.id)
            if reason:
                self._counts.broken(reason)

    async def _answer(
        self, request: Request, began: float, gap: Callable[[], float]
    ) -> AsyncGenerator[list[Event], None]:
        prompt = self._encoded(request.prompt)
        layers = await self._layers(prompt, request)
        given = () if needs_replay(request.sampling) else request.answer
        try:
            params = sampling_params(request.sampling, len(given), layers if self._per_request else None)
        except ValueError as error:
            raise _refusal(error) from error
        ids = collapsed(prompt.ids) if prompt.images else prompt.ids
        inputs: TokensPrompt = {"prompt_token_ids": [*ids, *given]}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": [as_image(image, self._served.config) for image in prompt.images]}
        if salt := cache_salt(request, layers if self._per_request else None):
            inputs["cache_salt"] = salt
        writing = _Writing(
            request,
            TextStream(
                self._served.tokenizer, request.sampling.stop, request.sampling.include_stop, request.sampling.frame
            ),
            layers,
            began,
        )
        writing.prompt_tokens = len(prompt.ids)
        if reason := writing.resume(given, self._context):
            yield [writing.end(reason)]
            return
        if self._llm.errored:
            raise _ended(taken=False)
        limit = None if request.deadline is None else asyncio.get_running_loop().time() + request.deadline
        outputs = self._llm.generate(inputs, params, request.id, priority=request.priority)
        try:
            while writing.finished is None:
                try:
                    async with asyncio.timeout_at(limit):
                        output = await anext(outputs)
                except TimeoutError:
                    yield [writing.end("deadline")]
                    return
                if events := writing.take(output):
                    yield events
                if writing.finished is None and (pause := gap()) > 0:
                    await asyncio.sleep(pause)  # meanwhile vLLM puts what comes into one output
        except StopAsyncIteration:
            yield [writing.end("cancelled")]
        except VllmDeadError as error:
            raise _ended() from error
        except GenerationError:
            raise
        except (VLLMClientError, ValueError) as error:
            raise _refusal(error) from error
        except Exception as error:
            if self._llm.errored:
                raise _ended() from error
            log.error("vLLM failed on a request\n%s", frames(error))
            raise GenerationError("vLLM failed on this request", got=type(error).__name__) from error
        finally:
            await outputs.aclose()

    def _encoded(self, prompt: Any) -> Encoded:
        if isinstance(prompt, str):
            return Encoded(self._served.tokenizer.encode(prompt))
        return prompt if isinstance(prompt, Encoded) else Encoded(list(prompt))

    async def _layers(self, prompt: Encoded, request: Request) -> int:
        layers = asked(self._served.config, request, None if self._per_request else self._all)
        if layers is None and self._route is not None:
            return await asyncio.to_thread(self._route, prompt, request)
        return self._all if layers is None else layers

    async def embed(
        self, prompts: list[list[int]], depth: str | int = FULL, *, payer: str = "", client: str = "", priority: int = 0
    ) -> list[list[float]]:
        raise RequestError(
            "embeddings", param="model", got="engine vllm", do="ask a model that Shoal's own engine serves"
        )

    async def stats(self) -> Samples:
        """As `Engine.stats`, as far as vLLM tells: it does after each step, so what it said of the last one is not true of an
        engine that has nothing to do."""
        idle: Samples = {} if self._live else dict.fromkeys(GAUGES, 0.0)
        return self._counts.samples(self._served.config.exits) | idle

    async def info(self) -> list[dict[str, str]]:
        """As `AsyncEngine.info`."""
        return [{"quantization": self._served.config.quantization}]

    async def check_health(self) -> None:
        """Raises EngineDeadError."""
        try:
            await self._llm.check_health()
        except Exception as error:
            raise EngineDeadError("the vLLM process ended", do="restart it") from error

    async def drain(self, seconds: float) -> None:
        """Returns when no request is left, at the latest after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._live:
                    await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown)


def _why(error: Exception) -> str:
    """The line of `error` that says what is wrong. The last one, but pydantic ends with where to read on."""
    if isinstance(error, ValidationError) and error.errors():
        return str(error.errors()[-1]["msg"])[:300]
    return last_line(error)


def _ended(*, taken: bool = True) -> EngineDeadError:
    """`taken`: with the request, which may be what ended it."""
    error = EngineDeadError("the vLLM process ended", do="try again")
    error.taken = taken
    return error


def _refusal(error: Exception) -> RequestError:
    """vLLM's refusal of a request as ours."""
    return RequestError(first_line(error), param=getattr(error, "parameter", None))


def needs_replay(sampling: Sampling) -> bool:
    """Whether vLLM must have generated an answer itself to go on with it: a grammar and penalties start at the first token that
    vLLM generates, and it gives logprobs of a prompt only for all of it."""
    s = sampling
    penalised = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)
    return s.guided is not None or penalised or s.prompt_logprobs is not None


def sampling_params(sampling: Sampling, answered: int = 0, layers: int | None = None) -> SamplingParams:
    """`sampling` for vLLM, of an answer whose first `answered` tokens are there already. Stop strings are not vLLM's to find.
    Raises RequestError for what vLLM cannot do."""
    s = sampling
    if s.speculative:
        raise RequestError("speculative", param="speculative", got=s.speculative, allowed="0 with engine vllm")
    if s.banned:
        raise RequestError("bad_words", param="bad_words", do="leave them out: engine vllm is not given them")
    seed = s.seed
    if seed is not None and answered:  # the same seed would give the draws of the first tokens once more
        seed = (seed + answered * 0x9E3779B97F4A7C15) % 2**63
    return SamplingParams(
        temperature=s.temperature, top_p=max(s.top_p, 1e-9), top_k=s.top_k, min_p=s.min_p, seed=seed,
        max_tokens=max(1, s.max_tokens - answered), min_tokens=max(0, s.min_tokens - answered),
        stop_token_ids=list(s.stop_token_ids), ignore_eos=s.ignore_eos,
        presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty, repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias) or None, logprobs=s.logprobs, prompt_logprobs=s.prompt_logprobs,
        structured_outputs=_structured(s.guided), extra_args=None if layers is None else {"depth": layers},
        detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


def _structured(guide: Guide | None) -> StructuredOutputsParams | None:
    if guide is None:
        return None
    need_bounded(guide)
    kinds: dict[str, tuple[str, Any]] = {
        "json_schema": ("json", guide.spec),
        "json_object": ("json_object", True),
        "regex": ("regex", guide.spec),
        "choice": ("choice", list(guide.spec)),
        "lark": ("grammar", guide.spec),
    }
    name, value = kinds[guide.kind]
    return StructuredOutputsParams(**{name: value})


class _Writing:
    """One answer as it comes."""

    def __init__(self, request: Request, text: TextStream, layers: int, began: float) -> None:
        self.request, self.text, self.layers, self.began = request, text, layers, began
        self.tokens = self.prompt_tokens = self.cached = 0
        self.first: float | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        self.finished: Finished | None = None

    def push(self, token: int) -> tuple[str, bool]:
        """One more token: as `TextStream.push`."""
        self.tokens += 1
        return self.text.push(token, self.tokens >= self.request.sampling.min_tokens)

    def resume(self, given: Sequence[int], context: int) -> str:
        """Take in the tokens that are part of vLLM's prompt. Returns why the answer has ended with them, "" if it has not."""
        if any(self.push(token)[1] for token in given):
            return "stop"
        full = given and self.prompt_tokens + len(given) >= context
        return "length" if full or len(given) >= self.request.sampling.max_tokens else ""

    def take(self, output: Any) -> list[Event]:
        """The events of what vLLM gave. Raises GenerationError for another answer than was sent."""
        self.cached = min(output.num_cached_tokens or self.cached, self.prompt_tokens)
        most = self.request.sampling.prompt_logprobs
        if most is not None and output.prompt_logprobs is not None and not self.prompt_logprobs:
            ids = output.prompt_token_ids
            self.prompt_logprobs = tuple(
                _logprob(t, at, most) for t, at in zip(ids, output.prompt_logprobs, strict=True)
            )
        part = output.outputs[0]
        ids = list(part.token_ids)
        if part.finish_reason == "stop" and ids:
            ids.pop()  # what ends an answer is not part of it
        events: list[Event] = []
        for index, token in enumerate(ids):
            self.first = self.first or time.monotonic()
            shown, stopped = self.push(token)
            if self.tokens <= len(self.request.answer):
                if token != self.request.answer[self.tokens - 1]:
                    raise _other_answer()
                if stopped:
                    return [self.end("stop")]
                continue
            logprob = _logprob(token, part.logprobs[index], self.request.sampling.logprobs) if part.logprobs else None
            events.append(Token(self.request.id, token, shown, logprob, self.layers))
            if stopped:
                return [*events, self.end("stop")]
        if part.finish_reason is not None:
            if self.tokens < len(self.request.answer):
                raise _other_answer()
            reason = part.finish_reason if part.finish_reason in ("stop", "length") else "error"
            events.append(self.end(reason))
        return events

    def end(self, reason: Any) -> Finished:
        now = time.monotonic()
        error = GenerationError("vLLM ended the request with an error", do="try again") if reason == "error" else None
        self.finished = Finished(
            self.request.id, reason, self.text.finish(), self.layers, self.prompt_tokens, self.cached, self.tokens,
            first_token_seconds=(self.first or now) - self.began, total_seconds=now - self.began,
            error=error, prompt_logprobs=self.prompt_logprobs,
        )  # fmt: skip
        return self.finished


def _other_answer() -> GenerationError:
    what = "the replica that gave this answer was lost, and another one generates another answer"
    return GenerationError(what, do="send the request again")


def _logprob(token: int, found: Any, most: int | None) -> TokenLogprob | None:
    """vLLM's {token: logprob} at one place, with the `most` likeliest."""
    if found is None:
        return None
    best = sorted(((t, float(at.logprob)) for t, at in found.items()), key=lambda pair: -pair[1])[: most or 0]
    return TokenLogprob(token, float(found[token].logprob), tuple(best))
