"""What a key may hold, where several gateways take its files and batches at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.api.batches import store
from shoal.api.batches.shapes import BatchRequest
from shoal.api.batches.store import ANYBODY, HeldError, Store
from shoal.api.limits import Limits

AT_ONCE = 8


@pytest.fixture
def gateways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """Two over one folder, in which putting something in place takes as long as on a network."""
    real = store._into_place

    def slow(place: Path, final: Path) -> None:
        time.sleep(0.02)
        real(place, final)

    monkeypatch.setattr(store, "_into_place", slow)
    limits = replace(Limits(), held_files=3, open_batches=1)
    return [Store(tmp_path, limits) for _ in range(2)]


def test_a_key_holds_no_more_files_and_batches_however_many_come_at_once(gateways: list[Store]) -> None:
    begin = threading.Barrier(AT_ONCE)

    def file(number: int) -> str | None:
        with gateways[number % 2].new_file() as place:
            (place / "content").write_bytes(b"{}")
            begin.wait(60)
            try:
                return gateways[number % 2].keep(place, ANYBODY, "x", "batch")["id"]
            except HeldError:
                return None

    def batch(number: int) -> str | None:
        asked = BatchRequest(input_file_id=names[0], endpoint="/v1/completions", completion_window="24h")
        begin.wait(60)
        try:
            return gateways[number % 2].create(ANYBODY, asked)["id"]
        except HeldError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = [name for name in pool.map(file, range(AT_ONCE)) if name]
        batches = [name for name in pool.map(batch, range(AT_ONCE)) if name]
    assert (len(names), len(batches)) == (3, 1)
    assert gateways[0]._names(ANYBODY, "files") == sorted(names)
    assert not [*(gateways[0].folder / "aside").iterdir()]
