"""Rows handed over to a scribe: real processes and a real pipe, and kills of either end at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.loop import outbox
from shoal.loop.capture import JOURNAL, Capture
from shoal.loop.facts import Facts, Frames, packed, row, unpacked
from shoal.loop.outbox import Outbox, Shared
from shoal.loop.rows import SHADOW
from shoal.loop.scribe import Scribe
from shoal.loop.writer import Writer

NOON = 1_795_780_800_000  # 2026-11-27 12:00, UTC


def facts(number: int, **known: Any) -> Facts:
    return {"id": f"chatcmpl-{number}", "at": NOON + number, **known}, [], None, []


def ids(capture: Capture) -> list[str]:
    return capture.rows()["id"].to_pylist()


def until(true: Callable[[], bool], look: Callable[[], object] = lambda: None) -> None:
    for _ in range(6000):
        if true():
            return
        look()
        time.sleep(0.01)
    raise AssertionError("it does not come")


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(process: int) -> None:
    until(lambda: not lives(process))


# ---- frames ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2**31)), max_size=9), st.lists(st.integers(1, 40), min_size=1, max_size=50))
def test_frames_are_cut_out_of_what_comes_wherever_reads_end(prompts: list[list[int]], reads: list[int]) -> None:
    sent = [({"id": str(n), "at": n}, (tuple(ids),), ("v", 7), ()) for n, ids in enumerate(prompts)]
    data, frames, found, place = b"".join(map(packed, sent)), Frames(), [], 0
    while data:
        size = reads[place % len(reads)]
        found += map(unpacked, frames.take(data[:size]))
        data, place = data[size:], place + 1
    assert found == sent


@pytest.mark.parametrize("odd", [np.float32(0.5), np.int64(1), object(), 2**64])
def test_what_is_no_number_of_python_s_is_no_row_and_never_another_number(odd: Any) -> None:
    told = (1.5, None, None, None, None, (0.5, 0.25), 0)
    for choice in [(2, 1, 0.5, (odd, *told[1:])), (2, 1, 0.5, (*told[:5], (odd,), 0)), (2, odd, 0.5, None)]:
        with pytest.raises((TypeError, OverflowError)):
            row(unpacked(packed(({"id": "a", "at": NOON}, [], None, [choice]))), lambda *of: None)  # type: ignore[list-item]
    with pytest.raises((TypeError, OverflowError)):
        row(unpacked(packed(({"id": "a", "at": odd}, [], None, []))), lambda *of: None).line()


# ---- the scribe ------------------------------------------------------------------------------------------------------


def test_rows_are_written_by_another_process_and_become_a_part_at_the_end(capture: Capture, box: Outbox) -> None:
    for number in range(50):
        box.put(facts(number))
    until(lambda: len(ids(capture)) == 50)
    until(lambda: box.lag == 0)  # it hears so a moment after the rows are there
    assert box.rows == 50 and not box.dropped and box.scribes == 1
    assert not [child for child in children() if "shoal.loop" in child], "a worker of Ray would kill it"
    scribe = box.scribe
    box.put(facts(50))
    box.close()
    assert [*capture.journals()] == [] and len(ids(capture)) == 51
    gone(scribe)


def children() -> list[str]:
    told = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "stat=,args="], capture_output=True, text=True, check=False
    )
    return [line for line in told.stdout.splitlines() if not line.startswith("Z")]


GATEWAY = """
    import os, sys
    from shoal.loop.outbox import Outbox
    box = Outbox(sys.argv[1])
    {before}
    for number in range(10**9):
        box.put(({{"id": f"chatcmpl-{{number}}", "at": 1_795_780_800_000 + number}}, [], None, []))
        if not box.dropped:
            sys.stdout.write(f"{{number}}\\n")
            sys.stdout.flush()
