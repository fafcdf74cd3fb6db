"""What one request may ask for, to the last of it."""

from __future__ import annotations

import pytest

from shoal.api.limits import Limits, at_most
from shoal.errors import RequestError


def test_as_many_as_are_allowed_may_be_and_one_more_may_not() -> None:
    at_most("tools", 128, 128)
    with pytest.raises(RequestError, match=r"too many tools.*129.*at most 128") as refused:
        at_most("tools", 129, 128)
    assert refused.value.param == "tools"
    with pytest.raises(RequestError, match="too many characters"):
        at_most("prompt", 2, 1, "characters")


def test_one_request_may_ask_for_so_much_where_nobody_says_otherwise() -> None:
    """What a gateway answers for: each number is also what one process must hold, or what a step must look for."""
    mib = 1_048_576
    assert vars(Limits()) == {
        "body_bytes": 16 * mib, "bodies_bytes": 256 * mib, "messages": 1024, "images": 16, "tools": 128, "choices": 64,
        "inputs": 2048, "tokenized": mib, "stops": 16, "stop_characters": 1024, "stop_ids": 1024, "bad_words": 128,
        "file_bytes": 200 * mib, "held_files": 1000, "held_bytes": 10 * 1024 * mib, "batch_lines": 50_000,
        "open_batches": 100, "held_batches": 1000, "seconds": 600.0,
    }  # fmt: skip
