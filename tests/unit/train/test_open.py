"""Imported models are trained: wholly, by thin matrices, and with the rounding of INT8; and taken away again."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoal import Engine, Model, Request, Sampling
from shoal.cli import main
from shoal.config import TrainConfig
from shoal.data.batches import ChatBatches
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.chat import encode_chat
from shoal.open_weights import adapter
from shoal.open_weights.convert import export_model, import_model
from shoal.train import log, lora
from shoal.train.loop import fit
from shoal.train.needs import memory_needed
from shoal.train.plan import FitPlan, adapt_plan, finetune_plan, quantize_plan
from shoal.train.refusal import check, need_replaceable

DATA = Path(__file__).parents[2] / "data" / "open"
ASKED, ANSWER = "What is it?", "A fish."


def imported(family: str, folder: Path) -> Path:
    source = folder / "source"
    shutil.copytree(DATA / family, source)
    shutil.copytree(DATA / "tokenizer", source, dirs_exist_ok=True)
    import_model(source, folder / "model")
    return folder / "model"


def chats(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
        {"instruction": ASKED, "output": ANSWER},
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return path


def losses(run: str) -> list[float]:
    return [record["loss"] for record in log.read(run) if record["kind"] == "step"]


def learn(plan: FitPlan) -> list[float]:
    fit(plan)
    return losses(plan.run)


@pytest.mark.parametrize("family", ["smollm2", pytest.param("olmo2", marks=pytest.mark.drill)])
def test_a_fine_tuned_model_answers_as_it_was_taught_and_is_exported(family: str, tmp_path: Path) -> None:
    base, data = imported(family, tmp_path), chats(tmp_path)
    more = {"steps": 60, "learning_rate": 2e-2, "batch_tokens": 256, "accumulate": 1, "checkpoint_minutes": 9.0}
    plan = finetune_plan(str(base), str(data), str(tmp_path / "run"), **more)
    found = learn(plan)
    assert found[-1] < 0.1 < found[0]
    model = Model.load(plan.model_dir, verify=True)
    prompt = encode_chat(
        [{"role": "user", "content": ASKED}], model.tokenizer, model.config, template=model.chat_template
    )
    answer = Engine(model).generate([Request(prompt.ids, Sampling(max_tokens=20, temperature=0))])[0]
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop"), "the token that ends an answer is learned"
    assert (plan.model_dir / "LICENSE").read_text() == (base / "LICENSE").read_text(), (
        "its terms travel with the weights"
    )
    export_model(plan.model_dir, tmp_path / "back")
    import_model(tmp_path / "back", tmp_path / "again")
    again = Model.load(tmp_path / "again")
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor), name
    assert (tmp_path / "back" / "LICENSE").exists()


def test_no_loss_is_taken_but_on_answers_and_ids_of_images_are_words(tmp_path: Path) -> None:
    """Id 8 is a patch in our vocabulary; here it is a letter, and learned like any other."""
    model = Model.load(imported("smollm2", tmp_path))
    word = model.tokenizer.decode([8])
    path = tmp_path / "c.jsonl"
    messages = [{"role": "user", "content": word}, {"role": "assistant", "content": word + word}]
    path.write_text(json.dumps({"messages": messages}))
    batches = ChatBatches(path, model.tokenizer, model.config, batch_tokens=64, parts=1, template=model.chat_template)
    (batch,) = batches.at(0)
    learned = batch.targets[batch.targets >= 0].tolist()
    assert learned == [*model.tokenizer.encode(word + word), model.tokenizer.ends[0]] and 8 in learned
    assert len(batch.grid) == len(batch.patches) == 0


def test_thin_matrices_are_an_adapter_of_peft(tmp_path: Path) -> None:
    """Its form by PEFT's definition: W + alpha / r B A gives the weights that were written, under the source's names."""
    for family, targets in (
        ("qwen2", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ):
        folder = tmp_path / family
        base, data = imported(family, folder), chats(folder)
        more = {"steps": 6, "lora_rank": 3, "learning_rate": 2e-2, "batch_tokens": 256, "accumulate": 1}
        plan = finetune_plan(str(base), str(data), str(folder / "run"), **more)
        found = learn(plan)
        assert found[-1] < found[0]
        for _ in range(2):  # the second takes the place of the first
            adapter.write(Path(plan.run) / lora.FILE, base, folder / "adapter", alpha=3 * lora.SCALE)
        told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (told["peft_type"], told["r"], told["lora_alpha"], told["target_modules"]) == ("LORA", 3, 6.0, targets)
        thin = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
        export_model(plan.model_dir, folder / "back", check=False)
        before, after = (load_file(str(folder / name / "model.safetensors")) for name in ("source", "back"))
        changed = 0
        for name, tensor in before.items():
            at = f"base_model.model.{name.removesuffix('.weight')}"
            expected = tensor.float()
            if f"{at}.lora_A.weight" in thin:
                a, b = thin.pop(f"{at}.lora_A.weight"), thin.pop(f"{at}.lora_B.weight")
                expected = expected + told["lora_alpha"] / told["r"] * b @ a
                changed += 1
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)
        assert not thin and changed == plan.model.layers * len(targets)


def test_int8_learns_from_the_fp32_of_an_imported_model(tmp_path: Path) -> None:
    base, data = imported("smollm2", tmp_path), chats(tmp_path)
    plan = quantize_plan(str(base), str(data), str(tmp_path / "int8"), steps=3, batch_tokens=512)
    fit(plan)
    assert Model.load(tmp_path / "int8").config.quantization == "w8a8"


def test_weights_with_outliers_are_smoothed_before_they_learn_with_the_rounding(tmp_path: Path) -> None:
    """A rate of nothing leaves what smoothing did: the token table is the source's, and INT8 is much nearer to fp32."""
    base, data = imported("smollm2", tmp_path), chats(tmp_path)
    model = Model.load(base)
    model.net.float()
    with torch.no_grad():
        for block in (block for group in model.net.groups for block in group.blocks):  # type: ignore[union-attr]
            for norm, product in ((block.attention_norm, block.attention.qkv), (block.mlp_norm, block.mlp.up)):
                norm.weight[3] *= 40
                product.weight[:, 3] /= 40
    model.save(base)
    plan = quantize_plan(str(base), str(data), str(tmp_path / "int8"), steps=1, batch_tokens=512, learning_rate=1e-12)
    assert not plan.model.tied and model.config.tied
    begun = fit(plan)
    smoothed, plain = Model.load(begun.out), model.quantized()
    ids = model.tokenizer.encode("What is it? A fish.")
    exact = model.logits(ids)
    far, near = ((int8.logits(ids) - exact).square().mean() for int8 in (plain, smoothed))
    assert near < 0.3 * far, (near, far)
    table = smoothed.net.embed.weight.float() * smoothed.net.embed.weight_scale  # type: ignore[operator]
    torch.testing.assert_close(
        table, model.net.embed.weight, rtol=0, atol=float(model.net.embed.weight.abs().max()) / 100
    )


