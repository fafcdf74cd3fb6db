"""The engine: requests in, typed events out, one `step` at a time, in the caller's thread.

    engine = Engine(model)
    answers = engine.generate([Request("def f(", Sampling(max_tokens=32))])

`front.AsyncEngine` runs one in a thread of its own behind asyncio. Whatever happens (a forward that raises, logits that are not
finite, a cancelled or too slow request), every admitted request ends in exactly one `Finished`, and its units return to
the pool.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from shoal.config import AUTO, KvCacheDtype
from shoal.engine.events import MAX_DRAFTS, Completion, Event, Finished, Request, Token
from shoal.engine.guided import Grammars
from shoal.engine.images import PromptImages
from shoal.engine.metrics import Samples, sample
from shoal.engine.pages import Pages
from shoal.engine.runner import Runner
from shoal.engine.running import Running
from shoal.engine.scheduler import Scheduler
from shoal.engine.shares import may_wait
from shoal.engine.sizes import Needs, default_rows, default_units
from shoal.engine.text import TextStream
from shoal.errors import (
    AdapterGoneError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    RequestError,
    again,
    frames,
    of_request,
)
from shoal.model.adapters import Adapter
from shoal.model.cost import kv_bytes_stored
from shoal.model.gpu import launch, trial
from shoal.model.model import Model
from shoal.model.slots import stored_as

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # failed steps in a row after which the engine is dead


class Engine:
    """Continuous batching over a pool of KV units. Not thread-safe: one thread calls it.

    Examples:
        Many prompts in one batch; answers come in their order:

        >>> from shoal import Engine, Model, Request, Sampling
        >>> engine = Engine(Model.from_preset("test"))
        >>> asked = [Request(text, Sampling(max_tokens=4, ignore_eos=True)) for text in ("def add(", "Once upon")]
        >>> [(len(answer.tokens), answer.finish_reason) for answer in engine.generate(asked)]
        [(4, 'length'), (4, 'length')]

        Or step by step, with tokens as they come:

        >>> name = engine.submit(Request("def add(", Sampling(max_tokens=2, ignore_eos=True), depth="shallow"))
        >>> events = []
        >>> while not engine.idle:
        ...     events += engine.step()
        >>> [type(event).__name__ for event in events], events[-1].depth
        (['Token', 'Token', 'Finished'], 1)
    """

    def __init__(
        self,
        model: Model,
        *,
        units: int | None = None,
        max_batch_tokens: int | None = None,
        max_batch: int = 32,
        max_queue: int = 1024,
        compute_budget: float | None = None,
        speculative: int = 0,
        speculative_max_batch: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        gpu_share: float = 0.9,
        graphs: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`units`: KV units, the null unit included (default: what a quarter of the free memory holds, at most what
        `max_batch` requests of full context need). A step runs at most `max_batch_tokens` rows [`default_rows`] of `max_batch`
        requests; `max_queue` more may wait. `compute_budget` in (0, 1]: mean share of the layers that requests of depth
        "auto" are to use. `speculative`: tokens that requests deeper than group 1 draft ahead unless they say otherwise, in
        steps of at most `speculative_max_batch` requests (default: as far as it is measured to pay). `kv_cache_dtype`: "auto",
        keys and values in the model's precision, or "int8", rounded with a scale each, in a third to a fourth of
        fp32's memory (`model.slots`). `gpu_share`: of a GPU's memory, all that the engine may take: what weights and steps
        leave of it is for keys and values. `graphs`: decoding steps on a GPU are recorded once and replayed (`engine.graphs`).
        Raises ConfigError for values that cannot work together, and ResourceError where the memory does not hold one text.
        """
        config, device = model.config, model.device
        kv_dtype = stored_as(kv_cache_dtype, model.net.dtype)
        trial.of_steps(model.net, kv_dtype)
        self._default_rows = partial(default_rows, config, device, model.net.dtype, gpu_share, kv_dtype)
        self._fixed_rows = bool(max_batch_tokens) or device in launch.GIVEN_UP
        max_batch_tokens = max_batch_tokens or self._default_rows()
        _check_limits(model, max_batch_tokens, max_batch, max_queue, compute_budget)
        if not 0 <= speculative <= MAX_DRAFTS:
            raise ConfigError("speculative", got=speculative, allowed=f"0 to {MAX_DRAFTS}")
        self._unit_bytes = kv_bytes_stored(config, 1, config.group_layers, model.net.dtype, kv_dtype)
        if units is None:
            needs = Needs.of(model.net, config, max_batch_tokens, device, model.net.dtype, kv_dtype)
            units = default_units(config, max_batch, self._unit_bytes, device, gpu_share, needs)
        if units < 2:
            raise ConfigError("units", got=units, allowed="2 or more (the null unit and one that holds tokens)")
        self.model, self.config, self._clock = model, config, clock
        self.scheduler = Scheduler(
            config,
            Pages(units, weights=f"{model.name}:{config.quantization}"),
            max_batch_tokens=max_batch_tokens,
            max_batch=max_batch,
            max_queue=max_queue,
            speculative=speculative,
            speculative_max_batch=speculative_max_batch,
            audits=compute_budget is None,
            clock=clock,
        )
        self._grammars = Grammars(model.tokenizer, config.vocab)
        self._said = (~model.forbidden()).tolist()  # of each id: may an answer hold it?
        self.runner = Runner(model, units, compute_budget, kv_dtype, max_batch * graphs)
        self.dead: EngineDeadError | None = None
        self.ran = False  # did the last step run any row?
        self._failures = 0

    # --- requests -----------------------------------------------------------------------------------------------------

    def prepare(self, request: Request) -> Running:
        """`request` checked and encoded; may run in any thread. Raises RequestError naming the field at fault, and
        ContextLengthError when prompt and max_tokens together exceed the context."""
        prompt = self.model.encode(request.prompt)
        sampling, config = request.sampling, self.config
        if len(prompt.ids) + sampling.max_tokens > config.context:
            raise ContextLengthError(
                f"prompt of {len(prompt.ids)} tokens and max_tokens of {sampling.max_tokens}",
                param="max_tokens" if len(prompt.ids) < config.context else "prompt",
                got=len(prompt.ids) + sampling.max_tokens,
                allowed=f"at most {config.context} together",
            )
        runs = [token for run in sampling.banned for token in run]
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
            ("banned", runs),
        ):
            wrong = next((token for token in ids if not 0 <= token < config.vocab), None)
            if wrong is not None:
                raise RequestError(name, param=name, got=wrong, allowed=f"token ids 0 to {config.vocab - 1}")
        layers = self._layers(request)
        chosen = layers is None or request.routed  # by a router
        _check_answer(request, self._said, self.model.tokenizer.ends)
        adapter = self.find_adapter(request.adapter)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        running = Running(
            request=request,
            tokens=list(prompt.ids),
            prompt_len=len(prompt.ids),
            page=config.page,
            text=TextStream(self.model.tokenizer, sampling.stop, sampling.include_stop, sampling.frame),
            seed=seed,
            grammar=None if sampling.guided is None else self._grammars.compile(sampling.guided),
            order=(request.priority, 0, 0),
            arrival=self._clock(),
            images=PromptImages.of(prompt),
            adapter=adapter,
            groups=None if layers is None else config.groups(layers),
            layers=layers or 0,
            look=self._look(request, layers) if chosen else None,
            tolerance=None if chosen else request.quality_tolerance,
            spent=request.spent,
            ran=request.ran,
            drawn=len(request.answer) if request.ran else 0,  # of tokens that nobody counted none
            watched=request.signals,
            end_ids=self.model.tokenizer.ends,
        )
        if request.answer:
            running.resume(request.answer)
        return running

    def submit(self, request: Request | Running) -> str:
        """Queue a request (or what `prepare` made of it) and return its id. Raises as `prepare`, QueueFullError, and
        EngineDeadError."""
        if self.dead is not None:
            raise again(self.dead)
        running = self.prepare(request) if isinstance(request, Request) else request
        self.scheduler.submit(running)
        return running.id

    def cancel(self, request: str | Running) -> bool:
        """End a request, given by its id or as what `prepare` made; its `Finished` comes with the next step. False when it is
        not live."""
        return self.scheduler.cancel(request)

    def pause(self, request: str | Running, paused: bool = True) -> None:
        """Stop (or go on) running a request whose reader is behind."""
        self.scheduler.pause(request, paused)

    def forget_prompts(self) -> None:
        """Empty the prefix cache, but for pages that live requests hold."""
        self.scheduler.pages.forget()

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Those that are loaded, by identity. A mapping that nobody changes: loading and dropping put another in its place."""
        return self.runner.adapters

    def load_adapter(self, adapter: Adapter) -> str:
        """Take in `adapter` (made by `open_weights.adapter.read`), and return its identity, which requests name it by."""
        self.runner.take({**self.adapters, adapter.identity: adapter})
        return adapter.identity

    def keep_adapters(self, identities: Collection[str]) -> None:
        """Drop all adapters but these. Requests that were admitted end with theirs."""
        self.runner.take({name: adapter for name, adapter in self.adapters.items() if name in identities})

    def find_adapter(self, identity: str) -> Adapter | None:
        """None for no identity. Raises AdapterGoneError."""
        if not identity:
            return None
        found = self.adapters.get(identity)
        if found is None:
            raise AdapterGoneError("the adapter of this model is not loaded", param="model", do="GET /v1/models")
        return found

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run one step and return what happened. A forward that raises ends the requests of this step with reason
        "error"; after `MAX_FAILURES` in a row, or an error in the books, all requests end so and the engine is dead. One that
        looked at an answer too (`engine.audits`) is made again without."""
        if self.dead is not None:
            return self.scheduler.take_events()
        try:
            if not self._fixed_rows and self.model.device in launch.GIVEN_UP:
                self._fit_rows()
            plan = self.scheduler.plan()
            self.ran = bool(plan.works)
            if not plan.works:
                if self.scheduler.idle:
                    self.scheduler.check_integrity()
                return self.scheduler.take_events()
            try:
                outcome = self.runner.run(plan)
            except Exception as error:
                self._failed(error, plan.audit is None)
                self.scheduler.fail(plan.works, of_request(error, "the step failed"))
                return self.scheduler.take_events()
            self._failures = 0
            return self.scheduler.commit(plan, outcome)
        except Exception as error:  # the scheduler's own state cannot be trusted any more
            log.error("the scheduler failed\n%s", frames(error))
            self.die(type(error).__name__)
            return self.scheduler.take_events()

    def _fit_rows(self) -> None:
        """Once a GPU's kernels are given up while it serves: steps of no more rows than torch's operators have room for. With
        as many as before each step of long prompts would end for want of memory, and after some of them the engine."""
        s, self._fixed_rows = self.scheduler, True
        s.max_batch_tokens = min(s.max_batch_tokens, max(self._default_rows(), s.max_batch + self.config.page))

    def die(self, reason: str) -> None:
        """Refuse all further work, and end every live request with EngineDeadError."""
        self.dead = self.dead or EngineDeadError("the engine is dead", got=reason, do="restart it")
        self.scheduler.fail_all(self.dead)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run `requests` to their ends, in their order. Raises as `submit` for a request that cannot be admitted, after
        cancelling the others."""
        waiting, done = list(requests)[::-1], dict[str, Completion]()
        if len({request.id for request in waiting}) < len(waiting):
            raise RequestError("two requests have the same id", param="id", do="make a Request for each answer")
        try:
            while waiting or any(answer.finished is None for answer in done.values()):
                while waiting and not self.scheduler.full:
                    self.submit(waiting[-1])
                    done[waiting.pop().id] = Completion()
                for event in self.step():
                    if event.request in done:
                        _add(done[event.request], event)
        except BaseException:
            for request, answer in done.items():
                if answer.finished is None:
                    self.cancel(request)
            raise
        return list(done.values())

    @property
    def idle(self) -> bool:
        """Is no request live, and no answer still to be looked at (`engine.audits`)?"""
        return self.scheduler.idle

    @property
    def urgent(self) -> bool:
        """Is any request live that may not wait for all others?"""
        return any(not may_wait(running) for running in self.scheduler.live)

    def stats(self) -> Samples:
        """Every number that it knows of itself, by the names that Prometheus shows (`engine.metrics` says what they are)."""
        s, pages = self.scheduler, self.scheduler.pages
        gauges: Samples = {
            sample("num_requests_running"): len(s.running),
            sample("num_requests_waiting"): len(s.waiting),
            sample("kv_cache_usage_perc"): 1 - pages.available / pages.total,
            sample("kv_units"): pages.total,
            sample("kv_units_cached"): pages.cached,
            sample("kv_cache_bytes"): pages.total * self._unit_bytes,
        }
        return gauges | s.metrics.samples(self.config.exits) | s.judge.samples()

    def info(self) -> dict[str, str]:
        """What it says of itself that is no number: ``quantization``, what it computes with. That is not what is stored where
        a machine cannot be trusted with INT8."""
        return {"quantization": self.config.quantization}

    def _layers(self, request: Request) -> int | None:
        """The depth in layers that a request runs to; None where the router decides."""
        tolerance = None if request.routed else request.quality_tolerance
        layers = self.config.asked(request.depth, tolerance=tolerance)
        if layers is None and (self.model.router is None or request.adapter):
            return self.config.layers  # the router's bounds are those of the model alone
        if layers is None and request.answer:
            raise RequestError("depth", param="depth", got=AUTO, do="give the depth that the answer began with")
        return layers

    def _look(self, request: Request, layers: int | None) -> int | None:
        """After how many tokens of its answer the router looks again at a request that it gave `layers` [not decided yet]; None
        where it will not."""
        router = self.model.router
        if router is None or router.later is None or request.adapter or layers == self.config.layers:
            return None
        if self.runner.compute_budget is not None and request.quality_tolerance is None:
            return None  # a budget is of one look: a second would take more
        if not router.later.covers(request.quality_tolerance):
            return None
        after = router.later.after
        return after if len(request.answer) <= after < request.sampling.max_tokens else None

    def _failed(self, error: Exception, counts: bool) -> None:
        log.error("a step failed\n%s", frames(error))
        self._failures += counts
        if self._failures >= MAX_FAILURES:
            self.die(f"{self._failures} steps failed in a row, the last with {type(error).__name__}")


def _check_limits(model: Model, batch_tokens: int, batch: int, queue: int, budget: float | None) -> None:
    if batch < 1:
        raise ConfigError("max_batch", got=batch, allowed="1 or more")
    if queue < 1:
        raise ConfigError("max_queue", got=queue, allowed="1 or more")
    least = batch + model.config.page
    if batch_tokens < least:
        raise ConfigError("max_batch_tokens", got=batch_tokens, allowed=f"{least} or more (max_batch and one page)")
    if budget is not None:
        if not 0 < budget <= 1:
            raise ConfigError("compute_budget", got=budget, allowed="above 0, at most 1")
        if model.router is None:
            raise ConfigError("compute_budget", got=budget, do="fit a router first: this model has none")


def _check_answer(request: Request, said: list[bool], end_ids: Sequence[int]) -> None:
    """Raises RequestError when `request.answer` cannot be the beginning of an answer to it. Among others it cannot hold
    patches, which would need the pixels of an image."""
    answer, sampling = request.answer, request.sampling
    ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else end_ids)}
    wrong = next((token for token in answer if not 0 <= token < len(said) or not said[token] or token in ends), None)
    if wrong is not None:
        allowed = f"token ids 0 to {len(said) - 1} that are said and do not end an answer"
        raise RequestError("answer", param="answer", got=wrong, allowed=allowed)
    if len(answer) > sampling.max_tokens:
        allowed = f"at most max_tokens ({sampling.max_tokens})"
        raise RequestError("answer", param="answer", got=f"{len(answer)} tokens", allowed=allowed)


def _add(answer: Completion, event: Event) -> None:
    answer.text += event.text
    if isinstance(event, Token):
        answer.tokens.append(event.token)
        if event.logprob is not None:
            answer.logprobs.append(event.logprob)
    elif isinstance(event, Finished):
        answer.finished, answer.finish_reason, answer.depth = event, event.reason, event.depth
