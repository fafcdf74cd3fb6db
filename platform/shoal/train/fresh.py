"""Weights of a new model that many ranks train: each has its shards and never the whole, drawn tensor by tensor.

    meta     Net, whose matrices take no memory (norms and gates have their values, and are small)
    shard_   FSDP cuts it
    fill_    each rank draws one whole matrix after the other, keeps its rows, and lets the rest go

Notable: the values are those of `Net.init_` from the same seed, whatever the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shoal.config import ModelConfig
from shoal.model.net import Net
from shoal.train.snapshot import offsets_of


def meta(config: ModelConfig) -> Net:
    """A net whose matrices are on the device "meta", to be filled by `fill_`."""
    net = Net(config)  # which leaves matrices untouched, so that no memory is taken for them
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1:
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    return net


@torch.no_grad()
def fill_(model: nn.Module, net: Net, seed: int, device: torch.device) -> None:
    """Give `model`, whose `net` is of `meta` and sharded, memory on `device` and the weights of `seed`."""
    small = {name: _local(p).to(device, copy=True) for name, p in model.named_parameters() if not p.is_meta}
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if name in small:
            _local(parameter).copy_(small[name])
    parameters = dict(net.named_parameters())
    for name, values in net.drawn(seed):
        _local(parameters[name]).copy_(_mine(values, parameters[name]))


def _local(parameter: Tensor) -> Tensor:
    """This rank's shard of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _mine(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a `whole` tensor that this rank's shard of a parameter is."""
    for dim, (start, size) in enumerate(zip(offsets_of(parameter), _local(parameter).shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole
