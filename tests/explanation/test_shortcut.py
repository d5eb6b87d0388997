"""The check for short cuts: planted borders, logos and relevance, whose shares are known."""

import numpy as np
import pytest
import torch

from explanation.shortcut import (
    ShortcutShare,
    border_mask,
    covered_parts,
    find_shortcuts,
    shortcut_shares,
    shortcut_table,
    static_mask,
)


def moving_clips(n: int = 6, t: int = 8, size: int = 50, seed: int = 0) -> torch.Tensor:
    """`(n, t, 3, size, size)` uint8 clips in which all pixels move."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(30, 220, (n, t, 3, size, size), dtype=np.uint8))


PATIENTS = np.array(["a", "a", "b", "b", "c", "c"], dtype=object)


def test_the_border_is_the_outer_eight_percent_of_each_side() -> None:
    mask = border_mask(50, 100)
    assert mask[:4].all()
    assert mask[-4:].all()
    assert mask[:, :8].all()
    assert mask[:, -8:].all()
    assert not mask[4:-4, 8:-8].any()
    assert border_mask(3, 3).tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert border_mask(100, 100, 0.25).mean() == 0.75


def test_logos_stamps_and_black_frames_stand_still() -> None:
    clips = moving_clips()
    planted = torch.zeros(50, 50, dtype=torch.bool)
    planted[:, :20] = True  # the black frame of an endoscope
    clips[..., :20] = torch.randint(0, 3, clips[..., :20].shape, dtype=torch.uint8)  # noise
    planted[40:45, 30:48] = True  # a logo
    clips[..., 40:45, 30:48] = 200
    planted[2:6, 30:48] = True  # a stamp that is another in each clip
    stamps = torch.randint(0, 256, (6, 1, 3, 4, 18), dtype=torch.uint8)
    clips[..., 2:6, 30:48] = stamps
    assert np.array_equal(static_mask(clips), planted)
    assert np.array_equal(static_mask(clips.float() / 255), planted)
    assert np.array_equal(static_mask(list(clips)), planted)
    more = torch.cat((clips, torch.zeros_like(clips[:, :, :2])), dim=2)  # motion beside colours
    assert np.array_equal(static_mask(more), planted)


def test_seconds_and_what_stands_still_in_some_clips_are_not_static() -> None:
    clips = moving_clips(20)
    for time in range(8):
        clips[:, time, :, :5, :5] = 30 * time  # digits that count
    clips[:3, :, :, 20:30, 20:30] = 90  # tissue at rest in 3 of 20 clips
    assert not static_mask(clips).any()
    clips[:17, :, :, 20:30, 20:30] = 90
    assert not static_mask(clips).any()
    clips[:18, :, :, 20:30, 20:30] = 90  # but a mark in 18 of 20, the others are cuts
    assert static_mask(clips).sum() == 100


def test_little_motion_is_judged_like_much_and_still_clips_tell_nothing() -> None:
    clips = moving_clips().float() / 255
    clips = 0.5 + (clips - 0.5) / 10  # a tenth of the contrast
    clips[..., 10:20, 10:20] = clips[:, :1, :, 10:20, 10:20]
    mask = static_mask(clips)
    assert mask[10:20, 10:20].all()
    assert mask.sum() == 100
    still = clips[:2, :1].expand(-1, 8, -1, -1, -1)
    assert np.array_equal(static_mask(torch.cat((clips, still))), mask)
    assert static_mask(still) is None  # two clips may be alike by accident
    assert static_mask(clips[:2, :1]) is None  # single frames
    assert static_mask(still[:1].expand(6, -1, -1, -1, -1)) is None  # copies of one picture


def test_clips_without_motion_are_compared_with_each_other() -> None:
    clips = moving_clips(10)[:, :1].repeat(1, 8, 1, 1, 1)
    clips[:9, ..., 44:48, 2:7] = torch.tensor([250, 220, 30]).byte().view(3, 1, 1)  # a logo
    mask = static_mask(clips)
    assert mask[44:48, 2:7].all()
    assert mask.sum() == 20
    clips[8:, ..., 44:48, 2:7] = moving_clips(2, seed=1)[:, :1, :, 44:48, 2:7]
    assert not static_mask(clips).any()


def test_parts_of_cells_are_exact() -> None:
    mask = border_mask(50, 50)  # 4 pixels; a cell of a 7 x 7 grid has 50 / 7
    parts = covered_parts(mask, (7, 7))
    side = 4 / (50 / 7)
    assert parts[0, 1:6] == pytest.approx([side] * 5)
    assert parts[1:6, 6] == pytest.approx([side] * 5)
    assert parts[[0, 0, 6, 6], [0, 6, 0, 6]] == pytest.approx([1 - (1 - side) ** 2] * 4)
    assert np.abs(parts[1:6, 1:6]).max() < 1e-12
    mask = np.random.default_rng(0).random((50, 31)) < 0.3
    for grid in ((7, 7), (16, 5), (50, 31), (60, 40), (1, 1)):
        parts = covered_parts(mask, grid)
        assert parts.mean() == pytest.approx(mask.mean())
        assert -1e-12 <= parts.min() <= parts.max() <= 1 + 1e-12
    assert np.allclose(covered_parts(mask, (50, 31)), mask)
    assert covered_parts(mask, (2, 1))[:, 0] == pytest.approx([mask[:25].mean(), mask[25:].mean()])


def test_planted_shares_are_exact() -> None:
    clips = moving_clips(4)
    clips[:2, ..., 20:30, 20:30] = 7  # a logo of the first class alone: 4 % of the picture
    maps = torch.zeros(4, 8, 50, 50)
    maps[0, :, 22:25, 22:26] = 0.5  # all in the logo
    maps[1, 0, 0, :3] = 1  # in the border: three of four
    maps[1, 5, 21, 21] = 1
    maps[1, 2, 40, 40] = -100  # what speaks against the class does not count
    maps[2, :, 10:40, 10:40] = 1
    maps[3] = -1
    labels = np.array([0, 0, 2, 2])
    shares = shortcut_shares(maps, clips, labels, ["cut", "none", "grasp"], np.array(list("abab")))
    assert [(s.label, s.region) for s in shares] == [
        (label, region) for label in ("cut", "grasp") for region in ("border", "static")
    ]
    border, static, other_border, other_static = shares
    assert border.shares == pytest.approx([0, 0.75])
    assert border.area == pytest.approx(1 - 0.84**2)
    assert border.ratio == pytest.approx(0.375 / (1 - 0.84**2))
    assert static.shares == pytest.approx([1, 0.25])
    assert static.area == pytest.approx(0.04)
    assert static.ratio == pytest.approx(0.625 / 0.04)
    assert other_border.shares.tolist() == [0]  # the last clip has no positive relevance
    assert other_border.interval is None
    assert other_static.area == 0
    assert other_static.verdict == "no such pixels"


@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (4, 4), (50, 50)])
def test_even_maps_have_the_share_of_the_area_with_every_grid(grid: tuple[int, int]) -> None:
    clips = moving_clips()
    clips[..., 3:11, 5:18] = 9
    shares = shortcut_shares(torch.ones(6, 8, *grid), clips, np.zeros(6, int), ["cut"], PATIENTS)
    assert [s.ratio for s in shares] == pytest.approx([1, 1])
    assert [s.area for s in shares] == pytest.approx([1 - 0.84**2, 8 * 13 / 2500])
    assert find_shortcuts(shares) == []


@pytest.mark.parametrize(("cells", "rings"), [(7, True), (16, True), (50, True), (4, False)])
def test_the_bell_rings_for_relevance_in_the_border_where_the_grid_can_show_it(
    cells: int, rings: bool
) -> None:
    clips, maps = moving_clips(), torch.rand(6, 8, cells, cells)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    maps[inner] *= 0.02
    if cells == 50:
        maps[:, :, :4] += 1
    (border,) = find_shortcuts(
        shortcut_shares(maps, clips, np.zeros(6, int), ["cut"], PATIENTS)
    ) or [None]
    assert (border is not None) == rings
    if rings:
        assert border.region == "border"
        assert border.interval[0] <= border.ratio <= border.interval[1]
    else:
        (border, _) = shortcut_shares(maps, clips, np.zeros(6, int), ["cut"], PATIENTS)
        assert border.verdict == "not measured: in most of the cells"


def test_a_logo_smaller_than_a_cell_is_found() -> None:
    clips, maps = moving_clips(), torch.full((6, 8, 7, 7), 0.1)
    clips[..., 30:34, 30:34] = 255
    maps[..., 4, 4] = 5
    shares = shortcut_shares(maps, clips, np.zeros(6, int), ["cut"], PATIENTS)
    assert [s.region for s in find_shortcuts(shares)] == ["static"]
    static = shares[1]
    assert static.area == pytest.approx(16 / 2500)
    assert static.limit == pytest.approx(49)  # it touches a single cell
    expected = 5 / (5 + 4.8) * 16 / (50 / 7) ** 2
    assert static.shares == pytest.approx([expected] * 6)
    maps[..., 4, 4] = 0.1
    maps[..., 2, 2] = 5  # elsewhere: no sign
    shares = shortcut_shares(maps, clips, np.zeros(6, int), ["cut"], PATIENTS)
    assert [s.verdict for s in shares] == ["no sign", "no sign"]


def test_one_patient_is_not_enough_and_a_doubtful_interval_either() -> None:
    def verdict(ratio: float, interval: list[float] | None, limit: float = 49) -> str:
        return ShortcutShare("cut", "border", np.array([ratio / 10]), 0.1, limit, interval).verdict

    assert verdict(3, [1.6, 4]) == "look"
    assert verdict(3, [1.4, 4]) == "no sign"
    assert verdict(1.9, [1.6, 2.2]) == "no sign"
    assert verdict(3, None) == "not measured: fewer than 2 patients"
    assert verdict(1.6, [1.3, 2], limit=2) == "look"  # 1.5 and 1.25 are asked of this grid
    assert verdict(1.45, [1.3, 2], limit=2) == "no sign"
    assert verdict(1.6, [1.2, 2], limit=2) == "no sign"
    assert verdict(1.4, [1.3, 1.5], limit=1.4) == "not measured: in most of the cells"
    maps = torch.zeros(6, 8, 7, 7)
    maps[..., 0, 0] = 1
    one = np.array(["a"] * 6, dtype=object)
    border, _ = shortcut_shares(maps, moving_clips(), np.zeros(6, int), ["cut"], one)
    assert border.ratio > 2.5
    assert border.verdict == "not measured: fewer than 2 patients"
    border, _ = shortcut_shares(maps, moving_clips(), np.zeros(6, int), ["cut"])
    assert border.verdict == "look"  # unknown patients: each clip counts by itself


def test_what_cannot_be_measured_is_told() -> None:
    clips = moving_clips(1)[:, :1].expand(6, 8, -1, -1, -1)  # six times one picture
    labels = np.array([0, 0, 0, 1, 1, 1])
    maps = torch.ones(6, 8, 7, 7)
    maps[3:] = -1
    shares = shortcut_shares(maps, clips, labels, ["cut", "a" * 50], PATIENTS)
    assert [s.verdict for s in shares] == [
        "no sign",
        "not measured: nothing changes",
        "no positive relevance",
        "no positive relevance",
    ]
    lines = shortcut_table(shares).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:6] == ["class", "region", "clips", "share", "area", "ratio"]
    assert lines[1].split()[:8] == ["cut", "border", "3", "29.4", "%", "29.4", "%", "1.00"]
    assert "-" in lines[2].split()
    assert "…" in lines[3]
    maps[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        shortcut_shares(maps, clips, labels, ["cut", "grasp"])
    with pytest.raises(ValueError, match="same clips"):
        shortcut_shares(maps[:5], clips, labels, ["cut", "grasp"])
