"""Held-out prompts and what each exit loses on their answers: what a router is fitted to, and what routing is measured on.

Two kinds of held-out data give them, told apart by the path as in `feed`. Of chats a prompt is what stands before the first
answer, and its task is the chat's. Of a folder of shards it is the beginning of a document, of any length that the model was
trained on, and its answer is what follows; its task is the modality, and an image is always part of the prompt.

Letters: D width, A early exits, M prompts, n tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.data import remote
from shoal.data.batches import spaced
from shoal.data.chats.heldout import questions
from shoal.data.documents import MODALITIES
from shoal.data.pack import PADDING
from shoal.data.shards import Rows, open_index
from shoal.errors import DataError
from shoal.evaluate.halves import asked_groups
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID
from shoal.model.described import Described
from shoal.model.model import IMAGE_IDS, Model
from shoal.model.net import Net
from shoal.model.router import features, page_sums

SHORTEST = 4  # tokens of a prompt, and of an answer, that a document is cut into
LONGEST_PROMPT = 1024  # tokens, so that measuring a large model's prompts ends
LONGEST_ANSWER = 64  # tokens; the mean over so many hardly moves with more
LOOKED_AT = 4  # packed rows for each prompt that is wanted of them: half of the groups are left out, and short pieces


@dataclass(frozen=True)
class Heldout:
    """A held-out prompt with its answer, told apart by ``answer`` of `row`, and the group that it is of."""

    row: Encoded
    group: int


ByTask = dict[str, list[Heldout]]  # task -> prompts


@dataclass(frozen=True)
class Rest:
    """Of the answers to prompts what comes after the first n tokens, for a second look."""

    after: int  # n
    features: Tensor  # [M, 2D + 3], what the router sees after n of them; 0 of an answer that is no longer
    head: Tensor  # [M, A] gaps on the first n
    gaps: Tensor  # [M, A] on the others; 0 where there are none

    @classmethod
    def of(cls, parts: Sequence[Rest | None]) -> Rest | None:
        """Parts, one after the other; None where they are none."""
        there = [part for part in parts if part is not None]
        if not there:
            return None
        every = [[part.features, part.head, part.gaps] for part in there]
        return cls(there[0].after, *(torch.cat(some) for some in zip(*every, strict=True)))

    def some(self, at: Tensor) -> Rest:
        return Rest(self.after, self.features[at], self.head[at], self.gaps[at])


@dataclass(frozen=True)
class Prompts:
    """Prompts with what their exits really lost."""

    features: Tensor  # [M, 2D + 3], what the router sees
    gaps: Tensor  # [M, A] nats a token
    lengths: Tensor  # [M] tokens
    answers: Tensor  # [M] tokens of each answer, with what ends it
    tasks: tuple[str, ...]  # of each
    groups: Tensor  # [M] the group of each
    rest: Rest | None = None  # where it was asked for

    def some(self, at: Tensor) -> Prompts:
        """Those at the places `at`, or for which it is true."""
        places = torch.arange(len(self.tasks))[at].tolist()
        rest = None if self.rest is None else self.rest.some(at)
        tasks = tuple(self.tasks[place] for place in places)
        lengths, answers = self.lengths[at], self.answers[at]
        return Prompts(self.features[at], self.gaps[at], lengths, answers, tasks, self.groups[at], rest)


def heldout_rows(model: Model | Described, heldout: str | Path, most: int, *, asked: bool | None) -> ByTask:
    """The rows of `heldout` that `model` can read, of those groups that are `asked` (`halves`), or of the others; None: of all.
    At most `most` a task, evenly spaced. Raises DataError when `heldout` cannot be read."""
    heldout = remote.local(heldout)
    if heldout.is_dir():
        return _documents(model, heldout, most, asked)
    half = asked_groups(heldout)
    found = questions(heldout, model.tokenizer, model.config, model.chat_template)
    rows = {
        task: [
            Heldout(q.row, q.group)
            for q in some
            if asked in (None, q.group in half) and any(q.row.answer) and len(q.row.ids) <= model.config.context
        ]
        for task, some in found.items()
    }
    return {task: [some[place] for place in spaced(len(some), most)] for task, some in rows.items() if some}


def measured(net: Net, rows: Mapping[str, Sequence[Heldout]], after: int | None = None) -> Prompts:
    """What the router would see of the prompts of `rows`, and their gaps on the answers; with `after` also what a second look
    would see after so many tokens of the answers, and the gaps before and behind it."""
    return together(rows, [looked_at(net, encoded(rows), after)])


def encoded(rows: Mapping[str, Sequence[Heldout]]) -> list[Encoded]:
    """The rows alone, task after task."""
    return [held.row for some in rows.values() for held in some]


def together(rows: Mapping[str, Sequence[Heldout]], found: Sequence[tuple[Tensor, Tensor, Rest | None]]) -> Prompts:
    """`rows` with what `looked_at` gave of them, a part after the other."""
    tasks = tuple(task for task, some in rows.items() for _ in some)
    lengths = torch.tensor([row.answer.index(True) for row in encoded(rows)])
    answers = torch.tensor([sum(row.answer) for row in encoded(rows)])
    groups = torch.tensor([held.group for some in rows.values() for held in some])
    features, lost = (torch.cat(parts) for parts in zip(*(part[:2] for part in found), strict=True))
    return Prompts(features, lost, lengths, answers, tasks, groups, Rest.of([part[2] for part in found]))


def gaps(net: Net, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Router features [M, 2D + 3] and measured gaps [M, A], nats a token on the answer only; both on the CPU.

    Each row's prompt ends where its first answer token begins; rows without an answer are an error of the caller.
    """
    return looked_at(net, rows)[:2]


