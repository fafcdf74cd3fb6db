"""Other servers in the turns of `shoal bench decode`: each in a process and an environment of its own, asleep when it is
not its turn, with random weights of our block's shape, with the same weights, or with the very checkpoint.

A peer is a script that another Python runs (`peer_vllm.py`, `peer_llama_cpp.py`, `peer_transformers.py`). It gets the shape as
JSON in its first argument, writes one line when it is ready, and then answers each line `BATCH PROMPT TOKENS` by the seconds
that so many requests take, with prompts of so many tokens and answers of so many, prefill included, which is what
`evaluate.answering.decode_speed` times; or by `nan`, where its memory does not hold them. vLLM that is told `steps` finds in
its prefix cache the prompts that it has read, so that steps can be timed apart. Those that `shoal bench quality` takes answer a
line of ids, a list in JSON, by what they say of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shoal.errors import ShoalError, UsageError
from shoal.model.model import Model
from shoal.open_weights.convert import export_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name: script and what it is told
    "vllm": ("peer_vllm.py", {"eager": False}),  # its default: compiled, where a C++ compiler is
    "vllm-eager": ("peer_vllm.py", {"eager": True}),
    "vllm-shoal": ("peer_vllm.py", {"eager": False, "shoal": True}),  # the very checkpoint, through `vllm_plugin`
    "transformers": ("peer_transformers.py", {}),
    "llama.cpp": ("peer_llama_cpp.py", {"weights": None}),  # a GGUF file as it comes
    "llama.cpp-q8_0": ("peer_llama_cpp.py", {"weights": "Q8_0"}),
    "llama.cpp-f32": ("peer_llama_cpp.py", {"weights": "F32"}),
}
AS_IT_COMES = "llama.cpp"
START, ANSWER = 600.0, 300.0  # seconds: vLLM may compile at its start


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server that runs, started by `running`."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def seconds(self, batch: int, prompt: int, tokens: int) -> float:
        """What `batch` requests with prompts of `prompt` and answers of `tokens` tokens take. The peer sleeps before and after,
        so that threads which wait by spinning take nothing from others' turns. nan: its memory does not hold them. Raises
        ShoalError as `answer`."""
        return float(self._asked(f"{batch} {prompt} {tokens}"))

    def said(self, ids: list[int]) -> tuple[list[float], list[int]]:
        """Of each of `ids` but the first, the nats that it costs after those before it, and the id that is likeliest there.
        Only llama.cpp and transformers are asked that. Raises ShoalError as `answer`."""
        told = json.loads(self._asked(json.dumps(ids)))
        return told["nats"], told["likeliest"]

    def answered(self, messages: list[dict[str, str]], ids: list[int], tokens: int) -> tuple[list[int], list[int]]:
        """The ids that transformers writes a chat in, and its greedy answer to `ids`, of at most so many `tokens`. Raises
        ShoalError as `answer`."""
        told = json.loads(self._asked(json.dumps({"messages": messages, "ids": ids, "tokens": tokens})))
        return told["chat"], told["answer"]

    def _asked(self, line: str) -> str:
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        print(line, file=self.process.stdin, flush=True)
        try:
            return self.answer(ANSWER)
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def answer(self, seconds: float) -> str:
        """Its next line. Raises ShoalError where it ended, or said nothing for `seconds`."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline().strip() if ready else ""
        if not line:
            what = "ended" if ready else f"said nothing for {seconds:.0f} s"
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ShoalError(f"peer {self.name} {what}", got="".join(last), do="see docs/benchmarks on installing it")
        return line


@contextlib.contextmanager
def running(
    chosen: dict[str, str],
    model: Model,
    imported: Path | None = None,
    gguf: Path | None = None,
    more: dict[str, Any] | None = None,
) -> Iterator[list[Peer]]:
    """The peers of `chosen` (kind: the Python that has it), ready and asleep; ended on leaving. They get the shape of `model`;
    one that runs Shoal's own checkpoints gets `model` itself. With the directory of an `imported` model, vLLM and transformers
    have its weights, and with `gguf` llama.cpp has those of that file. `more`: what else vLLM is told. Raises ShoalError for
    one that does not start."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        there: dict[str, Any] = {"gguf": str(gguf.resolve()) if gguf else None, "checkpoint": None, **(more or {})}
        if imported is not None and any(not name.startswith("llama.cpp") for name in chosen):
            there["checkpoint"] = str(Path(folder) / "checkpoint")
            export_model(imported, Path(folder) / "checkpoint", check=False)
        peers = []
        for name, python in chosen.items():
            peers.append(_start(name, python, model, Path(folder), there))
            stack.callback(peers[-1].process.wait)
            stack.callback(peers[-1].process.kill)
        yield peers


def parse(options: list[str]) -> dict[str, str]:
    """`KIND=PYTHON` options as a table. Raises UsageError for another kind, or a Python that is not there."""
    chosen = {}
    for option in options:
        name, _, python = option.partition("=")
        if name not in KINDS:
            raise UsageError("--peer", got=option, allowed=[f"{kind}=PYTHON" for kind in KINDS])
        if not os.access(python, os.X_OK):
            raise UsageError("--peer", got=option, allowed="the path of a Python that has it installed")
        chosen[name] = os.path.abspath(python)  # it runs in a folder of its own; a link is what makes an environment
    return chosen


def need_gguf(chosen: dict[str, str], gguf: Path | None) -> None:
    """Raises UsageError where a peer has no file to run, or the file is none."""
    if gguf is None and AS_IT_COMES in chosen:
        raise UsageError(f"--peer {AS_IT_COMES}", got="no --gguf", allowed="beside --gguf FILE")
    if gguf is not None and not gguf.is_file():
        raise UsageError("--gguf", got=str(gguf), allowed="a file")


def _start(name: str, python: str, model: Model, folder: Path, there: dict[str, Any]) -> Peer:
    script, told = KINDS[name]
    config = model.config
    shape = {key: getattr(config, key) for key in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab")}
    threads = torch.get_num_threads()
    work, log = folder / name, folder / f"{name}.log"
    work.mkdir()
    if told.get("shoal"):
        model.save(work / "model")
    told = {**shape, **there, **told, "threads": threads, "folder": str(work)}
    with log.open("w") as said:
        process = subprocess.Popen(
            [python, str(Path(__file__).parent / script), json.dumps(told)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, cwd=work,
        )  # fmt: skip
    peer = Peer(name, process, log)
    try:
        peer.answer(START)
    except ShoalError:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGSTOP)
    return peer
