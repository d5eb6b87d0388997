"""Tables for the terminal, with names in all alphabets."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import HOSTILE, LONG_NAMES, make_model

from clips.manifest import ClipRow
from config import TrainConfig
from evaluation.calibration import Calibration
from evaluation.predictions import Predictions
from evaluation.results import format_results, write_results
from training.log import run_header
from utils.text_table import MAX_NAME, frame_table, list_some, shorten, text_table


def test_columns_align() -> None:
    assert text_table([["clips", "train", "val"], ["use", "7", "12"], ["Сору", "1234567", ""]]) == (
        "clips    train  val\nuse          7   12\nСору   1234567"
    )


def test_lists_are_cut_in_one_way() -> None:
    assert list_some([]) == ""
    assert list_some("abcde") == "a, b, c, d, e"
    assert list_some("abcdef") == "a, b, c, d, e and 1 more"
    assert list_some(map(str, range(5000)), 2, "\n  ") == "0\n  1\n  and 4,998 more"


def test_accents_take_no_room_and_wide_letters_two() -> None:
    decomposed = "И\u0306од"  # three letters on the screen
    rows = text_table([[decomposed, "1"], ["吸引", "2"], ["abcd", "3"]]).splitlines()
    assert rows == [f"{decomposed}   1", "吸引  2", "abcd  3"]


def test_every_row_ends_in_the_same_column() -> None:
    names = (*HOSTILE, *LONG_NAMES)
    lines = text_table([[name, str(number)] for number, name in enumerate(names)]).splitlines()
    assert {len(line) for line in lines} == {MAX_NAME + 4}
    assert len(set(lines)) == len(names)


def test_long_names_lose_their_middle_and_values_nothing() -> None:
    name, value = "step one of a long operation: left side", "12 (34) " * 10
    line = text_table([["", "clips"], [name, value]]).splitlines()[1]
    assert line.startswith("step one of a long op… left side  12 (34)")
    assert value.strip() in line
    assert shorten(name, len(name)) == name
    assert [len(shorten(name, length)) for length in (5, 14, 32)] == [5, 14, 32]


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31mred", "caf\udce9"])
def test_names_cannot_break_the_table(name: str) -> None:
    line = text_table([[name, "1"]])
    assert line.isprintable()
    assert line.encode("utf-8")


def test_a_frame() -> None:
    frame = pd.DataFrame(
        {"f1": [0.25, np.nan], "clips": [3, 0], "other": ["a", None]}, index=["cut", "шитьё"]
    )
    frame["patients"] = pd.array([2, pd.NA], dtype="Int64")
    assert frame_table(frame).splitlines() == [
        "          f1  clips  other  patients",
        "cut    0.250      3      a         2",
        "шитьё      -      0      -         -",
    ]
    assert frame_table(frame[["clips"]].rename_axis("class"), index=False) == "clips\n3\n0"
    assert frame_table(frame[["f1"]], 1).splitlines()[1] == "cut    0.2"


def test_the_header_of_a_training_run_aligns() -> None:
    names = (*LONG_NAMES, "cut", "шитьё")
    config = TrainConfig(classes=names, n_frames=4, image_size=32)
    splits = {
        split: [ClipRow(Path(f"{n}.mp4"), n % len(names)) for n in range(size)]
        for split, size in (("train", 1000), ("val", 20), ("test", 8))
    }
    model = make_model("vivit", len(names), image_size=32, n_frames=4)
    header = run_header(config, model, splits, torch.device("cpu"), torch.float32)
    table, about = header.split("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == ["clips", "train", "val", "test"]
    assert lines[-1].split() == ["шитьё", "125", "2", "1"]
    assert len(lines) == 1 + len(names)
    assert {len(line) for line in lines} == {MAX_NAME + len("  train  val  test")}
    assert about.startswith("tsm_resnet, 4 frames of 32 px, on ")


def test_the_scores_of_long_classes_align_and_stay_whole_in_files(tmp_path: Path) -> None:
    names = (*LONG_NAMES, "cut", "шитьё")
    rows = [ClipRow(Path(f"{n}.mp4"), n % 8, f"p{n % 3}") for n in range(24)]
    probabilities = np.full((24, 8), 0.05) + 0.6 * np.eye(8)[np.arange(24) % 8]
    results = write_results(Predictions(rows, probabilities), names, tmp_path, [Calibration()], {})
    table = format_results(results).split("\n\n")[0].splitlines()
    assert len(table) == 1 + len(names)
    assert len({len(line) for line in table}) == 1
    text = (tmp_path / "test_metrics.json").read_text(encoding="utf-8")
    assert all(name in text for name in names)
