"""Every figure of the report worked out once more, from the files and the model's logits, by a few lines that share nothing
with the evaluation: no function of `shoal.evaluate`, but for `Engine` and the network itself."""

import gzip
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sacrebleu
import torch
import xxhash

from shoal import Engine, Model, Request, Sampling, presets
from shoal.evaluate import evaluation, routing
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import PATCH_ID, Tokenizer
from shoal.train.loop import fit
from shoal.train.plan import pretrain_plan
from tests.corpus import write_corpus

SIZES = evaluation.Sizes(vqa=1000, bleu=1000, code=1000, service=1000, decode_tokens=2)
TASKS = {"summarisation": 12, "code": 4, "customer service": 8}  # task -> most answer tokens
Packed = tuple[list[int], list[int], list[int], np.ndarray]  # tokens, docs, groups, patches
pytestmark = pytest.mark.drill  # a report of a trained model; its parts are held in tests/unit/evaluate


def number(group: str) -> int:
    return xxhash.xxh3_64_intdigest(group.encode()) >> 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model trained for a few updates, what it answers to some questions, of which it is given half as references, its
    router, and the report."""
    folder = tmp_path_factory.mktemp("figures")
    data, preset = folder / "data", presets.get("test")
    write_corpus(data, preset, documents=60, heldout=10)
    plan = pretrain_plan("test", str(data), str(folder / "run"), steps=6, eval_every=0, eval_rows=2)
    fit(plan)
    model = Model.load(plan.model_dir)
    rows = []
    for task, most in TASKS.items():
        asks = [[{"role": "user", "content": f"{task} {n}: {'reef ' * (n % 5)}"}] for n in range(40)]
        prompts = [encode_chat(ask, model.tokenizer, model.config) for ask in asks]
        done = Engine(model).generate([Request(p, Sampling(temperature=0, max_tokens=most)) for p in prompts])
        for place, (ask, said) in enumerate(zip(asks, done, strict=True)):
            answer = said.text if place % 2 and said.text.strip() else f"x = {place}"
            messages = [*ask, {"role": "assistant", "content": answer}]
            rows.append({"task": task, "messages": messages, "group": f"{task} {place // 2}"})
    (data / "sft-heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    routing.refit(plan.model_dir, data / "sft-heldout.jsonl")
    model = Model.load(plan.model_dir)
    assert model.router is not None
    seen = (routing.heldout_prompts(model, data / "sft-heldout.jsonl") or pytest.fail("too few"))[1].features
    # so that some prompts are shallow and others are not, and none is so by the last bit of its prediction
    middle = model.router(seen)[1][:, 0].sort().values[len(seen) // 4 : -(len(seen) // 4)]
    widest = int(middle.diff().argmax())
    bound = float(middle[widest : widest + 2].mean())
    model.router.calibration.thresholds = [(t, bound) for t, _ in model.router.calibration.thresholds]
    model.save(plan.model_dir)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluation, "TASKS", TASKS)
        report = evaluation.compare({"fish": plan.model_dir}, data, runs=[Path(plan.run)], sizes=SIZES)
    return {
        "report": report,
        "model": Model.load(plan.model_dir),
        "data": data,
        "rows": rows,
        "dir": plan.model_dir,
        "plan": plan,
    }


def packed(data: Path, split: str, modality: str) -> Iterator[Packed]:
    for shard in json.loads((data / "index.json").read_text())["shards"]:
        if (shard["split"], shard["modality"]) == (split, modality):
            for row in pa.ipc.open_file(str(data / shard["file"])).read_all().to_pylist():
                yield row["tokens"], row["docs"], row["groups"], np.frombuffer(row["patches"], dtype=np.uint8)


def row(made: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(r for r in made["report"]["quality"]["rows"] if r["metric"] == metric)


def asked(made: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows that are asked, by task: of every second group in the order of their numbers. (All groups are of two rows and
    of one task, so that dealing them is no more than that.)"""
    found = {}
    for task in TASKS:
        rows = [r for r in made["rows"] if r["task"] == task]
        dealt = sorted({number(r["group"]) for r in rows})[::2]
        found[task] = [r for r in rows if number(r["group"]) in dealt]
    return found


def answers(made: dict[str, Any], task: str, depth: str = "full") -> list[Any]:
    model = made["model"]
    prompts = [encode_chat(r["messages"][:1], model.tokenizer, model.config) for r in asked(made)[task]]
    sampling = Sampling(temperature=0, max_tokens=TASKS[task])
    done = Engine(model).generate([Request(prompt, sampling, depth=depth) for prompt in prompts])
    return [(len(prompt.ids), c) for prompt, c in zip(prompts, done, strict=True)]


