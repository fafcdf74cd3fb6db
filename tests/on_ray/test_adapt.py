"""`shoal adapt` on Ray Train: two workers teach the exits of an imported model as one process does."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from shoal import Model, cli
from shoal.open_weights.convert import import_model
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import adapt_plan
from tests.corpus import NOUNS, VERBS

pytestmark = pytest.mark.ray
DATA = Path(__file__).parents[1] / "data" / "open"
STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    shutil.copytree(DATA / "smollm2", folder / "from")
    shutil.copytree(DATA / "tokenizer", folder / "from", dirs_exist_ok=True)
    import_model(folder / "from", folder / "model", dtype="float32")
    for name, count in (("rows", 90), ("heldout", 80)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                draw = random.Random(f"{name} {number}")
                said = " ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)}." for _ in range(3))
                turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": said}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return folder / "model"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in log.read(run) if record["kind"] == "step"]


@pytest.mark.drill
def test_two_workers_teach_exits_as_one_process_does(
    shared_ray: None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = base.parent / "rows.jsonl", tmp_path / "two"
    words = ["adapt", "--model", str(base), "--data", str(rows), "--heldout", str(base.parent / "heldout.jsonl")]
    words += ["--out", str(out), "--steps", str(STEPS), "--set", "batch_tokens=512", "--set", "learning_rate=1e-2"]
    words += ["--set", "eval_every=0", "--workers", "2", "--cpus-per-worker", "0.5", "--json"]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == STEPS and told["backbone"]["before"] == told["backbone"]["after"]
    assert set(told["bpb"]["chat"]) == {"shallow", "middle", "full"}
    before, after = Model.load(base), Model.load(out, verify=True)
    ids = before.tokenizer.encode("The tide waits, and the net is full.")
    assert torch.equal(before.logits(ids), after.logits(ids)) and after.router is not None
    fit(adapt_plan(
        str(base), str(rows), str(tmp_path / "one"), steps=STEPS, batch_tokens=512, learning_rate=1e-2, eval_every=0,
        accumulate=2,
    ))  # fmt: skip
    assert losses(tmp_path / "two.run") == pytest.approx(losses(tmp_path / "one.run"), abs=1e-4)
    alone = Model.load(tmp_path / "one")
    for depth in ("shallow", "middle"):
        torch.testing.assert_close(after.logits(ids, depth), alone.logits(ids, depth), atol=1e-2, rtol=1e-2)
