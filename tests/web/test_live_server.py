"""The live page: who may watch, what viewers get and when, and how a browser shows it."""

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
from helpers import CUT_TEXTS, HOSTILE, LONG_NAMES, PALE_TEXTS, UNNAMED, WIDTHS
from PIL import Image

from clips.manifest import NON_CLASS_LABELS, OUT_OF_BODY, UNCERTAIN, UNREADABLE
from timeline.segments import Snapshot
from utils.errors import UserError
from web import live_feed, live_server
from web.live_feed import MAX_PREDICTIONS, WINDOW, SnapshotFeed
from web.live_server import LivePage

CLASSES = ("cut", "sew", "look")


def snapshot(moment: float = 1.0, label: str = "sew", state: str = "", size: int = 48) -> Snapshot:
    """A snapshot whose frame is as grey as its time; out of the body it has no frame."""
    probabilities = np.array([0.125, 0.625, 0.25])
    frame = np.full((size, size, 3), int(moment) % 250, np.uint8)
    return Snapshot(moment, label, probabilities, None if label == OUT_OF_BODY else frame, state)


def read(message: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON of a message, and its JPEG."""
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def grey(jpeg: bytes) -> int:
    return Image.open(io.BytesIO(jpeg)).convert("L").getpixel((3, 3))


def fetch(
    page: LivePage, path: str = "", method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Request a path below the address of a page, or an absolute one."""
    address = urlsplit(page.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    path = path if path.startswith("/") else address.path + path
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


Viewer = aiohttp.ClientWebSocketResponse


def watch(page: LivePage, visit: Callable[..., Awaitable[Any]], viewers: int = 1) -> Any:
    """Run `visit` with connected viewers, in a thread: Playwright has the loop of this one."""
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
    """Ask until a message is `wanted`: all predictions so far, that message, the last JPEG."""
    predictions, last, after = [], b"", 0
    while True:
        head, jpeg = await ask(viewer, after)
        predictions, after = predictions + head["predictions"], head["next"]
        last = jpeg or last
        if wanted(head):
            return predictions, head, last


# Who may watch -------------------------------------------------------------------------------


def test_only_who_knows_the_address_may_watch() -> None:
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
            *(fetch(page, path) for path in ("nothing", "../live_server.py", "live.html.j2")),
            *(fetch(page, Host=host) for host in ("evil.example", "127.0.0.1.evil.example", "[")),
            fetch(page, method="POST"),
            fetch(page, "feed", Host="evil.example", Origin="http://evil.example"),
        ]
        assert {response.status for response, _ in refused} == {404}
        assert {body for _, body in refused} == {b""}


def test_tokens_differ() -> None:
    with LivePage(CLASSES, "a") as first, LivePage(CLASSES, "a") as other:
        assert urlsplit(first.address).path != urlsplit(other.address).path


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
        watch(page, ask)
        for line in (f"GET {address.path}\x01 HTTP/1.1", f"{address.path} GET", "GET"):
            with socket.create_connection((address.hostname, address.port), timeout=20) as raw:
                raw.sendall(f"{line}\r\n\r\n".encode())
                raw.recv(1000)
    logged = caplog.text + "".join(capfd.readouterr())
    assert address.path.strip("/") not in logged


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", -1, "port -1: must be from 0 to 65535"),
        ("127.0.0.1", 70000, "port 70000: must be from 0 to 65535"),
        ("nowhere.invalid", 0, "cannot listen on nowhere.invalid: "),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1: Cannot assign requested address"),
        ("", 0, "cannot listen on : "),  # not everywhere
        ("a" * 99, 0, "not the name of a host"),
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


def test_viewers_get_the_same_and_a_frame_is_encoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = []
    encode = live_feed.encode_jpeg
    monkeypatch.setattr(
        live_feed, "encode_jpeg", lambda frame: encoded.append(frame) or encode(frame)
    )
    with LivePage(CLASSES, "run") as page:
        for moment in range(5):
            page.show(snapshot(moment))
        time.sleep(0.3)
        assert encoded == []  # nobody watches

        async def visit(*viewers: Viewer) -> list[Any]:
            for moment in range(5, 120):
                page.show(snapshot(moment))
                await asyncio.sleep(0.001)
            return await asyncio.gather(
                *(ask_until(viewer, lambda head: head["next"] == 120) for viewer in viewers)
            )

        got = watch(page, visit, viewers=3)
        for predictions, head, jpeg in got:
            assert [time for time, _, _ in predictions] == list(range(120))
            assert predictions[0] == [0, "sew", [125, 625, 250]]
            assert head["age"] < 10
            assert not head["hidden"]
            assert grey(jpeg) == pytest.approx(119, abs=2)
        assert len(encoded) < 60  # far fewer than shown, and not three times


def test_a_slow_viewer_misses_frames_but_no_prediction() -> None:
    with LivePage(CLASSES, "run") as page:

        async def visit(viewer: Viewer) -> None:
            page.show(snapshot(0))
            await ask_until(viewer, lambda head: head["next"] == 1)
            for moment in range(1, 50):
                page.show(snapshot(moment))
            predictions, _, jpeg = await ask_until(viewer, lambda head: head["next"] == 50)
            assert len(predictions) == 50
            assert grey(jpeg) == pytest.approx(49, abs=2)
            head, jpeg = await ask(viewer, 50)  # nothing new: a message after a second
            assert (head["predictions"], jpeg) == ([], b"")
            assert head["age"] > 0.5

        watch(page, visit)


def test_a_stuck_viewer_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_server, "RECEIVE_TIMEOUT", 1.0)
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

            for moment in range(3000):
                page.show(snapshot(moment / 100)._replace(frame=noise))

            async def visit(viewer: Viewer) -> None:
                predictions, _, jpeg = await ask_until(viewer, lambda head: head["next"] == 3000)
                assert len(predictions) == 3000
                assert Image.open(io.BytesIO(jpeg)).size == (700, 700)
                count = 3000
                while len(page._server.viewers) > 1:  # the other is dropped
                    page.show(snapshot(40 + count / 100)._replace(frame=noise))
                    count = (await ask(viewer, count))[0]["next"]

            watch(page, visit)


