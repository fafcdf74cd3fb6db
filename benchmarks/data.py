"""`shoal bench data`: tokenising and packing beside `tokenizers` alone, cost and memory by size of input, text beside images.

Everything runs in processes of its own with one thread each, as a task of `shoal prepare` does. Speed and cost are by CPU time,
so that a busy machine does not blur them; text beside images is by the clock, since that is what is asked. The text is the
Python standard library's sources. Where sizes are compared all of it is drawn from their lines: hardly any document is nearly
another, which would be dropped and not packed, and what is cleaned is of one kind at each size.
"""

from __future__ import annotations

import json
import math
import resource
import select
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.turns import environment, in_turns, show
from shoal import presets
from shoal.config import ModelConfig
from shoal.data import identities, parts
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.data.shards import TOKENIZER
from shoal.data.sources.files import list_files
from shoal.data.tables import Parts, spans
from shoal.errors import UsageError
from shoal.inputs.tokenizer import Tokenizer

MB = 10**6
SPEED_TEXT = 4 * MB  # text of a speed run
DOCUMENTS = (10**5, 10**6, 10**7)  # synthetic ones, of which only the identities exist ...
PARTS = 16  # ... in so many parts
PARTS_OF_IT = ("speed", "size", "documents", "images")  # of the benchmark
IMAGES = 400  # beside it
IMAGE_SIZE = 256  # pixels on a side
SAMPLE = MB  # text that the tokenizer is fitted to
STEPS = ("read", "decide", "fit", "pack")  # of preparing, whose CPU seconds are told apart
SHORT = (120, 700, 250, 400, 180)  # characters of short documents, in turn
Found = tuple[Table, Any]  # of one part, and what the line of JSON has of it
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def data(
    console: Console,
    *,
    preset: str,
    sizes: tuple[int, ...],
    rounds: int,
    parts: tuple[str, ...] = PARTS_OF_IT,
    seconds: float = math.inf,
) -> None:
    """The tables of `parts`: "speed" against `tokenizers`, cost by "size" of input (`sizes` in MB, those that fit into
    `seconds` by what the one before took), the driver by "documents", text beside "images". Raises UsageError for others."""
    if unknown := set(parts) - set(PARTS_OF_IT):
        raise UsageError("--parts", got=sorted(unknown), allowed=PARTS_OF_IT)
    result: dict[str, Any] = {"bench": "data", "preset": preset, "rounds": rounds}
    tables = []
    work: dict[str, Callable[[], Found]] = {
        "speed": lambda: _speeds(preset, rounds), "size": lambda: _sizes(console, preset, sizes, seconds),
        "documents": _documents, "images": lambda: _images_beside(preset, rounds),
    }  # fmt: skip
    for part in parts:
        table, result[part] = work[part]()
        tables.append(table)
    show(console, tables, result)


def _speeds(preset: str, rounds: int) -> Found:
    model = presets.get(preset).model
    speeds = {kind: _child("speed", preset, kind, str(rounds)) for kind in ("files", "short")}
    table = Table("documents", "tokenise and pack, MB/CPU s", "encode_batch", "encode_batch_fast", "share of encode_batch",
                  title=f"one thread, vocabulary {model.vocab}, rows of {model.train_length}")  # fmt: skip
    for kind, speed in speeds.items():
        speed["ratio"] = speed["pack"] / speed["encode_batch"]
        values = (speed["pack"], speed["encode_batch"], speed["encode_batch_fast"], speed["ratio"])
        table.add_row(kind, *(f"{value:.2f}" for value in values))
    return table, speeds


