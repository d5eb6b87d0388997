"""The clips of a pretraining: what is taken, cut, left out, and told."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import make_clip, make_data, moving, pan

from clips.manifest import ClipRow
from pretraining.clips import cut_windows, exclude, find_clips, keep_usable
from utils.errors import UserError
from video.container import probe
from video.encoder import write_video


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    return make_data(root, ("a", "b"), {"train": 2, "val": 1, "test": 1}, frames=6)


def test_of_data_with_splits_only_the_training_clips_are_taken(data: Path) -> None:
    rows = find_clips([str(data)])
    assert {row.path.parent.name for row in rows} == {"train"}
    assert {row.patient for row in rows} == {"train0", "train1"}
    assert len(find_clips([str(data)], whole=True)) == 8
    assert len(find_clips([str(data / "train.csv"), str(data)])) == 4  # each one once


def test_of_other_folders_all_videos_are_taken(data: Path) -> None:
    assert len(find_clips([str(data / "clips" / "val")])) == 2
    (video,) = find_clips([str(data / "clips" / "val" / "0_0.mp4")])
    assert video.path.name == "0_0.mp4"
    with pytest.raises(UserError, match="nowhere"):
        find_clips([str(data / "nowhere")])


def test_patients_and_files_are_excluded(data: Path) -> None:
    told = []
    rows = find_clips([str(data / "clips")])
    kept = exclude(rows, find_clips([str(data)], whole=True)[:1], told.append)
    assert len(kept) == len(rows) - 1
    assert "unknown" in told[1]
    rows = find_clips([str(data)])
    kept = exclude(rows, [ClipRow(Path("elsewhere.mp4"), 0, "train0")], told.append)
    assert {row.patient for row in kept} == {"train1"}
    with pytest.raises(UserError, match="leaves no clip"):
        exclude(rows, rows, told.append)


def test_long_videos_are_cut_into_windows_once(tmp_path: Path) -> None:
    video = moving(tmp_path / "Nightingale.mp4", frames=75)  # three seconds
    clip = moving(tmp_path / "short.mp4", frames=12)
    rows = [ClipRow(video, 0, "Nightingale"), ClipRow(clip, 0)]
    told = []
    cutting = rows, tmp_path / "windows", 1.0, 0.5, 2.0, 0, told.append
    clips, videos = cut_windows(*cutting)
    assert videos == rows[:1]
    assert clips[0] == rows[1]
    assert [probe(row.path).frames for row in clips[1:]] == [25] * 5  # at 0, .5, 1, 1.5, 2 s
    assert {row.patient for row in clips[1:]} == {"Nightingale"}
    assert not any("Nightingale" in row.path.name for row in clips[1:])
    before = {row.path: row.path.stat().st_mtime_ns for row in clips[1:]}
    clips[1].path.unlink()
    again, _ = cut_windows(*cutting)
    assert again == clips
    same = [path.stat().st_mtime_ns == time for path, time in before.items()]
    assert same == [False, True, True, True, True]


def test_black_and_unreadable_clips_are_left_out_and_told(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "good.mp4", 200)
    black, broken = tmp_path / "black.mp4", tmp_path / "broken.mp4"
    write_video(black, np.zeros((12, 32, 32, 3), np.uint8))
    shutil.copy(good, broken)
    broken.write_bytes(broken.read_bytes()[:200])
    told = []
    usable = keep_usable([ClipRow(p, 0) for p in (good, black, broken)], 0, told.append)
    assert [row.path for row in usable.rows] == [good]
    assert len(usable.fingerprints) == 1
    assert usable.left_out.keys() == {black, broken}
    assert "1 clips with black frames" in told[0]
    assert str(broken) in told[1]
    with pytest.raises(UserError, match="none of the clips can be used"):
        keep_usable([ClipRow(black, 0)], 0, told.append)


def test_a_video_with_a_black_stretch_loses_only_that(tmp_path: Path) -> None:
    frames = np.stack(pan(1, 0, 75))
    frames[25:50] = 0
    video = tmp_path / "video.mp4"
    write_video(video, frames)
    clips, _ = cut_windows(
        [ClipRow(video, 0)], tmp_path / "windows", 1.0, 1.0, 2.0, 0, lambda _: None
    )
    usable = keep_usable(clips, 0, lambda _: None)
    assert [path.name.split("_")[1] for path in usable.left_out] == ["1000-2000.mp4"]
    assert len(usable.rows) == 2
