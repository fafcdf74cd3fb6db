"""A corpus that tasks made in S3 becomes complete: `publish` writes its index last, and `published` looks at one that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from shoal.data import lease
from shoal.data.card import CARD, REPORT
from shoal.data.chats.recipes import FILES
from shoal.data.place import WORK, Place
from shoal.data.ranged import write_origin
from shoal.data.remote import index_of
from shoal.data.shards import INDEX, SPLITS, TOKENIZER, Index, write_index
from shoal.errors import DataError

NAMED = "named.json"  # file of a corpus: the files that rows name, with their stamps; an edited one is noticed
_OURS = (*(f"{split}-*.arrow" for split in SPLITS), *FILES.values(), NAMED, REPORT, CARD, TOKENIZER)


def publish(place: Place, index: Index, chats: Sequence[str], need: Callable[[], None]) -> None:
    """Complete the corpus at `place`, of the shards, `chats` and tokenizer that were put there and of this report: from now
    on it can be opened. What earlier commands left goes. `need`: raises where another command took over.

    Raises DataError where a shard there is not as long as the task that made it says.
    """
    bucket, folder = place.bucket, place.folder
    there = dict(bucket.sizes())
    for shard in index.shards:
        if there.get(shard.file) != shard.size:
            raise DataError(
                f"{place.uri}: shard {shard.file}", got=f"{there.get(shard.file)} bytes", allowed=shard.size,
                do="see who else writes there, and run the same command again",
            )  # fmt: skip
    small = [name for name in (REPORT, CARD, NAMED) if (folder / name).is_file()]
    stay = {TOKENIZER, *small, *chats, *(shard.file for shard in index.shards)}
    need()
    bucket.remove([name for name in there if name not in stay and _is_ours(name)])
    for name in small:
        bucket.put(folder / name, name)
    write_index(folder, index)
    need()
    bucket.put(folder / INDEX, INDEX)
    sweep(place, held=True)


def _is_ours(name: str) -> bool:
    """Whether prepare writes objects of this name beside the index; what lies in folders there is somebody else's."""
    return "/" not in name and any(fnmatchcase(name, of) for of in _OURS)


def published(place: Place) -> None:
    """Fetch what says what the complete corpus at `place` was made of into this machine's folder of it. Raises DataError for an
    index that cannot be read."""
    folder = place.folder
    for name in (INDEX, REPORT, NAMED):
        data = place.bucket.text(name)
        if data is not None:
            (folder / name).write_bytes(data)
    index_of(place.uri, folder / INDEX)
    write_origin(folder, place.uri, place.service)


def sweep(place: Place, *, held: bool) -> None:
    """Remove the work folder of a complete corpus; where the lease is `held` by this command, it stays until that ends. Where
    it is not, it is that of a command that was killed as it ended, or ends now: of a complete corpus nobody needs one."""
    bucket = place.bucket
    bucket.remove([name for name, _ in bucket.sizes(f"{WORK}/") if not held or name != lease.NAME])
