"""timeline.html in a real browser, with a real video beside it."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import CUT_TEXTS, LONG_NAMES, PALE_TEXTS, UNNAMED, WIDTHS

from clips.manifest import CLASSES, NON_CLASS_LABELS, OUT_OF_BODY, UNCERTAIN, UNREADABLE
from timeline.output import MAX_BINS, NO_PREDICTION, bin_probabilities
from timeline.relevance import SegmentRelevance
from timeline.segments import (
    Segment,
    Timeline,
    read_timeline,
)
from video.encoder import write_video
from web.timeline_page import build_timeline_page, write_timeline_page

VIDEO = """my op #1? 50% & "q" it's é.mp4"""
QUOTED = '"' + VIDEO.replace('"', '""') + '"'
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=1+1",
    "+x",
    "-y",
    "@z",
    'a,"b"',
    "<!--",
    "{{7*7}}",
    "Ångström",
)
PARTS = [  # ten seconds
    Segment(0.0, 2.0, "cut", 0.91),
    Segment(2.0, 3.0, UNCERTAIN, 0.4),
    Segment(3.0, 5.0, "sew", 0.8),
    Segment(5.0, 6.0, UNREADABLE),
    Segment(6.0, 7.5, "cut", 0.75),
    Segment(7.5, 10.0, "look", 0.66),
]


def make_timeline(
    segments: list[Segment] = PARTS, classes: tuple[str, ...] = ("cut", "sew", "look")
) -> Timeline:
    """16 predictions per second that agree with the segments; none where it is unreadable."""
    duration = segments[-1].end
    times = np.arange(0, duration, 1 / 16)
    probabilities = np.full((len(times), len(classes)), 1 / len(classes))
    for segment in segments:
        inside = (times >= segment.start) & (times < segment.end)
        if segment.label in classes:
            probabilities[inside] = 0.1 / max(1, len(classes) - 1)
            probabilities[inside, classes.index(segment.label)] = 0.9
        if segment.label == UNREADABLE:
            probabilities[inside] = np.nan
    known = np.isfinite(probabilities[:, 0])
    return Timeline(
        "Operation 17",
        classes,
        duration,
        segments,
        times[known],
        probabilities[known],
        ["From 0:05 to 0:06 the video is damaged."],
    )


def make_long() -> Timeline:
    """Three hours in 5,000 segments of seven classes."""
    rng = np.random.default_rng(0)
    edges = [0, *np.sort(rng.choice(np.arange(1, 10_800_000), 4999, replace=False)) / 1000, 10800]
    segments = [
        Segment(start, end, CLASSES[number % 7], float(rng.uniform(0.5, 1)))
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    ]
    probabilities = rng.dirichlet(np.ones(7), 172_800)
    return Timeline("long", CLASSES, 10800, segments, np.arange(172_800) / 16, probabilities)


def test_a_bin_is_the_mean_of_its_predictions() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(3), 4 * MAX_BINS)
    curves = bin_probabilities(np.arange(4 * MAX_BINS) / 16, probabilities, MAX_BINS / 4)
    assert curves.dtype == np.uint8
    means = probabilities.reshape(MAX_BINS, 4, 3).mean(axis=1)
    assert np.array_equal(curves, np.round(254 * means))


def test_a_prediction_holds_until_the_next_is_due() -> None:
    times = np.array([1.0, 2.05, 2.95, 4.0, 8.0, 9.0, 10.0])
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.8, np.nan, 0.9])
    curves = bin_probabilities(times, np.stack([values, 1 - values], axis=1), 12.0)
    shown = [
        None if value == NO_PREDICTION else round(float(value) / 254, 2) for value in curves[:, 0]
    ]
    # Bin 2 has two predictions; bin 3 holds the second one; bin 7 lies in the gap.
    assert shown == [None, 0.1, 0.25, 0.3, 0.4, 0.4, 0.4, None, 0.8, 0.8, 0.9, 0.9]


