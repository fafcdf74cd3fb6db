"""A time by which the last test must have begun, for runs that have to end (decision 0079). What is not begun is skipped and
named, and another commit begins with other files, so that on a slow machine none is left out for ever.

``pytest --begin-within MINUTES --turn WORD``: `WORD` (a commit) says which file comes first; the order stays, so that
neighbours still share what is slow to start.
"""

from __future__ import annotations

import time
from collections import Counter
from hashlib import sha256
from itertools import groupby

import pytest

REASON = "not begun within"
_BEGAN = pytest.StashKey[float]()


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--begin-within", type=float, metavar="MINUTES", help="skip, and name, tests not begun by then")
    parser.addoption("--turn", default="", metavar="WORD", help="which file comes first")


def start(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()


def turned(items: list[pytest.Item], word: str) -> list[pytest.Item]:
    """`items`, with the files before one that follows from `word` moved behind the others; as they are without a word."""
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    at = int(sha256(word.encode()).hexdigest(), 16) % len(files) if word and files else 0
    return [item for tests in files[at:] + files[:at] for item in tests]


def skip_if_late(config: pytest.Config) -> None:
    """To be called before the fixtures of a test."""
    minutes = config.getoption("begin_within")
    if minutes is not None and time.monotonic() > config.stash[_BEGAN] + 60 * minutes:
        pytest.skip(f"{REASON} {minutes:g} minutes")


def say_what_was_not_begun(reporter: pytest.TerminalReporter) -> None:
    """One line a file: how many of its tests."""
    skipped = [report for report in reporter.stats.get("skipped", []) if REASON in str(report.longrepr)]
    for file, count in Counter(report.nodeid.partition("::")[0] for report in skipped).items():
        reporter.write_line(f"not begun: {count} of {file}", yellow=True)
