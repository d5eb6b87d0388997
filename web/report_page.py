"""The HTML page of a report: its sections and charts, put into the template."""

import base64
import time
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.calibration import describe_alternative
from explanation.mistakes import explain_mistakes
from utils.errors import first_line
from web import report_figures, report_sections
from web.anonymize import Pseudonyms, pseudonymize
from web.report_data import ReportData, more_intervals
from web.templating import jpeg_data_uri, page_environment

FRAMES = 8

FRAME_HEIGHT = 112  # pixels


def build_page(
    data: ReportData, with_frames: bool = False, with_patients: bool = False, max_mistakes: int = 12
) -> str:
    """The whole page as HTML.

    Args:
        with_frames: show frames of the clips with the worst mistakes.
        with_patients: show the names of patients and the paths of clips.
        max_mistakes: how many wrong predictions to list.
    """
    names = pseudonymize(data.predictions, with_patients, data.other_names)
    intervals = more_intervals(data)
    per_class = report_sections.per_class(data, intervals)
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            results=data.results,
            with_frames=with_frames,
            with_patients=with_patients,
            max_mistakes=max_mistakes,
            created=time.strftime("%Y-%m-%d %H:%M"),
            title=names.redact(report_sections.title(data)),
            run_name=names.redact(data.run.folder.resolve().name),
            warnings=report_sections.warnings(data, names),
            alternative=describe_alternative(data.results["selective"].get("alternative")),
            interval_note=report_sections.interval_note(data),
            cards=report_sections.headline_cards(data, intervals),
            confusion=report_sections.confusion(data),
            per_class=per_class,
            averages=report_sections.averages(data),
            folds=report_sections.folds(data, names),
            settings=report_sections.settings(data, names),
            class_charts=report_figures.per_class(per_class),
            precision_recall=report_figures.precision_recall(data),
            embedding=_embedding(data.run.folder),
            patient_charts=report_figures.per_patient(data, names),
            patients_left_out=report_sections.patients_left_out(data, report_figures.MAX_PATIENTS),
            reliability=report_figures.reliability(data),
            risk_coverage=report_figures.risk_coverage(data),
            training=report_figures.training(data),
            mistakes=_mistakes(data, names, with_frames, with_patients, max_mistakes),
        )
    )
    # The name of a folder may hold bytes that are not text.
    return page.encode("utf-8", "replace").decode()


def filmstrip(path: Path) -> tuple[list[str], str]:
    """Frames of a clip as data URIs, or none and the reason."""
    from video.clip_reader import FrameSampler, read_clip  # only with --with-frames
    from video.container import ClipError

    try:
        frames = read_clip(path, FrameSampler(FRAMES, "uniform"), size=None).rgb
    except ClipError as error:
        missing = error.reason == "no such file"
        return [], "this clip is no longer there" if missing else "this clip cannot be read"
    except OSError as error:
        return [], f"this clip cannot be read: {first_line(error)}"
    return [_data_uri(frame) for frame in frames], ""


def _data_uri(frame: np.ndarray) -> str:
    """A frame, `(H, W, 3)` uint8 RGB, as a JPEG of FRAME_HEIGHT."""
    from PIL import Image

    height, width = frame.shape[:2]
    size = max(1, round(width * FRAME_HEIGHT / height)), FRAME_HEIGHT
    return jpeg_data_uri(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), quality=85)


def _embedding(folder: Path) -> str:
    """embedding.png of a run as a data URI; empty if there is none. It names no patient."""
    try:
        picture = (folder / "embedding.png").read_bytes()
    except OSError:
        return ""
    if not picture.startswith(b"\x89PNG\r\n\x1a\n"):
        return ""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _mistakes(
    data: ReportData, names: Pseudonyms, with_frames: bool, with_patients: bool, max_count: int
) -> list[dict[str, Any]]:
    """The worst mistakes; the template gets only what may be shown."""
    mistakes = report_sections.mistakes(data, names, max_count)
    curves = explain_mistakes(data.run, [mistake["index"] for mistake in mistakes])
    for number, (mistake, curve) in enumerate(zip(mistakes, curves, strict=True), 1):
        classes = mistake["predicted"], mistake["true"]
        mistake["relevance"] = report_figures.relevance(curve, number, *classes)
        mistake["no_relevance"] = curve.missing
        mistake["method"] = curve.method
        mistake["warnings"] = [line.removeprefix("warning: ") for line in curve.warnings]
        path = mistake["path"]
        mistake["path"] = str(path) if with_patients else ""
        mistake["frames"], mistake["problem"] = filmstrip(path) if with_frames else ([], "")
    return mistakes