def test_a_model_that_becomes_slower_leaves_no_holes() -> None:
    times = np.concatenate([np.arange(0, 100, 0.04), np.arange(100, 120, 0.2), [130, 130.2]])
    curves = bin_probabilities(times, np.ones((len(times), 1)), 131.0)
    starts = np.arange(len(curves)) * 131.0 / len(curves)
    is_known = curves[:, 0] != NO_PREDICTION
    assert is_known[starts < 120].all()
    assert not is_known[(starts > 120.4) & (starts < 129.9)].any()


@pytest.mark.parametrize("number", [0, 1])
def test_curves_of_few_predictions(number: int) -> None:
    curves = bin_probabilities(np.zeros(number), np.ones((number, 2)), 5.0)
    assert curves.tolist() == [[254, 254]] * number


def test_a_long_page_is_small() -> None:
    assert len(build_timeline_page(make_long(), "x.mp4").encode()) < 600_000
    classes = tuple(f"class {number}" for number in range(100))
    many = Timeline("", classes, 9000, [], np.arange(90_000) / 10, np.full((90_000, 100), 0.01))
    assert len(build_timeline_page(many, None).encode()) < 1_000_000


def test_names_stay_inside_the_data(tmp_path: Path) -> None:
    segments = [Segment(n, n + 1, name, 0.5) for n, name in enumerate(HOSTILE)]
    timeline = replace(make_timeline(segments, HOSTILE), name=HOSTILE[0], notes=list(HOSTILE))
    page = build_timeline_page(timeline, None, {HOSTILE[0]: HOSTILE[1]})
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    inside = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(inside)["labels"][: len(HOSTILE)] == list(HOSTILE)
    assert "http:" not in page
    assert "https:" not in page.replace("// Okabe and Ito, https://jfly.uni-koeln.de", "")


