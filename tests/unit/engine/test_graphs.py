"""Decoding steps as graphs, on a CPU: `tests.recorded` stands in for the device. In tests/triton they are recorded as strictly
as a device does."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import Engine, Request, Sampling
from shoal.engine import graphs
from shoal.engine.engine import Completion
from shoal.engine.events import Guide
from shoal.engine.graphs import Graphs, buckets
from shoal.engine.plan import Outcome, Plan
from tests.recorded import Again
from tests.unit.engine.lively import lively

MODEL = lively()


pytestmark = pytest.mark.usefixtures("torch_alone")


def replaying(record: Any, most: int = 6, **more: Any) -> Engine:
    engine = Engine(MODEL, units=200, max_batch=most, max_batch_tokens=32, **more)
    engine.runner.graphs = Graphs(MODEL.net, engine.runner.cache, most, record)
    return engine


def asked(seed: int, count: int) -> list[Request]:
    """Requests of all depths and lengths, among them some that take the other way."""
    rng = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 7, "logprobs": 2},
        {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.3}, {"temperature": 0, "speculative": 2},
        {"temperature": 0.5, "guided": Guide("regex", "[a-f]{2,9}"), "ignore_eos": False},
    ]  # fmt: skip
    return [
        Request(
            [rng.randrange(20, 260) for _ in range(rng.randrange(1, 40))],
            Sampling(**{"max_tokens": rng.randrange(1, 14), "ignore_eos": True, "seed": 1, **rng.choice(kinds)}),
            depth=rng.choice(("shallow", "middle", "full")),
            gaps=rng.random() < 0.1,
            id=str(i),
        )
        for i in range(count)
    ]


def said(answers: list[Completion]) -> list[Any]:
    return [(answer.tokens, answer.finish_reason, answer.depth) for answer in answers]


def test_buckets_are_few_and_less_than_a_third_of_one_is_too_many() -> None:
    assert buckets(1) == [1] and buckets(6) == [1, 2, 4, 6]
    assert buckets(256) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for most in range(1, 300):
        sizes = buckets(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for rows in range(9, most + 1):
            assert 1 - rows / min(size for size in sizes if size >= rows) < 1 / 3


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9))
def test_answers_are_those_without_graphs_as_requests_join_and_leave(seed: int, count: int) -> None:
    record = Again()
    engine = replaying(record)
    want = Engine(MODEL, units=200, max_batch=6, max_batch_tokens=32).generate(asked(seed, count))
    assert said(engine.generate(asked(seed, count))) == said(want)
    engine.scheduler.check_integrity()


class Compared:
    """In place of the `run` of `engine.runner`: each step that graphs are for is taken in three ways, from the same memory, and
    what each leaves is kept: logits, keys and values, summaries."""

    def __init__(self, engine: Engine) -> None:
        self.runner, self.run, self.works = engine.runner, engine.runner.run, list[list[tuple[int, set[int]]]]()
        self.left: list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = []
        self.runner.run = self  # type: ignore[assignment, method-assign]

    def __call__(self, plan: Plan) -> Outcome:
        kept, cache = self.runner.graphs, self.runner.cache
        if kept is not None and kept.takes(plan.works) and not any(work.drafts for work in plan.works):
            before = [cache.kv.clone(), cache.summaries.clone()]

            def left(how: Callable[[], Tensor]) -> list[Tensor]:
                cache.kv.copy_(before[0])
                cache.summaries.copy_(before[1])
                return [how().clone(), cache.kv.clone(), cache.summaries.clone()]

            with torch.inference_mode():
                mine = left(lambda: kept.run(plan.works))
                alone = left(lambda: Graphs(MODEL.net, cache, 6, Again()).run(plan.works))
                self.left.append((before, mine, alone, left(lambda: self._plainly(plan))))
            at = [(w.running.holding, w.start // w.running.holding.page, w.last) for w in plan.works]
            self.works.append([(last, {*held.tables[:last, page].tolist()}) for held, page, last in at])
        return self.run(plan)

    def _plainly(self, plan: Plan) -> Tensor:
        given, sample, kept = list[Tensor](), self.runner._sample, self.runner.graphs
        self.runner.graphs = None
        self.runner._sample = lambda works, z, *rest: (given.append(z.clone()), sample(works, z, *rest))[1]  # type: ignore[method-assign]
        self.run(plan)
        self.runner.graphs, self.runner._sample = kept, sample  # type: ignore[method-assign]
        return given[0]


@pytest.mark.drill
def test_a_step_writes_and_gives_what_graphs_made_for_it_alone_do() -> None:
    """Bit for bit, logits and memory: nothing of an earlier step is left in what stays. And what the other way does, to
    rounding; in memory nothing changes but the null unit and the units of the step's rows."""
    record = Again()
    engine = replaying(record)
    seen = Compared(engine)
    for seed in range(4):
        assert all(answer.finish_reason != "error" for answer in engine.generate(asked(seed, 9)))
    for works, (before, mine, alone, other) in zip(seen.works, seen.left, strict=True):
        assert torch.equal(mine[0], alone[0])
        assert all(torch.equal(a[:, 1:], b[:, 1:]) for a, b in zip(mine[1:], alone[1:], strict=True))
        assert torch.allclose(mine[0], other[0], rtol=0, atol=1e-9)
        for a, b in zip(mine[1:], other[1:], strict=True):
            assert torch.allclose(a[:, 1:], b[:, 1:], rtol=0, atol=1e-9)
        changed = (mine[1] != before[0]).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert {*changed} <= {0}.union(*(own for _, own in works))
    depths = [[last for last, _ in works] for works in seen.works]
    assert len(depths) > 20 and len({len(each) for each in depths}) >= 4
    assert any(len({*each}) == 3 for each in depths), "three depths in a step"
    assert record.replayed > record.made > 10


