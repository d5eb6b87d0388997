"""live_page.py: who may look, what viewers get and when, and what a browser makes of it."""

import asyncio
import http.client
import io
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import pytest
from helpers import HOSTILE, PALE_TEXTS
from PIL import Image

from clips.manifest import UNCERTAIN
from timeline.segments import MARKS, OUT_OF_BODY, UNREADABLE, Snapshot
from utils.errors import UserError
from web import live_feed
from web import live_server as live_page
from web.live_feed import MOST_ANSWERS, WINDOW, Feed
from web.live_server import LivePage

CLASSES = ("cut", "sew", "look")


def snapshot(moment: float = 1.0, label: str = "sew", state: str = "", size: int = 48) -> Snapshot:
    """One whose picture is as grey as its time tells; without one out of the body."""
    probabilities = np.array([0.125, 0.625, 0.25])
    frame = np.full((size, size, 3), int(moment) % 250, np.uint8)
    return Snapshot(moment, label, probabilities, None if label == OUT_OF_BODY else frame, state)


def read(message: bytes) -> tuple[dict[str, Any], bytes]:
    """A message's JSON and its picture."""
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def grey(picture: bytes) -> int:
    return Image.open(io.BytesIO(picture)).convert("L").getpixel((3, 3))


def fetch(
    page: LivePage, path: str = "", method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Ask the page's server for a path below its address, or an absolute one."""
    address = urlsplit(page.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    path = path if path.startswith("/") else address.path + path
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


Viewer = aiohttp.ClientWebSocketResponse


def look(page: LivePage, visit: Callable[..., Awaitable[Any]], viewers: int = 1) -> Any:
    """Run `visit` with viewers that are connected. In a thread: Playwright has this one's loop."""
    origin = page.address.removesuffix(urlsplit(page.address).path)

    async def session() -> Any:
        async with asyncio.timeout(40), aiohttp.ClientSession() as client:
            connected = [
                await client.ws_connect(page.address + "feed", origin=origin)
                for _ in range(viewers)
            ]
            return await visit(*connected)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, session()).result()


async def ask(viewer: Viewer, after: int = 0) -> tuple[dict[str, Any], bytes]:
    await viewer.send_str(str(after))
    return read(await viewer.receive_bytes(timeout=10))


async def ask_until(
    viewer: Viewer, wanted: Callable[[dict[str, Any]], bool]
) -> tuple[list[Any], dict[str, Any], bytes]:
    """Follow the feed up to a message: all answers on the way, that message, the last picture."""
    answers, last, after = [], b"", 0
    while True:
        head, picture = await ask(viewer, after)
        answers, after, last = answers + head["answers"], head["next"], picture or last
        if wanted(head):
            return answers, head, last


# Who may look --------------------------------------------------------------------------------


def test_only_who_knows_the_address_may_look() -> None:
    with LivePage(CLASSES, "run") as page:
        token = urlsplit(page.address).path.strip("/")
        assert len(token) >= 22
        assert fetch(page)[0].status == 200
        port = urlsplit(page.address).port
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert fetch(page, Host=host)[0].status == 200
        refused = [
            *(
                fetch(page, path)
                for path in ("/", "/live.js", f"/{token[:-1]}/", "/%C3%A9", "//", "/*")
            ),
            *(fetch(page, path) for path in ("nothing", "../live_page.py", "live.html.j2")),
            *(fetch(page, Host=host) for host in ("evil.example", "127.0.0.1.evil.example", "[")),
            fetch(page, method="POST"),
            fetch(page, "feed", Host="evil.example", Origin="http://evil.example"),
        ]
        assert {response.status for response, _ in refused} == {404}
        assert {body for _, body in refused} == {b""}


def test_tokens_differ() -> None:
    with LivePage(CLASSES, "a") as one, LivePage(CLASSES, "a") as other:
        assert urlsplit(one.address).path != urlsplit(other.address).path


def test_another_sites_pages_cannot_listen() -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    with LivePage(CLASSES, "run") as page:
        for origin in ({}, {"Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:1"}):
            assert fetch(page, "feed", **upgrade, **origin)[0].status == 403


def test_security_headers() -> None:
    with LivePage(CLASSES, "run") as page:
        for path in ("", "live.js", "live_charts.js", "live.css", "nothing", "/", "feed"):
            headers = fetch(page, path)[0].headers
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-store"
            assert "aiohttp" not in headers["Server"]


def test_the_token_is_not_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with LivePage(CLASSES, "run") as page:
        address = urlsplit(page.address)
        fetch(page)
        fetch(page, "nothing")
        look(page, ask)
        for line in (f"GET {address.path}\x01 HTTP/1.1", f"{address.path} GET", "GET"):
            with socket.create_connection((address.hostname, address.port), timeout=20) as raw:
                raw.sendall(f"{line}\r\n\r\n".encode())
                raw.recv(1000)
    said = caplog.text + "".join(capfd.readouterr())
    assert address.path.strip("/") not in said


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", -1, "port -1: there are only 0 to 65535"),
        ("127.0.0.1", 70000, "port 70000: there are only 0 to 65535"),
        ("nowhere.invalid", 0, "cannot listen on nowhere.invalid: "),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1: Cannot assign requested address"),
        ("", 0, "cannot listen on : "),  # not everywhere
        ("a" * 99, 0, "not a name of a host"),
    ],
)
def test_where_it_cannot_listen(host: str, port: int, words: str) -> None:
    with pytest.raises(UserError) as error, LivePage(CLASSES, "run", host, port):
        pass
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_port_in_use() -> None:
    with LivePage(CLASSES, "run") as page:
        port = urlsplit(page.address).port
        words = f"^port {port} is in use: choose another with --port$"
        with pytest.raises(UserError, match=words), LivePage(CLASSES, "run", port=port):
            pass


