"""Training checkpoints: whole or absent, loaded to the bit, and never of another run."""

import contextlib
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.errors import CheckpointError, ShoalError
from shoal.model.net import Net
from shoal.train.checkpoint import CheckpointStore, damage
from shoal.train.loss import LossModel
from shoal.train.mirror import Mirror
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks
from shoal.train.state import TrainState, code_version, read_state, require_same

PRESET = presets.get("test")


def trained(seed: int, updates: int = 2):
    """A model and an optimizer that have seen a few made-up gradients."""
    model = LossModel(Net(PRESET.model).init_(seed))
    optimizer = make_optimizer(model, PRESET.train)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def state(step: int) -> TrainState:
    return TrainState(
        step=step, tokens=10 * step, cursor=8 * step, seconds=1.5 * step, code="c", trained={"a": {"b": 1}}
    )


def test_everything_comes_back_to_the_bit(tmp_path: Path, alone: Ranks) -> None:
    store = CheckpointStore(tmp_path)
    model, optimizer = trained(seed=1)
    torch.manual_seed(7)
    path = store.save(model, optimizer, state(3), alone)
    drawn = torch.rand(4)

    other, other_optimizer = trained(seed=2, updates=0)  # without moments: they are made when they are loaded
    store.load(path, other, other_optimizer, alone)
    assert torch.equal(torch.rand(4), drawn), "the random state too"
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        mine, theirs = optimizer.state[a], other_optimizer.state[b]
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert read_state(path) == state(3)


