"""timeline.html: a page to look through a timeline and to correct it.

The page needs only the video beside it: it opens from a disk, without a network.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from markupsafe import Markup

from clips.manifest import NON_CLASS_LABELS
from timeline.output import probability_curves
from timeline.relevance import SegmentRelevance
from timeline.segments import Timeline
from utils.files import write_text
from web.templating import has_long_words, page_environment, template_text

# In this order: the scripts share one scope, and the later ones use the earlier ones.
_SCRIPTS = (
    "timeline_data.js",
    "timeline_styles.js",
    "timeline_plot.js",
    "timeline_relevance.js",
    "timeline_list.js",
    "timeline.js",
)


def build_timeline_page(
    timeline: Timeline,
    video: str | None,
    metadata: dict[str, str] | None = None,
    relevance: Sequence[SegmentRelevance] | None = None,
) -> str:
    """The page as HTML.

    Args:
        timeline: timeline to show. Names of people can only come from `timeline.name`, its notes
            and the metadata.
        video: URL of the video, relative to the page and percent-quoted; None: there is no video to
            show (a live stream), and the page works without it.
        metadata: how the timeline was made (command, model, device), for the foot of the page.
        relevance: which frames decided for the labels (None: that was not asked for).
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
        explained=relevance is not None,
        data=Markup(_json(_data(timeline, unquote(video or "").rpartition("/")[2], relevance))),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
    )
    return page.encode("utf-8", "replace").decode()  # the name of a file may hold invalid bytes


def write_timeline_page(
    path: str | Path,
    timeline: Timeline,
    video_path: Path | None,
    metadata: dict[str, str] | None = None,
    relevance: Sequence[SegmentRelevance] | None = None,
) -> None:
    """Write the page. It finds the video as long as the two are moved only together."""
    video = None if video_path is None else _relative_url(Path(video_path), Path(path).parent)
    write_text(path, build_timeline_page(timeline, video, metadata, relevance))


def _data(
    timeline: Timeline, video: str, relevance: Sequence[SegmentRelevance] | None
) -> dict[str, Any]:
    """The data that the script of the page reads; see templates/timeline_data.js.

    Args:
        video: file name of the video; empty: there is none.
    """
    in_segments = (segment.label for segment in timeline.segments)
    labels = list(dict.fromkeys([*timeline.classes, *NON_CLASS_LABELS, *in_segments]))
    index = {label: i for i, label in enumerate(labels)}
    curves = probability_curves(timeline)
    explained = {} if relevance is None else {"relevance": dict(map(_relevance, relevance))}
    return {
        **explained,
        "duration": timeline.duration,
        "video": video,
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


def _relevance(part: SegmentRelevance) -> tuple[int, dict[str, Any]]:
    """The number of a segment, and the relevance of its frames; see
    templates/timeline_relevance.js."""
    largest = float(np.abs(part.values).max()) or 1.0
    stretch = part.main_stretch()
    steps = np.diff(np.round(1000 * part.times).astype(int), prepend=0)  # small numbers
    return part.number, {
        "steps": steps.tolist(),
        "values": np.round(1000 * part.values / largest).astype(int).tolist(),
        "interval": round(part.interval, 4),
        "stretch": stretch
        and [
            round(stretch.start, 3),
            round(stretch.end, 3),
            round(stretch.fraction, 4),
            stretch.stands_out,
        ],
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
    """Seconds as `2 h 5 min`, `9 min 30 s`, `12 s` or `0.2 s`."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    values = zip((*divmod(minutes, 60), rest), ("h", "min", "s"), strict=True)
    return " ".join([f"{value} {unit}" for value, unit in values if value][:2]) or "0 s"