@pytest.mark.parametrize("modality", ["text", "code", "image"])
def test_bits_a_byte_at_every_exit(made: dict[str, Any], modality: str) -> None:
    """-log2 p of every token after the first of its document that is no patch, over the bytes that these tokens stand for."""
    model: Model = made["model"]
    bits, n_bytes, places, groups = dict.fromkeys(model.config.exits, 0.0), 0, 0, set()
    for tokens, docs, of, patches in packed(made["data"], "heldout", modality):
        t, d = torch.tensor([tokens]), torch.tensor([docs])
        values = torch.from_numpy(patches.reshape(-1, 3 * model.config.patch**2).copy())
        grid = []
        for _ in range(len(values) // 9):  # of the corpus's images, 3 x 3 patches each
            grid += list(np.ndindex(3, 3))
        hidden = model.net(
            t, values, torch.tensor(grid or np.zeros((0, 2)), dtype=torch.long), docs=d, exits=model.config.exits
        )
        for e in model.config.exits:
            logits = model.net.head(hidden[e][0], e).double().numpy(force=True)
            for at in range(len(tokens) - 1):
                if docs[at + 1] == docs[at] >= 0 and tokens[at + 1] != PATCH_ID:
                    top = logits[at].max()
                    bits[e] += (top + math.log(np.exp(logits[at] - top).sum()) - logits[at][tokens[at + 1]]) / math.log(
                        2
                    )
                    if e == model.config.layers:
                        n_bytes += len(model.tokenizer.token_bytes(tokens[at + 1]))
                        places += 1
                        groups.add(of[docs[at]])
    name = {"image": "bpb image text"}.get(modality, f"bpb {modality}")
    found = row(made, name)
    assert found["values"]["fish"] == pytest.approx(bits[model.config.layers] / n_bytes, rel=1e-4)
    assert (found["rows"], found["groups"]) == (places, len(groups))
    low, high = found["intervals"]["fish"]
    assert low < found["values"]["fish"] < high
    for shown, e in zip(made["report"]["depth"]["rows"], model.config.exits, strict=False):
        if modality != "image":
            assert shown[name] == pytest.approx(bits[e] / n_bytes, rel=1e-4), "at its own exit"


def test_baselines_are_fitted_to_the_rows_that_the_model_read(made: dict[str, Any]) -> None:
    """6 updates read 6 x batch rows of the plan's order; held-out bytes are all of them."""
    tokenizer = Tokenizer.load(made["data"] / "tokenizer.json")
    feed = evaluation.rows_read.__globals__["PretrainBatches"](
        made["data"], seed=made["plan"].train.seed, batch_rows=made["plan"].batch_rows
    )
    read = {place for step in range(6) for place in feed.rows(step)}
    for modality in ("text", "code"):
        text = {}
        for split in ("train", "heldout"):
            rows = list(packed(made["data"], split, modality))
            text[split] = [b"".join(tokenizer.token_bytes(token) for token in tokens) for tokens, *_ in rows]
        known = b"".join(text["train"][i] for i in sorted(i for m, i in read if m == modality))
        heldout = b"".join(text["heldout"])
        beside = row(made, f"bpb {modality}")["beside"]
        assert 0 < len(known) < len(b"".join(text["train"]))
        counts = np.bincount(np.frombuffer(known, np.uint8), minlength=256)
        kinds = int((counts > 0).sum())
        p = (counts + kinds / 256) / (counts.sum() + kinds)
        assert beside["unigram"] == pytest.approx(float(-np.log2(p[np.frombuffer(heldout, np.uint8)]).mean()))
        assert beside["gzip"] == pytest.approx(8 * len(gzip.compress(heldout, 9)) / len(heldout))
        assert beside["xz"] == pytest.approx(
            8 * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)) / len(heldout)
        )
        assert 0 < beside["zstd with the training text"] < beside["xz"], "it has read what it is about"


def test_answers_are_scored_as_said(made: dict[str, Any]) -> None:
    said = {task: [c.text for _, c in answers(made, task)] for task in TASKS}
    want = {task: [r["messages"][1]["content"] for r in rows] for task, rows in asked(made).items()}
    exact = [
        a.strip().lower() == b.strip().lower()
        for a, b in zip(said["customer service"], want["customer service"], strict=True)
    ]
    found = row(made, "customer service exact")
    assert found["values"]["fish"] == pytest.approx(np.mean(exact)) and 0 < np.mean(exact) < 1
    lowered = [w.strip().lower() for w in want["customer service"]]
    assert found["beside"]["majority answer"] == pytest.approx(max(map(lowered.count, lowered)) / len(lowered))
    assert found["rows"] == len(exact) == 2 * found["groups"]
    score = sacrebleu.corpus_bleu(said["summarisation"], [want["summarisation"]]).score
    found = row(made, "BLEU summarisation")
    low, high = found["intervals"]["fish"]
    assert found["values"]["fish"] == pytest.approx(score) and 0 < score < 100
    assert low - 1e-9 <= score <= high + 1e-9

    def parses(text: str) -> bool:
        try:
            return bool(compile(text, "x", "exec").co_code) and bool(text.strip())
        except (SyntaxError, ValueError):
            return False

    assert row(made, "code that parses")["values"]["fish"] == pytest.approx(np.mean([parses(t) for t in said["code"]]))


