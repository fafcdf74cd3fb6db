"""A tiny corpus made by the data plane's own functions: what training tests train on."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from shoal.config import Preset
from shoal.data import shards
from shoal.data.documents import MODALITIES, Document, Modality
from shoal.data.encode import encode
from shoal.data.pack import Packer
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
NOUNS, VERBS = ("shoal", "tide", "reef", "net", "gull"), ("turns", "waits", "rises", "sleeps")
MIX = {"text": 0.6, "image": 0.2, "code": 0.2}


def document(kind: str, number: int) -> Document:
    """The `number`-th document of a modality; predictable enough to be learned in a few updates."""
    rng = random.Random(f"{kind}{number}")
    text, image = "", None
    if kind == "text":
        text = " ".join(f"The {rng.choice(NOUNS)} {rng.choice(VERBS)}." for _ in range(12))
    elif kind == "code":
        name = rng.choice(NOUNS)
        text = f"def {name}(x):\n    return x + {rng.randrange(10)}\n" * 3
    else:
        text, colour = rng.choice(list(COLOURS.items()))
        stream = io.BytesIO()
        Image.new("RGB", (12, 12), colour).save(stream, "PNG")
        image = stream.getvalue()
    name = f"{kind}/{number}"
    return Document(name, name, f"made {kind}", "CC0-1.0", kind, name, text, image, caption=kind == "image")


def write_corpus(
    directory: Path, preset: Preset, documents: int = 60, heldout: int = 12, kinds: Sequence[Modality] = MODALITIES
) -> Path:
    """Shards of all three modalities, or of `kinds`, for `preset`; of each, `documents` to train on and `heldout` held out."""
    directory.mkdir(parents=True)
    config, seen = preset.model, dict.fromkeys(kinds, documents + heldout)
    made = {kind: [document(kind, number) for number in range(count)] for kind, count in seen.items()}
    tokenizer = Tokenizer.train((d.text for kind in kinds if kind != "image" for d in made[kind]), config.vocab)
    tokenizer.save(directory / shards.TOKENIZER)
    lengths, found = shards.token_bytes(tokenizer), []
    for kind in kinds:
        parts = {"train": made[kind][:documents], "heldout": made[kind][documents:]}
        for split, some in parts.items():
            licenses = {d.source: d.license for d in some}
            writer, packer = shards.ShardWriter(directory, split, kind, lengths, licenses), Packer(config.train_length)
            for d, encoded in zip(some, encode(some, tokenizer, config), strict=True):
                assert isinstance(encoded, Encoded), encoded
                for row in packer.add(encoded, d.source, shards.group_number(d.group)):
                    writer.add(row)
            for row in packer.finish():
                writer.add(row)
            writer.close()
            found += writer.shards
    shards.write_index(directory, shards.Index.made_for(config, tokenizer, {kind: MIX[kind] for kind in kinds}, found))
    return directory


def write_chats(path: Path, rows: int = 60) -> Path:
    """Short questions with short answers, one about an image in four, as fine-tuning rows."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            rng = random.Random(number)
            noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
            question, answer = f"What does the {noun} do?", f"It {verb}." * rng.randrange(1, 4)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row = {"task": "customer service", "messages": messages, "group": number}
            file.write(json.dumps(row) + "\n")
    return path
