"""``--set KEY=VALUE``: what may be set, and how wrong ones are told; plans that cannot be."""

import dataclasses
import re
import weakref
from pathlib import Path

import pytest
import torch

from shoal import Model
from shoal.errors import ConfigError, ResourceError, UsageError
from shoal.model.cost import parameters
from shoal.on_ray.train import parse_workers, preflight, train
from shoal.train.needs import memory_needed, saved_at_once
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan, quantize_plan
from shoal.train.refusal import check, need_memory_of_gpu
from shoal.train.run import enough_memory
from shoal.train.settings import settings


def test_values_are_of_their_fields_types() -> None:
    texts = ["learning_rate=1e-3", "optimizer=muon", "betas=[0.9, 0.99]", "keep_best=true", "eval_every=5"]
    want = {"learning_rate": 1e-3, "optimizer": "muon", "betas": (0.9, 0.99), "keep_best": True, "eval_every": 5}
    assert settings(texts) == want
    plan = pretrain_plan("test", "data", "run", steps=1, **settings(texts))
    assert plan.train.betas == (0.9, 0.99) and plan.keep_best and plan.eval_every == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimiser=muon", "did you mean 'optimizer'"),
        ("optimizer=sgd", "allowed: adamw, muon"),
        ("keep_best=perhaps", "--set keep_best"),
        ("seed", "KEY=VALUE"),
        ("run=elsewhere", "--set run"),
        ("seed={", "KEY=VALUE"),
    ],
)
def test_wrong_ones_are_told(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings([text])


def test_workers_are_a_number_or_two() -> None:
    assert parse_workers("2") == (2, 2) and parse_workers("1:4") == (1, 4)
    for wrong in ("", "0", "4:2", "a", "1:", ":2", "1:2:3", "-1"):
        with pytest.raises(UsageError, match="--workers"):
            parse_workers(wrong)


def test_micro_batches_stay_as_many_at_any_world() -> None:
    plan = pretrain_plan("test", "data", "run", steps=1, accumulate=2)
    assert [plan.at_world(4, world).train.accumulate for world in (1, 2, 3, 4)] == [8, 4, 3, 2]
    assert {plan.at_world(4, world).micro_rows(world) for world in (1, 2, 3, 4)} == {1}
    large = pretrain_plan("7b", "data", "run", steps=1, accumulate=2)
    assert {large.at_world(128, world).parts_at(world) for world in range(120, 129)} == {256}


def test_a_gpu_that_is_too_small_is_told_what_would_do() -> None:
    one = pretrain_plan("7b", "data", "run", steps=1, recompute=True)
    need_memory_of_gpu(one, 8, 80 * 10**9)
    with pytest.raises(
        ResourceError, match=r"^7b on 8 GPU\(s\): got '.* GiB a GPU'; allowed: 74.5 GiB; .*recompute=true$"
    ):
        need_memory_of_gpu(dataclasses.replace(one, recompute=False), 8, 80 * 10**9)
    with pytest.raises(ResourceError, match="use --set recompute=true, --accumulate 1 and 256 GPUs"):
        need_memory_of_gpu(one, 8, 24 * 10**9)
    with pytest.raises(ResourceError, match="use a smaller preset, or larger GPUs"):
        need_memory_of_gpu(one, 1, 10**9)


def test_what_a_gpu_that_is_too_small_is_told_can_be_done(tmp_path: Path) -> None:
    """In the workers, whose plan has the number of all micro-batches: as many GPUs hold it, and the rows divide."""

    def of(each: int, size: int) -> FitPlan:
        values = {"steps": 1, "recompute": True, "batch_tokens": 96 * 2048, "accumulate": each}
        return pretrain_plan("base", str(tmp_path), "run", **values).at_world(size, size)

    told = set()
    for memory in range(10**9, 6 * 10**9, 5 * 10**7):
        try:
            need_memory_of_gpu(of(4, 8), 8, memory)
        except ResourceError as error:
            found = re.search(r"recompute=true, (?:--accumulate (\d+) and )?(\d+) GPUs$", str(error))
            if found is not None:
                each, size = int(found[1] or 4), int(found[2])
                assert of(each, size).micro_rows(size) >= 1
                need_memory_of_gpu(of(each, size), size, memory)
                told.add((each, size))
    assert len(told) > 1, told


def test_what_does_not_divide_says_what_would() -> None:
    """The preset's 16 micro-batches of 128 workers are more than there are rows."""
    with pytest.raises(ConfigError, match=r"256 rows do not divide over 128 worker\(s\) x 16.*use --accumulate 2, or"):
        pretrain_plan("7b", "data", "run", steps=1).micro_rows(128)


def test_lora_needs_a_base_and_replicas_divide_the_workers(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_rank"):
        pretrain_plan("test", str(shards), "run", steps=1, lora_rank=4)
    Model.from_preset("test").save(tmp_path / "model")
    assert finetune_plan(str(tmp_path / "model"), "chats", "run", lora_rank=4).train.lora_rank == 4
    with pytest.raises(ConfigError, match="a divisor of the number of workers, 3"):
        check(pretrain_plan("test", str(shards), "run", steps=1, replicas=2), 3)


def test_recomputing_layers_needs_less_memory() -> None:
    plain, less = (pretrain_plan("base", "data", "run", steps=1, recompute=flag) for flag in (False, True))
    assert memory_needed(less, 1) < memory_needed(plain, 1) / 2


def test_what_does_not_fit_is_refused_with_the_arithmetic(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretrain_plan("mini", str(shards), "run", steps=1)
    each = (memory_needed(plan, 2) + saved_at_once(plan, 2)) / 2**30
    with pytest.raises(
        ResourceError, match=rf"2 worker\(s\) x {each:.1f} GiB = {2 * each:.1f} GiB.*0.5 GiB in the cluster"
    ):
        preflight(plan, 2, 0.5, False, {"CPU": 4.0, "memory": 2.0**29})
    with pytest.raises(ResourceError, match=r"2 worker\(s\) x 1 CPU = 2 CPUs: got '1 in the cluster'; use at most 1"):
        preflight(plan, 2, 1.0, False, {"CPU": 1.0})
    monkeypatch.setattr("shoal.on_ray.train.disk_needed", lambda plan: 2**60)
    with pytest.raises(ResourceError, match="GiB"):
        train(pretrain_plan("test", str(shards), str(tmp_path / "run"), steps=1))
    assert not (tmp_path / "run").exists()


def test_copies_of_what_a_run_starts_from_are_counted(tmp_path: Path) -> None:
    """By hand, for 8 workers with GPUs, whose shares of a checkpoint are small: the teacher of INT8, and what was imported, in
    fp32. Of our own weights there is no copy."""
    Model.from_preset("test").save(tmp_path / "model")
    resources, ours = {"CPU": 8.0, "GPU": 8.0}, (str(tmp_path / "model"), "data", str(tmp_path / "run"))
    rounded, tuned = quantize_plan(*ours), finetune_plan(*ours)
    open_ = dataclasses.replace(rounded, model=dataclasses.replace(rounded.model, tied=False))
    assert open_.model.of_open_models and not tuned.model.of_open_models
    for plan, copies in ((rounded, 1), (open_, 2)):
        whole = 8 * 4 * copies * parameters(plan.model).total
        assert saved_at_once(plan, 8) < whole / 8
        preflight(plan, 8, 1.0, True, {**resources, "memory": float(whole)})
        with pytest.raises(ResourceError, match="of memory"):
            preflight(plan, 8, 1.0, True, {**resources, "memory": whole - 1.0})
    preflight(tuned, 8, 1.0, True, {**resources, "memory": 8.0 * saved_at_once(tuned, 8)})


def test_a_failed_allocation_says_what_helps(shards: Path, chats: Path, tmp_path: Path, alone: Ranks) -> None:
    plan = pretrain_plan("test", str(shards), "run", steps=1)
    with (
        pytest.raises(ResourceError, match=r"^worker 0 is out of memory: .*GiB.* 384 tokens in a micro.*--accumulate"),
        enough_memory(plan, alone),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="must match"), enough_memory(plan, alone):
        torch.zeros(2) + torch.zeros(3)
    seen: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        held = torch.zeros(2)
        seen.append(weakref.ref(held))
        torch.empty(2**50)

    with pytest.raises(ResourceError) as caught, enough_memory(plan, alone):
        fail()
    assert caught.value.__cause__ is not None and seen[0]() is None, "who has no memory left cannot even say so"
    Model.from_preset("test").save(tmp_path / "model")
    odd = finetune_plan(str(tmp_path / "model"), str(chats), str(tmp_path / "run"), accumulate=7)
    with pytest.raises(ResourceError, match="219 tokens in a micro-batch"), enough_memory(odd, alone):
        raise MemoryError  # chats need no whole rows
