"""Clauses of licences, word for word but for line breaks: a test looks each up in licence files that are installed with
packages that Shoal needs. Verdicts are a reader's, for a test; they are no legal advice.

Each licence is of one split: what is asked of Zlib, Boost and Mozilla is learned from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recipes.splits import DEV, SUITE, TRAIN

CHANGE, SELL, TERMS, PATENTS = "change", "sell", "terms", "patents"
NOTICE, BLAME, WARRANTY, ENDORSE, UNMARKED = "notice", "blame", "warranty", "endorse", "unmarked"


@dataclass(frozen=True)
class Clause:
    """`text`, and of which matters it says that they are permitted, or are not; `near`: matters that it touches, of which
    readers might say either, so that it is never shown with a question on one."""

    text: str
    permits: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    near: tuple[str, ...] = ()

    @property
    def matters(self) -> tuple[str, ...]:
        return self.permits + self.forbids


def _no(matter: str, text: str) -> Clause:
    return Clause(text, forbids=(matter,))


LICENCES: Mapping[str, tuple[Clause, ...]] = {
    "MIT": (
        Clause(
            "the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software",
            (CHANGE, SELL, TERMS),
        ),
        _no(
            NOTICE,
            "The above copyright notice and this permission notice shall be included in all copies or substantial portions "
            "of the Software.",
        ),
        _no(WARRANTY, 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED'),
        _no(
            BLAME,
            "IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY",
        ),
    ),
    "BSD-3-Clause": (
        Clause(
            "Redistribution and use in source and binary forms, with or without modification, are permitted", (CHANGE,)
        ),
        _no(NOTICE, "Redistributions of source code must retain the above copyright notice"),
        _no(
            ENDORSE,
            "Neither the name of the copyright holder nor the names of its contributors may be used to endorse or promote "
            "products derived from this software without specific prior written permission.",
        ),
        _no(WARRANTY, "THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED."),
        _no(
            BLAME,
            "IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL",
        ),
    ),
    "Apache-2.0": (
        Clause(
            "You may reproduce and distribute copies of the Work or Derivative Works thereof in any medium, with or without "
            "modifications",
            (CHANGE,),
        ),
        Clause(
            "patent license to make, have made, use, offer to sell, sell, import, and otherwise transfer the Work",
            (PATENTS,),
            near=(SELL,),
        ),
        Clause(
            "may provide additional or different license terms and conditions for use, reproduction, or distribution of Your "
            "modifications",
            (TERMS,),
        ),
        _no(
            UNMARKED, "You must cause any modified files to carry prominent notices stating that You changed the files"
        ),
        _no(
            NOTICE,
            "You must retain, in the Source form of any Derivative Works that You distribute, all copyright, patent, "
            "trademark, and attribution notices",
        ),
        _no(
            ENDORSE,
            "This License does not grant permission to use the trade names, trademarks, service marks, or product "
            "names",
        ),
        _no(WARRANTY, "WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied"),
    ),
    "PSF-2.0": (
        Clause(
            "prepare derivative works, distribute, and otherwise use Python alone or in any derivative version",
            (CHANGE,),
            near=(SELL,),
        ),
        _no(
            UNMARKED,
            "Licensee hereby agrees to include in any such work a brief summary of the changes made to Python.",
        ),
        _no(ENDORSE, "This License Agreement does not grant permission to use PSF trademarks or trade name"),
        _no(WARRANTY, "PSF MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED."),
        _no(BLAME, "PSF SHALL NOT BE LIABLE TO LICENSEE OR ANY OTHER USERS OF PYTHON FOR ANY INCIDENTAL, SPECIAL"),
    ),
    "ISC": (
        Clause(
            "Permission to use, copy, modify, and distribute this software for any purpose with or without fee",
            (CHANGE, SELL),
        ),
        _no(NOTICE, "provided that the above copyright notice and this permission notice appear in all copies."),
        _no(WARRANTY, "THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE"),
        _no(
            BLAME, "IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES"
        ),
    ),
    "Zlib": (
        Clause(
            "Permission is granted to anyone to use this software for any purpose, including commercial applications, and to "
            "alter it and redistribute it freely",
            (CHANGE, SELL),
        ),
        _no(UNMARKED, "Altered source versions must be plainly marked as such"),
        _no(NOTICE, "This notice may not be removed or altered from any source distribution."),
        _no(WARRANTY, "This software is provided 'as-is', without any express or implied warranty."),
        _no(
            BLAME, "In no event will the authors be held liable for any damages arising from the use of this software."
        ),
    ),
    "BSL-1.0": (
        Clause(
            "to use, reproduce, display, distribute, execute, and transmit the Software, and to prepare derivative works of "
            "the Software",
            (CHANGE,),
        ),
        _no(
            NOTICE, "The copyright notices in the Software and this entire statement, including the above license grant"
        ),
        _no(
            BLAME,
            "IN NO EVENT SHALL THE COPYRIGHT HOLDERS OR ANYONE DISTRIBUTING THE SOFTWARE BE LIABLE FOR ANY DAMAGES OR OTHER "
            "LIABILITY",
        ),
    ),
    "MPL-2.0": (
        Clause(
            "to use, reproduce, make available, modify, display, perform, distribute, and otherwise exploit its "
            "Contributions",
            (CHANGE,),
            near=(SELL,),
        ),
        _no(
            TERMS,
            "All distribution of Covered Software in Source Code Form, including any Modifications that You create or to "
            "which You contribute, must be under the terms of this License.",
        ),
        _no(NOTICE, "You may not remove or alter the substance of any license notices"),
        _no(
            ENDORSE,
            "This License does not grant any rights in the trademarks, service marks, or logos of any Contributor",
        ),
    ),
}
OF_SPLIT: Mapping[str, tuple[str, ...]] = {
    TRAIN: ("MIT", "BSD-3-Clause", "Apache-2.0", "PSF-2.0"),
    DEV: ("ISC",),
    SUITE: ("Zlib", "BSL-1.0", "MPL-2.0"),
}
