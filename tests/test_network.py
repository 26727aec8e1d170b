"""ClusterPool between hosts that are real ones to each other: a link that is cut, loses all, or is slow."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.network import HEAD, NODE, Network, SlowLink, available, network
from tests.serving import ROOT
from tests.waiting import wait_until

WHY = available()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(WHY), reason=f"no network namespaces here: {WHY}"),
]

DRIVER = """
import json, sys, threading, time
from runner import BlastdoorError, Request
from runner.cluster import ClusterPool

def get(target, timeout=10.0):
    began = time.perf_counter()
    try:
        with pool.open(Request("GET", target), lease_timeout=timeout) as job:
            body = b"".join(job).decode()
            where = job._lane.link.node.address
        return {"body": body, "seconds": time.perf_counter() - began, "where": where}
    except BlastdoorError as error:
        return {"error": type(error).__name__, "words": str(error), "seconds": time.perf_counter() - began}

with ClusterPool("tests.cluster_handlers:app", address=sys.argv[1], workers=2) as pool:
    print("@" + json.dumps(sorted(node.address for node in pool._placement.nodes())), flush=True)
    held = []
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "hold":
            jobs = [pool.open(Request("GET", "/stream?count=100000&pause=0.01")) for _ in range(4)]
            for job in jobs:
                if job._lane.link.node.address == asked["where"] and not held:
                    job.read()
                    held.append(job)
                else:
                    job.close()
            answer = len(held)
        elif asked["do"] == "end":
            job = held.pop()
            began = time.perf_counter()
            try:
                for _ in job:
                    pass
                answer = {"error": ""}
            except BlastdoorError as error:
                answer = {"error": type(error).__name__, "seconds": time.perf_counter() - began}
        elif asked["do"] == "drop":
            held.pop().close()
            answer = ""
        elif asked["do"] == "read":
            began = time.perf_counter()
            answer = {"bytes": sum(len(held[-1].read()) for _ in range(asked["pieces"]))}
            answer["seconds"] = time.perf_counter() - began
        elif asked["do"] == "nodes":
            answer = sorted(node.address for node in pool._placement.nodes() if not node.silent)
        else:
            answer = [get(asked["target"], asked.get("timeout", 10.0)) for _ in range(asked.get("times", 1))]
        print("@" + json.dumps(answer), flush=True)
"""


class Pair:
    """A Ray node in each of two namespaces, and a program with a pool, on the head."""

    def __init__(self, net: Network) -> None:
        self._directory = tempfile.mkdtemp(prefix="ray-")
        # Ray's head asks for a token where this user has one, and its other nodes then have to be told to show it.
        ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        self._env = {**os.environ, **ray, "PYTHONPATH": str(ROOT)}
        self._ray(
            net.head,
            "--head",
            "--include-dashboard=false",
            f"--node-ip-address={HEAD}",
            "--port=6377",
            f"--temp-dir={self._directory}",
        )
        self._ray(net.node, f"--address={HEAD}:6377", f"--node-ip-address={NODE}")
        self._program = subprocess.Popen(
            net.command(net.head, sys.executable, "-c", DRIVER, f"{HEAD}:6377"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._env,
            cwd=ROOT,
        )
        self._where = net
        self.nodes: list[str] = self._hear()

    def _ray(self, where: str, *options: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        common = (
            "--num-cpus=2",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
        )
        done = subprocess.run(
            ["ip", "netns", "exec", where, ray, "start", *options, *common],
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def tell(self, what: str, **arguments: Any) -> Any:
        """Have the program do something; what it says of it."""
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._program.stdin.flush()
        return self._hear()

    def get(self, target: str = "/hello", **arguments: Any) -> list[dict[str, Any]]:
        """Jobs, one after the other."""
        found: list[dict[str, Any]] = self.tell("get", target=target, **arguments)
        return found

    def close(self) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.close()
        try:
            self._program.wait(30)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        self._program.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _hear(self) -> Any:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            if line.startswith("@"):  # else it is Ray that says something
                return json.loads(line[1:])
        raise AssertionError("the program has died")


slow_links = pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun here")


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


def test_a_link_that_is_cut(net: Network) -> None:
    """D6, D7: jobs there are lost in seconds, and others go elsewhere meanwhile."""
    net.connect()
    pair = Pair(net)
    try:
        assert pair.nodes == [HEAD, NODE]
        # A heartbeat may have seen a job there, so that for a second the other is taken for less loaded.
        wait_until(lambda: NODE in {one["where"] for one in pair.get(times=10)})
        assert pair.tell("hold", where=NODE) == 1
        net.cut()
        lost = pair.tell("end")
        print("told after", lost["seconds"])
        assert lost["error"] == "NodeLost"
        assert lost["seconds"] < 8
        answers = pair.get(times=20)
        assert {one.get("where") for one in answers} == {HEAD}, answers
    finally:
        pair.close()


@slow_links
def test_a_link_that_loses_all_for_a_while(net: Network) -> None:
    """D6, D9: for less than it takes to be given up: a job under way goes on where it was."""
    link = SlowLink(net, 0.0)
    pair = None
    try:
        pair = Pair(net)
        assert pair.nodes == [HEAD, NODE]
        assert pair.tell("hold", where=NODE) == 1
        link.lossy = True
        mended = threading.Timer(1.5, lambda: setattr(link, "lossy", False))
        mended.start()
        told = pair.tell("read", pieces=100)
        mended.join()
        assert told["seconds"] > 1
        assert pair.tell("read", pieces=10)["bytes"]
        pair.tell("drop")
        wait_until(lambda: NODE in {one["where"] for one in pair.get(times=10)})
    finally:
        if pair is not None:
            pair.close()
        link.close()


@slow_links
def test_a_slow_link(net: Network) -> None:
    """D9: a small request takes one round trip of the link, not two: here with 50 ms each way."""
    link = SlowLink(net, 0.050)
    pair = None
    try:
        pair = Pair(net)
        assert pair.nodes == [HEAD, NODE]
        pair.get(times=20)  # connections are made
        there = [one["seconds"] for one in pair.get(times=100) if one["where"] == NODE]
        middle = statistics.median(there)
        print(f"{len(there)} requests, median {middle * 1e3:.1f} ms")
        assert 0.1 <= middle < 0.17
    finally:
        if pair is not None:
            pair.close()
        link.close()
