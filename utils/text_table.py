"""Tables, lists and shortened texts for the terminal; columns align whatever classes are called."""

import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MAX_NAME = 32  # characters of a name in a table; only files hold longer ones in full


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as text: names to the left, numbers to the right; the first row may be titles.

    Long texts in the first row and the first column are shortened.
    """
    cells = [
        [shorten(text, MAX_NAME) if 0 in (i, j) else text for j, text in enumerate(texts)]
        for i, texts in enumerate(map(_printable, row) for row in rows)
    ]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        padded = [" " * (w - _width(n)) + n for n, w in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name + " " * (widths[0] - _width(name)), *padded]).rstrip())
    return "\n".join(lines)


def frame_table(table: "pd.DataFrame", digits: int = 3, index: bool = True) -> str:
    """A DataFrame as text, with `-` for what is missing.

    Args:
        digits: number of decimals of floats.
        index: whether the first column is the index.
    """
    names = table.index.names if index else []
    header = [str(name or "") for name in (*names, *table.columns)]
    rows = table.astype(object).where(table.notna(), "-").itertuples(index=index, name=None)
    return text_table([header, *([_cell(value, digits) for value in row] for row in rows)])


def shorten(text: str, length: int = 80) -> str:
    """A text with … in place of its middle if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    start = (2 * length) // 3
    return f"{text[:start]}…{text[start + 1 - length :]}"


def list_some(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first few texts and how many more there are: `a, b, c and 4 more`.

    Args:
        separator: what stands between two texts; with a line break, each has a line of its own.
    """
    items = list(items)
    text, more = separator.join(items[:limit]), len(items) - limit
    if more <= 0:
        return text
    return text + (separator if "\n" in separator else " ") + f"and {more:,} more"


def _cell(value: Any, digits: int) -> str:
    return str(value) if isinstance(value, str | Integral) else f"{value:.{digits}f}"


def _printable(text: str) -> str:
    """A text whose line breaks, control characters and invalid bytes are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _width(text: str) -> int:
    """The number of columns that a terminal needs: accents need none, East Asian letters two."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
