"""A replica that follows a release: what it could not load is tried again."""

from __future__ import annotations

import asyncio

import pytest

from shoal.errors import CheckpointError
from shoal.loop import again
from shoal.on_ray import following


def test_a_version_that_could_not_be_loaded_is_tried_again_and_not_at_each_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, tried = list[int](), list[str]()

    def stable(release: str) -> str:
        looks.append(1)
        if len(looks) == 4:
            assert len(tried) == 1
            monkeypatch.setattr(again, "SECONDS", 0.0)
        return "old" if len(looks) == 9 else "new"

    async def take(directory: str) -> None:
        tried.append(directory)
        if len(tried) < 4:
            raise CheckpointError("no memory")

    async def work() -> None:
        task = asyncio.create_task(following.follow("release", "old", take))
        while len(looks) < 12:
            await asyncio.sleep(0.001)
        task.cancel()

    monkeypatch.setattr(following, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(following, "stable", stable)
    asyncio.run(work())
    assert tried == ["new"] * 4 + ["old", "new"]
