"""What a resumed run goes on with: the same base, the same batches, the same schedule; and how a run ends in any case."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal import Model
from shoal.data.alone import alone
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.on_ray.train import train
from shoal.train import log
from shoal.train.checkpoint import CheckpointStore
from shoal.train.loop import fit
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan
from shoal.train.refusal import check
from shoal.train.run import COMMAND, stop_file


class Interrupted(Exception):
    pass


def stop_at(step: int, kind: str = "step") -> log.Report:
    def report(record: log.Record) -> None:
        if record["kind"] == kind and record["step"] == step:
            raise Interrupted

    return report


def said(run: str | Path, kind: str, *keys: str) -> list[tuple]:
    return [tuple(record[key] for key in keys) for record in log.read(run) if record["kind"] == kind]


def weights(run: str | Path) -> bytes:
    return (Path(run) / "model" / "model.safetensors").read_bytes()


def short(shards: Path, run: Path, **more: object) -> FitPlan:
    values = {"steps": 6, "eval_every": 0, "eval_rows": 4, "checkpoint_minutes": 0.0, "accumulate": 1, **more}
    return pretrain_plan("test", str(shards), str(run), **values)


# ---- the base model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    Model.from_preset("test").save(tmp_path / "base")
    return tmp_path / "base"


def other_weights(base: Path) -> None:
    Model.from_preset("test", seed=1).save(base)


def other_template(base: Path) -> None:
    model = Model.from_preset("test")
    model.chat_template = DEFAULT_TEMPLATE + "\n"
    model.save(base)


def other_tokenizer(base: Path) -> None:
    model = Model.from_preset("test")
    texts = ["the tide turns and the shoal turns with it " * 8]
    model.tokenizer = Tokenizer.train(texts, len(Tokenizer.bytes_only()) + 4)
    model.save(base)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "weights_sha256"),
        (other_template, "template_sha256"),
        (other_tokenizer, "tokenizer_sha256"),
    ],
)
def test_another_base_model_is_noticed_and_named(
    base: Path, chats: Path, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    plan = finetune_plan(str(base), str(chats), str(tmp_path / "run"), steps=1, batch_tokens=768)
    fit(plan)
    change(base)
    with pytest.raises(CheckpointError, match=f"base.{named}: ") as caught:
        fit(plan)
    assert str(caught.value).count("_sha256: ") == 1, "and nothing else differs"


# ---- the best checkpoint


def test_a_best_checkpoint_that_cannot_be_written_is_none(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the best evaluation is saved, here the last: the run ends with the last weights."""
    begin = CheckpointStore.begin

    def full(self: CheckpointStore, model, optimizer, state, ranks, **more):
        if state.best is not None:
            raise CheckpointError("cannot write checkpoint", got="No space left on device")
        return begin(self, model, optimizer, state, ranks, **more)

    monkeypatch.setattr(CheckpointStore, "begin", full)
    result = fit(short(shards, tmp_path / "run", steps=2, eval_every=1, keep_best=True))
    assert result.steps == 2 and weights(tmp_path / "run")
    texts = [text for (text,) in said(tmp_path / "run", "warning", "text")]
    assert "no checkpoint of an evaluation to take the best of" in texts[-1] and "step 2" in texts[-1]


@pytest.mark.parametrize("harm", [pytest.param("gone", marks=pytest.mark.drill), "damaged"])
def test_a_run_whose_best_checkpoint_is_lost_ends_with_the_last_weights(
    shards: Path, tmp_path: Path, harm: str
) -> None:
    def lose(record: log.Record) -> None:
        if record["kind"] == "checkpoint" and record["step"] == 4:
            for file in (tmp_path / "run" / "checkpoints" / "step-00000001").glob("*"):
                if harm == "gone" or file.name.startswith("shard"):
                    file.unlink() if harm == "gone" else file.write_bytes(b"0" * file.stat().st_size)

    # the first evaluation is the best there is: each one after it is of weights that a huge rate has spoilt
    plan = short(shards, tmp_path / "run", steps=4, eval_every=1, keep_best=True)
    ruined = dataclasses.replace(plan, train=dataclasses.replace(plan.train, learning_rate=3.0, warmup=0.0))
    fit(ruined, lose)
    (text,) = said(tmp_path / "run", "warning", "text")[-1]
    assert "step-00000001" in text and "written from the last weights, those of step 4" in text
    assert weights(tmp_path / "run")


