"""What a run begins with and what it writes: the weights and what travels with them, and the model directory in the end."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from shoal.config import ModelConfig
from shoal.data.models import written
from shoal.errors import CheckpointError, ConfigError, ResourceError, last_line
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import checkpoint, described, smooth
from shoal.model.digests import digest, digest_as_they_come
from shoal.model.linears import as_int8
from shoal.model.net import Net
from shoal.train import exits, fresh, lora, sparse
from shoal.train.feed import Feed, shard_tokenizer
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan

T = TypeVar("T")

SMOOTHED_BY = 2  # updates whose rows say how large the activations become


@dataclass
class Start:
    """Where the weights come from, and with them the tokenizer and the chat template that the model will be written with."""

    net: Net
    tokenizer: Tokenizer
    template: str
    read: dict[str, str]  # sha256 of what was read of the plan's model directory, by name; empty for fresh weights
    source: dict[str, Any] | None = None  # what an open model was imported from
    base: str = ""  # of the plan's model directory, as of `described.base`
    backbone: str = ""  # sha256 of what stays as it is, where what is new alone is trained
    solves: bool = False  # are there new exits whose last matrix is to be solved for?
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the tensors then: training is in fp32

    @classmethod
    def of(cls, plan: FitPlan, ranks: Ranks) -> Start:
        """From the plan's model directory, or fresh with the tokenizer of its shards. Equal on every rank."""
        if plan.init:
            parts = checkpoint.read(plan.init)
            source, base = parts.source, parts.base
            weights, backbone, dtypes = digest(parts.net.state_dict()), "", dict[str, torch.dtype]()
            solves = plan.adapts and not plan.biases_only and exits.begins_solved(parts.config, plan.model)
            if plan.adapts:
                backbone = digest(_backbone(plan, parts.net.state_dict(), parts.config))
                grown = sparse.made if plan.biases_only else exits.added
                parts.net, parts.config = grown(parts.net, plan.model), plan.model
                dtypes = {name: tensor.dtype for name, tensor in parts.net.state_dict().items()}
            if plan.frozen:
                freeze_ = sparse.freeze_ if plan.biases_only else exits.freeze_
                freeze_(parts.net)
            if plan.quantize and source is not None:
                parts.net, parts.config = _untied(parts.net, plan.model), plan.model
            if parts.config != plan.model:
                raise CheckpointError(f"{plan.init} is of another configuration", do="plan with the model's own")
            net, tokenizer, template = parts.net.float(), parts.tokenizer, parts.chat_template
            read = {
                "weights_sha256": weights,
                "tokenizer_sha256": tokenizer.sha256,
                "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            }
            if plan.train.lora_rank:
                lora.adapt_(net, plan.train.lora_rank, plan.train.seed)
                for name, parameter in net.named_parameters():
                    if plan.adapts and exits.is_exits(name, plan.model):
                        parameter.requires_grad_(True)
        else:
            # Of many ranks none draws or holds the whole.
            drawn_later = ranks.world > 1 and not plan.has_teacher
            net = fresh.meta(plan.model) if drawn_later else Net(plan.model).init_(plan.train.seed)
            tokenizer, template = shard_tokenizer(plan.data), DEFAULT_TEMPLATE
            read, source, base, backbone, solves, dtypes = {}, None, "", "", False, {}
        if len(tokenizer) > plan.model.vocab:
            raise ConfigError(
                "model.vocab", got=plan.model.vocab, allowed=f"at least {len(tokenizer)}, the tokenizer's"
            )
        return cls(net, tokenizer, template, read, source, base, backbone, solves, dtypes)

    def prepare(self, plan: FitPlan, feed: Feed, ranks: Ranks) -> None:
        """What is done to the weights, in place, once the data are known."""
        if self.solves:
            updates = exits.updates_solved_on(plan.model, plan.train.batch_tokens, feed.steps_in_epoch)
            with ranks.alike():
                read = [[batch.to(ranks.device) for batch in feed.at(step)] for step in range(updates)]
            exits.solve_(ranks.place(self.net), read, ranks)
        if plan.quantize and self.source is not None:
            ranks.place(self.net)
            _smooth(self.net, feed, ranks)

    def teacher(self, plan: FitPlan) -> Net | None:
        """What the net is held to, before it changes: itself, with its sparse layers dense where their biases learn."""
        if not plan.has_teacher:
            return None
        net = copy.deepcopy(self.net)
        return sparse.dense_(net) if plan.biases_only else net

    def export(self, plan: FitPlan, model: LossModel, ranks: Ranks) -> str:
        """Write the model's directory, INT8 when the plan quantises, with tensors as they come, so that no rank holds all.
        Returns the sha256 of the backbone where something was added to it, else "". Raises CheckpointError, on all ranks, where
        it cannot be written, or the backbone should have stayed and did not."""
        model.trained_only = False
        names = [name.removeprefix("net.") for name in model.state_dict()]
        thin = [name for name in names if lora.is_thin(name)]
        whole = [name for name in names if not lora.is_thin(name)]
        told = sorted(_backbone(plan, dict.fromkeys(whole), plan.model)) if plan.adapts else []
        after = ""
        with ranks.alike(), ExitStack() as rest:
            # What comes after the last tensor, hashes of all that was written and in S3 its way there, may take many minutes.
            last = partial(rest.enter_context, ranks.at_leisure())
            tensors = _and_then(whole_tensors(model, ranks, [*thin, *told, *whole]), last)
            try:
                if ranks.first:
                    with _unwritten(plan):
                        after = self._write(plan, tensors, len(thin), len(told))
            finally:
                for _ in tensors:  # what is left of the walk that all must go
                    pass
        return str(ranks.agree(self.backbone if plan.frozen else after))

    def _write(self, plan: FitPlan, tensors: Iterator[tuple[str, Tensor]], thin: int, told: int) -> str:
        """As `export` of all ranks, of tensors of which so many are `thin` matrices, which are held, and so many more are
        `told` by a digest, the backbone in the order of its names, before all come for the file."""
        learned = dict(itertools.islice(tensors, thin))
        made = ((name, self._made(plan, name, tensor, learned)) for name, tensor in tensors)
        after = digest_as_they_come(itertools.islice(made, told)) if told else ""
        if plan.frozen:
            exits.need_unchanged(self.backbone, after)
        if learned:
            lora.save(plan.run, learned)
        if not plan.quantize:
            self._save(plan, plan.model, made)
            return after
        with torch.device("meta"):
            shape = Net(plan.model)
        self._save(plan, dataclasses.replace(plan.model, quantization="w8a8"), as_int8(shape, made))
        return after

    def _made(self, plan: FitPlan, name: str, tensor: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """A tensor as it is written: of the type that it had where it was frozen, with the thin matrices."""
        return lora.merged(name, tensor.to(self.dtypes[name]) if plan.frozen else tensor, learned)

    def _save(self, plan: FitPlan, config: ModelConfig, state: Iterable[tuple[str, Tensor]]) -> None:
        with written(plan.model_place) as folder:
            checkpoint.save(
                folder,
                config=config,
                state=state,
                tokenizer=self.tokenizer,
                name=plan.name,
                chat_template=self.template,
                source=described.trained_further(self.source),
                base=self.base if plan.frozen or plan.quantize else "",
            )


@contextmanager
def _unwritten(plan: FitPlan) -> Iterator[None]:
    """What the disk refuses in this block becomes a CheckpointError, for a run that has its checkpoints."""
    again = "the same command goes on from its last checkpoint"
    try:
        yield
    except ResourceError as error:
        raise CheckpointError(f"{error.message}; {again}") from error
    except (OSError, SafetensorError) as error:
        do = f"free some room; {again}"
        raise CheckpointError(f"cannot write {plan.model_place}", got=last_line(error), do=do) from error


def whole_tensors(model: LossModel, ranks: Ranks, names: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the net of `model`, those of `names` in their order [all], each gathered from all ranks when it is asked
    for; for rank 0, on its CPU. All ranks walk to the end: those that do would wait for who does not."""
    state = {name.removeprefix("net."): tensor for name, tensor in model.state_dict().items()}
    for name in names or state:
        tensor = state[name]
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach().cpu() if ranks.first else whole


def _and_then(tensors: Iterator[tuple[str, Tensor]], act: Callable[[], object]) -> Iterator[tuple[str, Tensor]]:
    """`tensors`, and `act` once the last of them was taken."""
    yield from tensors
    act()


def _backbone(plan: FitPlan, state: Mapping[str, T], config: ModelConfig) -> dict[str, T]:
    """What the `state` of a net of `config` has, by name, of the tensors to which `plan` adds others."""
    return (sparse if plan.biases_only else exits).backbone(state, config)


def _smooth(net: Net, feed: Feed, ranks: Ranks) -> None:
    """Move what single channels of the activations have too much of, for some rows of the data, into the weights, in place and
    alike on all ranks: a model of other people's has not learned to live with the rounding (decision 0003)."""
    with ranks.alike():
        batches = [batch for step in range(min(SMOOTHED_BY, feed.steps_in_epoch)) for batch in feed.at(step)]
    rows = [
        tokens[docs >= 0].to(ranks.device)
        for batch in batches
        for tokens, docs in zip(batch.tokens, batch.docs, strict=True)
    ]
    by = smooth.factors(net, smooth.largest(net, [row for row in rows if len(row)]))
    by = ranks.agree({name: factor.cpu() for name, factor in by.items()})
    net.load_state_dict(
        smooth.smoothed(net.state_dict(), {name: factor.to(ranks.device) for name, factor in by.items()})
    )


def _untied(net: Net, config: ModelConfig) -> Net:
    """`net` under `config`, whose head is a matrix of its own. Raises CheckpointError where they differ in more."""
    if dataclasses.replace(net.config, tied=False) != config:
        raise CheckpointError("the model to quantise is of another configuration", do="plan with the model's own")
    with torch.device("meta"):
        whole = Net(config)
    state = smooth.smoothed(net.state_dict(), {})
    state[f"{smooth.HEAD}.weight"] = state[f"{smooth.HEAD}.weight"].clone()  # no longer the memory of the token table
    whole.load_state_dict(state, assign=True)
    return whole
