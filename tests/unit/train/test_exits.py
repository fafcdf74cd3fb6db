"""Early exits on a frozen backbone: an imported model gets them, they learn, and full depth stays itself to the bit."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import TrainConfig, load
from shoal.errors import CheckpointError, ConfigError, UsageError
from shoal.evaluate import routing
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.described import ADAPTED, trained_further
from shoal.model.digests import digest
from shoal.model.net import Net
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits, log, lora
from shoal.train.feed import open_feed
from shoal.train.loop import FitResult, fit
from shoal.train.loss import LossModel
from shoal.train.needs import trained_parameters
from shoal.train.parallel import Ranks
from shoal.train.plan import adapt_plan, finetune_plan
from tests import oracle
from tests.corpus import NOUNS, VERBS

DATA = Path(__file__).parents[2] / "data" / "open"
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's form in bfloat16, with matrices so large that layers differ."""
    folder = tmp_path_factory.mktemp("adapt")
    shutil.copytree(DATA / "smollm2", folder / "from")
    shutil.copytree(DATA / "tokenizer", folder / "from", dirs_exist_ok=True)
    import_model(folder / "from", folder / "model", name="smol")
    model = Model.load(folder / "model")
    model.source = {**(model.source or {}), ADAPTED: {"minutes": 2, "agreement": {"middle": 0.33}}}
    model.save(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    """Texts and chats of few words."""
    path = base.parent / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(120):
            draw = random.Random(number)
            said = " ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)}." for _ in range(3))
            asked = {"role": "user", "content": f"{number}: what is it?"}
            row: dict[str, Any] = {"messages": [asked, {"role": "assistant", "content": said}], "group": number}
            file.write(json.dumps({"text": said} if number % 3 == 0 else row) + "\n")
    return path


@pytest.fixture(scope="module")
def heldout(rows: Path) -> Path:
    path = rows.with_name("heldout.jsonl")
    path.write_text("".join(line + "\n" for line in rows.read_text().splitlines() if "messages" in line))
    return path


def plan(base: Path, rows: Path, out: Path, **more: Any) -> Any:
    short = {"steps": 40, "batch_tokens": 512, "learning_rate": 2e-2, "eval_every": 0, **more}
    return adapt_plan(str(base), str(rows), str(out), **short)


@pytest.fixture(scope="module")
def adapted(base: Path, rows: Path, heldout: Path) -> FitResult:
    return fit(plan(base, rows, base.parent / "adapted", heldout=str(heldout)))


def kl_at(model: Model, ids: list[int]) -> dict[str, float]:
    full = model.logits(ids).float().log_softmax(-1)
    return {
        name: float((full.exp() * (full - model.logits(ids, name).float().log_softmax(-1))).sum(-1).mean())
        for name in model.config.exit_names
    }


def chat_ids(model: Model, heldout: Path) -> list[int]:
    messages = json.loads(heldout.read_text().splitlines()[-1])["messages"]
    return encode_chat(messages, model.tokenizer, model.config, template=model.chat_template).ids


def test_full_depth_is_the_base_to_the_bit_and_exits_learned(base: Path, adapted: FitResult, heldout: Path) -> None:
    before, after = Model.load(base), Model.load(adapted.out, verify=True)
    assert (
        after.config.exit_names == {"shallow": 2, "middle": 4, "full": 6} and after.config.exit_ffn == before.config.ffn
    )
    assert after.name == before.name and after.source is not None
    assert {**after.source, ADAPTED: (before.source or {})[ADAPTED]} == before.source
    assert ADAPTED not in after.source, "what exits were worth before they learned further"
    was, now = load_file(str(base / "model.safetensors")), load_file(str(Path(adapted.out, "model.safetensors")))
    for name, tensor in was.items():
        assert now[name].dtype == tensor.dtype == torch.bfloat16 and torch.equal(now[name], tensor), name
    more = now.keys() - was.keys()
    assert more and all(exits.is_exits(name, after.config) for name in more)
    kept = digest(was)
    assert adapted.backbone == (kept, kept) and kept == digest(exits.backbone(now, after.config))
    ids = chat_ids(before, heldout)
    assert torch.equal(before.logits(ids), after.logits(ids))

    begun = Model(after.config, exits.added(before.net, after.config), before.tokenizer)
    first, last = kl_at(begun, ids), kl_at(after, ids)
    assert last["full"] == 0 and all(last[name] < 0.9 * first[name] for name in ("shallow", "middle")), (first, last)
    assert adapted.rounded["begun"]["chat"]["full"] == adapted.bpb["chat"]["full"]
    assert adapted.rounded["begun"]["chat"]["shallow"] != adapted.bpb["chat"]["shallow"]


