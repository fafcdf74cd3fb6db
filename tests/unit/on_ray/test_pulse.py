"""Who does not answer is passed over, and what was sent to him is cut off, as long as there is anybody else."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from shoal.on_ray.pulse import PATIENCE, SILENT_SECONDS, TICK_SECONDS, Pulse

TICKS = int(SILENT_SECONDS / TICK_SECONDS)


def miss(pulse: Pulse, name: str, times: int = TICKS) -> None:
    for _ in range(times):
        pulse.missed(name)


def of(*names: str) -> Pulse:
    pulse = Pulse()
    pulse.present(names)
    return pulse


def test_a_replica_is_silent_after_seconds_without_an_answer_and_no_more_when_it_answers() -> None:
    pulse = of("a", "b")
    miss(pulse, "a", TICKS - 1)
    assert pulse.silent() == frozenset()
    pulse.missed("a")
    assert pulse.silent() == {"a"}
    pulse.answered("a", 0.1)
    assert pulse.silent() == frozenset()


def test_where_none_answers_none_is_lost() -> None:
    pulse = of("a", "b")
    miss(pulse, "a")
    miss(pulse, "b")
    assert pulse.silent() == frozenset()
    pulse.answered("b", 0.1)
    assert pulse.silent() == {"a"}


def test_a_slow_machine_is_given_more_time() -> None:
    pulse = of("a", "b")
    pulse.answered("a", 2.0)
    miss(pulse, "a")
    assert pulse.silent() == frozenset()
    miss(pulse, "a", int(PATIENCE * 2.0 / TICK_SECONDS) - TICKS)
    assert pulse.silent() == {"a"}


def test_calls_at_a_silent_replica_are_cut_off_once_and_no_others() -> None:
    pulse, cut = of("a", "b"), list[str]()
    for call, name in (("1", "a"), ("2", "b"), ("3", "a")):
        pulse.opened(call, lambda call=call: cut.append(call))  # type: ignore[misc]
        pulse.sent(call, name)
    pulse.opened("4", lambda: cut.append("4"))  # waits for a replica that has room
    pulse.closed("3")
    pulse.sent("3", "a")
    miss(pulse, "a")
    assert (pulse.cut_off(), cut) == (1, ["1"])
    assert (pulse.cut_off(), cut) == (0, ["1"])
