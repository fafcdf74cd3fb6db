"""The order in which two processes run the tests, and what they send each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.neighbours import BESIDE, COMPILING, EXAMPLES, in_turn, tell_results_alone

ROOT = Path(__file__).parents[2]


def test_what_compiles_comes_first_and_beside_it_what_needs_nothing_compiled() -> None:
    files = [
        *COMPILING,
        *(f"{folder}test_x.py" for folder in BESIDE),
        EXAMPLES,
        "tests/flows/test_a.py",
        "tests/unit/model/test_b.py",
    ]
    items: list[Any] = [SimpleNamespace(nodeid=f"{file}::test_{number}") for file in sorted(files) for number in (1, 2)]
    found = [item.nodeid for item in in_turn(items, together=True)]
    assert found == [f"{file}::test_{number}" for file in files for number in (1, 2)], "neighbours stay neighbours"
    assert in_turn(items, together=False) == items
    assert all((ROOT / path).exists() for path in (*COMPILING, *BESIDE, EXAMPLES))


class WorkerInteractor:
    """Of a process of xdist's."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def sendevent(self, name: str, **told: Any) -> None:
        self.sent.append((name, told.get("data")))


@pytest.mark.parametrize("asked", ["", "durations", "xmlpath"])
def test_of_a_test_that_passes_its_result_is_sent_and_of_others_all(asked: str) -> None:
    """Where times are asked for, they come with all that is sent."""
    interactor = WorkerInteractor()
    plugins = SimpleNamespace(get_plugins=lambda: {interactor})
    config: Any = SimpleNamespace(
        workerinput={}, pluginmanager=plugins, getoption=lambda name, default=None: "3" if name == asked else default
    )
    tell_results_alone(config)
    reports = [
        {"when": when, "outcome": outcome}
        for when in ("setup", "call", "teardown") for outcome in ("passed", "failed", "skipped")
    ]  # fmt: skip
    events = ["workerready", "logstart", "collectionfinish", "runtest_protocol_complete", "logfinish", "workerfinished"]
    for name in events:
        interactor.sendevent(name)
    for report in reports:
        interactor.sendevent("testreport", data=report)
    dropped = {"when": "setup", "outcome": "passed"}, {"when": "teardown", "outcome": "passed"}
    assert [name for name, data in interactor.sent if data is None] == [
        name for name in events if asked or not name.startswith("log")
    ]
    assert [data for _, data in interactor.sent if data] == [each for each in reports if asked or each not in dropped]


def test_who_runs_alone_sends_nothing() -> None:
    tell_results_alone(SimpleNamespace())  # type: ignore[arg-type]
