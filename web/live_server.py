"""The live page: frames and predictions as they come, served to browsers.

The server has a thread and an event loop of its own. A browser asks for an update over a WebSocket,
tells what it already has, and gets the newest state as soon as something is new. It gets one
message at a time: a slow browser gets fewer frames and delays nobody. The address holds a random
token; everybody who knows the address can watch. The number of connections is limited
(bounded_server.py).
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
from web.bounded_server import ACCEPTED_AT_ONCE, BoundedServer, limit_log
from web.live_feed import WINDOW, SnapshotFeed
from web.templating import break_points, page_environment, template_text

UPDATES_PER_SECOND = 12

HEARTBEAT = 1.0  # seconds after which a viewer gets a message although nothing is new

RECEIVE_TIMEOUT = 10.0  # seconds that a viewer has to take a message and to ask for the next one

CLOSE_TIMEOUT = 1.0  # seconds that viewers have to take the last message

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Server": "live page",  # without the versions of Python and aiohttp
}


class LivePage:
    """The live page of one source, as a context manager that serves it."""

    def __init__(
        self, classes: Sequence[str], title: str, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        """Prepare the page; nothing is opened yet.

        Args:
            classes: names of the classes.
            title: title of the page; it may be any text.
            host: address or name to listen on. Other machines can watch only if it is not a
                loopback address; the traffic is then not encrypted.
            port: port to listen on; 0: any free one.
        """
        self.address = ""
        """address of the page for browsers, known when the server has started"""
        self._title, self._classes = title, list(classes)
        self._host, self._port = host, port
        self._token = secrets.token_urlsafe(24)
        self._feed = SnapshotFeed()
        self._leaving = threading.Event()

    def show(self, snapshot: Snapshot) -> None:
        """Show a snapshot from now on. It returns at once, in any thread."""
        self._feed.publish(snapshot)

    def __enter__(self) -> Self:
        """Start the server.

        Raises:
            UserError: it cannot listen on the host or the port.
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

    def __exit__(self, *_: object) -> None:
        """Tell the viewers that the run has ended, and stop the server."""
        self._leaving.set()
        self._thread.join(timeout=5)

    def _load(self) -> dict[str, tuple[str, str]]:
        """The files of the page by name, each as text and content type."""
        environment = page_environment()
        page = environment.get_template("live.html.j2").render(
            title=self._title,
            classes=[break_points(name) for name in self._classes],
            window=WINDOW,
            root=f"/{self._token}/",
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
        """Update the feed and wake the viewers regularly, until the context is left."""
        self._updated = asyncio.Event()
        # Nothing is logged, not even bad requests: a log would hold the token and the viewers.
        silent = logging.Logger("live page", logging.CRITICAL + 1)
        limit_log(asyncio.get_running_loop())
        self._server = BoundedServer(self._respond, access_log=None, logger=silent)
        viewers = self._server.viewers
        runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, listener, backlog=ACCEPTED_AT_ONCE).start()
        listener.listen(socket.SOMAXCONN)  # those that wait to be accepted cost no file
        started.set_result(None)
        while not self._leaving.is_set():
            if self._feed.update(watched=bool(viewers)):
                self._wake_viewers()
            await asyncio.sleep(1 / UPDATES_PER_SECOND)
        self._feed.update(watched=bool(viewers), last=True)
        self._wake_viewers()
        if viewers:
            await asyncio.wait(viewers.values(), timeout=CLOSE_TIMEOUT)
        await runner.cleanup()

    def _wake_viewers(self) -> None:
        self._updated.set()
        self._updated = asyncio.Event()

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Respond to a request. Without the token, every response is an empty 404."""
        host = request.headers.get("Host", "")
        token, _, name = request.path.removeprefix("/").partition("/")
        has_token = secrets.compare_digest(token.encode("utf-8", "replace"), self._token.encode())
        if not (has_token and _is_own_host(host, self._host) and request.method == "GET"):
            return web.Response(status=404, headers=HEADERS)
        if name == "feed":
            if request.headers.get("Origin") != f"http://{host}":
                return web.Response(status=403, headers=HEADERS)
            if not self._server.has_room_for_viewer(request.protocol):
                return web.Response(status=503, headers=HEADERS)
            with self._server.viewer(request.protocol):
                return await self._serve_viewer(request)
        if name not in self._files:
            return web.Response(status=404, headers=HEADERS)
        text, kind = self._files[name]
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _serve_viewer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one viewer until it leaves, hangs, or the run has ended."""
        viewer = web.WebSocketResponse(max_msg_size=64, compress=False, timeout=CLOSE_TIMEOUT)
        viewer.headers.update(HEADERS)
        await viewer.prepare(request)
        seen = -1
        try:
            while not self._feed.ended or seen != self._feed.version:
                after = int(await viewer.receive_str(timeout=RECEIVE_TIMEOUT))
                if seen == self._feed.version:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._updated.wait(), HEARTBEAT)
                message = self._feed.delta(after, seen)
                seen = self._feed.version
                await asyncio.wait_for(viewer.send_bytes(message), RECEIVE_TIMEOUT)
            await viewer.close()
        except (TimeoutError, ConnectionError, TypeError, ValueError):
            # The viewer hangs, has left, or sent nonsense. Drop what is not sent yet.
            if request.transport:
                request.transport.abort()
        return viewer


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the host and port.

    Raises:
        UserError: that is not possible.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: choose another with --port") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed: choose another with --port") from None
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise UserError(f"cannot listen on {host}: {reason}") from None
    except UnicodeError:
        raise UserError(f"cannot listen on {host}: not the name of a host") from None


def _authority(host: str, listener: socket.socket) -> str:
    """Host and port as written in an address."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()  # "all addresses" is none that a browser could open
    return f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _is_own_host(authority: str, host: str) -> bool:
    """Whether a `Host` header names this server.

    The name of another site may be pointed to this machine (DNS rebinding), whose pages could then
    read ours. That is not possible with an IP address.
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
