"""Whatever may happen to requests, at once and in any order, against the oracle.

    python -m tests.fuzz --minutes 10 --seed 1

One round: two engines over a tight pool each, in INT8 or fp32, beside threads that compress. Requests of any depth, with
drafts, guides, pictures, adapters, tolerances and several choices of one prompt come, are cancelled, paused, preempted, and
taken from one engine to the other as a lost replica's are, while adapters are loaded and dropped. Then every answer must be the
oracle's (or its beginning, where it was cancelled), each request must have ended once, and every unit must be back. A round is
a function of its seed but for what the busy threads do to memory and time: `--seed N --rounds 1` runs round N again.

The oracle, `naive.generate`, has answered before, with nothing beside it. It computes in another order, so that where two
tokens are nearly equal it may say the other: a request stays only if its answer is the same with noise on all logits. What an
answer with a tolerance says also depends on what was drafted: of those it is looked at what each token costs, by full depth.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import itertools
import json
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Completion, Event, Finished, Guide, Token
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.inputs.tokenizer import END_ID
from shoal.model.adapters import Adapter, kept
from tests.adapters import linears
from tests.oracle import Ahead
from tests.unit.engine.lively import lively

Kind = Literal["fp32", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "int8")
PAGES = (8, 16)  # in a page of 16 stand patches of several pictures
ASKED = 12  # prompts that are drawn for each kind and page size
BESIDE = (lambda name: True, lambda name: "qkv" in name, lambda name: ".mlp." in name and "groups.0" not in name)
TOLERANCES = (0.0, 0.5, 3.0)  # nats a token
NOISE = {"fp32": 1e-3, "int8": 0.1}  # on logits that lie some ten apart
STEPS = 3000  # within which a round's requests end; it takes some hundred
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
GUIDES = (
    Guide("choice", ("yes", "no", "yesterday")), Guide("regex", "(ab?c)+[0-9]{2,4}"), Guide("json_schema", json.dumps(SCHEMA)),
)  # fmt: skip


@cache
def model(kind: Kind, page: int) -> Model:
    """A model whose answers tell requests apart, in `kind`."""
    made = lively()
    made = Model(dataclasses.replace(made.config, page=page), made.net.to(torch.float32), made.tokenizer)
    return made.quantized() if kind == "int8" else made


@cache
def adapters(kind: Kind, page: int) -> list[Adapter | None]:
    """None, and one for each of `BESIDE`, of different ranks."""
    draw, made = torch.Generator().manual_seed(page), list[Adapter | None]([None])
    for number, has in enumerate(BESIDE, 1):
        pairs = {}
        for name, linear in linears(model(kind, page)).items():
            outputs, inputs = linear.weight.shape  # type: ignore[union-attr,misc]
            a, b = torch.randn(2 * number, inputs, generator=draw), torch.randn(2 * number, outputs, generator=draw)
            pairs |= {name: kept(linear, a / inputs**0.5, b / (4 * number) ** 0.5)} if has(name) else {}
        made.append(Adapter(f"adapter {number}", pairs))
    return made


class Noisy:
    """A model whose logits are off by a little: `naive.generate` asks for nothing else of one."""

    def __init__(self, model: Ahead, most: float, *, close: bool) -> None:
        """By up to `most` each, drawn at random; or, where `close`, the likeliest of each row alone, by as much below."""
        self._model, self._most, self._close = model, most, close
        self._generator = torch.Generator().manual_seed(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, *given: Any) -> torch.Tensor:
        logits = self._model.logits(*given)
        if self._close:
            best = logits.argmax(-1, keepdim=True)
            return logits.scatter(-1, best, logits.gather(-1, best) - self._most)
        return logits + self._most * (2 * torch.rand(logits.shape, generator=self._generator) - 1)


@cache
def asked(kind: Kind, page: int, count: int = ASKED) -> list[list[tuple[Request, Completion]]]:
    """Requests to `count` prompts with what the oracle says to them; those of one list are choices of one prompt."""
    rng, found = random.Random(page), list[list[tuple[Request, Completion]]]()
    while len(found) < count:
        made, prompt = model(kind, page), _prompt(rng, model(kind, page))
        beside = rng.choice([None, *adapters(kind, page)])
        depth, base, answers = rng.choice(["shallow", "middle", "full", "auto"]), _sampling(rng), []
        tolerance = rng.choice([None, *TOLERANCES]) if depth in ("full", "auto") else None
        if tolerance is not None:
            base = Sampling(
                temperature=0, max_tokens=base.max_tokens, ignore_eos=base.ignore_eos, speculative=rng.choice([2, 7])
            )
        for choice in range(rng.choice([1, 1, 3])):
            request = Request(
                prompt, dataclasses.replace(base, seed=choice), depth=depth, quality_tolerance=tolerance,
                adapter=beside.identity if beside else "",
            )  # fmt: skip
            answer = naive.generate(made, request, beside)
            if (tolerance or _stands(made, request, beside, answer, NOISE[kind])) and answer.finish_reason != "error":
                answers.append((request, answer))
        found += [answers] if answers else []
    return found


def _stands(made: Model, request: Request, beside: Adapter | None, answer: Completion, most: float) -> bool:
    """Whether an answer is the same where logits are off by `most`, whichever way: of two tokens that are nearly as likely an
    engine may say either, as its CPU adds up."""
    ahead = Ahead(made, [*made.encode(request.prompt).ids, *answer.tokens])
    ways = (Noisy(ahead, most, close=close) for close in (False, True))
    return all(naive.generate(way, request, beside).tokens == answer.tokens for way in ways)  # type: ignore[arg-type]


def _prompt(rng: random.Random, made: Model) -> Encoded:
    """Text, or small pictures among text; many begin alike."""
    if rng.random() < 0.4:
        images = [_picture(rng.randrange(3), 1, 1, made) for _ in range(rng.randint(1, 4))]
        images += [_picture(rng.randrange(2), 3, 3, made)] * rng.randint(0, 1)
        ids = [token for image in images for token in image.tokens()]
        return Encoded([*ids, *made.tokenizer.encode(rng.choice(["what?", "abc"]))], images)
    rest = [rng.randrange(20, 260) for _ in range(rng.choice([0, 1, 5, 14]))]
    return Encoded([60] * rng.choice([8, 16, 24]) + rest)


def _picture(value: int, rows: int, cols: int, made: Model) -> Patches:
    return Patches(np.full((rows * cols, made.config.patch_values), 100 * value, dtype=np.uint8), rows, cols)


def _sampling(rng: random.Random) -> Sampling:
    guided = rng.choice([None, None, None, *GUIDES])
    return Sampling(
        temperature=rng.choice([0.0, 0.5, 1.0]), top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 0, 1, 20]),
        max_tokens=rng.randint(1, 20), ignore_eos=not guided and rng.random() < 0.7, guided=guided,
        repetition_penalty=rng.choice([1.0, 1.2]), logit_bias={END_ID: 2.0}, speculative=rng.choice([0, 2, 7]),
        stop=rng.choice([(), ("a",)]), prompt_logprobs=rng.choice([None, None, 0]),
    )  # fmt: skip


@dataclass
class Asked:
    """One request on its way, over all engines that have worked for it."""

    request: Request  # as its present engine got it
    wanted: Completion
    at: int  # which engine
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    depth: int = 0
    spent: list[float | None] = field(default_factory=list)  # after each token
    end: Finished | None = None


class Round:
    """Two engines, and what happens to them."""

    def __init__(self, kind: Kind, seed: int, count: int = ASKED) -> None:
        self.rng, self.seen = random.Random(seed), Counter[str]()
        rng, page = self.rng, self.rng.choice(PAGES)
        self.kind, self.model = kind, model(kind, page)
        self.adapters = {each.identity: each for each in adapters(kind, page) if each}
        self.choices = asked(kind, page, count)
        longest = max(
            len(request.prompt.ids) + request.sampling.max_tokens for group in self.choices for request, _ in group
        )  # type: ignore[union-attr]
        need = 4 * -(-longest // page)
        self.engines = [
            Engine(
                self.model,
                units=1 + need + rng.choice([0, 1, 2, rng.randint(0, 2 * need)]),
                max_batch=rng.randint(1, 6),
                max_batch_tokens=rng.randint(22, 60),
                speculative=rng.choice([0, 3]),
                speculative_max_batch=8,
            )
            for _ in range(2)
        ]
        self.live: dict[str, Asked] = {}
        self.names = itertools.count()

    def run(self, count: int = 60) -> Counter[str]:
        """`count` things that may happen, and then all requests to their ends."""
        what = ["submit", "step", "cancel", "pause", "preempt", "move", "again", "drop"]
        for _ in range(count):
            getattr(self, self.rng.choices(what, [6, 16, 1, 3, 2, 3, 2, 2])[0])()
            for engine in self.engines:
                engine.scheduler.check_integrity()
        for _ in range(STEPS):
            for name, one in self.live.items():
                self.engines[one.at].pause(name, False)
            self.step()
            if all(engine.idle for engine in self.engines):
                break
        self.step()
        assert not self.live, f"{len(self.live)} requests have not ended after {STEPS} steps"
        for engine in self.engines:
            assert engine.dead is None and engine.idle
            engine.scheduler.check_integrity()
            assert engine.stats()["kv_cache_usage_perc"] == 0, "a unit did not return"
            metrics = engine.scheduler.metrics
            self.seen.update(
                tokens=metrics.generation_tokens, preempted=metrics.preemptions, cached=metrics.prefix_hits
            )
            self.seen.update(accepted=metrics.drafts_accepted, rejected=metrics.drafts - metrics.drafts_accepted)
        return self.seen

    def submit(self, group: list[tuple[Request, Completion]] | None = None) -> None:
        """All choices of a prompt."""
        if len(self.live) < 12:
            at = self.rng.randrange(2)
            for request, wanted in group or self.rng.choice(self.choices):
                self._send(Asked(request, wanted, at), priority=self.rng.randint(-1, 1))

    def again(self) -> None:
        """A prompt that may be cached as a whole by now."""
        self.submit(self.choices[self.rng.randrange(3)])

    def step(self) -> None:
        for engine in self.engines:
            self._take(engine.step())

    def cancel(self) -> None:
        for name in self._some():
            self.engines[self.live[name].at].cancel(name)

    def pause(self) -> None:
        for name in self._some():
            self.engines[self.live[name].at].pause(name, self.rng.random() < 0.5)

    def preempt(self) -> None:
        scheduler = self.rng.choice(self.engines).scheduler
        if scheduler.running:
            scheduler._preempt(self.rng.choice(scheduler.running))

    def drop(self) -> None:
        """Some adapters, or none; requests that have one end with it."""
        self.rng.choice(self.engines).keep_adapters([name for name in self.adapters if self.rng.random() < 0.5])

    def move(self) -> None:
        """What `on_ray.failover` does: what was told goes with the request, ahead of the others."""
        for name in self._some():
            one = self.live.pop(name)
            self.engines[one.at].cancel(name)
            one.at = 1 - one.at
            self._send(one, priority=one.request.priority - 1)
            self.seen.update(moved=1, begun=bool(one.tokens))

    def _send(self, one: Asked, priority: int) -> None:
        name = str(next(self.names))
        begun: dict[str, Any] = {}
        if one.tokens:
            tolerance, spent = one.request.quality_tolerance, one.spent[-1]
            begun = {"answer": tuple(one.tokens), "depth": one.depth, "spent": spent or 0.0}
            begun |= {"quality_tolerance": None if spent is None else tolerance}
        one.request = dataclasses.replace(one.request, id=name, priority=priority, **begun)
        self.live[name] = one
        engine, beside = self.engines[one.at], one.request.adapter
        if beside and beside not in engine.adapters:
            engine.load_adapter(self.adapters[beside])
        engine.submit(one.request)
        self.seen.update(
            requests=1,
            adapted=bool(beside),
            guided=one.request.sampling.guided is not None,
            images=bool(one.request.prompt.images),
        )  # type: ignore[union-attr]

    def _some(self) -> list[str]:
        return [self.rng.choice(sorted(self.live))] if self.live else []

    def _take(self, events: list[Event]) -> None:
        for event in events:
            one = self.live.get(event.request)
            if one is None:
                continue  # of an engine that the request was taken from
            one.text += event.text
            if isinstance(event, Token):
                one.tokens.append(event.token)
                one.depth = event.depth
                one.spent.append(event.spent)
            else:
                del self.live[event.request]
                self._check(one, event)

    def _check(self, one: Asked, end: Finished) -> None:
        self.seen[end.reason] += 1
        wanted, told = one.wanted, (one.request, end)
        if one.request.quality_tolerance:
            self._check_spent(one, end)
        elif end.reason in ("stop", "length"):
            assert one.tokens == wanted.tokens, ("other tokens than the oracle's", one.tokens, wanted.tokens, told)
            assert (one.text, end.reason) == (wanted.text, wanted.finish_reason), (one.text, wanted.text, told)
            assert end.completion_tokens == len(wanted.tokens), told
        else:
            assert end.reason == "cancelled", told
            assert one.tokens == wanted.tokens[: len(one.tokens)], (one.tokens, wanted.tokens, told)

    def _check_spent(self, one: Asked, end: Finished) -> None:
        """What each token costs by full depth is what the answer says that it spent, and at most what it may."""
        request, told = one.request, (one.request, one.tokens, one.spent, end)
        assert isinstance(request.prompt, Encoded) and request.quality_tolerance
        assert end.reason in ("stop", "length", "cancelled"), told
        assert end.reason != "length" or len(one.tokens) == request.sampling.max_tokens, told
        ids, images = request.prompt.ids, request.prompt.images
        rows = self.model.logits([*ids, *one.tokens], "full", images, self.adapters.get(request.adapter)).clone()
        closed = self.model.forbidden().clone()
        closed[END_ID] |= request.sampling.ignore_eos
        rows[:, closed] = -torch.inf
        spent, near = 0.0, 2 * NOISE[self.kind]
        for count, (token, after) in enumerate(zip(one.tokens, one.spent, strict=True)):
            row = rows[len(ids) - 1 + count]
            assert after is not None and abs(after - spent - float(row.max() - row[token])) <= near, (count, told)
            assert after <= request.quality_tolerance * count + 1e-9, (count, told)
            self.seen["paid"] += after > spent
            spent = after


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """`threads` of them compress, which takes and gives memory of the process beside the kernels'."""
    over, data = threading.Event(), random.Random(0).randbytes(40_000)

    def work() -> None:
        while not over.is_set():
            zlib.compress(data)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="engines against the oracle")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next has the next one")
    parser.add_argument("--rounds", type=int, help="so many, in place of the minutes")
    parser.add_argument("--threads", type=int, default=4, help="that compress meanwhile")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind, page in itertools.product(KINDS, PAGES):
        print(f"{kind}, page of {page}: {sum(map(len, asked(kind, page)))} requests answered by the oracle", flush=True)
    seen, done, until = Counter[str](), 0, time.monotonic() + 60 * given.minutes
    with busy(given.threads):
        while done < given.rounds if given.rounds else time.monotonic() < until:
            seed = given.seed + done
            faulthandler.dump_traceback_later(300, exit=True)  # a round takes seconds: it hangs
            try:
                seen += Round(KINDS[seed % 2], seed).run()
            except BaseException:
                print(f"seed {seed} failed; after {done} rounds: {dict(seen)}", flush=True)
                raise
            done += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"seeds {given.seed} to {given.seed + done - 1}, {done} rounds, all as the oracle says: {dict(seen)}")


if __name__ == "__main__":
    main()