def test_an_open_models_rows_are_no_longer_than_a_training_row_of_ours(tmp_path: Path) -> None:
    """Its training length is all of its context, for whose logits and scores no machine has room."""
    base, data = imported("smollm2", tmp_path), chats(tmp_path)

    def plan(**more: Any) -> FitPlan:
        return finetune_plan(str(base), str(data), str(tmp_path / "run"), **more)

    context = plan().model.context
    assert plan().row_length == min(1024, context) and plan(row_tokens=32).row_length == 32
    assert memory_needed(plan(row_tokens=32, batch_tokens=128), 1) < memory_needed(plan(), 1)
    assert plan(row_tokens=32).identity() != plan().identity()
    with pytest.raises(ConfigError, match=f"row_tokens: got {context + 1}; allowed: 0 to {context}"):
        plan(row_tokens=context + 1)
    assert plan().train.learning_rate < plan(lora_rank=4).train.learning_rate < TrainConfig().learning_rate


OTHER = "No bird."


def likelihood(model: Model, answer: str) -> float:
    """Log of the probability of an answer and its end, nats."""
    asked = [{"role": "user", "content": ASKED}]
    prompt, whole = (
        encode_chat(
            messages,
            model.tokenizer,
            model.config,
            template=model.chat_template,
            add_generation_prompt=messages == asked,
        ).ids
        for messages in (asked, [*asked, {"role": "assistant", "content": answer}])
    )
    end = whole.index(model.tokenizer.ends[0], len(prompt)) + 1
    logits = model.logits(torch.tensor([whole[:end]]))[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, whole[at]]) for at in range(len(prompt), end))


