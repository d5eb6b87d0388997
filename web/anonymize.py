"""Pseudonyms for the patients and clips in a report, and removal of their names from texts."""

import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

    def redact(self, text: str) -> str:
        """A text that a person typed, such as a path, without the identifiers."""
        return redact(text, self.identifiers)

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
    text = unicodedata.normalize("NFC", text)  # an é may be one character or two
    composed = (unicodedata.normalize("NFC", name) for name in identifiers)
    present = [name for name in composed if name.casefold() in text.casefold()]
    if not present:
        return text
    longest_first = sorted(present, key=len, reverse=True)
    pattern = re.compile("|".join(map(_separate, longest_first)), re.IGNORECASE)
    if any(" " in name for name in present):  # splitting the text would split the name
        return pattern.sub(HIDDEN, text)
    words = re.split(r"(\s+)", text)
    return "".join(word if _is_number(word) else pattern.sub(HIDDEN, word) for word in words)


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
