"""Whom a report may name: patients get numbers, and their names are cut out of what was typed."""

import hashlib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clips.manifest import ClipRow
from evaluation.predictions import Predictions

HIDDEN = "[hidden]"


@dataclass(frozen=True)
class Names:
    """What a report calls patients and clips."""

    patients: dict[str, str]
    """for each patient the name on the page, in the page's order: the worst first"""
    clips: Sequence[str]
    """(N,) for each clip"""
    secrets: Sequence[str]
    """what must not be on the page"""

    def hide(self, text: str) -> str:
        """A text that a person typed (a path, a command) without anybody's name in it."""
        return hide(text, self.secrets)

    def hide_command(self, command: str) -> str:
        """The same of a command line, word by word: a shell's quotes would tear names apart."""
        try:
            words = shlex.split(command)
        except ValueError:  # not one of ours
            return self.hide(command)
        return shlex.join(map(self.hide, words)) if self.secrets else command


def choose_names(
    predictions: Predictions, with_patients: bool, others: Iterable[str] = ()
) -> Names:
    """Names for the page; the real ones only if they are asked for.

    Args:
        others: more names that must not be on it.
    """
    units = predictions.units("patient")
    order = _worst_first(units, predictions.right)
    numbered = {name: f"patient {number}" for number, name in enumerate(order, 1)}
    called = {name: name for name in order} if with_patients else numbered
    clips, seen = [], dict.fromkeys([*order, None], 0)
    for unit in units:
        seen[unit] += 1
        whose = f"patient {called[unit]}" if unit and with_patients else called.get(unit)
        clips.append(f"clip {seen[unit]} of {whose or 'an unknown patient'}")
    secrets = set() if with_patients else identifiers(predictions.rows) | set(others)
    return Names(called, clips, sorted(secrets))


def hide(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret in a text.

    A secret counts only where it stands apart ("058" in "P058", but not in "10580"), and a plain
    number between spaces is a setting, whatever the patients are called.
    """
    text = unicodedata.normalize("NFC", text)  # an é may be one sign or two
    composed = (unicodedata.normalize("NFC", secret) for secret in secrets)
    found = [secret for secret in composed if secret.casefold() in text.casefold()]
    if not found:
        return text
    longest_first = sorted(found, key=len, reverse=True)
    pattern = re.compile("|".join(map(_apart, longest_first)), re.IGNORECASE)
    if any(" " in secret for secret in found):  # words would tear it apart
        return pattern.sub(HIDDEN, text)
    words = re.split(r"(\s+)", text)
    return "".join(word if _is_number(word) else pattern.sub(HIDDEN, word) for word in words)


def _worst_first(units: np.ndarray, right: np.ndarray) -> list[str]:
    """The patients by accuracy; equals by a hash, since their own order would be the alphabet's."""
    names = {unit for unit in units if unit is not None}

    def key(name: str) -> tuple[float, str]:
        return float(right[units == name].mean()), hashlib.sha256(name.encode()).hexdigest()

    return sorted(names, key=key)


def identifiers(rows: Sequence[ClipRow]) -> set[str]:
    """Every name of a patient, video, action or clip; clips also without folder and suffix."""
    names = {getattr(row, kind) for row in rows for kind in ("patient", "video", "action")}
    for row in rows:
        names |= {str(row.path), row.path.name, row.path.stem}
    return names - {None, ""}


def _apart(secret: str) -> str:
    """A pattern for a secret that is no part of a longer name or number.

    One or two characters are in every word: those must stand between signs.
    """
    edges = []
    for edge in (secret[0], secret[-1]):
        same_kind = r"\d" if edge.isdigit() else r"[^\W\d_]"
        edges.append(r"[^\W_]" if len(secret) < 3 else same_kind if edge.isalnum() else r"(?!)")
    return f"(?<!{edges[0]}){re.escape(secret)}(?!{edges[1]})"


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?", word))