def _sizes(console: Console, preset: str, sizes: tuple[int, ...], seconds: float) -> Found:
    """Cost and memory of each size, a line as each ends, and how they grow from the smallest to the largest."""
    table = Table("input MB", "seconds", "CPU s/MB", *STEPS, "documents dropped", "peak RSS MB", "before",
                  title="read, clean, tokenise, pack, in one process")  # fmt: skip
    rows: list[dict[str, float]] = []
    until, took = time.monotonic() + seconds, 0.0  # seconds of a MB, with what is made to be prepared
    for size in sizes:
        began = time.monotonic()
        if rows and began + took * size > until:
            table.add_row(f"{size}", "not begun")
            console.print(f"{size} MB: not begun, since it would take some {took * size:.0f} s more", highlight=False)
            continue
        row = _child("size", preset, str(size))
        row["s_per_mb"], took = row["cpu_seconds"] / row["mb"], (time.monotonic() - began) / row["mb"]
        steps = (f"{row[step] / row['mb']:.3f}" for step in STEPS)
        console.print(f"{size} MB: {row['s_per_mb']:.3f} CPU s/MB, peak {row['peak_rss_mb']:.0f} MB", highlight=False)
        cost, dropped = f"{row['s_per_mb']:.3f}", f"{row['dropped']:.1%}"
        memory = (f"{row[key]:.0f}" for key in ("peak_rss_mb", "rss_before_mb"))
        table.add_row(f"{row['mb']:.0f}", f"{row['seconds']:.1f}", cost, *steps, dropped, *memory)
        rows.append(row)
    first, last = rows[0], rows[-1]
    table.caption = (
        f"from {first['mb']:.0f} to {last['mb']:.0f} MB: CPU s/MB times {last['s_per_mb'] / first['s_per_mb']:.2f}, "
        f"peak {last['peak_rss_mb'] - first['peak_rss_mb']:+.0f} MB"
    )
    return table, rows


def _documents() -> Found:
    table = Table(
        "documents", "peak RSS of the driver, MB", "of one task", title="deciding over synthetic documents, on Ray"
    )
    rows = [_decide(count) for count in DOCUMENTS]
    for row in rows:
        table.add_row(f"{row['documents']:,}", f"{row['driver_mb']:.0f}", f"{row['task_mb']:.0f}")
    return table, rows


def _images_beside(preset: str, rounds: int) -> Found:
    beside = _beside_images(preset, rounds)
    table = Table("text MB/s alone", "beside images", "images/s", title="one process packs text, another images")
    table.add_row(*(f"{beside[key]:.2f}" for key in ("alone", "beside", "images_per_s")))
    return table, beside


def _decide(documents: int) -> dict[str, float]:
    """Peak memory of the process that has it decided over so many documents what is kept, and of a task that looks at a
    span."""
    with tempfile.TemporaryDirectory() as folder:
        _child("identities", folder, str(documents))
        return {
            "documents": documents,
            **_child("driver", folder, str(documents)),
            **_child("task", folder, str(documents)),
        }


