"""What utilisation is computed from, held against the operations that torch counts in updates."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from shoal.open_weights.convert import import_model
from shoal.train import loop
from shoal.train.loop import fit
from shoal.train.meter import Meter
from shoal.train.plan import FitPlan, adapt_plan, pretrain_plan
from tests.corpus import NOUNS, VERBS

OPEN = Path(__file__).parents[2] / "data" / "open"
SHORT = {"steps": 2, "eval_every": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's form, whose context is 256 tokens."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(OPEN / "smollm2", folder / "from")
    shutil.copytree(OPEN / "tokenizer", folder / "from", dirs_exist_ok=True)
    import_model(folder / "from", folder / "model", name="smol")
    return folder / "model"


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    """Texts that are all longer than a row is cut to be."""
    path, draw = base.with_name("rows.jsonl"), random.Random(0)
    texts = [" ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)}." for _ in range(20)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def counted(plan: FitPlan, monkeypatch: pytest.MonkeyPatch) -> float:
    """Operations of an update as torch counts them, over those that a meter takes it for."""
    told, made, tokens = list[int](), list[int](), list[int]()

    class Told(Meter):
        def __init__(self, flops_per_token: int, *given: Any, **more: Any) -> None:
            told.append(flops_per_token)
            super().__init__(flops_per_token, *given, **more)

    def update(model: Any, optimizer: Any, batches: Any, **how: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = real(model, optimizer, batches, **how)
        made.append(counter.get_total_flops())
        tokens.append(found.tokens)
        return found

    real = loop.update
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Meter", Told)
        patch.setattr(loop, "update", update)
        fit(plan)
    (each,) = told
    return sum(made) / (each * sum(tokens))


@pytest.mark.drill
def test_rows_shorter_than_the_context_and_weights_that_stay_are_less_work(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows of 32 tokens by a model whose context is 256: with early exits alone, with thin matrices, with all weights."""
    short = {**SHORT, "batch_tokens": 256, "row_tokens": 32}
    for tune in ("none", "lora", "all"):
        thin = {"lora_rank": 1} if tune == "lora" else {}
        plan = adapt_plan(str(base), str(rows), str(tmp_path / tune), tune=tune, **short, **thin)
        assert counted(plan, monkeypatch) == pytest.approx(1.0, abs=0.25), tune


def test_packed_rows_are_of_the_training_length(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pretrain_plan("test", str(shards), str(tmp_path), rotate_exits="off", **SHORT)
    assert counted(plan, monkeypatch) == pytest.approx(1.0, abs=0.25)