@pytest.mark.parametrize(
    "more", [{"learning_rate": 2e-3}, {"learning_rate": 1e-2, "lora_rank": 4}], ids=["all", "lora"]
)
def test_preferences_are_learned_against_the_frozen_base(more: dict[str, Any], tmp_path: Path) -> None:
    """By DPO's definition: log 2 at the start, and in the end -log sigmoid(beta ((c - c0) - (r - r0)))."""
    base, path, beta = imported("smollm2", tmp_path), tmp_path / "pairs.jsonl", 0.5
    path.write_text((json.dumps({"prompt": ASKED, "chosen": ANSWER, "rejected": OTHER}) + "\n") * 4)
    how = {"dpo": beta, "steps": 12, "batch_tokens": 512, "accumulate": 1, "checkpoint_minutes": 9.0, **more}
    plan = finetune_plan(str(base), str(path), str(tmp_path / "run"), **how)
    found = learn(plan)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6), "the model is the reference"
    assert found[-1] < 0.5
    before, after = (
        Model.load(import_model(tmp_path / "source", tmp_path / "fp32", dtype="float32").out),
        Model.load(plan.model_dir),
    )
    gained = [likelihood(after, answer) - likelihood(before, answer) for answer in (ANSWER, OTHER)]
    end = math.log1p(math.exp(-beta * (gained[0] - gained[1])))
    assert end < 0.5 and gained[0] > gained[1]


def test_preferences_are_for_fine_tuning_alone(tmp_path: Path) -> None:
    base, data = imported("smollm2", tmp_path), chats(tmp_path)
    for wrong in ({"replay": str(tmp_path)}, {"distill": 1.0}):
        with pytest.raises(ConfigError, match=r"train\.dpo"):
            finetune_plan(str(base), str(data), str(tmp_path / "run"), dpo=0.1, **wrong)
    with pytest.raises(ConfigError, match=r"train\.dpo"):
        quantize_plan(str(base), str(data), str(tmp_path / "int8"), dpo=0.1, distill=0.0)


def test_the_command_leaves_the_adapter_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process in place of Ray's workers."""
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: fit(plan))
    base, data, run = imported("smollm2", tmp_path), chats(tmp_path), tmp_path / "run"
    options = ["--model", base, "--data", data, "--heldout", data, "--out", run, "--steps", "2", "--set", "lora_rank=3"]
    assert main(["finetune", *map(str, options), "--batch-tokens", "512", "--json"]) == 0
    told = capsys.readouterr()
    assert f"adapter for PEFT in {run / 'adapter'}" in told.err and "there is nothing to choose" in told.err
    assert json.loads(told.out)["router"] is None
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 3
    (run / "adapter" / "notes.txt").touch()
    assert main(["finetune", *map(str, options), "--batch-tokens", "512"]) == 1
    assert "something that is there" in capsys.readouterr().err


def test_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path: Path) -> None:
    """An `adapt` that was killed between its model and its router found another base, and never went on; with --tune what was
    there before was gone."""
    model, data = imported("qwen2", tmp_path), str(chats(tmp_path))
    (tmp_path / "link").symlink_to(model)
    for name, out in (
        (str(model), f"{model}/"),
        (str(tmp_path / "link"), str(model)),
        (str(model), "./model/../model"),
    ):
        plan = adapt_plan(name, data, out, steps=1)
        if out.startswith("."):
            plan = dataclasses.replace(plan, init="model")
        with pytest.raises(CheckpointError, match="got 'the model that the run starts from'; give another --out"):
            need_replaceable(plan)
    assert not (tmp_path / "model.run").exists()
    plan = dataclasses.replace(finetune_plan(str(model), data, str(tmp_path)), steps=1)
    with pytest.raises(CheckpointError, match="the model that the run starts from"):
        check(plan, 1)
    need_replaceable(adapt_plan(str(model), data, str(tmp_path / "other"), steps=1))
    remote = dataclasses.replace(plan, init="s3://b/m", run="s3://b", out="s3://b/m/")
    with pytest.raises(CheckpointError, match="the model that the run starts from"):
        need_replaceable(remote)
