"""What many jobs on one connection would cost: answers that their callers read, against those that a reader hands on.

Small answers over TCP from one other process, in turns in one run: one caller's median, and the rate of sixteen. Where
each caller has a connection it reads itself; where they share one, a thread reads for all, and wakes them by eventfds.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

SIZE: Final = 200
CALLERS: Final = 16
ROUNDS: Final = 20_000
SECONDS: Final = 3.0

Call = Callable[[], object]


def serve(listener: socket.socket) -> None:
    """Give back what comes, on each connection."""

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


def dial(address: tuple[str, int]) -> socket.socket:
    sock = socket.create_connection(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def own(address: tuple[str, int]) -> Call:
    """A caller with a connection of its own."""
    sock = dial(address)
    poll = select.poll()
    poll.register(sock, select.POLLIN)

    def call() -> None:
        sock.sendall(bytes(SIZE))
        poll.poll()
        assert len(sock.recv(65536)) == SIZE

    return call


class Shared:
    """A connection of many callers, and the thread that reads it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._sock = dial(address)
        self._lock = threading.Lock()
        self._bells: list[int] = []
        self._answers: list[deque[bytes]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def caller(self) -> Call:
        number, bell = len(self._bells), os.eventfd(0, os.EFD_NONBLOCK)
        answers: deque[bytes] = deque()
        self._answers.append(answers)
        self._bells.append(bell)
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        request = bytes([number]) * SIZE

        def call() -> None:
            with self._lock:
                self._sock.sendall(request)
            poll.poll()
            os.eventfd_read(bell)
            assert answers.popleft() == request

        return call

    def _read(self) -> None:
        data = b""
        while piece := self._sock.recv(256 * 1024):
            data += piece
            for at in range(0, len(data) - SIZE + 1, SIZE):
                number = data[at]
                self._answers[number].append(data[at : at + SIZE])
                os.eventfd_write(self._bells[number], 1)
            data = data[len(data) - len(data) % SIZE :]


def rate(calls: list[Call]) -> float:
    """Calls a second, each by a thread."""
    counts = [0] * len(calls)
    until = time.perf_counter() + SECONDS

    def work(number: int) -> None:
        while time.perf_counter() < until:
            calls[number]()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = listener.getsockname()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    server.start()
    shared = Shared(address)
    ways: dict[str, Callable[[], Call]] = {
        "a connection each": lambda: own(address),
        "one, and a reader": shared.caller,
    }
    calls = {name: make() for name, make in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, make in ways.items():
            rates[name].append(rate([make() for _ in range(CALLERS)]))
    for name in ways:
        one, many = statistics.median(times[name]) * 1e6, statistics.median(rates[name])
        print(f"{name:20}{one:6.0f} µs for one caller, {many:9,.0f} a second for {CALLERS}")
    server.terminate()


if __name__ == "__main__":
    main()