# In a browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page in a folder beside a video of ten seconds."""
    root = tmp_path_factory.mktemp("timeline page")
    frames = np.zeros((250, 48, 64, 3), np.uint8)
    frames[:, 10:30, 10:50] = np.arange(250, dtype=np.uint8)[:, None, None, None]
    write_video(root / VIDEO, frames)
    (root / "results").mkdir()
    path = root / "results" / "timeline.html"
    write_timeline_page(path, make_timeline(), root / VIDEO, {"command": "predict.py <op>"})
    return path


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Open a page; at the end there must be no other request and no console message."""
    contexts, messages, requests, allowed = [], [], [], set()

    def visit(path: Path, width: int = 1280, complaints: bool = False, **settings: object):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        if not complaints:
            tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        allowed.add(path.as_uri())
        allowed.update(tab.evaluate("[...document.querySelectorAll('video')].map(v => v.src)"))
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert messages == []
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} <= allowed


def wait_until(tab, expression: str) -> None:
    """Like tab.wait_for_function, which uses eval and is forbidden by the policy of the page."""
    for _ in range(200):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(25)
    raise AssertionError(f"never: {expression}")


def ready(tab) -> None:
    wait_until(tab, "document.querySelector('video').readyState >= 2")


def tick(tab, name: str):
    return tab.get_by_label(name, exact=True)


def time_of(tab) -> float:
    return tab.evaluate("document.querySelector('video').currentTime")


def press(tab, *keys: str) -> list[float]:
    """The time of the video after each key."""
    times = []
    for key in keys:
        tab.keyboard.press(key)
        times.append(time_of(tab))
    return times


def click_at(tab, selector: str, fraction: float) -> None:
    """Click on a canvas, at a fraction of its width."""
    tab.locator(selector).scroll_into_view_if_needed()
    box = tab.locator(selector).bounding_box()
    tab.mouse.click(box["x"] + fraction * box["width"], box["y"] + box["height"] / 2)


def totals(tab) -> list[str]:
    rows = tab.locator("#totals-body tr:visible").all_inner_texts()
    return [" ".join(row.split()) for row in rows]


def listed(tab) -> list[int]:
    return [int(text) for text in tab.locator("#rows .number").all_inner_texts()]


def export(tab, folder: Path) -> tuple[str, list[Segment]]:
    with tab.expect_download() as waiting:
        tab.click("#export")
    assert waiting.value.suggested_filename == "timeline_corrected.csv"
    waiting.value.save_as(folder / "exported.csv")
    text = (folder / "exported.csv").read_bytes().decode()
    ((name, segments),) = read_timeline(folder / "exported.csv").items()
    assert name in (VIDEO, "")
    return text, segments


def test_the_video_plays_and_everything_seeks(visit, page: Path) -> None:
    tab = visit(page)
    ready(tab)
    assert tab.evaluate("document.querySelector('video').videoWidth") == 64
    assert not tab.locator("#missing").is_visible()
    tab.click("[data-number='2'] .go")
    assert time_of(tab) == 3
    assert tab.inner_text("#now") == "sew, 80\u00a0% sure"
    assert tab.locator("[data-number='2']").get_attribute("aria-current") == "true"
    click_at(tab, "#actions", 0.65)
    assert time_of(tab) == pytest.approx(6.5, abs=0.05)
    click_at(tab, ".curve:nth-child(2) canvas", 0.25)
    assert time_of(tab) == pytest.approx(2.5, abs=0.05)
    assert tab.inner_text(".curve:nth-child(1) .value") == "33\u00a0%"
    click_at(tab, "#overview", 0.1)
    assert time_of(tab) == pytest.approx(1, abs=0.05)
    slider = tab.locator("#slider")
    assert slider.get_attribute("aria-valuetext") == "0:01, cut, 91\u00a0% sure"
    left = tab.locator("#slider .playhead").bounding_box()["x"]
    lane = tab.locator("#actions").bounding_box()
    assert left == pytest.approx(lane["x"] + 0.1 * lane["width"], abs=2)
    assert tab.locator("[role=note]").inner_text() == "From 0:05 to 0:06 the video is damaged."
    assert "Not a medical device" in tab.inner_text("footer")
    tab.click("footer summary")
    assert "predict.py <op>" in tab.inner_text("footer")


def test_the_keyboard_does_it_all(visit, page: Path) -> None:
    tab = visit(page)
    ready(tab)
    assert press(tab, "n", "]", "ArrowRight", "N") == [2, 3, 5, 6]
    assert press(tab, "p", "[", "ArrowLeft") == [5, 3, 2]
    assert press(tab, "Shift+ArrowRight", "Shift+ArrowLeft") == [3, 2]
    assert press(tab, "Shift+ArrowLeft", "p", "p", "p") == [1, 0, 0, 0]
    tab.focus("#slider")
    assert press(tab, "End", "Home") == [10, 0]
    tab.keyboard.press(" ")
    wait_until(tab, "document.querySelector('video').currentTime > 0.2")
    tab.keyboard.press(" ")
    assert tab.evaluate("document.querySelector('video').paused")
    shown = "document.querySelector('#range').textContent"
    for keys, words in (("++", "Shown: 0:00 to 0:02"), ("-", "Shown: 0:00 to 0:05"), ("0", "")):
        press(tab, *keys)
        wait_until(tab, f"{shown} === '{words}'")
    # The keys do nothing while somebody chooses from a list.
    tab.focus("[data-number='0'] select")
    now = time_of(tab)
    assert press(tab, "n", "]", "0") == [now] * 3
    tab.evaluate("document.activeElement.blur()")
    tab.click("#help summary")
    tab.uncheck("#shortcuts")
    assert press(tab, "n", "]") == [now] * 2
    tab.focus("video")
    tab.check("#shortcuts")
    assert press(tab, "n") == [2]


def test_the_filter_hides_and_is_skipped(visit, page: Path) -> None:
    tab = visit(page)
    ready(tab)
    pixel = """share => {
      const canvas = document.querySelector('#actions');
      const ctx = document.createElement('canvas').getContext('2d');
      ctx.drawImage(canvas, -share * canvas.width, -8);
      return [...ctx.getImageData(0, 0, 1, 1).data];
    }"""
    wait_until(tab, f"({pixel})(0.1)[3] === 255")
    tick(tab, "cut").uncheck()
    tick(tab, "uncertain").uncheck()
    assert listed(tab) == [3, 4, 6]
    wait_until(tab, f"({pixel})(0.1)[3] < 100")
    assert tab.evaluate(pixel, 0.4)[3] == 255
    assert tab.locator(".curve:visible .name").all_inner_texts() == ["sew", "look"]
    assert press(tab, "n", "n", "n", "n") == [3, 5, 7.5, 7.5]
    assert press(tab, "p", "p", "p") == [5, 3, 3]
    tab.click("#hide-all")
    assert tab.locator("#none").is_visible()
    assert press(tab, "n", "p") == [3, 3]
    tab.click("#show-all")
    assert listed(tab) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("width", [390, 1280])
def test_corrections_are_counted_exported_and_undone(
    visit, page: Path, tmp_path: Path, width: int
) -> None:
    tab = visit(page, width)
    before = [
        "cut 2 0:03.5 35.0 %",
        "sew 1 0:02.0 20.0 %",
        "look 1 0:02.5 25.0 %",
        "uncertain 1 0:01.0 10.0 %",
        "unreadable 1 0:01.0 10.0 %",
    ]
    assert totals(tab) == before
    text, back = export(tab, tmp_path)
    assert text.startswith(
        f"start,end,label,confidence,corrected_from,video\r\n0.000,2.000,cut,0.9100,,{QUOTED}\r\n"
    )
    assert str(back) == str(PARTS)
    assert tab.inner_text("#saved") == ""

    tab.select_option("[data-number='1'] select", label="sew")
    tab.select_option("[data-number='5'] select", label="out of body")
    assert totals(tab) == [
        before[0],
        "sew 2 0:03.0 30.0 %",
        "look 0 0:00.0 0.0 %",
        before[4],
        "out of body 1 0:02.5 25.0 %",
    ]
    assert tab.inner_text("#saved") == "2 segments corrected, not exported yet."
    text, back = export(tab, tmp_path)
    assert f"\r\n2.000,3.000,sew,,uncertain,{QUOTED}\r\n" in text
    assert [segment.label for segment in back] == [
        "cut",
        "sew",
        "sew",
        "unreadable",
        "cut",
        OUT_OF_BODY,
    ]
    assert math.isnan(back[1].confidence)
    assert tab.inner_text("#saved") == "2 segments corrected, exported."

    assert tab.locator(".restore:visible").all_inner_texts() == ["uncertain", "look"]
    tab.click("[data-number='1'] .restore")
    assert tab.locator(".corrected .number").all_inner_texts() == ["6"]
    tab.click("#reset")
    assert totals(tab) == before
    tab.keyboard.press("Control+z")
    tab.click("#undo")
    assert tab.locator(".corrected .number").all_inner_texts() == ["2", "6"]
    assert tab.inner_text("#saved") == "2 segments corrected, exported."
    for _ in range(2):
        tab.click("#undo")
    assert totals(tab) == before
    assert tab.locator("#undo").is_disabled()


def test_a_label_that_is_hidden_is_shown_when_it_is_chosen(visit, page: Path) -> None:
    tab = visit(page)
    tick(tab, "look").uncheck()
    tab.select_option("[data-number='1'] select", label="look")
    assert listed(tab) == [1, 2, 3, 4, 5, 6]
    assert tick(tab, "look").is_checked()


def test_corrections_are_not_lost_by_accident(visit, page: Path, tmp_path: Path) -> None:
    tab = visit(page)
    asked = []
    tab.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    tab.click("[data-number='1'] .go")
    tab.select_option("[data-number='1'] select", label="sew")
    with tab.expect_event("dialog"):
        tab.close(run_before_unload=True)
    assert asked == ["beforeunload"]
    export(tab, tmp_path)
    with tab.expect_event("close"):
        tab.close(run_before_unload=True)
    assert asked == ["beforeunload"]


def test_hostile_names_are_text_and_come_back(visit, tmp_path: Path) -> None:
    segments = [Segment(n, n + 1, name, 0.5) for n, name in enumerate(HOSTILE)]
    timeline = replace(make_timeline(segments, HOSTILE), name=HOSTILE[0], notes=list(HOSTILE))
    write_timeline_page(tmp_path / "x.html", timeline, None, {HOSTILE[0]: HOSTILE[1]})
    tab = visit(tmp_path / "x.html")
    asked = []
    tab.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    assert tab.inner_text("h1") == HOSTILE[0]
    assert tab.locator("#totals-body .name:visible").all_inner_texts() == list(HOSTILE)
    assert tab.evaluate("document.images.length + document.scripts.length") == 2
    for number in range(len(HOSTILE)):  # each becomes the next one
        choice = f"[data-number='{number}'] select"
        tab.select_option(choice, label=HOSTILE[(number + 1) % len(HOSTILE)])
    text, back = export(tab, tmp_path)
    assert [segment.label for segment in back] == [*HOSTILE[1:], HOSTILE[0]]
    assert '\r\n5.000,6.000,"a,""b""",,\'@z,\r\n' in text
    assert not re.search(r"^[=@]|[,\n][=@]", text)
    assert asked == []


