"""`make assistant` on a tiny checkpoint in place of the one that pip fetches: every step, the answers, and both ways to end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal import Model, assistant
from shoal.data.alone import alone
from shoal.errors import ResourceError
from shoal.evaluate import own_words
from shoal.stages.stage import out

DATA = Path(__file__).parents[1] / "data" / "open"
SECONDS = 600  # after which a process that should have ended is ended
CODE = """
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
from shoal import assistant
from shoal.evaluate import own_words

class Impatient(Console):
    def print(self, text, **how):
        super().print(text, **how)
        if "Ctrl-C ends it" in text:
            os.kill(os.getpid(), signal.SIGINT)

root, port, source = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
own_words.ASKED, own_words.ANSWERED, assistant.MOST_TOKENS = 16, 64, 16
given = {"port": port, "source": source}
assistant.run(root, stay=False, console=Console(width=999), adapt=0.01, **given)
print("once more")
assistant.run(root, stay=True, console=Impatient(width=999), adapt=0.01, **given)
"""


def checkpoint(folder: Path) -> Path:
    """A tiny one in `folder`, in place of the one that pip fetches."""
    source = folder / "from"
    shutil.copytree(DATA / "smollm2", source)
    shutil.copytree(DATA / "tokenizer", source, dirs_exist_ok=True)
    return source


def worth_of(minutes: float) -> str:
    return f"after {minutes} minutes an exit's likeliest word is full depth's"


@pytest.mark.smoke
@pytest.mark.drill
def test_open_weights_become_an_assistant_and_a_second_call_goes_on(tmp_path: Path) -> None:
    """The first ends after the answers, the second by Ctrl-C."""
    source, root = checkpoint(tmp_path), tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", CODE, str(root), str(port), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    first, second = texts = done.stdout.split("once more\n")
    for text in texts:
        assert text.count("tokens/s") == len(assistant.QUESTIONS) and text.endswith("The service has stopped.\n")
        assert all(question in text for question in assistant.QUESTIONS)
    report = (root / "report.txt").read_text()
    assert (
        "done before" in report
        and worth_of(0.01) in report
        and all(question in report for question in assistant.QUESTIONS)
    )
    assert '"path":' not in done.stderr, "lines of requests stood between the answers"
    assert "done before" not in first and second.count("done before") == 3
    assert "Ctrl-C" not in first and f"http://127.0.0.1:{port}/ui" in second
    worth = worth_of(0.01)
    assert worth in first and worth in second and f"shoal assistant --root {root} --adapt 60" in first
    assert Model.load(root / "int8", verify=True).config.exit_names == {"shallow": 2, "middle": 4, "full": 6}


def test_agreement_is_the_share_of_places_where_an_exit_would_say_the_same(tmp_path: Path) -> None:
    model, rows = Model.from_preset("test"), [list(range(20, 60)), list(range(90, 50, -1))]
    shares = own_words.agreement(model, rows)
    for name, share in shares.items():
        same = [model.logits(row, name).argmax(-1) == model.logits(row).argmax(-1) for row in rows]
        assert share == pytest.approx(float(torch.cat(same).float().mean()), abs=1e-6), name
    assert list(shares) == [name for name in model.config.exit_names if name != "full"]


def test_a_port_in_use_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"):
            assistant.run(tmp_path / "run", stay=False, port=port, console=out)
    assert not (tmp_path / "run").exists()


def test_two_do_not_make_the_models_of_one_root_at_once(tmp_path: Path) -> None:
    """Both wrote the chats that exits learn from, and one read half of the other's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    says = r"another shoal assistant is at work in .*run: wait for it, or give"
    held = alone(tmp_path / "run" / assistant.LOCK, ResourceError("busy"))
    with held, pytest.raises(ResourceError, match=says):
        assistant.run(tmp_path / "run", stay=False, port=port, console=out, source=str(tmp_path / "none"))