"""


def gateway(folder: Path, before: str = "") -> subprocess.Popen[str]:
    """A process that hands over rows as fast as it can, and tells each on stdout when it has. Alone in its group."""
    script = textwrap.dedent(GATEWAY.format(before=before))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


@pytest.mark.parametrize("heir", [pytest.param(False, marks=pytest.mark.drill), True])
def test_a_gateway_that_is_killed_loses_no_row_and_its_scribe_ends(
    capture: Capture, tmp_path: Path, heir: bool
) -> None:
    """Killed with most of its rows in the pipe: the scribe has hardly started. An heir of the pipe keeps it from ending."""
    before = "box.put(({'id': 'first', 'at': 1}, [], None, [])); os.fork() or os.execv('/bin/sleep', ['sleep', '300'])"
    if heir:  # a child that was forked, and did not leave its parent's files behind
        before = (
            f"os.fork = (lambda fork: lambda: fork())(os.fork); box.put(({{'id': 'first', 'at': 1}}, [], None, []))\n"
            f"    child = os.fork()\n    if not child: import time; time.sleep(300)\n"
            f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child))"
        )
    else:
        before = ""
    process = gateway(capture.folder, before)
    try:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(500)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not heir:
            told += process.stdout.readlines()
        last = int([line for line in told if line.endswith("\n")][-1])
        until(lambda: not [*(capture.folder / JOURNAL).iterdir()] and bool(capture.parts()))
        found = {each for each in ids(capture) if each != "first"}
        assert (
            found >= {f"chatcmpl-{number}" for number in range(last + 1)}
            and len(found) == capture.rows().num_rows - heir
        )
    finally:
        process.kill()
        process.wait()
        if heir:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_scribe_that_is_killed_is_followed_by_another_and_no_row_is_lost_or_doubled(
    capture: Capture, box: Outbox
) -> None:
    """Whatever it was doing: twice while rows come."""
    count = 0
    for _ in range(2):
        for _ in range(200):
            box.put(facts(count))
            count += 1
        until(lambda: box.scribe > 0)
        until(lambda: box.lag == 0, box.look)
        for _ in range(100):
            box.put(facts(count))
            count += 1
        os.kill(box.scribe, signal.SIGKILL)
        gone(box.scribe)
        box.look()
    until(lambda: box.lag == 0 and box.scribes > 1, box.look)
    assert sorted(ids(capture)) == sorted(f"chatcmpl-{number}" for number in range(count))
    assert box.rows == count and not box.dropped


def test_what_a_killed_scribe_had_written_and_not_told_is_not_written_again(capture: Capture, box: Outbox) -> None:
    box.put(facts(1))
    box.put(facts(1, role=SHADOW))
    until(lambda: box.lag == 0)
    os.kill(box.scribe, signal.SIGKILL)
    gone(box.scribe)
    box._shared["taken"], box._taken = 0, 0  # as if it had been killed a moment before it told
    for frame in (facts(1), facts(1, role=SHADOW), facts(2)):
        box._kept.append((time.monotonic(), packed(frame)))
    box.look()
    until(lambda: box.lag == 0, box.look)
    assert capture.rows(copies=True)["id"].to_pylist() == ["chatcmpl-1", "chatcmpl-1", "chatcmpl-2"]


def test_a_full_pipe_is_rows_that_are_counted_and_nobody_waits(capture: Capture, box: Outbox) -> None:
    """The scribe stands still; what it took before, and what the pipe holds, comes when it goes on."""
    box.put(facts(0))
    until(lambda: box.lag == 0)
    os.kill(box.scribe, signal.SIGSTOP)
    try:
        for number in range(1, 40_000):
            box.put(facts(number, model="m" * 100))
        dropped = box.dropped["queue"]
        assert 10_000 < dropped < 39_000 and box.lag > 0
    finally:
        os.kill(box.scribe, signal.SIGCONT)
    until(lambda: box.lag == 0, box.look)
    box.put(facts(40_000))
    until(lambda: box.lag == 0, box.look)
    found = ids(capture)
    assert len(found) == box.rows == 40_001 - dropped and found[-1] == "chatcmpl-40000" and box.scribes == 1


def test_long_prompts_go_through_whole_or_not_at_all(capture: Capture, box: Outbox) -> None:
    def long(number: int, size: int) -> Facts:
        return {"id": f"chatcmpl-{number}", "at": NOON + number}, [[7] * size], ("v", 9), []

    box.put(long(0, 100_000))
    until(lambda: box.lag == 0)
    os.kill(box.scribe, signal.SIGSTOP)
    try:
        for number in range(1, 400):
            box.put(long(number, 500 + 37 * (number * 7919 % 331)))
    finally:
        os.kill(box.scribe, signal.SIGCONT)
    until(lambda: box.lag == 0, box.look)
    assert len(ids(capture)) == box.rows == 400 - box.dropped["queue"] and box.dropped["queue"] > 50
    assert box.scribes == 1, "half a frame would have ended it"


@pytest.mark.drill
def test_signals_to_the_service_s_group_end_no_scribe_before_it_has_read_all(capture: Capture) -> None:
    before = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]"
    process = gateway(capture.folder, before)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(100)]
    until(lambda: bool(ids(capture)))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        for scribe in scribes(capture.folder):
            os.kill(scribe, number)
    process.kill()
    told += process.stdout.readlines()
    process.wait()
    until(lambda: not scribes(capture.folder))
    last = int([line for line in told if line.endswith("\n")][-1])
    assert len(ids(capture)) > last


def scribes(folder: Path) -> list[int]:
    """The processes that write this capture."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"shoal.loop" in words and json.loads(words[words.index(b"shoal.loop") + 1])["folder"] == str(folder):
            found.append(int(path.parent.name))
    return [each for each in found if lives(each)]