@pytest.mark.parametrize("content", [None, b"no video" * 100])
def test_without_its_video_the_rest_works(visit, tmp_path: Path, content: bytes | None) -> None:
    video = tmp_path / "gone op.mp4"
    if content:
        video.write_bytes(content)
    write_timeline_page(tmp_path / "x.html", make_timeline(), video)
    tab = visit(tmp_path / "x.html", complaints=True)
    tab.wait_for_selector("#missing")
    assert "It is looked for at gone op.mp4," in tab.inner_text("#missing")
    assert not tab.locator("video").is_visible()
    tab.click("[data-number='2'] .go")
    assert tab.inner_text("#clock") == "0:03 of 0:10"
    press_and_read(tab, "n", "0:05 of 0:10")


def press_and_read(tab, key: str, words: str) -> None:
    tab.keyboard.press(key)
    assert tab.inner_text("#clock") == words


def test_a_live_stream_has_no_player(visit, tmp_path: Path) -> None:
    write_timeline_page(tmp_path / "x.html", make_timeline(), None)
    tab = visit(tmp_path / "x.html")
    assert tab.locator("video").count() == 0
    press_and_read(tab, "n", "0:02 of 0:10")
    press_and_read(tab, " ", "0:02 of 0:10")
    click_at(tab, "#actions", 0.7)
    assert tab.inner_text("#now") == "cut, 75\u00a0% sure"