def _child(what: str, *arguments: str) -> dict[str, Any]:
    """What `_RUNS[what]` returns in a process of its own."""
    done = subprocess.run(_command(what, *arguments), env=environment(**ONE_THREAD), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _command(what: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", "from benchmarks.data import main; main()", what, *arguments]


def main() -> None:
    """One measurement, as `_child` asks for it."""
    what, *arguments = sys.argv[1:]
    print(json.dumps(_RUNS[what](*arguments)))


# ---- in a process of its own


def _speed(preset: str, kind: str, rounds: str) -> dict[str, float]:
    """MB of text a CPU second: `parts.pack_part`, and `tokenizers` alone on the same documents in the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        pack, texts, size = _packing_texts(Path(folder), preset, kind)
        core = Tokenizer.load(Path(folder) / TOKENIZER)._core
        runs = {
            "pack": lambda: size / _spent(pack),
            "encode_batch": lambda: size / _spent(lambda: _encode(core.encode_batch, texts)),
            "encode_batch_fast": lambda: size / _spent(lambda: _encode(core.encode_batch_fast, texts)),
        }
        return in_turns(runs, int(rounds))


def _text(preset: str, rounds: str) -> dict[str, float]:
    """MB of text that is packed in a second by the clock."""
    with tempfile.TemporaryDirectory() as folder:
        pack, _, size = _packing_texts(Path(folder), preset, "files")
        return in_turns({"mb_per_s": lambda: size / _spent(pack, time.perf_counter)}, int(rounds))


def _size(preset: str, size: str) -> dict[str, float]:
    """Seconds and peak memory of all that preparing `size` MB of text files does, part after part."""
    model = presets.get(preset).model
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "raw"), Path(folder, "out")
        raw.mkdir()
        out.mkdir()
        written = documents = 0
        for documents, text in enumerate(_some(_drawn(list(_files())), int(size) * MB), start=1):
            written += (raw / f"{documents:06}.txt").write_bytes(text.encode())
        before, start = _peak_rss(), time.perf_counter()
        spent, dropped = _prepared(raw, out, model)
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": sum(spent.values()), **spent}
    share = dropped / documents
    return {"mb": written / MB, **seconds, "dropped": share, "rss_before_mb": before, "peak_rss_mb": _peak_rss()}


def _prepared(raw: Path, out: Path, model: ModelConfig) -> tuple[dict[str, float], int]:
    """Makes shards in `out` of the files in `raw`; the CPU seconds of each of STEPS, and how many documents were dropped."""
    clock = [time.process_time()]
    plan = parts.split_files(list_files(SourceSpec("bench", str(raw))))
    paths = Parts(out, len(plan))
    for files, path in zip(plan, paths, strict=True):
        parts.read_part(files, path)
    clock.append(time.process_time())
    splits, drops = identities.choose(paths)
    clock.append(time.process_time())
    Tokenizer.train(parts.sample(paths, splits), model.vocab).save(out / TOKENIZER)
    clock.append(time.process_time())
    for number, (path, of) in enumerate(zip(paths, splits, strict=True)):
        parts.pack_part(path, of, out, model, number)
    clock.append(time.process_time())
    spent = {step: end - start for step, (start, end) in zip(STEPS, pairwise(clock), strict=True)}
    return spent, sum(reasons.total() for reasons in drops.values())


def _identities(folder: str, documents: str) -> dict[str, float]:
    """Writes the tables of synthetic documents; one in ten is equal to another."""
    for number, path in enumerate(Parts(Path(folder), PARTS)):
        some = np.random.default_rng(number)
        count = int(documents) * (number + 1) // PARTS - int(documents) * number // PARTS
        keys = some.integers(0, 2**64, (count, 2), dtype=np.uint64)
        keys[: count // 10] = keys[count // 10 : 2 * (count // 10)]
        zeros = np.zeros(count)
        groups = {"key": keys[:, 0], "draw": keys[:, 1], "modality": zeros, "said": zeros + identities.UNSAID}
        identities.write_tables(path, keys, groups)
    return {}


def _driver(folder: str, documents: str) -> dict[str, float]:
    from shoal.on_ray.corpus_tasks import Decision
    from shoal.on_ray.each import quiet_data
    from shoal.on_ray.prepare import decide
    from shoal.on_ray.resources import local_ray

    packed = parts.Packed()
    decision = Decision(Parts(Path(folder), PARTS), "bench", Operators(near_dedup=False), int(documents))
    with local_ray(), quiet_data():
        decide(decision, [1] * PARTS, packed, lambda what, done, total: None)
    dropped = packed.drops["dedup"].total()
    return {"driver_mb": _peak_rss(), "dropped": dropped}


def _task(folder: str, documents: str) -> dict[str, float]:
    """One span of fingerprints, and one of groups."""
    some, out = Parts(Path(folder), PARTS), Path(folder, "span")
    span = spans(int(documents))[0]
    identities.equal(some, span, out)
    identities.hold_out(some, span, out)
    return {"task_mb": _peak_rss()}


def _images(preset: str) -> dict[str, float]:
    """Packs images again and again until its input closes; images a second. Says when it is at work."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(IMAGES):
            _picture(number).save(Path(folder, f"{number}.png"))
        Path(folder, "page.txt").write_text(next(_texts()))  # the tokenizer is fitted to it
        pack, _ = _packing(Path(folder), preset)
        print("at work", flush=True)
        done, start = 0, time.perf_counter()
        while not select.select([sys.stdin], [], [], 0)[0]:  # until it is closed
            pack()
            done += IMAGES
        return {"images_per_s": done / (time.perf_counter() - start)}


_RUNS: dict[str, Callable[..., dict[str, float]]] = {
    "speed": _speed, "text": _text, "size": _size, "images": _images, "identities": _identities, "driver": _driver,
    "task": _task,
}  # fmt: skip


def _beside_images(preset: str, rounds: int) -> dict[str, float]:
    """Text in MB/s by a process alone, and while another one packs images; and that one's images a second."""
    alone = _child("text", preset, str(rounds))["mb_per_s"]
    images = subprocess.Popen(
        _command("images", preset), env=environment(**ONE_THREAD), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert images.stdout is not None
    try:
        images.stdout.readline()  # it is at work
        beside = _child("text", preset, str(rounds))["mb_per_s"]
        told, _ = images.communicate()
    finally:
        images.kill()
    return {"alone": alone, "beside": beside, **json.loads(told)}


# ---- what is packed


def _packing_texts(folder: Path, preset: str, kind: str) -> tuple[Callable[[], object], list[str], float]:
    """Packs `SPEED_TEXT` of text: whole files, or short pieces; the texts, and their size in MB."""
    rows = (json.dumps({"text": text}) for text in _some(_texts() if kind == "files" else _short(), SPEED_TEXT))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    pack, texts = _packing(folder, preset)
    return pack, texts, sum(len(text.encode()) for text in texts) / MB


def _packing(folder: Path, preset: str) -> tuple[Callable[[], object], list[str]]:
    """Packs the files in `folder` as one part of a corpus, with a tokenizer fitted to them; and the texts in it."""
    model, part = presets.get(preset).model, folder / "part"
    found = parts.read_part(list_files(SourceSpec("bench", str(folder))), part)
    texts = [document.text for document in parts.documents(part)]
    Tokenizer.train(_some(iter(texts), SAMPLE), model.vocab).save(folder / TOKENIZER)
    return lambda: parts.pack_part(part, ["train"] * found.documents, folder, model, 0), texts


def _files() -> Iterator[str]:
    """The standard library's files, as texts."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in (*sorted(library.glob("*.py")), *sorted(library.glob("[a-z]*/*.py"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > max(SHORT):
            yield text


def _texts() -> Iterator[str]:
    """These files, then what is drawn of them."""
    yield from _files()
    yield from _drawn(list(_files()))


def _drawn(files: list[str]) -> Iterator[str]:
    """For each of `files`, again and again, a text of as many lines, drawn from those of all."""
    lines, draw = [line for text in files for line in text.splitlines(keepends=True)], np.random.default_rng(0)
    for length in cycle([len(text.splitlines()) for text in files]):
        yield "".join(lines[at] for at in draw.integers(len(lines), size=length).tolist())


def _short() -> Iterator[str]:
    lengths = cycle(SHORT)
    for text in _texts():
        at = 0
        while at < len(text):
            yield text[at : (at := at + next(lengths))]


def _some(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first of `texts`, about `size` characters."""
    left = size
    for text in texts:
        if left <= 0:
            return
        yield text
        left -= len(text)


def _picture(number: int) -> Image.Image:
    """Coloured squares, all different."""
    pixels = np.random.default_rng(number).integers(0, 256, (IMAGE_SIZE // 8, IMAGE_SIZE // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE))


def _encode(encode: Callable[..., object], texts: list[str]) -> None:
    for batch in parts.batched(texts, len):
        encode(batch, add_special_tokens=False)


def _peak_rss() -> float:
    """MB. Not getrusage's where there is better: a process begins with what its parent held when it was started."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def _spent(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    run()
    return clock() - start
