"""What a failed run says, from what Ray raises: one line about the process that failed, not about those that lost it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle
import ray.train
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from shoal.config import dump
from shoal.errors import DataError, ResourceError, ShoalError
from shoal.on_ray.train import STARTS, _cause, _trainer, _worker
from shoal.train.plan import pretrain_plan
from shoal.train.refusal import TooSmallError

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


@pytest.mark.parametrize(
    ("error", "most", "again"),
    [
        (DataError("row 3"), 2, False),
        (ResourceError("worker 1 is out of memory"), 2, True),
        (TooSmallError("7b on 2 GPU(s)"), 2, False),
        (TooSmallError("7b on 2 GPU(s)"), 4, True),
    ],
)
def test_workers_start_again_for_what_may_be_otherwise_then(
    error: ShoalError, most: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--max-failures -1` they do so without end: a plan that GPUs cannot hold is told at once, but where there may be
    more of them."""

    def fit(*_: object) -> None:
        raise error

    here = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: here)
    monkeypatch.setattr("shoal.on_ray.train.fit", fit)
    plan = pretrain_plan("test", "data", str(tmp_path), steps=1)
    config = {"plan": dump(plan), "most": most, "records": None}
    if again:
        with pytest.raises(type(error)):
            _worker(config)
    else:
        assert _worker(config) is error


def lost() -> WorkerGroupError:
    return WorkerGroupError("[Rank 0 Error Snippet]", {0: LOST, 1: DIED})


def not_started() -> ControllerError:
    return ControllerError(WorkerGroupStartupTimeoutError(2))


def test_starts_that_fail_end_a_run_in_a_row_and_not_over_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node that is lost may cost a start, or some, until there is another; a plan that never starts ends. Ray's own counts
    over the life of a run."""
    given: dict[str, object] = {}
    monkeypatch.setattr(
        "ray.train.torch.TorchTrainer._initialize_and_run_controller", lambda self, **kinds: given.update(kinds)
    )
    plan = pretrain_plan("test", "data", str(tmp_path), steps=1)
    made: Any = _trainer(plan, (1, 2), 1.0, False, -1, None)
    policy: Any = DefaultFailurePolicy(made.run_config.failure_config)
    decided = [policy.make_decision(error) for _ in range(5) for error in (lost(), not_started())]
    assert decided.count(FailureDecision.RAISE) == 2, "Ray counts otherwise now: see what is still needed"
    made._initialize_and_run_controller(failure_policy=policy, scaling_policy="other")
    assert given["scaling_policy"] == "other"
    policy = ray.cloudpickle.loads(ray.cloudpickle.dumps(given["failure_policy"]))
    for _ in range(5):
        assert policy.make_decision(lost()) == FailureDecision.RETRY
        assert {policy.make_decision(not_started()) for _ in range(STARTS)} == {FailureDecision.RETRY}
    assert policy.make_decision(not_started()) == FailureDecision.RAISE
