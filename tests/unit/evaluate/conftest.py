from tests.unit.train.conftest import alone, chats, shards

__all__ = ["alone", "chats", "shards"]
