"""A service that follows a release, over HTTP and real engines in one process: promotion, canary, and canaries that are bad."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal import Engine, Model
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.follow import Follower
from shoal.api.local import Changing, Here
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.engine.events import Event, Request
from shoal.engine.front import AsyncEngine
from shoal.errors import ConfigError
from shoal.loop.capture import Capture
from shoal.loop.release import Release
from tests.canaries import seen
from tests.serving import in_a_thread
from tests.unit.engine.lively import lively

PASSED = {"passed": True, "checks": []}
ADMIN, READER = {"Authorization": "Bearer admin"}, {"Authorization": "Bearer reader"}
TOKENS = 12
SECONDS = 60.0  # that a test waits for what must come, at most


class Slow(AsyncEngine):
    """Takes its time for each list of events."""

    async def batches(
        self, request: Request, gap: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Event], None]:
        async for events in super().batches(request, gap):
            await asyncio.sleep(0.5)
            yield events


class Silent(AsyncEngine):
    """Says nothing after the first token."""

    async def batches(
        self, request: Request, gap: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Event], None]:
        async for events in super().batches(request, gap):
            yield events[:1]
            await asyncio.Event().wait()


class Crashing(AsyncEngine):
    """Dies in the middle of its fifth answer, with all that it has.

    On a busy machine an answer may come in one piece, and who has all of it asks for no more: such an
    answer has no middle, so the next one is taken.
    """

    count = 0

    async def batches(
        self, request: Request, gap: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Event], None]:
        self.count += 1
        dies = self.count >= 5
        async for events in super().batches(request, gap):
            yield events
            if dies:
                await self.close(0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    lively().save(root / "one")
    other = lively()
    for group in other.net.groups:
        for block in group.blocks:  # type: ignore[union-attr]
            block.attention.out.weight.mul_(-1)  # type: ignore[union-attr]
    other.save(root / "two")
    for norm in other.net.exit_norms.values():
        norm.weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    other.save(root / "nan")
    return {path.name: path for path in root.iterdir()}


@dataclass
class Service:
    url: str
    release: Release
    split: Split
    numbers: Iterator[int] = field(default_factory=count)

    def ask(self, number: int, **more: Any) -> tuple[str, str, str]:
        """Text and version of an answer, and who gave its last token; it must be whole."""
        body = {"messages": [{"role": "user", "content": f"{number}: abc"}], "max_tokens": TOKENS, "temperature": 0}
        body |= {"model": "fish", "ignore_eos": True, "stream": True, "depth": "full", **more}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=READER, timeout=60) as reply:
            assert reply.status_code == 200, reply.read()
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        assert not any("error" in chunk for chunk in chunks), chunks
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        return text, reply.headers["x-shoal-version"], chunks[-1]["choices"][0]["finish_reason"]

    def many(self, asked: int) -> list[tuple[str, str, str]]:
        """Answers to so many conversations, none of which was there before."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(self.ask, islice(self.numbers, asked)))

    def try_out(self, step: int, people: int = 12) -> None:
        """Starts the canary of the candidate at `step`, of so many people a step."""
        self.release.begin(why="try")
        canary = self.release.state().canary
        assert canary is not None
        self.release.step(replace(canary, step=step, shadows=people, people=people), why="in a test")
        until(lambda: self.split.trial is not None and self.split.trial.canary.step == step)

    def change(self, what: str, headers: dict[str, str] = ADMIN, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/shoal/release/{what}", json=body, headers=headers, timeout=60)

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/shoal/release", headers=READER, timeout=60).json()
        return found


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def serving(
    root: Path, models: dict[str, Path], candidate: str = "two", kind: type[AsyncEngine] = AsyncEngine
) -> Iterator[Service]:
    """Version 1 is served; version 2, `candidate`, passed the gate, and its engine is of `kind`."""
    release = Release(root / "release")
    first = release.add(models["one"])
    release.add(models[candidate], verdict=PASSED)

    def load(directory: str) -> AsyncEngine:
        of = AsyncEngine if directory == str(first.served) else kind
        return of(Engine(Model.load(directory), max_batch=8))

    engine = load(str(first.served))
    serves = Changing(engine, first.label)
    here, split = Here(serves, load), Split(serves)
    app = build_app(
        [Hosted(ServedModel.load(first.served, "fish"), split)],
        api_keys=ApiKeys(["admin name=ann admin=yes", "reader name=bob"]),
        capture=CaptureArgs(str(root / "captured")),
        follower=Follower(release, split, here, serves=1),
    )
    with in_a_thread(app, [here]) as thread:  # type: ignore[list-item]
        until(lambda: bool(split.labels))
        yield Service(thread.url, release, split)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.api.follow.LOOK_SECONDS", 0.05)


def test_a_promotion_is_followed_while_streams_run_and_each_answer_is_one_versions(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with serving(tmp_path, models) as service:
        labels = [version.label for version in service.release.versions()]
        texts = {labels[0]: service.ask(0)[0]}
        with ThreadPoolExecutor(5) as pool:
            answers = [pool.submit(service.ask, 0, max_tokens=TOKENS) for _ in range(12)]
            assert service.change("promote", why="better").status_code == 200
            answers += [pool.submit(service.ask, 0) for _ in range(12)]
            found = [answer.result() for answer in answers]
        until(lambda: service.ask(0)[1] == labels[1])
        texts[labels[1]] = service.ask(0)[0]
        assert texts[labels[0]] != texts[labels[1]]
        assert all(text == texts[version] for text, version, _ in found)
        captured = Capture(tmp_path / "captured")
        until(lambda: {row["version"] for row in captured.rows().to_pylist()} == {*labels})  # after the answer, a row
        assert {row["role"] for row in captured.rows(copies=True).to_pylist()} == {"stable"}
        assert service.change("rollback", why="worse").json()["stable"] == 1
        until(lambda: service.ask(0)[1] == labels[0])
        assert service.ask(0)[0] == texts[labels[0]]
        assert [(entry["who"], entry["what"]) for entry in service.told()["log"]][:2] == [
            ("ann", "rollback"),
            ("ann", "promote"),
        ]


ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "the sea"}], "max_tokens": 2},
    "completions": {"prompt": "the sea", "max_tokens": 2},
    "messages": {"messages": [{"role": "user", "content": "the sea"}], "max_tokens": 2},
    "responses": {"input": "the sea", "max_output_tokens": 16},
    "embeddings": {"input": "the sea"},
    "score": {"text_1": "the sea", "text_2": ["a fish", "a bird"]},
    "rerank": {"query": "the sea", "documents": ["a fish", "a bird"]},
}


