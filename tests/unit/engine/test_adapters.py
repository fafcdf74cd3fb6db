"""Requests with adapters say what the models say that these would be merged to, whatever company they are in."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from shoal import Engine, Model, Request, Sampling
from shoal.errors import AdapterGoneError
from shoal.model.adapters import IN_LOOPS, Adapter, Bank, Stack, product
from shoal.model.linears import Int8Linear
from shoal.model.quant import int8_linear_reference
from shoal.model.router import Calibration, Router
from shoal.open_weights.served_adapter import read
from tests import oracle
from tests.adapters import linears, merged, write
from tests.unit.engine.lively import lively
from tests.unit.engine.test_oracle import REQUESTS, same

MODEL = lively()
FOLDER = Path(mkdtemp())
KINDS = {  # some beside all linears, some beside a few, of several ranks
    1: lambda name: True,
    2: lambda name: "qkv" in name,
    3: lambda name: ".mlp." in name and "groups.0" not in name,
    4: lambda name: "out" in name or "down" in name,
}


@cache
def adapter(number: int) -> tuple[Adapter, Model]:
    """One of four, and the model that it would be merged to."""
    folder = write(FOLDER / str(number), MODEL, number, rank=2 * number, only=KINDS[number])
    return read(folder, MODEL), merged(MODEL, folder)


def engine_of(**limits: int) -> Engine:
    engine = Engine(MODEL, **({"units": 400} | limits))  # type: ignore[arg-type]
    for number in KINDS:
        engine.load_adapter(adapter(number)[0])
    return engine


@settings(max_examples=25)
@given(
    st.lists(st.tuples(REQUESTS, st.integers(0, 4)), min_size=2, max_size=5),
    st.sampled_from([{}, {"units": 60, "max_batch": 6}, {"max_batch": 2, "max_batch_tokens": 10}]),
    st.sampled_from([0, 2]),
)
def test_any_adapters_in_one_batch(asked: list[tuple[Request, int]], limits: dict[str, int], drafts: int) -> None:
    engine = engine_of(**limits, speculative=drafts, speculative_max_batch=8)
    requests = [
        dataclasses.replace(request, id=str(i), adapter=adapter(number)[0].identity if number else "")
        for i, (request, number) in enumerate(asked)
    ]
    for request, (_, number), answer in zip(requests, asked, engine.generate(requests), strict=True):
        model = adapter(number)[1] if number else MODEL
        same(answer, oracle.answer(model, request, answer.tokens))
        event(f"adapter {number}")
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    engine.scheduler.check_integrity()


def greedy(number: int, prompt: list[int], tokens: int = 12, depth: str = "full") -> Request:
    name = adapter(number)[0].identity if number else ""
    return Request(prompt, Sampling(temperature=0, max_tokens=tokens, ignore_eos=True), depth=depth, adapter=name)


def said(model: Model, prompt: list[int], tokens: int = 12, depth: str = "full") -> list[int]:
    return model.generate_naive(prompt, tokens, depth, ignore_eos=True)


@pytest.mark.drill
def test_each_adapter_says_something_of_its_own() -> None:
    prompt = list(range(30, 60))
    answers = {number: said(adapter(number)[1] if number else MODEL, prompt) for number in range(5)}
    assert len({tuple(tokens) for tokens in answers.values()}) == 5
    for depth in ("shallow", "middle", "full"):
        got = engine_of().generate([greedy(number, prompt, depth=depth) for number in range(5)])
        assert [answer.tokens for answer in got] == [
            said(adapter(number)[1] if number else MODEL, prompt, depth=depth) for number in range(5)
        ]


def test_a_long_prompt_is_read_with_its_adapter() -> None:
    prompt = [30 + i % 200 for i in range(2 * IN_LOOPS)]
    assert len(prompt) < MODEL.config.context - 12
    got = engine_of(max_batch_tokens=512).generate([greedy(1, prompt), greedy(0, prompt), greedy(2, prompt)])
    assert [answer.tokens for answer in got] == [said(m, prompt) for m in (adapter(1)[1], MODEL, adapter(2)[1])]


@pytest.mark.parametrize("rows", [1, 5, IN_LOOPS, IN_LOOPS + 1])
@pytest.mark.parametrize("loops", [True, False])
def test_rows_get_the_products_of_their_own_adapters(rows: int, loops: bool) -> None:
    """By the definition, row by row; in the compiled loop and without."""
    held = [adapter(number)[0] for number in KINDS]
    draw = torch.Generator().manual_seed(rows)
    of = torch.randint(-1, len(held), (rows,), generator=draw).tolist()
    bank = Bank(MODEL.net, held)
    with torch.inference_mode(loops), torch.no_grad():
        for name, linear in linears(MODEL).items():
            x = torch.randn(rows, linear.weight.shape[1], generator=draw, dtype=torch.float64)  # type: ignore[union-attr,index]
            beside = bank.beside([held[k] if k >= 0 else None for k in of], [1] * rows)
            got = product(linear, x, beside)
            for n, k in enumerate(of):
                wanted = linear(x[n : n + 1])[0]
                if k >= 0 and name in held[k].pairs:
                    a, b = held[k].pairs[name]
                    wanted = wanted + x[n] @ a.T @ b
                torch.testing.assert_close(got[n], wanted, rtol=0, atol=1e-12)
            for first in range(1, rows, 9):
                torch.testing.assert_close(
                    product(linear, x[:first], beside.first(first)), got[:first], rtol=0, atol=1e-12
                )


@pytest.mark.parametrize(
    ("held", "rows", "loops"),
    [
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float64, False),
        (torch.float32, torch.float64, False),
        (torch.float64, torch.float32, False),
    ],
)
def test_loops_read_matrices_of_the_kind_of_the_rows_and_bfloat16_beside_fp32(
    held: torch.dtype, rows: torch.dtype, loops: bool
) -> None:
    none = np.zeros(1, np.int64)
    assert Stack(torch.zeros(1, 2, dtype=held), torch.zeros(1, 2, dtype=held), none, none).reads(rows) == loops


def int8() -> Model:
    model = Model.from_preset("test", seed=3).quantized()
    for norm in model.net.exit_norms.values():
        norm.weight.mul_(10)  # type: ignore[operator,union-attr]
    return model


@pytest.mark.parametrize("rows", [1, 2, 3, 7, IN_LOOPS, IN_LOOPS + 6])
def test_beside_an_int8_linear_the_float_product_is_added_to_what_it_gives(rows: int, tmp_path: Path) -> None:
    """Of matrices in bfloat16, multiplied and added in fp32."""
    model = int8()
    held = read(write(tmp_path, model, rank=5), model)
    bank, others = Bank(model.net, [held]), rows // 4
    with torch.inference_mode():
        for name, linear in linears(model).items():
            assert isinstance(linear, Int8Linear)
            x = torch.randn(rows, linear.weight.shape[1], generator=torch.Generator().manual_seed(1))
            assert {matrix.dtype for matrix in held.pairs[name]} == {torch.bfloat16}
            a, b = (matrix.float() for matrix in held.pairs[name])
            plain = int8_linear_reference(x, linear.weight, linear.weight_scale)
            got = product(linear, x, bank.beside([held, None], [rows - others, others]))
            torch.testing.assert_close(
                got[: rows - others], (plain + x @ a.T @ b)[: rows - others], rtol=1e-5, atol=1e-5
            )
            assert torch.equal(got[rows - others :], plain[rows - others :])


def test_greedy_tokens_over_an_int8_base(tmp_path: Path) -> None:
    """As one row after the other computes them: INT8's product of the row, and the adapter's beside it."""
    model = int8()
    held = [read(write(tmp_path / str(seed), model, seed, size=1.0), model) for seed in range(4)]
    engine = Engine(model, units=400)
    prompts = [[40 + seed, *range(50, 70)] for seed in range(5)]
    sampling = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
    requests = [
        Request(prompt, sampling, depth="full", adapter=engine.load_adapter(one) if one else "")
        for prompt, one in zip(prompts, [*held, None], strict=True)
    ]
    got = engine.generate(requests)
    for request, answer, one in zip(requests, got, [*held, None], strict=True):
        assert answer.tokens == oracle.answer(model, request, answer.tokens, one).tokens
    assert len({tuple(answer.tokens) for answer in got}) == 5


def test_greedy_tokens_in_fp32(tmp_path: Path) -> None:
    model = Model.from_preset("test", seed=3)
    for norm in model.net.exit_norms.values():
        norm.weight.mul_(10)  # type: ignore[operator,union-attr]
    engine = Engine(model, units=400)
    for seed in range(4):
        folder = write(tmp_path / str(seed), model, seed, size=1.0, dtype=torch.bfloat16)
        name = engine.load_adapter(read(folder, model))
        sampling = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
        (answer,) = engine.generate([Request(list(range(50, 70)), sampling, depth="full", adapter=name)])
        assert answer.tokens == said(merged(model, folder), list(range(50, 70)), 10)


def cached(engine: Engine, request: Request) -> int:
    (answer,) = engine.generate([dataclasses.replace(request, id=str(object()))])
    assert answer.finished is not None
    return answer.finished.cached_tokens


def test_pages_are_found_by_the_same_adapter_only() -> None:
    engine, prompt = engine_of(), list(range(30, 80))
    asked = {number: greedy(number, prompt, 1) for number in range(3)}
    assert [cached(engine, asked[number]) for number in (0, 1, 2)] == [0, 0, 0]
    assert all(cached(engine, asked[number]) > 0 for number in (2, 0, 1))


def test_an_adapter_loaded_anew_finds_no_page_of_another_of_its_name(tmp_path: Path) -> None:
    """What it was loaded as, and from where, says nothing: other weights are another adapter, the same ones are the same."""
    engine, prompt = Engine(MODEL, units=400), list(range(30, 80))

    def asks(seed: int, alpha: float = 6.0) -> int:
        engine.keep_adapters([])
        name = engine.load_adapter(read(write(tmp_path / "a", MODEL, seed, lora_alpha=alpha), MODEL))
        return cached(engine, Request(prompt, Sampling(temperature=0, max_tokens=1), depth="full", adapter=name))

    assert asks(1) == 0 and asks(2) == 0 and asks(2, alpha=7.0) == 0
    assert asks(1) > 0 and asks(2) > 0


def test_what_runs_ends_with_its_adapter_and_nothing_new_gets_it() -> None:
    engine, prompt = engine_of(), list(range(30, 50))
    number = 1
    request = greedy(number, prompt)
    waiting = engine.prepare(dataclasses.replace(request, id="prepared"))
    engine.submit(request)
    events = [*engine.step(), *engine.step()]
    engine.keep_adapters([adapter(2)[0].identity])
    with pytest.raises(AdapterGoneError) as caught:
        engine.submit(greedy(number, prompt))
    assert caught.value.status == 404
    engine.submit(waiting)
    while not engine.idle:
        events += engine.step()
    for name in (request.id, "prepared"):
        tokens = [e.token for e in events if e.request == name and hasattr(e, "token")]
        assert tokens == said(adapter(number)[1], prompt)
    assert engine.adapters.keys() == {adapter(2)[0].identity}
    assert engine.generate([greedy(2, prompt)])[0].tokens == said(adapter(2)[1], prompt)
    engine.load_adapter(adapter(3)[0])
    engine.generate([greedy(2, prompt)])
    loaded = {adapter(number)[0].identity for number in (2, 3)}
    assert engine.runner._bank.places.keys() == loaded, "what nobody needs is not kept"


def test_the_router_does_not_decide_for_an_adapter() -> None:
    """Its bounds are those of the model alone."""
    model = lively()
    model.router = Router(model.config)
    model.router.calibration = Calibration(thresholds=[(0.0, 1e9)])
    engine = Engine(model, units=400)
    name = engine.load_adapter(adapter(1)[0])
    # without drafts it is the router that decides
    sampling = Sampling(temperature=0, max_tokens=4, ignore_eos=True, speculative=0)
    asked = Request(list(range(30, 60)), sampling, quality_tolerance=100.0)
    (alone,) = engine.generate([asked])
    assert alone.depth < model.config.layers
    (with_one,) = engine.generate([dataclasses.replace(asked, id="other", adapter=name)])
    assert with_one.depth == model.config.layers


def test_vectors_are_made_with_the_adapter() -> None:
    one, model = adapter(1)
    for depth in ("shallow", "full"):
        got = MODEL.embed("the sea", depth, one)
        torch.testing.assert_close(got, model.embed("the sea", depth), rtol=0, atol=1e-6)
        assert (got - MODEL.embed("the sea", depth)).abs().max() > 1e-3
