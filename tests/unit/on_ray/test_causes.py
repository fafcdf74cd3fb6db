"""What a failed run says, from what Ray raises: one line about the process that failed, not about those that lost it."""

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from shoal.errors import DataError, ResourceError, ShoalError
from shoal.on_ray.train import _cause

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:439: Connection reset by peer.")
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
# as Ray 2.60 said it when two workers took more than its memory monitor allows; forty lines followed
KILLED = """4 worker(s) were killed due to the node running low on memory. Memory on the node was 4.57GB used / 23.54GB limit
OOM kill reason: Memory usage 4890025984B exceeded threshold of 4827811840B (19.1% of 25276502016B limit)
"""
KILLED_WORKER = WorkerHealthCheckFailedError("A worker health check failed.", OutOfMemoryError(KILLED))


@pytest.mark.parametrize(
    ("failures", "kind", "said"),
    [
        ({0: LOST, 1: DIED}, ShoalError, ["worker 1 died"]),
        ({0: LOST, 1: DIED, 2: DataError("row 3")}, DataError, ["row 3"]),
        ({0: LOST, 1: KILLED_WORKER}, ResourceError, ["worker 1", "4.57GB used / 23.54GB limit", "--accumulate"]),
        ({0: LOST}, ShoalError, ["training failed", "Connection reset by peer"]),
    ],
)
def test_who_failed_is_named_before_who_lost_it(
    failures: dict[int, Exception], kind: type[ShoalError], said: list[str]
) -> None:
    cause = _cause(WorkerGroupError("[Rank 0 Error Snippet]", failures))
    assert type(cause) is kind and "\n" not in str(cause)
    assert str(cause).startswith(said[0]) and all(part in str(cause) for part in said)


def test_a_run_whose_controller_was_killed_for_memory_says_so() -> None:
    cause = _cause(OutOfMemoryError(KILLED))
    assert isinstance(cause, ResourceError) and "\n" not in str(cause)
    assert str(cause).startswith("a process of the run was killed for memory: got '4 worker(s) were killed")
