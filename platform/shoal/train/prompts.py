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
from shoal.data.documents import MODALITIES
from shoal.data.pack import PADDING
from shoal.data.shards import Rows, open_index
from shoal.errors import DataError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID
from shoal.model.depth import features, page_sums
from shoal.model.model import IMAGE_IDS, Model
from shoal.model.net import Net
from shoal.train.evaluate import questions

SHORTEST = 4  # tokens of a prompt, and of an answer, that a document is cut into
LONGEST_PROMPT = 1024  # tokens, so that measuring a large model's prompts ends
LONGEST_ANSWER = 64  # tokens; the mean over so many hardly moves with more

ByTask = dict[str, list[Encoded]]  # task -> rows, each a prompt and its answer, told apart by ``answer``


@dataclass(frozen=True)
class Prompts:
    """Prompts with what their exits really lost."""

    features: Tensor  # [M, 2D + 3], what the router sees
    gaps: Tensor  # [M, A] nats a token
    lengths: Tensor  # [M] tokens
    tasks: tuple[str, ...]  # of each


def heldout_rows(model: Model, heldout: str | Path, most: int) -> ByTask:
    """The rows of `heldout` that `model` can read, in the order of the file; of shards at most `most` a task, evenly spaced.
    Raises DataError when `heldout` cannot be read."""
    if remote.is_remote(heldout):
        heldout = remote.local(str(heldout))
    if Path(heldout).is_dir():
        return _documents(model, Path(heldout), most)
    found = questions(heldout, model.tokenizer, model.config, model.chat_template)
    fits = {task: [q.row for q in asked if len(q.row.ids) <= model.config.context] for task, asked in found.items()}
    return {task: [row for row in rows if any(row.answer)] for task, rows in fits.items()}


def measured(net: Net, rows: Mapping[str, Sequence[Encoded]]) -> Prompts:
    """What the router would see of the prompts of `rows`, and their gaps on the answers."""
    every = [(task, row) for task, some in rows.items() for row in some]
    lengths = torch.tensor([row.answer.index(True) for _, row in every])
    return Prompts(*gaps(net, [row for _, row in every]), lengths, tuple(task for task, _ in every))


@torch.inference_mode()
def gaps(net: Net, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Router features [M, 2D + 3] and measured gaps [M, A], nats a token on the answer only.

    Each row's prompt ends where its first answer token begins; rows without an answer are an error of the caller.
    """
    config = net.config
    early, first, seen = config.exits[:-1], config.exits[0], []
    lost = []
    for row in rows:
        start = row.answer.index(True)
        tokens = torch.tensor(row.ids)
        patches, grid = _patch_tensors(row)
        hidden = net(tokens[None], patches, grid, exits=config.exits)
        answer = torch.tensor(row.answer)[1:].nonzero().flatten()  # places that predict an answer token
        losses = [F.cross_entropy(net.head(hidden[e][0, answer], e).float(), tokens[answer + 1]) for e in config.exits]
        state = hidden[first][0, :start]
        seen.append(features(page_sums(net, state, tokens[:start]), state[-1], start))
        lost.append(torch.stack([loss - losses[-1] for loss in losses[: len(early)]]))
    return torch.stack(seen).float(), torch.stack(lost).float()


def _patch_tensors(row: Encoded) -> tuple[Tensor | None, Tensor | None]:
    """A row's patches [n, 3p^2] and their grid [n, 2] as tensors, or two Nones."""
    values = row.patches
    if values is None:
        return None, None
    return torch.from_numpy(values), torch.from_numpy(media.grid(row.ids))


def _documents(model: Model, directory: Path, most: int) -> ByTask:
    index = open_index(directory)
    if index.tokenizer_sha256 != model.tokenizer.sha256:
        raise DataError(
            f"{directory} was made with another tokenizer than the model's", do="prepare it with the model's"
        )
    found: ByTask = {}
    for modality in MODALITIES:
        rows, draws = Rows(directory, index, "heldout", modality), random.Random(f"prompts of {modality}")
        cut = [row for place in spaced(len(rows), most) for row in _cut(*rows[place], draws)]
        if cut:
            found[modality] = [cut[place] for place in spaced(len(cut), most)]
    return found


def _cut(tokens: np.ndarray, docs: np.ndarray, patches: np.ndarray, draws: random.Random) -> Iterator[Encoded]:
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
        yield Encoded(kept, images, [place >= prompt for place in range(len(kept))])


def _image(ids: list[int], values: np.ndarray) -> media.Patches:
    rows, cols = (media.grid(ids).max(0) + 1).tolist()
    return media.Patches(values, rows, cols)
