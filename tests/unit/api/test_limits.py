"""What one request may ask for, to the last of it."""

from __future__ import annotations

import pytest

from shoal.api.limits import at_most
from shoal.errors import RequestError


def test_as_many_as_are_allowed_may_be_and_one_more_may_not() -> None:
    at_most("tools", 128, 128)
    with pytest.raises(RequestError, match=r"too many tools.*129.*at most 128") as refused:
        at_most("tools", 129, 128)
    assert refused.value.param == "tools"
    with pytest.raises(RequestError, match="too many characters"):
        at_most("prompt", 2, 1, "characters")