@pytest.mark.drill
def test_a_service_that_starts_while_the_scribe_of_the_one_before_still_reads_adopts_nothing_of_it(
    capture: Capture,
) -> None:
    process = gateway(capture.folder)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(300)]
    until(lambda: bool([*capture.journals()]))
    (old,) = scribes(capture.folder)
    os.kill(old, signal.SIGSTOP)
    process.kill()
    told += process.stdout.readlines()
    process.wait()
    other = Outbox(str(capture.folder))
    other.put(({"id": "other", "at": NOON}, [], None, []))
    until(lambda: other.lag == 0)
    os.kill(old, signal.SIGCONT)
    gone(old)
    other.close()
    last = int([line for line in told if line.endswith("\n")][-1])
    found = ids(capture)
    assert set(found) >= {"other", *(f"chatcmpl-{number}" for number in range(last + 1))}
    assert len(found) == len(set(found))


@pytest.mark.drill
def test_a_scribe_that_cannot_begin_is_tried_again_later_and_later(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    about = capture.folder / "capture.json"
    kept = about.read_bytes()
    about.write_text("{}")
    monkeypatch.setattr(outbox, "KEPT", 30)
    for number in range(40):
        box.put(facts(number))
    until(lambda: box.scribes == 2, box.look)
    for number in range(40, 60):
        box.put(facts(number))
    about.write_bytes(kept)
    until(lambda: box.lag == 0, box.look)
    box.put(facts(60))
    until(lambda: box.lag == 0, box.look)
    found = ids(capture)
    assert len(found) == 61 - box.dropped["queue"] and found[-1] == "chatcmpl-60"
    assert "has ended; another is begun" in caplog.text


def test_a_row_after_the_end_is_counted_and_a_box_that_was_never_used_begins_nothing(capture: Capture) -> None:
    unused = Outbox(str(capture.folder))
    unused.close()
    unused.put(facts(1))
    assert unused.scribes == 0 and unused.dropped == {"end": 1} and ids(capture) == []


# ---- what was lost or doubled once -----------------------------------------------------------------------------------


def killed(box: Outbox) -> None:
    """Its scribe is."""
    scribe = box.scribe
    os.kill(scribe, signal.SIGKILL)
    gone(scribe)


def test_a_client_that_was_refused_and_asks_again_with_its_own_id_is_two_rows_over_the_end_of_a_scribe(
    capture: Capture, box: Outbox
) -> None:
    box.put(facts(1, status=429))
    until(lambda: box.lag == 0)
    os.kill(box.scribe, signal.SIGSTOP)
    box.put(facts(1, status=429))
    box.put(facts(2))
    killed(box)
    until(lambda: box.lag == 0, box.look)
    assert ids(capture) == ["chatcmpl-1", "chatcmpl-1", "chatcmpl-2"] and box.rows == 3


@pytest.mark.drill
def test_rows_do_not_wait_for_ever_behind_one_that_a_smaller_pipe_never_takes(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pipe is small, as all are of a user who has many."""
    box.put(facts(0))
    until(lambda: box.lag == 0)
    os.kill(box.scribe, signal.SIGSTOP)
    many = [(2, 1, 0.5, None)] * 20_000
    for number, choices in enumerate((many[:2], many), 1):
        told = {"id": f"chatcmpl-{number}", "at": NOON + number}
        box.put((told, [[2**20 + number] * 30_000], ("v", 9), choices))
    box.put(facts(3))
    monkeypatch.setattr(outbox, "PIPE_BYTES", 2**16)
    killed(box)
    until(lambda: box.lag == 0, box.look)
    box.put(({"id": "chatcmpl-4", "at": NOON + 4}, [[2**20] * 30_000], ("v", 9), []))
    until(lambda: box.lag == 0, box.look)
    found = capture.rows(columns=["id", "layers"]).to_pydict()
    assert found["id"] == [f"chatcmpl-{number}" for number in range(5)] and not box.dropped
    assert found["layers"] == [None, 2, None, None, None], "of so many choices nothing is known"


@pytest.mark.drill
def test_a_scribe_whose_end_of_the_pipe_somebody_inherited_is_missed_none_the_less(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that was forked while the scribe was begun has it."""
    began, heirs = box._started, list[int]()
    monkeypatch.setattr(box, "_started", lambda read: (heirs.append(os.dup(read)), began(read))[1])
    box.put(facts(1))
    until(lambda: box.lag == 0, box.look)
    killed(box)
    box.put(facts(2))
    until(lambda: box.lag == 0, box.look)
    for heir in heirs:
        os.close(heir)
    assert ids(capture) == ["chatcmpl-1", "chatcmpl-2"] and box.scribes == 2


def test_rows_that_no_scribe_takes_before_the_end_are_counted(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that were in the pipe of one that ended."""
    (capture.folder / "capture.json").write_text("{}")
    monkeypatch.setattr(outbox, "CLOSE_SECONDS", 0.2)
    box.put(facts(1))
    until(lambda: box._pipe < 0, box.look)
    box.close()
    assert box.dropped == {"end": 1}


def test_a_folder_that_was_removed_is_not_made_anew_with_another_salt(capture: Capture, box: Outbox) -> None:
    box.put(facts(1))
    until(lambda: box.lag == 0)
    shutil.rmtree(capture.folder)
    killed(box)
    box.put(facts(2))
    until(lambda: box._pipe < 0 and box.scribes > 1, box.look)
    assert not capture.folder.exists()
    box._kept.clear()


@pytest.mark.drill
def test_what_kills_the_gateway_s_group_leaves_the_scribe_to_read_the_rest(capture: Capture) -> None:
    process = gateway(capture.folder)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(100)]
    until(lambda: bool(scribes(capture.folder)))
    os.killpg(process.pid, signal.SIGKILL)
    told += process.stdout.readlines()
    process.wait()
    last = int([line for line in told if line.endswith("\n")][-1])
    until(lambda: {f"chatcmpl-{number}" for number in range(last + 1)} <= set(ids(capture)))
    until(lambda: not scribes(capture.folder))  # only now: while one process becomes another, neither may be seen


REAPS = """
    import ctypes, os, signal, sys, time
    from pathlib import Path
    from shoal.loop.outbox import Outbox
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # who has no parent is its, as the first process's of a container
    box = Outbox(sys.argv[1])
    box.put(({"id": "chatcmpl-1", "at": 1_795_780_800_000}, [], None, []))
    while not box.scribe:
        time.sleep(0.01)
    scribe = box.scribe
    os.kill(scribe, signal.SIGKILL)
    for _ in range(6000):
        box.look()
        if not Path(f"/proc/{scribe}").exists():
            print("reaped")
            break
        time.sleep(0.01)
    box.close()
"""


@pytest.mark.drill
def test_the_first_process_of_a_container_reaps_its_scribes(capture: Capture) -> None:
    """It is the parent of all that have none: each scribe that ended would stay as a zombie."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAPS), str(capture.folder)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "reaped\n" and ids(capture) == ["chatcmpl-1"]


def test_a_frame_that_cannot_be_read_is_one_row_less_and_not_the_end_of_the_scribe(capture: Capture) -> None:
    memory = os.memfd_create("counts")
    os.ftruncate(memory, Shared.SIZE)
    shared, written = Shared(memory), Writer(capture, start=False)
    Scribe(capture, written, shared, set()).take(packed(facts(1)) + b"\1\0\0\0\xc1" + packed(facts(2)))
    written.close()
    os.close(memory)
    assert ids(capture) == ["chatcmpl-1", "chatcmpl-2"] and shared["fault"] == 1 and shared.taken == 3