def test_a_stream_that_never_came(visit, tmp_path: Path) -> None:
    empty = Timeline("nothing", ("a", "b"), 0.0, [], np.empty(0), np.empty((0, 2)))
    write_timeline_page(tmp_path / "x.html", empty, None)
    tab = visit(tmp_path / "x.html")
    assert tab.inner_text("#now") == "No prediction"
    assert tab.locator("#none").is_visible()


def test_hours_are_loaded_and_zoomed(visit, tmp_path: Path) -> None:
    long = make_long()
    write_timeline_page(tmp_path / "x.html", long, None)
    tab = visit(tmp_path / "x.html", has_touch=True)
    assert tab.locator("#rows > *").count() < 60
    tab.evaluate("document.querySelector('#list').scrollTop = 1e9")
    tab.wait_for_selector("[data-number='4999']")
    assert tab.locator("#rows > *").count() < 60
    shown = "document.querySelector('#range').textContent"

    tab.locator("#actions").scroll_into_view_if_needed()
    box = tab.locator("#actions").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 20
    tab.mouse.move(x, y)
    assert tab.inner_text("#tip").startswith("1:30:0")
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -300)
    tab.keyboard.up("Control")
    wait_until(tab, f"{shown} !== ''")
    zoomed = tab.inner_text("#range")
    tab.mouse.down()
    tab.mouse.move(x - 200, y, steps=4)
    tab.mouse.up()
    wait_until(tab, f"{shown} !== '{zoomed}'")
    assert tab.inner_text("#clock") == "0:00:00 of 3:00:00"  # a drag is not a click
    tab.click("#zoom-whole")
    wait_until(tab, f"{shown} === ''")

    touch = tab.context.new_cdp_session(tab)
    for kind, apart in (("touchStart", 50), ("touchMove", 100), ("touchMove", 200)):
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wait_until(tab, f"{shown}.startsWith('Shown: 1:07:')")  # a quarter, around the middle
    assert tab.inner_text("#clock") == "0:00:00 of 3:00:00"
    drawing = tab.evaluate("""async () => {
      const frame = () => new Promise(requestAnimationFrame);
      await frame();
      const start = performance.now();
      for (let n = 0; n < 10; n++) {
        document.querySelector(n % 2 ? '#zoom-out' : '#zoom-in').click();
        await frame();
      }
      return (performance.now() - start) / 10;
    }""")
    assert drawing < 250  # milliseconds; it is some 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_is_readable_and_nothing_overflows(
    visit, page: Path, tmp_path: Path, scheme: str
) -> None:
    classes = (*CLASSES, "A" * 60, *(f"step {number}" for number in range(20)))
    labels = [*classes, UNCERTAIN, UNREADABLE, OUT_OF_BODY]
    segments = [Segment(n, n + 1, name, 0.5) for n, name in enumerate(labels)]
    write_timeline_page(
        tmp_path / "x.html", make_timeline(segments, classes), tmp_path / "no.mp4", {"a": "b" * 90}
    )
    for path in (page, tmp_path / "x.html"):
        tab = visit(path, complaints=path != page, color_scheme=scheme)
        tab.select_option("[data-number='1'] select", index=0)
        tab.click("[data-number='2'] .go")
        tab.evaluate(
            "document.querySelectorAll('details').forEach(details => { details.open = true })"
        )
        tab.hover("#actions")
        for width in (390, 1280):
            tab.set_viewport_size({"width": width, "height": 900})
            # The page draws itself anew in the next animation frame.
            tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert tab.evaluate("""[...document.querySelectorAll('#list, #totals .scroll')].every(
              box => box.scrollWidth <= box.clientWidth)""")
            seen, pale = tab.evaluate(PALE_TEXTS)
            assert seen > 70
            assert pale == []


