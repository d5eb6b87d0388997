"""explanation.html: what it holds and hides, and how it works in a real browser."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    CUT_TEXTS,
    HOSTILE,
    LONG_NAMES,
    PALE_TEXTS,
    UNNAMED,
    WIDTHS,
    explained_clip,
    scene,
)
from PIL import Image

from explanation.coloured_maps import BLUE, CAUTION, NOTHING, YELLOW
from explanation.relevance import ExplainedClip
from web.explanation_page import build_explanation_page, write_explanation_page


def explained(count: int = 4, size: tuple[int, int] = (48, 64), **fields) -> ExplainedClip:
    """A red clip; a cell of its second frame is the most relevant one."""
    maps = np.full((count, 7, 7), -0.5, np.float32)
    maps[1 % count, 2, 4] = 2
    return explained_clip(maps, size, **fields)


CLIPS = [  # right, wrong, unknown, right
    explained(confidence=0.7, label="cut"),
    explained(confidence=0.9, label="sew", against="sew"),
    explained(confidence=0.4, explained="look", probability=0.12),
    explained(confidence=0.8, label="cut", method="occlusion", times=np.full(4, np.nan)),
]


def pictures(page: str) -> list[np.ndarray]:
    """The pictures of a page: a frame, its map, the next frame, and so on."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_frames_and_maps_are_on_the_page() -> None:
    film = pictures(build_explanation_page([explained()]))
    assert [image.shape for image in film] == [(128, 171, 3)] * 8
    changes = [
        np.abs(mapped.astype(int) - frame).sum(axis=2)
        for frame, mapped in zip(film[::2], film[1::2], strict=True)
    ]
    assert [change.max() > 100 for change in changes] == [False, True, False, False]
    row, column = np.argwhere(changes[1] > 0.8 * changes[1].max()).mean(axis=0)
    assert row / 128 == pytest.approx(2.5 / 7, abs=0.06)
    assert column / 171 == pytest.approx(4.5 / 7, abs=0.06)


def test_the_page_says_what_it_shows_and_what_it_does_not_mean() -> None:
    page = build_explanation_page(CLIPS, metadata={"device": "cpu"}).replace("&#39;", "'")
    for text in (CAUTION, BLUE, YELLOW, "Confidential", "images of patients", "probability 12.0"):
        assert text in page
    assert NOTHING not in page
    assert "Grad-CAM++ and occlusion" in page
    assert "nan" not in re.sub("base64,[^\"']+", "", page).lower()
    assert page.count("<polyline") == 8  # the curve and the line at 0
    assert "Relevance of each of 4 frames, the highest in frame 4" in page
    silent = replace(CLIPS[0], maps=CLIPS[0].maps * 0, relevance=CLIPS[0].relevance * 0)
    page = build_explanation_page([silent])
    assert NOTHING in page and "0 in all of them" in page


def test_names_are_shown_only_if_asked_for() -> None:
    metadata = {"command": "explain.py --clips data/P058/VID12_0003.mp4 'VID12_0003' --x P058"}
    page = build_explanation_page(CLIPS, metadata=metadata)
    assert "VID12" not in page and "P058" not in page and "names of clips" not in page
    assert re.findall(r"<bdi>(.*?)</bdi>", page) == [f"clip {n}" for n in (1, 2, 3, 4)]
    page = build_explanation_page(CLIPS, with_names=True, metadata=metadata)
    assert "<bdi>clip 1: data/P058/VID12_0003.mp4</bdi>" in page and "names of clips" in page
    assert "--x P058" in re.sub("<[^>]+>", "", page)


def test_patients_and_folders_far_above_the_clips_are_hidden() -> None:
    clip = explained(name="/mnt/Kovacs-031/left/videos/VID12_0003.mp4")
    command = "explain.py runs/a /mnt/Kovacs-031/left/videos --csv Nagy.csv --html"
    page = build_explanation_page([clip], False, {"command": command}, ["Nagy"])
    assert "Kovacs" not in page and "Nagy" not in page
    assert "explain.py runs/a" in page and "--html" in page
    page = build_explanation_page([clip], True, {"command": command}, ["Nagy"])
    assert "Kovacs" in page and "Nagy" in page


def test_a_page_of_a_hundred_clips_is_small() -> None:
    """With frames of as much detail as those of a camera, and some noise."""
    noise = np.random.default_rng(0).normal(0, 3, (32, 224, 224, 3))
    frames = np.clip(scene(224, 224) + noise, 0, 255).astype(np.uint8)
    clip = explained(32, frames=frames)
    page = build_explanation_page([clip])
    assert page.count("<figcaption>") == 16
    assert "32, of which 16 are shown, evenly chosen" in page
    per_clip = len(build_explanation_page([clip] * 2)) - len(page)
    assert len(page) + 99 * per_clip < 30e6


def test_of_many_clips_there_are_fewer_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.explanation_page.FRAMES_ON_PAGE", 30)
    for count, shown in ((1, 16), (2, 15), (3, 10), (20, 4)):
        page = build_explanation_page([explained(16, (8, 8))] * count)
        assert page.count("<figcaption>") == count * shown


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (500, 20)])
@pytest.mark.parametrize("count", [1, 40])
def test_any_shape_has_pictures(size: tuple[int, int], count: int) -> None:
    film = pictures(build_explanation_page([explained(count, size)]))
    assert len(film) == 2 * min(count, 16)
    assert all(image.shape[0] <= 128 and image.shape[1] <= 192 for image in film)


