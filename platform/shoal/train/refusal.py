"""What refuses a plan that could not be followed, before any worker starts."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from shoal.data import models
from shoal.data.chats.rows import need_forms
from shoal.data.shards import open_index
from shoal.data.sources.s3 import is_remote
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError
from shoal.model.checkpoint import require_replaceable
from shoal.train.bucket import need_possible
from shoal.train.needs import memory_needed
from shoal.train.plan import FitPlan, fingerprint, recorded

COMPILER = os.environ.get("CXX", "g++")  # what torch.compile runs on a CPU
DOUBT = 0.8  # an estimate is refused by where a fifth less would not fit either


class TooSmallError(ResourceError):
    """GPUs cannot hold the plan, however often its workers are started."""


def check(plan: FitPlan, workers: int) -> None:
    """Refuse, before any worker starts, a plan that could not be followed: DataError when the data is missing, too short or
    made for another model, ConfigError when the batch does not divide, CheckpointError when something lies where the model is
    to go."""
    need_replaceable(plan)
    need_possible(plan)
    if plan.rates_of:
        recorded(plan)
    if plan.compile is True and not torch.cuda.is_available() and not shutil.which(COMPILER):
        raise ConfigError(
            "compile", got=f"no {COMPILER}, which torch.compile needs", do=f"install {COMPILER}, or leave it out"
        )
    need_groups(plan, workers)
    if Path(plan.data).is_dir():
        if plan.replay:
            raise ConfigError(
                "replay", got=plan.replay, allowed="a run on chats", do="leave it out: the data are shards"
            )
        _check_shards(plan, plan.data, workers)
    else:
        _check_chats(plan, workers)
        if plan.replay:
            _check_shards(plan, plan.replay, workers)


def need_replaceable(plan: FitPlan) -> None:
    """Raises CheckpointError where something else than a model lies where the plan's is to go, or the one that it starts from:
    replaced by what was made of it, it would be gone, and the same command could not go on; DataError for a bucket that does
    not answer."""
    if plan.init and _is_one(plan.init, plan.model_place):
        raise CheckpointError(
            f"{plan.model_place}", got="the model that the run starts from", do="give another --out: it would be gone"
        )
    if is_remote(plan.model_place):
        models.need_replaceable(plan.model_place)
    else:
        require_replaceable(plan.model_place)


def _is_one(place: str, other: str) -> bool:
    if is_remote(place) or is_remote(other):
        return place.rstrip("/") == other.rstrip("/")
    return os.path.realpath(place) == os.path.realpath(other)


def need_memory_of_gpu(plan: FitPlan, world: int, memory: int) -> None:
    """Raises TooSmallError, with how many would do, where a GPU with so many bytes of `memory` cannot hold what is estimated:
    by more than a fifth, which the estimate may be wrong by."""
    need = memory_needed(plan, world, low=2)
    if need <= memory / DOUBT:
        return
    selective, less = (dataclasses.replace(plan, recompute=way) for way in ("selective", True))
    if not plan.recompute and memory_needed(selective, world, low=2) <= memory / DOUBT:
        do = "use --set recompute=selective"
    elif memory_needed(less, world, low=2) <= memory / DOUBT:
        do = "use --set recompute=true"
    else:
        size, each = next(_larger(less, world, memory), (0, 0))
        also = "" if each == plan.train.accumulate else f"--accumulate {each} and "
        do = f"use --set recompute=true, {also}{size} GPUs" if size else "use a smaller preset, or larger GPUs"
    raise TooSmallError(
        f"{plan.name} on {world} GPU(s)",
        got=f"{need / 2**30:.1f} GiB a GPU",
        allowed=f"{memory / 2**30:.1f} GiB",
        do=do,
    )


def _larger(plan: FitPlan, world: int, memory: int) -> Iterator[tuple[int, int]]:
    """Twice as many workers, or that again, of which each holds its share of `plan`, fewest first; and how many micro-batches
    of each: the plan's, the most that its rows divide into, or one."""
    for size in (world * 2**n for n in range(1, 11)):
        if plan.batch_rows < size:
            return
        ways = range(plan.train.accumulate, 0, -1)
        possible = [each for each in ways if not (plan.on_shards and plan.batch_rows % (size * each))]
        for each in dict.fromkeys((*possible[:1], *possible[-1:])):
            one = dataclasses.replace(plan, parts=0, train=dataclasses.replace(plan.train, accumulate=each))
            if memory_needed(one, size, low=2) <= memory / DOUBT:
                yield size, each


def need_groups(plan: FitPlan, workers: int) -> None:
    """Raises ConfigError where so many workers do not divide into the plan's groups (HSDP)."""
    if workers % plan.replicas:
        raise ConfigError("replicas", got=plan.replicas, allowed=f"a divisor of the number of workers, {workers}")


def _check_shards(plan: FitPlan, data: str, workers: int) -> None:
    plan.micro_rows(workers)
    index = open_index(data, length=plan.model.train_length)
    if index.vocab > plan.model.vocab:
        raise DataError(f"{data}: vocabulary", got=index.vocab, allowed=f"at most {plan.model.vocab}, the model's")
    shares = plan.mix if plan.mix is not None else index.mix
    rows = {name: index.total("rows", "train", name) for name, share in shares.items() if share > 0}
    empty = [name for name, count in rows.items() if not count]
    if empty:
        raise DataError(f"{data} has no rows of {empty[0]}", got=dict(shares), do="leave it out of the mix")
    if sum(rows.values()) < plan.batch_rows:
        raise DataError(
            f"{data} is too short for one update",
            got=f"{sum(rows.values())} rows of {index.length} tokens",
            allowed=f"{plan.batch_rows} or more",
            do=f"add data, or lower train.batch_tokens (now {plan.train.batch_tokens})",
        )


def _check_chats(plan: FitPlan, workers: int) -> None:
    parts = plan.parts_at(workers)
    fingerprint(plan.data)
    need_forms(plan.data, pairs=plan.train.dpo > 0, some=True)
    with Path(plan.data).open("rb") as lines:
        rows = sum(1 for line in lines if line.strip())
    if rows < parts:
        need_forms(plan.data, pairs=plan.train.dpo > 0)  # more rows of no known form would not help
        raise DataError(
            f"{plan.data} is too short for one update",
            got=f"{rows} rows",
            allowed=f"{parts} or more, one for each micro-batch of {workers} worker(s)",
            do="add rows, or use fewer workers or micro-batches",
        )