@pytest.mark.parametrize("duration", [3.0, 10_800.0])
@pytest.mark.parametrize(
    "classes",
    [("cut", "sew"), CLASSES, (*LONG_NAMES, *HOSTILE[:6]), tuple("abcdefghijkl")],
    ids=["short", "SLAM", "long", "many"],
)
def test_all_texts_are_whole(
    visit, tmp_path: Path, classes: tuple[str, ...], duration: float
) -> None:
    """Every class has a segment, and the first one nearly all of the time."""
    labels = [*classes, *NON_CLASS_LABELS]
    step = duration / 100_000
    first = duration - step * (len(labels) - 1)
    segments = [Segment(0, first, classes[0], 1.0)]
    segments += [
        Segment(first + n * step, first + (n + 1) * step, label, 0.5)
        for n, label in enumerate(labels[1:])
    ]
    times = np.linspace(0, duration, 600, endpoint=False)
    probabilities = np.zeros((600, len(classes)))
    probabilities[:, 0] = 1.0
    name = max(classes, key=len)
    timeline = Timeline(name, classes, duration, segments, times, probabilities, [name])
    write_timeline_page(tmp_path / "x.html", timeline, tmp_path / "no.mp4", {name: name})
    tab = visit(tmp_path / "x.html", complaints=True)
    tab.wait_for_selector("#missing")
    tab.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true })")
    tab.select_option("[data-number='0'] select", index=1)
    tab.select_option("[data-number='1'] select", index=0)
    # The fonts of other systems are wider than the one of the test.
    tab.evaluate("document.getElementById('totals').style.letterSpacing = '0.02em'")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        tab.hover("#actions")
        tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        assert tab.inner_text("#totals-body tr:nth-child(2) .share") == "100.0\u00a0%"
        assert tab.evaluate(CUT_TEXTS, None) == [], width
    assert tab.evaluate(UNNAMED) == []