def test_nothing_is_pickled(tmp_path: Path, alone: Ranks) -> None:
    path = CheckpointStore(tmp_path).save(*trained(seed=1), state(1), alone)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_a_save_that_is_cut_short_leaves_nothing_to_resume(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory gets its name last."""
    store = CheckpointStore(tmp_path)
    store.save(*trained(seed=1), state(1), alone)

    def die(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        store.save(*trained(seed=1), state(2), alone)
    assert store.newest(alone, pytest.fail) == tmp_path / "checkpoints" / "step-00000001"
    assert store.save(*trained(seed=1), state(2), alone).name == "step-00000002", "the leftover is no obstacle"


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, alone: Ranks, harm: str) -> None:
    store = CheckpointStore(tmp_path)
    good = store.save(*trained(seed=1), state(1), alone)
    bad = store.save(*trained(seed=1), state(2), alone)
    victim = random.Random(0).choice(sorted(bad.glob("*.safetensors")))
    content = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    else:
        content[-1] ^= 1
        victim.write_bytes(content if harm == "flip" else content[:-5])
    warnings: list[str] = []
    assert store.newest(alone, warnings.append) == good
    assert len(warnings) == 1 and victim.name in warnings[0]
    assert damage(good) is None


def test_only_the_newest_are_kept(tmp_path: Path, alone: Ranks) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 5):
        store.save(*trained(seed=1), state(step), alone)
    assert [path.name for path in store.steps()] == ["step-00000003", "step-00000004"]
    store.clear(alone)
    assert store.steps() == [] and store.newest(alone, pytest.fail) is None


def test_a_damaged_newest_takes_no_place_from_what_is_saved_after_it(tmp_path: Path, alone: Ranks) -> None:
    """With one checkpoint kept: each new one was removed as the older of two, until the run had come as far again."""
    model, optimizer = trained(seed=1)
    before = CheckpointStore(tmp_path)
    for step in (1, 9):
        path = before.save(model, optimizer, state(step), alone)
    (path / "state.json").write_text("{}")
    store, warnings = CheckpointStore(tmp_path, keep=1), []
    assert store.newest(alone, warnings.append) == before.at(1) and len(warnings) == 1
    store.save(model, optimizer, state(2), alone)
    assert store.steps() == [store.at(2)] and store.newest(alone, pytest.fail) == store.at(2)


def test_what_is_not_ours_is_neither_resumed_nor_removed(tmp_path: Path, alone: Ranks) -> None:
    """Such as a checkpoint that somebody put aside."""
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save(*trained(seed=1), state(1), alone)
    shutil.copytree(path, path.with_name("step-00000001.bak"))
    (store.directory / "step-latest").write_text("1")
    assert store.newest(alone, pytest.fail) == path
    store.save(*trained(seed=1), state(2), alone)
    kept = {path.name for path in store.directory.iterdir()}
    assert kept == {"step-00000002", "step-00000001.bak", "step-latest"}


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"state.json": 1}', '{"state.json": {"bytes": 3}}', "\x00" * 9])
def test_a_manifest_that_lists_too_little_is_damage(tmp_path: Path, alone: Ranks, text: str) -> None:
    store = CheckpointStore(tmp_path)
    good = store.save(*trained(seed=1), state(1), alone)
    bad = store.save(*trained(seed=1), state(2), alone)
    (bad / "manifest.json").write_text(text)
    assert damage(bad) and store.newest(alone, lambda text: None) == good


def test_whatever_a_rank_meets_while_it_saves_is_told_to_all(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes on would wait for ever for the one that met it."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr("shoal.train.snapshot.write_file", fail)
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .* illegal memory access"):
        store.save(*trained(seed=1), state(1), alone)
    assert list(store.directory.iterdir()) == []


def test_a_random_state_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path, alone: Ranks) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(*trained(seed=1), state(1), alone)
    (path / "rng-00000.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot load checkpoint"):
        store.load(path, *trained(seed=2), alone)


# ---- copies


def test_a_copy_of_a_later_step_takes_no_place(tmp_path: Path, alone: Ranks) -> None:
    """It was damaged, or the run would have gone on from it."""
    (tmp_path / "copies" / "step-00000009").mkdir(parents=True)
    (tmp_path / "copies" / "step-00000009" / "manifest.json").write_text("{}")
    mirror = Mirror(str(tmp_path / "copies"), keep=1)
    store = CheckpointStore(tmp_path / "run", 1, mirror)
    assert store.newest(alone, lambda text: None) is None
    store.save(*trained(seed=1), state(2), alone)
    mirror.close()
    assert mirror.names() == ["step-00000002"]


class Meeting(Ranks):
    """Two ranks as threads: an error of one in `alike` is raised in both, and who waits for nobody is found out."""

    barrier, found = threading.Barrier(2, timeout=20.0), dict[int, ShoalError | None]()

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        self.found[self.rank] = None
        try:
            yield
        except ShoalError as error:
            self.found[self.rank] = error
        self.barrier.wait()
        problem = next((error for error in self.found.values() if error is not None), None)
        self.barrier.wait()
        if problem is not None:
            raise problem

    def wait(self) -> None:
        self.barrier.wait()


def both(act: Callable[[Ranks], object]) -> list[BaseException | None]:
    """What `act` raises in each of two ranks."""

    def one(rank: int) -> BaseException | None:
        try:
            act(Meeting(rank, 2, torch.device("cpu")))
        except Exception as error:
            return error
        return None

    Meeting.barrier.reset()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_another_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    saved = {"model": {"width": 48, "layers": 4}, "train": {"seed": 0}}
    require_same(saved, saved, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        require_same(saved, {"model": {"width": 96, "layers": 4}, "train": {"seed": 1}}, tmp_path)
    message = str(caught.value)
    assert "model.width: 48 -> 96" in message and "train.seed: 0 -> 1" in message and "layers" not in message
    assert "\n" not in message and "--resume never" in message


def test_another_format_is_refused(tmp_path: Path, alone: Ranks) -> None:
    path = CheckpointStore(tmp_path).save(*trained(seed=1), state(1), alone)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | {"version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        read_state(path)


def test_a_checkpoint_of_another_shape_is_an_error_of_ours(tmp_path: Path, alone: Ranks) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(*trained(seed=1), state(1), alone)
    (path / "manifest.json").unlink()
    for file in path.glob("shard-*"):
        file.write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="cannot load checkpoint"):
        store.load(path, *trained(seed=2), alone)


def test_the_code_version_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_version(tmp_path)
    assert before == code_version(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_version(tmp_path) != before
