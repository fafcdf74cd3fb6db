"""Steps that vLLM replays as CUDA graphs: of requests that all decode, one row each, at one depth.

vLLM records our network over b rows, once for each b of its own, and replays that for fewer, with padding behind them. A
graph holds addresses and no Python. So whatever differs between two steps lies in memory that stays where it is (`Kept`). It
is filled when vLLM asks for the metadata of a step, in the order of the device's stream: nothing is waited for. A row of
padding has slot -1 and stores nothing; it reads the first slot of the null unit, and nobody reads what it gives. Tables are
as wide as the longest text that is served, as a graph has its sizes from them.

Letters: b rows of a graph, B of the largest, R requests of a step, M pages of the longest text, H query heads, Hk KV heads, d
head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from shoal.config import ModelConfig
from shoal.errors import ResourceError
from shoal.model.cache import PagedStep, Rows
from shoal.model.gpu import launch
from shoal.model.reach import Reach
from shoal.vllm_plugin import PER_REQUEST

OFF = "turn graphs off: --enforce-eager, in a serve config `vllm: {enforce_eager: true}`"


class Kept:
    """positions [B], slots [B] and tables [B, M] of the step that is replayed next."""

    def __init__(self, most: int, pages: int, page: int, block: int, device: torch.device) -> None:
        """For `most` rows and `pages` pages of a table, of `page` slots each and blocks of `block`."""
        self.most, self._page, self._block = most, page, block
        self._positions = torch.zeros(most, dtype=torch.long, device=device)
        self._slots = torch.full_like(self._positions, -1)
        self._tables = torch.zeros(most, pages, dtype=torch.long, device=device)
        self._numbered = torch.arange(most, dtype=torch.int32, device=device)

    def takes(self, c: CommonAttentionMetadata) -> bool:
        """Is it a step that may be replayed: one row a request, padding included?"""
        return c.max_query_len == 1 and c.num_reqs == c.num_actual_tokens <= self.most and c.positions is not None

    def fill(self, c: CommonAttentionMetadata) -> PagedStep:
        """The step of `c`, which `takes` allows, over all its rows. What `c` says of padding is not relied on: the memory of
        vLLM has there what earlier steps left."""
        b, r, pages = c.num_reqs, int(c.query_start_loc_cpu[c.num_reqs]), self._tables.shape[1]
        assert c.positions is not None
        self._positions[:r].copy_(c.positions[:r])
        self._slots[:r].copy_(c.slot_mapping[:r])
        self._tables[:r].copy_(c.block_table_tensor[:r, :pages])
        if r < b:
            self._positions[r:b].zero_()
            self._slots[r:b].fill_(-1)
            self._tables[r:b].zero_()
        return self.step(b)

    def step(self, b: int) -> PagedStep:
        """What a graph of b rows reads. Made anew for each, as it keeps what is computed of it while it is recorded."""
        positions = self._positions[:b]
        shared = Rows(positions, list(range(b + 1)), self._page, self._block)
        shared.once("requests", lambda: self._numbered[:b])
        return PagedStep(
            positions, self._slots[:b], self._tables[:b], shared.starts, self._page, self._block, shared=shared
        )


def kept(vllm_config: VllmConfig, page: int, device: torch.device) -> Kept | None:
    """Memory for the graphs that vLLM is to make of our model, with pages of `page` tokens; None where it makes none."""
    how, most = vllm_config.compilation_config, vllm_config.scheduler_config.max_num_seqs
    sizes = [size for size in how.cudagraph_capture_sizes or () if size <= most]
    if not (sizes and how.cudagraph_mode.has_full_cudagraphs() and possible(vllm_config, page, device)):
        return None
    return Kept(max(sizes), _pages(vllm_config, page), page, vllm_config.model_config.hf_config.shape.block, device)


def possible(vllm_config: VllmConfig, page: int, device: torch.device) -> bool:
    """Can a step of this deployment be recorded? Not with depth per request, where requests leave the step between layers; nor
    without our kernels, as torch's operators ask a device how many blocks are complete. Kernels that `device` refuses are
    found here, and said in the log, as nothing takes their place within a graph."""
    model, pages = vllm_config.model_config, _pages(vllm_config, page)
    c: ModelConfig = model.hf_config.shape
    if model.hf_config.depth == PER_REQUEST or device.type not in launch.ON:
        return False
    if pages * page // c.block > launch.MOST_BLOCKS:
        return False
    with torch.inference_mode():
        try:
            return _tried(c, vllm_config.parallel_config.tensor_parallel_size, page, pages, model.dtype, device)
        except Exception as error:
            launch.give_up(device, error)
            return False


def need_kernels(device: torch.device) -> None:
    """Raises ResourceError while a graph is recorded on `device`: torch's operators, which are about to run, wait for it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ResourceError("a CUDA graph of a Shoal model", got="a device that refuses our kernels", do=OFF)


def _pages(vllm_config: VllmConfig, page: int) -> int:
    return -(-int(vllm_config.model_config.max_model_len) // page)


def _tried(c: ModelConfig, ranks: int, page: int, pages: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Run what a layer of each kind launches, for one request and for as many as keep a device busy; nothing is stored. Raises
    what a kernel raises; False where kernels are not to be used."""
    heads, kv_heads = c.heads // ranks, c.kv_heads // ranks
    kv = torch.zeros(1, kv_heads, page, 2 * c.head_dim, dtype=dtype, device=device)
    if not launch.usable(kv):
        return False
    exact = torch.promote_types(dtype, torch.float32)
    summaries = torch.zeros(1, kv_heads, page // c.block, c.summary_values, dtype=exact, device=device)
    for rows in (1, -(-launch.BUSY // kv_heads) + 1):
        step = Kept(rows, pages, page, c.block, device).step(rows)
        x = kv.new_zeros(rows, heads + 2 * kv_heads, c.head_dim)
        q, k, v = x.split([heads, kv_heads, kv_heads], dim=1)
        for kind in sorted({c.attention_kind(layer) for layer in range(c.layers)}):
            gamma: Any = torch.zeros(heads, device=device) if kind == "H" else None
            launch.store(k, v, kv, summaries, step)
            launch.attend(q, kv, summaries, step, Reach(c.window, c.top_k, c.sinks, gamma))
    return True
