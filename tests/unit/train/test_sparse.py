"""An imported model whose dense layers become sparse: which ones, what they learn, and what stays as it was."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoal import Engine, Model, Request, Sampling
from shoal.data.alone import alone
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError, UsageError
from shoal.evaluate import sparsity
from shoal.model.cpu import fused
from shoal.open_weights.convert import export_model, import_model
from shoal.stages.training import Adapt
from shoal.train import sparse
from shoal.train.loop import FitResult, fit
from shoal.train.needs import memory_needed, trained_parameters
from shoal.train.plan import adapt_plan
from shoal.train.run import COMMAND
from shoal.train.sparse import sparse_plan
from tests.corpus import NOUNS, VERBS

DATA = Path(__file__).parents[2] / "data" / "open"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's form, imported in fp32, with matrices so large that what is not read is missed."""
    folder = tmp_path_factory.mktemp("sparse")
    shutil.copytree(DATA / "smollm2", folder / "from")
    shutil.copytree(DATA / "tokenizer", folder / "from", dirs_exist_ok=True)
    import_model(folder / "from", folder / "model", name="smol", dtype="float32")
    return folder / "model"


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    path = base.parent / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(24):
            draw = random.Random(number)
            said = " ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)}." for _ in range(40))
            file.write(json.dumps({"text": said}) + "\n")
    return path


def wide(base: Path) -> torch.nn.Module:
    loaded = Model.load(base)
    return sparse.made(loaded.net.float(), sparse.with_sparse(loaded.config)).requires_grad_(False)


def rows_of(base: Path, texts: Path) -> list[torch.Tensor]:
    from shoal.model import checkpoint

    loaded = checkpoint.read(base)
    return sparsity.long_rows(str(texts), loaded, sparse.with_sparse(loaded.config))


@pytest.fixture(scope="module")
def found(base: Path, texts: Path) -> dict[str, Any]:
    """Within half of what all layers together cost."""
    everything = sparsity.choose(wide(base), rows_of(base, texts), 1e9)  # type: ignore[arg-type]
    assert everything["pattern"] == "SSSSSS" and everything["kl"] > 0
    return sparsity.chosen(str(base), str(texts), f"{base.parent}/out.run", tolerance=everything["kl"] / 2)


@pytest.fixture(scope="module")
def healed(base: Path, texts: Path, found: dict[str, Any]) -> FitResult:
    out = str(base.parent / "out")
    return fit(sparse_plan(str(base), str(texts), out, found, steps=12, eval_every=0))


@pytest.mark.drill
def test_the_cheapest_layers_are_sparse_within_the_tolerance(base: Path, texts: Path, found: dict[str, Any]) -> None:
    """By hand: each layer alone by a whole forward pass, and the chosen ones together."""
    rows, net = rows_of(base, texts), wide(base)
    length = net.config.dense_length  # type: ignore[union-attr]
    assert length == found["dense_length"] == 64 and all(len(row) > length for row in rows)

    def kl(pattern: str) -> float:
        total = 0.0
        for row in rows:
            said = []
            for kinds in ("DDDDDD", pattern):
                for attention, kind in zip(sparse.attentions(net), kinds, strict=True):  # type: ignore[arg-type]
                    attention.kind = kind
                said.append(net.head(net(row[None])[6][0], 6).double().log_softmax(-1)[length:])
            total += float((said[0].exp() * (said[0] - said[1])).sum())
        return total / found["tokens"]

    alone = {str(layer + 1): kl("D" * layer + "S" + "D" * (5 - layer)) for layer in range(6)}
    assert found["alone"] == pytest.approx(alone, rel=1e-3, abs=1e-9)
    cheapest = sorted(alone, key=alone.__getitem__)[: found["layers"]]
    assert {str(n + 1) for n, kind in enumerate(found["pattern"]) if kind == "S"} == set(cheapest)
    assert 0 < found["layers"] < 6 and found["kl"] == pytest.approx(kl(found["pattern"]), rel=1e-3)
    again = sparsity.chosen(str(base), str(texts), f"{base.parent}/out.run", tolerance=found["kl"] * 2)
    assert again["layers"] >= found["layers"], "another tolerance is measured anew"


