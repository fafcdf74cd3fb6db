"""The language of a text, told by py3langid, whose model lies in its package."""

from __future__ import annotations

from collections.abc import Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from shoal.data.documents import Document, Skipped
from shoal.errors import ConfigError

LEAST_CHARACTERS = 100  # of a text whose language can be told
SAMPLE = 2000  # characters looked at
SURE = 0.7  # share of the probability from which a text is said to be of a language


class Language:
    """The operator: drops texts that are surely of another language than the `wanted` ones (ISO 639-1). Code has none."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        unknown = sorted(set(wanted) - set(self._model.labels))
        if unknown:
            raise ConfigError("operators.languages", got=unknown[0], allowed=sorted(self._model.labels))
        self._wanted = frozenset(wanted)

    def __call__(self, document: Document) -> Document | Skipped:
        if document.modality != "text" or len(document.text) < LEAST_CHARACTERS:
            return document
        language, share = self._model.classify(document.text[:SAMPLE])
        if language in self._wanted or share < SURE:
            return document
        return Skipped(document.origin, document.source, f"language {language}", operator="language")
