"""What a size costs, on paper: training by GPUs, preparing by bytes, serving by streams. `shoal scale` prints it, docs/scale.md
shows it, and tests hold each formula that can be against a measurement.

Letters: P parameters, W GPUs, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal import presets
from shoal.data.needs import SMALL, Work, of_a_rank
from shoal.errors import ConfigError, did_you_mean
from shoal.model.cost import kv_bytes_stored, parameters
from shoal.on_ray.corpus_tasks import TASKS_OF_BANDS
from shoal.train.meter import training_flops
from shoal.train.needs import checkpoint_bytes, memory_needed, memory_parts, saved_at_once, trained_parameters
from shoal.train.optim import rotates
from shoal.train.parallel import STAYS_GATHERED
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.recompute import WAYS, Recompute, flops_again

A_NODE = 8  # GPUs that are linked within a node
GROUP = 64  # GPUs that share one model at most; more are groups that each hold it (HSDP)
ROOM = 0.8  # of a GPU's memory that an estimate may fill before more is computed again
HOST_LINK = 25e9  # bytes a second from a GPU to its host's memory (PCIe 4 x16)
# Measured on two cores and logged: preparing 1 GB, and one-token events through one gateway process.
PREPARE_SECONDS = 0.65  # of a processor, a MB of text
GATEWAY_EVENTS = 3800  # a second
BYTES_A_TOKEN = 4.0  # of English text with a vocabulary of 65,536
BYTES_A_DOCUMENT = 5000.0  # of web pages' text
STORED = 6  # bytes of a token in the shards: a number, 4, and which document it is of, 2
SOURCE_FILES = (1e9, 32e6, 1e6)  # bytes of each


@dataclass(frozen=True)
class Gpu:
    """What its maker says of a GPU."""

    name: str
    memory: float  # bytes
    flops: float  # dense bf16 operations a second
    link: float  # bytes a second to the others of its node, one way
    network: float  # bytes a second to other nodes, of a node's network each GPU's share


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, 300e9, 25e9),
        Gpu("h100", 80e9, 989e12, 450e9, 50e9),
        Gpu("h200", 141e9, 989e12, 450e9, 50e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`. Raises ConfigError."""
    if name not in GPUS:
        raise ConfigError("gpu", got=name, allowed=list(GPUS), do=did_you_mean(name, GPUS))
    return GPUS[name]


# ---- training


