"""The way out of sandboxes that may connect to named hosts: a proxy that knows their names, and nothing else.

A worker with such a grant is in a network namespace of its own, in which there is no interface but loopback, and nobody
listens there but this proxy: at a socket that was made in the namespace, and that the proxy, outside, accepts at. It
speaks CONNECT (RFC 9110, 9.3.6) and looks names up by itself, once: it connects to an address that it has looked at.

The zygote forks it before any code of the app's is loaded. Where it ends, the zygote ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NoReturn

from ..model.sandbox import parse_host
from ..platform import linux

if TYPE_CHECKING:
    import asyncio

PORT: Final = 3128
"""Where the proxy is, at 127.0.0.1 in the worker's own network namespace."""

URL: Final = f"http://127.0.0.1:{PORT}"

TUNNELS: Final = 64
"""Connections of a worker at once; more wait to be accepted."""

_HEAD: Final = 8 * 1024
_HEAD_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 10.0
_ADDRESSES: Final = 4
"""How many of a name's addresses are tried."""

_LOOKUPS: Final = 2
"""Names that are looked up at once for a worker."""

_THREADS: Final = 64
_REFUSALS: Final = 10
"""Refusals of a worker that are logged in a second."""

_RESERVED: Final = 576
"""Descriptors for the workers' sockets, of which there may be 512, and what else there is."""

_PIECE: Final = 64 * 1024
_DESCRIPTOR_CEILING: Final = 1 << 20
_ORDER: Final = struct.Struct("=qq")
_SET_FLAGS: Final = 0x8914
"""SIOCSIFFLAGS (netdevice(7)), with IFF_UP and IFF_RUNNING."""

_UP: Final = struct.pack("16sh22x", b"lo", 0x41)
_REQUEST: Final = re.compile(rb"CONNECT ([!-~]{1,300}) HTTP/1\.[01]\r\n")
_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC: Final = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "168.63.129.16/32", "3fff::/20")))
"""6to4 relays (RFC 7526), a cloud's own server, documentation (RFC 9637): not all Pythons know them."""

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def listen() -> socket.socket:
    """In a new network namespace: bring loopback up, and listen where the proxy is to be. OSError where that fails."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        fcntl.ioctl(listener, _SET_FLAGS, _UP)
        listener.bind(("127.0.0.1", PORT))
        listener.listen(TUNNELS)
    except BaseException:
        listener.close()
        raise
    return listener


def is_public(address: str) -> bool:
    """Whether an address is one of the internet at large: none of this machine, of a private network, or in disguise.

    Addresses of IPv6 that stand for one of IPv4 are judged by that (RFC 4291, 2.5.5; RFC 3056; RFC 4380; RFC 6052).
    """
    found: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a scope (RFC 4007), say
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is None and (found.teredo is not None or found not in _GLOBAL_UNICAST):
            return False
        if inner is not None:
            found = inner
    return found.is_global and not found.is_multicast and not any(found in network for network in _NOT_PUBLIC)


class EgressProxy:
    """The proxy as the zygote has it. `pid` is its process."""

    def __init__(self, hosts: Iterable[str], prepare: Callable[[], object]) -> None:
        """Fork it, and have it `prepare`. OSError where that fails."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            self._control.close()
            theirs.close()
            raise
        if not self.pid:
            _run(theirs.detach(), frozenset(hosts), parent, prepare)
        theirs.close()
        self._control.setblocking(False)

    def add(self, worker: int, pid: int, listener: int) -> None:
        """Serve a worker, by its number, whose socket this is. OSError where the proxy does not take it."""
        socket.send_fds(self._control, [_ORDER.pack(worker, pid)], [listener])

    def remove(self, worker: int) -> None:
        """A worker has ended: so do its connections."""
        with contextlib.suppress(BrokenPipeError):
            self._control.send(_ORDER.pack(worker, 0))


