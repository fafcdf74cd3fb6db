"""What a run will take of disk and memory, estimated from its plan before any worker starts."""

from __future__ import annotations

from shoal.config import ModelConfig
from shoal.model.attention import STRIP
from shoal.model.cost import parameters
from shoal.train import lora
from shoal.train.loss import logits_at_once
from shoal.train.parallel import STAYS_GATHERED
from shoal.train.plan import FitPlan
from shoal.train.recompute import numbers_kept


def disk_needed(plan: FitPlan) -> int:
    """Bytes that a run writes at most: the checkpoints it keeps and the one being written, of weights and two moments each,
    and the model, likewise beside the one it replaces."""
    return checkpoint_bytes(plan) * (plan.keep + plan.keep_best + 1) + 8 * parameters(plan.model).total


def checkpoint_bytes(plan: FitPlan) -> int:
    """Of one checkpoint, over all workers: weights and two moments."""
    frozen = parameters(plan.model).total if plan.train.lora_rank else 0  # of exits what is frozen is not in them
    return 4 * (frozen + 3 * trained_parameters(plan))


def trained_parameters(plan: FitPlan) -> int:
    """How many numbers have gradients and moments."""
    if plan.train.lora_rank:
        return lora.count(plan.model, plan.train.lora_rank) + (parameters(plan.model).exits if plan.adapts else 0)
    if plan.biases_only:
        return plan.model.heads * plan.model.layers
    return parameters(plan.model).exits if plan.exits_only else parameters(plan.model).total


def saved_at_once(plan: FitPlan, world: int) -> int:
    """Bytes of its share of a checkpoint that one worker copies to the host, to write them while it trains."""
    return checkpoint_bytes(plan) * plan.replicas // world


def copied_whole(plan: FitPlan) -> int:
    """Bytes of whole weights that each worker holds on the host before it keeps its shards: the teacher's, which is a copy, and
    an imported model's, whose numbers become fp32. Others are mapped: workers of a machine share the file's pages. New weights
    are drawn shard by shard."""
    return 4 * parameters(plan.model).total * (plan.has_teacher + bool(plan.model.of_open_models)) if plan.init else 0


def memory_needed(plan: FitPlan, world: int, *, low: int = 4) -> int:
    """The sum of `memory_parts`."""
    return sum(memory_parts(plan, world, low=low).values())


def memory_parts(plan: FitPlan, world: int, *, low: int = 4) -> dict[str, int]:
    """Bytes that one of `world` workers needs where it computes, estimated, by part: its shards of `weights`, `gradients` and
    `moments`; what is `gathered` of weights and added up of gradients; the `activations` that backward keeps of a micro-batch,
    and the `logits`. `low`: bytes of a number in gathered weights and activations, 2 on a GPU. On processors `saved_at_once`
    comes on top."""
    c, count, trained = plan.model, parameters(plan.model), trained_parameters(plan)
    weights = count.total + (trained if plan.train.lora_rank else 0)
    sets = 1 + plan.has_teacher  # of weights: what is trained, and what it is held to
    mine = plan.replicas / world
    length = plan.row_length
    tokens = max(1, plan.train.batch_tokens // length // plan.parts_at(world)) * length
    at_once = logits_at_once("cuda" if low < 4 else "cpu")
    kept = min(tokens, max(1, at_once // c.vocab))  # places whose logits are there at once
    # a copy an exit, and two more of the one whose turn it is; where exits are compared, or compute again, three at most
    copies = len(c.exits) + 2 if kept == tokens and not plan.train.distill else 3 * len(c.exits)
    return {
        "weights": int(4 * sets * weights * mine),
        "gradients": int(4 * trained * mine),
        "moments": int(8 * trained * mine),
        "gathered": _gathered(plan, world, low, weights, trained),
        "activations": low * tokens * _activations(plan, low),
        "logits": 4 * copies * c.vocab * kept,
    }


def _gathered(plan: FitPlan, world: int, low: int, weights: int, trained: int) -> int:
    count, sets = parameters(plan.model), 1 + plan.has_teacher
    if world == 1:  # a GPU alone keeps what it computes with, in bf16, beside the weights
        return low * weights * (low < 4)
    at_once = weights if count.total <= STAYS_GATHERED else count.blocks // 4 + count.embedding
    # Gradients are exchanged once an update: of several micro-batches they are added up whole.
    whole = trained if plan.train.accumulate > 1 else min(at_once, trained)
    return low * sets * at_once + 4 * whole


def _activations(plan: FitPlan, low: int) -> int:
    """Numbers that backward keeps of one token: what each layer multiplies, and what its attention reads."""
    c, on_gpu = plan.model, low < 4
    kinds = [c.attention_kind(layer) for layer in range(c.layers)]
    layer = 12 * c.width + 4 * c.heads * c.head_dim + 4 * c.ffn
    if on_gpu and "S" not in kinds:
        layer += 2 * c.kv_heads * c.top_k  # which blocks it chose, in whole numbers of 4 bytes
    else:
        layer += max(_read(c, kind, plan.row_length, on_gpu=on_gpu) for kind in kinds)
    if plan.exits_only:
        return len(c.exits) * (c.width + 4 * c.exit_ffn) + layer
    if not plan.recompute:
        return c.layers * layer
    kept = sum(numbers_kept(c, kind, plan.recompute, low=low) for kind in kinds)
    # who may see whom, a byte a query and key each in three forms, is held until layers have been computed again
    seen = 0 if on_gpu else (3 * plan.row_length + 2 * plan.row_length // c.block) // 4
    return kept + layer + seen + 2 * (c.width + c.head_dim)  # what goes in and comes out, and rope


def _read(c: ModelConfig, kind: str, length: int, *, on_gpu: bool) -> int:
    """Numbers a token that attention of this `kind` makes for torch's operator: masks become biases, one a KV head, and where
    queries are attended in strips or bands, each of these has keys and values of its own."""
    strip, band = min(STRIP, length), 3 * min(c.window, length) // 2
    before = length // 2 if on_gpu else (length + strip) // 2  # half of a row on average
    numbers = c.kv_heads * (before * (kind in "HSD") + band * (kind in "HSL"))
    if not on_gpu:
        copies = (length + strip) // (2 * strip) * (kind in "HS") + 3 * (kind in "HL" and length > 2 * c.window)
        numbers += 2 * c.kv_heads * c.head_dim * copies
    return numbers
