"""One task for each of many jobs, on Ray Data: in the order of the jobs, whatever ran where. And one on every machine."""

from __future__ import annotations

import errno
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shoal.errors import DataError, ResourceError, ShoalError

Progress = Callable[[str, int, int], None]  # what, done, total
EVERYWHERE_SECONDS = 10.0  # that all machines may take for what is done on every one
TRIES = 4  # of a job whose process dies, as Ray itself has of one in a task; in an actor Ray Data has no end of them


def each(
    task: Callable[..., Any],
    jobs: Iterable[tuple[Any, ...]],
    sizes: list[int],
    what: str,
    on_progress: Progress,
    **asked: Any,
) -> Iterator[Any]:
    """What `task` gives for the arguments of each job, in order, from as many processes as there are CPUs for, or what of Ray's
    resources each is `asked` to have.

    A task that holds state goes to a pool of actors, so that each process builds it once. Raises ResourceError for a job whose
    process died `TRIES` times, and what the task raises.
    """
    actors = getattr(task, "holds_state", False)
    tries = Tries(what) if actors else None

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            if tries is not None:
                tries.begin(row["number"])
            return {"result": task(*row["job"])}
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            do = "free some there, or add machines"
            raise ResourceError(f"the disk of {platform.node()} is full", got=str(error)[:160], do=do) from error

    class Worker:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return run(row)

    rows = [{"job": job, "number": number} for number, job in enumerate(jobs)]
    done, total = 0, sum(sizes)
    on_progress(what, done, total)
    with as_raised(what):
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        # It grows as there is work and room: on a cluster that an autoscaler has yet to fill, a pool of one would stay one.
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, len(rows)))
        results = data.map(Worker, compute=pool, **asked) if actors else data.map(run, **asked)  # type: ignore[arg-type]
        for row, size in zip(results.iter_rows(), sizes, strict=True):
            done += size
            on_progress(what, done, total)
            yield row["result"]


class Tries:
    """How often each job was begun, by all workers together. Made by who asks for them, while a Ray runs, and called in them.
    Ray's own bound for an actor, max_restarts, counts what one lost in all its life; and Ray Data gives up taking it (2.60)."""

    def __init__(self, what: str) -> None:
        self._what = what
        begun: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Begun)
        self._begun = begun.remote()

    def begin(self, job: int) -> None:
        """Raises ResourceError where it was begun `TRIES` times already, and never ended."""
        if ray.get(self._begun.times.remote(job)) > TRIES:
            raise ResourceError(
                f"cannot {self._what}",
                got=f"job {job}, whose process died {TRIES} times",
                do="see whether the system was out of memory (dmesg there), and give machines with more",
            )


class _Begun:
    def __init__(self) -> None:
        self._times = Counter[int]()

    def times(self, job: int) -> int:
        """How often it is begun, with this time."""
        self._times[job] += 1
        return self._times[job]


@contextmanager
def as_raised(what: str) -> Iterator[None]:
    """An error of ours that a task of Ray Data meets, of a dataset that is made and read in this block, is raised as it was;
    another, as of a process that was killed too often, as a DataError that says `what` cannot be done. Ray Data's own error in
    its place would have lost by what, and its own report of it would be many lines."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.raise_original_map_exception, logger.level
    context.raise_original_map_exception = True
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShoalError):
            raise cause from error
        said = str(cause or error).strip() or type(cause or error).__name__
        raise DataError(f"cannot {what}", got=said.splitlines()[-1][:200]) from error
    finally:
        context.raise_original_map_exception, level = before
        logger.setLevel(level)


def everywhere(task: Callable[[], None]) -> None:
    """Run a small task on every machine that answers; what becomes of it is not looked at."""
    run: Any = ray.remote(num_cpus=0, max_retries=0)(lambda: task())
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [run.options(scheduling_strategy=where).remote() for where in on]
        ray.wait(asked, num_returns=len(asked), timeout=EVERYWHERE_SECONDS)
    except (RayError, RuntimeError, ConnectionError):
        pass  # a cluster that ends is no reason to hide what it ended by


@contextmanager
def quiet_data() -> Iterator[None]:
    """Ray Data in the order of its input, so that equal requests give equal corpora, and without its own reports."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.execution_options.preserve_order, context.enable_progress_bars, logger.level
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars, level = before
        logger.setLevel(level)
