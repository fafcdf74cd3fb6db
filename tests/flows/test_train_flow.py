"""A document, all the way to a model that answers: document -> shards -> pretraining -> fine-tuning -> INT8, without Ray.

The same functions that the jobs run on Ray workers, on the `test` preset, in seconds.
"""

from pathlib import Path

import pytest

from shoal import Model, presets
from shoal.errors import CheckpointError
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan, quantize_plan
from tests.corpus import write_chats, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_chats(folder / "chats.jsonl")
    return write_corpus(folder / "data", presets.get("test"))


@pytest.fixture(scope="module")
def pretrained(data: Path) -> Path:
    run = data.parent / "pretrain"
    return Path(fit(pretrain_plan("test", str(data), str(run), steps=40, eval_every=20, accumulate=1)).out)


def short(data: Path, run: Path, **more: object) -> FitPlan:
    return pretrain_plan(
        "test", str(data), str(run), **{"steps": 6, "eval_every": 0, "eval_rows": 4, "accumulate": 1, **more}
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in log.read(run) if record["kind"] == "step"]


def test_pretraining_learns_all_three_modalities(pretrained: Path) -> None:
    evals = [record for record in log.read(pretrained.parent) if record["kind"] == "eval"]
    first, last = evals[0], evals[-1]
    assert [first["step"], last["step"]] == [20, 40]
    for modality in ("text", "code", "image"):
        for exit_name in ("shallow", "middle", "full"):
            assert last["bpb"][modality][exit_name] < first["bpb"][modality][exit_name]
    assert last["bpb"]["text"]["full"] < 1.0, "sentences out of nine words"
    assert last["patch"] < first["patch"] < 1.0, "better than always saying the mean"
    model = Model.load(pretrained)
    prompt = model.tokenizer.encode("The shoal turns. The ")
    assert model.tokenizer.decode(model.generate_naive(prompt, max_tokens=12)).strip()


@pytest.mark.drill
def test_fine_tuning_then_int8(data: Path, pretrained: Path) -> None:
    chats = str(data.parent / "chats.jsonl")
    small = {"steps": 30, "batch_tokens": 768, "learning_rate": 5e-3}
    tuned = fit(finetune_plan(str(pretrained), chats, str(data.parent / "tune"), heldout=chats, **small))
    model = Model.load(tuned.out)
    (template,) = {p.read_text() for p in (pretrained / "chat_template.jinja", Path(tuned.out) / "chat_template.jinja")}
    assert model.chat_template == template
    assert tuned.bpb["chat"]["full"] < 1.0

    int8 = fit(quantize_plan(tuned.out, chats, str(data.parent / "int8"), steps=4, batch_tokens=768))
    small_model = Model.load(int8.out)
    assert small_model.config.quantization == "w8a8" and small_model.name.endswith("-int8")
    sizes = [(Path(path) / "model.safetensors").stat().st_size for path in (tuned.out, int8.out)]
    assert sizes[1] < sizes[0] / 2
    prompt = model.encode("The tide").ids
    gap = (small_model.logits(prompt) - model.logits(prompt)).abs().max()
    assert 0 < float(gap) < 2.0


@pytest.mark.drill
def test_an_interrupted_run_ends_as_if_nothing_had_happened(data: Path, tmp_path: Path) -> None:
    """To the bit: losses, weights and the history that is shown."""

    class Interrupted(Exception):
        pass

    def interrupt(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 4:  # written to the history, but after the last checkpoint
            raise Interrupted

    calm = fit(short(data, tmp_path / "calm", accumulate=2))
    hit = short(data, tmp_path / "hit", checkpoint_minutes=0.0, accumulate=2)
    with pytest.raises(Interrupted):
        fit(hit, interrupt)
    resumed = fit(hit)
    assert losses(tmp_path / "hit") == losses(tmp_path / "calm") and len(losses(tmp_path / "calm")) == 6
    assert (resumed.steps, resumed.tokens, resumed.bpb) == (calm.steps, calm.tokens, calm.bpb)
    models = [Path(result.out, "model.safetensors").read_bytes() for result in (resumed, calm)]
    assert models[0] == models[1]


@pytest.mark.drill
def test_other_code_goes_on_and_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitwise resume is promised to the same code only."""
    fit(short(data, tmp_path / "run", steps=2))
    monkeypatch.setattr("shoal.train.run.code_version", lambda: "of-tomorrow")
    fit(short(data, tmp_path / "run", steps=3))
    (warning,) = (record["text"] for record in log.read(tmp_path / "run") if record["kind"] == "warning")
    assert "step-00000002 was written by other code" in warning and "now of-tomorrow" in warning
    assert len(losses(tmp_path / "run")) == 3


def test_a_finished_run_is_not_trained_further(data: Path, tmp_path: Path) -> None:
    first, again = fit(short(data, tmp_path / "run")), fit(short(data, tmp_path / "run"))
    assert (first.steps, first.bpb) == (again.steps, again.bpb)
    assert len(losses(tmp_path / "run")) == 6


def test_a_longer_run_goes_on_and_a_different_one_is_refused(data: Path, tmp_path: Path) -> None:
    fit(short(data, tmp_path / "run", steps=3))
    fit(short(data, tmp_path / "run", steps=6))
    assert len(losses(tmp_path / "run")) == 6
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.01 -> 0\.02"):
        fit(short(data, tmp_path / "run", learning_rate=0.02))
    fit(short(data, tmp_path / "run", steps=2, learning_rate=0.02, resume="never"))
    assert len(losses(tmp_path / "run")) == 2
