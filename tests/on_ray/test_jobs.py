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

import httpx
import pytest

from shoal import Model, presets
from shoal.cli import main
from shoal.data.shards import open_index
from shoal.inputs.tokenizer import END_ID
from shoal.loop import retrainings
from shoal.loop.cut import Settings, cut
from shoal.loop.labels import CORRECTION, Found, Labelled
from shoal.loop.learned import WORK
from shoal.loop.release import Release
from shoal.on_ray.teach import KEY_VARIABLE
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.manifest import damage
from shoal.train.plan import pretrain_plan
from tests.corpus import write_chats, write_corpus
from tests.flows.conftest import KEY, running

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]  # also where a submission takes minutes
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
SECONDS = 480.0  # for any command; far above what it takes, also on a busy machine


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
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
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


def chain(*jobs: list[str]) -> list[str]:
    """One command that runs these scripts in turn, since each submission takes longer than what they do."""
    return ["bash", "-c", " && ".join(shlex.join(["python", *words]) for words in jobs)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        node = Head(folder)
        try:
            node.wait()
            yield node
        finally:
            node.stop()


@pytest.mark.smoke
def test_submitted_jobs_train_and_measure_a_model(head: Head, tmp_path: Path) -> None:
    """They run the uploaded copy, not what is installed, and join the cluster rather than starting their own."""
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
    job = head.submit(*chain(train, measure))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert "step      2 100.0%" in job.stdout, "its lines are seen by who submitted it"
    assert "router: within 0.05 nats" in job.stdout and list((run / "tensorboard").glob("events*"))
    model = Model.load(run / "model")
    assert model.name == "test" and model.router is not None
    assert json.loads((tmp_path / "r.json").read_text())["frontier"]["prompts"] == 12
    assert (tmp_path / "r.html").exists()


def test_submitted_jobs_prepare_a_corpus_and_teach(head: Head, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for n in range(40):
        (tmp_path / "notes" / f"{n}.md").write_text(
            f"Note {n}: the crew mended net {n} before the tide, and slept.\n" * 3
        )
    prepare = ["jobs/prepare.py", "--out", str(tmp_path / "data"), "--source", f"notes={tmp_path / 'notes'}"]
    prepare += ["--mix", "text=100", "--preset", "test"]
    questions, taught = write_chats(tmp_path / "questions.jsonl", rows=6), tmp_path / "taught.jsonl"
    teach = ["jobs/teach.py", "--data", str(questions), "--out", str(taught), "--model", "fish"]
    teach += ["--max-tokens", "64", "--temperature", "1", "--concurrency", "1"]
    model = Model.from_preset("test", seed=3)
    model.net.embed.weight[END_ID] *= 20  # it comes to an end by itself: what was cut off is no target
    with running(model, max_batch=4) as service:
        job = head.submit("env", f"{KEY_VARIABLE}={KEY}", *chain(prepare, [*teach, "--url", f"{service.url}/v1"]))
    assert job.returncode == 0, job.stdout + job.stderr
    assert (
        open_index(tmp_path / "data", length=presets.get("test").model.train_length).total("rows", "train", "text") > 0
    )
    rows = [json.loads(line) for line in taught.read_text("utf-8").splitlines()]
    assert rows and all(row["teacher"]["answered_by"] == "fish" for row in rows)
    assert all(row["teacher"]["finish_reason"] == "stop" and row["messages"][-1]["content"] for row in rows)


def test_submitted_jobs_tune_and_quantize_a_model(head: Head, tmp_path: Path) -> None:
    """Each with a held-out file to fit its router on."""
    Model.from_preset("test").save(tmp_path / "base")
    chats, heldout = write_chats(tmp_path / "chats.jsonl"), write_chats(tmp_path / "heldout.jsonl", rows=100)
    shared = ["--data", str(chats), "--heldout", str(heldout), "--steps", "2", "--cpus-per-worker", "0.5"]
    tune = ["jobs/finetune.py", "--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"), *shared]
    int8 = ["jobs/quantize.py", "--model", str(tmp_path / "run" / "model"), "--out", str(tmp_path / "int8"), *shared]
    job = head.submit(*chain(tune, int8))
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("chats: 60 rows") == job.stdout.count("step      2 100.0%") == 2
    for directory, kind in ((tmp_path / "run" / "model", "none"), (tmp_path / "int8", "w8a8")):
        model = Model.load(directory)
        assert model.config.quantization == kind and model.router is not None


def release_and_cut(folder: Path) -> tuple[Release, Path]:
    """A release whose stable version is rounded, and a cut of two hundred rows."""
    parent = Model.from_preset("test", seed=3)
    parent.save(folder / "fp32")
    parent.quantized().save(folder / "int8")
    release = Release(folder / "release")
    release.add(folder / "int8", fp32=folder / "fp32")
    talks = [
        [{"role": "user", "content": f"item {n}?"}, {"role": "assistant", "content": f"shelf {n * 7 % 10}"}]
        for n in range(200)
    ]
    rows = [Labelled(talk, CORRECTION, f"person {n}", f"chatcmpl-{n}") for n, talk in enumerate(talks)]
    cut(Found(rows, len(rows)), folder / "cut", Settings(heldout=0.5))
    return release, folder / "cut"


def test_a_submitted_retraining_makes_a_candidate_and_the_next_ones_wait(head: Head, tmp_path: Path) -> None:
    """One that trains on this cluster, one within its cooldown, one beyond the budget of the day."""
    release, folder = release_and_cut(tmp_path)
    words = ["jobs/retrain.py", "--release", str(release.directory), "--cut", str(folder), "--minutes", "0.02"]
    one, soon, much = (
        shlex.join(["python", *words, *more])
        for more in (["--kind", "finetune"], [], ["--cooldown", "0", "--budget", "0.02"])
    )
    job = head.submit("bash", "-c", f"{one} && ! {soon} && ! {much}")
    assert job.returncode == 0, job.stdout + job.stderr
    told = next(json.loads(line) for line in job.stdout.splitlines() if line.startswith('{"version"'))
    assert (told["version"], told["kind"], told["passed"]) == (2, "finetune", None)
    said = " ".join((job.stdout + job.stderr).split())
    assert said.index("the cooldown of retraining") < said.index("the budget of retraining")
    made, stable = release.version(2), release.version(1)
    served, parent = Model.load(made.served), Model.load(made.parent)
    assert (served.config.quantization, parent.config.quantization) == ("w8a8", "none")
    assert made.weights != stable.weights and made.learned and made.lineage["kind"] == "finetune"
    assert (release.state().stable, release.state().candidate, release.check()) == (1, 2, 2)
    known = retrainings.read(release.directory)
    assert [run.outcome for run in known.runs] == ["unjudged"] and known.failed == 0
    assert not any((release.directory / WORK).iterdir())


def test_a_stopped_retraining_is_known_as_ended_and_the_same_command_goes_on(head: Head, tmp_path: Path) -> None:
    release, folder = release_and_cut(tmp_path)
    words = ["jobs/retrain.py", "--release", str(release.directory), "--cut", str(folder), "--kind", "finetune"]
    words += ["--minutes", "0.5", "--cooldown", "0"]
    head.submit("python", *words, name="retraining")
    end = time.monotonic() + SECONDS

    def steps() -> list[int]:
        for run in (release.directory / WORK).glob("*/run"):
            if log.metrics_file(run).exists():
                return [record["step"] for record in log.read(run) if record["kind"] == "step"]
        return []

    while not any(step >= 3 for step in steps()):
        assert time.monotonic() < end, head.job("logs", "retraining").stdout
        time.sleep(0.2)
    head.job("stop", "retraining")
    assert "STOPPED" in head.job("status", "retraining").stdout.upper()
    (stopped,) = retrainings.read(release.directory).runs
    assert stopped.outcome == "ended" and stopped.minutes > 0 and len(release.versions()) == 1
    last = max(steps())
    job = head.submit("python", *words)
    assert job.returncode == 0, job.stdout + job.stderr
    went_on = [int(line.split()[1]) for line in job.stdout.splitlines() if line.startswith("step ")]
    assert not went_on or went_on[0] >= last, "it does not begin anew"
    assert release.state().candidate == 2
    assert [run.outcome for run in retrainings.read(release.directory).runs] == ["ended", "unjudged"]


def test_a_submitted_job_makes_a_recipe_of_a_user_s_own(head: Head, tmp_path: Path) -> None:
    """From rows to its report: the smallest that there is, whose model learns nothing in a second."""
    rows, mine = tmp_path / "rows.jsonl", tmp_path / "mine"
    talks = [[("user", f"What is {n}?"), ("assistant", f"It is {n}.")] for n in range(200)]
    chats = [{"messages": [{"role": role, "content": said} for role, said in turns]} for turns in talks]
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats), "utf-8")
    assert main(["recipe", "new", "--from", str(rows), "--out", str(mine)]) == 0
    job = head.submit(
        "python", "jobs/recipe.py", "--out", str(tmp_path / "run"), "--minutes", "0.05", "--workers", "1", str(mine)
    )
    assert job.returncode == 0, job.stdout + job.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    said = next(line for line in reversed(job.stdout.splitlines()) if line.startswith("{"))
    assert json.loads(said)["suites"] == report["suites"] and "served" in report["costs"]["int8"]
    assert Model.load(tmp_path / "run" / "int8").config.quantization == "w8a8"