def test_a_late_viewer_gets_the_last_two_minutes() -> None:
    with LivePage(CLASSES, "run") as page:
        for number in range(600):
            page.show(snapshot(number / 2, UNCERTAIN if number % 2 else "sew"))
        time.sleep(0.3)
        head, _ = watch(page, ask)
        times = [time for time, _, _ in head["predictions"]]
        assert (times[0], times[-1]) == (299.5 - WINDOW, 299.5)
        assert head["next"] - head["first"] == len(times) == 241
        assert {label for _, label, _ in head["predictions"]} == {UNCERTAIN, "sew"}


def test_before_the_first_prediction() -> None:
    with LivePage(CLASSES, "run") as page:
        head, jpeg = watch(page, ask)
    assert head == {
        "first": 0,
        "next": 0,
        "age": None,
        "state": "",
        "hidden": False,
        "predictions": [],
    }
    assert jpeg == b""


def test_what_is_kept_is_bounded() -> None:
    feed = SnapshotFeed()
    for number in range(3 * MAX_PREDICTIONS):  # a hundred per second, with an update now and then
        feed.publish(snapshot(number / 100, size=2))
        if number % 40 == 0:
            feed.update(watched=False)
    feed.update(watched=False)
    assert len(feed._predictions) == MAX_PREDICTIONS
    assert not feed._inbox
    for number in range(3 * MAX_PREDICTIONS):  # without an update
        feed.publish(snapshot(500 + number / 100, size=2))
    assert len(feed._inbox) == MAX_PREDICTIONS


def test_where_time_jumps_back_the_history_begins_anew() -> None:
    feed = SnapshotFeed()
    for moment in (10, 11, 12, 5, 6, 7):
        feed.publish(snapshot(moment))
    feed.update(watched=False)
    head, _ = read(feed.delta(after=2, seen=-1))
    assert [time for time, _, _ in head["predictions"]] == [5, 6, 7]
    assert (head["first"], head["next"]) == (3, 6)
    feed.publish(snapshot(500))
    feed.update(watched=False)
    head, _ = read(feed.delta(after=6, seen=-1))
    assert (head["first"], head["next"]) == (6, 7)