def test_keep_best_without_held_out_rows_is_refused_before_the_first_update(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    plan = finetune_plan(str(base), str(chats), str(tmp_path / "run"), steps=1, batch_tokens=768, keep_best=True)
    with pytest.raises(DataError, match="keep_best"):
        fit(plan)
    assert not log.metrics_file(tmp_path / "run").exists()


def test_a_place_that_is_taken_is_refused_before_the_first_update(shards: Path, tmp_path: Path) -> None:
    """It cost the whole run: whether a model may be written there was looked at when it was trained."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    plan = short(shards, tmp_path / "run", out=str(tmp_path / "mine"))
    for begin in (lambda: fit(plan), lambda: check(plan, 1)):
        with pytest.raises(CheckpointError, match="may be replaced"):
            begin()
    assert not log.metrics_file(tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# ---- the global batch


@pytest.mark.drill
def test_a_run_at_another_number_of_workers_reads_every_row_once(base: Path, chats: Path, tmp_path: Path) -> None:
    """With the command's own defaults, for one epoch: what one worker begins, another number of them ends. The checkpoint says
    into how many micro-batches the run cuts its updates, since the groups of chats hang on it."""
    plan = finetune_plan(str(base), str(chats), str(tmp_path / "run"), epochs=1.0, checkpoint_minutes=0.0)
    plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, batch_tokens=768))
    assert plan.train.accumulate == 2
    # as 4 workers begin it
    begun = dataclasses.replace(plan, train=dataclasses.replace(plan.train, accumulate=8))
    read = Counter[int]()
    step_rows = spy_on_rows(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.data.batches.ChatBatches._batch", step_rows)
        with pytest.raises(Interrupted):
            fit(begun, stop_at(2, "checkpoint"))
        fit(plan)  # 1 worker, with the defaults' 2 micro-batches
    assert set(read) == set(range(120)), "no row is left out"
    twice = {row for row, count in read.items() if count > 1}
    assert len(twice) < 120 / 8, "but for the last update, which is filled up from the next epoch"
    (text,) = said(tmp_path / "run", "warning", "text")[0]
    assert "8 micro-batches an update that it began with, 8 a worker" in text
    assert said(tmp_path / "run", "start", "micro_batches") == [(8,), (8,)]


def spy_on_rows(read: Counter[int]) -> Callable:
    from shoal.data.batches import ChatBatches

    batch = ChatBatches._batch

    def spy(self: ChatBatches, group):
        read.update(int(row) for row in group)
        return batch(self, group)

    return spy


def test_a_global_batch_that_cannot_be_kept_is_refused() -> None:
    plan = pretrain_plan("test", "data", "run", steps=1)
    assert [plan.in_parts(8, world).train.accumulate for world in (1, 2, 3, 4, 5, 8)] == [8, 4, 3, 2, 2, 1]
    with pytest.raises(ConfigError, match=r"8 micro-batch\(es\) of a global batch are too few for 9 worker\(s\)"):
        plan.in_parts(8, 9)


# ---- the schedule


@pytest.mark.drill
def test_a_run_by_the_clock_is_followed_to_the_bit(shards: Path, tmp_path: Path) -> None:
    """Rates, exit weights and all: what the clock decided once is recorded, and `rates_of` goes by the record."""
    first = short(shards, tmp_path / "first", steps=None, minutes=0.02)
    fit(first)
    rates = [rate for (rate,) in said(first.run, "step", "rate")]
    assert all(rate > 0 for rate in rates), "by the clock, too, each update learns something"
    steps = len(rates)
    more = {"checkpoint_minutes": 0.0, "accumulate": first.train.accumulate}
    again = pretrain_plan("test", str(shards), str(tmp_path / "again"), rates_of=first.run, **more)
    assert again.steps == steps
    check(again, 1)
    if steps > 1:
        with pytest.raises(Interrupted):
            fit(again, stop_at(steps))
    fit(again)
    what = ("step", "loss", "rate", "grad_norm")
    assert said(first.run, "step", *what) == said(again.run, "step", *what)
    assert weights(first.run) == weights(again.run)


def test_steps_after_the_checkpoint_are_done_again_as_they_were(shards: Path, tmp_path: Path) -> None:
    """Though the clock stands elsewhere: their schedule was recorded."""
    plan = short(shards, tmp_path / "run", steps=None, minutes=10.0, checkpoint_minutes=0.0)
    with pytest.raises(Interrupted):
        fit(plan, stop_at(4, "checkpoint"))
    with pytest.raises(Interrupted):
        fit(dataclasses.replace(plan, checkpoint_minutes=1e6), stop_at(9))
    what = ("step", "loss", "rate", "schedule")
    before = said(plan.run, "step", *what)
    with pytest.raises(Interrupted):
        fit(dataclasses.replace(plan, checkpoint_minutes=1e6), stop_at(11))
    after = said(plan.run, "step", *what)
    assert len(before) == 9 and after[:9] == before
    places = [schedule for *_, schedule in after]
    assert places == sorted(places), "and it never goes back"


def test_a_run_that_the_clock_ended_is_not_trained_further(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update ends when the clock was expected to run out, from how long the one before took; here it is faster."""

    class Faster:
        last_step, stopped = 20.0, False

        def __init__(self, ranks: Ranks, before: float, stop: Path) -> None:
            self.seconds = before

        def step(self) -> float:
            self.seconds += 10.0
            return self.seconds

        def eta(self, done: float) -> float:
            return 0.0

    monkeypatch.setattr("shoal.train.loop.Clock", Faster)
    plan = short(shards, tmp_path / "run", steps=None, minutes=1.0)
    first = fit(plan)
    assert first.seconds < 60 and fit(plan).steps == first.steps


def clock_of(seconds: Callable[[int], float]) -> type:
    """A run's clock, by which the n-th update of a sitting takes so many `seconds`."""

    class Told:
        stopped = False

        def __init__(self, ranks: Ranks, before: float, stop: Path) -> None:
            self.seconds, self.last_step, self.done = before, 0.0, 0

        def step(self) -> float:
            self.done += 1
            self.last_step = seconds(self.done)
            self.seconds += self.last_step
            return self.seconds

        def eta(self, done: float) -> float:
            return 0.0

    return Told


@pytest.mark.parametrize(
    ("stalled", "want"),
    [
        (4, [0.0, 0.05, 0.15, 0.2, 0.8, 0.85, 0.9, 0.95, 1.0]),
        pytest.param(1, [0.0, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0], marks=pytest.mark.drill),
    ],
)
def test_an_update_in_which_something_is_compiled_is_no_measure_of_the_next(
    stalled: int, want: list[float], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock the schedule is read at the expected end of an update: 5 seconds on, after one of 60 among others of 5."""
    monkeypatch.setattr("shoal.train.loop.Clock", clock_of(lambda n: 60.0 if n == stalled else 5.0))
    fit(short(shards, tmp_path / "run", steps=None, minutes=100 / 60))
    places = [place for (place,) in said(tmp_path / "run", "step", "schedule")]
    assert places == pytest.approx(want)


@pytest.mark.parametrize(("minutes", "updates"), [
    (0.5, 1), (1.5, 2), (2.0, 2),
    *(pytest.param(*rest, marks=pytest.mark.drill) for rest in ((1.0, 1), (2.5, 3), (3.0, 3), (3.5, 4))),
])  # fmt: skip
def test_a_run_by_the_clock_ends_with_the_update_in_which_its_time_does(
    minutes: float, updates: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of updates of a minute each, though nobody knows how long the first two of a sitting take: also where the run was
    interrupted after its first, and given again when it has ended."""
    monkeypatch.setattr("shoal.train.loop.Clock", clock_of(lambda n: 60.0))
    plan = short(shards, tmp_path / "run", steps=None, minutes=minutes)
    assert fit(plan).steps == updates and said(plan.run, "step", "progress")[-1] == (1.0,)
    assert fit(plan).steps == updates
    plan = short(shards, tmp_path / "other", steps=None, minutes=minutes)
    with pytest.raises(Interrupted):
        fit(plan, stop_at(1, "checkpoint"))
    assert fit(plan).steps == updates


# ---- a run that is begun anew


@pytest.mark.drill
def test_workers_that_are_started_again_do_not_begin_anew_a_second_time(shards: Path, tmp_path: Path) -> None:
    """Ray starts them with the plan that they had; another command's plan is another's."""
    fit(short(shards, tmp_path / "calm"))
    run = tmp_path / "run"
    fit(short(shards, run, steps=3, learning_rate=0.02))
    anew = short(shards, run, resume="never", command="mine")
    for step in (4, 5):
        with pytest.raises(Interrupted):
            fit(anew, stop_at(step, "checkpoint"))
    fit(anew)
    assert said(run, "start", "step") == [(0,), (4,), (5,)] and weights(run) == weights(tmp_path / "calm")
    fit(dataclasses.replace(anew, command="another", steps=1))
    assert said(run, "start", "step") == [(0,)] and said(run, "step", "step") == [(1,)]
    fit(dataclasses.replace(anew, command="", steps=1))
    assert said(run, "start", "step") == [(0,)] and said(run, "step", "step") == [(1,)]


def test_a_command_that_begins_a_run_anew_tells_its_workers_whose_it_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[FitPlan] = []

    def stop_there(plan: FitPlan) -> None:
        plans.append(plan)
        raise Interrupted

    monkeypatch.setattr("shoal.on_ray.train._alone", stop_there)
    for resume in ("never", "never", "auto"):
        with pytest.raises(Interrupted):
            train(short(shards, tmp_path / "run", resume=resume))
    one, other, none = (plan.command for plan in plans)
    assert one and other and one != other and not none


# ---- one run at a time


def test_two_runs_in_one_folder_are_not_mixed(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the workers of another command, nor beside the command itself, whose request to stop stays."""
    monkeypatch.setattr("shoal.train.run.LEFT_BEHIND", 0.0)
    plan = short(shards, tmp_path / "run", steps=2)
    met: list[str] = []

    def meanwhile(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 1:
            with pytest.raises(ResourceError, match="another run is writing to") as caught:
                fit(plan)
            met.append(str(caught.value))

    fit(plan, meanwhile)
    assert len(met) == 1 and len(said(plan.run, "start", "step")) == 1
    stop_file(plan.run).touch()
    with alone(tmp_path / "run" / COMMAND, ResourceError("held")):
        with pytest.raises(ResourceError, match="another command is training in"):
            train(plan)
        assert stop_file(plan.run).exists()
    stop_file(plan.run).unlink()
    assert fit(plan).steps == 2, "and nothing is held when it ends"
