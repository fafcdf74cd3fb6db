"""Training on Ray Train: `shoal.train.fit` on many workers, with progress in the driver and restarts after a failure.

Ray starts and restarts the workers and makes their process group; everything else (data order, checkpoints, resume) is the
loop's own. Checkpoints are written by the loop into the run's folder and reported to Ray where they lie, so nothing is copied;
on several nodes the run's folder must therefore be on a file system that all of them share. A run in S3 needs none: each rank
puts its own files there (`train.bucket`), of which Ray knows nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch.distributed
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from shoal.config import dump, load
from shoal.data.alone import alone
from shoal.data.sources import s3
from shoal.data.sources.s3 import S3, is_remote
from shoal.errors import DataError, ResourceError, ShoalError, UsageError, first_line, last_line
from shoal.machine import need_disk
from shoal.on_ray.resources import NODE_GROUP, local_ray, worker_env
from shoal.on_ray.train_failures import Trainer
from shoal.on_ray.train_metrics import Exported
from shoal.on_ray.train_records import following_actor, following_file, records, sent_to
from shoal.train.bucket import ask_to_stop, bucket_of, commanding, has_lease
from shoal.train.log import Record, Report, ignore
from shoal.train.loop import FitResult, fit
from shoal.train.needs import copied_whole, disk_needed, memory_needed, saved_at_once
from shoal.train.plan import FitPlan, located
from shoal.train.refusal import TooSmallError, check, need_groups
from shoal.train.run import COMMAND, LESS_MEMORY, stop_file
from shoal.train.trackers import together

# times in a row that Ray may try again to start the workers: its default retries an infeasible plan for ever
STARTS = 3
COLLECTIVE_TIMEOUT = 300  # seconds that one exchange between workers may take
CHECKPOINTS = "checkpoints"  # folder of the run that CheckpointStore writes to
OF_RAY = ".ray"  # what Ray notes of a run in S3, below its prefix
STOPS = list[Callable[[], None]]()  # what else is told when a run of this process is asked to stop
ROOM_SECONDS = 30.0  # between Ray's looks whether there is room for more workers; it knows of a new node within 20
RAY_SETTINGS = {  # defaults of ours, which the environment may change
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray's own 2 are felt on short runs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more a run; what it knows of nodes that go, nothing here asks
}
# Seconds that workers may take to start. Ray's own 60 are too few for two busy cores; but where their number may change, Ray
# counts a node that has just died for 20 seconds more, and must find out soon that so many cannot be had.
START_SECONDS, ELASTIC_START_SECONDS = "180", "45"
NODE_START_SECONDS = "600"  # where a machine may have to be started first, in place of one that was lost, too
# glibc gives large blocks back to the system and faults them in again at every step: kept, `tiny` trains 6 to 13 % faster
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def train(
    plan: FitPlan,
    *,
    workers: int | tuple[int, int] = 1,
    cpus_per_worker: float = 1.0,
    gpus: bool | None = None,
    max_failures: int = 2,
    on_progress: Report = ignore,
) -> FitResult:
    """Run `plan` on `workers` Ray Train workers and wait for it. A local Ray is started when none is running.

    Of (least, most) workers Ray takes as many as the cluster has room for, and starts all of them anew from the newest
    checkpoint when that changes; the plan is then made for the most, and its updates are the same with fewer.
    `cpus_per_worker`: logical CPUs that each worker reserves; `gpus`: one GPU a worker (default: when the cluster has
    enough); `max_failures`: restarts of all workers from the newest checkpoint, -1 for no end of them; workers of a node that
    is given back with notice (a preempted spot machine) are not counted. `on_progress` gets rank 0's records as they come.
    SIGTERM ends the run with a checkpoint. Raises DataError, ConfigError or ResourceError within seconds when the plan cannot
    be followed (a cluster with an autoscaler is waited for), and what `fit` raises.
    """
    plan = _absolute(plan)
    if plan.resume == "never":
        plan = dataclasses.replace(plan, command=secrets.token_hex(8))
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if max_failures < -1:
        raise UsageError("--max-failures", got=max_failures, allowed="0 or more, or -1 for no end of them")
    check(located(plan.at_world(most, most), weights=False), most)  # fewer share the same micro-batches
    for world in range(least, most):
        need_groups(plan, world)
    with _alone(plan) as plan, local_ray():
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        use_gpu = resources.get("GPU", 0) >= least if gpus is None else gpus
        _need_room(plan.at_world(most, least), least, cpus_per_worker, use_gpu, resources, on_progress)
        start = ELASTIC_START_SECONDS if least < most else NODE_START_SECONDS if _grows() else START_SECONDS
        actor = records() if is_remote(plan.run) else None
        trainer = _trainer(plan, (least, most), cpus_per_worker, use_gpu, max_failures, actor)
        ours = {**RAY_SETTINGS, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": start}
        exported = Exported(plan.run)
        reports = together(on_progress, exported)
        following = following_file(plan.run, reports) if actor is None else following_actor(actor, reports)
        with exported, following, _sigint_restored(), _sigterm_stops(plan), _defaults(ours):
            try:
                result: Any = trainer.fit()
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:  # the latter: its controller died
                raise _cause(error) from error
            except SystemExit:  # Ray Train's own handler aborts the run on Ctrl-C and exits with 0, as if it were done
                raise KeyboardInterrupt from None
    if isinstance(result.return_value, ShoalError):
        raise result.return_value
    return load(FitResult, result.return_value, "result")


def parse_workers(text: str) -> tuple[int, int]:
    """``N`` or ``MIN:MAX`` as (least, most). Raises UsageError."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UsageError("--workers", got=text, allowed="N or MIN:MAX, such as 2 or 1:4")
    return int(least), int(most)


