"""Near-duplicates: clips that are recoded, clips that differ, and clips without a hash."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips import perceptual_hash as module
from clips.perceptual_hash import duplicate_groups, perceptual_hash, sha256_file
from demo.data import Clip, render
from video.encoder import write_video


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, Path]:
    """One rendered clip in several recordings, and a clip of another patient."""
    folder = tmp_path_factory.mktemp("scenes")
    frames = render(Clip("train", 3, 1, 1, 1, "HookCut"))
    smaller = [np.asarray(Image.fromarray(frame).resize((96, 72))) for frame in frames]
    brighter = np.clip(frames * 1.1 + 8, 0, 255).astype(np.uint8)
    other = render(Clip("train", 4, 1, 1, 1, "PanoView"))
    black = np.zeros_like(frames)
    clips = {"same": frames, "smaller": smaller, "brighter": brighter, "other": other}
    for name, clip in {**clips, "black": black}.items():
        write_video(folder / f"{name}.mp4", clip)
    return {path.stem: path for path in folder.glob("*.mp4")}


def test_recordings_of_one_scene_are_near_duplicates_and_others_are_not(scenes) -> None:
    hashes = {name: perceptual_hash(path) for name, path in scenes.items()}
    assert hashes["black"] is None
    assert hashes["same"].shape == (3 * 64,)
    assert (hashes["same"] != hashes["smaller"]).sum() <= 20
    assert (hashes["same"] != hashes["brighter"]).sum() <= 20
    assert (hashes["same"] != hashes["other"]).sum() > 40
    same, smaller, brighter, other, black = duplicate_groups(
        [hashes[name] for name in ("same", "smaller", "brighter", "other", "black")],
        max_distance=20,
    )
    assert same == smaller == brighter != other
    assert black == -1


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"abc"), ("b", b"abc"), ("c", b"abd")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (sha256_file(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_groups_equal_comparing_every_pair(monkeypatch) -> None:
    """Against a slow reference, across the borders of chunks."""
    monkeypatch.setattr(module, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    centres = rng.random((6, 192)) < 0.5
    hashes = [centres[i % 6] ^ (rng.random(192) < 0.04) for i in range(40)]
    hashes[5] = None
    groups = duplicate_groups(hashes, max_distance=14)
    expected = list(range(40))  # union-find over all pairs
    changed = True
    while changed:
        changed = False
        for i in range(40):
            for j in range(40):
                near = i != 5 != j and (hashes[i] != hashes[j]).sum() <= 14
                if near and expected[i] != expected[j]:
                    expected[i] = expected[j] = min(expected[i], expected[j])
                    changed = True
    for i in range(40):
        for j in range(40):
            if i != 5 != j:
                assert (groups[i] == groups[j]) == (expected[i] == expected[j])
    assert groups[5] == -1
    assert 1 < len(set(groups)) < 40


def test_groups_without_any_hash() -> None:
    assert duplicate_groups([], 20).tolist() == []
    assert duplicate_groups([None, None], 20).tolist() == [-1, -1]


def test_real_patients_do_not_look_alike(real: Path) -> None:
    """The threshold of 20 bits: clips of other patients stay far above it."""
    clips = sorted((real / "cholect50/clips/clipping-and-cutting").glob("*.mp4"))
    patients = [clip.name.split("_")[0] for clip in clips]
    hashes = [perceptual_hash(clip) for clip in clips]
    pairs = [(i, j) for i in range(len(clips)) for j in range(i) if patients[i] != patients[j]]
    assert len(pairs) > 300
    assert min((hashes[i] != hashes[j]).sum() for i, j in pairs) > 40
