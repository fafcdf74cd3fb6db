"""``python -m shoal.loop``: a scribe, begun by an `outbox`. Leaves the process that began it before it imports anything.

Notable: it is in a session of its own, and ignores the signals that a supervisor sends to all processes of a service: these end
the service, and the scribe with it when it has read the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    """Raises SystemExit in the process that is to end at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    given = json.loads(sys.argv[1])
    at = given.pop("pid_at")
    if pid := os.fork():
        os.pwrite(given["shared"], pid.to_bytes(8, sys.byteorder), at)  # before anybody can think that there is none
        os._exit(0)
    from shoal.loop.scribe import run

    run(**given)


main()