def preflight(plan: FitPlan, workers: int, cpus: float, use_gpu: bool, resources: dict[str, float]) -> None:
    """Raise ResourceError, with the arithmetic, when the cluster can never run `plan`. `resources`: what it has, as Ray
    counts it (memory in bytes)."""
    for name, each in _resources(cpus, use_gpu).items():
        have = resources.get(name, 0.0)
        room = int(have / each)
        if workers * each > have:
            raise ResourceError(
                f"{workers} worker(s) x {each:g} {name} = {workers * each:g} {name}s",
                got=f"{have:g} in the cluster",
                do=f"use at most {room} worker(s), or add nodes" if room else "add nodes that have some",
            )
    trains = saved_at_once(plan, workers) + (0 if use_gpu else memory_needed(plan, workers))
    host = max(trains, copied_whole(plan))
    need, have = workers * host, resources.get("memory", float("inf"))
    if need > have:
        raise ResourceError(
            f"{workers} worker(s) x {host / 2**30:.1f} GiB = {need / 2**30:.1f} GiB of memory",
            got=f"{have / 2**30:.1f} GiB in the cluster",
            do="use a smaller preset, shorter micro-batches (more --accumulate), or more memory",
        )


def _need_room(
    plan: FitPlan, workers: int, cpus: float, use_gpu: bool, resources: dict[str, float], on_progress: Report
) -> None:
    """Raises what `preflight` does where the cluster has no room for `plan` now; where an autoscaler may yet make some,
    `on_progress` is told instead. How far its groups may grow, Ray does not say."""
    try:
        preflight(plan, workers, cpus, use_gpu, resources)
    except ResourceError as error:
        if not _grows():
            raise
        text = f"{error}; waiting for the cluster's autoscaler"
        on_progress({"kind": "warning", "time": time.time(), "step": 0, "text": text})


def _grows() -> bool:
    """Has the cluster an autoscaler? It gives each node a group, the head too."""
    return any(node["Labels"].get(NODE_GROUP) for node in ray.nodes())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _alone(plan: FitPlan) -> Iterator[FitPlan]:
    """This command alone trains in the plan's run; yields the plan as its workers get it. Raises ResourceError or DataError
    where another does."""
    if is_remote(plan.run):
        with commanding(plan) as leased:
            try:
                yield leased
            finally:
                with contextlib.suppress(DataError):
                    bucket = bucket_of(plan.run)
                    if has_lease(leased):  # else they are another command's
                        bucket.remove([name for name, _ in bucket.sizes(f"{OF_RAY}/")])
        return
    need_disk(plan.run, disk_needed(plan))
    busy = ResourceError(f"another command is training in {plan.run}", do="wait for it, stop it, or give another --out")
    with alone(Path(plan.run) / COMMAND, busy):
        stop_file(plan.run).unlink(missing_ok=True)
        yield plan