@pytest.mark.parametrize("tune", ["lora", pytest.param("all", marks=pytest.mark.drill)])
def test_a_tuned_backbone_is_another_model_and_the_report_says_so(
    base: Path, rows: Path, heldout: Path, tmp_path: Path, tune: str
) -> None:
    wanted = plan(base, rows, tmp_path / "out", tune=tune, steps=6, heldout=str(heldout), learning_rate=5e-3)
    result = fit(wanted)
    before, after = Model.load(base), Model.load(result.out, verify=True)
    was = digest(load_file(str(base / "model.safetensors")))
    now = digest(exits.backbone(load_file(str(Path(result.out, "model.safetensors"))), after.config))
    assert result.backbone == (was, now) and was != now
    assert after.config == wanted.model and after.source == trained_further(before.source)
    state, begun = after.net.state_dict(), exits.added(before.net.float(), after.config).state_dict()
    moved = {name for name in begun if not torch.equal(begun[name], state[name])}
    assert {name for name in begun if exits.is_exits(name, after.config)} <= moved, "the exits learned"
    assert {name for name in begun if name.endswith("attention.qkv.weight")} <= moved, "and the layers"
    assert ("embed.weight" in moved) == (tune == "all"), "LoRA is beside the layers alone"
    assert result.bpb["chat"]["full"] != result.rounded["begun"]["chat"]["full"]
    last_norm = after.config.width if tune == "lora" else 0  # is counted among the exits
    assert trained_parameters(wanted) == last_norm + sum(
        tensor.numel() for name, tensor in begun.items() if tune == "all" or exits.is_exits(name, after.config)
    ) + (lora.count(after.config, 16) if tune == "lora" else 0)


