"""TLS between hosts and agents, for networks that others can listen on. Certificates are the user's own.

An agent's event loop speaks TLS by itself. A host's lanes are plain sockets, which its jobs read and write themselves:
so a thread stands between each of them and its connection, and passes on what comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ConfigurationError

_PIECE: Final = 256 * 1024
_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, kw_only=True)
class ClusterTLS:
    """PEM files: on each node `cert`, with its chain, and its `key`; for hosts `ca`, who has signed those of the nodes.

    What a certificate is made out to is not looked at: agents are known by their signature, and by the pool's secret.
    Raises ConfigurationError for a file that is no path.
    """

    cert: str
    key: str
    ca: str

    def __post_init__(self) -> None:
        for name in ("cert", "key", "ca"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike)) or not str(value):
                raise ConfigurationError(f"{name} of a cluster's TLS is the path of a PEM file, not {value!r}")
            object.__setattr__(self, name, os.path.abspath(value))

    def for_agents(self) -> ssl.SSLContext:
        """What an agent speaks. OSError where the files can't be read, or don't belong together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key)
        return context

    def for_hosts(self) -> ssl.SSLContext:
        """What a host speaks. OSError where the file can't be read."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.load_verify_locations(self.ca)
        return context


class Relay:
    """Makes connections by TLS that look like plain ones: a thread passes on what comes."""

    def __init__(self, tls: ClusterTLS) -> None:
        """OSError where the certificate of `ca` can't be read."""
        self._context = tls.for_hosts()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fds: set[int] = set()
        self._closing: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="blastdoor-tls", daemon=True)
        self._thread.start()

    def dial(self, address: tuple[str, int], timeout: float) -> socket.socket:
        """A connection to this address. OSError where none can be had in time."""
        dialing = self._dial(address, timeout)
        try:
            return asyncio.run_coroutine_threadsafe(dialing, self._loop).result(timeout + 1)
        except RuntimeError as error:
            dialing.close()
            raise ConnectionError("the pool is closed") from error
        except CancelledError as error:
            raise ConnectionError("the pool was closed meanwhile") from error

    def close(self) -> None:
        """End all of them."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors."""
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    async def _dial(self, address: tuple[str, int], timeout: float) -> socket.socket:
        dialing = asyncio.current_task()
        assert dialing is not None
        self._tasks.add(dialing)
        try:
            async with asyncio.timeout(timeout):
                outer = await asyncio.open_connection(*address, ssl=self._context, limit=_PIECE)
            try:
                ours, inner = await _open_pair()
            except BaseException:
                self._drop(outer[1])
                raise
        finally:
            self._tasks.discard(dialing)
        fds = {end[1].get_extra_info("socket").fileno() for end in (inner, outer)}
        self._fds |= fds

        def over(task: asyncio.Task[None]) -> None:  # also of a task that was cancelled before it began
            self._tasks.discard(task)
            self._fds -= fds
            outer[1].transport.abort()
            self._drop(outer[1])
            self._drop(inner[1])

        task = self._loop.create_task(_pass_on(inner, outer))
        self._tasks.add(task)
        task.add_done_callback(over)
        return ours

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        """Close it, and know it until it is closed."""
        writer.close()
        task = self._loop.create_task(_closed(writer))
        self._closing[task] = writer
        task.add_done_callback(self._closing.pop)

    async def _end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._closing.values():
            writer.transport.abort()  # it may wait for somebody to read
        await asyncio.gather(*self._closing)


async def _open_pair() -> tuple[socket.socket, _End]:
    """A connection inside of this process: the one end as it is, the other as streams."""
    ours, theirs = socket.socketpair()
    try:
        theirs.setblocking(False)
        return ours, await asyncio.open_connection(sock=theirs, limit=_PIECE)
    except BaseException:
        ours.close()
        theirs.close()
        raise


async def _pass_on(inner: _End, outer: _End) -> None:
    """Both ways, until one of the two ends: TLS has no half-closed connections here."""
    pumps = [asyncio.create_task(_pump(inner[0], outer[1])), asyncio.create_task(_pump(outer[0], inner[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
