"""Write the results of a run as one HTML page that needs no other file and no network.

    python report.py runs/20260101-120000_tsm_resnet               report.html in the run folder
    python report.py runs/20260101-120000_tsm_resnet/evaluate_val  the results of evaluate.py
    python report.py RUN --with-frames                             with frames of the worst mistakes

By default the page names no patient, video or clip and shows no frame, so that it can be passed
on. With --with-frames or --with-patients it is marked as confidential.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import require_writable_file, write_text

MAX_MISTAKES = 1000  # a page with many more is too large to open


@dataclass
class ReportConfig:
    """The run to report, and what the page may show."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run folder, a folder that evaluate.py wrote, or one of cross_validate.py"""
    with_frames: bool = False
    """show frames of the worst mistakes: they are images of patients"""
    with_patients: bool = False
    """show the names of patients and the paths of clips"""
    mistakes: int = 12
    """number of wrong predictions to list, the most confident first"""
    output: str = ""
    """file to write (empty: report.html in the folder)"""


@cli_main
def main() -> None:
    config = parse(ReportConfig, __doc__)
    if not 0 <= config.mistakes <= MAX_MISTAKES:
        raise UserError(f"mistakes = {config.mistakes}: must be from 0 to {MAX_MISTAKES}")

    from web.report_data import load_report_data  # not above: --help needs neither of them
    from web.report_page import build_page

    data = load_report_data(config.run)
    path = Path(config.output) if config.output else data.run.folder / "report.html"
    require_writable_file(path)
    page = build_page(data, config.with_frames, config.with_patients, config.mistakes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    confidential = ["video frames"] * config.with_frames + ["patient names"] * config.with_patients
    print(f"report: {path}" + f" (contains {' and '.join(confidential)})" * bool(confidential))


if __name__ == "__main__":
    main()
