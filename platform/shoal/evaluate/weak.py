"""Plain sentences about figures of the report that are weak, so that nobody has to find out for themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

NEAR = 0.02  # bits a byte between shallow and full depth within which depth hardly matters


def weaknesses(rows: Sequence[Mapping[str, Any]], by_depth: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plain sentences about numbers that are weak, so that nobody has to find out for themselves."""
    said = []
    for row in rows:
        values = row["values"]
        label, value = next(iter(values.items()))
        if row["metric"].startswith("bpb "):
            worse = [name for name, other in row["beside"].items() if other < value]
            if worse:
                said.append(f"{row['metric']}: {label} reads {value:.2f}, worse than {' and '.join(worse)}.")
        if row["metric"] == "BLEU summarisation" and value < 10:
            said.append(f"BLEU of summarisation is {value:.1f}: minutes of training do not make a summariser.")
        if row["metric"] == "code that parses" and value < 0.9:
            said.append(f"{value:.0%} of {row['rows']} generated functions parse; none is claimed to be right.")
        if row["unit"] in ("share", "0-100") and row["beside"] and row["intervals"][label] is not None:
            (rival, other), low = next(iter(row["beside"].items())), row["intervals"][label][0]
            if low <= other:
                said.append(
                    f"{row['metric']}: {_shown(value, row)} is not surely above {rival}, {_shown(other, row)}: "
                    f"the interval of {row['rows']} {row['of']} begins at {_shown(low, row)}."
                )
        if (
            row["unit"] == "tokens/s"
            and len(values) > 1
            and (last := list(values)[-1]) != label
            and values[last] < value
        ):
            said.append(
                f"{row['metric']}: {last} is slower than {label} ({values[last]:.0f} and {value:.0f} tokens/s): "
                "on matrices this small there is little for INT8 to save."
            )
    exits = [row for row in by_depth if row["exit"] != "auto"]
    if len(exits) > 1 and exits[0]["bpb text"] is not None and exits[0]["bpb text"] - exits[-1]["bpb text"] < NEAR:
        said.append(f"Depth hardly matters yet: the shallow exit is within {NEAR} bits per byte of full depth on text.")
    for modality in ("bpb text", "bpb code"):
        for near, deep in itertools.pairwise(exits):
            if deep[modality] is not None and deep[modality] > near[modality]:
                said.append(
                    f"{modality} rises with depth: {near['exit']} reads {near[modality]:.3f}, "
                    f"{deep['exit']} {deep[modality]:.3f}."
                )
    return said


def _shown(value: float, row: Mapping[str, Any]) -> str:
    return f"{value:.1%}" if row["unit"] == "share" else f"{value:.2f}"