def _run(fd: int, hosts: frozenset[str], parent: int, prepare: Callable[[], object]) -> NoReturn:
    """The proxy's whole life, in its process."""
    try:
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            os.dup2(fd, 3)
            os.closerange(4, _DESCRIPTOR_CEILING)
            linux.drop_capabilities()
            linux.set_no_new_privs()
            linux.set_dumpable(dumpable=False)
            prepare()
            import asyncio  # in this process alone

            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            most = max((min(hard, _DESCRIPTOR_CEILING) - _RESERVED) // 2, TUNNELS)
            asyncio.run(_Proxy(socket.socket(fileno=3), hosts, most).serve())
    except BaseException as error:  # noqa: BLE001 - whatever it was, it is told
        print(f"the egress proxy has failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


class _Refused(Exception):
    """A request that is not granted: the status that tells so, and why."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Client:
    """A worker: the socket that it connects to, its tunnels, and what names it in the log."""

    def __init__(self, pid: int, listener: socket.socket) -> None:
        import asyncio

        self.pid = pid
        self.listener = listener
        self.tasks: set[asyncio.Task[None]] = set()
        self.lookups = asyncio.Semaphore(_LOOKUPS)
        self._second = 0
        self._refused = 0

    def looked_up(self, looking: asyncio.Future[list[str]]) -> None:
        """A name was looked up, or not, whether or not somebody waits for it still."""
        self.lookups.release()
        if not looking.cancelled():
            looking.exception()

    def say(self, words: str) -> None:
        """Log what it does."""
        print(f"egress of worker {self.pid}: {words}", flush=True)

    def say_refused(self, words: str) -> None:
        """Log what it may not do: so much a second, that nobody's connections are lost among it."""
        second = int(time.monotonic())
        if second != self._second:
            more = self._refused - _REFUSALS
            if more > 0:
                print(f"egress of worker {self.pid}: {more} more were refused", file=sys.stderr, flush=True)
            self._second, self._refused = second, 0
        self._refused += 1
        if self._refused <= _REFUSALS:
            print(f"egress of worker {self.pid}: refused: {words}", file=sys.stderr, flush=True)


class _Proxy:
    """Accepts for all workers, in one event loop."""

    def __init__(self, control: socket.socket, hosts: frozenset[str], most: int) -> None:
        """`most` is how many tunnels there may be at once, of all workers."""
        from concurrent.futures import ThreadPoolExecutor

        self._control = control
        self._hosts = hosts
        self._most = most
        self._clients: dict[int, _Client] = {}
        self._executor = ThreadPoolExecutor(_THREADS)

    async def serve(self) -> None:
        """Until the zygote is gone."""
        import asyncio

        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        self._room = asyncio.Semaphore(self._most)
        self._control.setblocking(False)
        loop.add_reader(self._control, self._hear, over)
        await over.wait()

    def _hear(self, over: asyncio.Event) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, _ORDER.size, 1)
        except BlockingIOError:
            return
        if not data:
            over.set()
            return
        number, pid = _ORDER.unpack(data)
        if fds:
            self._begin(number, pid, socket.socket(fileno=fds[0]))
        elif pid:
            raise OSError(f"the socket of worker {pid} did not come: no descriptor is left")
        elif (client := self._clients.pop(number, None)) is not None:
            client.listener.close()
            for task in client.tasks:
                task.cancel()

    def _begin(self, number: int, pid: int, listener: socket.socket) -> None:
        import asyncio

        listener.setblocking(False)
        client = self._clients[number] = _Client(pid, listener)
        task = asyncio.get_running_loop().create_task(self._accept(client))
        client.tasks.add(task)

    async def _accept(self, client: _Client) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(TUNNELS)
        while True:
            await room.acquire()
            await self._room.acquire()
            try:
                sock, _ = await loop.sock_accept(client.listener)
            except BaseException as error:
                room.release()
                self._room.release()
                if not isinstance(error, OSError):
                    raise
                client.say_refused(f"a connection can't be accepted: {error}")
                await asyncio.sleep(1)
                continue
            task = loop.create_task(self._serve_one(client, sock))
            client.tasks.add(task)
            task.add_done_callback(client.tasks.discard)
            task.add_done_callback(lambda task: room.release())
            task.add_done_callback(lambda task: self._room.release())

    async def _serve_one(self, client: _Client, sock: socket.socket) -> None:
        import asyncio

        reader, writer = await asyncio.open_connection(sock=sock, limit=_HEAD)
        try:
            await self._tunnel(client, reader, writer)
        except _Refused as refused:
            client.say_refused(str(refused))
            body = f"{refused}\n".encode(errors="replace")
            head = f"HTTP/1.1 {refused.status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            with contextlib.suppress(OSError):
                writer.write(head.encode() + body)
                writer.write_eof()
                async with asyncio.timeout(_HEAD_SECONDS):
                    while await reader.read(_PIECE):
                        pass  # so that no reset overtakes the answer
        except (OSError, asyncio.IncompleteReadError):
            pass  # one of the two has gone
        finally:
            writer.close()

    async def _tunnel(self, client: _Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        host, port = await self._asked(reader)
        up = await self._connect(client, host, port)
        address = up[1].get_extra_info("peername")[0]
        if address == up[1].get_extra_info("sockname")[0]:
            up[1].transport.abort()
            raise _Refused("403 Forbidden", f"{host} is this machine ({address})")
        client.say(f"connected to {host}:{port} ({address})")
        whole = False
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, up[1]))
                group.create_task(_pump(up[0], writer))
            whole = True
        except* OSError:
            pass  # one of the two has gone
        finally:
            if not whole:  # nobody waits for what it has not taken
                up[1].transport.abort()
                writer.transport.abort()
            up[1].close()

    async def _asked(self, reader: asyncio.StreamReader) -> tuple[str, int]:
        """Where a worker wants to go. _Refused where that is nowhere that it may."""
        import asyncio

        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Refused("431 Request Header Fields Too Large", f"a head of over {_HEAD} bytes") from None
        except TimeoutError:
            raise _Refused("408 Request Timeout", "its head did not come in time") from None
        asked = _REQUEST.match(head)
        if asked is None:
            line = head.partition(b"\r\n")[0][:200].decode("latin-1")
            raise _Refused("405 Method Not Allowed", f"{line!r}: only CONNECT is known here")
        target = asked[1].decode()
        try:
            host, port = parse_host(target)
        except ValueError:
            raise _Refused("403 Forbidden", f"{target!r} is no host by name, with a port") from None
        if f"{host}:{port}" not in self._hosts:
            raise _Refused("403 Forbidden", f"{host}:{port} is not among the sandbox's connect_hosts")
        return host, port

    async def _connect(
        self, client: _Client, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        import asyncio

        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await client.lookups.acquire()
                # What looks up goes on where nobody waits any more, and counts for its worker as long as it does.
                looking = asyncio.ensure_future(
                    asyncio.get_running_loop().run_in_executor(self._executor, _look_up, host, port)
                )
                looking.add_done_callback(client.looked_up)
                found = await asyncio.shield(looking)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise _Refused("502 Bad Gateway", f"{host} can't be looked up: {str(error) or 'no answer'}") from None
        addresses = list(dict.fromkeys(found))
        public = [address for address in addresses if is_public(address)]
        if not public:
            raise _Refused("403 Forbidden", f"{host} has private addresses only: {', '.join(addresses[:_ADDRESSES])}")
        why = ""
        for address in public[:_ADDRESSES]:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    return await asyncio.open_connection(address, port)
            except OSError as error:
                why = str(error) or "no answer"
        raise _Refused("502 Bad Gateway", f"{host}:{port} can't be connected to: {why}")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, no faster than it is taken, and then its end."""
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(entry[4][0]) for entry in found]
