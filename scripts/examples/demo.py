"""The demo: a provider and a Flask app behind pools and behind a port, their faults, and what came of it all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import requests

from runner import Pool
from transport import TransportFactory, delegated_api_key_id
from transport.requests import Transport

OPENAI = "https://api.openai.com"
SHOP = "http://shop.local"

Outcome = tuple[str, str, str]
"""What was done, what was expected, what came."""


def main() -> int:
    """Run all of it; 0 where every outcome is the expected one."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    logging.getLogger().handlers[0].setFormatter(Indented("%(levelname)s %(name)s: %(message)s"))
    outcomes: list[Outcome] = []
    say("Starting two pools: a native handler that streams like an LLM, and a Flask app.")
    began = time.monotonic()
    with (
        Pool("scripts.examples.provider:handler", workers=2) as provider,
        Pool("scripts.examples.shop:app", workers=1) as shop,
        requests.Session() as session,
    ):
        print(f"  three workers ready after {time.monotonic() - began:.2f} s")
        session.mount(OPENAI, TransportFactory(provider).transport_for("openai", source="demo"))
        session.mount(SHOP, Transport(shop))
        with delegated_api_key_id("key-1"):
            outcomes.append(stream_tokens(session))
            outcomes += call_shop(session)
            outcomes.append(fail(session, "segfault", "a null pointer is dereferenced", "500 died SIGSEGV"))
            outcomes.append(fail(session, "exit", "os._exit(3) is called", "500 died 3"))
            outcomes.append(fail(session, "raise", "an exception is raised", "500 raised"))
            outcomes.append(leave_half_way(session))
            outcomes.append(stream_tokens(session))
    outcomes += serve_it()
    return report(outcomes)


def serve_it() -> list[Outcome]:
    """Both apps behind a real port, as a process of its own; one of them is killed by a request, and goes on."""
    say("The same two behind a real HTTP port, by the command:")
    apps = ["/ai=scripts.examples.provider:handler", "/shop=scripts.examples.shop:app"]
    command = [sys.executable, "-m", "transport.cli", "serve", *apps, "--port=0", "--admin=127.0.0.1:0"]
    print(f"  blastdoor serve {' '.join(apps)}")
    with subprocess.Popen([*command, "--workers=1"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url, admin = (
            next(line.split()[-1] for line in server.stderr if word in line) for word in ("serving", "status")
        )
        pages = [requests.get(url + path, timeout=30) for path in ("/shop/", "/ai/segfault", "/ai/hello")]
        for page in pages:
            print(f"  GET {page.url.removeprefix(url):<12} -> {page.status_code} {page.text.splitlines()[0][:80]}")
        faults = requests.get(f"{admin}.json", timeout=30).json()["faults"]
        print(f"  {admin} tells of it: {faults[0]['detail']}")
        server.terminate()
        server.stderr.read()
    print(f"  SIGTERM: it drained, and exited with {server.returncode}")
    return [
        ("serve a Flask app", "200 <h1>Shop</h1>", f"{pages[0].status_code} {pages[0].text}"),
        (
            "crash one over HTTP",
            "500 SIGSEGV, then 200",
            f"500 {pages[1].json()['signal']}, then {pages[2].status_code}",
        ),
        ("stop the server", "exit code 0", f"exit code {server.returncode}"),
    ]


class Indented(logging.Formatter):
    """Sets the log apart from the demo's own words."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"    log | {line}" for line in super().format(record).splitlines())


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def stream_tokens(session: requests.Session) -> Outcome:
    """Print each token as it comes."""
    say("A chat completion, streamed. Each token with the time of its arrival:")
    began = time.monotonic()
    tokens, first = [], 0.0
    with session.post(f"{OPENAI}/v1/chat/completions", json={"stream": True}, stream=True, timeout=(5, 30)) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - began
                token = json.loads(line[6:])["token"]
                tokens.append(token)
                print(f"  {1000 * (time.monotonic() - began):7.1f} ms  {token}", flush=True)
    took = time.monotonic() - began
    as_they_came = "one by one" if first < took / 2 else "all at once"
    return (
        "stream a completion",
        "200, 19 tokens one by one",
        f"{response.status_code}, {len(tokens)} tokens {as_they_came}",
    )


def call_shop(session: requests.Session) -> list[Outcome]:
    """Two requests to the Flask app."""
    say("A Flask app, unchanged, behind the same kind of session:")
    page = session.get(f"{SHOP}/")
    print(f"  GET /        -> {page.status_code} {page.text}")
    added = session.post(f"{SHOP}/basket", json={"item": "tea"})
    print(f"  POST /basket -> {added.status_code} {added.text.strip()}")
    return [
        ("get the shop's page", "200 <h1>Shop</h1>", f"{page.status_code} {page.text}"),
        ("post to its basket", "201 ['tea']", f"{added.status_code} {added.json()['basket']}"),
    ]


def fail(session: requests.Session, path: str, what: str, expected: str) -> Outcome:
    """A request whose handler fails, and the next one, which does not."""
    say(f"In the handler, {what}:")
    response = session.get(f"{OPENAI}/{path}", timeout=30)
    print(f"  the caller sees {response.status_code} {response.reason}: {response.text}")
    problem = response.json()
    end = problem.get("signal") or problem.get("exit_code") or ""
    return f"call /{path}", expected, f"{response.status_code} {problem['fault']} {end}".strip()


def leave_half_way(session: requests.Session) -> Outcome:
    """Read three events, and go."""
    say("A stream that the caller leaves half-way:")
    began = time.monotonic()
    with session.get(f"{OPENAI}/completions", stream=True) as response:
        events = 0
        for line in response.iter_lines():
            events += bool(line)
            if events == 3:
                break
        left = time.monotonic()
    freed = 1000 * (time.monotonic() - left)
    print(f"  left after {events} events and {left - began:.2f} s; closing took {freed:.1f} ms")
    outcome = "freed at once" if freed < 100 else "had to wait"
    return "leave a stream half-way", "3 events, freed at once", f"{events} events, {outcome}"


def report(outcomes: list[Outcome]) -> int:
    """The closing table; 1 where a row differs."""
    say("What was expected, and what came:")
    widths = [max(len(row[column]) for row in outcomes) for column in range(3)]
    differ = 0
    for row in outcomes:
        same = row[1] == row[2]
        differ += not same
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {cells}  {'ok' if same else 'DIFFERS'}")
    print(f"\n{len(outcomes) - differ} as expected, {differ} not")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
