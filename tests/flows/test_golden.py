"""A stored model gives what is written down beside it (`tests.golden`), and what its equations say."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shoal import Model
from tests import golden, reference


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this shape reads all blocks of its short rows
        yield


@pytest.fixture(scope="module")
def model(quiet: None) -> Model:
    return Model.load(golden.HERE / "model")


@pytest.fixture(scope="module")
def now(model: Model) -> dict[str, Any]:
    return golden.figures(model)


WRITTEN = json.loads((golden.HERE / "golden.json").read_text())


def test_tokens_and_depths_are_the_written_ones(now: dict[str, Any]) -> None:
    assert now["tokens"] == WRITTEN["tokens"]
    assert now["depths"] == WRITTEN["depths"]
    assert {depth for some in WRITTEN["depths"].values() for depth in some} == {1, 2, 4}, "every exit is chosen by one"


@pytest.mark.parametrize("which", sorted(WRITTEN["logits"]))
def test_logits_are_the_written_ones(which: str, now: dict[str, Any]) -> None:
    np.testing.assert_allclose(now["logits"][which], WRITTEN["logits"][which], rtol=0, atol=1e-9)
    away = np.abs(np.subtract(now["int8 logits"][which], WRITTEN["int8 logits"][which]))
    assert away.mean() < 0.02 * np.abs(WRITTEN["int8 logits"][which]).mean()


def test_losses_of_five_updates_are_the_written_ones(now: dict[str, Any]) -> None:
    assert len(WRITTEN["losses"]) == 5
    for got, expected in zip(now["losses"], WRITTEN["losses"], strict=True):
        assert got == pytest.approx(expected, rel=1e-7)


def test_the_first_losses_are_those_of_the_equations(model: Model) -> None:
    """Each document alone, its patches no targets; bits a byte at full depth, over the bytes that the row says."""
    arrays = {name: tensor.double().numpy() for name, tensor in model.net.state_dict().items()}
    shape, (first, *_) = dataclasses.asdict(model.config), golden.learned(model)
    for place, depth in enumerate(model.config.exits):
        lost = [
            loss
            for prompt in golden.prompts(model).values()
            for loss, after in zip(
                reference.losses(prompt.ids, arrays, shape, depth, prompt.patches), prompt.ids[1:], strict=True
            )
            if after != reference.PATCH
        ]
        assert first[f"ce {place}"] == pytest.approx(sum(lost) / len(lost), rel=1e-9)
    assert first["bpb"] == pytest.approx(sum(lost) / math.log(2) / (len(golden.TEXT) - 1), rel=1e-9)
