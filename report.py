"""Write a run's results as one HTML page that needs nothing else.

    python report.py runs/20260101-120000_tsm                  report.html in the run folder
    python report.py runs/20260101-120000_tsm/evaluate_val     of what evaluate.py wrote
    python report.py RUN --with-frames                         with pictures of the worst mistakes

By default no patient, video or clip is named and no frame is shown, so that the page can be passed
on; it says so at its top where that is not the case.
"""

import base64
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from utils.cli import script
from utils.errors import UserError, first_line
from utils.files import write_text
from video.clip_reader import read_clip
from video.container import ClipError
from web import report_figures, report_sections
from web.anonymize import Names, choose_names
from web.report_data import Run, load_run, more_intervals
from web.templating import decimals, page_environment, parts, percent, span

FRAMES = 8

FRAME_HEIGHT = 112  # pixels


@dataclass
class ReportConfig:
    """Which run to report, and what the page may show."""

    run: Annotated[str, tyro.conf.Positional]
    """a run folder, a folder that evaluate.py wrote, or one of cross_validate.py"""
    with_frames: bool = False
    """show frames of the worst mistakes: they are pictures of patients"""
    with_patients: bool = False
    """show the names of patients and the paths of clips"""
    mistakes: int = 12
    """how many of the most confident wrong answers to list"""
    output: str = ""
    """file to write (empty: report.html in the folder)"""


def build_page(run: Run, config: ReportConfig) -> str:
    """The whole page as HTML."""
    names = choose_names(run.predictions, config.with_patients, run.others)
    more = more_intervals(run)
    environment = page_environment()
    environment.filters.update(percent=percent, decimals=decimals, span=span, parts=parts)
    page = environment.get_template("report.html.j2").render(
        config=config,
        run=run,
        results=run.results,
        made=time.strftime("%Y-%m-%d %H:%M"),
        **_words(run, names, more),
        **_charts(run, names, more),
        mistakes=_mistakes(run, names, config),
    )
    return page.encode("utf-8", "replace").decode()  # a folder's name may be no text at all


def filmstrip(path: Path) -> tuple[list[str], str]:
    """Frames of a clip as data URIs, or none and the reason in words."""
    try:
        frames = read_clip(path, FRAMES, size=None)
    except ClipError as error:
        gone = error.reason == "no such file"
        return [], "this clip is no longer there" if gone else "this clip cannot be read"
    except OSError as error:
        return [], f"this clip cannot be read: {first_line(error)}"
    return [_data_uri(frame) for frame in frames], ""


def _data_uri(frame: np.ndarray) -> str:
    """`(H, W, 3)` uint8 RGB as a JPEG of FRAME_HEIGHT."""
    height, width = frame.shape[:2]
    size = max(1, round(width * FRAME_HEIGHT / height)), FRAME_HEIGHT
    file = io.BytesIO()
    Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _words(run: Run, names: Names, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": names.hide(report_sections.title(run)),
        "run_name": names.hide(run.folder.resolve().name),
        "warnings": report_sections.warnings(run, names),
        "interval_note": report_sections.interval_note(run),
        "cards": report_sections.cards(run, more),
        "confusion": report_sections.confusion(run),
        "per_class": report_sections.per_class(run, more),
        "averages": report_sections.averages(run),
        "folds": report_sections.folds(run, names),
        "settings": report_sections.settings(run, names),
    }


def _charts(run: Run, names: Names, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "class_charts": report_figures.per_class(report_sections.per_class(run, more)),
        "patient_charts": report_figures.per_patient(run, names),
        "reliability": report_figures.reliability(run),
        "risk_coverage": report_figures.risk_coverage(run),
        "training": report_figures.training(run),
    }


def _mistakes(run: Run, names: Names, config: ReportConfig) -> list[dict[str, Any]]:
    """The worst mistakes; only what may be shown goes to the template."""
    found = report_sections.mistakes(run, names, config.mistakes)
    for one in found:
        path = one.pop("path")
        one["path"] = str(path) if config.with_patients else ""
        one["frames"], one["problem"] = filmstrip(path) if config.with_frames else ([], "")
    return found


@script
def main() -> None:
    config = tyro.cli(ReportConfig, description=__doc__)
    if config.mistakes < 0:
        raise UserError(f"mistakes = {config.mistakes}: must be 0 or more")
    run = load_run(config.run)
    page = build_page(run, config)
    path = Path(config.output) if config.output else run.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    shown = [
        what
        for what, is_shown in (
            ("video frames", config.with_frames),
            ("patient names", config.with_patients),
        )
        if is_shown
    ]
    print(f"report: {path}" + (f" (contains {' and '.join(shown)})" if shown else ""))


if __name__ == "__main__":
    main()
