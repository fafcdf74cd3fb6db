"""Adapters in PEFT's format are read as they are, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import Engine, Model, Request, Sampling
from shoal.errors import CheckpointError, ResourceError
from shoal.model import adapter_files
from shoal.model.adapter_files import MOST_RANK
from shoal.open_weights import adapter, convert, families
from shoal.open_weights.served_adapter import check, read
from shoal.train import lora
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, adapt_plan, finetune_plan, quantize_plan
from tests.adapters import linears, merged, save, write
from tests.unit.engine.lively import lively
from tests.unit.open_weights.conftest import FAMILIES, edit

MODEL = Model.from_preset("test", seed=3)
PREFIX = "base_model.model."


def imported(checkpoint: Callable[[str], Path], folder: Path, family: str) -> Model:
    convert.import_model(checkpoint(family), folder / "model")
    model = Model.load(folder / "model")
    model.net.double()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_of_ours_writes_is_read_back(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """From the thin matrices of a run over what `adapter.write` makes of them, back to products beside the same linears."""
    model = imported(checkpoint, tmp_path, family)
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, linear in linears(model).items():
        outputs, inputs = linear.weight.shape  # type: ignore[union-attr,misc]
        a, b = torch.randn(2, inputs, generator=draw), torch.randn(outputs, 2, generator=draw)
        state |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    lora.save(tmp_path, state)
    adapter.write(tmp_path / lora.FILE, tmp_path / "model", tmp_path / "adapter", alpha=lora.SCALE * 2)
    got = read(tmp_path / "adapter", model)
    assert got.pairs.keys() == linears(model).keys()
    for name, (a, b) in got.pairs.items():
        wanted = lora.SCALE * state[f"{name}.lora_b"].double() @ state[f"{name}.lora_a"].double()
        torch.testing.assert_close(b.T @ a, wanted, rtol=0, atol=1e-6)
        assert len(a) == 2, "one A for the pieces of a matrix of ours is kept as one"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_another_tool_writes_changes_the_pieces_that_it_names(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's usual choice, q and v alone, each with matrices of its own; and gate without up."""
    model = imported(checkpoint, tmp_path, family)
    assert model.source is not None
    draw, tensors, wanted = torch.Generator().manual_seed(1), {}, {}
    for ours, theirs in families.names(model.source["family"], model.config):
        name = ours.removesuffix(".weight")
        if name not in linears(model):
            continue
        weight = model.net.get_parameter(ours)
        rows = families.rows(model.config, ours, len(weight), len(theirs))
        whole = torch.zeros_like(weight)
        for at, (module, count) in enumerate(zip(theirs, rows, strict=True)):
            if len(theirs) == 1 or at != 1:
                a, b = torch.randn(3, weight.shape[1], generator=draw), torch.randn(count, 3, generator=draw)
                place = PREFIX + module.removesuffix(".weight")
                tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
                start = sum(rows[:at])
                whole[start : start + count] = 12 / 3**0.5 * b.double() @ a.double()
        wanted[name] = whole
    folder = save(
        tmp_path / "adapter", tensors, r=3, lora_alpha=12, use_rslora=True,
        base_model_name_or_path=f"somebody/{model.source['name']}",
    )  # fmt: skip
    got = read(folder, model)
    assert got.pairs.keys() == wanted.keys()
    for name, (a, b) in got.pairs.items():
        torch.testing.assert_close(b.T @ a, wanted[name], rtol=0, atol=1e-5)


