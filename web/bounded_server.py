"""A web server whose connections are few and short, whatever strangers do.

The server shares its process with a camera and with open result files, and each connection takes a
file descriptor from them. So there is a limit to the connections in all and per address. A
connection ends after a few seconds, whether its request is complete or not, unless it belongs to a
viewer, who gets updates until the end. Where there are too many connections, the oldest one gives
way: a browser gets its answer in milliseconds, while half-open connections only grow older.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

try:
    import resource
except ImportError:  # Windows, where open connections are not counted as files
    resource = None

CONNECTION_TIMEOUT = 5.0  # seconds that a browser has for its requests and their responses

MAX_CONNECTIONS = 256  # in all; half of them per address, and half of both for viewers

ACCEPTED_AT_ONCE = 4  # connections that exist for a moment before the limits are applied to them

MAX_LOGGED = 5  # messages of the event loop


class BoundedServer(web.Server):
    """A server with limits for its connections."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        # No request has a body that is worth waiting for.
        super().__init__(*args, lingering_time=0, **settings)
        self.viewers: dict[RequestHandler, asyncio.Task] = {}
        """connections of viewers, and the tasks that serve them"""
        self._limit = connection_limit()
        self._opened: dict[RequestHandler, asyncio.Transport] = {}  # the oldest first
        self._timers: dict[RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection; where there are too many, drop the oldest one of no viewer."""
        super().connection_made(handler, transport)
        self._opened[handler] = transport
        self._limit_time(handler)
        neighbours = self._neighbours(handler)
        if len(neighbours) > self._limit // 2:
            self._drop_oldest(neighbours)
        elif len(self._opened) > self._limit:
            self._drop_oldest(list(self._opened))

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._forget(handler)

    def has_room_for_viewer(self, handler: RequestHandler) -> bool:
        """Whether this connection may become one of a viewer."""
        if handler not in self._opened:
            return False  # it was dropped while its request was read
        neighbours = self.viewers.keys() & self._neighbours(handler)
        return len(self.viewers) < self._limit // 2 and len(neighbours) < self._limit // 4

    @contextlib.contextmanager
    def viewer(self, handler: RequestHandler) -> Iterator[None]:
        """Let a connection stay for as long as the current task serves its viewer."""
        self._timers[handler].cancel()
        self.viewers[handler] = asyncio.current_task()
        try:
            yield
        finally:
            del self.viewers[handler]
            if handler in self._opened:
                self._limit_time(handler)

    def _neighbours(self, handler: RequestHandler) -> list[RequestHandler]:
        """The connections that come from the same address, this one included."""
        address = _address(self._opened[handler])
        return [other for other in self._opened if _address(self._opened[other]) == address]

    def _limit_time(self, handler: RequestHandler) -> None:
        loop = asyncio.get_running_loop()
        self._timers[handler] = loop.call_later(CONNECTION_TIMEOUT, self._drop, handler)

    def _drop_oldest(self, handlers: list[RequestHandler]) -> None:
        self._drop(next(handler for handler in handlers if handler not in self.viewers))

    def _drop(self, handler: RequestHandler) -> None:
        """Close a connection at once; what is not sent yet is dropped."""
        self._opened[handler].abort()
        self._forget(handler)

    def _forget(self, handler: RequestHandler) -> None:
        if self._opened.pop(handler, None):
            self._timers.pop(handler).cancel()


def _address(transport: asyncio.Transport) -> str:
    """The address of the other end; empty if it had left before it was asked for."""
    return (transport.get_extra_info("peername") or ("",))[0]


def connection_limit() -> int:
    """The largest number of connections: a quarter of the files that the process may open."""
    if resource is None:
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files < 0 else max(16, min(MAX_CONNECTIONS, files // 4))


def limit_log(loop: asyncio.AbstractEventLoop) -> None:
    """Let an event loop log its first few problems only: each attempt to connect may be one."""
    logged = 0

    def log(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        logged += 1
        if logged <= MAX_LOGGED:
            loop.default_exception_handler(context)

    loop.set_exception_handler(log)
