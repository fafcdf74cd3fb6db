"""What Ray keeps of a service's adapters, over a store like the one of its head."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from ray.exceptions import RpcError

from shoal.api.adapter_names import Known
from shoal.api.serve_args import ServeArgs
from shoal.errors import CheckpointError, EngineDeadError
from shoal.model import adapter_files
from shoal.on_ray import known_adapters
from shoal.on_ray.known_adapters import KnownAdapters
from tests.adapters import write
from tests.unit.engine.lively import lively


class Head:
    """`ray.experimental.internal_kv`: one after the other, as the head does."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.alone, self.lost = threading.Lock(), False
        self.again = False  # Ray asks again, since its first answer was lost

    def _internal_kv_put(self, key: str, value: str, overwrite: bool, namespace: str) -> bool:
        self._reach()
        with self.alone:
            there = key in self.held
            if overwrite or not there:
                self.held[key] = value.encode()
            return there or self.again

    def _internal_kv_get(self, key: str, namespace: str) -> bytes | None:
        self._reach()
        return self.held.get(key)

    def _internal_kv_list(self, prefix: str, namespace: str) -> list[bytes]:
        self._reach()
        return [key.encode() for key in [*self.held] if key.startswith(prefix)]

    def _internal_kv_del(self, key: str, namespace: str) -> None:
        self.held.pop(key, None)

    def _reach(self) -> None:
        if self.lost:
            raise RpcError("gone")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    head = Head()
    controller = SimpleNamespace(_actor_id=b"controller")
    monkeypatch.setattr(known_adapters, "internal_kv", head)
    monkeypatch.setattr(known_adapters.ray, "get_actor", lambda *_, **__: controller)
    monkeypatch.setattr(known_adapters.serve, "get_replica_context", lambda: SimpleNamespace(app_name="shoal"))
    return head


def adding(name: str) -> known_adapters.Change:
    return lambda known: {**known, name: Known(name, f"at/{name}", 1)}


def test_all_gateways_see_one_start_whoever_was_first(head: Head, tmp_path: Path) -> None:
    """Also where the files have changed since: engines have what was there."""
    place = write(tmp_path / "a", lively(), 1)
    args = ServeArgs(model="m", adapters={"a": str(place)})
    first = KnownAdapters(args).get()
    assert first.known["a"].identity == adapter_files.read(place).identity
    write(place, lively(), 2)
    assert KnownAdapters(args).get() == first
    with pytest.raises(CheckpointError):
        KnownAdapters(ServeArgs(model="m", adapters={"a": str(tmp_path)})).get()


def test_no_change_is_lost_however_many_gateways_change_at_once(head: Head) -> None:
    gateways = [KnownAdapters(ServeArgs(model="m")) for _ in range(4)]
    names = [f"n{number}" for number in range(4 * known_adapters.KEPT)]
    with ThreadPoolExecutor(len(gateways)) as pool:
        made = [*pool.map(lambda at: gateways[at % 4].change(adding(names[at])), range(len(names)))]
    newest = gateways[0].get()
    assert newest.known.keys() == {*names} and newest.number == len(names)
    assert sorted(state.number for state in made) == [*range(1, len(names) + 1)]
    by_number = sorted(made, key=lambda state: state.number)
    assert all(one.at < later.at for one, later in itertools.pairwise(by_number))
    assert len(head.held) == known_adapters.KEPT, "older ones go"


def test_a_head_that_is_away_is_a_line(head: Head) -> None:
    names = KnownAdapters(ServeArgs(model="m"))
    head.lost = True
    with pytest.raises(EngineDeadError, match="cannot be reached"):
        names.get()