def test_every_label_looks_different(visit, tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(84))
    segments = [Segment(0, 1, UNCERTAIN), Segment(1, 2, UNREADABLE), Segment(2, 3, OUT_OF_BODY)]
    write_timeline_page(tmp_path / "x.html", make_timeline(segments, classes), None)
    tab = visit(tmp_path / "x.html")
    images = tab.evaluate("""[...document.querySelectorAll('#totals-body .chip')].map(
      chip => chip.style.backgroundImage)""")
    assert len(images) == len(set(images)) == 87


def test_all_controls_have_names(visit, page: Path) -> None:
    tab = visit(page)
    nameless = tab.evaluate("""[...document.querySelectorAll(
      'button, select, input, canvas[role], [role=slider], video'
    )].filter(element => !element.hidden && !element.getAttribute('aria-label')
      && !element.labels?.[0]?.textContent.trim()
      && !(element.tagName === 'BUTTON' && element.textContent.trim())).length""")
    assert nameless == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_the_video_stays_in_sight_of_the_list(visit, page: Path, width: int) -> None:
    tab = visit(page, width)
    tab.click("[data-number='5'] .go")
    assert tab.evaluate("scrollY") > 0
    for selector in ("video", "[data-number='5'] select"):
        box = tab.locator(selector).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 900


# With --explain.