# What viewers get ----------------------------------------------------------------------------


def test_viewers_get_the_same_and_a_picture_is_encoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = []
    jpeg = live_feed._jpeg
    monkeypatch.setattr(live_feed, "_jpeg", lambda frame: encoded.append(frame) or jpeg(frame))
    with LivePage(CLASSES, "run") as page:
        for moment in range(5):
            page.show(snapshot(moment))
        time.sleep(0.3)
        assert encoded == []  # nobody looks

        async def visit(*viewers: Viewer) -> list[Any]:
            for moment in range(5, 120):
                page.show(snapshot(moment))
                await asyncio.sleep(0.001)
            return await asyncio.gather(
                *(ask_until(viewer, lambda head: head["next"] == 120) for viewer in viewers)
            )

        got = look(page, visit, viewers=3)
        for answers, head, picture in got:
            assert [time for time, _, _ in answers] == list(range(120))
            assert answers[0] == [0, "sew", [125, 625, 250]]
            assert head["age"] < 10
            assert not head["hidden"]
            assert grey(picture) == pytest.approx(119, abs=2)
        assert len(encoded) < 60  # far fewer than shown, and not three times


def test_a_slow_viewer_misses_pictures_but_no_answer() -> None:
    with LivePage(CLASSES, "run") as page:

        async def visit(viewer: Viewer) -> None:
            page.show(snapshot(0))
            await ask_until(viewer, lambda head: head["next"] == 1)
            for moment in range(1, 50):
                page.show(snapshot(moment))
            answers, _, picture = await ask_until(viewer, lambda head: head["next"] == 50)
            assert len(answers) == 50
            assert grey(picture) == pytest.approx(49, abs=2)
            head, picture = await ask(viewer, 50)  # nothing new, and told so after a second
            assert (head["answers"], picture) == ([], b"")
            assert head["age"] > 0.5

        look(page, visit)