def test_a_repeated_prediction_is_kept_once() -> None:
    """While a camera is away, the same snapshot is shown again and again, with a message."""
    feed = SnapshotFeed()
    for label in ("sew", "sew", UNREADABLE, UNREADABLE):
        feed.publish(snapshot(6, label, state="reconnecting to the camera"))
    assert feed.update(watched=False)
    head, _ = read(feed.delta(0, -1))
    assert [label for _, label, _ in head["predictions"]] == ["sew", UNREADABLE]
    feed.publish(snapshot(6, UNREADABLE, state="ended"))
    assert feed.update(watched=False)  # the message is new
    head, _ = read(feed.delta(2, -1))
    assert (head["state"], head["predictions"]) == ("ended", [])


def test_a_hidden_frame_is_not_sent() -> None:
    feed = SnapshotFeed()
    feed.publish(snapshot(1))
    assert feed.update(watched=True)
    assert read(feed.delta(0, -1))[1]
    assert not feed.update(watched=True)
    assert read(feed.delta(1, feed.version))[1] == b""  # the viewer has it
    feed.publish(snapshot(2, OUT_OF_BODY))
    assert feed.update(watched=True)
    head, jpeg = read(feed.delta(0, -1))
    assert head["hidden"]
    assert jpeg == b""
    feed.publish(snapshot(3))
    feed.update(watched=True)
    feed.publish(snapshot(4))
    feed.update(watched=False)
    assert read(feed.delta(0, -1))[1] == b""  # nor an old frame, from before anybody watched


def test_predictions_without_probabilities() -> None:
    feed = SnapshotFeed()
    feed.publish(snapshot(1, UNREADABLE)._replace(probabilities=np.full(3, np.nan)))
    feed.update(watched=False)
    assert read(feed.delta(0, -1))[0]["predictions"] == [[1, UNREADABLE, []]]


def test_large_frames_are_made_smaller() -> None:
    jpeg = live_feed.encode_jpeg(np.zeros((1080, 1920, 3), np.uint8))
    assert Image.open(io.BytesIO(jpeg)).size == (960, 540)


def test_leaving_tells_viewers_and_frees_the_port() -> None:
    page = LivePage(CLASSES, "run")
    with page:
        port = urlsplit(page.address).port

        async def visit(viewer: Viewer, other: Viewer) -> None:
            await ask(other)  # and then hangs
            await ask(viewer)
            page.show(snapshot(7))
            threading.Thread(target=page.__exit__).start()
            predictions, _, jpeg = await ask_until(viewer, lambda head: head["state"] == "ended")
            assert [time for time, _, _ in predictions] == [7]
            assert grey(jpeg) == pytest.approx(7, abs=2)
            assert (await viewer.receive(timeout=10)).type == aiohttp.WSMsgType.CLOSE

        watch(page, visit, viewers=2)
        page._thread.join(timeout=10)
        assert not page._thread.is_alive()
    page.show(snapshot(8))  # this does no harm
    with LivePage(CLASSES, "run", port=port):
        pass


# In a browser --------------------------------------------------------------------------------


