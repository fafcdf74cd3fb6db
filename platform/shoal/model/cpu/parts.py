"""What `decode.layer` is given, by name. It takes these as plain tuples and names them itself: at every call numba finds the
types of a layer's arrays, in plain tuples in 1 us, in named ones in 6.

Letters: as in `decode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A weight [O, D] in fp, or in int8 with what `integers.linear` reads beside it (in fp empty)."""

    weight: Any
    shift: Any  # int32 [O]
    scale: Any  # fp32 [O]


class Layer(NamedTuple):
    """The weights of one layer."""

    attention_norm: Any  # [D]
    qkv: Matrix  # [(H + 2 Hk) d, D]
    bias: Any  # [(H + 2 Hk) d]; of length 0 for none
    q_norm: Any  # [d] for each head; [H d] for all heads together; of length 0 for none
    k_norm: Any  # [d], [Hk d] or of length 0
    out: Matrix  # [D, H d]
    mlp_norm: Any  # [D]
    up: Matrix  # [2F, D], gate first
    down: Matrix  # [D, F]

    def flat(self) -> tuple[Any, ...]:
        """All of its tensors, in order."""
        norm, qkv, bias, q, k, out, between, up, down = self
        return (norm, *qkv, bias, q, k, *out, between, *up, *down)


class Form(NamedTuple):
    """What else a layer is, beside its weights."""

    eps: float  # of its norms
    half: int  # pairs of dims of a head that rope turns, dim i with dim i + half; 0 for none
    after: bool  # its norms stand behind attention and MLP, not before them


class Rows(NamedTuple):
    """The rows of a step, the same for all layers of a group."""

    keep: Any  # [N, d]: what q and k are turned by (`block.rope_tables`)
    cross: Any  # [N, d]
    positions: Any  # [N]
    slots: Any  # [N]: where the row's K/V go; -1 where they are stored already
    tables: Any  # [R, M]: units of each request's pages
    short: Any  # the rows that are attended one by one
    requests: Any  # the request of each of those
    block: int  # S


class Sight(NamedTuple):
    """How far a layer looks (`reach.Reach`)."""

    window: int
    top_k: int
    sinks: int
    gamma: Any  # [H]; of length 0 for a layer without two branches
    bias: Any  # [H]; of length 0 but where there is one softmax over both
    dense: int