def test_a_stuck_viewer_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "PATIENCE", 1.0)
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    with LivePage(CLASSES, "run") as page:
        address = urlsplit(page.address)
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect((address.hostname, address.port))
            stuck.sendall(
                f"GET {address.path}feed HTTP/1.1\r\nHost: {address.netloc}\r\n"
                f"Origin: http://{address.netloc}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
                "".encode()
            )
            ask_masked = b"\x81\x81\x00\x00\x00\x000"  # the text "0"
            stuck.sendall(1000 * ask_masked)  # and never reads what it asked for

            async def visit(viewer: Viewer) -> None:
                for moment in range(3000):
                    page.show(snapshot(moment / 100)._replace(frame=noise))
                answers, _, picture = await ask_until(viewer, lambda head: head["next"] == 3000)
                assert len(answers) == 3000
                assert Image.open(io.BytesIO(picture)).size == (700, 700)
                count = 3000
                while len(page._viewers) > 1:  # the other is dropped
                    page.show(snapshot(40 + count / 100)._replace(frame=noise))
                    count = (await ask(viewer, count))[0]["next"]

            look(page, visit)


def test_a_late_viewer_gets_the_last_two_minutes() -> None:
    with LivePage(CLASSES, "run") as page:
        for number in range(600):
            page.show(snapshot(number / 2, UNCERTAIN if number % 2 else "sew"))
        time.sleep(0.3)
        head, _ = look(page, ask)
        times = [time for time, _, _ in head["answers"]]
        assert (times[0], times[-1]) == (299.5 - WINDOW, 299.5)
        assert head["next"] - head["first"] == len(times) == 241
        assert {label for _, label, _ in head["answers"]} == {UNCERTAIN, "sew"}


def test_before_the_first_answer() -> None:
    with LivePage(CLASSES, "run") as page:
        head, picture = look(page, ask)
    assert head == {
        "first": 0,
        "next": 0,
        "age": None,
        "state": "",
        "hidden": False,
        "answers": [],
    }
    assert picture == b""


def test_what_is_kept_is_bounded() -> None:
    feed = Feed()
    for number in range(3 * MOST_ANSWERS):  # a hundred a second, published now and then
        feed.put(snapshot(number / 100, size=2))
        if number % 40 == 0:
            feed.publish(watched=False)
    feed.publish(watched=False)
    assert len(feed._answers) == MOST_ANSWERS
    assert not feed._inbox
    for number in range(3 * MOST_ANSWERS):  # never published
        feed.put(snapshot(500 + number / 100, size=2))
    assert len(feed._inbox) == MOST_ANSWERS


def test_where_time_jumps_back_the_history_begins_anew() -> None:
    feed = Feed()
    for moment in (10, 11, 12, 5, 6, 7):
        feed.put(snapshot(moment))
    feed.publish(watched=False)
    head, _ = read(feed.message(after=2, seen=-1))
    assert [time for time, _, _ in head["answers"]] == [5, 6, 7]
    assert (head["first"], head["next"]) == (3, 6)
    feed.put(snapshot(500))
    feed.publish(watched=False)
    head, _ = read(feed.message(after=6, seen=-1))
    assert (head["first"], head["next"]) == (6, 7)


def test_an_answer_said_again_is_kept_once() -> None:
    """While a camera is away, the same is shown again and again, with a note."""
    feed = Feed()
    for label in ("sew", "sew", UNREADABLE, UNREADABLE):
        feed.put(snapshot(6, label, state="reconnecting to the camera"))
    assert feed.publish(watched=False)
    head, _ = read(feed.message(0, -1))
    assert [label for _, label, _ in head["answers"]] == ["sew", UNREADABLE]
    feed.put(snapshot(6, UNREADABLE, state="ended"))
    assert feed.publish(watched=False)  # the note is new
    head, _ = read(feed.message(2, -1))
    assert (head["state"], head["answers"]) == ("ended", [])


def test_a_hidden_picture_is_not_sent() -> None:
    feed = Feed()
    feed.put(snapshot(1))
    assert feed.publish(watched=True)
    assert read(feed.message(0, -1))[1]
    assert not feed.publish(watched=True)
    assert read(feed.message(1, feed.version))[1] == b""  # it had it
    feed.put(snapshot(2, OUT_OF_BODY))
    assert feed.publish(watched=True)
    head, picture = read(feed.message(0, -1))
    assert head["hidden"]
    assert picture == b""
    feed.put(snapshot(3))
    feed.publish(watched=True)
    feed.put(snapshot(4))
    feed.publish(watched=False)
    assert read(feed.message(0, -1))[1] == b""  # nor one of the time before anybody looked


