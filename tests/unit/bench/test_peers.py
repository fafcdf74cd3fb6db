"""Peers of `shoal bench decode` as processes of their own: asked in turns, asleep between, their end told."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import peers
from shoal import Model
from shoal.errors import ShoalError, UsageError

GOOD = """
import json, sys
told = json.loads(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    batch, prompt, tokens = map(int, line.split())
    print(told["width"] * 1000 + batch * tokens + prompt / 64, flush=True)
"""
MODEL = Model.from_preset("test")
ENDS = "import sys; print('ready', flush=True); sys.stdin.readline(); sys.exit('no memory left')"


def _kind(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> dict[str, str]:
    script = folder / "peer.py"
    script.write_text(text)
    monkeypatch.setitem(peers.KINDS, "mine", (str(script), {}))
    return peers.parse([f"mine={sys.executable}"])


def test_a_peer_answers_in_its_turn_and_sleeps_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODEL.config
    with peers.running(_kind(monkeypatch, tmp_path, GOOD), MODEL) as found:
        process = psutil.Process(found[0].process.pid)
        told = [found[0].seconds(8, 16, n) for n in (3, 4)]
        assert told == [config.width * 1000 + 24.25, config.width * 1000 + 32.25]
        until = time.monotonic() + 10  # a signal takes a moment
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
            time.sleep(0.01)
        assert process.status() == psutil.STATUS_STOPPED
    assert not process.is_running()


@pytest.mark.parametrize(
    ("text", "words"), [(ENDS, "mine ended.*no memory left"), ("raise SystemExit('no vllm')", "mine ended.*no vllm")]
)
def test_a_peer_that_ends_is_told_by_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    with (
        pytest.raises(ShoalError, match=words),
        peers.running(_kind(monkeypatch, tmp_path, text), MODEL) as found,
    ):
        found[0].seconds(1, 1, 1)


def test_a_silent_peer_is_not_waited_for_longer_than_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "START", 0.3)
    with (
        pytest.raises(ShoalError, match="mine said nothing for 0 s"),
        peers.running(_kind(monkeypatch, tmp_path, "import time; time.sleep(60)"), MODEL),
    ):
        pass


def test_a_peers_python_may_be_told_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert peers.parse(["llama.cpp=./python"]) == {"llama.cpp": str(tmp_path / "python")}


@pytest.mark.parametrize("option", ["vllm=/no/such/python", "sglang=python", "vllm"])
def test_a_wrong_peer_option_names_what_is_allowed(option: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        peers.parse([option])
