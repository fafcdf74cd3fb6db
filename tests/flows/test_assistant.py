"""`make assistant` on a tiny checkpoint in place of the one that pip fetches: every step, the answers, and both ways to end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import Model, assistant
from shoal.errors import ResourceError
from shoal.stages.stage import out

DATA = Path(__file__).parents[1] / "data" / "open"
SECONDS = 300  # after which a process that should have ended is ended
CODE = """
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
from shoal import assistant

class Impatient(Console):
    def print(self, text, **how):
        super().print(text, **how)
        if "Ctrl-C ends it" in text:
            os.kill(os.getpid(), signal.SIGINT)

root, port, source = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
assistant.run(root, stay=False, port=port, console=Console(width=999), source=source)
print("once more")
assistant.run(root, stay=True, port=port, console=Impatient(width=999), source=source)
"""


def test_open_weights_become_an_assistant_and_a_second_call_goes_on(tmp_path: Path) -> None:
    """The first ends after the answers, the second by Ctrl-C."""
    source, root = tmp_path / "from", tmp_path / "run"
    shutil.copytree(DATA / "smollm2", source)
    shutil.copytree(DATA / "tokenizer", source, dirs_exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", CODE, str(root), str(port), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("once more\n")
    for text in (first, second):
        assert text.count("tokens/s") == len(assistant.QUESTIONS) and text.endswith("The service has stopped.\n")
        assert all(question in text for question in assistant.QUESTIONS)
    assert '"path":' not in done.stderr, "lines of requests stood between the answers"
    assert "done before" not in first and second.count("done before") == 2
    assert "Ctrl-C" not in first and f"http://127.0.0.1:{port}/ui" in second
    assert Model.load(root / "int8", verify=True).config.quantization == "w8a8"


def test_a_port_in_use_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"):
            assistant.run(tmp_path / "run", stay=False, port=port, console=out)
    assert not (tmp_path / "run").exists()