class Tab:
    """A browser tab with its console messages and its requests."""

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
        """Wait until a JavaScript expression is true. (The page forbids Playwright's.)"""
        for _ in range(500):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(30)
        raise AssertionError(f"never true: {expression}; the page shows {self.text('body')}")

    def wait_for(self, css: str, text: str) -> None:
        """Wait until the text of an element contains this."""
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
    """Hostile names stay text, nothing foreign is loaded, all is readable, nothing overflows."""
    title = "<script>alert(0)</script> 'run'"
    many = len(HOSTILE)
    probabilities = np.full(many, 0.1)
    probabilities[0] = 0.4
    with (
        LivePage(HOSTILE, title) as page,
        opened(browser, page.address, color_scheme=scheme) as tab,
    ):
        tab.wait_for("#state", "Waiting for the first prediction")
        assert tab.page.title() == f"Live: {title}"
        assert tab.text("h1") == title
        bars = tab.page.locator("#bars .name").all_inner_texts()
        assert bars == list(HOSTILE)
        empty = tab.page.evaluate(COLOURS, "strip")
        for number, label in enumerate((*HOSTILE, *NON_CLASS_LABELS, HOSTILE[0])):
            for step in range(10):
                moment = 8 * number + 0.8 * step
                page.show(snapshot(moment, label)._replace(probabilities=probabilities))
        tab.wait_for("#state", "Live")
        tab.wait_for("#prediction", HOSTILE[0])
        assert tab.text("#prediction") == HOSTILE[0]
        assert tab.text("#detail") == "Probability 40 %"
        assert tab.text("#bars .now .value") == "40 %"
        assert tab.page.locator("#bars .bar").first.evaluate("b => b.style.transform") == (
            "scaleX(0.4)"
        )
        assert tab.page.evaluate(COLOURS, "strip") > empty + many
        assert tab.page.locator("#legend li").count() == many + len(NON_CLASS_LABELS)
        assert "out of body 8 s" in tab.page.get_attribute("#strip", "aria-label")
        page.show(snapshot(90, HOSTILE[6])._replace(probabilities=probabilities[::-1].copy()))
        tab.wait_for("#prediction", HOSTILE[6])
        tab.wait_for("#bars li:last-child .value", "40")
        tab.page.locator("summary").click()
        for width in (390, 1280):
            tab.page.set_viewport_size({"width": width, "height": 800})
            for label in (HOSTILE[3], *NON_CLASS_LABELS):
                page.show(snapshot(91, label)._replace(probabilities=probabilities))
                tab.wait_for("#prediction", label.replace("_", " "))
                assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                seen, pale = tab.page.evaluate(PALE_TEXTS)
                assert seen > 25
                assert pale == []
        assert tab.page.evaluate(COLOURS, "lanes") > many
        assert tab.page.locator("script, iframe, b, img").count() == 1  # only its own script
        page.__exit__()
        tab.wait_for("#state", "Ended")
        assert tab.page.evaluate(PALE_TEXTS)[1] == []
        tab.page.wait_for_timeout(700)  # it does not try to come back
        assert tab.text("#state") == "Ended"
        assert tab.messages == []
        own = page.address.removeprefix("http")
        assert {url.removeprefix("http").removeprefix("ws") for url in tab.requests} - {
            "data:,"
        } == {own + name for name in ("", "live.css", "live.js", "live_charts.js", "feed")}


def test_a_frame_is_shown_and_hidden(browser) -> None:
    pixel = """() => {
      const canvas = document.getElementById("image");
      return canvas.hidden ? -1 : canvas.getContext("2d").getImageData(3, 3, 1, 1).data[0];
    }"""
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(200))
        tab.wait(f"Math.abs(({pixel})() - 200) < 4")
        tab.wait("document.getElementById('placeholder').hidden")
        page.show(snapshot(201, OUT_OF_BODY))
        tab.wait(f"({pixel})() === -1")
        tab.wait_for("#placeholder", "frame hidden: out of body")
        tab.wait("!document.getElementById('placeholder').hidden")
        assert tab.text("#detail") == "The camera is outside the body."
        page.show(snapshot(100))  # wound back
        tab.wait(f"Math.abs(({pixel})() - 100) < 4")
        tab.wait_for("#clock", "Video time 0:01:40")
        tab.wait("document.querySelectorAll('#legend li').length === 1")  # a new history