def test_a_change_of_weights_ends_what_was_recorded() -> None:
    """In place, or others in their place, or a layer told to mix otherwise; a grammar or a penalty does not."""
    model, record = lively(), Again()
    engine = Engine(model, units=100, max_batch=2)
    engine.runner.graphs = Graphs(model.net, engine.runner.cache, 2, record)
    one = [Request([30, 31], Sampling(temperature=0, max_tokens=3, ignore_eos=True), depth="full") for _ in range(9)]

    def recorded(more: Sampling | None = None) -> int:
        before = record.made
        request = one.pop()
        engine.generate([request if more is None else Request([40], more, depth="full")])
        return record.made - before

    first = recorded()
    assert first > 0 and recorded() == 0
    assert recorded(Sampling(max_tokens=3, guided=Guide("regex", "[a-f]{5}"), presence_penalty=0.3)) == 0
    model.net.exit_norms["4"].weight.mul_(2)  # type: ignore[operator, union-attr]
    assert recorded() == first and recorded() == 0
    model.net.load_state_dict({name: each.clone() for name, each in model.net.state_dict().items()}, assign=True)
    assert recorded() == first and recorded() == 0
    model.net.groups[3].blocks[0].attention.mix_local = 0.5  # type: ignore[index, union-attr, assignment]
    assert recorded() == first


def test_prompts_take_the_other_way() -> None:
    record = Again()
    engine = replaying(record)
    plain = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
    more = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
    engine.generate([Request([30] * 20, plain, depth="full")])
    assert record.made == 0, "a prompt alone"
    engine.generate([Request([30] * 5, more, depth="shallow")])
    assert record.made > 0


