"""What the last look of `shoal watch` found, for who does not look: the page, the cut, and who forgets a person."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError
from shoal.loop.capture import Forgotten
from shoal.loop.curves import shifts
from shoal.loop.detector import Detector
from shoal.loop.regret import broken
from shoal.loop.tell import STATES, Report
from shoal.machine import write_aside

FORMAT, VERSION = "shoal.watch", 1  # of what `watch.Watch` keeps in CAPTURE/FOLDER/STATE
FOLDER, STATE, LOCK = "watch", "watch.json", ".lock"
LOOKS_SECONDS = 60.0  # that who forgets waits for one who looks


def last_look(folder: Path) -> dict[str, Any] | None:
    """What the last look at the capture in `folder` found, for those who do not look themselves: `looked` (epoch seconds),
    `report`, `evidence` over time, `signals` as `curves.shifts` has them, and `asked`, whose the report's examples are; None
    where nobody has looked. Raises DataError for a file that cannot be read."""
    path = folder / FOLDER / STATE
    try:
        looked = path.stat().st_mtime
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{saved['format']} {saved['version']}")
        streams = Detector.restored(saved["detector"]).streams if saved["detector"] else ()
        signals = shifts(saved.get("curves") or {}, streams)
        names = {each.name for each in fields(Report)}  # a watch of another version may tell more, or less
        report = asdict(Report(**{name: value for name, value in saved["report"].items() if name in names}))
        if report["state"] not in STATES:
            raise ValueError(f"a state {report['state']}")
        found = {"looked": looked, "report": report, "evidence": saved["evidence"], "signals": signals}
        return {**found, "asked": saved.get("asked", [])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} cannot be read", got=str(error), do="remove it, and it learns anew") from error


def shown(look: dict[str, Any], forgotten: Forgotten) -> dict[str, Any]:
    """`look`, of `last_look`, for who may read it: without what the `forgotten` asked, and without whose the rest is."""
    report = {**look["report"], "examples": _left(look["report"]["examples"], look["asked"], forgotten)[0]}
    return {name: value for name, value in look.items() if name != "asked"} | {"report": report}


def forget(folder: Path, who: Forgotten) -> None:
    """Take what `who` asked out of the last look at the capture in `folder`, which the next look would do. What cannot be read
    stays: nobody shows it. Raises OSError."""
    path = folder / FOLDER / STATE
    if not path.exists():
        return
    busy = ResourceError(f"{folder / FOLDER} is being watched", do="do it again: no reader sees them from now on")
    with alone(folder / FOLDER / LOCK, busy, wait=LOOKS_SECONDS):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            before = saved["report"]["examples"]
            saved["report"]["examples"], saved["asked"] = _left(before, saved.get("asked", []), who)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if saved["report"]["examples"] != before:
            write_aside(path, json.dumps(saved, allow_nan=False) + "\n", sync=True)


def _left(
    examples: list[str], asked: list[dict[str, Any]], forgotten: Forgotten
) -> tuple[list[str], list[dict[str, Any]]]:
    """The examples, and whose they are, that are nobody's of the forgotten; of unknown ones none."""
    kept = [(text, whose) for text, whose in zip(examples, asked, strict=False) if not forgotten.hides(whose)]
    return [text for text, _ in kept], [whose for _, whose in kept]


def moved(folder: Path) -> list[str]:
    """Names of the signals that moved, by the last look at the capture in `folder`; none where nobody has looked."""
    try:
        report = json.loads((folder / FOLDER / STATE).read_text(encoding="utf-8"))["report"]
        found = [str(signal["signal"]) for signal in report["signals"]]
        return [*found, "regret"] if broken(report.get("regret")) and "regret" not in found else found
    except (OSError, ValueError, KeyError, TypeError):
        return []
