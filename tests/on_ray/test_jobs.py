"""A job submitted as README says: to a head node that was started as clusters/local.yaml says, from a copy of this folder."""

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import Model, presets
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.manifest import damage
from shoal.train.plan import pretrain_plan
from tests.corpus import write_chats, write_corpus

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
SECONDS = 120  # for one command


class Head:
    """A head node of our own, and the commands of a person who sits at its machine."""

    def __init__(self, folder: str) -> None:
        self.dashboard, client, agent, metrics = free_ports(4)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": os.pathsep.join([str(Path(RAY).parent), os.environ["PATH"]]),  # as after `. .venv/bin/activate`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
        }
        ports = {
            "port": 0,
            "dashboard-port": self.dashboard,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "metrics-export-port": metrics,
        }
        options = shlex.split("--head --block --num-cpus 4 --dashboard-host 127.0.0.1 --disable-usage-stats")
        options += ["--object-store-memory", str(100 * 2**20), "--temp-dir", folder]
        options += [f"--{name}={value}" for name, value in ports.items()]
        self.log = Path(folder) / "start.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [RAY, "start", *options], env=self.env | LOOPBACK, stdout=log, stderr=log, start_new_session=True
            )

    def submit(self, *command: str, name: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of `command` from the repository's root; waits for its end, unless it is given a name."""
        line = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", "--working-dir", "."]
        line += ["--no-wait", "--submission-id", name] if name else []
        line += ["--runtime-env", "clusters/local.yaml", "--", *command]
        return subprocess.run(
            line, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=SECONDS, check=False
        )

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job` with `words`."""
        line = [RAY, "job", *words[:1], "--address", f"http://127.0.0.1:{self.dashboard}", *words[1:]]
        return subprocess.run(line, env=self.env, capture_output=True, text=True, timeout=SECONDS, check=True)

    def wait(self) -> None:
        """Until the job API answers."""
        command = [RAY, "job", "list", "--address", f"http://127.0.0.1:{self.dashboard}"]
        for _ in range(20):
            asked = subprocess.run(command, env=self.env, capture_output=True, timeout=SECONDS, check=False)
            if asked.returncode == 0:
                return
            assert self.process.poll() is None, self.log.read_text()
        raise AssertionError(f"the job API does not answer: {asked.stderr.decode()}\n{self.log.read_text()}")

    def stop(self) -> None:
        """End the node and what it started."""
        self.process.send_signal(signal.SIGINT)  # as Ctrl-C; SIGTERM would wait half a minute for what still runs
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        node = Head(folder)
        try:
            node.wait()
            yield node
        finally:
            node.stop()


def test_submitted_jobs_train_and_measure_a_model(head: Head, tmp_path: Path) -> None:
    """They run the uploaded copy, not what is installed, and join the cluster rather than starting their own. One submission
    for both, since each takes longer than what they do."""
    data, run = write_corpus(tmp_path / "data", presets.get("test"), heldout=60), tmp_path / "run"
    write_chats(data / "sft-heldout.jsonl", rows=24)
    train = ["jobs/pretrain.py", "--preset", "test", "--data", str(data), "--out", str(run), "--steps", "2"]
    train += ["--cpus-per-worker", "0.5", "--track", "tensorboard"]
    measure = [
        "jobs/evaluate.py",
        "--model",
        str(run / "model"),
        "--data",
        str(data),
        "--json",
        str(tmp_path / "r.json"),
    ]
    job = head.submit("bash", "-c", " && ".join(shlex.join(["python", *words]) for words in (train, measure)))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert "step      2 100.0%" in job.stdout, "its lines are seen by who submitted it"
    assert "router: within 0.05 nats" in job.stdout and list((run / "tensorboard").glob("events*"))
    model = Model.load(run / "model")
    assert model.name == "test" and model.router is not None
    assert json.loads((tmp_path / "r.json").read_text())["frontier"]["prompts"] == 12
    assert (tmp_path / "r.html").exists()


def test_a_stopped_job_leaves_the_step_that_it_was_at(head: Head, tmp_path: Path) -> None:
    """`ray job stop` is a SIGTERM, and then three seconds: enough for a checkpoint, from which another process goes on."""
    data, run = write_corpus(tmp_path / "data", presets.get("test")), tmp_path / "run"
    options = ["--preset", "test", "--data", str(data), "--out", str(run), "--steps", "3000", "--set", "eval_every=0"]
    head.submit("python", "jobs/pretrain.py", *options, "--cpus-per-worker", "0.5", name="to-be-stopped")
    end = time.monotonic() + SECONDS
    while not (log.metrics_file(run).exists() and any(r["step"] >= 5 for r in log.read(run) if r["kind"] == "step")):
        assert time.monotonic() < end, head.job("logs", "to-be-stopped").stdout
        time.sleep(0.2)
    head.job("stop", "to-be-stopped")
    assert "STOPPED" in head.job("status", "to-be-stopped").stdout.upper()
    (kept,) = (run / "checkpoints").glob("step-*")
    last = [record for record in log.read(run) if record["kind"] == "step"][-1]["step"]
    assert kept.name == f"step-{last:08d}" and damage(kept) is None
    assert fit(pretrain_plan("test", str(data), str(run), steps=last + 2, eval_every=0)).steps == last + 2
    assert [r["step"] for r in log.read(run) if r["kind"] == "step"] == list(range(1, last + 3))


def test_a_job_sees_the_copy_of_the_folder(head: Head) -> None:
    show = "import os, shoal; print('at', os.path.realpath(shoal.__file__), os.path.exists('tests'), os.environ['RAY_ADDRESS'])"
    job = head.submit("python", "-c", show)
    assert job.returncode == 0, job.stdout + job.stderr
    (line,) = (line for line in job.stdout.splitlines() if line.startswith("at "))
    _, place, tests, address = line.split()
    assert "working_dir_files" in place and place.endswith("platform/shoal/__init__.py")
    assert tests == "False", ".rayignore keeps the tests at home"
    assert address.startswith("127.0.0.1:")


def test_nobody_submits_without_the_token(head: Head) -> None:
    job = head.submit("true", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert job.returncode != 0 and "token" in (job.stdout + job.stderr).lower()
