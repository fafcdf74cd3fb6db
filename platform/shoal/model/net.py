"""The network: embedding of tokens and patches, four groups of blocks, and one head at every exit.

    tokens, patches -> embed_inputs -> group 1 -> (exit L/4) -> group 2 -> (exit L/2) -> groups 3, 4 -> (exit L)
    logits at an exit = rms_e(h_e) E^T (tied)          a request of depth e *is* the truncated model
    with exit_ffn, at an early one = rms_e(h_e + swiglu_e(rms(h_e))) E^T

Letters: B rows, T tokens, D width, V vocabulary, n patches, p patch side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shoal.config import GROUPS, ModelConfig
from shoal.inputs.tokenizer import PATCH_ID
from shoal.model.adapters import Adapter, alone
from shoal.model.attention import Layout
from shoal.model.block import ExitMlp, Group, Norm, linear, rope_tables
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.gpu.sparse import Spans, usable
from shoal.model.linears import Embedding, Int8Embedding, Weight


class Net(nn.Module):
    """Weights and forward pass of one `ModelConfig`. Built uninitialised: call `init_` or load a state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch
        int8 = config.quantization == "w8a8"
        self.embed = (Int8Embedding if int8 else Embedding)(config.vocab, config.width)
        if side:
            self.patch_in = nn.Linear(config.patch_values, config.width, bias=False)  # fp32 in every precision
            self.row_embed = nn.Parameter(torch.empty(side, config.width))
            self.col_embed = nn.Parameter(torch.empty(side, config.width))
        self.groups = nn.ModuleList(Group(config, index) for index in range(GROUPS))
        self.exit_norms = nn.ModuleDict({str(e): Norm(config.width, config.norm_eps) for e in config.exits})
        early = config.exits[:-1] if config.exit_ffn else ()
        self.exit_mlps = nn.ModuleDict({str(e): ExitMlp(config) for e in early})
        if side:
            self.patch_head = nn.Linear(config.width, config.patch_values, bias=False)
        self.output = None if config.tied else linear(config, config.width, config.vocab)

    @torch.no_grad()
    def init_(self, seed: int = 0) -> Net:
        """Give all weights the values of `drawn`."""
        parameters = dict(self.named_parameters())
        for name, values in self.drawn(seed):
            parameters[name].copy_(values)
        return self

    def drawn(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Names and fresh values of the weights, whole and on the CPU, one after the other, from `seed`; where they are sharded
        each rank takes its part of each: drawn on shards, every shard would get the same values (pytorch #138329). Output
        projections start smaller by 1/sqrt(2L), so that the residual stream keeps its scale."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue  # norms and gates are set where they are made
            if name == "embed.weight" or "_embed" in name:
                std = 0.02
            elif name == "patch_in.weight":
                std = 1 / math.sqrt(p.shape[1])
            else:
                std = 0.8 / math.sqrt(p.shape[1])
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    std /= math.sqrt(2 * self.config.layers)
            yield name, torch.empty(p.shape).normal_(0.0, std, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        return self._exact.dtype

    @property
    def device(self) -> torch.device:
        return self._exact.device

    @property
    def _exact(self) -> Tensor:
        """A weight that is fp in INT8, too."""
        return self.patch_in.weight if self.config.image_size else self.exit_norms[str(self.config.layers)].weight  # type: ignore[return-value]

    def embed_inputs(self, tokens: Tensor, patches: Tensor | None = None, grid: Tensor | None = None) -> Tensor:
        """[..., T, D] for tokens [..., T]; the patch tokens, in order, take their patch: `patches` [n, 3p^2] (0..255) at
        `grid` [n, 2] (row, column)."""
        x: Tensor = self.embed(tokens).to(self.dtype) * (self.config.embed_scale or math.sqrt(self.config.width))
        if patches is not None and len(patches):
            assert grid is not None
            x = x.masked_scatter((tokens == PATCH_ID)[..., None], self.embed_patches(patches, grid).to(x.dtype))
        return x

    def embed_few(self, tokens: Sequence[int]) -> np.ndarray:
        """[N, D], `embed_inputs` of `tokens` that are no patches, on a CPU: of one token torch's operators take longer."""
        rows = self.embed.rows(tokens)
        scaled: np.ndarray = rows * rows.dtype.type(self.config.embed_scale or math.sqrt(self.config.width))
        return scaled

    def embed_patches(self, patches: Tensor, grid: Tensor) -> Tensor:
        """[n, D] for pixel values 0..255, [n, 3p^2], at (row, column) `grid` [n, 2]."""
        y: Tensor = self.patch_in(unit_pixels(patches, self.dtype))
        return y + self.row_embed[grid[:, 0]] + self.col_embed[grid[:, 1]]

    def forward(
        self,
        tokens: Tensor,
        patches: Tensor | None = None,
        grid: Tensor | None = None,
        docs: Tensor | None = None,
        exits: Iterable[int] | None = None,
        skip: Collection[int] = (),
        adapter: Adapter | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states [B, T, D] (before the exit's norm) at each of `exits` (default: full depth), tokens [B, T].

        `docs` [B, T]: document ids; documents of one row never see each other. Runs no deeper than the deepest exit.
        `skip`: layers to leave out, in training; `adapter`: of all rows, without gradients.
        """
        given = (tokens, patches, grid, docs, exits if exits is None else set(exits), skip, adapter)
        try:
            return self._forward(*given)
        except Exception as error:
            launch.give_up(tokens.device, error)
            return self._forward(*given)

    def _forward(
        self,
        tokens: Tensor,
        patches: Tensor | None,
        grid: Tensor | None,
        docs: Tensor | None,
        exits: Collection[int] | None,
        skip: Collection[int],
        adapter: Adapter | None,
    ) -> dict[int, Tensor]:
        wanted = set(exits) if exits is not None else {self.config.layers}
        c = self.config
        if docs is None:
            docs = torch.zeros_like(tokens)
        x = self.embed_inputs(tokens, patches, grid)
        layout: Layout | Spans
        if usable(x, c.block):
            layout = Spans.packed(docs, c.block, c.window, c.dense_length)
        else:
            layout = Layout.packed(docs, window=c.window, block=c.block, sinks=c.sinks)
        rope = rope_tables(layout.positions, c, x.dtype)
        beside = alone(self, adapter, tokens.numel())
        hidden: dict[int, Tensor] = {}
        for index, group in enumerate(self.groups):
            x = group(x, layout, rope, skip, beside)
            layers = c.ends[index]
            if layers in wanted:
                hidden[layers] = x
            if layers >= max(wanted):
                break
        return hidden

    def head(self, hidden: Tensor, layers: int) -> Tensor:
        """Logits [..., V] of hidden states [..., D] at the exit after `layers` layers."""
        return self.logits(self.exit(hidden, layers))

    def exit(self, hidden: Tensor, layers: int) -> Tensor:
        """[..., D], what the head reads of hidden states [..., D] at the exit after `layers` layers."""
        name = str(layers)
        if name in self.exit_mlps:
            hidden = self.exit_mlps[name](hidden)
        normed: Tensor = self.exit_norms[name](hidden)
        return normed

    def head_of(self, layers: int, rows: int) -> fused.Head | None:
        """`head` at the exit after `layers` layers, for steps of so many `rows` on a CPU; None where that takes another way."""
        norm, name = self.exit_norms[str(layers)], str(layers)
        matrix = (self.embed if self.output is None else self.output).matrix(rows, self.dtype)
        if name in self.exit_mlps or matrix is None:
            return None
        return fused.Head(norm.weight, norm.eps, matrix)  # type: ignore[arg-type]

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., V] of what `exit` gives, [..., D]."""
        if self.output is None:
            return self.embed.logits(normed)
        if isinstance(self.output, Weight) and normed.is_cuda:
            return self.output.product_in_fp32(normed)
        return self.output(normed)


def unit_pixels(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixel values 0..255 as -1..1."""
    return patches.to(dtype) / 127.5 - 1


def dequantized(net: Net, config: ModelConfig) -> Net:
    """The INT8 `net` with its weights as fp32, under `config`, which says so. Activations are no longer rounded."""
    state = net.state_dict()
    for name in [name for name in state if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        state[weight] = state[weight].float() * state.pop(name)
    with torch.device("meta"):
        whole = Net(config)
    whole.load_state_dict(state, assign=True)
    return whole
