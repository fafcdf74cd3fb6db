"""The kernel calls that are left to a program: to compute, to wait, to write to pipes that it has. All others are refused.

It is a list of what is allowed, so a call that is new in a later kernel is refused too. No call in it opens a file or a socket,
starts a process or a thread, sends a signal, installs a handler of one, looks into another process or lifts a limit.
"""

from __future__ import annotations

import platform
import struct

# name -> its number on x86-64 and on 64-bit ARM (asm/unistd.h)
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "writev": (20, 66), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "futex": (202, 98), "rseq": (334, 293), "sched_yield": (24, 124), "getrandom": (318, 278),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH (linux/audit.h), column of `ALLOWED`

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: a word of seccomp_data, a jump, the end (linux/bpf_common.h)
_NUMBER_AT, _MACHINE_AT = 0, 4  # bytes into seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # the second: EPERM, "Operation not permitted"


def unsupported() -> str:
    """Why this system has no such filter, or ""."""
    got = f"{platform.system()} {platform.machine()}"
    return "" if got.startswith("Linux ") and platform.machine() in MACHINES else got


def filter_of(machine: str) -> bytes:
    """The program of a seccomp filter (`struct sock_filter`, 8 bytes each). A call by the numbers of another architecture, as
    32-bit ones, ends the process."""
    mark, column = MACHINES[machine]
    numbers = [both[column] for both in ALLOWED.values()]
    steps = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, mark), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    steps += [(_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
