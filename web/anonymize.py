"""Pseudonyms for the patients and clips in a report, and removal of their names from texts."""

import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from clips.manifest import ClipRow
from evaluation.predictions import Predictions

HIDDEN = "[hidden]"


@dataclass(frozen=True)
class Pseudonyms:
    """The names that a report uses for patients and clips."""

    patients: dict[str, str]
    """name on the page per patient, in the order of the page: the lowest accuracy first"""
    clips: Sequence[str]
    """`(N,)` name on the page per clip"""
    identifiers: Sequence[str]
    """the names that must not be on the page"""

    @cached_property
    def _redactor(self) -> "Redactor":
        return Redactor(self.identifiers)

    def redact(self, text: str) -> str:
        """A text that a person typed, such as a path, without the identifiers."""
        return self._redactor(text)

    def redact_command(self, command: str) -> str:
        """A command line without the identifiers.

        Each word is redacted by itself, because the quotes of a shell may stand inside a name.
        """
        try:
            words = shlex.split(command)
        except ValueError:  # its quotes do not match: not a command line of this project
            return self.redact(command)
        return shlex.join(map(self.redact, words)) if self.identifiers else command


def pseudonymize(
    predictions: Predictions, with_patients: bool, other_names: Iterable[str] = ()
) -> Pseudonyms:
    """Choose the names for the page.

    Args:
        with_patients: keep the real names.
        other_names: more names that must not be on the page.
    """
    patients = predictions.groups("patient")
    order = predictions.numbered_patients
    numbered = {name: f"patient {number}" for number, name in enumerate(order, 1)}
    page_names = {name: name for name in order} if with_patients else numbered
    clips, counts = [], dict.fromkeys([*order, None], 0)
    for patient in patients:
        counts[patient] += 1
        owner = page_names.get(patient, "an unknown patient")
        owner = f"patient {owner}" if patient and with_patients else owner
        clips.append(f"clip {counts[patient]} of {owner}")
    hidden = set() if with_patients else identifiers(predictions.rows) | set(other_names)
    return Pseudonyms(page_names, clips, sorted(hidden))


def redact(text: str, identifiers: Iterable[str]) -> str:
    """Replace every identifier in a text by `HIDDEN`.

    An identifier that is part of a longer word or number stays ("058" is replaced in "P058", but
    not in "10580"). A plain number between spaces stays too: it is the value of a setting, even if
    a patient has the same number for a name.
    """
    return Redactor(identifiers)(text)


class Redactor:
    """`redact` with the same identifiers for several texts.

    Its time does not grow with the number of identifiers, which may be millions: the parts of a
    text are looked up among them.
    """

    def __init__(self, identifiers: Iterable[str]) -> None:
        self._names: dict[str, set[str]] = {}  # by their form without case
        for identifier in identifiers:
            name = unicodedata.normalize("NFC", identifier)  # an é may be one character or two
            self._names.setdefault(name.casefold(), set()).add(name)
        self._lengths = sorted(set(map(len, self._names)))

    def __call__(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        present = self._present(text.casefold())
        if not present:
            return text
        longest_first = sorted(present, key=lambda name: (-len(name), name))
        pattern = re.compile("|".join(map(_separate, longest_first)), re.IGNORECASE)
        if any(" " in name for name in present):  # splitting the text would split the name
            return pattern.sub(HIDDEN, text)
        words = re.split(r"(\s+)", text)
        return "".join(word if _is_number(word) else pattern.sub(HIDDEN, word) for word in words)

    def _present(self, text: str) -> set[str]:
        """The identifiers that a text without case holds."""
        found = set()
        for length in self._lengths:
            for start in range(len(text) - length + 1):
                found |= self._names.get(text[start : start + length], set())
        return found


def identifiers(rows: Sequence[ClipRow]) -> set[str]:
    """The names of all patients, videos, actions and clips.

    A clip's names are its path, its file name, and its file name without the suffix.
    """
    names = {getattr(row, kind) for row in rows for kind in ("patient", "video", "action")}
    for row in rows:
        names |= {str(row.path), row.path.name, row.path.stem}
    return names - {None, ""}


def _separate(identifier: str) -> str:
    """A pattern for an identifier that is not part of a longer word or number.

    One or two characters occur in many words, so they must have neither letters nor digits beside
    them.
    """
    edges = []
    for edge in (identifier[0], identifier[-1]):
        same_kind = r"\d" if edge.isdigit() else r"[^\W\d_]"
        forbidden = same_kind if edge.isalnum() else r"(?!)"
        edges.append(r"[^\W_]" if len(identifier) < 3 else forbidden)
    return f"(?<!{edges[0]}){re.escape(identifier)}(?!{edges[1]})"


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?", word))
