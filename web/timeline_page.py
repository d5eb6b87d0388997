"""timeline.html: a page to look through a timeline and to correct it.

The page needs only the video beside it: it opens from a disk, without a network.
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

from timeline.segments import NON_CLASS_LABELS, Timeline
from utils.files import write_text
from web.templating import has_long_words, page_environment, template_text

MAX_BINS = 20_000  # per curve; in a video of three hours each one is half a second long

MAX_VALUES = 400_000  # of all curves together: half a megabyte as base64

NO_PREDICTION = 255  # the value of a bin without a prediction

# In this order: the scripts share one scope, and the later ones use the earlier ones.
_SCRIPTS = (
    "timeline_data.js",
    "timeline_styles.js",
    "timeline_plot.js",
    "timeline_list.js",
    "timeline.js",
)


def build_timeline_page(
    timeline: Timeline, video: str | None, metadata: dict[str, str] | None = None
) -> str:
    """The page as HTML.

    Args:
        timeline: timeline to show. Names of people can only come from `timeline.name`, its notes
            and the metadata.
        video: URL of the video, relative to the page and percent-quoted; None: there is no video to
            show (a live stream), and the page works without it.
        metadata: how the timeline was made (command, model, device), for the foot of the page.
    """
    environment = page_environment()
    script = "\n".join(template_text(name) for name in _SCRIPTS)
    digest = hashlib.sha256(script.encode()).digest()
    page = environment.get_template("timeline.html.j2").render(
        timeline=timeline,
        long_words=has_long_words(
            [*timeline.classes, *(segment.label for segment in timeline.segments)]
        ),
        video=video,
        video_name=unquote(video or ""),
        metadata=metadata or {},
        length=_format_duration(timeline.duration),
        data=Markup(_json(_data(timeline))),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
    )
    return page.encode("utf-8", "replace").decode()  # the name of a file may hold invalid bytes


def write_timeline_page(
    path: str | Path,
    timeline: Timeline,
    video_path: Path | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the page. It finds the video as long as the two are moved only together."""
    video = None if video_path is None else _relative_url(Path(video_path), Path(path).parent)
    write_text(path, build_timeline_page(timeline, video, metadata))


def bin_probabilities(times: np.ndarray, probabilities: np.ndarray, duration: float) -> np.ndarray:
    """Curves that are small enough for a page.

    A bin holds the mean of its predictions, 0 to 254 for 0 to 1. With means, the classes still add
    up to one and agree with the confidence of the segments. A prediction holds until the next one
    is due; where there is none, as in a stretch that could not be read, the bin is NO_PREDICTION.

    Args:
        times: `(N,)` seconds.
        probabilities: `(N, num_classes)`; rows that are not finite are left out.
        duration: length of the video in seconds.

    Returns:
        `(bins, num_classes)` uint8 over the whole duration.
    """
    num_classes = probabilities.shape[1]
    known = np.isfinite(probabilities).all(axis=1) & (times >= 0) & (times <= duration)
    times, probabilities = times[known], probabilities[known]
    if not len(times) or not num_classes:
        return np.empty((0, num_classes), np.uint8)
    order = np.argsort(times, kind="stable")
    times, probabilities = times[order], probabilities[order]
    interval = float(np.median(np.diff(times))) if len(times) > 1 else duration
    max_bins = max(1, min(MAX_BINS, MAX_VALUES // num_classes))
    bins = min(max_bins, math.ceil(duration / interval)) if interval > 0 else max_bins
    edges = np.arange(bins) * (duration / bins)

    index = np.clip(np.searchsorted(edges, times, "right") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=column, minlength=bins) for column in probabilities.T]
    means = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]

    before = np.searchsorted(times, edges, "right") - 1  # the last prediction before each bin
    is_held = (count == 0) & (before >= 0) & (edges - times[before] < 2 * interval)
    means[is_held] = probabilities[before[is_held]]
    values = np.round(254 * np.clip(means, 0, 1)).astype(np.uint8)
    values[(count == 0) & ~is_held] = NO_PREDICTION
    return values


def _data(timeline: Timeline) -> dict[str, Any]:
    """The data that the script of the page reads; see templates/timeline_data.js."""
    in_segments = (segment.label for segment in timeline.segments)
    labels = list(dict.fromkeys([*timeline.classes, *NON_CLASS_LABELS, *in_segments]))
    index = {label: i for i, label in enumerate(labels)}
    curves = bin_probabilities(timeline.times, timeline.probabilities, timeline.duration)
    return {
        "duration": timeline.duration,
        "labels": labels,
        "classes": len(timeline.classes),
        "marks": NON_CLASS_LABELS,
        "segments": [
            [
                round(segment.start, 3),
                round(segment.end, 3),
                index[segment.label],
                None if math.isnan(segment.confidence) else round(segment.confidence, 4),
            ]
            for segment in timeline.segments
        ],
        "bins": len(curves),
        "curves": base64.b64encode(curves.T.tobytes()).decode(),  # one class after the other
    }


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end the <script> element around it, whatever the classes are called."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _relative_url(file: Path, folder: Path) -> str:
    """The URL of a file relative to a folder. Symbolic links are not resolved, as in browsers."""
    try:
        relative = os.path.relpath(file, folder)
    except ValueError:  # on another Windows drive
        return Path(os.path.abspath(file)).as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _format_duration(seconds: float) -> str:
    """Seconds as `2 h 5 min`, `9 min 30 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    values = zip((*divmod(minutes, 60), rest), ("h", "min", "s"), strict=True)
    return " ".join([f"{value} {unit}" for value, unit in values if value][:2]) or "0 s"
