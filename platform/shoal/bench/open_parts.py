"""What `shoal bench open` is made of: texts, a small Llama that learns them, and what is measured of it.

Letters: B rows, T tokens, V vocabulary, E exits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from shoal.config import ModelConfig, TrainConfig
from shoal.data.batches import Batch, text_of
from shoal.data.shards import TOKENIZER
from shoal.errors import DataError
from shoal.evaluate.prompts import Heldout
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.train.loss import LossModel
from shoal.train.optim import exit_weights, learning_rate, make_optimizer, trained_exits
from shoal.train.parallel import Ranks
from shoal.train.step import update

LENGTH, LONG = 256, 512  # tokens of a row; of one for sparse attention
BATCH_TOKENS = 2048  # of an update
TRAIN = TrainConfig(
    learning_rate=4e-3, optimizer="muon", batch_tokens=BATCH_TOKENS, accumulate=1, exit_weights=(1.0,), patch_weight=0.0,
    rotate_exits="off",
)  # fmt: skip
MEASURED = 24  # held-out rows
_TRANSFORMERS = """
import sys, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor(json.load(open(sys.argv[2])))
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, sys.argv[3])
"""


def shape(vocab: int, length: int = LENGTH, **more: Any) -> ModelConfig:
    """The preset `tiny` in Llama's form."""
    values: dict[str, Any] = {
        "vocab": vocab, "layers": 8, "width": 96, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn": 256, "train_length": length,
        "max_length": length, "window": length, "block": 16, "page": 16, "top_k": 1, "sinks": 0, "mix_mode": "fixed",
        "attn_pattern": "D", "rope_dims": 24, "qk_norm": "none", "embed_scale": 1.0, "early_exits": False, "image_size": 0,
    }  # fmt: skip
    return ModelConfig(**{**values, **more})


