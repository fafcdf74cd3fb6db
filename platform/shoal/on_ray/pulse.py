"""Which replicas of a deployment still answer: asked a word each second, whatever else they do.

A process that is stopped, starved, or beyond a broken cable keeps its connections: nothing that it was sent fails, and nothing
comes. Who has not answered for `SILENT_SECONDS`, or for many times what it usually takes, gets nothing new, and its calls are
cut off, so that they go on elsewhere (`failover`). Where none answers, all are left alone: there is no elsewhere.

Silence is counted in questions and not by the clock: this process may have been stopped itself.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from shoal.errors import frames

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SILENT_SECONDS = 5.0  # at least
PATIENCE = 10.0  # times of what an answer usually takes, where that is more
LEARNS = 0.2  # weight of the newest answer in what is usual


class Pulse:
    """Of one deployment, in one process. Calls and replicas go by name."""

    def __init__(self) -> None:
        self._missed: dict[str, int] = {}  # seconds without an answer, of the replicas there are
        self._usual: dict[str, float] = {}  # seconds that an answer takes
        self._places: dict[str, str] = {}  # call -> the replica that it was sent to
        self._cuts: dict[str, Callable[[], object]] = {}  # call -> what cuts it off

    def present(self, names: Iterable[str]) -> None:
        """These are the replicas now."""
        self._missed = {name: self._missed.get(name, 0) for name in names}
        self._usual = {name: seconds for name, seconds in self._usual.items() if name in self._missed}

    def missed(self, name: str) -> None:
        """Another second has gone by in which `name` did not answer."""
        if name in self._missed:
            self._missed[name] += 1

    def answered(self, name: str, seconds: float) -> None:
        if name in self._missed:
            self._missed[name] = 0
            before = self._usual.get(name, seconds)
            self._usual[name] = before + LEARNS * (seconds - before)

    def silent(self) -> frozenset[str]:
        """Replicas that do not answer while others do."""
        found = frozenset(name for name, missed in self._missed.items() if missed * TICK_SECONDS >= self._limit(name))
        return found if len(found) < len(self._missed) else frozenset()

    def _limit(self, name: str) -> float:
        return max(SILENT_SECONDS, PATIENCE * self._usual.get(name, 0.0))

    def opened(self, call: str, cut: Callable[[], object]) -> None:
        self._cuts[call] = cut

    def sent(self, call: str, name: str) -> None:
        if call in self._cuts:  # else it was closed meanwhile
            self._places[call] = name

    def closed(self, call: str) -> None:
        self._cuts.pop(call, None)
        self._places.pop(call, None)

    def cut_off(self) -> int:
        """Ends the calls that are at silent replicas, and returns how many these were."""
        silent = self.silent()
        lost = [call for call, name in self._places.items() if name in silent]
        for call in lost:
            cut = self._cuts[call]
            self.closed(call)
            try:
                cut()
            except Exception as error:
                # of Ray, whose replica is in trouble: the others' calls are cut off all the same
                log.error("a call at a silent replica was not cut off\n%s", frames(error))
        return len(lost)


_PULSES: defaultdict[tuple[str, str], Pulse] = defaultdict(Pulse)


def pulse_of(application: str, deployment: str) -> Pulse:
    """The one that this process has of a deployment: its router asks, its clients are cut off."""
    return _PULSES[application, deployment]
