"""The versions of a release: folders that are written once, each with a model directory and where it came from.

versions/000013/  served/        the model directory that replicas load
                  fp32/          its fp32 parent, where it was rounded: the next fine-tuning starts from it
                  lineage.json   cut, parent version, run, code: what the weights were made from
                  learned.json   hashes of the requests and persons in its cut, by which it is found when one is forgotten
                  gate.json      the gate's verdict, where one was given
                  version.json   last: number, time, sha256 of all the others together
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import __version__
from shoal.errors import CheckpointError, DataError, UsageError
from shoal.loop.paired import PASS, SKIPPED
from shoal.machine import need_disk, see_on_disk, sha256_of, write_json
from shoal.model import described

FOLDER, SERVED, PARENT = "versions", "served", "fp32"
LINEAGE, LEARNED, VERDICT, MANIFEST = "lineage.json", "learned.json", "gate.json", "version.json"
CUT, TRAIN = "cut.json", "train.jsonl"  # of a cut: its manifest, and what is trained on
NAMES = "names"  # in the lineage of a version that is to be written: what becomes `LEARNED`


class AnotherShapeError(CheckpointError):
    """A model that cannot take the stable version's place while it serves."""


@dataclass(frozen=True)
class Version:
    """One version, as its files say."""

    number: int
    directory: Path
    sha256: str  # of all its files but the manifest
    made: str  # time, ISO 8601
    lineage: dict[str, Any]
    verdict: dict[str, Any] | None  # the gate's; None: it was not asked

    @property
    def served(self) -> Path:
        return self.directory / SERVED

    @property
    def parent(self) -> Path:
        """What a fine-tuning starts from: the fp32 parent, or what is served where that is not rounded."""
        return self.directory / PARENT if (self.directory / PARENT).is_dir() else self.served

    @property
    def weights(self) -> str:
        """sha256 of the weights that are served."""
        return str(self.lineage["weights"][SERVED])

    @property
    def label(self) -> str:
        """What answers say in ``X-Shoal-Version``: the number, and the beginning of the sha256."""
        return f"{self.number}.{self.sha256[:12]}"

    @property
    def learned(self) -> set[str] | None:
        """The requests and persons in its cut, as `cut.name_of` has them; None where it does not say. Raises DataError."""
        try:
            return set(json.loads((self.directory / LEARNED).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.directory / LEARNED} cannot be read", got=type(error).__name__) from error

    @property
    def passed(self) -> bool | None:
        """Whether the gate let it pass; None: it was not asked."""
        return None if self.verdict is None else bool(self.verdict.get("passed"))

    @property
    def failed(self) -> list[str]:
        """Names of the gate's checks that it did not pass."""
        checks = (self.verdict or {}).get("checks", ())
        return [str(check["name"]) for check in checks if check["status"] not in (PASS, SKIPPED)]

    def verify(self) -> None:
        """Raises CheckpointError where a file is not what it was when the version was made."""
        if (found := content_sha256(self.directory)) != self.sha256:
            raise CheckpointError(
                f"version {self.number} was changed", got=found[:12], allowed=self.sha256[:12], do="promote another"
            )


def content_sha256(directory: Path) -> str:
    """One sha256 over the names and contents of all files below `directory`, but for the manifest of a version."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    found = {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def read(directory: Path) -> Version:
    """Raises DataError for a folder that is no version."""
    try:
        told = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        lineage = json.loads((directory / LINEAGE).read_text(encoding="utf-8"))
        place = directory / VERDICT
        verdict = json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
        return Version(int(told["number"]), directory, str(told["sha256"]), str(told["made"]), lineage, verdict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory} is not a version of a release", got=type(error).__name__) from error


def need_same(model: Path, stable: Path) -> None:
    """Raises AnotherShapeError where `model` is of another shape, tokenizer or chat template than `stable`: it cannot take its
    place while it serves."""
    new, known = described.read(model), described.read(stable)
    # the configuration says how weights are rounded, too
    pairs = {
        "shape": (new.config, known.config),
        "chat template": (new.chat_template, known.chat_template),
        "tokenizer": tuple((each / described.TOKENIZER).read_bytes() for each in (model, stable)),
    }
    for what, (given, wanted) in pairs.items():
        if given != wanted:
            do = "serve it as another release: the gateway encodes for all versions of one"
            raise AnotherShapeError(f"{model}: {what}", got="another", allowed=f"that of {stable}", do=do)


def need_asked(verdict: dict[str, Any] | None, model: Path) -> None:
    """Raises UsageError where a gate's verdict is on other weights than `model` has."""
    asked = ((verdict or {}).get("candidate") or {}).get("weights_sha256")
    if not asked:
        return
    from shoal.model.files import weights_sha256  # torch, which who reads a release does not need

    if asked != (found := weights_sha256(model)):
        do = "ask the gate about this one (shoal gate)"
        raise UsageError("the verdict is on another model", got=asked[:12], allowed=found[:12], do=do)


def write(
    folder: Path,
    number: int,
    model: Path,
    *,
    fp32: Path | None,
    lineage: dict[str, Any],
    verdict: dict[str, Any] | None,
    made: str,
) -> Version:
    """A new version in `folder`, copied from a model directory, which is verified. Written aside, on the disk, and read-only
    from then on. Raises CheckpointError for a broken model, ResourceError where the disk is too small."""
    from shoal.model.files import check, weights_sha256  # torch, which who reads a release does not need

    check(model, verify=True)
    sources = {SERVED: model} | ({PARENT: fp32} if fp32 is not None else {})
    need_disk(folder, sum(path.stat().st_size for source in sources.values() for path in source.iterdir()))
    directory = folder / f"{number:06d}"
    beside = folder / f".{directory.name}.{os.getpid()}"
    for left in folder.glob(".[0-9]*.*"):  # of others that were killed: one at a time writes here
        shutil.rmtree(left, ignore_errors=True)
    try:
        for name, source in sources.items():
            shutil.copytree(source, beside / name)
            check(beside / name, verify=name == SERVED)  # another may have taken its place between two files
        weights = {name: weights_sha256(beside / name) for name in sources}
        cut = dict(lineage.get("cut") or {})
        if NAMES in cut:  # a file of its own: who reads where a version came from does not ask for these
            write_json(beside / LEARNED, cut.pop(NAMES))
        write_json(
            beside / LINEAGE, {**lineage, **({"cut": cut} if cut else {}), "weights": weights, "code": __version__}
        )
        if verdict is not None:
            write_json(beside / VERDICT, verdict)
        sha256 = content_sha256(beside)
        write_json(beside / MANIFEST, {"number": number, "sha256": sha256, "made": made})
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
            see_on_disk(path)
        see_on_disk(beside)
        beside.rename(directory)
        see_on_disk(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read(directory)


def cut_lineage(cut: Path | None) -> dict[str, Any]:
    """What a lineage says of the cut in a folder: its path, the sha256 of its manifest and of its rows to train on, how many of
    what, and the hashes of the requests and persons in it. Raises UsageError for a folder that is no cut."""
    if cut is None:
        return {}
    manifest = cut / CUT
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{cut} is not a cut", got=f"no {CUT} that can be read", do="make one: shoal curate"
        ) from error
    kept = {name: told[name] for name in ("train", "replay", "recent", "people", "labels", "caps") if name in told}
    rows = told.get("sha256", {}).get(TRAIN)  # the cut itself may lose some later
    names = {NAMES: [*told["requests"], *told["persons"]]} if {"requests", "persons"} <= told.keys() else {}
    return {"cut": {"path": str(cut.absolute()), "sha256": sha256_of(manifest), "rows": rows, **kept, **names}}