def plan_at(preset: str, world: int, recompute: Recompute = True) -> FitPlan:
    """A plan of `preset` for W GPUs: a row of the batch each at least, as many micro-batches as the preset's where the rows
    suffice, and layers computed again as a run asks for with --set recompute."""
    base = presets.get(preset)
    rows = max(base.train.batch_tokens // base.model.train_length, world)
    accumulate = max(n for n in range(1, base.train.accumulate + 1) if n * world <= rows)
    rows = -(-rows // (accumulate * world)) * accumulate * world
    more: dict[str, Any] = {
        "batch_tokens": rows * base.model.train_length,
        "accumulate": accumulate,
        "recompute": recompute,
    }
    more["replicas"] = world // GROUP if world % GROUP == 0 else 1
    return pretrain_plan(preset, "data", "run", steps=1, **more)


def exchanged(plan: FitPlan, world: int, low: int = 2) -> float:
    """Bytes that one of W GPUs receives in an update, with `low` bytes of a gathered number: weights at each use, forward and
    backward of each micro-batch (a small model's once), gradients once, between groups their sums."""
    group, total, trained = world // plan.replicas, parameters(plan.model).total, trained_parameters(plan)
    uses = 1 if total <= STAYS_GATHERED else 2 * plan.train.accumulate
    others = (group - 1) / group
    groups = 2 * 4 * trained / group * (plan.replicas - 1) / plan.replicas
    return (low * total * uses + 4 * trained) * others + groups


@dataclass(frozen=True)
class Training:
    """Of one preset on W GPUs."""

    preset: str
    gpus: int
    batch_tokens: int
    memory: dict[str, int]  # bytes of a GPU by part, see `memory_parts`
    fits: bool
    recompute: Recompute  # what backward computes again
    exchanged: float  # bytes that a GPU receives in an update
    compute: float  # seconds of an update, if nothing else were
    exchange: float  # seconds of its exchange, most of which hides behind computing
    checkpoint: float  # seconds to write one, beside the updates
    stalled: float  # seconds that training stands still for one
    host: int  # bytes of the host's memory for the copy, a GPU
    checkpoint_bytes: int
    tokens_a_day: float


def training(
    preset: str, world: int, of: Gpu, utilisation: float, disk: float, ways: Sequence[Recompute] = WAYS
) -> Training:
    """`utilisation`: share of the GPU's operations that training reaches, with those that are computed again, an assumption
    (HFU, which `shoal bench train --parts mfu` measures); `disk`: bytes a second that a node
    writes. Update and exchange overlap: the longer of both counts. Layers compute again as the first of `ways` that fits."""
    plans = [plan_at(preset, world, way) for way in ways]
    plan = next((each for each in plans if memory_needed(each, world, low=2) <= ROOM * of.memory), plans[-1])
    memory = memory_parts(plan, world, low=2)
    heads = min(2, len(plan.model.exits)) if rotates(plan.model, plan.train) else len(plan.model.exits)
    work = (training_flops(plan.model, heads) + flops_again(plan.model, plan.recompute)) * plan.train.batch_tokens
    compute = work / (world * of.flops * utilisation)
    bytes_ = exchanged(plan, world)
    exchange = bytes_ / (of.link if world <= A_NODE else of.network)
    share = saved_at_once(plan, world)
    nodes = -(-min(world, GROUP) // A_NODE)  # one group of several writes
    whole = checkpoint_bytes(plan)
    update = max(compute, exchange)
    return Training(
        preset,
        world,
        plan.train.batch_tokens,
        memory,
        sum(memory.values()) <= of.memory,
        plan.recompute,
        bytes_,
        compute,
        exchange,
        whole / (nodes * disk),
        share / HOST_LINK,
        share,
        whole,
        86400 / update * plan.train.batch_tokens,
    )


@dataclass(frozen=True)
class Tensors:
    """What it would cost to cut each matrix over some GPUs of a node (tensor parallelism), beside what FSDP2 exchanges."""

    received: float  # bytes of activations that a GPU receives in an update
    seconds: float  # of them: no product can be done meanwhile
    spared: float  # seconds of FSDP2's exchange, which hides behind products
    hidden_from: float  # tokens of a GPU's micro-batch, from which on all of FSDP2's exchange hides


def in_tensors(preset: str, world: int, ways: int, of: Gpu, utilisation: float) -> Tensors:
    """Each layer adds up its output over the `ways` GPUs after attention and after the FFN, forward, backward and where it is
    computed again, in bf16: of each sum a GPU receives 2 (ways - 1) / ways. FSDP2 receives 8 bytes a parameter and micro-batch
    (weights in bf16 twice, gradients in fp32), and computes 8 operations a parameter and token: so what hides does not
    depend on the size of the model."""
    plan = plan_at(preset, world)
    tokens = plan.train.batch_tokens * ways / world
    received = plan.model.layers * 6 * tokens * plan.model.width * 2 * 2 * (ways - 1) / ways
    exchange = exchanged(plan, world) / (of.link if world <= A_NODE else of.network)
    return Tensors(received, received / of.link, exchange * (ways - 1) / ways, of.flops * utilisation / of.network)


# ---- preparing


@dataclass(frozen=True)
class Corpus:
    """Of preparing so many bytes of text in S3."""

    bytes: float
    file: float  # bytes of a source file
    parts: int
    tasks: int  # of all passes
    tokens: float
    rows: float  # of the preset's training length
    a_rank: float  # bytes that each rank of a training run holds of it: the index, and some of the order of the rows
    stored: float  # bytes of the shards
    files: int  # of the corpus
    meanwhile: int  # objects in the work folder, gone at the end
    requests: int  # to put all of them in S3
    memory: dict[str, int]  # bytes of the command that prepares, by what they are for
    cpu_hours: float


def corpus(size: float, preset: str, file: float = SOURCE_FILES[0]) -> Corpus:
    """`size`: bytes of text; `file`: of each source file, which can be cut where it is large."""
    tokens, length = size / BYTES_A_TOKEN, presets.get(preset).model.train_length
    work = Work.of(size, file, size / BYTES_A_DOCUMENT)
    shards, meanwhile = work.shards(tokens * STORED, length * STORED), work.meanwhile(TASKS_OF_BANDS)
    return Corpus(
        size,
        file,
        work.parts,
        work.tasks(TASKS_OF_BANDS),
        tokens,
        tokens / length,
        sum(of_a_rank(tokens / length, shards).values()),
        tokens * STORED,
        shards + SMALL,
        meanwhile,
        work.requests(size / BYTES_A_DOCUMENT, size, shards, tokens * STORED, TASKS_OF_BANDS),
        work.command(shards, shards + meanwhile),
        size / 1e6 * PREPARE_SECONDS / 3600,
    )


# ---- serving


@dataclass(frozen=True)
class Serving:
    """Of N streams at once."""

    preset: str
    streams: int
    context: int
    kv_bytes: int  # of one stream at full depth
    a_replica: int  # streams whose K/V a replica holds
    replicas_for_memory: int
    replicas_for_tokens: int
    replicas: int
    gateways: int


def serving(
    preset: str, streams: int, context: int, of: Gpu, *, tokens_a_second: float, replica_tokens: float
) -> Serving:
    """`context`: tokens that a stream holds; `tokens_a_second`: what it is to get; `replica_tokens`: what a replica makes. A
    replica is a GPU, with weights in fp32 and K/V in what is left of nine tenths of its memory."""
    model = presets.get(preset).model
    each = kv_bytes_stored(model, context, dtype=torch.float32)
    room = 0.9 * of.memory - 4 * parameters(model).total
    if room < each:
        raise ConfigError(
            f"{preset} with {context:,} tokens on one {of.name}",
            got=f"{(4 * parameters(model).total + each) / 1e9:.1f} GB",
            allowed=f"{0.9 * of.memory / 1e9:.1f} GB",
            do="use a smaller preset, a shorter context, or a larger GPU",
        )
    held = int(room // each)
    memory, tokens = -(-streams // held), math.ceil(streams * tokens_a_second / replica_tokens)
    gateways = math.ceil(streams * tokens_a_second / GATEWAY_EVENTS)
    return Serving(preset, streams, context, each, held, memory, tokens, max(memory, tokens), gateways)


# ---- as text


def report(
    names: list[str], worlds: list[int], of: Gpu, *, utilisation: float, disk: float, size: float, streams: int
) -> dict[str, Any]:
    """All of it as plain values."""
    rows = [training(name, world, of, utilisation, disk) for name in names for world in worlds]
    served = [
        serving(name, streams, 4096, of, tokens_a_second=5.0, replica_tokens=replica)
        for name, replica in (("1b", 4500.0), ("7b", 1800.0))
        if name in names
    ]
    return {
        "gpu": dataclasses.asdict(of),
        "utilisation": utilisation,
        "training": [dataclasses.asdict(row) for row in rows],
        "corpus": [dataclasses.asdict(corpus(size, names[-1], file)) for file in SOURCE_FILES],
        "serving": [dataclasses.asdict(row) for row in served],
    }


def tables(found: dict[str, Any]) -> str:
    """`report` as tables in Markdown."""
    parts = ("weights", "gradients", "moments", "gathered", "activations", "logits")
    lines = [
        f"| preset, {found['gpu']['name']} | recompute | tokens an update | {' | '.join(parts)} | GB a GPU | "
        "copy on the host |",
        "|" + "---|" * (len(parts) + 5),
    ]
    for row in found["training"]:
        memory = row["memory"]
        total = f"{sum(memory.values()) / 1e9:.1f}{'' if row['fits'] else ', too much'}"
        cells = " | ".join(f"{memory[part] / 1e9:.1f}" for part in parts)
        name = f"{row['preset']} on {row['gpus']}"
        how = str(row["recompute"]).lower()
        lines.append(f"| {name} | {how} | {row['batch_tokens']:,} | {cells} | {total} | {row['host'] / 1e9:.2f} |")
    lines += [
        "",
        "| preset | GB received an update | compute s | exchange s | checkpoint GB | s to write | s it halts | tokens a day |",
        "|" + "---|" * 8,
    ]
    for row in found["training"]:
        lines.append(
            f"| {row['preset']} on {row['gpus']} | {row['exchanged'] / 1e9:.1f} | {row['compute']:.2f} | "
            f"{row['exchange']:.2f} | {row['checkpoint_bytes'] / 1e9:.1f} | {row['checkpoint']:.1f} | {row['stalled']:.2f} | "
            f"{row['tokens_a_day'] / 1e9:.1f} billion |"
        )
    lines += ["", *_corpus_tables(found["corpus"])]
    lines += [
        "",
        "| preset | streams | K/V of one | streams a replica | replicas, for K/V | for tokens | gateways |",
        "|" + "---|" * 7,
    ]
    for row in found["serving"]:
        lines.append(
            f"| {row['preset']} | {row['streams']:,} of {row['context']:,} tokens | {row['kv_bytes'] / 1e6:.0f} MB | "
            f"{row['a_replica']:,} | {row['replicas_for_memory']:,} | {row['replicas_for_tokens']:,} | {row['gateways']:,} |"
        )
    return "\n".join(lines)


def _corpus_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| text | files of | parts | tasks | tokens | rows | of them a rank holds | shards | files | files meanwhile | "
        "CPU hours |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        lines.append(
            f"| {row['bytes'] / 1e12:g} TB | {row['file'] / 1e6:,.0f} MB | {row['parts']:,} | {row['tasks']:,} | "
            f"{row['tokens'] / 1e12:.2f} trillion | {row['rows'] / 1e6:,.0f} million | {row['a_rank'] / 1e6:,.0f} MB | "
            f"{row['stored'] / 1e12:.1f} TB | {row['files']:,} | {row['meanwhile']:,} | {row['cpu_hours']:,.0f} |"
        )
    parts = list(rows[0]["memory"])
    lines += ["", f"| files of | {' | '.join(parts)} | MB in all |", "|" + "---|" * (len(parts) + 2)]
    for row in rows:
        cells = " | ".join(f"{row['memory'][part] / 1e6:,.0f}" for part in parts)
        lines.append(f"| {row['file'] / 1e6:,.0f} MB | {cells} | {sum(row['memory'].values()) / 1e6:,.0f} |")
    return lines
