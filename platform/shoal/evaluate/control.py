"""The exit tax: what training the early exits costs full depth, measured against a control that trains without them.

The control is the main run again with a weight for full depth alone: the same start, the same rows and the learning rate that
the main run had at each step. It stops where the main run was measured on held-out data, after a share of its length, and is
measured on the same rows. So the tax is that of this step, where the learning rate has not fallen yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.train import log
from shoal.train.plan import FitPlan

TARGET = 0.02  # of bits a byte: a tax that is accepted


def control_plan(main: FitPlan, run: str | Path, share: float) -> FitPlan:
    """The control of the finished run `main`, to be left in the folder `run`: as many steps as the evaluation of `main` that is
    nearest to `share` of its length. Raises DataError when `main` was never measured."""
    evals = [record["step"] for record in log.read(main.run) if record["kind"] == "eval"]
    if not evals:
        raise DataError(f"{main.run} was never measured on held-out data", do="give it held-out rows")
    *early, last = main.train.exit_weights
    return dataclasses.replace(
        main,
        train=dataclasses.replace(main.train, exit_weights=(*(0.0 for _ in early), last)),
        run=str(run),
        out="",
        rates_of=main.run,
        steps=min(evals, key=lambda step: abs(step - share * evals[-1])),
        tokens=None,
        epochs=None,
        minutes=None,
        eval_every=0,
        mirror="",
        keep_best=False,
    )


def exit_tax(main_run: str | Path, control_run: str | Path) -> dict[str, Any]:
    """For the report: the step at which both runs were measured, the main run's length, and for each modality the bits a byte
    at full depth ``with`` and ``without`` early exits and the ``tax``, their quotient less 1. Raises DataError when the two
    were not measured at the same step."""
    mains, controls = (
        {r["step"]: r["bpb"] for r in log.read(run) if r["kind"] == "eval"} for run in (main_run, control_run)
    )
    both = mains.keys() & controls.keys()
    if not both:
        raise DataError(f"{main_run} and {control_run} were not measured at the same step", got=sorted(controls))
    step, rows = max(both), []
    for modality, by_exit in mains[step].items():
        taxed, free = by_exit["full"], controls[step][modality]["full"]
        if taxed is not None and free:  # null where nothing was predicted
            rows.append({"modality": modality, "with": taxed, "without": free, "tax": taxed / free - 1})
    return {"step": step, "steps": max(mains), "rows": rows}


def too_high(tax: dict[str, Any]) -> list[str]:
    """A sentence for each modality whose tax is above `TARGET`."""
    return [
        f"Training the early exits costs full depth {row['tax']:.1%} bits a byte of {row['modality']} at step {tax['step']}, "
        f"above the {TARGET:.0%} that are accepted."
        for row in tax["rows"]
        if row["tax"] > TARGET
    ]
