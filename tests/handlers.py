"""The handlers that the tests run in workers. `app` dispatches on the last segment of the path."""

from __future__ import annotations

import array
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs

from runner import AbortHandler, HandlerRequest, HandlerResponse
from runner.wire.frames import BODY, END, HEAD, encode


def app(request: HandlerRequest, response: HandlerResponse) -> bytes | None:
    name = request.path.rstrip("/").rpartition("/")[2] or "hello"
    return globals()[f"do_{name}"](request, response)  # type: ignore[no-any-return]


def parameter(request: HandlerRequest, name: str, default: str = "") -> str:
    return parse_qs(request.query).get(name, [default])[0]


def do_hello(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return b"hello"


def do_echo(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """What the handler saw, as JSON."""
    response.headers["content-type"] = "application/json"
    body = request.body.read()
    seen = {
        "method": request.method,
        "target": request.target,
        "path": request.path,
        "query": request.query,
        "headers": request.headers.pairs(),
        "scheme": request.scheme,
        "server": request.server,
        "client": request.client,
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "body": body[:200].decode("latin-1"),
        "context": {name: getattr(request.context, name) for name in request.context.__struct_fields__},
        "pid": os.getpid(),
    }
    return json.dumps(seen).encode()


def do_pid(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return str(os.getpid()).encode()


def do_raise(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    raise ValueError("boom from the handler")


def do_raise_much(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    raise ValueError("x" * 16_000)


def do_raise_late(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    response.write(b"first piece")
    raise ValueError("boom after the head")


def do_abort(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    raise AbortHandler


def do_abort_late(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    response.write(b"first piece")
    raise AbortHandler


def do_system_exit(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    sys.exit(7)


def die(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(3)
    elif how == "exit0":
        os._exit(0)
    elif how == "c_exit":
        ctypes.CDLL(None).exit(4)
    else:
        os.kill(os.getpid(), getattr(signal, how))


def do_die(request: HandlerRequest, response: HandlerResponse) -> None:
    if parameter(request, "late"):
        response.write(b"first piece")
    print("last words")
    die(parameter(request, "how", "segfault"))


def do_stream(request: HandlerRequest, response: HandlerResponse) -> None:
    """`count` events, `pause` seconds apart, each with the time of its writing."""
    response.headers["content-type"] = "text/event-stream"
    for number in range(int(parameter(request, "count", "20"))):
        response.write(f"data: {number} {time.monotonic()}\n\n".encode())
        time.sleep(float(parameter(request, "pause", "0.05")))


def do_endless(request: HandlerRequest, response: HandlerResponse) -> None:
    while True:
        response.write(b"x" * 1000)


def do_big(request: HandlerRequest, response: HandlerResponse) -> None:
    """`size` bytes, all the same block."""
    block = b"0123456789abcdef" * 4096
    left = int(parameter(request, "size"))
    while left:
        piece = block[:left]
        response.write(piece)
        left -= len(piece)


def do_count(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Reads the body piece by piece; says how long it was."""
    size = 0
    while piece := request.body.read1(1 << 20):
        size += len(piece)
    return str(size).encode()


def do_slow_count(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """As count, but it takes its time to begin: the pipe is full by then."""
    time.sleep(0.1)
    return do_count(request, response)


def do_mirror(request: HandlerRequest, response: HandlerResponse) -> None:
    """Sends each piece back as it comes."""
    response.write_header(200)
    while piece := request.body.read1(1 << 20):
        response.write(piece)


def do_answer_early(request: HandlerRequest, response: HandlerResponse) -> None:
    response.write_header(413)
    response.write(b"too large")


def do_never_read(request: HandlerRequest, response: HandlerResponse) -> None:
    time.sleep(3600)


def do_die_while_reading(request: HandlerRequest, response: HandlerResponse) -> None:
    request.body.read(int(parameter(request, "after", "100000")))
    os._exit(9)


def do_wait_for(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Says that it runs by making the file `here`, and waits until the file `go` is there."""
    Path(parameter(request, "here")).touch()
    wait_until(Path(parameter(request, "go")))
    return b"went"


def wait_until(there: Path) -> None:
    while not there.exists():
        time.sleep(0.002)


def do_head_then_wait(request: HandlerRequest, response: HandlerResponse) -> None:
    """Sends its head, and goes on once the file `go` is there."""
    response.write_header(202)
    wait_until(Path(parameter(request, "go")))
    response.write(b"done")


def do_compressed(request: HandlerRequest, response: HandlerResponse) -> None:
    """Three compressed events, each written once the caller has made the file of its number."""
    coding = parameter(request, "coding")
    coder = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
    response.headers["content-encoding"] = coding
    for number in range(3):
        wait_until(Path(parameter(request, "go")) / str(number))
        response.write(coder.compress(b"event %d\n" % number) + coder.flush(zlib.Z_SYNC_FLUSH))
    response.write(coder.flush())


def do_headers(request: HandlerRequest, response: HandlerResponse) -> None:
    for pair in json.loads(request.body.read()):
        response.headers.add(*pair)
    response.write_header(int(parameter(request, "status", "200")))
    response.write(parameter(request, "body").encode())


def do_status(request: HandlerRequest, response: HandlerResponse) -> None:
    response.write_header(json.loads(parameter(request, "status")))


def do_late_headers(request: HandlerRequest, response: HandlerResponse) -> None:
    response.headers["x-first"] = "1"
    headers = response.headers
    response.write_header(201)
    response.headers["x-late"] = "1"
    headers["x-first"] = "2"
    response.write_header(500)
    response.write(b"body")


def do_nothing(request: HandlerRequest, response: HandlerResponse) -> None:
    pass


def do_print(request: HandlerRequest, response: HandlerResponse) -> bytes:
    print("a line on stdout")
    print("a line on stderr \x1b[31m", file=sys.stderr)
    os.write(1, b"raw bytes \xff\n")
    return b"printed"


def do_flood(request: HandlerRequest, response: HandlerResponse) -> bytes:
    for _ in range(int(parameter(request, "megabytes", "50"))):
        os.write(2, (b"flood " * 170 + b"\n") * 1000)
    return b"flooded"


def do_spawn(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Starts a process that outlives it, as `how` says; gives its pid."""
    how = parameter(request, "how")
    if how == "plain":
        return str(subprocess.Popen(["sleep", "1000"]).pid).encode()
    if how == "session":
        return str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid).encode()
    read, write = os.pipe()
    if os.fork() == 0:  # a double fork that keeps every descriptor, the job's pipes too
        os.setsid()
        if (pid := os.fork()) == 0:
            time.sleep(1000)
            os._exit(0)
        os.write(write, str(pid).encode())
        os._exit(0)
    os.wait()
    return os.read(read, 20)


class Unprintable(Exception):
    """An exception that can't be shown, pickled, or compared."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no pickle")


def do_unprintable(request: HandlerRequest, response: HandlerResponse) -> None:
    if parameter(request, "late"):
        response.write(b"first piece")
    raise Unprintable(lambda: None)


def do_state(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """What a worker has inherited."""
    descriptors: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    state: dict[str, Any] = {
        "descriptors": descriptors,
        "environment": dict(os.environ),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "path": sys.path,
        "threads": threading.active_count(),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "session": os.getsid(0) == os.getpid(),
        "modules": sorted(sys.modules),
    }
    return json.dumps(state).encode()


def do_protocol(request: HandlerRequest, response: HandlerResponse) -> None:
    """Writes straight to the response pipe what the caller sent, then waits."""
    data = request.body.read()
    if parameter(request, "late"):
        response.write(b"first piece")
    while data:
        data = data[os.write(4, data) :]
    if parameter(request, "then") == "exit":
        os._exit(0)
    if parameter(request, "then") == "close":
        os.close(4)
    if parameter(request, "then") != "return":
        time.sleep(3600)


def do_unending_head(request: HandlerRequest, response: HandlerResponse) -> None:
    response.headers["x-big"] = "x" * int(parameter(request, "size"))
    response.write_header(200)


def do_location(request: HandlerRequest, response: HandlerResponse) -> None:
    response.headers["location"] = parameter(request, "to")
    response.write_header(int(parameter(request, "status", "302")))


def do_content(request: HandlerRequest, response: HandlerResponse) -> None:
    """`body` with the announced `length`."""
    if length := parameter(request, "length"):
        response.headers["content-length"] = length
    response.write_header(int(parameter(request, "status", "200")))
    response.write(parameter(request, "body").encode())


def do_cookies(request: HandlerRequest, response: HandlerResponse) -> None:
    response.headers.add("Set-Cookie", "a=1; Path=/")
    response.headers.add("Set-Cookie", "b=2; Path=/")


def do_count_writes(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """This worker's own counters of system calls and context switches (proc(5))."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return json.dumps({"writes": int(io["syscw"]), "reads": int(io["syscr"])}).encode()


def do_exit_with(request: HandlerRequest, response: HandlerResponse) -> NoReturn:
    os._exit(int(parameter(request, "code")))


def do_leave_writer(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Leaves a thread that writes what the caller sent to the response pipe, once the file `go` is there."""
    data, place = request.body.read(), Path(parameter(request, "go"))

    def write_late() -> None:
        wait_until(place / "go")
        os.write(4, data)
        (place / "written").touch()

    threading.Thread(target=write_late).start()
    return b"left"


def do_cut(request: HandlerRequest, response: HandlerResponse) -> None:
    """Writes the first bytes of its own answer's frames, and dies by SIGKILL."""
    number = response._response._number
    head = encode(HEAD, number, b"\x92\xcc\xc8\x90")
    frames = head + encode(BODY, number, b"a body of thirty bytes or less") + encode(END, number)
    os.write(4, frames[: int(parameter(request, "after"))])
    os.kill(os.getpid(), signal.SIGKILL)


def do_spawn_and_stream(request: HandlerRequest, response: HandlerResponse) -> None:
    """Forks a process that holds every descriptor, gives its pid, and streams on."""
    pid = os.fork()
    if not pid:
        os.setsid()
        time.sleep(1000)
        os._exit(0)
    response.write(str(pid).encode())
    while True:
        time.sleep(0.001)
        response.write(b".")


def do_feign(request: HandlerRequest, response: HandlerResponse) -> None:
    """Writes to its own request pipe and dies: as if nothing had been taken out of it."""
    with open(parameter(request, "runs"), "a") as runs:
        runs.write(".")
    os.write(os.open("/proc/self/fd/3", os.O_WRONLY), b"x" * 60000)
    os.kill(os.getpid(), signal.SIGKILL)


def do_print_id(request: HandlerRequest, response: HandlerResponse) -> bytes:
    print("printed in", request.context.job_id)
    return b""


def do_newlines(request: HandlerRequest, response: HandlerResponse) -> bytes:
    os.write(2, b"\n" * 500_000)
    return b""


def do_array(request: HandlerRequest, response: HandlerResponse) -> None:
    response.write(memoryview(array.array("I", range(10_000))))


def do_deep(request: HandlerRequest, response: HandlerResponse) -> None:
    """A head that is nested as deep as its cap allows."""
    payload = b"\x93\xcc\xc8\x90" + b"\x91" * (250 * 1024) + b"\xc0"
    os.write(4, encode(HEAD, response._response._number, payload))
    time.sleep(3600)


def do_echo_body(request: HandlerRequest, response: HandlerResponse) -> bytes:
    return request.body.read()


def do_slow_mirror(request: HandlerRequest, response: HandlerResponse) -> None:
    for byte in request.body.read():
        response.write(bytes([byte]))
        time.sleep(0)


def do_clean_up(request: HandlerRequest, response: HandlerResponse) -> None:
    place = Path(parameter(request, "place"))
    try:
        (place / "running").touch()
        time.sleep(3600)
    except BaseException as error:
        seen = f"{type(error).__name__} {request.cancelled}"
        (place / "seen").write_text(seen)
        (place / "seen").rename(place / "cleaned")
        raise


def do_swallow(request: HandlerRequest, response: HandlerResponse) -> None:
    Path(parameter(request, "here")).touch()
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


def do_spin(request: HandlerRequest, response: HandlerResponse) -> None:
    """Never comes back to the interpreter."""
    if here := parameter(request, "here"):
        Path(here).touch()
    sum(range(10**15))


def do_deaf(request: HandlerRequest, response: HandlerResponse) -> None:
    """Does to its end of the line what `how` says, and hears of no cancel."""
    how = parameter(request, "how")
    if how == "shut":
        line = socket.socket(fileno=os.dup(5))
        line.shutdown(socket.SHUT_RD)
        line.close()
    elif how == "closed":
        os.close(5)
    for fd in (0, 3, 4, 5) if how != "closed" else ():
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    response.write(b"deaf")
    while True:
        time.sleep(3600)


def do_stubborn(request: HandlerRequest, response: HandlerResponse) -> None:
    """Streams on whatever is raised in it, at whatever instant: the jump of the inner loop is guarded too."""
    while True:
        try:
            while True:
                response.write(b"on and on")
        except BaseException:
            continue


def do_spawn_and_hang(request: HandlerRequest, response: HandlerResponse) -> None:
    pid = do_spawn(request, response)
    here = Path(parameter(request, "here"))
    here.with_suffix(".new").write_bytes(pid)
    here.with_suffix(".new").rename(here)
    time.sleep(3600)


def do_late_secret(request: HandlerRequest, response: HandlerResponse) -> None:
    data = request.body.read()
    end = time.monotonic() + float(parameter(request, "pause"))
    while time.monotonic() < end:
        pass
    response.write(data)


def do_heap(request: HandlerRequest, response: HandlerResponse) -> None:
    """Takes `size` bytes of its own."""
    if parameter(request, "late"):
        response.write(b"first piece")
    kept = bytearray(int(parameter(request, "size")))
    response.write(str(len(kept)).encode())


def do_shared(request: HandlerRequest, response: HandlerResponse) -> None:
    """Takes `size` bytes of shared memory, which limits of the data segment do not see, and keeps them."""
    if parameter(request, "late"):
        response.write(b"first piece")
    size = int(parameter(request, "size"))
    kept = mmap.mmap(-1, size)
    for at in range(0, size, 4096):
        kept[at] = 1
    time.sleep(3600)


def do_limits(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """What limits this process has."""
    names = ("CORE", "DATA", "AS", "NOFILE", "NPROC", "FSIZE")
    found: dict[str, Any] = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in names}
    found["nice"] = os.nice(0)
    found["cpus"] = sorted(os.sched_getaffinity(0))
    return json.dumps(found).encode()


def do_burn(request: HandlerRequest, response: HandlerResponse) -> None:
    if parameter(request, "late"):
        response.write(b"first piece")
    while True:
        pass


kept: list[bytearray] = []


def do_keep(request: HandlerRequest, response: HandlerResponse) -> bytes:
    """Takes `size` bytes, and keeps them."""
    kept.append(bytearray(b"x") * int(parameter(request, "size")))
    return b"kept"


def do_ignore(request: HandlerRequest, response: HandlerResponse) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass
