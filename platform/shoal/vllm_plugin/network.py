"""The network in vLLM's layers: products (and so INT8 and tensor parallelism) are vLLM's, attention is `model.paged`'s.

Names of modules are those of `model.net`, so a model directory's tensors need no table. Layers beyond the served depth are
neither built nor loaded, so vLLM's K/V memory has none of them.

Letters: N tokens of a step, D width, H query heads, Hk KV heads, d head dim, V vocabulary, p patch side in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as VllmAttention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from shoal.config import ModelConfig
from shoal.errors import CheckpointError
from shoal.inputs.tokenizer import IMG, Tokenizer
from shoal.model import block
from shoal.model.block import Norm, Rope, rope_tables
from shoal.model.checkpoint import ROUTER
from shoal.model.model import forbidden
from shoal.model.net import unit_pixels
from shoal.vllm_plugin import PER_REQUEST, depths, images
from shoal.vllm_plugin.attention import HybridBackend, Step, current_step

UNUSED = (ROUTER, "patch_head.")  # tensors of a model directory that generation does not read


class Attention(block.Attention):
    """Our attention of H/tp and Hk/tp heads, over vLLM's products and K/V memory."""

    def __init__(self, config: ModelConfig, layer: int, prefix: str, vllm: VllmConfig) -> None:
        ranks = get_tensor_model_parallel_world_size()
        local = dataclasses.replace(config, heads=config.heads // ranks, kv_heads=config.kv_heads // ranks)
        super().__init__(local, config.attention_kind(layer))
        quantized = {"quant_config": vllm.quant_config, "return_bias": False, "bias": False}
        heads = config.heads * config.head_dim
        # in place of the base class's products
        self.qkv = QKVParallelLinear(
            config.width, config.head_dim, config.heads, config.kv_heads, prefix=f"{prefix}.qkv", **quantized
        )
        self.out = RowParallelLinear(heads, config.width, prefix=f"{prefix}.out", **quantized)
        self.gate.weight_loader = _load_heads  # type: ignore[attr-defined]
        self.memory = VllmAttention(
            local.heads, config.head_dim, config.head_dim**-0.5, local.kv_heads,
            cache_config=vllm.cache_config, prefix=f"layers.{layer}.memory", attn_backend=HybridBackend,
            reach=self.reach, block=config.block, values=config.summary_values,
        )  # fmt: skip

    def run(self, x: Tensor, rope: Rope) -> Tensor:
        """[N, D] for x [N, D]."""
        q, k, v = self.project(x, rope)
        return self.out(self.memory(q, k, v))


class Mlp(block.Mlp):
    def __init__(self, config: ModelConfig, prefix: str, vllm: VllmConfig) -> None:
        super().__init__(config, config.ffn)
        quantized = {"quant_config": vllm.quant_config, "return_bias": False, "bias": False}
        self.up = MergedColumnParallelLinear(config.width, [config.ffn] * 2, prefix=f"{prefix}.up", **quantized)
        self.down = RowParallelLinear(config.ffn, config.width, prefix=f"{prefix}.down", **quantized)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, prefix: str, vllm: VllmConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_eps)
        self.attention = Attention(config, layer, f"{prefix}.attention", vllm)
        self.mlp_norm = Norm(config.width, config.norm_eps)
        self.mlp = Mlp(config, f"{prefix}.mlp", vllm)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attention.run(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Group(nn.Module):
    """A quarter of the layers."""

    def __init__(self, config: ModelConfig, index: int, prefix: str, vllm: VllmConfig) -> None:
        super().__init__()
        first, end = (0, *config.ends)[index : index + 2]
        self.blocks = nn.ModuleList(
            Block(config, layer, f"{prefix}.blocks.{layer - first}", vllm) for layer in range(first, end)
        )

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        for layer in self.blocks:
            x = layer(x, rope)
        return x


@MULTIMODAL_REGISTRY.register_processor(images.Processor, info=images.Info, dummy_inputs=images.Largest)
class ShoalForCausalLM(nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """What vLLM makes of a model directory."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf = vllm_config.model_config.hf_config
        self.config: ModelConfig = hf.shape
        self.layers: int = hf.layers
        self.per_request = hf.depth == PER_REQUEST
        c, lead = self.config, f"{prefix}." if prefix else ""
        groups = c.groups(self.layers)
        side = c.image_size // c.patch
        self.embed = VocabParallelEmbedding(c.vocab, c.width, prefix=f"{lead}embed")
        self.patch_in = nn.Linear(c.patch_values, c.width, bias=False)
        self.row_embed = nn.Parameter(torch.empty(side, c.width))
        self.col_embed = nn.Parameter(torch.empty(side, c.width))
        self.groups = nn.ModuleList(Group(c, index, f"{lead}groups.{index}", vllm_config) for index in range(groups))
        self.exit_norms = nn.ModuleDict({str(e): Norm(c.width, c.norm_eps) for e in self.exits})
        self.head = ParallelLMHead(c.vocab, c.width, prefix=f"{lead}head").tie_weights(self.embed)
        self.logits_processor = LogitsProcessor(c.vocab)
        never = forbidden(Tokenizer.load(Path(vllm_config.model_config.model) / "tokenizer.json"), c.vocab)
        self.register_buffer("never", never, persistent=False)

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths in layers that requests of this deployment leave at."""
        return self.config.exits if self.per_request else (self.layers,)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What vLLM's own server writes into a chat for an image."""
        return IMG if modality == "image" else None

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, *, patches: Tensor, grid: Tensor, size: Tensor, **_: Any) -> list[Tensor]:
        """[n, D] of each image, for pixels `patches` [sum n, V] at `grid` [sum n, 2] and `size` [images, 2] in patches."""
        x = self.patch_in(unit_pixels(patches, self.row_embed.dtype))
        x = x + self.row_embed[grid[:, 0]] + self.col_embed[grid[:, 1]]
        return list(x.split(size.prod(-1).tolist()))

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """[N, D] for token ids [N]; rows where `is_multimodal` [N] take the images' embeddings, in order."""
        x: Tensor = self.embed(input_ids) * math.sqrt(self.config.width)
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return x
        assert is_multimodal is not None
        return x.masked_scatter(is_multimodal[:, None].to(x.device), torch.cat(list(multimodal_embeddings)).to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Normed states [N, D], each at its exit."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        rope = rope_tables(positions, self.config, x.dtype)
        step = current_step() if self.per_request else None
        if step is not None:
            return self._each_to_its_depth(x, rope, step)
        for group in self.groups:
            x = group(x, rope)
        return self.exit_norms[str(self.layers)](x)

    def _each_to_its_depth(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        out = torch.zeros_like(x)
        at, x, rope = torch.arange(step.rows, device=x.device), x[: step.rows], _of(rope, slice(step.rows))
        left = depths.of_step(len(step.paged.starts) - 1, self.layers)
        for index, group in enumerate(self.groups):
            x, layers = group(x, rope), self.config.ends[index]
            stay = [r for r, depth in enumerate(left) if depth > layers]
            if len(stay) < len(left):
                out[at] = self.exit_norms[str(layers)](x)  # rows that go on are overwritten at their own exit
            if not stay:
                break
            if len(stay) < len(left):
                step.paged, rows = depths.narrowed(step.paged, stay)
                step.rows, left = len(rows), [left[r] for r in stay]
                at, x, rope = at[rows], x[rows], _of(rope, rows)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, V]; -inf for tokens that are never sampled. None on ranks that do not sample."""
        logits = self.logits_processor(self.head, hidden_states)
        return None if logits is None else logits.masked_fill_(self.never, -math.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names that were loaded. Raises CheckpointError for a tensor that the model does not know."""
        known, loaded, table = dict(self.named_parameters()), set[str](), {}
        for name, tensor in weights:
            if name.startswith(UNUSED) or self._beyond(name):
                continue
            if name.startswith("embed."):  # INT8: vLLM has no such embedding, so the table is kept as floating point
                table[name] = tensor
                continue
            if name not in known:
                raise CheckpointError(
                    "the model directory has an unknown tensor", got=name, do="export the model again"
                )
            parameter = known[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        weight, scale = table["embed.weight"], table.get("embed.weight_scale")
        weight = weight if scale is None else weight.float() * scale
        self.embed.weight_loader(self.embed.weight, weight)
        return loaded | {"embed.weight", "head.weight"} & known.keys()

    def _beyond(self, name: str) -> bool:
        """Is `name` a tensor of a layer or an exit that is not served?"""
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        return (kind == "groups" and int(number) >= len(self.groups)) or (
            kind == "exit_norms" and int(number) not in self.exits
        )


def _of(rope: Rope, rows: Any) -> Rope:
    return rope[0][rows], rope[1][rows]


def _load_heads(parameter: Tensor, loaded: Tensor) -> None:
    """This rank's share of a vector [H] over heads."""
    default_weight_loader(
        parameter, loaded.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
    )
