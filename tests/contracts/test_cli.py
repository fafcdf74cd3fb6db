"""What the command line promises: help that states units and defaults, exit codes 0, 1 and 2, one line for a failure, and
nothing half-written left behind. No case here may need a running Ray, since all are found before work begins."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import Model, cli
from shoal.errors import ConfigError
from tests.contracts.commands import commands

UNITS = (
    "days|hours|seconds|minutes|tokens|passes|updates|workers|port|runs|seed|share|micro-batches|questions|requests|sessions|people|trials|CPUs|"
    "0 is greedy"
)


# Options that say by themselves what happens without them.
WITHOUT = ("--config", "--against", "--json", "--api-key")
COMMANDS = commands()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that fail before they need Ray do so without waiting for one to start."""
    monkeypatch.setattr("shoal.on_ray.resources.local_ray", contextlib.nullcontext)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "test"
    Model.from_preset("test").save(directory)
    return directory


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Exit code and message of a command that must fail, in one line and without a traceback."""
    code = cli.main([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("shoal: "), lines
    return code, lines[0]


@pytest.mark.parametrize("words", ["", "bench", *COMMANDS])
def test_help_exits_with_0(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words.split(), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS)
def test_help_says_what_each_option_is_and_what_happens_without_it(words: str) -> None:
    """A default is printed by typer, or stands in brackets; a number says of what."""
    for option in COMMANDS[words]:
        name = f"shoal {words} {option.names[0]}"
        assert option.help, f"{name} says nothing"
        if option.kind in (int, float):
            assert re.search(UNITS, option.help, re.IGNORECASE), f"{name}: of what?"
        if option.default is None and not option.help.startswith("Stop after") and option.names[0] not in WITHOUT:
            assert re.search(r"\[.+\]", option.help), f"{name}: what is the default?"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("evaluate --model nowhere --data nowhere", "nowhere is not a model directory"),
        ("finetune --model nowhere --data rows.jsonl --out run", "nowhere is not a model directory"),
        ("quantize --model nowhere --data rows.jsonl --out out", "nowhere is not a model directory"),
        ("quantize --model nowhere --data rows.jsonl --out out --no-train", "nowhere is not a model directory"),
        ("serve --model nowhere --no-ray --no-ui", "nowhere is not a model directory"),
        ("pretrain --data nowhere --out run --steps 1 --preset test", "nowhere"),
        ("prepare --out data --source notes=nowhere", "nowhere"),
        ("prepare --out data --source notes=empty", "empty"),
    ],
)
def test_what_is_missing_is_named(
    words: str,
    says: str,
    no_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, line = fails(capsys, *words.split())
    assert code == 1 and says in line
    assert os.listdir(tmp_path) == ["empty"], "something half-written was left"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("show-config tny", "did you mean 'tiny'?"),
        ("pretrain --preset tny --data d --out r --steps 1", "did you mean 'tiny'?"),
        ("prepare --out d --preset tny", "did you mean 'tiny'?"),
        ("prepare --out d --config slip.yaml", "unknown key sorce"),
        ("prepare --out d --config slip.yaml", "did you mean 'source'?"),
        ("prepare --out d --config broken.yaml", "broken.yaml is not valid yaml"),
        ("prepare --out d --config absent.yaml", "absent.yaml"),
        ("prepare --out d --source notes", "NAME=URI"),
        ("prepare --out d --mix text=-1", "--mix"),
        ("prepare --out d --mix sound=1", "--mix"),
        ("pretrain --data d --out r --preset test", "how long to train"),
        ("pretrain --data d --out r --preset test --steps -1", "length of the run"),
        ("pretrain --data d --out r --preset test --steps 1 --resume maybe", "resume"),
        ("serve --config slip.yaml --model m", "sorce"),
        ("serve", "--model DIR or --config FILE"),
        ("serve --model m --replicas 3:1", "max_replicas"),
        ("serve --model m --gateways 3:1", "max_gateways"),
        ("serve --model m --gateways x", "gateways"),
        ("serve --model m --no-ray --gateways 2", "--no-ray"),
        ("bench decode --batches one", "--batches"),
        ("bench decode --shape 9m", "--shape"),
        ("bench tolerance --model . --data . --batches 1,x", "--batches"),
        ("bench tolerance --model . --data . --tolerances=-0.1", "--tolerances"),
        ("pretrain --data d", "--out"),
        ("pretrain --data d --out r --steps many", "--steps"),
        ("pretrain --dat d --out r", "--dat"),
        ("prepre", "prepre"),
    ],
)
def test_wrong_usage_exits_with_2(
    words: str,
    says: str,
    no_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slip.yaml").write_text("sorce: [notes=docs]\n")
    (tmp_path / "broken.yaml").write_text("mix: [text\n")
    code, line = fails(capsys, *words.split())
    assert code == 2 and says in line
    assert sorted(os.listdir(tmp_path)) == ["broken.yaml", "slip.yaml"], "something half-written was left"


@pytest.mark.parametrize(
    "words", ["release list --release", "serve --no-ray --release", "serve --model m --batches", "gate --suites"]
)
def test_an_address_in_s3_is_no_path(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one it would be a folder called `s3:` below the present one."""
    monkeypatch.chdir(tmp_path)
    code, line = fails(capsys, *words.split(), "s3://ocean/r")
    assert code == 2 and f"{words.split()[-1]}: got 's3:/ocean/r'; allowed: a path" in line
    assert not [*tmp_path.iterdir()]