def test_a_device_that_refuses_to_record_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    """All of a request is answered, by the step in which it happened too, and it is not tried again."""
    tries = []

    def refuse(run: graphs.Run) -> graphs.Run:
        run()
        tries.append(run)
        if len(tries) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return run

    engine = replaying(refuse)
    want = Engine(MODEL, units=200, max_batch=6, max_batch_tokens=32).generate(asked(1, 5))
    with caplog.at_level(logging.WARNING):
        assert said(engine.generate(asked(1, 5))) == said(want)
    assert len(tries) == 3 and engine.runner.graphs is None
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without graphs: operation not permitted when stream is capturing"
    ]


def full(chained: bool) -> Exception:
    """As torch says it; or what ends the recording says that it failed."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
    if chained:
        ended = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        ended.__context__ = error
        return ended
    return error


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("when", ["loading", "serving"])
def test_where_memory_lacks_for_graphs_those_of_fewer_requests_stay(
    when: str, chained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No request notices, and the log says what to change, once."""
    record = Again()
    # in the bucket of 4 rows, or at what comes first after all that is prepared: 3 buckets, and with drafts 4 more
    fails = [2 * 8 + 3 if when == "loading" else 3 * 8 + 3 * 4 + 4 * 7]

    def short(run: graphs.Run) -> graphs.Run:
        if [record.made] == fails:
            fails.clear()
            raise full(chained)
        return record(run)

    engine = replaying(short, most=4)
    plain = [request for request in asked(1, 8) if not request.sampling.speculative]
    want = Engine(MODEL, units=200, max_batch=4, max_batch_tokens=32).generate(plain)
    kept = engine.runner.graphs
    assert kept is not None
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        kept.prepare()
        assert said(engine.generate(plain)) == said(want)
    assert not fails and engine.runner.graphs is kept
    left = kept._buckets[graphs.PLAIN]
    assert left == [1, 2] if when == "loading" else left in ([], [1], [1, 2])
    assert all(key[1] in left for key in kept._made) and kept._buckets[graphs.DRAFTS] == left
    lines = [line.getMessage() for line in caplog.records]
    assert (
        len(lines) == 1 and f"so steps of more than {max(left, default=0)} are" in lines[0] and "gpu_share" in lines[0]
    )


def test_engines_of_a_process_record_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary's engine is made while another one serves. A recording begins with a wait for all of the device, which ends one
    that is going on, and the engine would decode without graphs from then on."""
    going, streams = list[object](), list[object]()

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    @contextmanager
    def graph(made: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        if going:
            raise RuntimeError("operation not permitted when stream is capturing")
        going.append(made)
        streams.append(stream)
        yield
        going.remove(made)

    there = {
        "graph": graph, "Stream": Stream, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "stream": lambda stream: nullcontext(), "current_stream": Stream, "graph_pool_handle": object,
    }  # fmt: skip
    for name, value in there.items():
        monkeypatch.setattr(torch.cuda, name, value)
    first, second = graphs.Recorder(), graphs.Recorder()
    failed, began = list[RuntimeError](), Event()

    def beside() -> None:
        began.set()
        try:
            second(lambda: None)
        except RuntimeError as error:
            failed.append(error)

    other = Thread(target=beside)

    def run() -> None:
        if going:
            other.start()
            began.wait()
            other.join(0.3)  # it would be done by then, and have failed

    first(run)
    other.join()
    assert not failed and len({*map(id, streams)}) == 2, "each has a stream of its own"


def test_where_there_is_memory_for_no_graph_at_all_every_step_goes_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps of the memory is given back, for those that fit."""

    def short(run: graphs.Run) -> graphs.Run:
        raise RuntimeError("CUDA error: out of memory")

    emptied = list[None]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    engine = replaying(short, most=4)
    kept = engine.runner.graphs
    assert kept is not None
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        kept.prepare()
        assert not kept.takes([work()])
        assert all(answer.finish_reason != "error" for answer in engine.generate(asked(1, 2)))
    assert [line.getMessage().partition(" are ")[0] for line in caplog.records] == [
        "the GPU's memory is not enough for graphs of 1 requests, so steps of more than 0"
    ]
    assert len(emptied) == 1


