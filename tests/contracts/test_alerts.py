"""Alerts and dashboard as Prometheus itself reads them (promtool, of Debian's package of that name; without it nothing is run).

Each alert is quiet before there is a reason, rings after, and says it in the words that are shown.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).parents[2] / "docs"
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}
TRAIN, RUN, VERSION = "ray_shoal_train_", '{run="a"}', 'version="7.ab"'
GOES_ON = {f"{TRAIN}ended{RUN}": "0x60"}
# alert: what is measured every five minutes, as promtool reads it; minutes when it is quiet, and when it rings; labels; what it
# says
CASES: list[tuple[str, dict[str, str], int, int, dict[str, str], str]] = [
    ("ShoalDrift", {"shoal:drift_state": "1x11 3x20"}, 65, 75, {}, ""),
    ("ShoalDriftSuspected", {"shoal:drift_state": "1x11 2x40"}, 100, 125, {}, ""),
    (
        "ShoalRegretAboveTolerance",
        {'shoal:regret_nats{bound="low"}': "0.04x11 0.0604x20", "shoal:regret_tolerance_nats": "0.05x40"},
        65, 75, {}, "Answers of depth auto lose more than is promised: at least 0.060 nats a token.",
    ),
    (
        "ShoalRouterCorrected", {'shoal:router_correction_nats{tolerance="0.1"}': "0x11 0.0124 0x20"}, 55, 70,
        {"tolerance": "0.1"}, "Answers within 0.1 nats a token lost more: the router is corrected by 0.012 nats.",
    ),
    ("ShoalWatchSilent", {"shoal:drift_looked_timestamp_seconds": "0+300x11 3300x20"}, 70, 85, {}, ""),
    ("ShoalWatchLearnsForLong", {"shoal:drift_state": "0x2100"}, 144 * 60, 170 * 60, {}, ""),
    ("ShoalReferenceStale", {"shoal:drift_reference_timestamp_seconds": "-2588400x40"}, 60, 130, {}, ""),
    (
        "ShoalCaptureLossy", {'shoal:capture_dropped_total{reason="disk"}': "0x11 3+3x20"}, 55, 65, {"reason": "disk"},
        "Rows of requests are lost (disk): 6 in ten minutes.",
    ),
    (
        "ShoalCaptureSlow", {"shoal:capture_lag_seconds": "1x11 61.2x20"}, 60, 70, {},
        "Rows wait 61 s for the disk: soon they are lost.",
    ),
    ("ShoalCanaryTakenBack", {"shoal:release_rollbacks_total": "0x11 1x20"}, 55, 65, {}, ""),
    (
        "ShoalCanaryStands", {f"shoal:release_share{{{VERSION}}}": "0.05x400"}, 24 * 60, 26 * 60, {"version": "7.ab"},
        "Version 7.ab has answered the same share for a day: it is held, or has too little traffic.",
    ),
    (
        "ShoalVersionFails",
        {
            f'shoal:version_requests_total{{{VERSION},outcome="failed"}}': "0x11 10+10x20",
            f'shoal:version_requests_total{{{VERSION},outcome="done"}}': "0+90x40",
        },
        55, 75, {"version": "7.ab"}, "Version 7.ab fails at 10% of its requests.",
    ),
    (
        "ShoalWeightsRefused", {"shoal:weights_update_refused": "0x11 2x20"}, 60, 70, {},
        "2 replicas could not load the weights that they were told to, and serve the old ones.",
    ),
    (
        "ShoalRetrainFailing", {"shoal:retrain_failures": "1x11 2x20"}, 55, 60, {},
        "2 retrainings in a row made no version that the gate let pass.",
    ),
    (
        "ShoalTrainStands", {f"{TRAIN}step{RUN}": "0+1x11 11x40", **GOES_ON}, 75, 90, {"run": "a"},
        "No update for twenty minutes: a.",
    ),
    (
        "ShoalTrainNotSaved", {f"{TRAIN}checkpoint_timestamp_seconds{RUN}": "0+300x11 3300x40", **GOES_ON}, 110, 130,
        {"run": "a"}, "No checkpoint for an hour: a.",
    ),
    ("ShoalTrainNotSaved", {**GOES_ON}, 55, 70, {"run": "a"}, "No checkpoint for an hour: a."),  # not one so far
    (
        "ShoalTrainRestarts", {f"{TRAIN}starts_total{RUN}": "1x11 2+1x4 6x20"}, 55, 85, {"run": "a"},
        "Workers started 5 times within an hour: a.",
    ),
    (
        "ShoalTrainStraggler",
        {
            f'{TRAIN}busy_seconds{{run="a",worker="slowest"}}': "1x11 2x20",
            f'{TRAIN}busy_seconds{{run="a",worker="median"}}': "1x40",
        },
        70, 80, {"run": "a"}, "One worker takes a third more time than the others, which wait for it: a.",
    ),
    (
        "ShoalTrainWaitsForData",
        {f'{TRAIN}part_seconds{{run="a",part="data"}}': "0.1x11 0.5x20", f"{TRAIN}update_seconds{RUN}": "1x40"},
        70, 80, {"run": "a"}, "A fifth of the time goes into reading rows: a.",
    ),
    (
        "ShoalTrainLossRises", {f"{TRAIN}loss{RUN}": "2x29 4x30"}, 145, 195, {"run": "a"},
        "The loss is a fifth above that of two hours ago: a.",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found


def run(*words: str | Path) -> str:
    """What it says. Raises AssertionError with that where it finds fault."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_alert_has_a_case() -> None:
    assert {name for name, *_ in CASES} == RULES.keys()


def test_each_alert_rings_when_it_has_to_and_not_before(promtool: str, tmp_path: Path) -> None:
    tests = []
    for name, series, quiet, rings, labels, summary in CASES:
        rule = RULES[name]
        said = {**rule["annotations"], **({"summary": summary} if summary else {})}
        alert = {"exp_labels": {**rule["labels"], **labels}, "exp_annotations": said}
        tests.append(
            {
                "interval": "5m",
                "input_series": [{"series": one, "values": values} for one, values in series.items()],
                "alert_rule_test": [
                    {"eval_time": f"{quiet}m", "alertname": name, "exp_alerts": []},
                    {"eval_time": f"{rings}m", "alertname": name, "exp_alerts": [alert]},
                ],
            }
        )
    file = tmp_path / "tests.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(DOCS / "alerts.yaml")], "evaluation_interval": "5m", "tests": tests})
    )
    assert "SUCCESS" in run(promtool, "test", "rules", file)


def test_prometheus_reads_what_the_dashboard_asks(promtool: str, tmp_path: Path) -> None:
    """As rules that record it, with what Grafana puts in place of its variables."""
    board = json.loads((DOCS / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = []
    for number, expression in enumerate(asked):
        for variable in ("$__rate_interval", "$model", "$run"):
            expression = expression.replace(variable, "5m" if variable == "$__rate_interval" else ".*")
        assert "$" not in expression
        rules.append({"record": f"asked:{number}", "expr": expression})
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    assert f"{len(asked)} rules found" in run(promtool, "check", "rules", file)
