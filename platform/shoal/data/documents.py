"""What a corpus is made of: sources, the documents read from them, and what was left out of them, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shoal.errors import ConfigError, UsageError

Modality = Literal["text", "code", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


@dataclass(frozen=True)
class SourceSpec:
    """One source of a corpus, as a user names it (``--source NAME=URI``)."""

    name: str
    uri: str  # a folder (read recursively) or a file, local or s3://BUCKET/PREFIX
    license: str = "unstated"
    reader: Literal["files", "docstrings"] = "files"  # docstrings: of Python files, as pages of text
    exclude: tuple[str, ...] = ()  # names of folders and files that are left out; patterns as in a shell
    family: str = ""  # sources of one family keep a file's documents on one side of the held-out split
    heldout: bool | None = None  # the side that all of it is on; None: each group's is drawn

    def __post_init__(self) -> None:
        if not self.name or not self.uri:
            raise ConfigError("source", got=f"{self.name}={self.uri}", allowed="a name and a uri")
        for key, value in (("name", self.name), ("license", self.license), ("family", self.family)):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"source: {key}", got=ascii(value), allowed="text in UTF-8") from error

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """``NAME=URI`` as a source. Raises UsageError."""
        name, _, uri = text.partition("=")
        if not name or not uri:
            raise UsageError("--source", got=text, allowed="NAME=URI, such as notes=docs/")
        return cls(name, uri)


@dataclass(frozen=True)
class Document:
    """One piece of a corpus. Two documents of the same `group` are never on different sides of the held-out split."""

    id: str  # unique: source, file, and row where a file has several
    group: str
    source: str
    license: str
    modality: Modality
    origin: str  # the file's path inside its source
    text: str = ""  # of an image: its caption, or a question with its answer
    image: bytes | None = None  # as encoded in its file
    caption: bool = False  # the text names the image, so it may as well stand before it
    questions: tuple[tuple[str, str], ...] = ()  # with their answers, where the text is made of them

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    def mended(self, mend: Callable[[str], str]) -> Document:
        """The document with all of its words mended: its text, or the questions and answers that this is made of. A pair of
        which one is nothing then is left out: it would teach to answer nothing."""
        if not self.questions:
            return replace(self, text=mend(self.text))
        pairs = [(mend(question), mend(answer)) for question, answer in self.questions]
        questions = tuple((question, answer) for question, answer in pairs if question.strip() and answer.strip())
        return replace(self, text="\n".join(f"Question: {q} Answer: {a}" for q, a in questions), questions=questions)


@dataclass(frozen=True)
class Skipped:
    """A document, file or row that was left out: by which operator, and why."""

    origin: str
    source: str
    reason: str
    operator: str = "read"

    @property
    def place(self) -> str:
        """What people find it by."""
        return f"{self.source}/{self.origin}"