def test_answers_without_probabilities() -> None:
    feed = Feed()
    feed.put(snapshot(1, UNREADABLE)._replace(probabilities=np.full(3, np.nan)))
    feed.publish(watched=False)
    assert read(feed.message(0, -1))[0]["answers"] == [[1, UNREADABLE, []]]


def test_large_pictures_are_made_smaller() -> None:
    picture = live_feed._jpeg(np.zeros((1080, 1920, 3), np.uint8))
    assert Image.open(io.BytesIO(picture)).size == (960, 540)


def test_leaving_tells_viewers_and_frees_the_port() -> None:
    page = LivePage(CLASSES, "run")
    with page:
        port = urlsplit(page.address).port

        async def visit(viewer: Viewer, other: Viewer) -> None:
            await ask(other)  # and then hangs
            await ask(viewer)
            page.show(snapshot(7))
            threading.Thread(target=page.__exit__).start()
            answers, _, picture = await ask_until(viewer, lambda head: head["state"] == "ended")
            assert [time for time, _, _ in answers] == [7]
            assert grey(picture) == pytest.approx(7, abs=2)
            assert (await viewer.receive(timeout=10)).type == aiohttp.WSMsgType.CLOSE

        look(page, visit, viewers=2)
        page._thread.join(timeout=10)
        assert not page._thread.is_alive()
    page.show(snapshot(8))  # nobody minds
    with LivePage(CLASSES, "run", port=port):
        pass


# In a browser --------------------------------------------------------------------------------


