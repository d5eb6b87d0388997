"""explanation.html: why a model answers as it does, for many clips on one page.

The page is one file that loads nothing, and it works without JavaScript, in the order of the clips.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from explanation.coloured_maps import (
    BLUE,
    CAUTION,
    METHOD_NAMES,
    NOTHING,
    YELLOW,
    cells_text,
    chosen_frames,
    has_outline,
    has_positive,
    paint,
    positive_shares,
    time_text,
)
from explanation.relevance import ExplainedClip
from utils.files import write_text
from web.anonymize import Pseudonyms
from web.svg_charts import Chart, Line, Mark, nice_axis
from web.templating import jpeg_data_uri, page_environment, template_text

MAX_FRAMES, MIN_FRAMES = 16, 4
"""of a clip"""
FRAMES_ON_PAGE = 1600
"""above 100 clips each has fewer frames, so that a browser can still show the page"""

FRAME_SIZE = 192, 128
"""width and height in pixels that no picture exceeds"""

_MAX_MARKS = 64  # frames of a curve that have a mark each


def write_explanation_page(
    path: str | Path,
    clips: Sequence[ExplainedClip],
    with_names: bool = False,
    metadata: Mapping[str, str] | None = None,
    other_names: Iterable[str] = (),
) -> None:
    """Write the page; see `build_explanation_page`."""
    write_text(path, build_explanation_page(clips, with_names, metadata, other_names))


def build_explanation_page(
    clips: Sequence[ExplainedClip],
    with_names: bool = False,
    metadata: Mapping[str, str] | None = None,
    other_names: Iterable[str] = (),
) -> str:
    """The page as HTML.

    Args:
        with_names: show the names of the clips. Otherwise they are only numbered, and their names,
            the names of their files and of the folders around them are hidden in the metadata too.
        metadata: how the explanations were made (command, model, device), for the foot of the page.
        other_names: more that is hidden in the metadata without `with_names`, such as patients.
    """
    environment = page_environment()
    script = template_text("explanation.js")
    digest = hashlib.sha256(script.encode()).digest()
    numbered = [f"clip {number}" for number in range(1, len(clips) + 1)]
    titles = [f"{number}: {clip.name}" for number, clip in zip(numbered, clips, strict=True)]
    titles = titles if with_names else numbered
    hidden = [] if with_names else sorted(_identifiers(clips) | {*other_names})
    names = Pseudonyms({}, titles, hidden)
    most = min(MAX_FRAMES, max(MIN_FRAMES, FRAMES_ON_PAGE // max(1, len(clips))))
    page = environment.get_template("explanation.html.j2").render(
        clips=[_shown(clip, title, most) for clip, title in zip(clips, titles, strict=True)],
        methods=sorted({METHOD_NAMES[clip.method] for clip in clips}),
        unknown=any(clip.correct is None for clip in clips),
        known=any(clip.correct is not None for clip in clips),
        with_names=with_names,
        metadata={
            names.redact(name): names.redact_command(value)
            if name == "command"
            else names.redact(value)
            for name, value in (metadata or {}).items()
        },
        legend=BLUE,
        outline=YELLOW if any(map(has_outline, clips)) else "",
        caution=CAUTION,
        nothing=NOTHING,
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
    )
    return page.encode("utf-8", "replace").decode()  # the name of a file may hold invalid bytes


def _identifiers(clips: Sequence[ExplainedClip]) -> set[str]:
    """What must not be on a page without names: paths, files, and all folders around them, any of
    which may be named after a patient."""
    names = set()
    for clip in clips:
        path = Path(clip.name)
        names |= {clip.name, path.stem, *path.parts} - {path.anchor}
    return names - {"", ".", ".."}


def _shown(clip: ExplainedClip, title: str, most: int) -> dict[str, Any]:
    """What the template shows of a clip, with at most `most` frames."""
    shares, shown = positive_shares(clip.maps), chosen_frames(len(clip.frames), most)
    film = []
    for index in shown:
        frame = _fit(clip.frames[index])
        film.append(
            {
                "number": int(index) + 1,
                "time": time_text(clip.times[index]),
                "frame": _data_uri(frame),
                "map": _data_uri(paint(frame, shares[index])),
            }
        )
    return {
        "clip": clip,
        "title": title,
        "outcome": {True: "right", False: "wrong", None: "unknown"}[clip.correct],
        "method": METHOD_NAMES[clip.method],
        "cells": cells_text(clip),
        "film": film,
        "coloured": has_positive(clip),
        "chart": _curve(clip),
    }


def _fit(frame: np.ndarray) -> np.ndarray:
    """A frame `(H, W, 3)` in the largest size that the page has."""
    height, width = frame.shape[:2]
    scale = min(FRAME_SIZE[0] / width, FRAME_SIZE[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _data_uri(image: np.ndarray) -> str:
    """A picture, `(H, W, 3)` uint8 RGB, as a JPEG."""
    return jpeg_data_uri(Image.fromarray(image), quality=80)


def _curve(clip: ExplainedClip) -> Chart:
    """The relevance of all frames over their numbers."""
    count = len(clip.relevance)
    points = [(number, float(value)) for number, value in enumerate(clip.relevance, 1)]
    marks = []
    for (number, value), seconds in zip(points, clip.times, strict=True):
        time = f", {time_text(seconds)}" if time_text(seconds) else ""
        style = "a" if value >= 0 else "b"
        title = f"frame {number}{time}: relevance {value:.3g}"
        marks.append(Mark(number, value, style, title, 3.5))
    highest = int(np.argmax(clip.relevance)) + 1
    label = f"Relevance of each of {count} frames, the highest in frame {highest}"
    if not clip.relevance.any():
        label = f"Relevance of each of {count} frames: 0 in all of them"
    values = [0.0, *(value for _, value in points)]
    return Chart(
        label,
        nice_axis("frame", 1, count, integer=True),
        nice_axis("relevance", min(values), max(values), intervals=4),
        [Line("zero", "guide", ((1, 0), (count, 0))), Line("relevance", "a", points)],
        marks if count <= _MAX_MARKS else (),
        height=190,
        left=72,
    )
