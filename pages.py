"""HTML pages from templates/, for report.py, timeline_page.py and live_page.py."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

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
