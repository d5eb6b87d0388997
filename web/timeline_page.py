"""One HTML page on which a person looks through a timeline and corrects it.

The page needs nothing but the video that lies near it: it opens from a disk, without a network.
"""

import base64
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from markupsafe import Markup

from timeline.segments import MARKS, Timeline
from utils.files import write_text
from web.templating import page_environment, template_text

MOST_BINS = 20_000  # of a curve: half a second each in three hours

MOST_VALUES = 400_000  # of all curves: half a megabyte as base64, whatever the number of classes

NO_ANSWER = 255

_SCRIPTS = (
    "timeline_data.js",
    "timeline_looks.js",
    "timeline_plot.js",
    "timeline_list.js",
    "timeline.js",
)


def build_timeline_page(
    timeline: Timeline, video: str | None, facts: dict[str, str] | None = None
) -> str:
    """The whole page as HTML.

    Args:
        timeline: nobody is named on the page but by `timeline.name`, its notes and the facts.
        video: a URL of the video, relative to the page and percent-quoted; None: there is none to
            show (a live stream), and the rest of the page works without it.
        facts: how the timeline was made (command, model, versions), for the foot of the page.
    """
    environment = page_environment()
    script = "\n".join(template_text(name) for name in _SCRIPTS)
    digest = hashlib.sha256(script.encode()).digest()
    page = environment.get_template("timeline.html.j2").render(
        timeline=timeline,
        video=video,
        video_name=unquote(video or ""),
        facts=facts or {},
        length=_in_words(timeline.duration),
        data=Markup(_json(_data(timeline))),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
    )
    return page.encode("utf-8", "replace").decode()  # a file's name may be no text at all


def write_timeline_page(
    path: str | Path,
    timeline: Timeline,
    video_path: Path | None,
    facts: dict[str, str] | None = None,
) -> None:
    """Write the page; it finds the video as long as both keep their places to each other."""
    video = None if video_path is None else _relative_url(Path(video_path), Path(path).parent)
    write_text(path, build_timeline_page(timeline, video, facts))


def bin_probabilities(times: np.ndarray, probabilities: np.ndarray, duration: float) -> np.ndarray:
    """Curves small enough for a page: `(bins, num_classes)` uint8 over the whole duration.

    A bin holds the mean of its answers, 0 to 254 for 0 to 1; means, so that the classes still add
    up to one and agree with the segments' confidence. An answer holds until the next one is due;
    where none is, as in a stretch that could not be read, the bin is NO_ANSWER.

    Args:
        times: `(N,)` seconds.
        probabilities: `(N, num_classes)`; rows that are not finite count as no answer.
        duration: of the video, seconds.
    """
    num_classes = probabilities.shape[1]
    known = np.isfinite(probabilities).all(axis=1) & (times >= 0) & (times <= duration)
    times, probabilities = times[known], probabilities[known]
    if not len(times) or not num_classes:
        return np.empty((0, num_classes), np.uint8)
    order = np.argsort(times, kind="stable")
    times, probabilities = times[order], probabilities[order]
    apart = float(np.median(np.diff(times))) if len(times) > 1 else duration
    most = max(1, min(MOST_BINS, MOST_VALUES // num_classes))
    bins = min(most, math.ceil(duration / apart)) if apart > 0 else most
    edges = np.arange(bins) * (duration / bins)

    place = np.clip(np.searchsorted(edges, times, "right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=column, minlength=bins) for column in probabilities.T]
    means = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]

    before = np.searchsorted(times, edges, "right") - 1  # the last answer before each bin
    held = (count == 0) & (before >= 0) & (edges - times[before] < 2 * apart)
    means[held] = probabilities[before[held]]
    values = np.round(254 * np.clip(means, 0, 1)).astype(np.uint8)
    values[(count == 0) & ~held] = NO_ANSWER
    return values


def _data(timeline: Timeline) -> dict[str, Any]:
    """What the page's script reads; see templates/timeline_data.js."""
    found = (segment.label for segment in timeline.segments)
    labels = list(dict.fromkeys([*timeline.classes, *MARKS, *found]))
    number = {label: index for index, label in enumerate(labels)}
    curves = bin_probabilities(timeline.times, timeline.probabilities, timeline.duration)
    return {
        "duration": timeline.duration,
        "labels": labels,
        "classes": len(timeline.classes),
        "marks": MARKS,
        "segments": [
            [
                round(segment.start, 3),
                round(segment.end, 3),
                number[segment.label],
                None if math.isnan(segment.confidence) else round(segment.confidence, 4),
            ]
            for segment in timeline.segments
        ],
        "bins": len(curves),
        "curves": base64.b64encode(curves.T.tobytes()).decode(),  # class after class
    }


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end the <script> it stands in, whatever the classes are called."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _relative_url(file: Path, folder: Path) -> str:
    """A URL of a file as seen from a folder. Links are left as they are, as browsers do."""
    try:
        relative = os.path.relpath(file, folder)
    except ValueError:  # on another Windows drive
        return Path(os.path.abspath(file)).as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _in_words(seconds: float) -> str:
    """`2 h 5 min`, `9 min 30 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    values = zip((*divmod(minutes, 60), rest), ("h", "min", "s"), strict=True)
    return " ".join([f"{value} {unit}" for value, unit in values if value][:2]) or "0 s"
