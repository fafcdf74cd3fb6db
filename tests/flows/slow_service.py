"""`shoal` with an engine that takes its time, and a server that closes soon: ``python -m tests.flows.slow_service A_STEP TO_END
serve ...``, in seconds."""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest import mock

from shoal import Engine, cli
from shoal.api import server

CLOSE = 1  # second that is left for what was said last; five without it


def main() -> int:
    step, seconds_a_step, seconds_to_end = Engine.step, float(sys.argv[1]), float(sys.argv[2])

    def slowly(engine: Engine) -> Any:
        if not engine.idle:
            time.sleep(seconds_a_step)
        return step(engine)

    ends = mock.patch.multiple(server, STREAM_SECONDS=seconds_to_end, CLOSE_SECONDS=CLOSE)
    with mock.patch.object(Engine, "step", slowly), ends:
        return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
