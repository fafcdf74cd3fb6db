"""Where it is kept which adapters a service has: in one process, or for all its gateways (`on_ray.known_adapters`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Known:
    """An adapter that has been loaded."""

    identity: str
    directory: str  # or s3://BUCKET/PREFIX
    created: int  # Unix seconds


@dataclass(frozen=True)
class State:
    """All adapters that a service has."""

    number: int = 0  # of changes before it
    at: int = 0  # microseconds since 1970; of two states of one service the later one's is larger
    known: Mapping[str, Known] = field(default_factory=dict)  # by name, in the order that clients are shown


Change = Callable[[Mapping[str, Known]], Mapping[str, Known]]


class Names(Protocol):
    """Of one service, as one of its gateways sees them."""

    async def get(self) -> State:
        """The newest."""

    async def change(self, change: Change) -> State:
        """The newest with what `change` makes of it. It is called again where another gateway was first, and refuses by raising
        what this raises."""

    def know(self, directories: Mapping[str, str]) -> None:
        """Requests from here are for these, identity -> directory, and no others."""

    async def elsewhere(self) -> Mapping[str, str] | None:
        """What requests of other gateways still hold, identity -> directory, once each of these has seen the newest state, so
        that none begins with anything else; None where one of them does not say."""


class Alone:
    """Of a service of one process."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def get(self) -> State:
        return self._state

    async def change(self, change: Change) -> State:
        self._state = State(self._state.number + 1, self._state.at + 1, change(self._state.known))
        return self._state

    def know(self, directories: Mapping[str, str]) -> None:
        pass

    async def elsewhere(self) -> Mapping[str, str] | None:
        return {}