@torch.inference_mode()
def looked_at(net: Net, rows: Sequence[Encoded], after: int | None = None) -> tuple[Tensor, Tensor, Rest | None]:
    """As `gaps`, and with `after` the rest of the answers; on the CPU."""
    config = net.config
    seen, again, parts = [], [], []
    for row in rows:
        start = row.answer.index(True)
        tokens = torch.tensor(row.ids, device=net.device)
        patches, grid = _patch_tensors(row, net.device)
        hidden = net(tokens[None], patches, grid, exits=config.exits)
        answer = torch.tensor(row.answer)[1:].nonzero().flatten().to(net.device)  # places that predict an answer token
        losses = torch.stack([_nll(net, hidden[e][0, answer], e, tokens[answer + 1]) for e in config.exits])
        gap = losses[:-1] - losses[-1:]  # [A, answer tokens]
        state = hidden[config.exits[0]][0]
        seen.append(_seen(net, state, tokens, start))
        look = len(answer) if after is None else min(after, len(answer))
        longer = look < len(answer)
        again.append(_seen(net, state, tokens, start + look) if longer else torch.zeros_like(seen[-1]))
        behind = gap[:, look:].mean(1) if longer else torch.zeros_like(gap[:, 0])
        parts.append(torch.stack([gap.mean(1), gap[:, :look].mean(1), behind]))
    whole, head, behind = torch.stack(parts, dim=1).float().cpu()
    rest = None if after is None else Rest(after, torch.stack(again).float().cpu(), head, behind)
    return torch.stack(seen).float().cpu(), whole, rest


def _nll(net: Net, hidden: Tensor, layers: int, targets: Tensor) -> Tensor:
    return F.cross_entropy(net.head(hidden, layers).float(), targets, reduction="none")


def _seen(net: Net, state: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Features of the first `length` of `tokens`, whose states after group 1 are `state`."""
    return features(page_sums(net, state[:length], tokens[:length]), state[length - 1], length)


def _patch_tensors(row: Encoded, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """A row's patches [n, 3p^2] and their grid [n, 2] as tensors, or two Nones."""
    values = row.patches
    if values is None:
        return None, None
    return torch.from_numpy(values).to(device), torch.from_numpy(media.grid(row.ids)).to(device)


def _documents(model: Model | Described, directory: Path, most: int, asked: bool | None) -> ByTask:
    index = open_index(directory)
    if index.tokenizer_sha256 != model.tokenizer.sha256:
        raise DataError(
            f"{directory} was made with another tokenizer than the model's", do="prepare it with the model's"
        )
    half = asked_groups(directory)
    found: ByTask = {}
    for modality in MODALITIES:
        rows, draws = Rows(directory, index, "heldout", modality), random.Random(f"prompts of {modality}")
        looked_at = spaced(len(rows), LOOKED_AT * most)
        every = (held for place in looked_at for held in _cut(*rows[place], rows.groups(place), draws))
        cut = [held for held in every if asked in (None, held.group in half)]
        if cut:
            found[modality] = [cut[place] for place in spaced(len(cut), most)]
    return found


def _cut(
    tokens: np.ndarray, docs: np.ndarray, patches: np.ndarray, groups: list[int], draws: random.Random
) -> Iterator[Heldout]:
    """The documents of a packed row, each cut into a prompt and an answer; those that are too short for it are left out. A
    prompt is as likely to have between 8 and 16 tokens as between 64 and 128."""
    borders = [0, *(np.flatnonzero(np.diff(docs)) + 1).tolist(), len(docs)]
    before = np.concatenate([[0], np.cumsum(tokens == PATCH_ID)])  # patches before each place
    for start, end in pairwise(borders):
        ids = tokens[start:end]
        of_image = np.flatnonzero(np.isin(ids, list(IMAGE_IDS)))
        least = max(SHORTEST, int(of_image[-1]) + 1 if len(of_image) else 0)
        longest = max(least, min(len(ids) - SHORTEST, LONGEST_PROMPT))
        if docs[start] == PADDING or least > len(ids) - SHORTEST:
            continue
        prompt = min(longest, int(least * ((longest + 1) / least) ** draws.random()))
        kept = ids[: prompt + LONGEST_ANSWER].tolist()
        images = [_image(kept, patches[before[start] : before[end]])] if len(of_image) else []
        answer = [place >= prompt for place in range(len(kept))]
        yield Heldout(Encoded(kept, images, answer), groups[docs[start]])


def _image(ids: list[int], values: np.ndarray) -> media.Patches:
    rows, cols = (media.grid(ids).max(0) + 1).tolist()
    return media.Patches(values, rows, cols)
