"""What the engine promises, one test a property (numbers of the issue's list), on the `test` preset in float64.

The oracle is the whole model without cache or batching. Tokens must be the same, and log-probabilities within 1e-9.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal import Engine, Model, Request, Sampling
from shoal.config import AUTO, FULL, GROUPS
from shoal.engine.events import Completion, Finished, Token
from shoal.engine.images import PromptImages
from shoal.engine.pages import Pages
from shoal.engine.running import Running
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches, to_patches
from tests import oracle
from tests.unit.engine.lively import lively, with_router

MODEL = lively()
PAGE, BLOCK = MODEL.config.page, MODEL.config.block
DEPTHS = ("shallow", "middle", "full")


def words(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 260) for _ in range(count)]


def ask(prompt: list[int] | Encoded, depth: str = "full", tokens: int = 10, **more: Any) -> Request:
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5)
    return Request(prompt, sampling, depth=depth, **more)


def roomy(model: Model = MODEL, **limits: Any) -> Engine:
    return Engine(model, units=400, **limits)


def check(request: Request, answer: Completion) -> None:
    """`answer` is what the whole model says to a greedy `request`."""
    prompt = MODEL.encode(request.prompt)  # type: ignore[arg-type]
    depth = FULL if request.depth == AUTO else request.depth
    assert answer.tokens == oracle.greedy(MODEL, prompt, request.sampling.max_tokens, answer.tokens, depth)
    logits = MODEL.logits([*prompt.ids, *answer.tokens], depth, prompt.images)
    rows = torch.log_softmax(logits.masked_fill(MODEL.forbidden(), -torch.inf), -1)[len(prompt.ids) - 1 :]
    for row, entry in zip(rows, answer.logprobs, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-9)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-9)


def run(engine: Engine, requests: list[Request], after: Callable[[Engine], None] = lambda engine: None) -> None:
    """Run `requests` to their ends, `after` each step, and check each answer."""
    answers = {engine.submit(request): Completion() for request in requests}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request].tokens.append(event.token)
                answers[event.request].logprobs.append(event.logprob)  # type: ignore[arg-type]
        after(engine)
    assert engine.dead is None
    for request in requests:
        check(request, answers[request.id])


def shuffle(engine: Engine, seed: int) -> None:
    """Another physical place for every page."""
    random.Random(seed).shuffle(engine.scheduler.pages._free)


def live(engine: Engine) -> list[Running]:
    return list(engine.scheduler._live.values())


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [1, BLOCK, PAGE + 1, 61])  # 1 is BLOCK - 1 too
def test_09_paged_is_parallel_in_any_chunks_and_any_place(rows: int, depth: str) -> None:
    engine = Engine(MODEL, max_batch=1)
    engine.scheduler.max_batch_tokens = rows  # fewer than a user may ask for
    shuffle(engine, rows)
    run(engine, [ask(words(61, rows), depth)])


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_10_what_lies_in_free_pages_and_unused_slots_is_never_read(value: float) -> None:
    def poison(engine: Engine) -> None:
        pages, cache = engine.scheduler.pages, engine.runner.cache
        for unit in [0, *pages._free]:
            cache.kv[:, unit], cache.summaries[:, unit] = value, value
        for running in live(engine):
            for j, computed in enumerate(running.holding.computed):
                if computed % PAGE and running.holding.owned[j]:
                    unit = int(running.holding.tables[j, computed // PAGE])
                    cache.kv[:, unit, :, computed % PAGE :] = value
                    cache.summaries[:, unit, :, computed % PAGE // BLOCK :] = value

    engine = Engine(MODEL, units=42, max_batch=6)
    poison(engine)
    run(engine, [ask(words(5 + 9 * i, i), DEPTHS[i % 3], 20) for i in range(6)], poison)
    assert engine.stats()["num_preemptions_total"] > 0


@settings(max_examples=8)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(DEPTHS), st.integers(0, 6)), min_size=2, max_size=7),
    st.integers(2, 6),
    st.integers(0, 20),
)
def test_12_a_request_says_the_same_in_any_company(mates: list[tuple[int, str, int]], batch: int, rows: int) -> None:
    """Whatever the others are, how deep, in which order, and when each comes."""
    engine = Engine(MODEL, max_batch=batch, max_batch_tokens=batch + PAGE + rows)
    waiting = [(ask(words(size, i), depth, 6), late) for i, (size, depth, late) in enumerate(mates)]
    answers: dict[str, Completion] = {request.id: Completion() for request, _ in waiting}
    for step in range(1000):
        for request, late in waiting:
            if late == step:
                engine.submit(request)
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request].tokens.append(event.token)
        if engine.idle and step > 6:
            break
    for request, _ in waiting:
        check(request, answers[request.id])


def test_14_a_request_owns_what_its_depth_and_length_need_and_gives_it_back() -> None:
    """A thousand requests of any kind; every unit of theirs at every step."""
    rng = random.Random(0)
    engine = Engine(MODEL, units=160, max_batch=16, max_batch_tokens=96)
    ended, submitted = 0, 0
    while submitted < 1000 or not engine.idle:
        while submitted < 1000 and len(live(engine)) < 24:
            prompt = words(8, 1) * rng.randint(0, 2) + words(rng.randint(1, 12), submitted)
            engine.submit(ask(prompt, rng.choice(DEPTHS), rng.randint(1, 4)))
            submitted += 1
        ended += sum(isinstance(event, Finished) for event in engine.step())
        for running in live(engine):
            assert running.groups is not None
            stored = running.holding.computed[0]
            assert (
                running.holding.owned == [-(-stored // PAGE)] * running.groups + [0] * (GROUPS - running.groups)
                or running.holding.at < stored
            )
            assert stored <= len(running.tokens)
        if live(engine) and rng.random() < 0.1:
            engine.cancel(rng.choice(live(engine)).id)
        if engine.scheduler.running and rng.random() < 0.1:
            engine.scheduler._preempt(rng.choice(engine.scheduler.running))
        engine.scheduler.check_integrity()
    ended += sum(isinstance(event, Finished) for event in engine.step())  # of one that was cancelled last
    assert ended == 1000
    assert engine.scheduler.pages.available == engine.scheduler.pages.total
    assert engine.stats()["num_preemptions_total"] > 10


def test_15_a_batch_that_shrinks_with_depth_is_each_depth_alone() -> None:
    requests = [ask(words(7 * i + 1, i), DEPTHS[i % 3], 12) for i in range(9)]
    together = roomy().generate(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = roomy().generate([ask(request.prompt, str(request.depth), 12)])  # type: ignore[arg-type]
        assert answer.tokens == alone.tokens
        for a, b in zip(answer.logprobs, alone.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-12)


@pytest.fixture(scope="module")
def routed() -> Model:
    return with_router(MODEL)


def depth_of(engine: Engine, prompt: list[int], tolerance: float | None) -> int:
    """As the router alone decides."""
    sampling = Sampling(temperature=0, max_tokens=2, speculative=0)
    (answer,) = engine.generate([Request(prompt, sampling, quality_tolerance=tolerance)])
    return answer.depth


def test_16_the_router_decides_from_the_prompt_alone(routed: Model) -> None:
    seen = set()
    shared = words(40, 5)
    cached, chunked = roomy(routed), roomy(routed, max_batch=1, max_batch_tokens=PAGE + 1)
    for i in range(12):
        prompt, tolerance = shared[: 8 * (i % 5)] + words(3 + i, i), (0.3, 0.5, 1.0)[i % 3]
        alone = depth_of(roomy(routed), prompt, tolerance)
        seen.add(alone)
        assert depth_of(cached, prompt, tolerance) == depth_of(cached, prompt, tolerance) == alone
        assert depth_of(chunked, prompt, tolerance) == alone
        mates = [Request(words(20, 50 + k), Sampling(max_tokens=9), depth=DEPTHS[k % 3]) for k in range(4)]
        request = Request(prompt, Sampling(max_tokens=2, speculative=0), quality_tolerance=tolerance)
        assert roomy(routed).generate([*mates, request])[-1].depth == alone
    assert len(seen) > 1 and cached.stats()["prefix_cache_hits_total"] > 0


def test_16_what_the_cache_keeps_of_a_page_is_of_that_page_alone(routed: Model) -> None:
    """A view of the sums of the whole prompt would keep them all for as long as one page is cached."""
    engine = roomy(routed)
    depth_of(engine, words(6 * PAGE, 3), 0.5)
    notes = list(engine.scheduler.pages._notes.values())
    assert len(notes) == 6
    assert all(note.untyped_storage().nbytes() == note.numel() * note.element_size() for note in notes)


def test_17_more_tolerance_or_less_budget_is_never_deeper(routed: Model) -> None:
    engine, frugal = roomy(routed), [roomy(routed, compute_budget=b) for b in (1.0, 0.8, 0.6, 0.4, 0.25)]
    for i in range(6):
        prompt = words(20 + i, i)
        tolerances = [depth_of(engine, prompt, t) for t in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 5.0)]
        budgets = [depth_of(each, prompt, None) for each in frugal]
        for depths in (tolerances, budgets):
            assert depths == sorted(depths, reverse=True) and depths[0] == MODEL.config.layers


@pytest.mark.parametrize("every", [1, 3])
def test_22_preempted_or_not_the_answer_goes_on_the_same(every: int) -> None:
    """The request is thrown out of its units after every step, or every third."""
    steps = 0

    def preempt(engine: Engine) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0 and steps < 60:
            for running in list(engine.scheduler.running):
                engine.scheduler._preempt(running)

    run(roomy(), [ask(words(30, 1), depth, 12) for depth in DEPTHS], preempt)


def test_22_a_prefix_that_ends_inside_a_page_is_shared_up_to_that_page_and_no_further() -> None:
    """Copy-on-write without a copy: full pages are shared and never written again, the page that is written is one's own."""
    engine, shared = roomy(), words(2 * PAGE + 3, 4)
    first, second = ask([*shared, 40], tokens=12), ask([*shared, 41], tokens=12)
    engine.submit(first)
    engine.step()
    a = engine.scheduler._live[first.id]
    before = engine.runner.cache.kv[:, a.holding.tables[:, :2].ravel()].clone()
    engine.submit(second)
    engine.step()
    b = engine.scheduler._live[second.id]
    assert (a.holding.tables[:, :2] == b.holding.tables[:, :2]).all(), "whole pages of the prefix are kept once"
    assert not set(a.holding.tables[:, 2].tolist()) & set(b.holding.tables[:, 2].tolist()), (
        "the page that is still written is not shared"
    )
    answers = {first.id: Completion(), second.id: Completion()}
    answers[first.id].tokens = a.tokens[a.prompt_len :]
    answers[second.id].tokens = b.tokens[b.prompt_len :]
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request].tokens.append(event.token)
    assert torch.equal(engine.runner.cache.kv[:, a.holding.tables[:, :2].ravel()], before) or not a.holding.owned[0]
    for request in (first, second):
        check(request, answers[request.id])


