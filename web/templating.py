"""HTML pages from templates/, for report.py, timeline_page.py and live_page.py."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from web.report_data import Interval

TEMPLATES = Path(__file__).parent / "templates"


def page_environment() -> Environment:
    """Templates that escape everything: class names and paths are anybody's text."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template_text(name: str) -> str:
    """A style sheet or script that lies beside the templates."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


_NBSP = "\u00a0"  # keeps a number and its % on one line


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{_NBSP}%"


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def parts(name: str) -> list[str]:
    """Where a narrow column may break a name: Abdominal|Entry, use_|clipper."""
    return re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[_/.-])(?=\w)", name)


def span(interval: Interval, as_percent: bool = True) -> str:
    """An interval in words; empty without one."""
    if not interval:
        return ""
    low, high = interval
    return f"{100 * low:.1f} to {percent(high)}" if as_percent else f"{low:.3f} to {high:.3f}"
