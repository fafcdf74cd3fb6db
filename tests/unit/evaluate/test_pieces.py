"""What is measured in pieces: the same to the last bit however many processes do them, and no model in the one that asks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Model, presets
from shoal.config import ModelConfig
from shoal.data.chats.rows import HELDOUT
from shoal.data.shards import token_bytes
from shoal.errors import ResourceError, UsageError
from shoal.evaluate import compared, evaluation, measures, pieces, prompts, routing
from shoal.evaluate.evaluation import Sizes
from shoal.evaluate.pieces import Models, Piece, need_gpu_memory
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import checkpoint
from shoal.model.net import Net
from shoal.model.router import Router
from shoal.on_ray import measure
from shoal.on_ray.measure import need_machine
from tests.corpus import write_corpus
from tests.pretend_gpu import pretended

CONFIG: ModelConfig = presets.get("test").model


def far(asked: Sequence[Piece]) -> Iterator[Any]:
    """Each piece in a process of its own, but for the process: what it is told and gives is pickled, and it loads anew."""
    for piece in map(pickle.loads, map(pickle.dumps, asked)):
        yield pickle.loads(pickle.dumps(piece.do(Models(), *piece.args)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, chats among it, and a model."""
    folder = tmp_path_factory.mktemp("pieces")
    data = write_corpus(folder / "data", presets.get("test"), documents=20, heldout=40)
    turns = [{"role": "user", "content": "what {}?"}, {"role": "assistant", "content": "a shoal"}]
    rows = [
        {"task": "a", "group": str(n), "messages": [{**turns[0], "content": f"what {n}?"}, turns[1]]}
        for n in range(120)
    ]
    (data / HELDOUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model(data, 0).save(folder / "model")
    return folder


def model(data: Path, seed: int) -> Model:
    return Model(CONFIG, Net(CONFIG).init_(seed), Tokenizer.load(data / "tokenizer.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.drill
def test_a_router_is_the_same_whoever_measured_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as what a process that holds the model writes."""
    monkeypatch.setattr(routing, "LOT", 7)
    found = []
    for name, run in (("here", pieces.here), ("far", far)):
        model(made / "data", 0).save(tmp_path / name)
        found.append(routing.refit(tmp_path / name, made / "data", run=run))
    assert found[0] == found[1]
    assert contents(tmp_path / "here") == contents(tmp_path / "far")
    whole = Model.load(tmp_path / "here")
    whole.save(tmp_path / "whole", card=(tmp_path / "here" / "README.md").read_text(encoding="utf-8"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "here")


@pytest.mark.drill
def test_a_report_is_the_same_whoever_measured_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for how fast that was."""
    monkeypatch.setattr(compared, "ROWS", 8)
    monkeypatch.setattr(compared, "PROMPTS", 5)
    fp32 = model(made / "data", 1)
    fp32.save(tmp_path / "model")
    routing.refit(tmp_path / "model", made / "data" / HELDOUT)
    fp32.quantized().save(tmp_path / "int8")
    routing.refit(tmp_path / "int8", made / "data" / HELDOUT)
    models = {"fp32": tmp_path / "model", "int8": tmp_path / "int8"}
    rounds = {label: {1: [1.0, 1.0, 1.0], 8: [2.0, 2.0, 2.0]} for label in models}
    monkeypatch.setattr(compared, "interleaved_speed", lambda held, tokens: rounds)
    monkeypatch.setattr(compared, "decode_speed", lambda *_: 1.0)

    def told(run: pieces.Run) -> dict[str, Any]:
        sizes = Sizes(16, 16, 16, 16, 20, 16, 2)  # of each two pieces and more
        return {**evaluation.compare(models, made / "data", sizes=sizes, run=run), "machine": None}

    here = told(pieces.here)
    assert here == told(far)
    assert here["frontier"] and here["tolerance"] and here["int8"] and here["depth"]["router"]
    assert {row["metric"] for row in here["quality"]["rows"]} >= {"bpb text", "bpb image text", "next-patch error"}


@pytest.mark.drill
def test_who_asks_loads_no_weights(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(made / "data", 2).save(tmp_path / "model")
    seen: list[Piece] = []

    def note(asked: Sequence[Piece]) -> Iterator[Any]:
        seen.extend(asked)
        with monkeypatch.context() as there:
            there.setattr(Model, "load", load)
            yield from list(far(asked))

    load = Model.load
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("the process that asks loads a model"))
    routing.refit(tmp_path / "model", made / "data", run=note)
    evaluation.compare({"m": tmp_path / "model"}, made / "data", sizes=Sizes(8, 8, 8, 8, 8, 8, 2), run=note)
    assert seen and all(Path(piece.args[0]).is_absolute() for piece in seen if isinstance(piece.args[0], str))


def test_a_router_is_given_to_weights_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were cut, and with what lies beside them; the one of before is gone."""
    it, router = Model.from_preset("test", seed=3), Router(CONFIG)
    for name, one in (("given", Router(CONFIG)), ("saved", router)):
        checkpoint.save(
            tmp_path / name, config=CONFIG, state=it.net.state_dict(), tokenizer=it.tokenizer, name="fish", router=one,
            card="# of a shoal\n", shard_bytes=50_000, base="b",
            source={"family": "fish", checkpoint.LICENCES: {"LICENSE": "MIT"}},
        )  # fmt: skip
    monkeypatch.setitem(checkpoint.save.__kwdefaults__, "shard_bytes", 50_000)
    checkpoint.give_router(tmp_path / "given", router)
    assert contents(tmp_path / "given") == contents(tmp_path / "saved")
    assert len(list((tmp_path / "given").glob("*.safetensors"))) > 2


def test_a_process_holds_the_models_that_its_piece_asks_for(made: Path, tmp_path: Path) -> None:
    model(made / "data", 4).save(tmp_path / "other")
    held = Models()
    (first,) = held(made / "model")
    again, other = held(made / "model", tmp_path / "other")
    assert again is first and held(tmp_path / "other") == [other]
    assert held(made / "model")[0] is not first


def test_what_does_not_fit_is_said_with_the_arithmetic(made: Path) -> None:
    need_gpu_memory(made / "model", 10**9)
    with pytest.raises(
        ResourceError, match=r"does not fit one GPU .*got '0.0 GB that are free'; allowed: at least .*--no-gpu"
    ):
        need_gpu_memory(made / "model", 10**3)
    need_machine(8e9, [1e9, 9e9])
    with pytest.raises(ResourceError, match=r"needs 7.5 GiB of memory.*0.9 GiB on the largest machine.*add a machine"):
        need_machine(8e9, [1e9, 5e8])
    with pytest.raises(ResourceError, match=r"0.0 GiB on the largest"):
        need_machine(1, [])


def test_one_machine_without_gpus_measures_in_its_own_process(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus in (None, True, False):  # a run that trains on GPUs would have been refused before
        with measure.measuring(made / "model", gpus=gpus) as run:
            assert run is pieces.here
    with pytest.raises(UsageError, match=r"--gpu: got 'a machine without one'"):
        measure.need_gpus(True)
    measure.need_gpus(None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    measure.need_gpus(True)


@pytest.mark.drill
def test_what_is_measured_on_a_gpu_is_what_is_on_a_cpu(made: Path) -> None:
    """On a pretended one, which refuses tensors of the host beside its own: gaps, bits, patches, one model beside another."""
    it, data = model(made / "data", 5), made / "data"
    rows = prompts.encoded(prompts.heldout_rows(it, data, 2, asked=None))
    lengths = token_bytes(it.tokenizer)

    def found() -> list[np.ndarray]:
        images, texts = (measures.HeldoutRows(data, kind, 8) for kind in ("image", "text"))
        bits, patches = measures.bit_sums(it.net, texts, CONFIG.exits, lengths), measures.patch_sums(it.net, images)
        rise = measures.beside([it.net, it.net], texts, lengths)[1]
        gaps = [each.numpy() for each in prompts.gaps(it.net, rows)]
        return [*gaps, *bits.columns, *patches.columns, np.array([rise.rise.value, rise.agreement.value])]

    here = found()
    with pretended():
        it.to("cuda:0")
        there = found()
    assert here[-1].tolist() == [0.0, 1.0] and len(here) == len(there) == 2 + 4 + 3 + 1
    for mine, theirs in zip(here, there, strict=True):
        assert isinstance(theirs, np.ndarray) and np.allclose(mine, theirs, rtol=1e-4, atol=1e-4)
