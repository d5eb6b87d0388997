"""The templates of all HTML pages, and how numbers look on them."""

import base64
import io
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluation.bootstrap import Interval, format_interval

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"

_NBSP = "\u00a0"  # keeps a number and its % on one line


def page_environment() -> Environment:
    """A jinja2 environment that escapes all values: names and paths may hold any text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, decimals, interval_text, break_points, has_long_words, unbroken)
    environment.filters.update({function.__name__: function for function in filters})
    return environment


def template_text(name: str) -> str:
    """The text of a style sheet or script in the folder of the templates."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def jpeg_data_uri(image: "Image", quality: int) -> str:
    """A picture as the URI of a JPEG, for the source of an `<img>`."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in per cent, e.g. `51.9 %`."""
    return "–" if value is None else f"{100 * value:.{digits}f}{_NBSP}%"


def decimals(value: float | None) -> str:
    """A number with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def interval_text(interval: Interval, as_percent: bool = True) -> str:
    """An interval, e.g. `51.9 to 71.7 %`; empty if there is none."""
    if not as_percent:
        return format_interval(interval, missing="")
    scaled = interval and [100 * end for end in interval]
    text = format_interval(scaled, ".1f", missing="")
    return f"{text}{_NBSP}%" if text else ""


def break_points(name: str) -> list[str]:
    """The parts of a name between which a line may break: Abdominal|Entry, use_|clipper.

    Words of more than 20 characters, which fit into no column, may break every 12 characters.
    """
    # No pattern of `re` stands for the lower-case letters of all alphabets.
    shape = "".join("a" if c.islower() else "A" if c.isupper() else c for c in name)
    breaks = [match.start() for match in re.finditer(r"(?<=a)(?=A)|(?<=[_/.-])(?=\w)", shape)]
    words = [name[start:end] for start, end in pairwise([0, *breaks, len(name)])]
    return [
        part
        for word in words
        for part in (re.findall(r"(?s).{1,12}", word) if re.search(r"\S{21}", word) else [word])
    ]


def has_long_words(names: Iterable[str], longest: int = 9) -> bool:
    """Whether a name holds a word of more than `longest` letters: too long for a narrow column."""
    words = (word for name in names for part in break_points(name) for word in part.split())
    return any(len(word) > longest for word in words)


def unbroken(text: str) -> Markup:
    """A text in which no line ends at a hyphen: `--select-by` and other flags stay whole.

    Only a word that is longer than a line is broken; see `.unbroken` in templates/report.css.
    """
    words = re.split(r"(\s+)", text)
    whole = Markup('<span class="unbroken">{}</span>')
    return Markup("").join(whole.format(word) if "-" in word else word for word in words)
