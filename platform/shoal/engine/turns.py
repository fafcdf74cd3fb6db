"""What waits for one worker, by payer and of one payer by client: each payer has a turn, and in it the next of its clients."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Of one payer and client, the order in which things came. Not for several threads at once."""

    def __init__(self) -> None:
        self._payers: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()  # whose turn it is first
        self._counts: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, item: T, payer: str, client: str) -> None:
        self._payers.setdefault(payer, OrderedDict()).setdefault(client, deque()).append(item)
        self._counts[payer] = self._counts.get(payer, 0) + 1
        self._size += 1

    def take(self) -> T:
        """The next item, out of the queue. Raises IndexError when there is none."""
        if not self._payers:
            raise IndexError("nothing waits")
        payer = next(iter(self._payers))
        client = next(iter(self._payers[payer]))
        item = self._payers[payer][client].popleft()
        self._taken(payer, client)
        if payer in self._payers:
            self._payers.move_to_end(payer)
            if client in self._payers[payer]:
                self._payers[payer].move_to_end(client)
        return item

    def give_place(self, payer: str, client: str = "") -> T | None:
        """The last item of the payer that has most, out of the queue, so that `client` of `payer` may put one there. Where no
        other payer has more than `payer` would have then, that of its own client that has most; None where no other client has
        more than `client` would have then."""
        most = max(self._counts, key=lambda name: self._counts[name], default=payer)
        allowed = 0
        if self._counts.get(most, 0) <= self._counts.get(payer, 0) + 1:
            most, allowed = payer, len(self._of(payer).get(client, ())) + 1
        clients = self._of(most)
        largest = max(clients, key=lambda name: len(clients[name]), default=client)
        if len(clients.get(largest, ())) <= allowed:
            return None
        item = clients[largest].pop()
        self._taken(most, largest)
        return item

    def give_last(self) -> T | None:
        """The last item of who has most, out of the queue; None where nothing waits."""
        if not self._payers:
            return None
        payer = max(self._counts, key=lambda name: self._counts[name])
        clients = self._payers[payer]
        client = max(clients, key=lambda name: len(clients[name]))
        item = clients[client].pop()
        self._taken(payer, client)
        return item

    def _of(self, payer: str) -> OrderedDict[str, deque[T]]:
        return self._payers[payer] if payer in self._payers else OrderedDict()

    def _taken(self, payer: str, client: str) -> None:
        self._counts[payer] -= 1
        self._size -= 1
        if not self._payers[payer][client]:
            del self._payers[payer][client]
        if not self._payers[payer]:
            del self._payers[payer], self._counts[payer]