def _storage(plan: FitPlan) -> dict[str, Any]:
    """Where Ray keeps what it notes of a run."""
    if is_remote(plan.run):  # below a name of its own, since the loop tells it of no checkpoints there
        bucket, key = s3.split(plan.run)
        return {"storage_path": f"{bucket}/{key.strip('/')}/{OF_RAY}", "storage_filesystem": S3().filesystem()}
    # Ray's own memory of the run's checkpoints must not outlive it: CheckpointStore, which removes old ones, decides what
    # to resume from, and Ray refuses to start when a checkpoint it remembers is gone.
    (Path(plan.run) / CHECKPOINTS / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    return {"storage_path": plan.run}


def _trainer(
    plan: FitPlan, workers: tuple[int, int], cpus: float, use_gpu: bool, max_failures: int, actor: Any
) -> Trainer:
    return Trainer(
        _worker,  # type: ignore[arg-type]  # Ray's older annotation: the result of rank 0 is kept
        train_loop_config={"plan": dump(plan), "most": workers[1], "records": actor},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=workers if workers[0] < workers[1] else workers[0],  # type: ignore[arg-type]  # Ray's older annotation
            use_gpu=use_gpu,
            resources_per_worker=_resources(cpus, use_gpu),
            elastic_resize_monitor_interval_s=ROOM_SECONDS,  # type: ignore[call-arg]  # Ray's older annotation
        ),
        run_config=RunConfig(
            **_storage(plan),
            name=CHECKPOINTS,  # where CheckpointStore writes: Ray refuses to be told of checkpoints elsewhere
            failure_config=FailureConfig(  # type: ignore[call-arg]  # Ray's older annotation
                max_failures=max_failures, max_preemption_failures=-1, controller_failure_limit=STARTS
            ),
            worker_runtime_env={"env_vars": worker_env() | KEEP_MEMORY},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _worker(config: dict[str, Any]) -> dict[str, Any] | ShoalError:
    """Runs in each worker; rank 0's return value becomes the run's. An error of ours is returned, not raised, since it would be
    the same after a restart; but for what a machine lacks, which may have been this worker's alone."""

    context, actor = ray.train.get_context(), config["records"]
    first, world = context.get_world_rank() == 0, context.get_world_size()
    send = sent_to(actor) if first and actor is not None else ignore

    def report(record: Record) -> None:
        send(record)
        if record["kind"] == "checkpoint" and actor is None:
            metrics = {key: record[key] for key in ("step", "progress", "tokens")}
            checkpoint = Checkpoint.from_directory(record["path"])
            ray.train.report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    try:
        plan = load(FitPlan, config["plan"], "plan")
        plan = plan.at_world(config["most"], world)
        return dataclasses.asdict(fit(plan, report))
    except ShoalError as error:
        # GPUs that are too few may be more after a restart, where there may be more workers.
        if isinstance(error, ResourceError) and not (isinstance(error, TooSmallError) and world == config["most"]):
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # should the error be this worker's alone, the others must not wait
        return error


def _resources(cpus: float, use_gpu: bool) -> dict[str, float]:
    return {"CPU": cpus, "GPU": 1.0} if use_gpu else {"CPU": cpus}


def _absolute(plan: FitPlan) -> FitPlan:
    """Workers have a folder of their own, so the plan's paths must not depend on this one."""
    names = ("data", "replay", "heldout", "run", "out", "init", "rates_of", "mirror")
    given = {key: getattr(plan, key) for key in names}
    paths: dict[str, Any] = {
        key: str(Path(path).absolute()) for key, path in given.items() if path and not is_remote(path)
    }
    return dataclasses.replace(plan, **paths)


@contextlib.contextmanager
def _defaults(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that are set in this block, unless somebody has set them."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _sigint_restored() -> Iterator[None]:
    """Ray Train takes over Ctrl-C and never gives it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _sigterm_stops(plan: FitPlan) -> Iterator[None]:
    """The first SIGTERM (`ray job stop`, a cluster that takes a machine back) asks the run for a checkpoint and its end, a
    second one ends this process as it always does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        for tell in STOPS:
            tell()
        if is_remote(plan.run):  # by a thread, which may wait for the network
            threading.Thread(target=ask_to_stop, args=(plan,)).start()
        else:
            stop_file(plan.run).touch()

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cause(error: BaseException) -> ShoalError:
    """The one line behind a failed run: a worker's own error where there is one, else what ended a process. What the other
    workers say, that they lost one, comes last."""
    failures = getattr(error, "worker_failures", None) or {None: getattr(error, "controller_failure", error)}
    found = [(rank, inner) for rank, failure in failures.items() for inner in _within(failure)]
    for _, inner in found:
        if isinstance(inner, ShoalError):
            return inner
    for rank, inner in found:
        who = "a process of the run" if rank is None else f"worker {rank}"
        if isinstance(inner, ray.exceptions.OutOfMemoryError):
            return ResourceError(f"{who} was killed for memory", got=first_line(inner), do=LESS_MEMORY)
        if isinstance(inner, ray.exceptions.RayActorError):
            reason = last_line(inner).partition(" Some common causes")[0]
            return ShoalError(
                f"{who} died",
                got=reason[:300],
                do=f"what was saved can be resumed; if the system was out of memory (see dmesg there), {LESS_MEMORY}",
            )
    first = next(iter(failures.values()))
    return ShoalError(
        "training failed",
        got=last_line(first),
        do="what was saved can be resumed; see Ray's logs for the traceback",
    )


def _within(failure: BaseException | None) -> Iterator[BaseException]:
    """`failure` and what Ray wrapped in it."""
    while failure is not None:
        yield failure
        wrapped = (getattr(failure, name, None) for name in ("_base_exc", "cause", "health_check_failure"))
        failure = next((inner for inner in wrapped if isinstance(inner, BaseException)), failure.__cause__)
