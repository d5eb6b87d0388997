"""The planted evidence: the table is what the pixels show, and tells nothing about the class."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import run_script

from clips.manifest import CLASSES as ALL_CLASSES
from clips.manifest import read_manifest
from demo.evidence import (
    CLASSES,
    CLIPS_PER_CLASS,
    MARKER,
    PATIENTS,
    QUADRANTS,
    EvidenceClip,
    plan_clips,
    render,
    render_evidence,
)
from utils.errors import UserError
from utils.tables import read_table
from video.clip_reader import FrameSampler, read_clip

T = 5  # a small one, with 12 pairs of interval and quadrant
TINY = {
    "patients": {"train": 2, "val": 1, "test": 1},
    "clips_per_class": {"train": 4, "val": 1, "test": 1},
}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips with evidence, read-only."""
    root = tmp_path_factory.mktemp("evidence") / "data"
    return render_evidence(root, **TINY, n_frames=T, num_workers=1)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips with a mark, read-only."""
    root = tmp_path_factory.mktemp("marked") / "data"
    return render_evidence(root, **TINY, n_frames=T, num_workers=1, mark=True)


@pytest.fixture(scope="module")
def plan() -> list[EvidenceClip]:
    """The whole data set."""
    return list(plan_clips(PATIENTS, CLIPS_PER_CLASS))


def where(changed: np.ndarray) -> tuple[list[int], str]:
    """The frames of `(T, H, W)` that are not all False, and the quadrant of what is not; "none" if
    it is in several."""
    height, width = changed.shape[1:]
    halves = {
        "top left": np.s_[:, : height // 2, : width // 2],
        "top right": np.s_[:, : height // 2, width // 2 :],
        "bottom left": np.s_[:, height // 2 :, : width // 2],
        "bottom right": np.s_[:, height // 2 :, width // 2 :],
    }
    quadrants = [name for name, part in halves.items() if changed[part].any()]
    frames = np.flatnonzero(changed.any((1, 2))).tolist()
    return frames, quadrants[0] if len(quadrants) == 1 else "none"


def truth(root: Path) -> dict[str, tuple[list[int], str]]:
    """The sampled frames with evidence and their quadrant, per path."""
    return {
        row["path"]: (
            list(range(int(row["first_frame"]), int(row["last_frame"]) + 1)),
            row["quadrant"],
        )
        for _, row in read_table(root / "evidence.csv").records()
    }


@pytest.mark.parametrize("n_frames", [3, 8])
def test_only_the_interval_and_the_quadrant_hold_evidence(n_frames: int) -> None:
    clips = list(plan_clips({"train": 2}, {"train": 12}, n_frames=n_frames))
    for clip in clips[::5]:  # of all classes
        with_it, without = render(clip), render(clip, evidence=False)
        assert with_it.shape == (2 * n_frames, 96, 128, 3)
        frames, quadrant = where((with_it != without).any(3))
        assert frames == list(range(2 * clip.first_frame, 2 * clip.last_frame + 2))
        assert quadrant == clip.quadrant


def test_the_evidence_is_large_and_in_the_round_view(plan: list[EvidenceClip]) -> None:
    for clip in plan[:48:5]:
        without = render(clip, evidence=False)
        changed = (render(clip) != without).any(3)
        frame = 2 * clip.first_frame
        assert changed[frame].sum() > 250  # 2 % of the picture
        # The tissue is bright where the evidence will be: neither the dark outside nor its edge.
        assert without[frame][changed[frame]].max(1).min() > 30


def test_clips_with_the_same_number_differ_in_the_evidence_alone(plan: list[EvidenceClip]) -> None:
    clips = plan[4:8]
    assert [clip.action for clip in clips] == list(CLASSES)
    assert len({dataclasses.replace(clip, action="") for clip in clips}) == 1
    bare = [render(clip, evidence=False) for clip in clips]
    assert all(np.array_equal(frames, bare[0]) for frames in bare)
    drawn = [render(clip) for clip in clips]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_table_is_what_a_model_sees(evidence: Path) -> None:
    """Uniform sampling and every random one, of the decoded clips."""
    planned = {clip.path: clip for clip in plan_clips(**TINY, n_frames=T)}
    table = truth(evidence)
    assert table.keys() == planned.keys()
    uniform = FrameSampler(T, "uniform")
    for path, (frames, quadrant) in list(table.items())[::3]:
        bare = render(planned[path], evidence=False)
        for sampler, offsets in (
            (uniform, None),
            (FrameSampler(T, "random"), [0.0] * T),
            (FrameSampler(T, "random"), [0.999] * T),
        ):
            seen = read_clip(evidence / "clips" / path, sampler, None, offsets).rgb
            chosen = bare[sampler.indices(len(bare), offsets)]
            difference = np.abs(seen.astype(int) - chosen).mean(3)
            # H.264 changes single pixels; the evidence changes blocks of 8 x 8.
            blocks = difference.reshape(T, 12, 8, 16, 8).mean((2, 4))
            assert where(blocks > 40) == (frames, quadrant)


def test_interval_and_quadrant_are_independent_of_the_class(plan: list[EvidenceClip]) -> None:
    for split in PATIENTS:
        clips = [clip for clip in plan if clip.split == split]
        counts = Counter((clip.first_frame, clip.quadrant, clip.action) for clip in clips)
        assert set(counts) == {(k, q, a) for k in range(6) for q in QUADRANTS for a in CLASSES}
        assert set(counts.values()) == {CLIPS_PER_CLASS[split] // 24}
        assert len({(clip.first_frame, clip.quadrant) for clip in clips[:96:4]}) == 24  # first
    order = [(clip.first_frame, clip.quadrant) for clip in plan]
    assert order[: 4 * 24] != order[4 * 24 : 8 * 24]


def test_no_patient_is_in_two_splits(plan: list[EvidenceClip]) -> None:
    homes = {(clip.patient, clip.split) for clip in plan}
    assert len(homes) == len({patient for patient, _ in homes}) == sum(PATIENTS.values())
    assert len({clip.path for clip in plan}) == len(plan)


def test_manifests(evidence: Path) -> None:
    paths = set()
    for split, count in TINY["clips_per_class"].items():
        rows = read_manifest(evidence / f"{split}.csv")
        assert Counter(ALL_CLASSES[row.label] for row in rows) == dict.fromkeys(CLASSES, count)
        assert len({row.patient for row in rows}) == TINY["patients"][split]
        paths |= {row.path.relative_to(evidence / "clips").as_posix() for row in rows}
    assert paths == truth(evidence).keys()


def test_same_seed_same_bytes(evidence: Path, tmp_path: Path) -> None:
    again = render_evidence(tmp_path / "again", **TINY, n_frames=T, num_workers=2)
    files = sorted(path.relative_to(evidence) for path in evidence.rglob("*") if path.is_file())
    assert len(files) == 24 + 5
    assert all((again / path).read_bytes() == (evidence / path).read_bytes() for path in files)
    first, other = next(plan_clips(**TINY)), list(plan_clips(**TINY, seed=1))
    assert not np.array_equal(render(first, 0), render(first, 1))
    assert [clip.quadrant for clip in other] != [clip.quadrant for clip in plan_clips(**TINY)]


def test_the_mark_alone_tells_the_class(marked: Path) -> None:
    """It is static, in the border of 8 %, and the same in all clips of a class."""
    assert not (marked / "evidence.csv").exists()  # there is no evidence
    colours: dict[str, list] = {action: [] for action in CLASSES}
    for clip in plan_clips(**TINY, n_frames=T, mark=True):
        changed = (render(clip).astype(int) - render(clip, evidence=False)).any(3)
        assert (changed == changed[0]).all()
        rows, columns = np.nonzero(changed[0])
        assert len(rows) >= 48 and rows.max() < 0.08 * 96 and columns.max() < 0.08 * 128
        seen = read_clip(marked / "clips" / clip.path, FrameSampler(T), None).rgb
        colours[clip.action].append(seen[:, 3:5, 5:7].mean((0, 1, 2)))
    looks = np.array([colours[action] for action in CLASSES])  # (classes, clips, 3)
    assert np.ptp(looks, axis=1).max() < 25
    between = np.abs(looks[:, None, 0] - looks[None, :, 0]).max(2)
    assert between[~np.eye(len(CLASSES), dtype=bool)].min() > 100


def test_without_a_mark_the_corners_are_the_same_in_all_classes(plan: list[EvidenceClip]) -> None:
    corners = [render(clip)[:, :8, :11] for clip in plan[:4]]
    assert all(np.array_equal(corner, corners[0]) for corner in corners)
    assert corners[0].max() < 30  # camera noise on black


def test_the_module_is_a_script(evidence: Path, tmp_path: Path) -> None:
    settings = json.loads((evidence / MARKER).read_text())
    settings |= {"patients": PATIENTS, "clips_per_class": CLIPS_PER_CLASS, "mark": True}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MARKER).write_text(json.dumps(settings))
    done = run_script("demo.evidence", "data", "--mark", "--n-frames", T, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "data")  # complete already


def test_other_settings_are_rendered_anew_and_other_data_is_left_alone(tmp_path: Path) -> None:
    one = {"patients": {"train": 1}, "clips_per_class": {"train": 1}, "num_workers": 1}
    root = render_evidence(tmp_path / "data", **one, n_frames=3)
    before = (root / "evidence.csv").read_text()
    render_evidence(root, **one, n_frames=8)
    assert (root / "evidence.csv").read_text() != before
    (root / MARKER).rename(root / "demo.json")  # the demo data
    with pytest.raises(UserError, match="move it away"):
        render_evidence(root, **one)
    with pytest.raises(UserError, match="n_frames must be at least 3, not 2"):
        render_evidence(tmp_path / "new", n_frames=2)
