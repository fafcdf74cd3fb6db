"""`shoal bench open`: what importing, adapting and exporting are worth, on a model that is small enough to train both ways.

A plain dense Llama is trained (A) and goes the way of an open model: out to Hugging Face's form, in again (B), exits (C), out
at a depth (G), sparse (H), INT8 (I). Its rival (D) had exits from the start, for as much computing as A and C together took. A
router is fitted to both (E), and both draft for themselves (F). Lengths are in updates, so that scores do not depend on how
busy the machine is; speed does.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shoal.bench import open_forms
from shoal.bench.open_parts import (
    BATCH_TOKENS,
    LONG,
    Texts,
    apart,
    bits,
    by_transformers,
    flat,
    lens,
    llama,
    shape,
    spread,
    trained,
)
from shoal.bench.turns import in_turns, show
from shoal.config import FULL
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import UsageError
from shoal.evaluate import sparsity
from shoal.evaluate.intervals import of_mean
from shoal.evaluate.prompts import gaps
from shoal.evaluate.rounding import rounded
from shoal.model import cost
from shoal.model.digests import digest
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.model.router import fit_router
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits, sparse
from shoal.train.loop import fit
from shoal.train.plan import adapt_plan

PARTS = "ABCDEFGHI"
JOINT = (0.15, 0.25, 1.0)  # weights of the exits of a model of our own
GAP = 0.05  # nats a token that the router may lose
DENSE, LIMIT = 128, 0.05  # of sparse attention: tokens that stay dense, nats a token that layers may cost beyond
BIASES = 30  # updates of them
PROMPTS = 320  # of the router: half to fit it, half to measure
BATCH = 8  # answers at once
TOKENS = 64  # of each
AHEAD = (0, 2)  # drafts a step: none, and some


def open_bench(
    console: Console, *, data: Path, parts: str, seeds: int, steps: int, python: str, keep: Path | None
) -> None:
    """Run the `parts` for each seed and print what they came to. `steps`: updates of the plain model; `python`: of an
    environment with transformers; `keep`: a folder for the models, where what is there already is not trained again."""
    texts = Texts(data)
    runs, spent = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            trial = Trial(texts, seed, steps, (keep or Path(scratch)) / f"{steps}-{seed}", python)
            trial.folder.mkdir(parents=True, exist_ok=True)
            found, seconds = {}, {}
            for part in parts:
                start = time.process_time()
                found[part] = trial.part(part)
                seconds[part] = time.process_time() - start
                told = ", ".join(f"{name} {value:.4g}" for name, value in flat(found[part]).items())
                console.print(f"seed {seed}, {part}: {told}; {seconds[part]:.0f} CPU s", highlight=False)
            runs.append(found)
            spent.append(seconds)
    table = Table("part", "what", "mean (least to most)", title=f"{steps} updates, {seeds} seed(s)")
    for part in parts:
        each = [flat(found[part]) for found in runs]
        for name in each[0]:
            table.add_row(part, name, spread([values[name] for values in each if name in values]))
        table.add_row(part, "CPU seconds", spread([seconds[part] for seconds in spent]))
    result = {"bench": "open", "steps": steps, "seeds": seeds, "parts": parts, "found": runs, "cpu_seconds": spent}
    show(console, [table], result)


class Trial:
    """One seed: its models, each made when it is first asked for and kept in `folder`."""

    def __init__(self, texts: Texts, seed: int, steps: int, folder: Path, python: str) -> None:
        self.texts, self.seed, self.steps, self.folder, self.python = texts, seed, steps, folder, python
        self.found: dict[str, dict[str, Any]] = {}

    def part(self, name: str) -> dict[str, Any]:
        """The figures of one part, by name."""
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "A": self._plain, "B": self._imported, "C": self._adapted, "D": self._joint, "E": self._routed,
            "F": self._drafts, "G": self._depth, "H": self._sparse, "I": self._int8,
        }  # fmt: skip
        return parts[name]()

    def _model(self, name: str, make: Callable[[Path], None]) -> Model:
        where = self.folder / name
        if not where.exists():
            make(where)
        return Model.load(where)

    def _save(self, net: Net, where: Path, *, of_llama: bool = False) -> None:
        model = Model(net.config, net, self.texts.tokenizer, name=where.name)
        if of_llama:
            model.source = llama(model)
        model.save(where)

    def plain(self, length: int = 0) -> Model:
        """A: a dense Llama, whose early exits nobody trained."""
        config = shape(self._vocab, **({"length": length} if length else {}))
        steps = self.steps // 2 if length else self.steps

        def make(where: Path) -> None:
            net = trained(config, self.texts, seed=self.seed, steps=steps, weights=(1.0,))
            self._save(net, where, of_llama=True)

        return self._model(f"plain{length or ''}", make)

    @property
    def _vocab(self) -> int:
        return len(self.texts.tokenizer)

    def imported(self) -> Model:
        """B: what was exported of A, imported."""

        def make(where: Path) -> None:
            self.plain()
            export_model(self.folder / "plain", self.folder / "exported", check=False)
            import_model(self.folder / "exported", where)

        return self._model("imported", make)

    def adapted(self) -> Model:
        """C: with exits on the frozen backbone."""

        def make(where: Path) -> None:
            self.imported()
            rows = self.texts.write(self.folder / "rows.jsonl", 240)
            own: dict[str, Any] = {
                "steps": self.steps // 2,
                "batch_tokens": BATCH_TOKENS,
                "seed": self.seed,
                "eval_every": 0,
            }
            fit(adapt_plan(str(self.folder / "imported"), str(rows), str(where), **own))

        return self._model("adapted", make)

    def joint(self) -> Model:
        """D: exits from the start, for as much computing as A and C took."""
        steps = self.joint_steps()
        config = shape(self._vocab, early_exits=True)

        def make(where: Path) -> None:
            self._save(trained(config, self.texts, seed=self.seed, steps=steps, weights=JOINT), where)

        return self._model("joint", make)

    def joint_steps(self) -> int:
        """Updates of D that cost what those of A and C do. One of all weights costs three ways through layers and heads, one of
        exits on a frozen backbone one way through the layers and three through exits and their heads."""
        c = shape(self._vocab, early_exits=True)
        whole, head = cost.flops_per_token(c, c.train_length), 2 * c.vocab * c.width
        early = len(c.exits) - 1
        plain, joint = 3 * whole, 3 * (whole + early * head)
        exits_alone = whole + 3 * early * (head + 2 * 3 * c.width * c.ffn)
        return round((self.steps * plain + self.steps // 2 * exits_alone) / joint)

    def _plain(self) -> dict[str, Any]:
        model = self.plain()
        # its tokenizer is not yet an imported one, whose texts the check would ask for
        export_model(self.folder / "plain", self.folder / "a", check=False)
        found: dict[str, Any] = {"bits": bits(lens(model.net), self.texts)}
        return found | self._beside(model, self.folder / "a", "full")

    def _beside(self, model: Model, folder: Path, depth: str) -> dict[str, Any]:
        """How far from transformers' logits, of what was exported, ours are."""
        ids = self.texts.rows(most=4)[:, :-1]
        theirs = by_transformers(self.python, folder, ids)
        for file in sorted(folder.iterdir()):
            file.unlink()
        folder.rmdir()
        if theirs is None:
            return {}
        with torch.inference_mode():
            ours = torch.stack([model.logits(row.tolist(), depth) for row in ids])
        same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        return {"transformers": {"logits apart": float((ours - theirs).abs().max()), "same token": same}}

    def _imported(self) -> dict[str, Any]:
        before, after = self.plain(), self.imported()
        ids = self.texts.rows(most=1)[0, :-1].tolist()
        apart_ = float((before.logits(ids) - after.logits(ids)).abs().max())
        names = before.net.state_dict(), after.net.state_dict()
        same = all(torch.equal(names[0][name], names[1][name]) for name in names[0])
        greedy = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
        (answer,) = Engine(after).generate([Request(ids[:64], greedy)])
        naive = after.generate_naive(ids[:64], 64, ignore_eos=True)
        return {
            "logits apart": apart_,
            "tensors the same": float(same),
            "engine is naive": float(answer.tokens == naive),
        }

    def _adapted(self) -> dict[str, Any]:
        base, model = self.imported(), self.adapted()
        begun = exits.added(base.net, exits.with_exits(base.config))
        forms = open_forms.learned(base.net, self.texts, seed=self.seed, steps=self.steps // 2)
        ids = self.texts.rows(most=1)[0, :-1].tolist()
        same = torch.equal(base.logits(ids), model.logits(ids))
        kept = digest(base.net.state_dict()) == digest(exits.backbone(model.net.state_dict(), model.config))
        return {
            "bits": bits(model.net, self.texts), "bits of the copy": bits(begun, self.texts),
            "bits by form": open_forms.bits_of(base.net, forms, self.texts), "full depth the same": float(same),
            "sha256 the same": float(kept),
        }  # fmt: skip

    def _joint(self) -> dict[str, Any]:
        found = bits(self.joint().net, self.texts)
        mine = bits(self.adapted().net, self.texts)
        return {
            "updates": self.joint_steps(),
            "bits": found,
            "adapted beside joint": {name: mine[name] / found[name] - 1 for name in found},
        }

    def _routed(self) -> dict[str, Any]:
        held = self.texts.prompts(self.seed, PROMPTS)
        found = {}
        for name, model in (("adapted", self.adapted()), ("joint", self.joint())):
            x, lost = gaps(model.net, [one.row for one in held])
            half = len(held) // 2
            router = fit_router(model.config, x[:half], lost[:half], torch.arange(half), seed=self.seed)
            depths = [router.choose(row, GAP) for row in x[half:]]
            places = torch.tensor([router.exits.index(depth) for depth in depths])
            full = torch.cat([lost, lost.new_zeros(len(lost), 1)], dim=1)[half:]
            share = of_mean([depth / model.config.layers for depth in depths], list(range(half)))
            fixed = [e for e, gap in zip(model.config.exits, full.mean(0).tolist(), strict=True) if gap <= GAP]
            found[name] = {
                "depth": share.value, "depth interval": share.ends,
                "nats lost": float(full[torch.arange(half), places].mean()),
                "best fixed exit": fixed[0] / model.config.layers,
            }  # fmt: skip
        return found

    def _drafts(self) -> dict[str, Any]:
        models = {"untrained": self._lens(), "adapted": self.adapted(), "joint": self.joint()}
        starts = [one.row.ids[: one.row.answer.index(True)] for one in self.texts.prompts(self.seed, BATCH)]
        return {name: drafts(model, starts) for name, model in models.items()}

    def _lens(self) -> Model:
        net = lens(self.imported().net)
        return Model(net.config, net, self.texts.tokenizer)

    def _depth(self) -> dict[str, Any]:
        model = self.adapted()
        export_model(self.folder / "adapted", self.folder / "g", depth="middle")
        return self._beside(model, self.folder / "g", "middle")

    def _sparse(self) -> dict[str, Any]:
        dense, rows = self.plain(LONG).net, self.texts.rows(LONG, 8)
        wide = sparse.with_sparse(dense.config, DENSE)
        found: dict[str, Any] = {}
        for summary in ("mean", "mean_var"):
            every = sparse.made(dense, dataclasses.replace(wide, summary=summary))
            found[f"all layers, {summary}: KL"] = apart(dense, every, rows, DENSE)[0]
        short = rows[:, :DENSE]
        with torch.inference_mode():
            off = every(short)[dense.config.layers] - dense(short)[dense.config.layers]
        found["up to the dense length: largest difference"] = float(off.abs().max())
        mixed = Net(dataclasses.replace(wide, attn_pattern="H", mix_mode="fixed", local_weight=0.5))
        mixed.load_state_dict(dense.state_dict(), strict=False)
        found["two softmaxes, half and half: KL"] = apart(dense, mixed, rows, DENSE)[0]
        return found | self._chosen(dense, rows)

    def _chosen(self, dense: Net, rows: Tensor) -> dict[str, Any]:
        """Of the layers that may be sparse, without training and with it."""
        directory, data = self.folder / f"plain{LONG}", self.texts.write(self.folder / "long.jsonl", LONG, 200)
        out = self.folder / "sparse"
        try:
            chosen = sparsity.chosen(str(directory), str(data), f"{out}.run", tolerance=LIMIT, dense_length=DENSE)
        except UsageError:  # no layer is within the tolerance
            return {"layers within the tolerance": 0}
        plan = sparse.sparse_plan(
            str(directory), str(data), str(out), chosen, steps=BIASES, batch_tokens=4 * LONG, eval_every=0
        )
        picked = apart(dense, sparse.made(dense, plan.model), rows, DENSE)[0]
        if not out.exists():
            fit(plan)
        learned = apart(dense, Model.load(out).net, rows, DENSE)[0]
        return {"layers within the tolerance": chosen["layers"], "these: KL": picked, "biases learned: KL": learned}

    def _int8(self) -> dict[str, Any]:
        model, rows = self.adapted(), self.texts.rows()
        small = rounded(model)
        kl, same = apart(model.net, small.net, rows)
        was, now = bits(model.net, self.texts), bits(small.net, self.texts)
        return {"kl": kl, "same token": same, "more bits": {name: now[name] / was[name] - 1 for name in was}}


def drafts(model: Model, starts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What drafts of the first exit gain greedy answers of `TOKENS` tokens to `starts`, one after the other and all at once."""
    sampling = {
        ahead: Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True, speculative=ahead) for ahead in AHEAD
    }
    engine = Engine(model, speculative_max_batch=len(starts))
    found: dict[str, Any] = {}
    for batch in (1, len(starts)):
        said: dict[int, list[list[int]]] = {}

        def run(ahead: int, batch: int = batch, said: dict[int, list[list[int]]] = said) -> float:
            asked = [Request(list(ids), sampling[ahead], depth=FULL) for ids in starts]
            start = time.perf_counter()
            done = [answer for at in range(0, len(asked), batch) for answer in engine.generate(asked[at : at + batch])]
            spent = time.perf_counter() - start
            said[ahead] = [answer.tokens for answer in done]
            return TOKENS * len(asked) / spent

        speed = in_turns({ahead: partial(run, ahead) for ahead in AHEAD}, 2)
        found[f"batch {batch}: speed, times no drafts"] = speed[AHEAD[1]] / speed[0]
        found[f"batch {batch}: same tokens"] = float(said[0] == said[AHEAD[1]])
    counted = engine.scheduler.metrics
    return {"accepted": counted.drafts_accepted / max(counted.drafts, 1), **found}
