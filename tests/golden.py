"""What one tiny model gives, written down: logits, tokens, depths, and losses while it learns. `python -m tests.golden` makes
it and the figures anew, in tests/data/golden: a change of numbers is then a decision that a commit shows.

Logits and losses are computed in float64, so that another CPU gives the same to many digits; the tokens' likeliest and next
likeliest are far enough apart for fp32. INT8 turns the last bit of another CPU's fp32 into a whole level now and then, so of it
there are no tokens here, and its logits are compared in the mean.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import TrainConfig
from shoal.data.batches import Batch
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID, Tokenizer
from shoal.model.net import Net
from shoal.model.router import Router
from shoal.train.loss import LossModel
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks
from shoal.train.step import update

HERE = Path(__file__).parent / "data" / "golden"
TEXT = "The depth of a fish is its own."
TOLERANCES = (0.01, 0.05, 0.2, 1.0)
TRAIN = TrainConfig(learning_rate=1e-2, weight_decay=0.1, clip=1.0, batch_tokens=64, distill=0.3)
WEIGHTS = (0.15, 0.25, 1.0)


def build() -> Model:
    """Random weights, norms and gates that are no ones, and a router whose bounds tell the prompts below apart."""
    shape = {"width": 24, "heads": 2, "kv_heads": 1, "head_dim": 12, "ffn": 40, "window": 8, "summary": "mean_var"}
    config = dataclasses.replace(presets.get("test").model, **shape)
    net, draw = Net(config).init_(11), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() < 2:
                p.add_(0.2 * torch.empty(p.shape).normal_(generator=draw))
            elif ".blocks." in name:
                p.mul_(5)  # the layers must say more than the token that stands there
    router = Router(config)
    for parameter in router.parameters():
        parameter.data.normal_(0, 0.3, generator=draw)
    router.calibration.thresholds = [(0.01, -0.5), (0.05, -0.25), (0.2, 1.0), (1.0, 9.0)]
    return Model(config, net, Tokenizer.bytes_only(), name="golden", router=router.requires_grad_(False))


def prompts(model: Model) -> dict[str, Encoded]:
    """A text, and a text with an image."""
    ids = model.tokenizer.encode(TEXT)
    values = np.arange(6 * model.config.patch_values, dtype=np.uint64).reshape(6, -1) * 37 % 256
    image = media.Patches(values.astype(np.uint8), 2, 3)
    return {"text": Encoded(ids), "image": Encoded([*ids[:9], *image.tokens(), *ids[9:]], [image])}


def batch(model: Model) -> Batch:
    """Both prompts as the documents of one row."""
    texts = list(prompts(model).values())
    tokens = [token for prompt in texts for token in prompt.ids]
    docs = [number for number, prompt in enumerate(texts) for _ in prompt.ids]
    targets = [
        after if doc == next_doc and after != PATCH_ID else -1
        for doc, after, next_doc in zip(docs, tokens[1:], docs[1:], strict=False)
    ]
    (image,) = texts[1].images
    return Batch(
        torch.tensor([tokens]),
        torch.tensor([[*targets, -1]]),
        torch.tensor([docs]),
        torch.from_numpy(image.values),
        torch.from_numpy(media.grid(tokens)),
        torch.tensor([len(TEXT) - 1]),
        ("text",),
    )


def figures(model: Model) -> dict[str, Any]:
    """What stands in golden.json."""
    found: dict[str, Any] = {"tokens": {}, "logits": {}, "int8 logits": {}, "depths": {}, "losses": learned(model)}
    sampling = {
        "greedy": Sampling(max_tokens=12, temperature=0, ignore_eos=True),
        "drawn": Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True),
    }
    for name, prompt in prompts(model).items():
        asked = [Request(prompt, how, depth=depth) for how in sampling.values() for depth in ("shallow", "full")]
        answers = Engine(model, units=200, max_batch_tokens=48).generate(asked)
        keys = [f"{name} {how} {depth}" for how in sampling for depth in ("shallow", "full")]
        found["tokens"] |= {key: answer.tokens for key, answer in zip(keys, answers, strict=True)}
        auto = [Request(prompt, Sampling(max_tokens=1), quality_tolerance=each) for each in TOLERANCES]
        found["depths"][name] = [answer.depth for answer in Engine(model, units=200).generate(auto)]
    exact = Model(model.config, Net(model.config).double(), model.tokenizer)
    exact.net.load_state_dict(model.net.state_dict())
    int8 = model.quantized()
    for name, prompt in prompts(model).items():
        for exit_name in model.config.exit_names:
            last = exact.logits(prompt.ids, exit_name, prompt.images)[-1]
            found["logits"][f"{name} {exit_name}"] = last[::10].tolist()
            rounded = int8.logits(prompt.ids, exit_name, prompt.images)[-1]
            found["int8 logits"][f"{name} {exit_name}"] = rounded[::10].tolist()
    return found


def learned(model: Model) -> list[dict[str, float]]:
    """Losses of five updates on the same row, in float64."""
    net = Net(model.config).double()
    net.load_state_dict(model.net.state_dict())
    whole = LossModel(net)
    optimizer, row = make_optimizer(whole, TRAIN), batch(model)
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    reports = [update(whole, optimizer, [row], config=TRAIN, weights=WEIGHTS, rate=1e-2, ranks=ranks) for _ in range(5)]
    return [
        {"loss": r.loss, "patch": r.patch, "norm": r.grad_norm, "bpb": r.bpb}
        | {f"ce {i}": ce for i, ce in enumerate(r.ce)}
        for r in reports
    ]


if __name__ == "__main__":
    build().save(HERE / "model")
    (HERE / "golden.json").write_text(
        json.dumps(figures(Model.load(HERE / "model")), indent=1) + "\n", encoding="utf-8"
    )
    print(f"wrote {HERE}")
