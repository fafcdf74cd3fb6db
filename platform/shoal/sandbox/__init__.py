"""Programs that a model wrote are run here, in a process that the kernel lets compute and write to its pipes, and nothing else.

    limits.py   how much a program may take
    kernel.py   the kernel calls that are left to it, as a filter (seccomp); where there is none, nothing is run
    inside.py   what that process does: shuts itself in, runs the program, calls its functions
    process.py  starts it, reads what it says, ends it

A program cannot forge a verdict: what a function should give never enters its process. Whoever judges compares what came out
(`Ran.values`) with that, outside.
"""

from shoal.sandbox.inside import written
from shoal.sandbox.limits import Call, Limits
from shoal.sandbox.process import Ran, refused, run

__all__ = ["Call", "Limits", "Ran", "refused", "run", "written"]
