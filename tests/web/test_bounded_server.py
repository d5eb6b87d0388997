"""The live page under attack: half-open connections, too many connections, few open files."""

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import aiohttp
import numpy as np
import pytest
from helpers import ROOT

from timeline.segments import Snapshot
from web import bounded_server
from web.live_server import LivePage

SHORT = 0.4  # seconds instead of CONNECTION_TIMEOUT

# A live page in a process that may open 128 files, and that needs 64 of them now and then, as for a
# camera and for results. It prints its address, shows a snapshot 50 times per second, and says at
# the end whether all files could be opened.
PROCESS = f"""
import contextlib, resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import numpy as np
from timeline.segments import Snapshot
from web import bounded_server
from web.live_server import LivePage

bounded_server.CONNECTION_TIMEOUT = {SHORT}
leaving = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), leaving.set()), daemon=True).start()
with LivePage(("cut", "sew"), "run") as page:
    print(page.address, flush=True)
    number = 0
    while not leaving.wait(0.02):
        page.show(Snapshot(number / 50, "cut", np.array([1.0, 0.0]), None, ""))
        number += 1
        with contextlib.ExitStack() as files:
            for _ in range(64):
                files.enter_context(open("scratch", "w"))
print("all files could be opened")
"""


@contextlib.contextmanager
def half_open(address: SplitResult, *sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent these bytes, and then nothing."""
    with contextlib.ExitStack() as stack:
        lines = []
        for start in sent:
            line = socket.create_connection((address.hostname, address.port), timeout=30)
            lines.append(stack.enter_context(line))
            with contextlib.suppress(ConnectionError):  # dropped already
                line.sendall(start)
        yield lines


def is_dropped(line: socket.socket) -> bool:
    """Read until the server closes the connection; False if that takes too long."""
    try:
        while line.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def beginnings(address: SplitResult) -> list[bytes]:
    """Requests that stop in the middle, one for each place."""
    page = f"GET {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\n".encode()
    return [
        b"",
        b"GET /",
        page,
        page + b"X-Header: a",
        page + b"Content-Length: 100\r\n\r\nbody",
        page + b"Transfer-Encoding: chunked\r\n\r\n5\r\nbo",
        page + b"\r\n",  # complete, and then idle
        page + b"\r\nGET /",
    ]


async def connect(client: aiohttp.ClientSession, page: str) -> aiohttp.ClientWebSocketResponse:
    return await client.ws_connect(f"{page}feed", origin=page.removesuffix(urlsplit(page).path))


async def ask(viewer: aiohttp.ClientWebSocketResponse, after: int) -> tuple[int, list[Any]]:

    await viewer.send_str(str(after))
    message = await viewer.receive_bytes(timeout=30)
    head = json.loads(message[4 : 4 + int.from_bytes(message[:4])])
    return head["next"], head["predictions"]


def test_a_flood_costs_viewers_no_update_and_the_process_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        page = process.stdout.readline().strip()
        address = urlsplit(page)

        async def session() -> None:
            async with asyncio.timeout(120), aiohttp.ClientSession() as client:
                viewer = await connect(client, page)
                after, got = await ask(viewer, 0)
                kinds = itertools.islice(itertools.cycle(beginnings(address)), 200)
                with half_open(address, *kinds) as lines:
                    late = await connect(client, page)  # while they are open
                    for number in range(40):
                        after, more = await ask(viewer, after)
                        got += more
                        assert await ask(late, 0)
                        async with client.get(page) as response:
                            assert response.status == 200, number
                    dropped = await asyncio.gather(
                        *(asyncio.to_thread(is_dropped, line) for line in lines)
                    )
                    assert all(dropped)
                times = [time for time, *_ in got]
                assert times == [number / 50 for number in range(len(times))]
                assert len(times) > 40
                newest = await connect(client, page)
                assert (await ask(newest, 0))[0] >= after

        asyncio.run(session())
        output, _ = process.communicate("\n", timeout=60)
    assert output == "all files could be opened\n"  # and nothing was logged
    assert process.returncode == 0


def test_each_unfinished_connection_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "CONNECTION_TIMEOUT", SHORT)
    with LivePage(("cut", "sew"), "run") as page:
        address = urlsplit(page.address)
        with half_open(address, *beginnings(address)) as lines:
            assert [is_dropped(line) for line in lines] == [True] * 8


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: "])
def test_a_trickle_of_bytes_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(bounded_server, "CONNECTION_TIMEOUT", SHORT)
    with LivePage(("cut", "sew"), "run") as page, half_open(urlsplit(page.address), start) as lines:
        lines[0].settimeout(0.02)
        for _ in range(1500):  # at most 30 s
            try:
                lines[0].send(b"a")
                if lines[0].recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("still connected")


def test_who_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "CONNECTION_TIMEOUT", SHORT)
    with LivePage(("cut", "sew"), "run") as page:
        address = urlsplit(page.address)
        request = f"GET {address.path}live.js HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
        with half_open(address, 10_000 * request) as (line,):
            line.settimeout(30)
            # The responses would be 90 MB: it can never have had them all.
            with pytest.raises(ConnectionError):
                while True:
                    line.send(request)


def test_a_viewer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "CONNECTION_TIMEOUT", 0.1)

    async def session(page: LivePage) -> None:
        async with asyncio.timeout(60), aiohttp.ClientSession() as client:
            viewer = await connect(client, page.address)
            for number in range(1, 20):
                page.show(Snapshot(number, "cut", np.array([1.0, 0.0]), None, ""))
                after = 0
                while after < number:
                    after, _ = await ask(viewer, 0)
                await asyncio.sleep(0.03)

    with LivePage(("cut", "sew"), "run") as page:
        asyncio.run(session(page))


def test_the_oldest_connection_gives_way_but_no_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "connection_limit", lambda: 16)

    async def session(page: LivePage) -> None:
        async with asyncio.timeout(60), aiohttp.ClientSession() as client:
            viewers = [await connect(client, page.address) for _ in range(4)]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await connect(client, page.address)
            assert refused.value.status == 503
            with half_open(urlsplit(page.address), *[b"GET /"] * 20) as lines:
                dropped = await asyncio.gather(
                    *(asyncio.to_thread(is_dropped, line) for line in lines[:16])
                )
                assert all(dropped)
                for line in lines[16:]:  # eight per address, and four of them are viewers
                    line.settimeout(0.05)
                    assert not is_dropped(line)
            for viewer in viewers:
                await ask(viewer, 0)
            await viewers[0].close()
            await connect(client, page.address)

    with LivePage(("cut", "sew"), "run") as page:
        asyncio.run(session(page))


@pytest.mark.skipif(sys.platform != "linux", reason="only 127.0.0.1 is a loopback address")
def test_one_address_cannot_take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "connection_limit", lambda: 16)
    with LivePage(("cut", "sew"), "run") as page, contextlib.ExitStack() as stack:
        address = urlsplit(page.address)

        def open_from(number: int) -> socket.socket:
            line = socket.create_connection(
                (address.hostname, address.port), 30, (f"127.0.0.{number}", 0)
            )
            line.settimeout(0.05)
            return stack.enter_context(line)

        quiet = [open_from(2) for _ in range(4)]
        flood = [open_from(3) for _ in range(30)]
        for line in flood[:22]:
            line.settimeout(30)
            assert is_dropped(line)
        assert not any(is_dropped(line) for line in (*quiet, *flood[22:]))
        others = [open_from(4 + number) for number in range(6)]  # 18 in all: the oldest give way
        for line in quiet[:2]:
            line.settimeout(30)
            assert is_dropped(line)
        assert not any(is_dropped(line) for line in (*quiet[2:], *flood[22:], *others))


@pytest.mark.parametrize(
    ("files", "limit"), [(64, 16), (128, 32), (1024, 256), (2**20, 256), (-1, 256)]
)
def test_connections_are_fewer_than_files(
    monkeypatch: pytest.MonkeyPatch, files: int, limit: int
) -> None:
    monkeypatch.setattr(bounded_server.resource, "getrlimit", lambda _: (files, files))
    assert bounded_server.connection_limit() == limit


def test_the_log_of_the_loop_is_short(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        bounded_server.limit_log(loop)
        for _ in range(1000):
            loop.call_exception_handler({"message": "socket.accept() out of system resource"})

    asyncio.run(fail())
    assert len(caplog.records) == bounded_server.MAX_LOGGED