def test_the_engine_says_what_the_merged_imported_model_says(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for family in FAMILIES:
        model = imported(checkpoint, tmp_path / family, family)
        folder = write(tmp_path / family / "adapter", model, size=2.0)
        engine, prompt = Engine(model, units=200), list(range(5, 25))
        name = engine.load_adapter(read(folder, model))
        sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
        asked = [Request(prompt, sampling, adapter=name), Request(prompt, sampling)]
        got = [answer.tokens for answer in engine.generate(asked)]
        assert got == [one.generate_naive(prompt, 8, ignore_eos=True) for one in (merged(model, folder), model)]
        assert got[0] != got[1]


def test_identity_is_of_the_weights_and_their_scale(tmp_path: Path) -> None:
    one, same, other = (read(write(tmp_path / str(n), MODEL, seed), MODEL) for n, seed in enumerate((1, 1, 2)))
    scaled = read(write(tmp_path / "scaled", MODEL, 1, lora_alpha=7.0), MODEL)
    assert one.identity == same.identity and len({one.identity, other.identity, scaled.identity}) == 3


FIRST = "groups.0.blocks.0.attention.qkv"


def _thin(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        change(tensors)
        save(folder, tensors, **json.loads((folder / "adapter_config.json").read_text()))

    return spoil


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _told(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "adapter_config.json", **values)


def _put(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return _thin(lambda tensors: tensors.update({name: value}))


A, B = f"{PREFIX}{FIRST}.lora_A.weight", f"{PREFIX}{FIRST}.lora_B.weight"
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "another base": (_told(base_model_name_or_path="some/else"), "_or_path: got 'some/else'; allowed: test"),
    "not LoRA": (_told(peft_type="IA3"), "peft_type: got 'IA3'; allowed: LORA"),
    "DoRA": (_told(use_dora=True), "use_dora: got True"),
    "a bias": (_told(bias="all"), "bias: got 'all'"),
    "modules of its own": (_told(modules_to_save=["lm_head"]), "modules_to_save"),
    "ranks of their own": (_told(rank_pattern={"qkv": 2}), "rank_pattern"),
    "no rank": (_told(r=None), "adapter_config.json: r: allowed"),
    "a rank too large": (_told(r=MOST_RANK + 1), f"r: got {MOST_RANK + 1}; allowed: 1 to {MOST_RANK}"),
    "no alpha": (_told(lora_alpha="much"), "lora_alpha: got 'much'"),
    "another width": (_put(A, torch.zeros(3, 7)), "lora_A [3, 7]"),
    "another output": (_put(B, torch.zeros(7, 3)), "lora_B [7, 3]"),
    "ranks that differ": (_put(A, torch.zeros(2, 48)), "lora_A [2, 48]"),
    "another rank than it says": (
        _thin(lambda t: t.update({A: torch.zeros(2, 48), B: torch.zeros(len(t[B]), 2)})), f"rank of {FIRST}: got 2; allowed: 3",
    ),
    "an alpha that no float holds": (_told(lora_alpha=10**400), "lora_alpha: got a whole number of 401 digits"),
    "a base that it was taken out of": (_told(init_lora_weights="pissa"), "init_lora_weights: got 'pissa'"),
    "pooled inputs": (_told(use_qalora=True), "use_qalora: got True"),
    "a choice among several": (_told(arrow_config={"top_k": 2}), "arrow_config"),
    "half a pair": (_thin(lambda tensors: tensors.pop(B) is None), "no lora_B"),
    "NaN": (_put(A, torch.full((3, 48), torch.nan)), "NaN or infinity"),
    "infinity": (_put(A, torch.full((3, 48), torch.inf)), "NaN or infinity"),
    "whole numbers": (_put(A, torch.zeros(3, 48, dtype=torch.int32)), "torch.int32 [3, 48]"),
    "an unknown tensor": (_put(f"{PREFIX}embed.lora_embedding_A", torch.zeros(3, 48)), "lora_embedding_A"),
    "a module that is none": (
        _thin(lambda t: t.update({A.replace("qkv", "x"): torch.zeros(3, 48), B.replace("qkv", "x"): torch.zeros(48, 3)})),
        "no linear of this model",
    ),
    "no thin matrices": (_thin(lambda tensors: tensors.clear()), "no thin matrices"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "a broken config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot read"),
    "a pickle": (lambda folder: _weights(folder).rename(folder / "adapter_model.bin") and None, "cannot read"),
    "not safetensors": (lambda folder: _weights(folder).write_bytes(b"\x80\x04" * 99) and None, "safetensors"),
    "cut short": (
        lambda folder: _weights(folder).write_bytes(_weights(folder).read_bytes()[:-1]) and None, "safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_served_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", MODEL)
    read(folder, MODEL)
    spoil, says = WRONG[what]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        read(folder, MODEL)
    assert says in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_floats_of_any_kind_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", MODEL, dtype=dtype)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    a, b = read(folder, MODEL).pairs[FIRST]
    torch.testing.assert_close(a, tensors[A].float(), rtol=0, atol=0)
    torch.testing.assert_close(b, 2 * tensors[B].float().T, rtol=0, atol=1e-6)  # alpha 6, rank 3


def test_matrices_of_one_linear_by_both_of_its_names_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """One of them was left out without a word."""
    model = imported(checkpoint, tmp_path, "qwen2")
    folder = write(tmp_path / "adapter", model)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    place, rank = f"{PREFIX}model.layers.0.self_attn.o_proj", 3
    inputs, outputs = tensors[A.replace("qkv", "out")].shape[1], len(tensors[B.replace("qkv", "out")])
    tensors |= {f"{place}.lora_A.weight": torch.ones(rank, inputs), f"{place}.lora_B.weight": torch.ones(outputs, rank)}
    save(folder, tensors, **json.loads((folder / "adapter_config.json").read_text()))
    with pytest.raises(CheckpointError, match="o_proj: got 'matrices of a linear by its other name as well'; save"):
        read(folder, model)


def test_a_file_beyond_what_any_adapter_takes_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", MODEL)
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2**30)  # a hole, which takes no room on the disk
    with pytest.raises(CheckpointError, match="1073741824 bytes"):
        read(folder, MODEL)


def test_an_int8_twin_takes_the_adapters_of_its_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", MODEL)
    assert read(folder, MODEL.quantized()).identity == read(folder, MODEL).identity


def test_a_smoothed_base_takes_none_in_whatever_it_is_computed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its channels stay where they were moved to when the machine cannot be trusted with INT8."""
    model = imported(checkpoint, tmp_path, "qwen2")
    folder = write(tmp_path / "adapter", model)
    model.net.float()
    model.quantized([list(range(5, 40))]).save(tmp_path / "int8")

    def not_trusted(_: torch.device) -> None:
        raise ResourceError("no")

    monkeypatch.setattr("shoal.model.int8.trusted", not_trusted)
    for held in (Model.load(tmp_path / "int8", on_fallback=lambda why: None), model.quantized()):
        with pytest.raises(CheckpointError, match="channels were moved"):
            read(folder, held)


def test_it_is_checked_and_known_without_the_models_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", MODEL)
    for model in (MODEL, MODEL.quantized()):
        model.save(tmp_path / model.name)
        check(folder, tmp_path / model.name)
    assert adapter_files.read(folder).identity == read(folder, MODEL).identity
    write(tmp_path / "adapter", MODEL, base_model_name_or_path="else")
    with pytest.raises(CheckpointError, match="got 'else'"):
        check(folder, tmp_path / MODEL.name)


def test_what_lora_learned_of_a_model_of_our_own_is_served_beside_it(tmp_path: Path) -> None:
    """By the names of our network; its tokens are those of the model that the run wrote."""
    lively().save(tmp_path / "base")
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A fish."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 8)
    more = {"steps": 4, "lora_rank": 3, "learning_rate": 3e-2, "batch_tokens": 192}
    plan = finetune_plan(str(tmp_path / "base"), str(tmp_path / "chats.jsonl"), str(tmp_path / "run"), **more)
    fit(plan)
    adapter.write(tmp_path / "run" / lora.FILE, tmp_path / "base", tmp_path / "run" / "adapter", alpha=3 * lora.SCALE)
    base, written = Model.load(tmp_path / "base"), Model.load(plan.model_dir)
    engine = Engine(base, units=400)
    identity = engine.load_adapter(read(tmp_path / "run" / "adapter", base))
    asked = Request(list(range(30, 60)), Sampling(temperature=0, max_tokens=12, ignore_eos=True), depth="full")
    (plain,), (adapted,) = (engine.generate([dataclasses.replace(asked, adapter=name)]) for name in ("", identity))
    assert adapted.tokens == written.generate_naive(asked.prompt, 12, "full", ignore_eos=True) != plain.tokens  # type: ignore[arg-type]


def learned(model: Path, folder: Path) -> Path:
    """An adapter of ours, as a run that fine-tuned the `model` would leave it."""
    net, draw, state = Model.load(model), torch.Generator().manual_seed(0), {}
    for name, linear in linears(net).items():
        outputs, inputs = linear.weight.shape  # type: ignore[union-attr,misc]
        state[f"{name}.lora_a"] = torch.randn(2, inputs, generator=draw)
        state[f"{name}.lora_b"] = torch.randn(outputs, 2, generator=draw)
    folder.mkdir()
    lora.save(folder, state)
    adapter.write(folder / lora.FILE, model, folder / "adapter", alpha=lora.SCALE * 2)
    return folder / "adapter"


def trained(made: Callable[..., FitPlan], model: Path, out: Path, **more: Any) -> Path:
    """Where a run of two updates has written what `made` plans for the `model`."""
    rows = out.with_suffix(".jsonl")
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A fish."}]}
    rows.write_text((json.dumps(row) + "\n") * 16)
    fit(plan := made(str(model), str(rows), str(out), steps=2, batch_tokens=192, eval_every=0, **more))
    return Path(plan.model_dir)


def test_an_adapter_of_ours_knows_its_base_among_models_of_one_name_and_shape(tmp_path: Path) -> None:
    """Runs of one preset have one name: by it and by shapes alone a retrained model, whose weights have moved, took the
    adapters of the one before, and answered with what neither had learned."""
    for number in (3, 4):
        Model.from_preset("test", seed=number).save(tmp_path / f"{number}")
    folder = learned(tmp_path / "3", tmp_path / "run")
    tuned = trained(finetune_plan, tmp_path / "3", tmp_path / "tuned")
    merged_ = trained(finetune_plan, tmp_path / "3", tmp_path / "merged", lora_rank=2)
    for other in (tmp_path / "4", tuned, merged_):
        for refuses in (lambda: check(folder, other), lambda: read(folder, Model.load(other))):  # noqa: B023
            with pytest.raises(
                CheckpointError, match=r"sha256 of its base: got '[0-9a-f]{16}'; allowed: [0-9a-f]{16}, which is "
            ) as told:
                refuses()
            assert "\n" not in told.value.message
    # the same weights rounded, as trained for it, or copied
    Model.load(tmp_path / "3").quantized().save(tmp_path / "int8")
    aware = trained(quantize_plan, tmp_path / "3", tmp_path / "aware")
    Model.load(tmp_path / "3").save(tmp_path / "copy")
    for same in (tmp_path / "3", tmp_path / "int8", aware, tmp_path / "copy"):
        check(folder, same)
        read(folder, Model.load(same))


def test_the_base_of_an_imported_model_stays_with_its_exits_and_in_any_dtype(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    convert.import_model(source, tmp_path / "base")
    convert.import_model(source, tmp_path / "bf16", dtype="bfloat16", name="test")
    folder = learned(tmp_path / "base", tmp_path / "run")
    exits_ = trained(adapt_plan, tmp_path / "base", tmp_path / "exits")
    for same in (tmp_path / "bf16", exits_):
        check(folder, same)
    other = trained(partial(adapt_plan, tune="lora"), tmp_path / "base", tmp_path / "other")
    edit(source / "config.json", rms_norm_eps=1e-5)  # the same weights still
    convert.import_model(source, tmp_path / "again")
    check(folder, tmp_path / "again")
    tensors = load_file(str(source / "model.safetensors"))
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, str(source / "model.safetensors"), metadata={"format": "pt"})
    convert.import_model(source, tmp_path / "changed")
    for another in (other, tmp_path / "changed"):
        with pytest.raises(CheckpointError, match="sha256 of its base"):
            check(folder, another)


def test_a_model_of_before_that_does_not_know_its_base_takes_an_adapter_by_name(tmp_path: Path) -> None:
    Model.from_preset("test", seed=3).save(tmp_path / "model")
    folder = learned(tmp_path / "model", tmp_path / "run")
    edit(tmp_path / "model" / "config.json", base_sha256=None)
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"no manifest\.json"):
        read(folder, Model.load(tmp_path / "model"))
