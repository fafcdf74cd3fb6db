"""Which packed rows a run read: what a baseline may be fitted to when it is to know what the model knew, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shoal.data.batches import PretrainBatches
from shoal.errors import DataError
from shoal.train.bucket import store_of
from shoal.train.plan import REPLAY_EVERY, fingerprint

MOST_ROWS = 2**18  # that are looked at of a run; baselines are fitted to 16 MB of them


def rows_read(runs: Iterable[str | Path], data: Path) -> dict[str, list[int]]:
    """Modality -> numbers of the training rows in `data` that any of `runs` read, each once however often it was read; of a run
    that read more than `MOST_ROWS`, of evenly spaced updates.

    `runs`: folders of training runs, on the shards themselves or on chats with the shards as replay. Raises DataError for one
    that left no checkpoint, and when none read `data`.
    """
    found: dict[str, set[int]] = {}
    asked, whole = list(runs), fingerprint(str(data))
    for run in asked:
        store = store_of(run)
        saved = store.steps()
        if not saved:
            raise DataError(f"{run} holds no checkpoint", do="give the folders of the runs that made the model")
        state = store.state(saved[-1])
        trained = state.trained
        replays = trained.get("replay_sha256") == whole
        if not replays and trained.get("data_sha256") != whole:
            continue  # chats alone
        length, train = trained["model"]["train_length"], trained["train"]
        batch_rows = max(1, train["batch_tokens"] // length)
        order = PretrainBatches(data, mix=trained.get("mix"), seed=train["seed"], batch_rows=batch_rows)
        every = state.trained.get("replay_every", REPLAY_EVERY) if replays else 1
        steps = state.step // every
        for step in range(0, steps, max(1, -(-steps * batch_rows // MOST_ROWS))):
            for modality, row in order.rows(step):
                found.setdefault(modality, set()).add(row)
    if asked and not found:
        raise DataError(
            f"none of {', '.join(map(str, asked))} read {data}", do="give the run that was pretrained on it"
        )
    return {modality: sorted(rows) for modality, rows in found.items()}
