from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.train.parallel import Ranks
from tests.corpus import write_chats, write_corpus


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("shards") / "data", presets.get("test"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows=120)


@pytest.fixture
def alone() -> Ranks:
    return Ranks(rank=0, world=1, device=torch.device("cpu"))
