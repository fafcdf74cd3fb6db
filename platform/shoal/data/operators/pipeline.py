"""What is done to every document between reading and packing, in this order. Each operator can be switched, and counts what
it drops or changes.

    unicode          mojibake, NFC, control characters, line ends: mended            `clean`
    language         texts that are surely of another language                       `language`       off: none is named
    quality          too short, symbols, repetition; of code: generated, minified    `clean`
    decontamination  passages that share 13 words with an evaluation set: taken out  `decontaminate`  off: none is named
    pii              personal data and secrets: replaced                             `pii`            off
    image            format, pixels, sides, by the header                            `images`
    dedup            equal to an earlier document                                    `identities`
    near dedup       nearly equal to an earlier document                             `near`

What is on by default drops what nobody would miss. Languages, evaluation sets and personal data depend on what the corpus is
for, which only its owner knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.data.documents import Document, Skipped
from shoal.data.operators import clean
from shoal.data.operators.pii import Kind, scrub
from shoal.data.sources import images
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.data.operators.decontaminate import Known


@dataclass(frozen=True)
class Operators:
    """Which operators run; section ``operators`` of a prepare config."""

    unicode: bool = True
    languages: tuple[str, ...] = ()  # of the texts that are kept, as ISO 639-1 codes; none: all
    quality: bool = True
    pii: tuple[Kind, ...] = ()  # what is replaced
    image: bool = True
    evaluation: tuple[str, ...] = ()  # URIs of the sets that the corpus is decontaminated of
    dedup: bool = True
    near_dedup: bool = True

    def __post_init__(self) -> None:
        if len(set(self.pii)) < len(self.pii):
            raise ConfigError("operators.pii", got=list(self.pii), allowed="each kind once")


class Pipeline:
    """The operators that look at one document alone. `evaluation`: what is in the sets, where some are named."""

    def __init__(self, operators: Operators, evaluation: Known | None = None) -> None:
        self.changes: dict[str, Counter[str]] = {}  # operator -> what -> times
        self._steps: list[Callable[[Document], Document | Skipped]] = []
        if operators.unicode:
            self._steps.append(self._mend)
        if operators.languages:
            from shoal.data.operators.language import Language  # its model takes a second to load

            self._steps.append(Language(operators.languages))
        if operators.quality:
            self._steps.append(clean.check)
        if evaluation is not None:  # before anything is replaced: the sets hold what was there
            from shoal.data.operators.decontaminate import Decontaminate

            decontaminate = Decontaminate(evaluation)
            self._steps.append(lambda document: decontaminate(document, self._counts("decontamination")))
        if operators.pii:
            self._steps.append(lambda document: scrub(document, operators.pii, self._counts("pii")))
        if operators.image:
            self._steps.append(images.check)

    def __call__(self, document: Document) -> Document | Skipped:
        """The document as it goes on, or why it does not."""
        for step in self._steps:
            result = step(document)
            if isinstance(result, Skipped):
                return result
            document = result
        return document

    def take_changes(self) -> dict[str, Counter[str]]:
        """What was changed since the last call."""
        taken, self.changes = self.changes, {}
        return taken

    def _mend(self, document: Document) -> Document | Skipped:
        mended = clean.mend(document)
        if mended.text.split() != document.text.split():  # white space at the ends of lines is no damage
            self._counts("unicode")["documents mended"] += 1
        if lost := len(document.questions) - len(mended.questions):
            self._counts("unicode")["questions left out"] += lost
        if document.text and not mended.text.strip() and mended.image is None:
            return Skipped(document.origin, document.source, "nothing but control characters", operator="unicode")
        return mended

    def _counts(self, operator: str) -> Counter[str]:
        return self.changes.setdefault(operator, Counter())
