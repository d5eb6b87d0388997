"""What the film strip, the video and the table of an explained clip show."""

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import HOSTILE, LONG_NAMES, explained_clip
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from explanation.coloured_maps import (
    CAUTION,
    NOTHING,
    OUTLINE,
    YELLOW,
    chosen_frames,
    paint,
    positive_shares,
)
from explanation.overlay import (
    AGAINST,
    BACKGROUND,
    FOR,
    INK,
    MIN_WIDTH,
    Band,
    font,
    overlay_frames,
    wrap,
    write_overlay,
)
from explanation.pictures import HEADER, write_filmstrip, write_relevance
from explanation.relevance import ExplainedClip
from utils.tables import read_table
from video.container import decode, to_rgb

RED = (150, 40, 40)


def explained(
    count: int = 8, size: tuple[int, int] = (56, 56), grid: tuple[int, int] = (7, 7), **fields
) -> ExplainedClip:
    """A red clip in which cell (2, 4) of frame 3 of 8 is the most relevant one.

    The relevance of the frames rises from -1 to 1.
    """
    maps = np.full((count, *grid), -0.5, np.float32)
    maps[2 % count, 2 % grid[0], 4 % grid[1]] = 4
    maps[-1, 0, 0] = 1 if count > 1 else maps[-1, 0, 0]
    return explained_clip(maps, size, **({"name": "P058/clip.mp4"} | fields))


def silent(**fields) -> ExplainedClip:
    """A clip in which nothing is relevant."""
    clip = explained(**fields)
    return replace(clip, maps=clip.maps * 0, relevance=clip.relevance * 0)


# The map over a frame.


def test_the_share_is_that_of_the_maximum_of_the_whole_clip() -> None:
    shares = positive_shares(explained().maps)
    assert (shares[2, 2, 4], shares[7, 0, 0]) == (1, 0.25)
    assert shares.sum() == 1.25  # what speaks against has none


@pytest.mark.parametrize("maps", [np.zeros((2, 3, 3)), np.full((2, 3, 3), -1.0)])
def test_without_positive_relevance_the_frame_stays(maps: np.ndarray) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with np.errstate(all="raise"):
        shares = positive_shares(maps)
    assert np.array_equal(paint(frame, shares[0]), frame)


@pytest.mark.parametrize("colour", [RED, (0, 0, 0), (255, 255, 255), (0, 114, 178)])
def test_the_picture_differs_from_the_frame_over_the_relevant_cell(colour) -> None:
    frame = np.full((70, 70, 3), colour, np.uint8)
    shares = np.zeros((7, 7), np.float32)
    shares[2, 4] = 1
    change = np.abs(paint(frame, shares).astype(int) - frame).sum(axis=2)
    row, column = np.argwhere(change == change.max()).mean(axis=0)
    assert abs(row - 24.5) < 4 and abs(column - 44.5) < 4
    assert change[:12].max() == change[:, :32].max() == 0  # further than the next cell's middle
    yellow = np.argwhere((paint(frame, shares) == OUTLINE).all(axis=2))
    assert len(yellow) and np.abs(yellow - (24.5, 44.5)).max() < 7


def test_opacity_grows_with_relevance() -> None:
    frame = np.full((10, 10, 3), RED, np.uint8)
    changes = [
        np.abs(paint(frame, np.full((1, 1), share, np.float32)).astype(int) - frame).sum()
        for share in (0, 0.1, 0.4, 0.7, 1)
    ]
    assert changes[0] == 0 and np.all(np.diff(changes) > 0)


def test_a_fine_map_has_no_outline() -> None:
    shares = np.zeros((112, 112), np.float32)
    shares[50:60, 50:60] = 1
    picture = paint(np.full((112, 112, 3), RED, np.uint8), shares)
    assert not (picture == OUTLINE).all(axis=2).any()


def test_a_frame_that_is_relevant_everywhere_is_outlined() -> None:
    picture = paint(np.full((20, 30, 3), RED, np.uint8), np.ones((1, 1), np.float32))
    yellow = (picture == OUTLINE).all(axis=2)
    assert yellow.sum() == 2 * 20 + 2 * 30 - 4 and not yellow[1:-1, 1:-1].any()