def test_22_samples_of_one_prompt_share_its_pages_and_keep_apart() -> None:
    engine, prompt = roomy(), words(3 * PAGE + 5, 6)
    samplings = [Sampling(seed=i, max_tokens=14, ignore_eos=True) for i in range(4)]
    engine.generate([Request(prompt, Sampling(max_tokens=1))])  # its pages are stored
    requests = [Request(prompt, sampling) for sampling in samplings]
    for request in requests:
        engine.submit(request)
    engine.step()
    tables = [running.holding.tables[:, :3] for running in live(engine)]
    assert len(tables) == 4 and all((table == tables[0]).all() for table in tables)
    for request in requests:
        engine.cancel(request.id)
    together = engine.generate([Request(prompt, sampling) for sampling in samplings])
    alone = [roomy().generate([Request(prompt, sampling)])[0] for sampling in samplings]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert len({tuple(answer.tokens) for answer in together}) == 4


def picture(value: int, before: list[int]) -> Encoded:
    image = to_patches(Image.fromarray(np.full((24, 24, 3), value, dtype=np.uint8)), MODEL.config)
    return Encoded([*before, *image.tokens(), *MODEL.tokenizer.encode("which?")], [image])


def test_23_two_images_share_nothing_from_the_image_on_and_one_image_is_found_again() -> None:
    engine, before = roomy(), words(2 * PAGE, 7)  # two whole pages of text come first
    asked = [picture(value, before) for value in (0, 200, 0)]
    found = []
    for prompt in asked:
        (answer,) = engine.generate([ask(prompt, tokens=6)])
        check(ask(prompt, tokens=6), answer)
        assert answer.finished is not None
        found.append(answer.finished.cached_tokens)
    assert found == [0, 2 * PAGE, len(asked[0].ids) // PAGE * PAGE]
    dark, light = (MODEL.logits(prompt.ids, images=prompt.images)[-1] for prompt in asked[:2])
    assert not torch.allclose(dark, light)


def small(value: int) -> Patches:
    """A picture of one patch."""
    return Patches(np.full((1, MODEL.config.patch_values), value, dtype=np.uint8), 1, 1)


def test_23_pictures_in_another_order_are_other_pictures_also_within_one_page() -> None:
    """Four of one patch each fill a page of 16: what comes twice must be told apart by its place."""
    config = dataclasses.replace(MODEL.config, page=16)
    model = Model(config, MODEL.net, MODEL.tokenizer)
    engine, seen = Engine(model, units=400), set()
    for order in itertools.product((10, 240), repeat=4):
        images = [small(value) for value in order]
        prompt = Encoded([*(token for image in images for token in image.tokens()), 60, 61], images)
        request = ask(prompt, tokens=4)
        (answer,) = engine.generate([request])
        check(request, answer)
        assert answer.finished is not None and answer.finished.cached_tokens == 0, order
        seen.add(tuple(answer.logprobs[0].top))
        (again,) = engine.generate([ask(prompt, tokens=4)])
        assert again.tokens == answer.tokens and again.finished is not None and again.finished.cached_tokens == 16
    assert len(seen) == 16, "each of them is a prompt of its own"


def test_23_a_page_names_each_run_of_patches_and_where_in_its_image_it_begins() -> None:
    a, b = (Patches(np.full((9, MODEL.config.patch_values), value, dtype=np.uint8), 3, 3) for value in (1, 2))
    images = [a, b, b, a]
    found = PromptImages.of(Encoded([60, *(token for image in images for token in image.tokens())], images))
    assert found is not None
    for start in range(0, 58):
        for end in range(start, 58):
            spelled = []  # by definition: each patch with its image, runs are what stays
            for number, at in enumerate(found.at):
                image, first = divmod(number, 9)
                if start <= at < end and (not spelled or spelled[-1][0] != image):
                    spelled.append((image, first))
            assert found.runs(start, end) == [(images[i].sha256(), first) for i, first in spelled]


def test_23_a_picture_that_begins_with_the_last_slot_of_a_page_is_in_the_key_of_that_page() -> None:
    """And with any other: pages before it are shared, its own and all after it are not."""
    for place in range(PAGE - 1, 2 * PAGE + 1):  # of its first patch
        keys = []
        for value in (10, 240):
            prompt = Encoded([*words(place - 1, 7), *small(value).tokens(), *words(PAGE, 8)], [small(value)])
            holding = roomy().prepare(ask(prompt, tokens=1)).holding
            holding.extend_keys(Pages(2))
            assert len(holding.keys) == len(prompt.ids) // PAGE
            keys.append(holding.keys)
        assert [a == b for a, b in zip(*keys, strict=True)] == [at < place // PAGE for at in range(len(keys[0]))]


def test_23_an_image_is_hashed_once_and_cannot_change_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    given = np.zeros((9, MODEL.config.patch_values), dtype=np.uint8)
    image, hashed = Patches(given, 3, 3), []
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or hashlib.blake2b(data))
    engine = roomy()
    for _ in range(4):  # choices of one prompt
        engine.prepare(ask(Encoded(image.tokens(), [image])))
    assert len(hashed) == 1
    before = image.sha256()
    given[:] = 7
    assert not image.values.any() and image.sha256() == before
    with pytest.raises(ValueError, match="read-only"):
        image.values[0] = 1
