"""What a program tries against its machine: each succeeds in a plain subprocess, and fails in the sandbox."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from shoal.sandbox import Call, Limits, Ran, run
from shoal.sandbox.kernel import ALLOWED, MACHINES
from shoal.sandbox.process import ENDED, OUTPUT, TIME
from tests.unit.sandbox import attacks

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox is Linux's; elsewhere nothing is run"
)
SHORT = Limits(seconds=1, wall=60)
# one that computes in Python, one in C, and one that waits; each takes the second that it is given
KEPT = ("a loop that catches everything", "a loop in C", "sleep without a pipe")
ENDLESS = [name if name in KEPT else pytest.param(name, marks=pytest.mark.drill) for name in attacks.ENDLESS]
HARNESS = """
expected = {2: 4, 5: 10}
def check(got, wanted):
    assert got == wanted
PROGRAM
for given in list(expected):
    check(f(given), expected[given])
print('pass')
"""


@dataclass(frozen=True)
class Scene:
    """A folder with a secret, a listening port and an inherited descriptor, for a program to get at."""

    home: Path
    port: int
    inherited: int

    def told(self, program: str) -> str:
        return program.replace("HOME", str(self.home)).replace("PORT", str(self.port))

    def plain(self, program: str, seconds: float = 120) -> str:
        """What a program prints that is simply started, with the environment and descriptors of whoever starts it."""
        words = [sys.executable, "-c", self.told(program)]
        environment = {**os.environ, "SECRET": attacks.SECRET}
        done = subprocess.run(
            words, cwd=self.home, env=environment, input=attacks.SECRET, capture_output=True, text=True, close_fds=False,
            check=False, timeout=seconds, pass_fds=(),
        )  # fmt: skip
        return done.stdout

    def boxed(self, program: str, limits: Limits = SHORT) -> Ran:
        return run(self.told(program), limits=limits)

    def listed(self) -> dict[str, int]:
        return {path.name: path.lstat().st_mode for path in self.home.iterdir()}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    (tmp_path / "secret").write_text(attacks.SECRET)
    (tmp_path / "hidden.py").write_text(f"text = {attacks.SECRET!r}")
    monkeypatch.setenv("SECRET", attacks.SECRET)
    inherited = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Scene(tmp_path, listening.getsockname()[1], inherited)
    os.close(inherited)


@pytest.mark.parametrize("name", attacks.EVERY)
def test_what_gets_there_in_a_plain_process_is_refused_here(scene: Scene, name: str) -> None:
    assert attacks.GOT in scene.plain(attacks.EVERY[name])
    ran = scene.boxed(attacks.EVERY[name])
    assert attacks.GOT not in ran.out and ran.how != ENDED


@pytest.mark.parametrize("name", attacks.SECRETS)
def test_a_secret_that_a_plain_process_reads_stays_one(scene: Scene, name: str) -> None:
    assert "secret" in scene.plain(attacks.SECRETS[name])
    ran = scene.boxed(attacks.SECRETS[name])
    assert "secret" not in ran.out


@pytest.mark.parametrize("name", attacks.WRITES)
def test_what_a_plain_process_changes_is_left_as_it_was(scene: Scene, name: str) -> None:
    before = scene.listed()
    boxed = scene.boxed(attacks.WRITES[name])
    assert scene.listed() == before and boxed.how != ENDED
    scene.plain(attacks.WRITES[name])
    until = time.monotonic() + 60  # one that outlives its parent may take a while
    while scene.listed() == before and time.monotonic() < until:
        time.sleep(0.05)
    assert scene.listed() != before


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(scene: Scene, name: str) -> None:
    limits = Limits(seconds=1, wall=1) if "sleep" in name or name == "a lock" else SHORT
    with ThreadPoolExecutor(1) as beside:
        plain = beside.submit(scene.plain, attacks.ENDLESS[name], seconds=1.0)
        assert scene.boxed(attacks.ENDLESS[name], limits).how == TIME
        with pytest.raises(subprocess.TimeoutExpired):
            plain.result()


@pytest.mark.parametrize(
    "name", ["printed", *(pytest.param(name, marks=pytest.mark.drill) for name in attacks.CHATTER if name != "printed")]
)
def test_what_says_too_much_is_ended_and_no_more_is_kept(scene: Scene, name: str) -> None:
    bounded = attacks.CHATTER[name].replace("while True:", "for _ in range(2000):")
    plain = subprocess.run([sys.executable, "-c", bounded], capture_output=True, check=False)
    assert len(plain.stdout) + len(plain.stderr) > 1_000_000
    ran = scene.boxed(attacks.CHATTER[name])
    assert ran.how == OUTPUT and len(ran.out) <= SHORT.output and len(ran.err) <= SHORT.output


def passed(program: str) -> bool:
    """As a recipe judges: what should come out is compared here, and was never there."""
    calls = [Call("f", [2]), Call("f", [5])]
    return run(program, calls, SHORT).values == ("4", "10")


@pytest.mark.parametrize("name", attacks.FORGED)
def test_no_verdict_is_forged(scene: Scene, name: str) -> None:
    program = attacks.FORGED[name]
    words = [sys.executable, "-c", HARNESS.replace("PROGRAM", program)]
    plain = subprocess.run(words, capture_output=True, text=True, check=False)
    assert plain.returncode == 0 and "pass" in plain.stdout
    assert not passed(program)


def test_a_right_program_passes_and_so_does_nothing_that_is_nearly_it() -> None:
    assert passed("def f(x):\n    return 2 * x")
    for wrong in ("2.0 * x", "x + 2", "str(2 * x)", "[2 * x]", "x == 2 or 10"):
        assert not passed(f"def f(x):\n    return {wrong}")


def test_answers_that_a_program_writes_itself_are_what_it_says_and_not_what_is_right() -> None:
    """It finds the descriptor, and the lines' form; what it has to guess is the answer."""
    program = (
        'import os\nfor n in range(3, 999):\n    try:\n        os.write(n, b\'{"value": "9"}\\n\' * 9)\n'
        "    except OSError:\n        pass\nos._exit(0)"
    )
    ran = run(program, [Call("f", [2]), Call("f", [5])], SHORT)
    assert ran.values == ("9", "9")
    for line in ("[" * 30_000, '{"value": 1}', "null", '{"value"', "NaN", "1" * 9000):
        ran = run(program.replace('{\\"value\\": \\"9\\"}', "X").replace('{"value": "9"}', line), [Call("f")], SHORT)
        assert ran.values == (None,)