def test_names_stay_text(tmp_path: Path) -> None:
    for name in (*HOSTILE, "../../x", "=1+1", "</script>", "\udcff.mp4"):
        names = dict.fromkeys(("name", "predicted", "explained", "against", "label"), name)
        write_explanation_page(tmp_path / "x.html", [explained(1, **names)], True, {name: name})
        page = (tmp_path / "x.html").read_text(encoding="utf-8")
        assert page.count("<script") == page.count("</script>") == 1
        assert page.count("<img") == 2
        assert "http:" not in page and "https:" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


# In a browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explanation page") / "explanation.html"
    write_explanation_page(path, CLIPS, metadata={"command": "explain.py <x>"})
    return path


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Open a page; at the end there must be no other request and no console message."""
    contexts, messages, requests, allowed = [], [], [], set()

    def visit(path: Path, width: int = 1280, **settings: object):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        allowed.add(path.as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert messages == []
    assert {url for url in requests if not url.startswith("data:image/jpeg")} <= allowed


def listed(tab) -> list[int]:
    """The numbers of the clips that are shown, in their order."""
    return [int(text.split()[1]) for text in tab.locator(".clip:visible h3").all_inner_texts()]


def test_clips_are_sorted(visit, page: Path) -> None:
    tab = visit(page)
    assert listed(tab) == [1, 2, 3, 4]
    orders = {
        "highest confidence first": [2, 4, 1, 3],
        "lowest confidence first": [3, 1, 4, 2],
        "wrong ones first": [2, 4, 1, 3],
        "right ones first": [4, 1, 2, 3],
        "as given": [1, 2, 3, 4],
    }
    choice = tab.get_by_label("Order")
    for name, order in orders.items():
        choice.select_option(label=name)
        assert listed(tab) == order, name


def test_clips_are_filtered_and_stay_sorted(visit, page: Path) -> None:
    tab = visit(page, 390)
    tab.get_by_label("Order").select_option("high")
    for name, order in {"Right": [4, 1], "Wrong": [2], "True class unknown": [3]}.items():
        button = tab.get_by_role("button", name=name, exact=True)
        button.focus()
        tab.keyboard.press("Enter")
        assert listed(tab) == order
        assert button.get_attribute("aria-pressed") == "true"
        assert tab.locator("[aria-pressed=true]").count() == 1
        assert tab.locator("[role=status]").inner_text() == f"{len(order)} of 4 clips shown"
    tab.get_by_role("button", name="All", exact=True).click()
    assert listed(tab) == [2, 4, 1, 3]


def test_a_filter_that_leaves_nothing_says_so(visit, tmp_path: Path) -> None:
    write_explanation_page(tmp_path / "x.html", [CLIPS[0]] * 2)
    tab = visit(tmp_path / "x.html")
    assert tab.get_by_role("button", name="True class unknown").count() == 0
    tab.get_by_role("button", name="Wrong", exact=True).click()
    assert listed(tab) == []
    assert tab.locator("#none").is_visible()


def test_it_works_without_javascript(visit, page: Path) -> None:
    tab = visit(page, java_script_enabled=False)
    assert listed(tab) == [1, 2, 3, 4]
    assert not tab.locator("#tools").is_visible()


@pytest.mark.parametrize("clips", [[], CLIPS[:1]], ids=["none", "one"])
def test_few_clips_need_no_order(visit, tmp_path: Path, clips: list[ExplainedClip]) -> None:
    write_explanation_page(tmp_path / "x.html", clips)
    tab = visit(tmp_path / "x.html")
    assert tab.locator("#tools").count() == 0
    assert tab.get_by_text("There is no clip.").count() == (not clips)


def hostile_clips() -> list[ExplainedClip]:
    names = [*HOSTILE, *LONG_NAMES]
    return [
        explained(
            9, name=name, predicted=name, explained=name, against=names[n - 1],
            label=names[n - 1] if n % 3 else "", relevance=np.linspace(-1e-7, 3e-7, 9),
        )
        for n, name in enumerate(names)
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_is_readable_and_nothing_overflows(visit, tmp_path: Path, scheme: str) -> None:
    write_explanation_page(tmp_path / "x.html", hostile_clips(), True, {"command": "b" * 90})
    tab = visit(tmp_path / "x.html", color_scheme=scheme)
    tab.click("footer summary")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate(CUT_TEXTS, None) == [], width
        seen, pale = tab.evaluate(PALE_TEXTS)
        assert seen > 200
        assert pale == []
    loaded = "[...document.images].every(image => image.complete && image.naturalHeight == 128)"
    assert tab.evaluate(loaded)
    assert tab.evaluate(UNNAMED) == []
    assert tab.locator(".why").nth(1).inner_text() == f"Why {HOSTILE[1]} and not {HOSTILE[0]}?"


def test_the_printed_page_holds_all_clips(visit, page: Path) -> None:
    tab = visit(page)
    tab.emulate_media(media="print", color_scheme="dark")
    tab.set_viewport_size({"width": 690, "height": 1000})
    assert listed(tab) == [1, 2, 3, 4]
    assert not tab.locator("#tools").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