def test_the_prediction_is_read_aloud_only_when_it_changes(browser) -> None:
    count = """() => {
      window.changes = 0;
      new MutationObserver(() => { window.changes += 1; }).observe(
        document.getElementById("prediction"),
        { childList: true, characterData: true, subtree: true });
    }"""
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(1))
        tab.wait_for("#prediction", "sew")
        assert tab.page.get_attribute("#prediction", "aria-live") == "polite"
        tab.page.evaluate(count)
        for moment in range(2, 30):
            page.show(snapshot(moment))
            tab.page.wait_for_timeout(10)
        tab.wait_for("#clock", "0:00:29")
        assert tab.page.evaluate("window.changes") == 0
        page.show(snapshot(31, "cut"))
        tab.wait_for("#prediction", "cut")
        assert tab.page.evaluate("window.changes") == 1


def test_an_old_prediction_looks_old(browser) -> None:
    with LivePage(CLASSES, "run") as page, opened(browser, page.address) as tab:
        page.show(snapshot(1))
        tab.wait_for("#state", "Live")
        assert not tab.page.locator("#overlay").is_visible()
        assert tab.text("#prediction-title") == "Prediction now"
        tab.wait_for("#state", "no news for 3 s")
        assert tab.page.locator("#overlay").is_visible()
        assert "no news for" in tab.text("#overlay")
        assert tab.text("#prediction-title") == "Last prediction"
        assert tab.page.evaluate(PALE_TEXTS)[1] == []
        with opened(browser, page.address) as late:  # it is old for a new viewer, too
            late.wait_for("#state", "no news for")
        page.show(snapshot(2, state="reconnecting to the camera"))
        tab.wait_for("#state", "reconnecting to the camera")
        assert tab.page.locator("#overlay").is_visible()
        page.show(snapshot(3))
        tab.wait_for("#state", "Live")
        assert not tab.page.locator("#overlay").is_visible()


class Cable:
    """A connection between a browser and the page that can be cut."""

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


def test_a_lost_connection_is_shown_and_restored(browser) -> None:
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
            tab.wait_for("#prediction", "cut")
            tab.wait("document.getElementById('strip').ariaLabel.includes('sew')")
            page.show(snapshot(3))
            tab.wait_for("#state", "Live")
            assert all("WebSocket connection to" in message for message in tab.messages)


def test_the_strips_stretches_and_marks(browser) -> None:
    runs = """async predictions => {
      const { MARKS, runsOf } = await import(new URL("live_charts.js", location.href));
      return [Object.keys(MARKS), runsOf(predictions).map(run => [run.label, run.start, run.end])];
    }"""
    predictions = [[10, "a"], [11, "a"], [12, "b"], [13, "b"], [33, "b"], [34, UNCERTAIN]]
    with (
        LivePage(CLASSES, "run") as page,
        opened(browser, page.address, reduced_motion="reduce") as tab,
    ):
        marks, stretches = tab.page.evaluate(runs, [[*values, []] for values in predictions])
        assert marks == list(NON_CLASS_LABELS)
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
        tab.wait_for("#prediction", "step 59")
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


@pytest.mark.parametrize(
    "classes",
    [("cut", "sew"), (*LONG_NAMES, *"abcdef"), (*LONG_NAMES, *HOSTILE)],
    ids=["short", "long", "scrolled"],
)
def test_all_texts_are_whole(browser, classes: tuple[str, ...]) -> None:
    probabilities = np.eye(len(classes))[0]
    with (
        LivePage(classes, max(classes, key=len)) as page,
        opened(browser, page.address) as tab,
    ):
        for number, label in enumerate([*classes, *NON_CLASS_LABELS]):
            page.show(snapshot(8 * number, label)._replace(probabilities=probabilities))
        tab.wait_for("#bars .value", "100")
        tab.page.locator("summary").click()
        for label in (*classes[:6], *NON_CLASS_LABELS):
            page.show(snapshot(10_800, label)._replace(probabilities=probabilities))
            tab.wait_for(
                "#prediction", label.replace("_", " ") if label in NON_CLASS_LABELS else label
            )
            for width in WIDTHS:
                tab.page.set_viewport_size({"width": width, "height": 800})
                assert tab.page.evaluate(CUT_TEXTS, None) == [], (width, label)
        assert tab.page.evaluate(UNNAMED) == []
