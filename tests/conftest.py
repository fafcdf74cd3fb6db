import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import budget
from tests.neighbours import end_what_is_not_asked_for, scheduler
from tests.threads import OneThread

# Nothing is timed: a busy machine must not fail a test.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
sys.meta_path.insert(0, OneThread("torch"))


def pytest_addoption(parser: pytest.Parser) -> None:
    budget.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    budget.start(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = budget.turned(items, config.getoption("turn"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    budget.skip_if_late(item.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    budget.say_what_was_not_begun(terminalreporter)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        end_what_is_not_asked_for(item, nextitem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)
