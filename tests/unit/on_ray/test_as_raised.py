"""What a task of Ray Data raises, as the command that asked for it says it."""

from __future__ import annotations

import logging

import pytest
import ray.data
from ray.exceptions import RayTaskError, UserCodeException

from shoal.errors import DataError, ResourceError
from shoal.on_ray.each import as_raised


def test_an_error_of_ours_is_raised_as_it_was_and_another_is_a_line() -> None:
    full = ResourceError("the disk of node 7 is full", do="free some there")
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.raise_original_map_exception, logger.level
    with pytest.raises(ResourceError) as caught, as_raised("read and clean"):
        assert context.raise_original_map_exception, "or a task's error is replaced before it leaves its process"
        raise RayTaskError("task", "many\nlines", full).as_instanceof_cause()
    assert caught.value is full
    with pytest.raises(DataError, match=r"cannot read and clean: got 'advice'") as other, as_raised("read and clean"):
        raise RayTaskError("task", "many\nlines", UserCodeException("it failed\nadvice")).as_instanceof_cause()
    assert "\n" not in str(other.value)
    assert (context.raise_original_map_exception, logger.level) == before