class Tab:
    """A tab that looks at an address, and all that it complained about or asked for."""

    def __init__(self, browser, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.messages, self.requests = [], []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda line: self.requests.append(line.url))
        self.page.goto(address)

    def text(self, css: str) -> str:
        return self.page.locator(css).inner_text().replace("\u00a0", " ")

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression holds. (The page forbids what Playwright's own does.)"""
        for _ in range(500):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(30)
        raise AssertionError(f"never held: {expression}; the page says {self.text('body')}")

    def wait_for(self, css: str, text: str) -> None:
        """Until an element's text holds this."""
        arguments = f"document.querySelector({json.dumps(css)}).textContent"
        self.wait(f"{arguments}.replaceAll('\\u00a0', ' ').includes({json.dumps(text)})")


@contextmanager
def opened(browser, address: str, **settings: Any) -> Iterator[Tab]:
    tab = Tab(browser, address, **settings)
    yield tab
    tab.context.close()


COLOURS = """id => {
  const { width, height } = document.getElementById(id);
  const copy = new OffscreenCanvas(width, height).getContext("2d");
  copy.drawImage(document.getElementById(id), 0, 0);
  const { data } = copy.getImageData(0, 0, width, height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page(browser, scheme: str) -> None:
    """Hostile names are text, nothing foreign is loaded, all can be read, nothing sticks out."""
    title = "<script>alert(0)</script> 'run'"
    many = len(HOSTILE)
    probabilities = np.full(many, 0.1)
    probabilities[0] = 0.4
    with (
        LivePage(HOSTILE, title) as page,
        opened(browser, page.address, color_scheme=scheme) as tab,
    ):
        tab.wait_for("#state", "Waiting for the first answer")
        assert tab.page.title() == f"Live: {title}"
        assert tab.text("h1") == title
        bars = tab.page.locator("#bars .name").all_inner_texts()
        assert bars == list(HOSTILE)
        empty = tab.page.evaluate(COLOURS, "strip")
        for number, label in enumerate((*HOSTILE, *MARKS, HOSTILE[0])):
            for step in range(10):
                moment = 8 * number + 0.8 * step
                page.show(snapshot(moment, label)._replace(probabilities=probabilities))
        tab.wait_for("#state", "Live")
        tab.wait_for("#answer", HOSTILE[0])
        assert tab.text("#answer") == HOSTILE[0]
        assert tab.text("#detail") == "Probability 40 %"
        assert tab.text("#bars .now .value") == "40 %"
        assert tab.page.locator("#bars .bar").first.evaluate("b => b.style.transform") == (
            "scaleX(0.4)"
        )
        assert tab.page.evaluate(COLOURS, "strip") > empty + many
        assert tab.page.locator("#legend li").count() == many + len(MARKS)
        assert "out of body 8 s" in tab.page.get_attribute("#strip", "aria-label")
        page.show(snapshot(90, HOSTILE[6])._replace(probabilities=probabilities[::-1].copy()))
        tab.wait_for("#answer", HOSTILE[6])
        tab.wait_for("#bars li:last-child .value", "40")
        tab.page.locator("summary").click()
        for width in (390, 1280):
            tab.page.set_viewport_size({"width": width, "height": 800})
            for label in (HOSTILE[3], *MARKS):
                page.show(snapshot(91, label)._replace(probabilities=probabilities))
                tab.wait_for("#answer", label.replace("_", " "))
                assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                seen, pale = tab.page.evaluate(PALE_TEXTS)
                assert seen > 25
                assert pale == []
        assert tab.page.evaluate(COLOURS, "lanes") > many
        assert tab.page.locator("script, iframe, b, img").count() == 1  # its own script
        page.__exit__()
        tab.wait_for("#state", "Ended")
        assert tab.page.evaluate(PALE_TEXTS)[1] == []
        tab.page.wait_for_timeout(700)  # it does not try to come back
        assert tab.text("#state") == "Ended"
        assert tab.messages == []
        own = page.address.removeprefix("http")
        assert {one.removeprefix("http").removeprefix("ws") for one in tab.requests} - {
            "data:,"
        } == {own + name for name in ("", "live.css", "live.js", "live_charts.js", "feed")}


def test_a_picture_is_shown_and_hidden(browser) -> None:
    pixel = """() => {
      const canvas = document.getElementById("picture");
      return canvas.hidden ? -1 : canvas.getContext("2d").getImageData(3, 3, 1, 1).data[0];
    }"""
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(200))
        tab.wait(f"Math.abs(({pixel})() - 200) < 4")
        tab.wait("document.getElementById('placeholder').hidden")
        page.show(snapshot(201, OUT_OF_BODY))
        tab.wait(f"({pixel})() === -1")
        tab.wait_for("#placeholder", "picture hidden: out of body")
        tab.wait("!document.getElementById('placeholder').hidden")
        assert tab.text("#detail") == "The camera is outside the body."
        page.show(snapshot(100))  # wound back
        tab.wait(f"Math.abs(({pixel})() - 100) < 4")
        tab.wait_for("#clock", "Video time 0:01:40")
        tab.wait("document.querySelectorAll('#legend li').length === 1")  # a new history


def test_the_answer_is_read_aloud_only_where_it_changes(browser) -> None:
    count = """() => {
      window.changes = 0;
      new MutationObserver(() => { window.changes += 1; }).observe(
        document.getElementById("answer"), { childList: true, characterData: true, subtree: true });
    }"""
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(1))
        tab.wait_for("#answer", "sew")
        assert tab.page.get_attribute("#answer", "aria-live") == "polite"
        tab.page.evaluate(count)
        for moment in range(2, 30):
            page.show(snapshot(moment))
            tab.page.wait_for_timeout(10)
        tab.wait_for("#clock", "0:00:29")
        assert tab.page.evaluate("window.changes") == 0
        page.show(snapshot(31, "cut"))
        tab.wait_for("#answer", "cut")
        assert tab.page.evaluate("window.changes") == 1


def test_old_news_look_old(browser) -> None:
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(1))
        tab.wait_for("#state", "Live")
        assert not tab.page.locator("#overlay").is_visible()
        assert tab.text("#answer-title") == "Answer now"
        tab.wait_for("#state", "no news for 3 s")
        assert tab.page.locator("#overlay").is_visible()
        assert "no news for" in tab.text("#overlay")
        assert tab.text("#answer-title") == "Last answer"
        assert tab.page.evaluate(PALE_TEXTS)[1] == []
        with opened(browser, page.address) as late:  # as old for who comes only now
            late.wait_for("#state", "no news for")
        page.show(snapshot(2, state="reconnecting to the camera"))
        tab.wait_for("#state", "reconnecting to the camera")
        assert tab.page.locator("#overlay").is_visible()
        page.show(snapshot(3))
        tab.wait_for("#state", "Live")
        assert not tab.page.locator("#overlay").is_visible()


class Cable:
    """What lies between a browser and the page, to be cut."""

    def __init__(self, page: LivePage) -> None:
        address = urlsplit(page.address)
        self._to = (address.hostname, address.port)
        self._ends: list[socket.socket] = []
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}{address.path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if self._is_cut:
                near.close()
                continue
            far = socket.create_connection(self._to)
            self._ends += near, far
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        self._is_cut = True
        for end in self._ends:
            end.close() if end.fileno() < 0 else end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def mend(self) -> None:
        self._is_cut = False


def test_a_lost_connection_is_told_and_found_again(browser) -> None:
    with LivePage(CLASSES, "run") as page:
        cable = Cable(page)
        with opened(browser, cable.address) as tab:
            page.show(snapshot(1))
            tab.wait_for("#state", "Live")
            cable.cut()
            tab.wait_for("#state", "Connection lost: trying again in")
            assert tab.page.locator("#overlay").is_visible()
            page.show(snapshot(2, "cut"))
            tab.wait_for("#state", "trying again in 2 s")  # it waits longer each time
            cable.mend()
            tab.wait_for("#answer", "cut")
            tab.wait("document.getElementById('strip').ariaLabel.includes('sew')")
            page.show(snapshot(3))
            tab.wait_for("#state", "Live")
            assert all("WebSocket connection to" in message for message in tab.messages)


def test_the_strips_stretches_and_marks(browser) -> None:
    runs = """async answers => {
      const { MARKS, runsOf } = await import(new URL("live_charts.js", location.href));
      return [Object.keys(MARKS), runsOf(answers).map(run => [run.label, run.start, run.end])];
    }"""
    answers = [[10, "a"], [11, "a"], [12, "b"], [13, "b"], [33, "b"], [34, UNCERTAIN]]
    with (
        LivePage(CLASSES, "run") as page,
        opened(browser, page.address, reduced_motion="reduce") as tab,
    ):
        marks, stretches = tab.page.evaluate(runs, [[*answer, []] for answer in answers])
        assert marks == list(MARKS)
        assert stretches == [["a", 10, 11], ["b", 11, 13], ["b", 32, 33], [UNCERTAIN, 33, 34]]
        assert tab.page.evaluate(runs, [])[1] == []
        page.show(snapshot(1))
        tab.wait_for("#state", "Live")
        motion = "getComputedStyle(document.querySelector('.dot')).animationName"
        assert tab.page.evaluate(motion) == "none"


def test_many_classes_scroll_by_keyboard(browser) -> None:
    classes = [f"step {number} of a long operation" for number in range(60)]
    probabilities = np.full(60, 1 / 60)
    with (
        LivePage(classes, "run") as page,
        opened(browser, page.address, viewport={"width": 390, "height": 800}) as tab,
    ):
        page.show(snapshot(1, classes[59])._replace(probabilities=probabilities))
        tab.wait_for("#answer", "step 59")
        assert tab.page.locator("#bars li").count() == 60
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement.id") == "bars"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert tab.page.evaluate(outline) == "solid"
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert tab.page.evaluate(outline) == "solid"
        tab.page.keyboard.press("Enter")
        tab.wait("document.getElementById('lanes').clientHeight > 60 * 20")
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
