"""Other words for those of the questions that are learned from, as `shoal augment --synonyms` takes them: in English, since it
finds no words in Chinese. None is, or has, a question that is asked or fitted to (a test holds that)."""

from __future__ import annotations

from collections.abc import Mapping

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "may i": ("am I free to", "is it all right to", "do I have leave to"), "can i": ("am I able to", "do I get to"),
    "am i allowed to": ("am I entitled to", "have I the right to"), "change it": ("alter it", "amend it"),
    "modify the code": ("alter the source", "patch the source"), "sell it": ("trade it", "market it"),
    "take money for it": ("ask a price for it", "earn from it"), "sell copies": ("market duplicates", "trade duplicates"),
    "other terms": ("different conditions", "conditions of mine"), "sublicense it": ("pass it on under my licence",),
    "choose another licence": ("pick a different licence", "switch the licence"), "patents": ("patented inventions",),
    "a patent licence": ("rights to the patented inventions",), "remove the notice": ("erase the notice",),
    "leave out the copyright line": ("omit the copyright header",), "delete the notices": ("erase the notices",),
    "sue the authors": ("take the authors to court",), "liable": ("answerable", "legally bound"),
    "claim damages": ("demand money for harm done", "seek redress"), "a warranty": ("an assurance", "any assurance"),
    "rely on": ("trust in",), "warrant that it works": ("assure me that it runs",),
    "advertise with": ("run adverts with",), "use their trademark": ("carry their mark",),
    "endorse me": ("recommend me", "back me"), "hide that i changed it": ("keep my alterations secret",),
    "leave my changes unmarked": ("flag none of my alterations",),
    "pass on changes without saying so": ("hand on alterations in silence",),
}  # fmt: skip