def make_relevance() -> list[SegmentRelevance]:
    """Of the four segments of PARTS with a class: a peak, spread, nothing for it, too short."""
    peak = np.where(np.arange(20) // 2 == 3, 3.0, -0.5)  # frames 6 and 7: from 0.6 to 0.8 s
    return [
        SegmentRelevance(0, np.arange(20) / 10, peak, 0.1),
        SegmentRelevance(2, 3 + np.arange(8) / 10, np.ones(8), 0.1),
        SegmentRelevance(4, 6 + np.arange(15) / 10, np.full(15, -0.5), 0.1),
        SegmentRelevance(5, 7.3 + np.arange(30) / 10, np.linspace(0, 1, 30), 0.1),
    ]


@pytest.fixture(scope="module")
def explained(page: Path) -> Path:
    path = page.with_name("explained.html")
    write_timeline_page(path, make_timeline(), page.parent.parent / VIDEO, {}, make_relevance())
    return path


SENTENCES = [
    "cut from 0:00.0 to 0:02.0: most of the relevance comes from 0:00.6 to 0:00.8 (100\u00a0%).",
    "uncertain from 0:02.0 to 0:03.0: there is no label to explain.",
    "sew from 0:03.0 to 0:05.0: the relevance is spread, no part of it stands out.",
    "unreadable from 0:05.0 to 0:06.0: the model was not shown this.",
    "cut from 0:06.0 to 0:07.5: no frame speaks for this label.",
]


def test_the_relevance_of_the_current_segment_is_told(visit, explained: Path) -> None:
    tab = visit(explained)
    ready(tab)
    for number, sentence in enumerate(SENTENCES):
        assert tab.inner_text("#relevance-text") == sentence
        assert tab.get_attribute("#relevance", "aria-label") == sentence
        more = "Looked at: 0.8\u00a0s of its 2.0\u00a0s, evenly spread." if number == 2 else ""
        assert tab.inner_text("#relevance-more") == more
        press(tab, "n")
    # Its window begins before the segment, and reaches beyond it.
    assert tab.inner_text("#relevance-more") == (
        "The model sees 3.0\u00a0s at once, more than this segment."
    )
    tab.select_option("[data-number='5'] select", label="cut")
    assert tab.inner_text("#relevance-text").startswith("look from 0:07.5 to 0:10.0: ")
    assert tab.inner_text("#relevance-more").endswith("model’s label, not about yours.")
    legend = tab.inner_text("#relevance-note")
    assert "It does not show where an action is, it is not a cause" in legend
    assert "does not mean that the label is right" in legend


INK = """share => {  // the heights of a column of the lane that have one of the colours
  const canvas = document.querySelector('#relevance');
  const ctx = document.createElement('canvas').getContext('2d');
  ctx.drawImage(canvas, -Math.round(share * canvas.width), 0);
  const { data } = ctx.getImageData(0, 0, 1, canvas.height);
  const colours = ['--a', '--b', '--ink'].map(name => {
    const hex = getComputedStyle(document.body).getPropertyValue(name).trim();
    return [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
  });
  return colours.map(colour => {
    let count = 0;
    for (let y = 0; y < canvas.height; y++) {
      count += colour.every((value, i) => Math.abs(data[4 * y + i] - value) < 3);
    }
    return count;
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bars_stand_at_the_times_of_the_frames(visit, explained: Path, scheme: str) -> None:
    tab = visit(explained, color_scheme=scheme)
    wait_until(tab, f"({INK})(0.075)[0] > 40")  # 0.75 s of 10 s: the highest bar
    up, down, bracket = tab.evaluate(INK, 0.075)
    assert up > 40 and down == 0 and bracket in (3, 4, 5)
    up, down, bracket = tab.evaluate(INK, 0.155)  # at 1.55 s a frame speaks against it
    assert up == bracket == 0 and 1 <= down <= 12
    assert tab.evaluate(INK, 0.5) == [0, 0, 0]  # another segment
    press(tab, "n", "n", "n", "n")
    wait_until(tab, f"({INK})(0.07)[0] === 0 && ({INK})(0.655)[1] > 0")


def test_the_segment_can_be_zoomed_to_by_key_and_button(visit, explained: Path) -> None:
    tab = visit(explained)
    ready(tab)
    shown = "document.querySelector('#range').textContent"
    press(tab, "n", "n", "Z")
    wait_until(tab, f"{shown} === 'Shown: 0:02 to 0:05'")
    tab.click("#zoom-whole")
    wait_until(tab, f"{shown} === ''")
    tab.click("#zoom-segment")
    wait_until(tab, f"{shown} === 'Shown: 0:02 to 0:05'")
    click_at(tab, "#relevance", 0.5)
    assert time_of(tab) == pytest.approx(4, abs=0.05)
    tab.click("#help summary")
    assert "zoom to the current segment" in tab.inner_text("#help")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_explained_page_is_readable(visit, explained: Path, scheme: str) -> None:
    tab = visit(explained, color_scheme=scheme)
    for width in (390, *WIDTHS):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate(CUT_TEXTS, None) == []
        assert tab.evaluate(PALE_TEXTS)[1] == []
    assert tab.evaluate(UNNAMED) == []


def test_without_relevance_the_page_has_no_lane(visit, page: Path, tmp_path: Path) -> None:
    tab = visit(page)
    ready(tab)
    assert tab.locator("[id*=relevance], #zoom-segment").count() == 0
    press(tab, "z")
    assert tab.inner_text("#range") == ""
    assert "Relevance" not in tab.inner_text("body")
    # Asked for, but there is nothing to explain.
    empty = Timeline("nothing", ("a", "b"), 0.0, [], np.empty(0), np.empty((0, 2)))
    write_timeline_page(tmp_path / "x.html", empty, None, None, [])
    tab = visit(tmp_path / "x.html")
    assert tab.inner_text("#relevance-text") == "There is no segment here."
    assert tab.locator("#zoom-segment").is_disabled()


def test_the_data_of_the_lane_is_small_and_exact() -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.04, 0.1, 400))
    values = np.random.default_rng(1).normal(0, 1, 400)
    part = SegmentRelevance(0, times, values, 0.07)
    text = build_timeline_page(make_timeline(), None, None, [part])
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["relevance"]["0"]
    np.testing.assert_allclose(np.cumsum(data["steps"]) / 1000, times, atol=5.1e-4)
    relative = np.array(data["values"]) / 1000
    np.testing.assert_allclose(relative, values / np.abs(values).max(), atol=5.1e-4)
    assert len(json.dumps(data, separators=(",", ":"))) < 9 * 400