def test_a_stopped_job_leaves_the_step_that_it_was_at(head: Head, tmp_path: Path) -> None:
    """`ray job stop` is a SIGTERM, and then three seconds: enough for a checkpoint, from which another process goes on as if
    nothing had happened."""
    data, run = write_corpus(tmp_path / "data", presets.get("test")), tmp_path / "run"
    # rates that do not depend on how long the run is
    fields = {"eval_every": 0, "warmup": 0.0, "decay": 0.0, "exit_warmup": 0.0}
    options = [
        "--preset",
        "test",
        "--data",
        str(data),
        "--out",
        str(run),
        "--steps",
        "3000",
        "--cpus-per-worker",
        "0.5",
    ]
    options += [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    head.submit("python", "jobs/pretrain.py", *options, name="to-be-stopped")
    end = time.monotonic() + SECONDS
    while not (log.metrics_file(run).exists() and any(r["step"] >= 5 for r in log.read(run) if r["kind"] == "step")):
        assert time.monotonic() < end, head.job("logs", "to-be-stopped").stdout
        time.sleep(0.2)
    head.job("stop", "to-be-stopped")
    assert "STOPPED" in head.job("status", "to-be-stopped").stdout.upper()
    (kept,) = (run / "checkpoints").glob("step-*")
    last = [record for record in log.read(run) if record["kind"] == "step"][-1]["step"]
    assert kept.name == f"step-{last:08d}" and damage(kept) is None
    for folder in (run, tmp_path / "calm"):
        fit(pretrain_plan("test", str(data), str(folder), steps=last + 2, **fields))
    stopped, calm = (
        [(r["step"], r["loss"]) for r in log.read(folder) if r["kind"] == "step"] for folder in (run, tmp_path / "calm")
    )
    assert len(stopped) == last + 2 and stopped == calm


def test_a_submitted_job_serves_until_it_is_stopped(head: Head, tmp_path: Path) -> None:
    model = Model.from_preset("test")
    model.save(tmp_path / "model")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    head.submit("python", "jobs/serve.py", "--model", str(tmp_path / "model"), "--port", str(port), name="serving")

    def status() -> int:
        try:
            return httpx.get(f"{url}/ready", timeout=10).status_code
        except httpx.TransportError:
            return 0

    def until(code: int) -> None:
        end = time.monotonic() + SECONDS
        while status() != code:
            assert time.monotonic() < end, head.job("logs", "serving").stdout
            time.sleep(0.2)

    until(200)
    name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    body = {"model": name, "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "depth": "full"}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    tokens = model.generate_naive(model.tokenizer.encode("abc"), 4, depth="full")
    assert answer["choices"][0]["text"] == model.tokenizer.decode(tokens)
    head.job("stop", "serving")
    until(0)
    assert "STOPPED" in head.job("status", "serving").stdout.upper()


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
