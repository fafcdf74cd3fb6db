"""vLLM's attention backend for Shoal models: `model.paged` over vLLM's K/V memory.

vLLM's K/V of a layer, [blocks, Hk, N, 2d], is what our engine calls a group's `kv`: one of its blocks is a page of ours, block
0 is the null unit, slot -1 is padding. All layers are one full-attention group: the window lies inside the operation, so
vLLM never frees what the global branch may still read.

Summaries of select blocks lie beside vLLM's memory, at the same block numbers, and are written with the key that completes
their block. So they follow a block through prefix sharing, reuse and preemption: what is shared was complete, and what is
reused is written again before it counts. vLLM does not know of this memory: m / (2 d S) of its own in numbers, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from shoal.model.cache import PagedStep
from shoal.model.gpu import launch
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import Reach
from shoal.vllm_plugin import graphs


class HybridBackend(AttentionBackend):  # type: ignore[misc]
    """Given to each of our layers (``Attention(attn_backend=...)``); other models in the process keep theirs."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a name that vLLM's enumeration of backends knows

    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]  # of the model's select block: `settings.check`

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # contiguous a layer, heads before slots: what `model.paged` views


@dataclass
class Step:
    """What one step of vLLM means to our layers. `paged` is changed where the step goes on with fewer requests."""

    paged: PagedStep
    rows: int  # tokens of the step; without padding, where it is no step that vLLM may replay


def current_step() -> Step | None:
    """The step that runs; None while vLLM measures memory."""
    metadata = get_forward_context().attn_metadata
    found = next(iter(metadata.values()), None) if isinstance(metadata, dict) else None
    return found if isinstance(found, Step) else None


class StepBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Tensors of each step anew; of one that vLLM may replay, in memory that stays (`graphs.Kept`)."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page = kv_cache_spec.block_size
        self.block = vllm_config.model_config.hf_config.shape.block
        self.kept = graphs.kept(vllm_config, self.page, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of steps whose requests all decode, where `graphs.possible`."""
        device = torch.empty(0, device=vllm_config.device_config.device).device  # with its number
        can = graphs.possible(vllm_config, kv_cache_spec.block_size, device)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if can else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        c = common_attn_metadata
        if self.kept is not None and self.kept.takes(c):
            return Step(self.kept.fill(c), c.num_reqs)
        starts = c.query_start_loc_cpu[: c.num_reqs + 1].tolist()
        rows = starts[-1]
        pages = -(-c.max_seq_len // self.page)
        paged = PagedStep(
            positions=_positions(c, starts)[:rows],
            slots=c.slot_mapping[:rows].long(),
            tables=c.block_table_tensor[: c.num_reqs, :pages].long().contiguous(),
            starts=starts,
            page=self.page,
            block=self.block,
        )
        return Step(paged, rows)


def _positions(c: CommonAttentionMetadata, starts: list[int]) -> Tensor:
    if c.positions is not None:
        return c.positions.long()
    lengths = c.query_start_loc[1 : c.num_reqs + 1] - c.query_start_loc[: c.num_reqs]
    first = (c.seq_lens[: c.num_reqs] - lengths).repeat_interleave(lengths)
    within = torch.arange(starts[-1], device=first.device) - c.query_start_loc[: c.num_reqs].repeat_interleave(lengths)
    return (first + within).long()


class HybridImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer. `reach` gives how far it looks (weights come later than this is made), `values` are the
    numbers of a block's summary."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_: Any,
        reach: Callable[[], Reach], block: int, values: int,
    ) -> None:  # fmt: skip
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.reach, self.block, self.values = reach, block, values
        self._summaries = torch.empty(0)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`output` [N, H, d], filled; `query` [N, H, d], `key` and `value` [N, Hk, d], `kv_cache` [blocks, Hk, N, 2d]."""
        if attn_metadata is None:  # vLLM measures memory: nothing is stored yet
            return output.zero_()
        rows, step = attn_metadata.rows, attn_metadata.paged
        given = query[:rows], key[:rows], value[:rows], kv_cache, self._beside(kv_cache), step
        try:
            output[:rows] = self._attend(*given)
        except Exception as error:
            launch.give_up(query.device, error)
            output[:rows] = self._attend(*given)
        return output

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep) -> Tensor:
        """[N, H, d] for q [N, H, d], after k and v [N, Hk, d] were stored."""
        if launch.usable(k):
            launch.store(k, v, kv, summaries, step)
        else:
            graphs.need_kernels(k.device)
            write_kv(k, v, kv, summaries, step)
        return paged_attention(q, kv, summaries, step, self.reach())

    def _beside(self, kv: Tensor) -> Tensor:
        """The summaries of `kv`'s blocks, [blocks, Hk, N/S, m]."""
        shape = (*kv.shape[:2], kv.shape[2] // self.block, self.values)
        if self._summaries.shape != shape or self._summaries.device != kv.device:
            exact = torch.promote_types(kv.dtype, torch.float32)
            self._summaries = torch.full(shape, torch.nan, dtype=exact, device=kv.device)
        return self._summaries
