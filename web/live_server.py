"""A page that shows a model's answers while they come, served to browsers on this machine.

The server has a thread and an event loop of its own. A viewer's browser asks for news over a
WebSocket, saying what it has had, and gets the newest there is when there is something new: one
message at a time, so that a slow browser gets fewer pictures and delays nobody. Whoever knows the
address, which holds a random token, can look.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self
from urllib.parse import urlsplit

from aiohttp import web

from timeline.segments import Snapshot
from utils.errors import UserError
from web.live_feed import WINDOW, Feed
from web.templating import page_environment, template_text

PICTURES_A_SECOND = 12

SILENCE = 1.0  # seconds after which a viewer is answered though nothing is new

PATIENCE = 10.0  # seconds that a viewer has to take a message and to ask for the next

FAREWELL = 1.0  # seconds that viewers have to be told the end

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Server": "live page",  # not the versions of Python and aiohttp
}


class LivePage:
    """The page of one run, there for as long as the `with` block lasts."""

    def __init__(
        self, classes: Sequence[str], title: str, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        """Nothing is opened yet.

        Args:
            title: what the page is headed, text of any kind.
            host: address or name to listen on; others than this machine can look only if it is
                not a loopback address, and the network in between can read along.
            port: 0 for any that is free.
        """
        self.address = ""
        """where browsers find the page, from the `with` on"""
        self._title, self._classes = title, list(classes)
        self._host, self._port = host, port
        self._token = secrets.token_urlsafe(24)
        self._feed = Feed()
        self._viewers: set[asyncio.Task] = set()
        self._leaving = threading.Event()

    def show(self, snapshot: Snapshot) -> None:
        """Show this from now on; from any thread, at once, whoever is looking."""
        self._feed.put(snapshot)

    def __enter__(self) -> Self:
        """Start to serve.

        Raises:
            UserError: the host or the port cannot be listened on.
        """
        listener = _listen(self._host, self._port)
        self.address = f"http://{_authority(self._host, listener)}/{self._token}/"
        self._files = self._load()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, started)),
            name="live page",
            daemon=True,
        )
        self._thread.start()
        started.result(timeout=10)
        return self

    def __exit__(self, *exception: object) -> None:
        """Tell the viewers that it is over, and stop."""
        self._leaving.set()
        self._thread.join(timeout=5)

    def _load(self) -> dict[str, tuple[str, str]]:
        """The files there are: by name, their text and type."""
        environment = page_environment()
        page = environment.get_template("live.html.j2").render(
            title=self._title, classes=self._classes, window=WINDOW, root=f"/{self._token}/"
        )
        files = {"": (page.encode("utf-8", "replace").decode(), "text/html")}
        for name, kind in (
            ("live.css", "text/css"),
            ("live.js", "text/javascript"),
            ("live_charts.js", "text/javascript"),
        ):
            files[name] = (template_text(name), kind)
        return files

    async def _serve(self, listener: socket.socket, started: Future) -> None:
        """Publish what is newest, and let viewers have it, until the block is left."""
        self._published = asyncio.Event()
        # Nothing is logged, of bad requests neither: it would tell the token and who looked.
        silent = logging.Logger("live page", logging.CRITICAL + 1)
        server = web.Server(self._answer, access_log=None, logger=silent)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        started.set_result(None)
        while not self._leaving.is_set():
            if self._feed.publish(watched=bool(self._viewers)):
                self._wake_viewers()
            await asyncio.sleep(1 / PICTURES_A_SECOND)
        self._feed.publish(watched=bool(self._viewers), last=True)
        self._wake_viewers()
        if self._viewers:
            await asyncio.wait(self._viewers, timeout=FAREWELL)
        await runner.cleanup()

    def _wake_viewers(self) -> None:
        self._published.set()
        self._published = asyncio.Event()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request; one that does not know the token learns nothing."""
        host = request.headers.get("Host", "")
        token, _, name = request.path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode("utf-8", "replace"), self._token.encode())
        if not (known and _is_ours(host, self._host) and request.method == "GET"):
            return web.Response(status=404, headers=HEADERS)
        if name == "feed":
            if request.headers.get("Origin") != f"http://{host}":
                return web.Response(status=403, headers=HEADERS)
            return await self._attend(request)
        if name not in self._files:
            return web.Response(status=404, headers=HEADERS)
        text, kind = self._files[name]
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _attend(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one viewer until it goes, hangs, or there is no more."""
        viewer = web.WebSocketResponse(max_msg_size=64, compress=False, timeout=FAREWELL)
        viewer.headers.update(HEADERS)
        await viewer.prepare(request)
        task = asyncio.current_task()
        self._viewers.add(task)
        seen = -1
        try:
            while not self._feed.ended or seen != self._feed.version:
                after = int(await viewer.receive_str(timeout=PATIENCE))
                if seen == self._feed.version:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._published.wait(), SILENCE)
                message = self._feed.message(after, seen)
                seen = self._feed.version
                await asyncio.wait_for(viewer.send_bytes(message), PATIENCE)
            await viewer.close()
        except (TimeoutError, ConnectionError, TypeError, ValueError):
            # It hangs, is gone or talks nonsense. What is not sent yet goes too.
            if request.transport:
                request.transport.abort()
        finally:
            self._viewers.discard(task)
        return viewer


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: there are only 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: choose another with --port") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed: choose another with --port") from None
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise UserError(f"cannot listen on {host}: {reason}") from None
    except UnicodeError:
        raise UserError(f"cannot listen on {host}: not a name of a host") from None


def _authority(host: str, listener: socket.socket) -> str:
    """Host and port as an address has them."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()  # "all of this machine's" is no place to go to
    return f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _is_ours(authority: str, host: str) -> bool:
    """Whether a `Host` header can be about this server.

    Another site's name may be made to lead here (DNS rebinding), and then its pages could read
    ours. A number cannot.
    """
    try:
        name = urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in {"localhost", host.lower(), socket.gethostname().lower()}
