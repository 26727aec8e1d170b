"""A native handler for the tests of the cluster."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from pathlib import Path

from runner import HandlerRequest, HandlerResponse
from tests.handlers import app as others
from tests.handlers import parameter

RECORD = 64


def app(request: HandlerRequest, response: HandlerResponse) -> bytes | None:
    name = request.path.rpartition("/")[2]
    function = globals().get(f"on_{name}")
    answer: bytes | None = others(request, response) if function is None else function(request, response)
    return answer


def record(number: int) -> bytes:
    """A record of 64 bytes that tells its number."""
    return b"%063d\n" % number


def on_records(request: HandlerRequest, response: HandlerResponse) -> None:
    for number in range(int(parameter(request, "count"))):
        response.write(record(number))


def on_complete(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Notes that it has begun, and, `seconds` later, that it has come to its end."""
    place = Path(parameter(request, "place"))
    name = parameter(request, "name")
    (place / f"begun-{name}").touch()
    time.sleep(float(parameter(request, "seconds")))
    with (place / f"completed-{name}").open("a") as file:
        file.write("once\n")
    return b"completed"


def on_hold(request: HandlerRequest, response: HandlerResponse) -> None:
    """Its pid, and then nothing until the file at `until` is there."""
    response.write(b"%d" % os.getpid())
    while not Path(parameter(request, "until")).exists():
        time.sleep(0.01)
    response.write(b" done")


def on_deaf(request: HandlerRequest, response: HandlerResponse) -> None:
    """Hears nothing of its caller's going."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    response.write(b"on and on")
    time.sleep(3600)


def on_look_around(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """The names of its environment's variables, and what came of reading a file."""
    try:
        Path(parameter(request, "file")).read_text()
        read = "read"
    except OSError as error:
        read = type(error).__name__
    return json.dumps({"names": sorted(os.environ), "read": read, "parents": _environment_of_parents()}).encode()


def _environment_of_parents() -> str:
    """Whether the environment of a process above, which is Ray's, can be read."""
    pid = os.getppid()
    try:
        grandparent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return "read" if Path(f"/proc/{grandparent}/environ").read_bytes() else "empty"
    except (OSError, ValueError) as error:
        return type(error).__name__


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.place,)


class HostileError(Exception):
    def __init__(self, place: str) -> None:
        super().__init__("hostile")
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.place,)


def on_hostile_pickle(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return pickle.dumps(Hostile(parameter(request, "place")))


def on_hostile_error(request: HandlerRequest, response: HandlerResponse) -> bytes:
    raise HostileError(parameter(request, "place"))