def test_auto_is_counted_by_the_tokens_that_ran(made: dict[str, Any]) -> None:
    """Flops by hand: projections and attention of each layer, at the training length, for every token that ran; the head for
    each token of an answer; and a prompt's routing, once."""
    model: Model = made["model"]
    c = model.config

    def flops(layers: int) -> float:
        total = 0.0
        for layer in range(layers):
            total += 2 * (c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.width * c.ffn)
            keys, summaries = min(c.train_length, c.window), 0
            if c.attention_kind(layer) == "H":
                keys += min(c.train_length, (c.top_k + 1) * c.block)
                summaries = c.train_length // c.block * c.summary_values
            total += 2 * c.heads * (2 * keys * c.head_dim + summaries)
        return total

    head, ran, dear, layers, count, depths = 2.0 * c.vocab * c.width, 0.0, 0.0, 0.0, 0, set()
    for task in TASKS:
        for prompt, c_ in answers(made, task, "auto"):
            tokens = prompt + len(c_.tokens) - 1
            early, hidden = len(c.exits) - 1, 64
            router = 2 * ((2 * c.width + 3) * hidden + 2 * hidden * early)
            said = len(c_.tokens) * head
            ran, dear = ran + tokens * flops(c_.depth) + said + router, dear + tokens * flops(c.layers) + said
            layers, count = layers + tokens * c_.depth, count + tokens
            depths.add(c_.depth)
    *fixed, auto = made["report"]["depth"]["rows"]
    assert model.router is not None and not model.router.reads_nll, "else the head runs over a prompt as well"
    assert len(depths) > 1, "else a mean over answers would be the same"
    assert auto["flops_share"] == pytest.approx(ran / dear) and auto["layers"] == pytest.approx(
        layers / count, abs=0.006
    )
    for shown, depth in zip(fixed, c.exits, strict=True):
        some = [
            (prompt + len(each.tokens) - 1, len(each.tokens))
            for task in TASKS
            for prompt, each in answers(made, task, depth)
        ]
        bills = [sum(rows * flops(e) + said * head for rows, said in some) for e in (depth, c.layers)]
        assert shown["flops_share"] == pytest.approx(bills[0] / bills[1])


def test_what_the_tolerance_keeps_by_task(made: dict[str, Any]) -> None:
    """The loss of the exit that the router takes less full depth's, on the answer, mean over the prompts of a task."""
    model: Model = made["model"]
    lost: dict[str, list[float]] = {}
    for task, rows in asked(made).items():
        for r in rows:
            whole = encode_chat(r["messages"], model.tokenizer, model.config, add_generation_prompt=False)
            start = whole.answer.index(True)
            ask = Request(
                encode_chat(r["messages"][:1], model.tokenizer, model.config), Sampling(max_tokens=1), depth="auto"
            )
            depth = Engine(model).generate([ask])[0].depth
            losses = {}
            for e in {depth, model.config.layers}:
                logits = model.logits(whole.ids, depth=e).double()
                nll = [
                    -torch.log_softmax(logits[at - 1], -1)[whole.ids[at]]
                    for at in range(start, len(whole.ids))
                    if whole.answer[at]
                ]
                losses[e] = float(torch.stack(nll).mean())
            lost.setdefault(task, []).append(losses[depth] - losses[model.config.layers])
    kept = made["report"]["tolerance"]
    shown = {r["task"]: r for r in kept["by_task"]}
    for task, values in lost.items():
        assert shown[task]["loss"] == pytest.approx(np.mean(values), abs=1e-4) and shown[task]["prompts"] == len(values)
        assert shown[task]["above"] == pytest.approx(np.mean([v > kept["tolerance"] for v in values]))
    every = [v for values in lost.values() for v in values]
    assert shown["all together"]["loss"] == pytest.approx(np.mean(every), abs=1e-4)
    assert made["report"]["frontier"]["prompts"] == len(every)
    assert made["report"]["frontier"]["fixed"][-1]["gap"] == 0.0
