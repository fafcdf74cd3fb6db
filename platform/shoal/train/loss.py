"""The losses of one micro-batch, as sums: cross-entropy at every exit, and the next patch of an image.

Sums, never means: `step` divides by the counts of the whole global batch, so that the split into workers and micro-batches
does not change the gradient. `LossModel` is the root that FSDP shards, so that the tied head, which the loss calls, is
gathered once with the root and not at every exit. With a `teacher` it also says how far the net is from that one: what
training in INT8 minimises (decision 0003). Without one the early exits may learn from full depth, whose logits are then
computed once for all of them.

What an update may leave out or add (an exit that is not its turn, layers, self-distillation) is decided by `optim`, from seed
and step alone, so that all ranks and a resumed run do the same.

Letters: B rows, T tokens, E exits, D width, V vocabulary, n patches, M places that take a cross-entropy, p patch side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.inputs.tokenizer import PATCH_ID
from shoal.model.net import Net, unit_pixels

LOGITS_AT_ONCE = 2**25  # logits held at a time (128 MiB in fp32); beyond it they are computed again in backward
LOGITS_OF_GPU = 2**27  # the same on a GPU, where each part casts the table to bf16 again
ROWS_AT_ONCE = 1024  # of a CPU, whose cache holds their logits: 4,088 rows of 2,048 logits take 144 ms in place of 179
PATCH_EPS = 1e-2  # added to a patch's variance: blank patches must not turn into noise


class Sums(NamedTuple):
    """What `LossModel` returns. A NamedTuple because FSDP finds the outputs it must hook through pytree."""

    ce: Tensor  # [E, B] cross-entropy of each row, nats, summed over its targets; 0 at an exit that was left out
    kl: Tensor  # [E] KL(teacher || exit), nats, summed over all targets; 0 where it was not asked for
    patch: Tensor  # [] squared error of the predicted patches, each the mean over its values
    patch_apart: Tensor  # [] the same, from what the teacher predicts; 0 without a teacher
    reference: Tensor | None = None  # [E, B] as `ce`, of the teacher; where it was asked for


class Places(NamedTuple):
    """Where a micro-batch takes losses. They are found where the batch lies before it is moved: a device that is asked how many
    there are is waited for."""

    rows: Tensor  # [M] of what takes a cross-entropy
    columns: Tensor  # [M]
    patch_rows: Tensor  # [m] of the token before each patch that is predicted
    patch_columns: Tensor  # [m]
    patches: Tensor  # [m]: the number of that patch in the batch

    @classmethod
    def of(cls, tokens: Tensor, targets: Tensor, docs: Tensor, patches: Tensor) -> Places:
        """For a batch as `LossModel.forward` takes it."""
        predicted = predicted_patches(tokens, docs, patches)
        # the place that predicts stands one to the left
        before = F.pad(predicted[:, 1:], (0, 1)).nonzero(as_tuple=True)
        rows, columns = (targets >= 0).nonzero(as_tuple=True)
        return cls(rows, columns, before[0], before[1], predicted[tokens == PATCH_ID].nonzero()[:, 0])

    def to(self, device: torch.device) -> Places:
        """The same on `device`."""
        return Places(*(each.to(device, non_blocking=True) for each in self))


class Taught(NamedTuple):
    """What an exit is compared with."""

    net: Net
    layers: int
    hidden: Tensor  # [M, D]


class LossModel(nn.Module):
    """`net` and its training losses at `exits` (layers; default: every exit of the config). `teacher`: a net of the same
    shape that is frozen; it is sharded with the rest, but no part of the state, since whoever resumes has it already. With
    `trained_only` neither are the frozen weights of `net`, as long as that is set."""

    def __init__(
        self, net: Net, exits: Sequence[int] | None = None, teacher: Net | None = None, *, trained_only: bool = False
    ) -> None:
        super().__init__()
        self.trained_only = trained_only
        self.low = True  # may a GPU compute in bf16?
        self.net = net
        self.exits = tuple(net.config.exits if exits is None else exits)
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.register_state_dict_post_hook(_without_frozen)  # type: ignore[no-untyped-call]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        docs: Tensor,
        patches: Tensor,
        grid: Tensor,
        *,
        exits: Sequence[int] | None = None,
        skip: Collection[int] = (),
        distill: bool = False,
        reference: bool = False,
        places: Places | None = None,
    ) -> Sums:
        """tokens, targets (-1: no loss) and docs (-1: padding) [B, T]; patches [n, 3p^2] uint8 in the order of their
        tokens, grid [n, 2]. `exits`: those of the model's whose loss is taken (default: all); `skip`: layers to leave out;
        `distill`: also compare each exit with the teacher's, or without a teacher the early exits with full depth; `reference`:
        also take the teacher's own losses. All ranks must be given the same. `places`: of this batch [looked for here]."""
        net, last = self.net, self.net.config.layers
        wanted_exits = {*self.exits, last}
        hidden = net(tokens, patches, grid, docs, exits=wanted_exits, skip=skip)
        places = places or Places.of(tokens, targets, docs, patches)
        rows, columns = places.rows, places.columns  # the head is a large part of the work: only where needed
        wanted, at = targets[rows, columns], {e: h[rows, columns] for e, h in hidden.items()}
        taught: dict[int, Taught] = {}
        teacher_hidden = None
        if distill and self.teacher is not None:
            with torch.no_grad():
                taught_at = self.teacher(tokens, patches, grid, docs, exits=wanted_exits)
            taught = {e: Taught(self.teacher, e, h[rows, columns]) for e, h in taught_at.items()}
            teacher_hidden = taught_at[last]
        run = [e for e in self.exits if exits is None or e in exits]
        if distill and self.teacher is None:
            losses = self._from_full_depth(at, wanted, [e for e in run if e != last])
        else:
            losses = {e: self._losses(at[e], wanted, e, taught.get(e)) for e in run}
        parts = [_exact(at[last].new_zeros(2, len(tokens)))] * len(self.exits)
        for place, e in enumerate(self.exits):
            if e in run:
                parts[place] = parts[place].index_add(1, rows, losses[e])
        ce, kl = (torch.stack([part[kind] for part in parts]) for kind in (0, 1))  # views would lose FSDP's hooks
        theirs = self._of_teacher((tokens, patches, grid, docs), targets, places, run) if reference else None
        if not net.config.image_size:
            return Sums(ce, kl.sum(1), ce.new_zeros(()), ce.new_zeros(()), theirs)
        patch, patch_apart = self._patch_errors(hidden[last], teacher_hidden, places, patches)
        # A micro-batch without images must still give the patch parameters a gradient (of zero): under FSDP a rank
        # that leaves some out would make the others wait for ever.
        nothing = net.embed_patches(patches[:0], grid[:0]).sum()
        return Sums(ce, kl.sum(1), patch + nothing, patch_apart + nothing, theirs)

    @torch.no_grad()
    def _of_teacher(self, inputs: tuple[Tensor, ...], targets: Tensor, places: Places, run: Collection[int]) -> Tensor:
        """[E, B]: the teacher's cross-entropy of each row of `inputs`, as a net takes them; 0 at exits not in `run`."""
        assert self.teacher is not None
        hidden, rows, columns = self.teacher(*inputs, exits=run), places.rows, places.columns
        wanted = targets[rows, columns]
        found = _exact(hidden[max(run)].new_zeros(len(self.exits), len(targets)))
        for place, e in enumerate(self.exits):
            if e not in run:
                continue
            at_once = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // self.net.config.vocab))
            states = hidden[e][rows, columns].split(at_once)
            for some, its, at in zip(states, wanted.split(at_once), rows.split(at_once), strict=True):
                nll = F.cross_entropy(_exact(self.teacher.head(some, e)), its, reduction="none")
                found[place].index_add_(0, at, nll)
        return found

    def _losses(self, hidden: Tensor, wanted: Tensor, layers: int, taught: Taught | None) -> Tensor:
        """[2, M]: cross-entropy of `hidden` [M, D] against `wanted` [M], and KL(`taught` || this exit) where it is given."""
        at_once = max(1, logits_at_once(hidden.device.type) // self.net.config.vocab)
        again = len(wanted) > at_once
        if hidden.device.type == "cpu":
            at_once = min(at_once, ROWS_AT_ONCE)
        theirs = repeat(None) if taught is None else (taught._replace(hidden=h) for h in taught.hidden.split(at_once))
        parts = zip(hidden.split(at_once), wanted.split(at_once), theirs, strict=False)
        if not again:
            return torch.cat([self._losses_at_once(h, w, layers, t) for h, w, t in parts], dim=1)
        return torch.cat(
            [checkpoint(self._losses_at_once, h, w, layers, t, use_reentrant=False) for h, w, t in parts], dim=1
        )

    def _losses_at_once(self, hidden: Tensor, wanted: Tensor, layers: int, taught: Taught | None) -> Tensor:
        """[2, M] in fp32 or better."""
        logits = _exact(self.net.head(hidden, layers))
        nll = F.cross_entropy(logits, wanted, reduction="none")
        if taught is None:
            return torch.stack([nll, torch.zeros_like(nll)])
        with torch.no_grad():
            theirs = _exact(taught.net.head(taught.hidden, taught.layers)).log_softmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        return torch.stack([nll, kl])

    def _from_full_depth(self, at: Mapping[int, Tensor], wanted: Tensor, early: Sequence[int]) -> dict[int, Tensor]:
        """For each of `early` and for full depth [2, M], as `_losses`; `at`: hidden states [M, D] of each."""
        order = (*early, self.net.config.layers)
        at_once = max(1, logits_at_once(wanted.device.type) // (self.net.config.vocab * len(order)))
        again = len(wanted) > at_once
        if wanted.device.type == "cpu":
            at_once = min(at_once, ROWS_AT_ONCE)
        parts = []
        for some, *hidden in zip(wanted.split(at_once), *(at[e].split(at_once) for e in order), strict=True):
            if again:
                parts.append(checkpoint(self._exits_at_once, some, order, *hidden, use_reentrant=False))
            else:
                parts.append(self._exits_at_once(some, order, *hidden))
        return dict(zip(order, torch.cat(parts, dim=2), strict=True))

    def _exits_at_once(self, wanted: Tensor, order: Sequence[int], *hidden: Tensor) -> Tensor:
        """[E, 2, M] in fp32 or better; the last of `order` is full depth."""
        full = _exact(self.net.head(hidden[-1], order[-1]))
        theirs = full.detach().log_softmax(-1)
        found = []
        for e, states in zip(order, hidden, strict=True):
            logits = full if e == order[-1] else _exact(self.net.head(states, e))
            nll = F.cross_entropy(logits, wanted, reduction="none")
            kl = torch.zeros_like(nll)
            if e != order[-1]:
                kl = F.kl_div(logits.log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
            found.append(torch.stack([nll, kl]))
        return torch.stack(found)

    def _patch_errors(
        self, hidden: Tensor, taught: Tensor | None, places: Places, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared errors against the patches that come, and against what the teacher says of them, whose states at full depth
        are `taught`."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        where, target = (places.patch_rows, places.patch_columns), _centred(unit_pixels(patches, exact)[places.patches])
        guess = _guessed(self.net, hidden[where]).to(exact)
        error = (guess - target).square().mean(-1).sum()
        if taught is None or self.teacher is None:
            return error, torch.zeros_like(error)
        with torch.no_grad():
            theirs = _guessed(self.teacher, taught[where]).to(exact)
        return error, (guess - theirs).square().mean(-1).sum()


def logits_at_once(device: str) -> int:
    """How many logits are held at a time on a device of this type."""
    return LOGITS_OF_GPU if device == "cuda" else LOGITS_AT_ONCE


def _guessed(net: Net, hidden: Tensor) -> Tensor:
    guess: Tensor = net.patch_head(net.exit_norms[str(net.config.layers)](hidden))
    return guess


def _without_frozen(module: LossModel, state: dict[str, Tensor], prefix: str, _: object) -> None:
    frozen = {prefix + name for name, p in module.named_parameters() if module.trained_only and not p.requires_grad}
    for name in [name for name in state if name.startswith(f"{prefix}teacher.") or name in frozen]:
        del state[name]


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def predicted_patches(tokens: Tensor, docs: Tensor, patches: Tensor) -> Tensor:
    """bool [B, T]: patch tokens that the token before them, in the same document, predicts. `patches` [n, 3p^2]: those of the
    batch; where there are none, no token stands for one, whatever its id is in an open model's vocabulary."""
    predicted = (tokens == PATCH_ID) & (docs >= 0) & (len(patches) > 0)
    predicted[:, 1:] &= docs[:, 1:] == docs[:, :-1]
    predicted[:, 0] = False
    return predicted


def patch_targets(tokens: Tensor, docs: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next patch is predicted, bool [B, T], and the targets there, [m, 3p^2]: `pixels` [n, 3p^2] in -1..1 (in
    the order of their tokens), each patch with its own mean and variance removed."""
    predicted = predicted_patches(tokens, docs, pixels)
    return F.pad(predicted[:, 1:], (0, 1)), _centred(pixels[predicted[tokens == PATCH_ID]])


def _centred(chosen: Tensor) -> Tensor:
    centred = chosen - chosen.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + PATCH_EPS)