def test_no_number_that_is_not_allowed_reaches_the_kernel() -> None:
    """All numbers of calls, those of the second table for 32-bit pointers too, of this kernel and of later ones."""
    column = MACHINES[platform.machine()][1]
    left = sorted(both[column] for both in ALLOWED.values())
    # those of uprobes pass every filter, and end a process that has none with SIGILL
    left += [335, 336] if platform.machine() == "x86_64" else []
    program = attacks.C + (
        f"left = {left}\nfound = []\nfor base in (0, 0x40000000):\n    for n in range(1024):\n"
        "        if base or n not in left:\n            ctypes.set_errno(0)\n"
        "            if libc.syscall(ctypes.c_long(base + n), -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != 1:\n"
        "                found.append(base + n)\nprint('found', found)"
    )
    assert run(program, limits=Limits(seconds=5, wall=60)).out == "found []\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of a 32-bit machine are x86's")
def test_a_call_by_the_numbers_of_another_machine_ends_the_program() -> None:
    """`int 0x80` from memory that can be run: getpid is 20 there."""
    program = attacks.C + (
        "import time\nlibc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(4096), 7, 34, -1, ctypes.c_long(0))\n"
        "ctypes.memmove(at, b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3', 8)\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(at)())\nprint('got there')"
    )
    assert (
        attacks.GOT
        in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )
    ran = run(program, limits=SHORT)
    assert ran.how == "killed" and ran.out == ""


def test_of_root_s_powers_none_is_left_and_no_core_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by two calls that are let through for it. Who is not root has no such powers."""
    monkeypatch.setitem(ALLOWED, "capget", (125, 90))
    monkeypatch.setitem(ALLOWED, "prctl", (157, 167))
    program = attacks.C + (
        "sets = (ctypes.c_uint32 * 6)(*[1] * 6)\n"
        "need(libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets))\n"
        "print([*sets], libc.prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    ran = run(program, limits=SHORT)
    assert (ran.out, ran.err) == ("[0, 0, 0, 0, 0, 0] 0\n", "")


def test_a_program_ends_with_who_wanted_it() -> None:
    """One that is killed has no time to end it."""
    waiting = "from shoal.sandbox import Limits, run\nrun('import time\\ntime.sleep(9999)', limits=Limits(wall=9999))"
    path = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen([sys.executable, "-c", waiting], env={**os.environ, "PYTHONPATH": path}) as parent:
        try:
            until = time.monotonic() + 120
            children: list[psutil.Process] = []
            while not children and time.monotonic() < until:
                children = [one for one in psutil.Process(parent.pid).children() if "-I" in one.cmdline()]
                time.sleep(0.05)
            assert len(children) == 1
        finally:
            parent.kill()
    assert psutil.wait_procs(children, timeout=120)[1] == []
