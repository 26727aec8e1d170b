"""The last hour of a server, by minute and mount."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import requests

from tests.serving import Process, Served
from tests.waiting import wait_until
from transport.fronts.sums import _hour
from transport.serving.minutes import MINUTES, LastHour


def test_quantiles_are_near() -> None:
    """G9: what is told of a minute is within 6 % of what it was, at a cost that does not grow with its requests."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    hour = LastHour()
    taken = [chance.lognormvariate(-4, 1.5) for _ in range(20_000)]
    for seconds in taken:
        hour.add("/", 6000 + chance.randrange(60), seconds, failed=chance.random() < 0.1)
    (minute,) = hour.tell(6059, {})["/"]["minutes"]
    hundredths = statistics.quantiles(taken, n=100)
    assert (minute["at"], minute["answers"]) == (6000, 20_000)
    assert abs(minute["p50"] / hundredths[49] - 1) < 0.06
    assert abs(minute["p99"] / hundredths[98] - 1) < 0.06
    assert len(hour._mounts["/"][0].classes) < 200


def test_an_hour_is_kept() -> None:
    """G9: by mount, with its provider; what is older goes; so do minutes in which nothing came."""
    hour = LastHour()
    for minute in range(100):
        hour.add("/a", minute * 60, 0.001, failed=minute == 99)
    hour.add("", 0, 0.0, failed=False)
    told = hour.tell(99 * 60 + 5, {"/a": "openai"})
    assert told["/a"]["provider"] == "openai"
    assert [minute["at"] // 60 for minute in told["/a"]["minutes"]] == list(range(40, 100))
    assert told["/a"]["minutes"][-1]["errors"] == 1
    assert told[""]["minutes"] == []
    assert len(hour._mounts["/a"]) == MINUTES


def test_several_fronts_are_one() -> None:
    """P3: minutes of the same time are added up, as seconds are."""
    one = {"/": {"provider": "p", "minutes": [{"at": 60, "answers": 1, "errors": 1, "p50": 1.0, "p99": 1.0}]}}
    other = {"/": {"provider": "p", "minutes": [{"at": 60, "answers": 3, "errors": 0, "p50": 2.0, "p99": 9.0}]}}
    assert _hour([one, other, {}]) == {
        "/": {"provider": "p", "minutes": [{"at": 60, "answers": 4, "errors": 1, "p50": 1.75, "p99": 9.0}]}
    }


def hour_of(admin: str) -> dict[str, Any]:
    told: dict[str, Any] = requests.get(f"{admin}/-/status.json", timeout=20).json()["hour"]
    return told


def total(hour: dict[str, Any], mount: str, name: str) -> int:
    return sum(int(minute[name]) for minute in hour.get(mount, {"minutes": []})["minutes"])


def test_a_server_s_hour() -> None:
    """G9: requests and errors of each mount, and of none."""
    app = "tests.handlers:app"
    mounts = {"/a": app, "/b": {"app": app, "provider": "openai", "key_id": "k"}}
    with Served(mounts, workers=1, drain=0) as served:
        for path in ("/a/hello", "/a/raise", "/b/hello", "/nowhere"):
            requests.get(served.url + path, timeout=20)
        hour = hour_of(served.admin)
    assert {mount: (one["provider"], total(hour, mount, "answers")) for mount, one in hour.items()} == {
        "": ("", 1),
        "/a": ("", 2),
        "/b": ("openai", 1),
    }
    assert total(hour, "/a", "errors") == 1


def test_the_hour_of_several_fronts(tmp_path: Path) -> None:
    """P3, G9: the parent's page has it too."""
    options = "--fronts=2", "--workers=2", "--port=0", "--admin=127.0.0.1:0"
    with Process("tests.handlers:app", *options) as served:
        for _ in range(8):
            requests.get(f"{served.url}/hello", timeout=20)
        wait_until(lambda: total(hour_of(served.admin), "/", "answers") == 8)
