"""What a pretraining has seen is found again: by name, by file, and by frames; nothing else is."""

import shutil
from pathlib import Path

import torch
from helpers import pan

from clips.fingerprints import (
    HASHES_PER_SECOND,
    find_seen,
    fingerprints,
    merge,
    name_digest,
    pack,
)
from clips.manifest import ClipRow
from modeling.weights import find_wrong_pretraining
from video.encoder import write_video
from video.excerpt import Excerpt, write_excerpts


def video(path: Path, frames: int = 75, turned: bool = False) -> ClipRow:
    images = pan(1, 1, frames)
    write_video(path, [image[::-1, ::-1].copy() if turned else image for image in images])
    return ClipRow(path, 0, path.stem)


def packed(rows: list[ClipRow]) -> dict:
    return pack("mae", len(rows), "", rows, fingerprints(rows, HASHES_PER_SECOND, 0))


def test_patients_files_and_excerpts_are_found(tmp_path: Path) -> None:
    first = video(tmp_path / "Nightingale.mp4")
    seen = packed([first])
    assert find_wrong_pretraining(seen) == ""
    assert seen["frames"].shape[0] <= 6  # two per second of three
    copy = tmp_path / "renamed.mp4"
    shutil.copy(first.path, copy)
    cut = tmp_path / "cut.mp4"
    assert write_excerpts(first.path, [Excerpt(1.0, 2.2, cut)]) == [""]
    other = video(tmp_path / "other.mp4", turned=True)
    rows = [ClipRow(copy, 0, "x"), ClipRow(cut, 0, "y"), other]
    rows.append(ClipRow(other.path, 0, first.patient))
    found = find_seen(rows, seen)
    assert found.patients == ["Nightingale"]
    assert found.clips == [copy, cut]
    assert found.unreadable == []
    # The file alone, without its frames, and the frames alone, without the file.
    no_frames = {**seen, "frames": seen["frames"][:0]}
    assert find_seen(rows, no_frames).clips == [copy]
    no_files = {**seen, "files": seen["files"][:0]}
    assert find_seen(rows, no_files).clips == [copy, cut]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    row = video(tmp_path / "a.mp4", frames=10)
    seen = packed([row])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert find_seen([ClipRow(broken, 0)], seen).unreadable == [broken]


def test_names_cannot_be_read(tmp_path: Path) -> None:
    seen = packed([video(tmp_path / "Nightingale.mp4", frames=10)])
    torch.save(seen, tmp_path / "seen.pt")
    assert b"Nightingale" not in (tmp_path / "seen.pt").read_bytes()
    assert bytes(seen["patients"][0].tolist()).hex() == name_digest(" Nightingale ")
    state = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert torch.equal(state["frames"], seen["frames"])


def test_two_pretrainings_have_seen_both(tmp_path: Path) -> None:
    one = packed([video(tmp_path / "a.mp4", frames=30)])
    two = packed([video(tmp_path / "b.mp4", frames=30, turned=True)])
    both = merge(one, {**two, "method": "order", "licence": "NC"})
    assert (both["method"], both["clips"], both["licence"]) == ("mae, then order", 2, "NC")
    assert find_wrong_pretraining(both) == ""
    assert len(both["patients"]) == len(both["files"]) == 2
    assert len(both["frames"]) == len(one["frames"]) + len(two["frames"])
    assert merge({}, one) == one
    twice = merge(one, one)
    assert len(twice["frames"]) == len(one["frames"])


def test_a_damaged_entry_is_told() -> None:
    good = pack("mae", 0, "", [], [])
    assert find_wrong_pretraining(good) == ""
    assert "frames" in find_wrong_pretraining({**good, "frames": torch.zeros(3, 8)})
    assert "files" in find_wrong_pretraining({**good, "files": good["frames"]})
    assert "patients" in find_wrong_pretraining({k: v for k, v in good.items() if k != "patients"})