class Texts:
    """The texts of a prepared corpus, one after the other, as ids."""

    def __init__(self, data: Path) -> None:
        if not (data / TOKENIZER).is_file():
            raise DataError(
                f"{data}", got="no shards", do="give a directory made by `shoal prepare`, as a quickstart's data"
            )
        self.tokenizer = Tokenizer.load(data / TOKENIZER)
        self.bytes = torch.tensor([len(self.tokenizer.token_bytes(token)) for token in range(len(self.tokenizer))])
        self.train, self.heldout = (self._ids(data, split) for split in ("train", "heldout"))

    def _ids(self, data: Path, split: str) -> Tensor:
        said = text_of(data, "text", split, self.tokenizer).decode("utf-8", "replace")
        ids = torch.tensor(self.tokenizer.encode(said))
        if len(ids) <= LONG:
            raise DataError(f"{data}: text to {split}", got=f"{len(ids)} tokens", allowed=f"more than {LONG}")
        return ids

    def batch(self, seed: int, step: int, length: int) -> Batch:
        """An update's rows, from random places."""
        draws = torch.Generator().manual_seed(1_000_003 * seed + step)
        at = torch.randint(len(self.train) - length, (BATCH_TOKENS // length, 1), generator=draws) + torch.arange(
            length
        )
        tokens, targets = self.train[at], self.train[at + 1]
        nothing = torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
        return Batch(
            tokens, targets, torch.zeros_like(tokens), *nothing, self.bytes[targets].sum(1), ("text",) * len(tokens)
        )

    def rows(self, length: int = LENGTH, most: int = MEASURED) -> Tensor:
        """Held-out rows [B, T + 1], evenly spaced."""
        count = min(most, (len(self.heldout) - 1) // length)
        starts = torch.linspace(0, len(self.heldout) - length - 1, count).long()[:, None]
        return self.heldout[starts + torch.arange(length + 1)]

    def write(self, path: Path, length: int, most: int = 4000) -> Path:
        """A JSONL of texts of some `length` tokens, of what is trained on."""
        with path.open("w", encoding="utf-8") as file:
            for piece in self.train.split(length)[:most]:
                file.write(json.dumps({"text": self.tokenizer.decode(piece.tolist())}) + "\n")
        return path

    def prompts(self, seed: int, count: int = 160) -> list[Heldout]:
        """Held-out pieces, each cut into a prompt and what follows."""
        draws, found = random.Random(seed), []
        for group in range(count):
            start, prompt = draws.randrange(len(self.heldout) - 160), draws.randrange(8, 96)
            ids = self.heldout[start : start + prompt + 64].tolist()
            found.append(Heldout(Encoded(ids, [], [place >= prompt for place in range(len(ids))]), group))
        return found


def trained(
    config: ModelConfig, texts: Texts, *, seed: int, steps: int, weights: Sequence[float], start: Net | None = None
) -> Net:
    """A net after `steps` updates, from fresh weights or from `start`, whose trainable weights alone change. `weights`: of the
    exits; with a `start` they learn what full depth says."""
    own: dict[str, Any] = {"exit_weights": tuple(weights), "seed": seed}
    if start is not None:
        own |= {"distill": 1.0, "cross_entropy": 0.0, "learning_rate": 1e-3, "exit_warmup": 0.0}
    train = dataclasses.replace(TRAIN, **own)
    net = start or Net(config).init_(seed)
    model = LossModel(net, trained_exits(config.exits, train))
    optimizer, ranks = make_optimizer(model, train), Ranks(0, 1, torch.device("cpu"))
    for step in range(steps):
        done = (step + 1) / steps
        rates = {"weights": exit_weights(done, train), "rate": learning_rate(done, train)}
        update(model, optimizer, [texts.batch(seed, step, config.train_length)], config=train, ranks=ranks, **rates)  # type: ignore[arg-type]
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def bits(net: Net, texts: Texts) -> dict[str, float]:
    """Held-out bits a byte of each exit."""
    rows, total, size = texts.rows(net.config.train_length), dict.fromkeys(net.config.exit_names, 0.0), 0
    for row in rows.split(8):
        hidden = net(row[:, :-1], exits=net.config.exits)
        size += int(texts.bytes[row[:, 1:]].sum())
        for name, layers in net.config.exit_names.items():
            logits = net.head(hidden[layers], layers)
            total[name] += float(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
    return {name: nats / math.log(2) / max(size, 1) for name, nats in total.items()}


@torch.inference_mode()
def apart(one: Net, other: Net, rows: Tensor, start: int = 0) -> tuple[float, float]:
    """KL(one || other), nats a token, and the share of places at which the likeliest token is the same, at full depth from
    position `start` on."""
    total, same, count = 0.0, 0, 0
    for row in rows.split(4):
        theirs, ours = (
            net.head(net(row[:, :-1])[net.config.layers][:, start:], net.config.layers).float().log_softmax(-1)
            for net in (one, other)
        )
        total += float((theirs.exp() * (theirs - ours)).sum())
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        count += theirs.shape[0] * theirs.shape[1]
    return total / count, same / count


def llama(model: Model) -> dict[str, Any]:
    """What the source of a model says that `shape` describes, as if it had been imported."""
    c = model.config
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.ffn, "vocab_size": c.vocab, "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "hidden_act": "silu",
        "tie_word_embeddings": c.tied,
    }  # fmt: skip
    return {
        "family": "LlamaForCausalLM",
        "config": told,
        "generation_config": {"eos_token_id": list(model.tokenizer.ends)},
    }


def by_transformers(python: str, directory: Path, ids: Tensor) -> Tensor | None:
    """Logits [B, T, V] that transformers gives of the checkpoint in `directory`; None where `python` has no transformers."""
    if subprocess.run([python, "-c", "import transformers"], capture_output=True, check=False).returncode:
        return None
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder) / "ids.json", Path(folder) / "logits.safetensors"
        asked.write_text(json.dumps(ids.tolist()))
        done = subprocess.run(
            [python, "-c", _TRANSFORMERS, str(directory), str(asked), str(said)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DataError(f"transformers cannot read {directory}", got=done.stderr.strip().splitlines()[-1][:160])
        logits: Tensor = load_file(said)["logits"]
        return logits


def lens(net: Net) -> Net:
    """A net without early exits with the norm and the head of full depth after each quarter of it."""
    config = dataclasses.replace(net.config, early_exits=True)
    whole, there = Net(config), net.state_dict()
    last = f"exit_norms.{config.layers}.weight"
    whole.load_state_dict({name: there.get(name, there[last]).clone() for name in whole.state_dict()})
    return whole


def spread(values: Sequence[float]) -> str:
    """A mean, with least and most where there are several."""
    mean = sum(values) / len(values)
    return f"{mean:.4f}" + (f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else "")


def flat(found: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers in nested mappings, by their names with dots between."""
    every: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            every |= flat(value, f"{before}{name}.")
        elif isinstance(value, (int, float)):
            every[f"{before}{name}"] = float(value)
    return every