def test_what_is_tuned_is_one_of_three(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tune: got 'some'; allowed: none, lora, all"):
        plan(base, rows, tmp_path / "out", tune="some")


def test_an_exit_begins_as_what_stands_behind_the_last_layers_attention(base: Path) -> None:
    net = Model.load(base).net.double()
    whole = exits.added(net, exits.with_exits(net.config))
    h = torch.randn(3, net.config.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = net.groups[-1].blocks[-1]  # type: ignore[index, union-attr]
    wanted = net.exit_norms["6"](h + block.mlp(block.mlp_norm(h)))
    for e in (2, 4):
        assert torch.equal(whole.exit(h, e), wanted)
    assert torch.equal(whole.exit(h, 6), net.exit(h, 6))
    again = exits.added(whole, whole.config)
    assert again.config == whole.config and again.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("solved_is", ["closer", "farther"])
def test_the_last_matrix_of_a_new_exit_is_the_ridge_regression_of_full_depths_states(
    base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, solved_is: str
) -> None:
    """Where it is closer; and what it was before where it is not."""
    net = Model.load(base).net.double()
    whole = exits.added(net, exits.with_exits(net.config))
    wanted = plan(base, rows, base.parent / "never")
    model = Model.load(base)
    feed = open_feed(wanted, model.tokenizer, model.chat_template, ALONE)
    batches = [batch for step in range(3) for batch in feed.at(step)]
    said = itertools.cycle([2.0, 1.0] if solved_is == "closer" else [1.0, 1.0])
    monkeypatch.setattr(exits, "_apart", lambda *_: next(said))
    exits.solve_(whole, [[batch] for batch in batches], ALONE)
    c, plain = whole.config, exits.added(net, whole.config)
    for e in (2, 4):
        read, target = [], []
        for batch in batches[:-1]:
            told = batch.docs >= 0
            states = plain(batch.tokens, batch.patches, batch.grid, batch.docs, exits=(e, 6))
            here, full = states[e][told], states[6][told]
            part = plain.exit_mlps[str(e)]
            gate, up = part.mlp.up(part.norm(here)).chunk(2, dim=-1)  # type: ignore[operator, union-attr]
            weight = 1 / full.norm(dim=-1, keepdim=True)
            read.append((torch.nn.functional.silu(gate) * up * weight).detach())
            target.append(((full - here) * weight).detach())
        a, y = torch.cat(read), torch.cat(target)
        ridge = (exits.RIDGE * a.square().sum() / c.exit_ffn).sqrt() * torch.eye(c.exit_ffn, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([a, ridge]), torch.cat([y, y.new_zeros(c.exit_ffn, c.width)])).solution
        wanted_is = solution.T if solved_is == "closer" else plain.exit_mlps[str(e)].mlp.down.weight  # type: ignore[union-attr]
        torch.testing.assert_close(whole.exit_mlps[str(e)].mlp.down.weight, wanted_is)  # type: ignore[union-attr]
    untouched = {name: tensor for name, tensor in whole.state_dict().items() if not name.endswith("mlp.down.weight")}
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in untouched.items())


def test_workers_solve_for_the_same_matrix_as_one_that_reads_all(base: Path, rows: Path) -> None:
    """Two ranks as two threads, whose sums meet."""
    model, met, there = Model.load(base), threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    feed = open_feed(plan(base, rows, base.parent / "never"), model.tokenizer, model.chat_template, ALONE)
    first, second, last = (feed.at(step)[0] for step in range(3))  # the last is judged on

    class Two(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            there[self.rank] = values
            met.wait()
            both = there[0] + there[1]
            met.wait()
            return both

    net = model.net.double()
    nets = [exits.added(net, exits.with_exits(net.config)) for _ in range(3)]
    threads = [
        threading.Thread(target=exits.solve_, args=(nets[r], [[mine], [last]], Two(r, 2, torch.device("cpu"))))
        for r, mine in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exits.solve_(nets[2], [[first, second], [last]], ALONE)
    for name, tensor in nets[2].state_dict().items():
        assert torch.equal(nets[0].state_dict()[name], nets[1].state_dict()[name]), name
        torch.testing.assert_close(nets[0].state_dict()[name], tensor)


def test_the_engine_drafts_with_a_new_exit_and_loses_nothing(base: Path, adapted: FitResult) -> None:
    imported, model = Model.load(base), Model.load(adapted.out)
    for each in (imported, model):
        each.net.double()  # bf16 may round two ways to equal scores
    prompts = ["The shoal", "The tide waits. The reef", "x"]
    sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True, speculative=3)
    engine = Engine(model, units=400, max_batch_tokens=48, speculative=3, speculative_max_batch=8)
    answers = engine.generate([Request(prompt, sampling, depth="full") for prompt in prompts])
    plain = Engine(imported, units=400).generate([Request(prompt, sampling) for prompt in prompts])
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    stats = engine.stats()
    assert stats["spec_decode_num_accepted_tokens_total"] > 0
    for depth in ("shallow", "middle"):
        (answer,) = engine.generate([Request(prompts[0], sampling, depth=depth)])
        assert answer.tokens == oracle.greedy(model, prompts[0], 24, answer.tokens, depth)


@pytest.mark.drill
def test_a_router_is_fitted_and_chooses_among_the_new_exits(adapted: FitResult, heldout: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted.out, tmp_path / "model")
    told: list[str] = []
    report = routing.finish(tmp_path / "model", heldout, told.append)
    assert report is not None and report["prompts"] >= 8, told
    model = Model.load(tmp_path / "model", verify=True)
    assert model.router is not None and model.source is not None
    # without drafts the router alone decides
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True, speculative=0)
    request = Request("The shoal", sampling, quality_tolerance=1.0)
    (answer,) = Engine(model, units=200).generate([request])
    assert answer.depth in model.config.exits
    model.router.calibration.thresholds = [(0.01, 1e9)]
    (answer,) = Engine(model, units=200).generate([request])
    assert answer.depth == 2, "whatever bound it has, the first exit is within it"


def test_an_adapted_model_goes_back_to_its_family(base: Path, adapted: FitResult, tmp_path: Path) -> None:
    export_model(adapted.out, tmp_path / "back")
    was = load_file(str(base.parent / "from" / "model.safetensors"))
    now = load_file(str(tmp_path / "back" / "model.safetensors"))
    assert was.keys() == now.keys() and all(torch.equal(now[name], was[name]) for name in was)


def test_an_interrupted_run_ends_to_the_bit_as_if_nothing_had_happened(base: Path, rows: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 4:
            raise Interrupted

    calm = fit(plan(base, rows, tmp_path / "calm", steps=6))
    hit = plan(base, rows, tmp_path / "hit", steps=6, checkpoint_minutes=0.0)
    with pytest.raises(Interrupted):
        fit(hit, interrupt)
    saved = {
        name
        for path in (tmp_path / "hit.run/checkpoints/step-00000003").glob("shard-*.safetensors")
        for name in keys(path)
    }
    assert any("net.exit_mlps.2.mlp.up.weight" in name for name in saved)
    assert not any("groups" in name or "embed" in name for name in saved), "what is frozen is in the base already"
    resumed = fit(hit)
    models = [Path(result.out, "model.safetensors").read_bytes() for result in (calm, resumed)]
    assert models[0] == models[1]


def keys(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def test_a_backbone_that_moved_is_not_written(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "freeze_", lambda net: net.requires_grad_(True))
    with pytest.raises(CheckpointError, match="changed the backbone"):
        fit(plan(base, rows, tmp_path / "model", steps=2))
    assert not (tmp_path / "model").exists()


def test_our_own_model_is_adapted_from_its_shards(shards: Path, tmp_path: Path) -> None:
    own = Model.from_preset("test", seed=3)
    own.tokenizer = Tokenizer.load(shards / "tokenizer.json")
    own.save(tmp_path / "own")
    done = fit(adapt_plan(str(tmp_path / "own"), str(shards), str(tmp_path / "out"), steps=2, batch_tokens=1024))
    after = Model.load(done.out)
    ids = own.tokenizer.encode("The shoal turns.")
    assert torch.equal(after.logits(ids), own.logits(ids))
    assert set(done.bpb) == {"text", "code", "image"} and [len(each) for each in done.backbone] == [64, 64]
    assert not torch.equal(after.net.exit_norms["1"].weight, own.net.exit_norms["1"].weight)


def test_the_loss_is_kl_from_full_depth_and_its_gradient_stays_in_the_exits() -> None:
    config = exits.with_exits(presets.get("test").model)
    model = LossModel(Net(config).init_(0).double())
    exits.freeze_(model.net)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(9, 300, (2, 30), generator=draw)
    docs, none = torch.zeros_like(tokens), torch.zeros(0, config.patch_values, dtype=torch.uint8)
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(30) > 24, -1)
    sums = model(tokens, targets, docs, none, torch.zeros(0, 2, dtype=torch.long), distill=True)
    hidden = model.net(tokens, docs=docs, exits=config.exits)
    where = targets >= 0
    p = model.net.head(hidden[4][where], 4).softmax(-1)
    for place, e in enumerate(config.exits):
        q = model.net.head(hidden[e][where], e).softmax(-1)
        wanted = (p * (p.log() - q.log())).sum() if e != 4 else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(sums.kl[place], wanted, rtol=0, atol=1e-9)
        nll = -q.gather(1, targets[where][:, None]).log().sum()
        torch.testing.assert_close(sums.ce[place].sum(), nll, rtol=0, atol=1e-9)
    sums.kl.sum().backward()
    moved = {name for name, p in model.net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.net.named_parameters() if exits.is_exits(name, config)}


def test_what_cannot_be_adapted_is_refused_before_it_starts(base: Path, rows: Path, tmp_path: Path) -> None:
    Model.load(base).quantized().save(tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        plan(tmp_path / "int8", rows, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"train\.trains"):
        plan(base, rows, tmp_path / "out", lora_rank=4)
    own = Model.from_preset("test")
    own.save(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"train\.trains"):
        finetune_plan(str(tmp_path / "own"), str(rows), str(tmp_path / "run"), trains="exits")
    with pytest.raises(ConfigError, match=r"train\.distill"):
        load(TrainConfig, {"cross_entropy": 0.0}, "train")