def test_chosen_frames_are_even_and_hold_both_ends() -> None:
    assert chosen_frames(1, 32).tolist() == [0]
    assert chosen_frames(32, 32).tolist() == list(range(32))
    chosen = chosen_frames(1000, 32)
    assert len(chosen) == 32 and chosen[0] == 0 and chosen[-1] == 999
    assert np.ptp(np.diff(chosen)) <= 1


# The film strip.


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures, which are not written."""
    drawn: list[Figure] = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda figure, _: drawn.append(figure))
    yield drawn
    for figure in drawn:  # all texts and panels are inside, whatever is drawn
        figure.set_dpi(120)  # as it is saved
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        edges = figure.bbox.padded(1)
        for text in figure.texts:
            box = text.get_window_extent(canvas.get_renderer())
            assert edges.contains(*box.min) and edges.contains(*box.max), text.get_text()
        for axes in figure.axes:
            box = axes.get_tightbbox(canvas.get_renderer())
            assert edges.contains(*box.min) and edges.contains(*box.max)


def strip(figures: list[Figure], clip: ExplainedClip) -> tuple[list, list, str]:
    """The panels of pictures and of bars of a film strip, and its texts."""
    write_filmstrip(Path("x.png"), clip)
    pictures = [axes for axes in figures[-1].axes if axes.images and not axes.axison]
    bars = [axes for axes in figures[-1].axes if axes.get_ylabel() == "relevance"]
    return pictures, bars, " ".join(text.get_text() for text in figures[-1].texts)


def heights(bars: list) -> list[float]:
    return [float(bar.get_height()) for bar in bars[0].patches]


def test_frames_maps_and_bars_are_aligned(figures: list[Figure]) -> None:
    clip = explained(against="sew", label="sew")
    pictures, bars, texts = strip(figures, clip)
    assert len(pictures) == 16 and len(bars) == 1
    assert [axes.get_title() for axes in pictures[::2]] == [f"{n}" for n in range(1, 9)]
    for axes in pictures[::2]:
        assert (axes.images[0].get_array() == RED).all()
    for number, (plain, mapped) in enumerate(zip(pictures[::2], pictures[1::2], strict=True)):
        wanted = paint(clip.frames[number], positive_shares(clip.maps)[number])
        assert np.array_equal(mapped.images[0].get_array(), wanted)
        assert mapped.get_position().y1 <= plain.get_position().y0
        bar = bars[0].patches[number]
        across = bars[0].transData.transform((bar.get_x() + bar.get_width() / 2, 0))[0]
        assert across == pytest.approx(plain.bbox.x0 + plain.bbox.width / 2, abs=2)
    assert heights(bars) == pytest.approx(np.linspace(-1, 1, 8))
    assert bars[0].get_ylim()[0] < -1 and bars[0].get_ylim()[1] > 1
    assert [label.get_text() for label in bars[0].get_xticklabels()][:2] == ["0.00 s", "0.40 s"]
    assert "why cut and not sew" in texts and "Grad-CAM++" in texts and "P058" not in texts
    assert "predicted: cut, confidence 83%, which is wrong, true class: sew" in texts
    assert CAUTION in texts and YELLOW in texts and NOTHING not in texts
    assert "7 x 7 cells per frame" in texts


def test_the_written_picture_holds_the_map(tmp_path: Path) -> None:
    """Blue is where the map is, and nowhere else in the frames."""
    write_filmstrip(tmp_path / "x.png", explained())
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    red = np.argwhere((picture == RED).all(axis=2))
    (top, left), (bottom, right) = red.min(axis=0), red.max(axis=0)
    frames = picture[top:bottom, left:right]
    blue = frames[..., 2] - frames[..., 0]
    height, width = len(frames) / 2, (right - left) / 8
    row, column = np.argwhere(blue == blue.max()).mean(axis=0)
    assert column / width - 2 == pytest.approx(4.5 / 7, abs=0.1)  # in the third frame
    assert row / height - 1 == pytest.approx(2.5 / 7, abs=0.1)  # in the lower row
    assert blue[: int(height) - 4].max() <= 0  # of the plain frames, and white between them


def test_unknown_times_are_numbers_of_frames(figures: list[Figure]) -> None:
    _, bars, texts = strip(figures, explained(times=np.full(8, np.nan)))
    assert [label.get_text() for label in bars[0].get_xticklabels()] == list("12345678")
    assert "nan" not in texts and "true class unknown" in texts


def test_sixteen_frames_have_two_rows_with_one_scale(figures: list[Figure]) -> None:
    pictures, bars, _ = strip(figures, explained(16))
    assert len(pictures) == 32 and len(bars) == 2
    assert bars[0].get_ylim() == bars[1].get_ylim()
    assert bars[1].get_xlim() == (7.5, 15.5)


def test_of_a_long_clip_some_frames_are_shown_and_all_bars(figures: list[Figure]) -> None:
    pictures, bars, texts = strip(figures, explained(40))
    assert len(pictures) == 64 and len(bars) == 4
    assert "32 of the 40 frames are shown" in texts
    assert heights(bars) == pytest.approx(np.linspace(-1, 1, 40))
    x = [bar.get_x() + bar.get_width() / 2 for bar in bars[0].patches]
    assert [round(x[index]) for index in chosen_frames(40, 32)] == list(range(32))
    gaps = np.diff([bar.get_x() for bar in bars[0].patches])
    assert gaps.min() > bars[0].patches[0].get_width()  # no bar hides another one
    # Each is in the row in which its frame would be.
    inside = sum(np.sum((axes.get_xlim()[0] < x) & (x < axes.get_xlim()[1])) for axes in bars)
    assert inside == 40


def test_nothing_relevant_is_said(figures: list[Figure]) -> None:
    with np.errstate(all="raise"):
        _, bars, texts = strip(figures, silent())
    assert NOTHING in texts and "The relevance of every frame is 0." in texts
    assert heights(bars) == [0] * 8
    assert len(figures[0].axes) == 17  # without the bar of colours


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize(
    ("size", "grid"), [((1, 40), (1, 1)), ((40, 1), (7, 1)), ((300, 20), (1, 7))]
)
def test_any_shape_is_drawn(count: int, size, grid, figures: list[Figure]) -> None:
    pictures, *_ = strip(figures, explained(count, size, grid))
    assert len(pictures) == 2 * count
    assert pictures[0].images[0].get_array().shape == (*size, 3)


@pytest.mark.parametrize(
    "name", [*HOSTILE, *LONG_NAMES, "$x$ {0} %s", "手術 🔪", "=1+1", "W" * 300]
)
def test_any_name_is_text_inside_the_picture(name: str, figures: list[Figure]) -> None:
    clip = explained(1, predicted=name, explained=name, against=name + "!", label=name + "?")
    strip(figures, clip)


# The video.


def read(path: Path) -> list[np.ndarray]:
    return [to_rgb(frame, None) for frame in decode(path, 0)]


def is_near(pixels: np.ndarray, colour, tolerance: int = 60) -> np.ndarray:
    return np.abs(pixels.astype(int) - colour).max(axis=-1) < tolerance


def test_the_video_has_the_bars_and_the_playhead(tmp_path: Path) -> None:
    clip = explained()
    write_overlay(tmp_path / "x.mp4", clip, 2.5)
    frames = read(tmp_path / "x.mp4")
    assert len(frames) == 8
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].average_rate == 2.5
    width = 9 * 56  # enlarged, so that the text has room
    band = Band(clip, width)
    assert frames[0].shape == (9 * 56 + band.height, width, 3)
    for number, frame in enumerate(frames):
        strip = frame[9 * 56 + band.strip_top :][: band.strip_height]
        heads, values = [], []
        for other in range(8):
            start, end = band.columns(other)
            middle = strip[:, (start + end) // 2]
            up, down = is_near(middle, FOR).sum(), is_near(middle, AGAINST).sum()
            values.append(up - down)
            heads.append(is_near(strip[0, start + 4 : end - 4], INK).all())
        assert np.array(values) / np.ptp(values) * 2 == pytest.approx(clip.relevance, abs=0.12)
        assert heads == [other == number for other in range(8)]


def test_the_bars_are_exact_to_the_pixel() -> None:
    clip = explained(4, relevance=np.array([0.5, 1, 0, -0.25], np.float32))
    band = Band(clip, 480)
    columns = [band.strip[:, sum(band.columns(number)) // 2] for number in range(4)]
    ups = [(column == FOR).all(axis=1).sum() for column in columns]
    downs = [(column == AGAINST).all(axis=1).sum() for column in columns]
    assert np.array(ups[:2]) / ups[1] == pytest.approx([0.5, 1], abs=0.03)
    assert ups[2:] == [0, 0] and downs[:3] == [0, 0, 0]
    assert (downs[3] + 1) / ups[1] == pytest.approx(0.25, abs=0.04)  # the axis covers a pixel


def test_the_map_is_over_the_frames_of_the_video() -> None:
    frames = list(overlay_frames(explained()))
    picture = frames[2][: 9 * 56].astype(int)
    change = np.abs(picture - RED).sum(axis=2)
    row, column = np.argwhere(change == change.max()).mean(axis=0)
    assert row / 504 == pytest.approx(2.5 / 7, abs=0.09)
    assert column / 504 == pytest.approx(4.5 / 7, abs=0.09)
    assert (frames[0][: 9 * 56] == RED).all()


@pytest.mark.parametrize("count", [1, 40, 700])
@pytest.mark.parametrize("size", [(1, 33), (33, 1), (31, 57)])
def test_any_video_has_even_sides(count: int, size: tuple[int, int]) -> None:
    clip = explained(count, size, (1, 1), times=np.full(count, np.nan))
    frames = [frame for frame, _ in zip(overlay_frames(clip), range(2), strict=False)]
    assert len({frame.shape for frame in frames}) == 1
    height, width, _ = frames[0].shape
    assert height % 2 == width % 2 == 0 and width >= MIN_WIDTH and height < 1600


def test_a_video_without_relevance_says_so() -> None:
    with np.errstate(all="raise"):
        frame = next(overlay_frames(silent()))
    band = Band(silent(), 504)
    assert (frame[:504] == RED).all()
    bars = band.strip.reshape(-1, 3)
    assert {tuple(colour) for colour in np.unique(bars, axis=0).tolist()} == {BACKGROUND, INK}
    assert band.height > Band(explained(), 504).height  # one more line


@pytest.mark.parametrize("text", [*HOSTILE, *LONG_NAMES, "x " * 200, "手術 🔪", ""])
def test_lines_fit_and_hold_all_letters(text: str) -> None:
    used = font(15)
    lines = wrap(text, 200, used)
    assert max(used.getlength(line) for line in lines) <= 200
    if "手" not in text:
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


# The table.


def test_the_table_holds_every_frame_of_every_clip(tmp_path: Path) -> None:
    second = explained(
        1, times=np.array([math.nan]), explained="sew", against="cut", label="cut", method="rollout"
    )
    write_relevance(tmp_path / "x.csv", [explained(2, label="sew"), second])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == HEADER
    same = ["cut", "", "cut", "0.83", "sew", "0", "gradcam++"]
    assert rows == [
        ["1", "P058/clip.mp4", "1", "0.000", "-1", *same],
        ["1", "P058/clip.mp4", "2", "0.400", "1", *same],
        ["2", "P058/clip.mp4", "1", "", "-1", "sew", "cut", "cut", "0.83", "cut", "1", "rollout"],
    ]


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "@x", "+1", "../../etc", "<script>", 'a,"b"\n'])
def test_hostile_names_are_no_formulas_and_come_back(name: str, tmp_path: Path) -> None:
    fields = dict.fromkeys(("name", "predicted", "explained", "against", "label"), name)
    write_relevance(tmp_path / "x.csv", [explained(1, **fields)])
    text = (tmp_path / "x.csv").read_text()
    if name[0] in "=@":
        assert f"'{name}" in text and f",{name}" not in text
    ((_, record),) = read_table(tmp_path / "x.csv").records()
    assert {record[field] for field in fields} == {name}
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