NUMBERS = [
    (words, option.names[0]) for words, options in COMMANDS.items() for option in options if option.kind is float
]


@pytest.mark.parametrize(("words", "name"), NUMBERS)
def test_nan_and_inf_are_no_numbers(words: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = [option for option in COMMANDS[words] if option.required and option.names[0] != name]
    given = [
        word
        for option in needed
        for word in (*option.names[:1] * option.names[0].startswith("-"), "1" if option.kind is int else "no-such")
    ]
    for odd in ("nan", "inf", "-inf", "1e999"):
        code, line = fails(capsys, *words.split(), *given, f"{name}={odd}")
        assert code == 2 and line.startswith(f"shoal: {name}: got '") and "allowed: a finite number" in line


def test_what_needs_training_is_refused_where_nothing_is_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "--model", model, "--out", tmp_path / "out", "--no-train"]
    for name, value in (("--steps", "3"), ("--set", "seed=1"), ("--workers", "2"), ("--data", "d"), ("--replay", "d")):
        code, line = fails(capsys, *words, name, value)
        assert code == 2 and f"--no-train with {name}" in line
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_rounded_in_its_own_place(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for more in (["--no-train"], ["--data", "rows.jsonl"]):
        code, line = fails(capsys, "quantize", "--model", model, "--out", f"{model}/../{model.name}", *more)
        assert code == 2 and "--out: got 'the model that is to be rounded'" in line
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_an_option_by_name_and_by_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = "pretrain --data d --out r --preset test --steps 1 --accumulate 2 --set accumulate=4"
    code, line = fails(capsys, *words.split())
    assert code == 2 and "--set accumulate and --accumulate" in line


def test_a_port_in_use_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a stage has run or a Ray was started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = fails(capsys, "serve", "--no-ray", "--no-ui", "--model", model, "--port", port)
        assert code == 1 and f"port {port}" in line
        code, line = fails(capsys, "quickstart", "--root", tmp_path / "run", "--port", port)
        assert code == 1 and f"port {port}" in line


def test_debug_shows_where() -> None:
    with pytest.raises(ConfigError):
        cli.main(["--debug", "show-config", "tny"])


@pytest.mark.parametrize("error", [RuntimeError("first line\nsecond line"), ValueError()])
def test_an_error_nobody_foresaw_is_one_line_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shoal.presets.get", lambda name: (_ for _ in ()).throw(error))
    code, line = fails(capsys, "show-config", "tiny")
    assert code == 1 and type(error).__name__ in line and "--debug" in line


@pytest.mark.parametrize(("command", "more"), [("show-config tiny", ""), ("serve --model m", "; shoal serve --no-ray")])
def test_what_needs_ray_says_so_where_it_is_not_installed(
    command: str, more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `make assistant`, which installs no Ray."""
    error = ModuleNotFoundError("No module named 'ray'", name="ray")
    for name in ("shoal.presets.get", "shoal.stages.serve.Serve.run"):
        monkeypatch.setattr(name, lambda *_: (_ for _ in ()).throw(error))
    code, line = fails(capsys, *command.split())
    assert code == 1 and f"needs Ray, which is not installed: make setup, or pip install 'shoal[ray]'{more}" in line


@pytest.mark.parametrize(
    ("words", "does", "says"),
    [
        ("show-config tiny", "shoal.presets.get", "the same command goes on"),
        ("serve --model m --no-ray --no-ui", "shoal.api.server.run_local", "the service has stopped"),
    ],
)
def test_an_interrupted_command_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, does: str, says: str
) -> None:
    monkeypatch.setattr(does, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, line = fails(capsys, *words.split())
    assert code == 130 and says in line


def test_the_installed_command_exits_so() -> None:
    shoal = str(Path(sys.executable).with_name("shoal"))
    for words, code in ((["--help"], 0), (["show-config", "test"], 0), (["show-config", "tny"], 2)):
        done = subprocess.run([shoal, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
