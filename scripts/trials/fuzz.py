"""Coverage-guided fuzzing, with atheris, of all that takes a stranger's bytes.

- `frames`: however a byte stream is cut, `FrameDecoder` gives the same frames, raises nothing, and keeps no more
  than one frame within its cap.
- `exchange`: whatever a worker sends, `ResponseExchange` raises nothing, takes no step that its table does not have,
  and hands out no more body than the head allows.
- `route`: whatever a caller asks for, the rewritten target stays in the mount, also once it is decoded, or is refused.

A finding is an exception: the input that led to it is written to the working directory as crash-*.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from urllib.parse import unquote

import atheris

with atheris.instrument_imports(
    include=["runner.wire.frames", "runner.wire.exchange", "runner.wire.headers", "transport.route"]
):
    from runner.wire.exchange import NEXT, ResponseExchange, State
    from runner.wire.frames import (
        BODY,
        HEADER_SIZE,
        INVALID,
        MAX_HEAD,
        TO_HOST,
        Frame,
        FrameDecoder,
    )
    from runner.wire.headers import check_headers
    from transport.errors import TargetEscapes
    from transport.route import Route

ROUTE = Route("openai")
METHODS = ("GET", "HEAD", "POST")


def joined(frames: list[Frame]) -> list[Frame]:
    """The frames with neighboring pieces of a job's body put together: where they were cut is the stream's affair."""
    whole: list[Frame] = []
    for kind, job, payload in frames:
        if kind == BODY and whole and whole[-1][0] == BODY and whole[-1][1] == job:
            whole[-1] = (BODY, job, whole[-1][2] + payload)
        else:
            whole.append((kind, job, payload))
    return whole


def frames(data: bytes) -> None:
    """The first byte says how the rest is cut."""
    cut, stream = data[0] if data else 0, data[1:]
    at_once = FrameDecoder(TO_HOST)
    expected = joined(at_once.feed(stream))
    decoder = FrameDecoder(TO_HOST)
    found: list[Frame] = []
    at, step = 0, cut % 23 + 1
    while at < len(stream):
        found += decoder.feed(stream[at : at + step])
        at += step
        step = (step * 7 + cut) % 31 + 1
        assert len(decoder._partial) <= HEADER_SIZE + MAX_HEAD
    assert joined(found) == expected, (joined(found), expected)
    assert decoder.clean == at_once.clean
    assert all(kind != INVALID for kind, _, _ in expected[:-1]), "frames after an invalid one"
    assert all(len(payload) <= TO_HOST[kind] for kind, _, payload in found if kind in TO_HOST and kind != BODY)


def exchange(data: bytes) -> None:
    """The first byte is the request's method; the rest is what the worker sends to job number 1."""
    method = METHODS[data[0] % len(METHODS)] if data else "GET"
    found = ResponseExchange(1, method)
    decoder = FrameDecoder(TO_HOST)
    size = 0
    for frame in decoder.feed(data[1:]):
        before = found.state
        found.receive([frame])
        after = found.state
        assert after is before or after is State.BROKEN or after in reachable(before), (before, after)
        assert found.violation or after is not State.BROKEN
        while found.body:
            size += len(found.body.popleft())
    if found.head is not None:
        check_headers(found.head.headers)
        bodyless = method == "HEAD" or found.head.status in (204, 304)
        assert not (bodyless and size)
        assert not any(name.lower() == "transfer-encoding" for name, _ in found.head.headers)
        announced = [int(value) for name, value in found.head.headers if name.lower() == "content-length"]
        if announced and not bodyless:
            assert size <= announced[0]
            if found.state is State.ENDED:
                assert size + found.missing == announced[0]


def reachable(state: State) -> set[State]:
    steps = set(NEXT[state].values())
    return steps | {State.IDLE_EXPECTED} if State.ENDED in steps else steps


def route(data: bytes) -> None:
    """The target that a caller asks for."""
    target = "/" + data.decode("latin-1")
    try:
        served = ROUTE.rewrite(target)
    except TargetEscapes:
        return
    path, mark, query = served.partition("?")
    assert (mark, query) == target.partition("?")[1:], "the query is not to be touched"
    for _ in range(20):
        assert resolved(path).startswith(ROUTE.mount), (target, path)
        further = unquote(path, errors="replace")
        if further == path:
            return
        path = further


def resolved(path: str) -> str:
    """The path without dot segments, as whoever decodes it would have it."""
    kept: list[str] = []
    for segment in re.split(r"[/\\]", path):
        if segment == "..":
            if kept:
                kept.pop()
        elif segment not in ("", "."):
            kept.append(segment)
    return "/" + "/".join(kept)


TARGETS: dict[str, Callable[[bytes], None]] = {"frames": frames, "exchange": exchange, "route": route}

_DICTIONARY = """
"\\x03\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
"\\x08\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
"\\x03\\x01\\x00\\x00\\x00\\x01\\x00\\x00\\x00\\x02"
"\\x02\\x01\\x00\\x00\\x00\\x03\\x00\\x00\\x00abc"
"\\x06\\x01\\x00\\x00\\x00\\x05\\x00\\x00\\x00\\x92\\xcc\\xc8\\x90\\x00"
"\\x06\\x01\\x00\\x00\\x00\\x04\\x00\\x00\\x00\\x92\\xcc\\xc8\\x90"
"\\x92\\xaecontent-length\\xa13"
"%2e%2e" "..%2f" "%252e" "%5c" "//" "/../" "\\\\"
"""


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; it ends with the process."""

    def test_one_input(data: bytes) -> None:
        TARGETS[name](data)

    atheris.Setup([sys.argv[0], *arguments], test_one_input)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each target in a process of its own; 1 where one of them found something."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="target", help=f"some of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each target (default: 1,000,000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random numbers; it is printed")
    parser.add_argument("--only", choices=TARGETS, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.only:
        fuzz(arguments.only, rest)
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    results = {}
    for name in arguments.targets or TARGETS:
        began = time.monotonic()
        print(f"{name}: {arguments.runs:,} inputs, seed {arguments.seed}", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".dict") as dictionary, tempfile.TemporaryDirectory() as corpus:
            dictionary.write("\n".join(_DICTIONARY.split()))
            dictionary.flush()
            command = [sys.executable, "-m", "scripts.trials.fuzz", "--only", name, f"-runs={arguments.runs}"]
            command += [f"-seed={arguments.seed % 2**32}", "-max_len=600", "-print_final_stats=1", "-verbosity=0"]
            command += [f"-dict={dictionary.name}", corpus]
            done = subprocess.run(command, text=True, stderr=subprocess.PIPE)
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        results[name] = {
            "inputs": int(executed[1]) if executed else 0,
            "seconds": round(time.monotonic() - began, 1),
            "found": done.returncode != 0,
        }
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    return int(any(result["found"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
