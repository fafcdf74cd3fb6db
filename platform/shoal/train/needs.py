"""What a run will take of disk and memory, estimated from its plan before any worker starts."""

from __future__ import annotations

from shoal.model.cost import parameters
from shoal.train import lora
from shoal.train.parallel import STAYS_GATHERED
from shoal.train.plan import FitPlan


def disk_needed(plan: FitPlan) -> int:
    """Bytes that a run writes at most: the checkpoints it keeps and the one being written, of weights and two moments each,
    and the model, likewise beside the one it replaces."""
    total, trained = parameters(plan.model).total, trained_parameters(plan)
    frozen = total if plan.train.lora_rank else 0  # they are in the checkpoints of thin matrices, of exits they are not
    return 4 * ((frozen + 3 * trained) * (plan.keep + plan.keep_best + 1) + 2 * total)


def trained_parameters(plan: FitPlan) -> int:
    """How many numbers have gradients and moments."""
    if plan.train.lora_rank:
        return lora.count(plan.model, plan.train.lora_rank) + (parameters(plan.model).exits if plan.adapts else 0)
    if plan.biases_only:
        return plan.model.heads * plan.model.layers
    return parameters(plan.model).exits if plan.exits_only else parameters(plan.model).total


def memory_needed(plan: FitPlan, world: int) -> int:
    """Bytes that one worker needs, estimated: sharded weights, gradients and moments, what is gathered of them, what
    backward keeps of a micro-batch, and the logits of all exits."""
    c, count, trained = plan.model, parameters(plan.model), trained_parameters(plan)
    weights = count.total + (trained if plan.train.lora_rank else 0)
    teacher = 4 if plan.has_teacher else 0  # bytes a weight, beside the trained one
    # what is frozen has neither gradients nor moments
    sharded = ((4 + teacher) * weights + 12 * trained) * plan.replicas // world
    at_once = weights if count.total <= STAYS_GATHERED else count.blocks // 4 + count.embedding
    gathered = (4 + teacher) * at_once + 4 * min(at_once, trained)
    length = plan.row_length
    tokens = max(1, plan.train.batch_tokens // length // (world * plan.train.accumulate)) * length
    branches = max(2 if c.attention_kind(layer) == "H" else 1 for layer in range(c.layers))
    scores = branches * c.heads * length  # attention weights, a token
    layer = 12 * c.width + 4 * c.heads * c.head_dim + 4 * c.ffn + scores
    layers = c.layers * c.width + layer if plan.recompute else c.layers * layer
    if plan.exits_only:
        layers = len(c.exits) * (c.width + 4 * c.exit_ffn) + layer
    logits = 3 * c.vocab * len(c.exits)
    return sharded + gathered + 4 * tokens * (layers + logits)
