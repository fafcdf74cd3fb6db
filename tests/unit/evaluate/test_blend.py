"""Weights between a model and what was trained from it: as near to the latter as bits per byte allow."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from shoal import Model, presets
from shoal.errors import DataError
from shoal.evaluate import blend
from shoal.evaluate.blend import WAYS, between, blended
from shoal.inputs.tokenizer import Tokenizer
from tests.corpus import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(
        tmp_path_factory.mktemp("blend") / "data", presets.get("test"), documents=16, kinds=("text", "code")
    )


def model(corpus: Path, *, sure: float = 1.0) -> Model:
    """Random; the norm before the head multiplied by `sure`: what is surer of nonsense is the worse for it."""
    made = Model.from_preset("test", dtype="float64")
    made.tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    with torch.no_grad():
        next(made.net.exit_norms[str(made.config.layers)].parameters()).mul_(sure)
    return made


def test_between_is_the_mean_of_all_weights(corpus: Path) -> None:
    parent, tuned = Model.from_preset("test", seed=1), Model.from_preset("test", seed=2)
    for way in (0.0, 0.3, 1.0):
        found = between(parent, tuned, way).net.state_dict()
        for name, tensor in tuned.net.state_dict().items():
            assert torch.allclose(found[name], (1 - way) * parent.net.state_dict()[name] + way * tensor, atol=1e-6), (
                name
            )
    assert between(parent, tuned, 0.5).router is None


@pytest.mark.drill
def test_it_goes_as_far_as_what_was_known_stays(corpus: Path) -> None:
    parent = model(corpus)
    near, far, lost = (blended(parent, model(corpus, sure=sure), corpus) for sure in (1.0001, 1.5, 1000.0))
    assert near.way == 1.0 and list(near.rises) == [1.0] and set(near.rises[1.0]) == {"text", "code"}
    assert lost.way == WAYS[-1] and list(lost.rises) == list(WAYS)
    assert min(lost.rises[WAYS[-1]].values()) > blend.MOST_RISE
    rises = list(lost.rises.values())
    assert all(one["text"] > other["text"] for one, other in pairwise(rises))
    wanted = next((way for way in WAYS if max(far.rises[way].values()) <= blend.MOST_RISE), WAYS[-1])
    assert far.way == wanted and list(far.rises)[-1] == far.way


def test_a_corpus_of_another_tokenizer_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        blended(Model.from_preset("test"), Model.from_preset("test"), corpus)