def work(**more: Any) -> Any:
    """One row that decodes, or what else is said of it."""
    running = {"adapter": more.pop("adapter", None)}
    plain = {
        "count": 1,
        "sample": True,
        "first": 0,
        "hold": 0,
        "decide": False,
        "score": False,
        "drafts": 0,
        "verify": False,
    }
    return SimpleNamespace(**{**plain, **more}, running=SimpleNamespace(**running))


def test_steps_of_one_plain_row_a_request_are_taken_and_no_others() -> None:
    kept = replaying(Again()).runner.graphs
    assert kept is not None
    assert kept.takes([work()]) and kept.takes([work()] * 6) and not kept.takes([]) and not kept.takes([work()] * 7)
    others: list[dict[str, Any]] = [
        {"count": 2}, {"count": 0}, {"sample": False}, {"first": 1}, {"hold": 1}, {"decide": True}, {"score": True},
        {"verify": True},
    ]  # fmt: skip
    for more in others:
        assert not kept.takes([work(), work(**more)]) and not kept.takes([work(**more), work()])
    assert kept.takes([work(), work(drafts=15)]) and not kept.takes([work(), work(drafts=16)]), "17 rows are recorded"
    assert kept.takes([work(adapter="thin"), work()]), "and those with few adapters"
    assert kept.takes([work(drafts=1)] * 6) and not kept.takes([work()] * 6 + [work(drafts=1)])


@pytest.mark.parametrize("fails", ["running", "beginning", "recording", "ending"])
def test_a_recording_that_fails_leaves_no_stream_of_its_own(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch leaves it to the thread where a recording cannot begin or end (`torch.cuda.graph`): what the thread launches from
    then on would wait for nobody, nor others for it. And what was launched there is waited for, though it be half a run."""
    own, usual = (SimpleNamespace(waits=[]) for _ in range(2))
    for each in (own, usual):
        each.wait_stream = each.waits.append
    streams, runs = [usual], list[int]()

    class Graph:
        def __init__(self, *given: Any, **named: Any) -> None: ...

        def __enter__(self) -> None:
            streams.append(own)
            if fails == "beginning":
                raise RuntimeError("it refuses")

        def __exit__(self, *_: object) -> None:
            if fails == "ending":
                raise RuntimeError("it refuses")
            streams.pop()

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    def run() -> None:
        runs.append(1)
        if len(runs) == {"running": 2, "recording": 3}.get(fails):
            raise RuntimeError("it refuses")

    there = {
        "graph": Graph, "stream": on, "Stream": lambda: own, "current_stream": lambda: streams[-1],
        "set_stream": streams.append, "CUDAGraph": lambda: SimpleNamespace(replay=None), "graph_pool_handle": object,
    }  # fmt: skip
    for name, value in there.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="it refuses"):
        graphs.Recorder()(run)
    assert streams[-1] is usual and own.waits == [usual] and usual.waits == [own]


def test_all_that_a_short_step_replays_is_recorded_before() -> None:
    record = Again()
    engine = replaying(record, most=4)
    assert engine.runner.graphs is not None
    with torch.inference_mode():
        before = engine.runner.cache.kv[:, 1:].clone()
        engine.runner.graphs.prepare()
    assert torch.equal(engine.runner.cache.kv[:, 1:], before)
    # buckets of 1, 2 and 4 rows; four groups, three exits, the head; with drafts four other groups, and in buckets of 8 to 17
    # rows, all but the first group, which has one of each request
    assert record.made == 3 * (4 + 3 + 1) + 3 * 4 + 4 * (3 + 3 + 1) == 64
    engine.generate([Request([30 + i], Sampling(temperature=0, max_tokens=3, ignore_eos=True)) for i in range(4)])
    assert record.made == 64
    engine.generate([Request([30] * 40, Sampling(temperature=0, max_tokens=3, ignore_eos=True), depth="full")])
    assert record.made == 68, "a wider table, of four groups"