def test_every_answer_of_a_model_says_its_version(models: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, models) as service:

        def versions() -> dict[str, str | None]:
            return {route: ask(route).headers.get("x-shoal-version") for route in ROUTES}

        def ask(route: str) -> httpx.Response:
            body = {"model": "fish", **ROUTES[route]}
            answer = httpx.post(f"{service.url}/v1/{route}", json=body, headers=READER, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer

        first, second = (version.label for version in service.release.versions())
        before = ask("embeddings").json()["data"]
        assert versions() == dict.fromkeys(ROUTES, first)
        assert service.change("promote", why="better").status_code == 200
        until(lambda: ask("embeddings").headers.get("x-shoal-version") == second)
        assert versions() == dict.fromkeys(ROUTES, second) and ask("embeddings").json()["data"] != before


@pytest.fixture
def easily(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes no answer slow."""
    monkeypatch.setattr("shoal.loop.canary.SLOW", 1000.0)


@pytest.mark.drill
@pytest.mark.usefixtures("easily")
def test_a_canary_goes_up_by_evidence_and_is_promoted_where_the_release_says_so(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Of equal weights: another model is less sure of what it says, and is taken back for that where it is asked 20 times."""
    with serving(tmp_path, models, "one") as service:
        service.many(20)
        service.release.set_auto("promote", why="a test")
        until(lambda: service.split.trial is not None)
        trial = service.split.trial
        assert trial is not None and trial.canary.step == 0
        first, second = (version.label for version in service.release.versions())
        assert {version for _, version, _ in service.many(8)} == {first}, "a shadow answers nobody"
        until(lambda: seen(trial.evidence, "canary")[0] > 0)
        captured = Capture(tmp_path / "captured")

        def ids(role: str) -> set[str]:
            return {row["id"] for row in captured.rows(copies=True).to_pylist() if row["role"] == role}

        until(lambda: ids("shadow") != set() and ids("shadow") <= ids("stable"))  # either may end before the other
        copies = [row for row in captured.rows(copies=True).to_pylist() if row["role"] == "shadow"]
        assert {row["version"] for row in copies} == {second} and copies[0]["answer_tokens"] == TOKENS
        service.release.step(replace(trial.canary, shadows=3, people=6), why="in a test")
        asked = 0
        while service.release.state().canary is not None:
            assert all(version in (first, second) for _, version, _ in service.many(20))
            asked += 20
            assert asked < 4000
        until(lambda: service.ask(0)[1] == second)
        steps = [entry for entry in service.release.audit.entries() if entry["what"] in ("step", "promote")]
        assert [entry["what"] for entry in steps] == ["step"] * 4 + ["promote"]
        assert [entry["state"]["canary"]["step"] for entry in steps[:-1]] == [0, 1, 2, 3]
        assert steps[-1]["figures"]["canary"]["failures"]["bad"] == 0 and "forced" not in steps[-1]["figures"]
        assert service.release.check() == len(service.release.audit.entries())


@pytest.mark.drill
@pytest.mark.usefixtures("easily")
def test_a_person_decides_where_nothing_else_was_said(models: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path, models, "one") as service:
        service.try_out(3, people=4)
        until(lambda: bool(service.many(8)) and service.release.state().held is not None)
        assert "promote it" in str(service.release.state().held) and service.release.state().stable == 1
        told = service.told()
        assert (told["share"], told["canary"]["version"], told["may_change"]) == (0.5, 2, False)
        assert {check["name"] for check in told["evidence"]["checks"]} >= {"failures", "slow answers"}
        captured = Capture(tmp_path / "captured")

        def whole(role: str) -> list[str]:
            return [row["id"] for row in captured.rows().to_pylist() if row["role"] == role and not row["resumed"]]

        for role in ("canary", "stable"):
            until(lambda role=role: bool(whole(role)))  # type: ignore[misc]
            *_, answer = whole(role)
            vote = {"id": answer, "rating": "down", "user": "u7"}
            httpx.post(f"{service.url}/v1/shoal/feedback", json=vote, headers=READER, timeout=60).raise_for_status()
        evidence = service.split.trial.evidence  # type: ignore[union-attr]
        counted = [seen(evidence, side, "down") for side in ("canary", "stable")]
        assert counted == [(1, 1), (0, 0)], "one person, two answers"
        assert service.change("promote", why="all clear").json()["stable"] == 2


@pytest.mark.parametrize(
    ("candidate", "kind", "named"),
    [
        ("two", Crashing, ""),
        pytest.param("nan", AsyncEngine, "failures", marks=[pytest.mark.drill, pytest.mark.smoke]),
        pytest.param("two", Silent, "failures", marks=pytest.mark.drill),  # one answer of such a canary: below
        pytest.param("two", Slow, "slow answers", marks=pytest.mark.drill),  # most of it waits for slow answers
    ],
)
def test_a_bad_canary_is_taken_back_and_no_client_sees_an_error(
    models: dict[str, Path], tmp_path: Path, candidate: str, kind: type[AsyncEngine], named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At half of the traffic, with clients that would not take anything but a whole answer."""
    monkeypatch.setattr("shoal.api.trial.LATE_SECONDS", 4.0)
    with serving(tmp_path, models, candidate, kind) as service:
        service.many(24)  # what the stable version takes is known by then
        service.try_out(3, people=300)
        asked = 0
        while service.release.state().canary is not None:
            answers = service.many(8)
            assert all(reason == "length" for _, _, reason in answers)
            asked += 8
            assert asked < 400
        state, last = service.release.state(), service.release.audit.entries()[-1]
        assert (state.stable, state.candidate, last["what"], last["who"]) == (1, None, "rollback", "shoal")
        assert named in last["why"]
        assert last["figures"]["canary"]["failures"]["of"] <= 20
        until(lambda: service.split.trial is None)
        whole = [service.ask(number) for number in range(4)]
        assert {version for _, version, _ in whole} == {service.release.stable().label}


def test_a_canary_that_does_not_start_is_taken_back(models: dict[str, Path], tmp_path: Path) -> None:
    class Broken(AsyncEngine):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise ConfigError("nothing fits")

    with serving(tmp_path, models, "two", Broken) as service:
        service.release.begin(why="try")
        until(lambda: service.release.state().canary is None)
        assert "did not start: nothing fits" in service.release.audit.entries()[-1]["why"]
        service.release.promote(2, why="try again")
        until(lambda: service.release.state().stable == 2)
        assert service.ask(0)[1] == service.release.version(1).label, "what served goes on, and says who it is"


@pytest.mark.parametrize(
    ("what", "headers", "body", "status", "said"),
    [
        ("promote", READER, {"why": "x"}, 403, "admin=yes"),
        ("promote", {}, {"why": "x"}, 401, "no API key"),
        ("promote", ADMIN, {}, 400, "why"),
        ("promote", ADMIN, {"why": "x", "version": "9"}, 400, "version"),
        ("rollback", ADMIN, {"why": "x"}, 400, "nothing to roll back"),
        ("hold", ADMIN, {"why": "x", "verison": "2"}, 400, "did you mean"),
    ],
)
def test_a_change_that_cannot_be_is_refused_in_a_line(
    models: dict[str, Path],
    tmp_path: Path,
    what: str,
    headers: dict[str, str],
    body: dict[str, str],
    status: int,
    said: str,
) -> None:
    with serving(tmp_path, models) as service:
        reply = service.change(what, headers, **body)
        assert (reply.status_code, said in reply.json()["error"]["message"]) == (status, True), reply.text
        assert service.release.state().stable == 1
