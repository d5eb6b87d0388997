"""Telling clips apart: what recoding leaves alike, what is different, what has no look."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips import perceptual_hash as fingerprint
from clips.perceptual_hash import alike, content_hash, look
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


def test_recordings_of_one_scene_look_alike_and_others_do_not(scenes) -> None:
    looks = {name: look(path) for name, path in scenes.items()}
    assert looks["black"] is None
    assert looks["same"].shape == (3 * 64,)
    assert (looks["same"] != looks["smaller"]).sum() <= 20
    assert (looks["same"] != looks["brighter"]).sum() <= 20
    assert (looks["same"] != looks["other"]).sum() > 40
    same, smaller, brighter, other, black = alike(
        [looks[name] for name in ("same", "smaller", "brighter", "other", "black")], bits=20
    )
    assert same == smaller == brighter != other
    assert black == -1


def test_content_hash_is_of_the_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"abc"), ("b", b"abc"), ("c", b"abd")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (content_hash(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_alike_equals_comparing_every_pair(monkeypatch) -> None:
    """Against a slow reference, across the borders of chunks."""
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    centres = rng.random((6, 192)) < 0.5
    looks = [centres[i % 6] ^ (rng.random(192) < 0.04) for i in range(40)]
    looks[5] = None
    groups = alike(looks, bits=14)
    expected = list(range(40))  # union-find over all pairs
    changed = True
    while changed:
        changed = False
        for i in range(40):
            for j in range(40):
                near = i != 5 != j and (looks[i] != looks[j]).sum() <= 14
                if near and expected[i] != expected[j]:
                    expected[i] = expected[j] = min(expected[i], expected[j])
                    changed = True
    for i in range(40):
        for j in range(40):
            if i != 5 != j:
                assert (groups[i] == groups[j]) == (expected[i] == expected[j])
    assert groups[5] == -1
    assert 1 < len(set(groups)) < 40


def test_nothing_has_a_look() -> None:
    assert alike([], 20).tolist() == []
    assert alike([None, None], 20).tolist() == [-1, -1]


def test_real_patients_do_not_look_alike(real: Path) -> None:
    """The threshold of 20 bits: clips of other patients stay far above it."""
    clips = sorted((real / "cholect50/clips/clipping-and-cutting").glob("*.mp4"))
    patients = [clip.name.split("_")[0] for clip in clips]
    looks = [look(clip) for clip in clips]
    pairs = [(i, j) for i in range(len(clips)) for j in range(i) if patients[i] != patients[j]]
    assert len(pairs) > 300
    assert min((looks[i] != looks[j]).sum() for i, j in pairs) > 40
