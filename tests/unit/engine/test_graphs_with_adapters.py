"""Steps in which adapters take part, as graphs on a CPU: `tests.recorded` stands in for the device."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from shoal import Engine, Request, Sampling
from shoal.engine import graphs
from shoal.engine.graphs import ADAPTED, BOTH, Graphs
from shoal.model import places
from shoal.model.adapters import Adapter
from tests.adapters import linears
from tests.recorded import Again
from tests.unit.engine.lively import lively

MODEL = lively()


pytestmark = pytest.mark.usefixtures("torch_alone")


def adapter(number: int, ranks: int | None = None) -> Adapter:
    """Of ranks of its own, beside all linears, or the third of them."""
    draw, pairs = torch.Generator().manual_seed(number), {}
    for index, (name, linear) in enumerate(linears(MODEL).items()):
        outputs, inputs = linear.weight.shape  # type: ignore[union-attr,misc]
        if number % 2 or index % 3 == 0:
            count = ranks or 1 + number
            a = torch.randn(count, inputs, generator=draw, dtype=torch.float64) / inputs**0.5
            pairs[name] = a, torch.randn(count, outputs, generator=draw, dtype=torch.float64) / count**0.5
    return Adapter(f"adapter {number}", pairs)


def engine_of(record: Any = None, most: int = 6, adapters: int = 3, **limits: int) -> Engine:
    limits = {"units": 200, "max_batch_tokens": 40, "speculative_max_batch": 6} | limits
    engine = Engine(MODEL, max_batch=most, **limits)  # type: ignore[arg-type]
    for number in range(adapters):
        engine.load_adapter(adapter(number))
    if record is not None:
        engine.runner.graphs = Graphs(MODEL.net, engine.runner.cache, most, record)
    return engine


def asked(seed: int, count: int, adapters: int = 3, drafts: bool = True) -> list[Request]:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        number = rng.randrange(-1, adapters)
        kind: dict[str, Any] = rng.choice(({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}))
        kind |= {"speculative": rng.choice((0, 0, 2, 4)) if drafts else 0}
        sampling = Sampling(max_tokens=rng.randrange(1, 10), ignore_eos=True, **kind)
        prompt, depth = [rng.randrange(20, 260) for _ in range(rng.randrange(1, 20))], rng.choice(("shallow", "full"))
        name = "" if number < 0 else f"adapter {number}"
        found.append(Request(prompt, sampling, depth=depth, adapter=name, id=str(i), gaps=rng.random() < 0.2))
    return found


def said(engine: Engine, requests: list[Request]) -> list[Any]:
    return [(answer.tokens, answer.finish_reason) for answer in engine.generate(requests)]


def groups(engine: Engine) -> set[Any]:
    """What kinds of steps graphs of groups were made for."""
    assert engine.runner.graphs is not None
    return {key[-1] for key in engine.runner.graphs._made if key[0] == "group"}


@pytest.mark.parametrize(
    "limits", [{"units": 60}, *(pytest.param(each, marks=pytest.mark.drill) for each in ({}, {"most": 2}))]
)
def test_answers_are_those_without_graphs(limits: dict[str, int]) -> None:
    """Of requests with different adapters and none, with drafts and without, that join, leave and are preempted."""
    engine, other = engine_of(Again(), **limits), engine_of(**limits)
    for seed in range(3):
        assert said(engine, asked(seed, 7)) == said(other, asked(seed, 7))
    assert {ADAPTED, BOTH} <= groups(engine)
    engine.scheduler.check_integrity()


def test_an_adapter_is_loaded_dropped_and_put_at_anothers_place_while_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was recorded stays, unless the memory grows; each answer is its own adapter's."""
    monkeypatch.setattr(places, "MOST", 2)
    monkeypatch.setattr(graphs, "MOST_ADAPTERS", 2)
    more = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
    long = Request([40] * 5, more, depth="full", adapter="adapter 0", id="long")
    want = {number: engine_of(adapters=6).generate([one(number)])[0].tokens for number in range(6)}
    (kept,) = engine_of().generate([long])
    record = Again()
    engine, got = engine_of(record, adapters=2), list[int]()
    engine.submit(long)
    # each is new, or was dropped and comes again
    steps = [(1, True), (2, False), (3, True), (4, True), (5, False), (1, True)]
    for index, (number, drop) in enumerate(steps):
        engine.load_adapter(adapter(number))
        request = dataclasses.replace(one(number), id=str(index))
        engine.submit(request)
        ended, tokens = False, list[int]()
        while not ended:
            for event in engine.step():
                got += [event.token] if event.request == "long" and hasattr(event, "token") else []  # type: ignore[list-item]
                tokens += [event.token] if event.request == request.id and hasattr(event, "token") else []
                ended |= event.request == request.id and hasattr(event, "reason")
        assert tokens == want[number], number
        if drop:
            engine.keep_adapters([name for name in engine.adapters if name != f"adapter {number}"])
        if index == 1:
            made = record.made
    while not engine.idle:
        got += [event.token for event in engine.step() if hasattr(event, "token")]
    assert got == kept.tokens
    kinds, held = groups(engine), engine.runner.graphs
    assert ADAPTED in kinds and held is not None and held._places.made == 2 + 1 and record.made >= made


def one(number: int) -> Request:
    return Request(
        [50] * 4, Sampling(temperature=0, max_tokens=3, ignore_eos=True), depth="full", adapter=f"adapter {number}"
    )


def test_graphs_of_adapters_end_where_their_memory_is_made_anew_and_others_do_not() -> None:
    record = Again()
    engine = engine_of(record, adapters=0)
    plain = dataclasses.replace(one(0), adapter="")

    def recorded(request: Request, ident: str) -> int:
        before = record.made
        engine.generate([dataclasses.replace(request, id=ident)])
        return record.made - before

    for number, ranks in ((1, 2), (3, 2), (5, 9)):
        engine.load_adapter(dataclasses.replace(adapter(number, ranks)))
    first = recorded(plain, "0")
    assert first > 0 and recorded(plain, "1") == 0
    with_one = recorded(one(1), "2")
    assert 0 < with_one < first, "exits and head are shared"
    assert recorded(one(1), "3") == 0 and recorded(one(3), "4") == with_one, "a place more"
    assert recorded(one(1), "5") == recorded(one(3), "6") == 0
    assert recorded(one(5), "7") == with_one, "more ranks"
    assert recorded(one(1), "8") == recorded(plain, "9") == 0


def test_more_adapters_in_a_step_than_there_are_places_take_the_other_way() -> None:
    many = places.MOST + 1
    record = Again()
    engine, other = (engine_of(each, most=many, adapters=many) for each in (record, None))
    requests = [dataclasses.replace(one(number), id=str(number)) for number in range(many)]
    assert said(engine, requests) == said(other, requests)
    assert engine.runner.graphs is not None and engine.runner.graphs._places.made == 0
