import gc
import os
import socketserver
import ssl
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.at_import import (
    LOOK_SECONDS,
    changed,
    compiled_once,
    kept_frozen,
    measured_once,
    not_waited_for,
    one_thread,
    read_once,
    soon_left,
    soon_stopped,
    soon_taken,
    started_late,
    without_stubs,
)  # fmt: skip
from tests.neighbours import (
    end_at_once,
    end_what_is_not_asked_for,
    in_turn,
    read_in_turn,
    scheduler,
    tell_results_alone,
)  # fmt: skip

# numpy's library has two threads on two cores, and one that has nothing to do spins for a while. Read when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nothing is timed: a busy machine must not fail a test. Examples are others in each run.
settings.register_profile("shoal", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
changed(
    {
        "torch": one_thread,
        "shoal.engine.front": kept_frozen,
        "shoal.engine.runner": compiled_once,
        "shoal.train.meter": measured_once,
        "shoal.train.run": read_once,
        "uvicorn.server": soon_left,
        "werkzeug.serving": soon_stopped,
        "shoal.data.alone": soon_taken,
        "shoal.on_ray.serve": started_late,
        "gradio.component_meta": without_stubs,
    }
)
# As `soon_stopped` says; the server that werkzeug's is made of.
socketserver.BaseServer.serve_forever.__defaults__ = (LOOK_SECONDS,)
os.fsync = not_waited_for
gc.disable()  # until all is imported, of which nothing goes again


def pytest_configure(config: pytest.Config) -> None:
    end_at_once(config)
    tell_results_alone(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    read_in_turn(session.config)


@pytest.hookimpl(trylast=True)  # of those that are left by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What xdist's processes call it.
    items[:] = in_turn(items, together=getattr(config.option, "loadgroup", False))


def pytest_collection_finish() -> None:
    """What all test files import is some million objects, which Python's collector would look through again and again."""
    gc.collect()
    gc.freeze()
    # a tenth as often as by default: one look at all that tests hold takes a tenth of a second
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_context_of_a_kind() -> Iterator[None]:
    """httpx reads all certificates for each client, also for one that speaks no TLS: most of what it takes to ask once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        end_what_is_not_asked_for(item, nextitem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)
