"""What `shoal export` writes is a checkpoint that vLLM's own Llama loads, at every depth, and says the same tokens of."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, Request, Sampling
from shoal.api.serve_args import ServeArgs
from shoal.engine.events import Event, Finished, Guide, Token
from shoal.errors import CheckpointError, ConfigError, RequestError
from shoal.inputs.chat import Encoded
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits
from shoal.vllm_plugin import PER_REQUEST
from shoal.vllm_plugin.start import start
from tests.vllm.conftest import write_llama
from tests.vllm.test_same_tokens import ANSWER, assert_same, ours, theirs

Vllm = Callable[..., Any]
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**27, "block_size": 32}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model with early exits of weights of their own, of a shorter context; its name leads elsewhere."""
    folder = tmp_path_factory.mktemp("adapted")
    import_model(write_llama(folder / "llama", layers=6), folder / "model", context=400)
    base = Model.load(folder / "model")
    net, draw = exits.added(base.net, exits.with_exits(base.config)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if exits.is_exits(name, net.config) and weight.dim() > 1:
                weight += torch.empty(weight.shape).normal_(0, weight.std().item() / 4, generator=draw)
    Model(net.config, net, base.tokenizer, name="../fish", chat_template=base.chat_template, source=base.source).save(
        folder / "exits"
    )
    return folder / "exits"


@pytest.mark.parametrize("depth", ["shallow", "middle", "full"])
def test_vllm_says_of_an_exported_depth_what_the_exit_says(
    depth: str, adapted: Path, tmp_path: Path, vllm: Vllm
) -> None:
    model, draw = Model.load(adapted), random.Random(0)
    prompts = [Encoded([draw.randrange(2, 258) for _ in range(tokens)]) for tokens in (5, 33, 100, 300)]
    expected = ours(model, prompts, [depth] * len(prompts))
    export_model(adapted, tmp_path / depth, depth=depth)
    engine = vllm(tmp_path / depth, block_size=32)  # of its own attention
    assert engine.llm_engine.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert_same(expected, theirs(model, engine, prompts), within=5e-4)  # their order of sums is another
    told = engine.get_tokenizer().apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert told == "<s>[user]Hello[assistant]"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, of a path that leaves room for the names of vLLM's sockets: 107 characters."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.parametrize(("depth", "layers"), [("middle", 4), (None, 6)])
def test_the_gateway_s_vllm_serves_an_imported_model_at_one_depth(
    depth: str | None, layers: int, adapted: Path, short: Path
) -> None:
    model, prompt = Model.load(adapted), Encoded([17, 90, 200, 33, 90, 17, 5])
    named = {"hf_overrides": {"depth": depth}} if depth else {}
    args = ServeArgs(model=str(adapted), engine="vllm", max_batch=2, threads=1, vllm={**OPTIONS, **named})
    (expected,) = ours(model, [prompt], [depth or "full"])

    async def asked() -> tuple[list[Event], list[Event], str]:
        engine = start(str(adapted), args.served(str(adapted)), args)
        assert not [*short.rglob("*.safetensors")], "vLLM has read them"
        assert engine._llm.model_config.max_model_len == model.config.context == 400
        try:
            sampling = Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True)
            said = [event async for events in engine.batches(Request(prompt, sampling)) for event in events]
            guided = Sampling(temperature=0, max_tokens=40, guided=Guide("choice", ("yes", "no")))
            chosen = [event async for events in engine.batches(Request(prompt, guided)) for event in events]
            with pytest.raises(RequestError) as refused:
                async for _ in engine.batches(Request(prompt, sampling, depth="shallow")):
                    pass
            return said, chosen, refused.value.message
        finally:
            await engine.close()

    said, chosen, refused = asyncio.run(asked())
    assert [event.token for event in said if isinstance(event, Token)] == list(expected.tokens)
    assert isinstance(said[-1], Finished) and said[-1].depth == layers
    assert "".join(event.text for event in chosen if isinstance(event, Token)) in ("yes", "no")
    assert "the depth that this deployment fixes" in refused


def test_what_vllm_cannot_do_with_an_imported_model_is_a_line(adapted: Path, tmp_path: Path) -> None:
    per_request = ServeArgs(model=str(adapted), engine="vllm", vllm={"hf_overrides": {"depth": PER_REQUEST}})
    allowed = "allowed: shallow, middle, full, of a model that was imported"
    with pytest.raises(ConfigError, match=f"got 'per-request'; {allowed}"):
        start(str(adapted), per_request.served(str(adapted)), per_request)
    Model.load(adapted).quantized().save(tmp_path / "int8")
    args = ServeArgs(model=str(tmp_path / "int8"), engine="vllm")
    with pytest.raises(CheckpointError, match="a quantised model"):
        start(args.model or "", args.served(args.model or ""), args)