def test_what_was_chosen_stays_whole_and_is_not_changed_under_a_command_that_trains(
    base: Path, texts: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second command with other settings wrote its own choice into the folder, and the first one reported that; and one that
    was killed while it wrote left half a file, at which every later one ended."""
    run = base.parent / "once.run"
    tolerance = 3 * found["kl"]
    monkeypatch.setattr(sparsity, "choose", lambda *_: found)
    assert sparsity.chosen(str(base), str(texts), str(run), tolerance=tolerance) == found
    whole = (run / sparsity.FILE).read_bytes()
    with alone(run / COMMAND, ResourceError("busy")):
        assert sparsity.chosen(str(base), str(texts), str(run), tolerance=tolerance) == found, "the same is known"
        with pytest.raises(ResourceError, match=r"another command is training in .*once.run"):
            sparsity.chosen(str(base), str(texts), str(run), tolerance=2 * tolerance)

    def killed(path: Path, value: object) -> None:
        path.write_text("{", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(sparsity, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        sparsity.chosen(str(base), str(texts), str(run), tolerance=2 * tolerance)
    assert (run / sparsity.FILE).read_bytes() == whole and len(list(run.iterdir())) == 2


def test_biases_learn_and_nothing_else_changes(
    base: Path, texts: Path, found: dict[str, Any], healed: FitResult
) -> None:
    was, now = (load_file(str(Path(folder, "model.safetensors"))) for folder in (base, healed.out))
    for name, tensor in was.items():
        assert torch.equal(now[name], tensor), name
    more = now.keys() - was.keys()
    assert more == sparse.bias_names(Model.load(healed.out).config) and len(more) == found["layers"]
    assert all(now[name].abs().max() > 0 for name in more)
    assert healed.backbone[0] == healed.backbone[1] != ""
    assert sparsity.beyond(healed.out, str(texts)) < found["kl"]
    folder = sorted(Path(f"{healed.out}.run", "checkpoints").iterdir())[-1]
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 100_000, "a checkpoint of the biases alone"


def test_short_contexts_are_the_dense_model_to_the_bit_and_long_ones_run(
    base: Path, healed: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values in int8 by torch, as loops for both kinds of weights would be compiled for this alone."""
    dense, model = Model.load(base), Model.load(healed.out, verify=True)
    ids = [int(n) for n in torch.randint(9, 280, (200,), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(model.logits(ids[:64]), dense.logits(ids[:64]))
    assert not torch.equal(model.logits(ids), dense.logits(ids))
    greedy = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "usable", lambda x: False)
        for each in (model, model.quantized()):
            engine = Engine(each, units=200, max_batch_tokens=64, kv_cache_dtype="int8")
            (answer,) = engine.generate([Request(ids, greedy)])
            assert len(answer.tokens) == 8
    short, long = Engine(model, units=200).generate([Request(ids[:40], greedy), Request(ids, greedy)])
    assert short.tokens == dense.generate_naive(ids[:40], 8, ignore_eos=True)
    assert long.tokens == model.generate_naive(ids, 8, ignore_eos=True)
    assert model.source == dense.source


def test_an_export_is_the_dense_checkpoint(base: Path, healed: FitResult, tmp_path: Path) -> None:
    export_model(healed.out, tmp_path / "back")
    was, now = (
        load_file(str(base.parent / "from" / "model.safetensors")),
        load_file(str(tmp_path / "back" / "model.safetensors")),
    )
    assert now.keys() == was.keys() and all(torch.equal(now[name], was[name].float()) for name in was)


def test_what_cannot_be_made_sparse_is_refused_before_it_starts(
    base: Path, texts: Path, healed: FitResult, tmp_path: Path
) -> None:
    def asked(model: Path | str = base, data: Path = texts, **more: Any) -> Any:
        return sparsity.chosen(str(model), str(data), str(tmp_path / "run"), **more)

    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a fish"}) + "\n")
    with pytest.raises(
        DataError, match=r"has no row beyond the dense length: got '\d tokens at most'; allowed: more than 64"
    ):
        asked(data=short)
    with pytest.raises(DataError, match="folder"):
        asked(data=tmp_path)
    with pytest.raises(UsageError, match=r"--tolerance: got 0"):
        asked(tolerance=0)
    with pytest.raises(UsageError, match="none: the cheapest costs"):
        asked(tolerance=1e-12)
    for length in (40, 16, 256):
        with pytest.raises(UsageError, match=r"--dense-length: got \d+; allowed: a multiple of 16 from 32 on, below"):
            asked(dense_length=length)
    with pytest.raises(UsageError, match="got 'sparse layers'"):
        asked(healed.out)
    own = Model.from_preset("test")
    own.save(tmp_path / "own")
    with pytest.raises(UsageError, match="got 'hybrid layers'"):
        asked(tmp_path / "own")
    Model.load(base).quantized().save(tmp_path / "int8")
    with pytest.raises(UsageError, match="is quantised"):
        asked(tmp_path / "int8")
    assert not (tmp_path / "run").exists()


def test_the_command_chooses_once_trains_and_says_what_was_learned(
    base: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but Ray, on which its plan is trained as any other's."""
    asked = Adapt(
        model=str(base),
        data=str(texts),
        out=str(tmp_path / "out"),
        sparse=True,
        tolerance=9.0,
        steps=2,
        settings=["eval_every=0"],
    )
    plan = asked.plan()
    monkeypatch.setattr(sparsity, "choose", lambda *_: pytest.fail("measured twice"))
    assert asked.plan() == plan and plan.biases_only and plan.steps == 2
    fit(plan)
    told = asked.of_sparse()["sparse"]
    assert told["pattern"] == "SSSSSS" and told["window"] == 16 and told["top_k"] == 2 and told["learned"] > 0
    said = capsys.readouterr().err
    assert "6 of 6 layers sparse beyond 64 tokens" in said and "equal to the bit" in said
    for wrong in ({"tune": "lora"}, {"sparse": False}):
        with pytest.raises(UsageError, match=r"--tune with --sparse|--tolerance: got 9\.0; give --sparse"):
            dataclasses.replace(asked, **wrong).plan()


def test_a_plan_for_biases_keeps_a_teacher_and_asks_for_no_moments_of_the_rest(
    base: Path, texts: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    it = sparse_plan(str(base), str(texts), str(tmp_path / "out"), found)
    assert it.minutes == 10 and it.has_teacher and trained_parameters(it) == 4 * 6
    assert memory_needed(it, 1) > 0
    with pytest.raises(ConfigError, match=r"train\.trains"):
        sparse_plan(str(base), str(texts), str(tmp_path / "out"), found, lora_rank=4)
    other = sparse.with_sparse(Model.load(base).config, 96)
    with pytest.raises(CheckpointError, match="another configuration"):
        sparse.made(Model.from_preset("test").net, other)


def test_a_sparse_model_is_given_exits_and_one_with_exits_is_made_sparse(
    base: Path, texts: Path, healed: FitResult
) -> None:
    folder = base.parent
    given = fit(adapt_plan(str(healed.out), str(texts), str(folder / "sparse-exits"), steps=2, eval_every=0))
    was, now = (load_file(str(Path(out, "model.safetensors"))) for out in (healed.out, given.out))
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    exits = fit(adapt_plan(str(base), str(texts), str(folder / "exits"), steps=2, eval_every=0))
    found = sparsity.chosen(str(exits.out), str(texts), f"{folder}/exits-sparse.run", tolerance=1e9)
    made = fit(sparse_plan(str(exits.out), str(texts), str(folder / "exits-sparse"), found, steps=2, eval_every=0))
    prompt = tuple(int(n) for n in torch.randint(9, 280, (100,), generator=torch.Generator().manual_seed(0)))
    for out in (given.out, made.out):
        model = Model.load(str(out), verify=True)
        assert "S" in model.config.attn_pattern and [*model.config.exit_names] == ["shallow", "middle", "full"]
        for depth in model.config.exit_names:
            (answer,) = Engine(model).generate([Request(prompt, Sampling(max_tokens=4, ignore_eos=True), depth)])
            assert len(answer.tokens) == 4
