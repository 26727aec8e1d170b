"""Requests that are done again where their worker died: which, how often, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import requests

from runner import ConfigurationError, Limits, MemoryExceeded, Pool, Request, Retry, WorkerDied
from runner.events import JobEnded
from tests.serving import Process, Served
from tests.test_cli import blastdoor
from transport.requests import Transport

DIE_ONCE = "tests.retry_handlers:app"


@pytest.fixture
def tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many workers have begun the request; the first so many die, as `BLASTDOOR_TEST_DEATHS` says."""
    monkeypatch.setenv("BLASTDOOR_TEST_TRIES", str(tmp_path / "tries"))
    monkeypatch.setenv("BLASTDOOR_TEST_DEATHS", "1")
    return lambda: len((tmp_path / "tries").read_bytes())


def get(pool: Pool, method: str = "GET", target: str = "/", body: Any = None) -> bytes:
    with pool.open(Request(method, target, body=body)) as job:
        return b"".join(job)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_request_is_done_again(
    start: Callable[..., Pool], tries: Callable[[], int], log: pytest.LogCaptureFixture, concurrency: int
) -> None:
    """F3, F4: by another worker, with its body; the log and the counts tell of both tries."""
    pool = start(DIE_ONCE, workers=2, concurrency=concurrency, retry=Retry(methods={"GET", "PUT"}))
    ended: list[JobEnded] = []
    pool.subscribe(lambda event: ended.append(event) if isinstance(event, JobEnded) else None)
    assert get(pool, "PUT", body=b"the body") == b"PUT the body"
    assert tries() == 2
    assert pool.stats().outcomes == {"retried": 1, "ok": 1}
    assert "it is done again, by another" in log.text
    first, second = ended
    assert first.job_id == second.job_id
    assert "SIGKILL" in first.detail


def test_by_a_task_and_by_a_client(start: Callable[..., Pool], tries: Callable[[], int]) -> None:
    """F3, X: the same for tasks, and through a client."""

    async def main() -> bytes:
        async with await pool.aopen(Request("GET", "/")) as job:
            return b"".join([piece async for piece in job])

    pool = start(DIE_ONCE, workers=1, retry=Retry())
    assert anyio.run(main) == b"GET "
    Path(os.environ["BLASTDOOR_TEST_TRIES"]).unlink()
    with requests.Session() as session:
        session.mount("http://app.local/", Transport(pool))
        assert session.get("http://app.local/", timeout=30).text == "GET "
    assert tries() == 2


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/", b"x"),
        ("get", "/", None),
        ("GET", "/?head", None),
        ("GET", "/", [b"in", b"pieces"]),
    ],
    ids=["another method", "methods have case", "after the head", "a body that is gone"],
)
def test_what_is_not_done_again(
    start: Callable[..., Pool], tries: Callable[[], int], method: str, target: str, body: Any
) -> None:
    """F3, F4: of others nobody knows that it would harm nobody."""
    pool = start(DIE_ONCE, workers=1, retry=Retry(deaths=5))

    def pieces() -> Iterator[bytes]:
        yield from body

    with pytest.raises(WorkerDied):
        get(pool, method, target, pieces() if isinstance(body, list) else body)
    assert tries() == 1


def test_no_more_often_than_told(
    start: Callable[..., Pool], tries: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3: then its caller is told of the last death; by default of the first."""
    monkeypatch.setenv("BLASTDOOR_TEST_DEATHS", "9")
    with pytest.raises(WorkerDied):
        get(start(DIE_ONCE, workers=1, retry=Retry(deaths=2)))
    assert tries() == 3
    with pytest.raises(WorkerDied):
        get(start(DIE_ONCE, workers=1))
    assert tries() == 4


def test_a_limit_is_no_accident(start: Callable[..., Pool], tries: Callable[[], int]) -> None:
    """F5: a worker that was killed for its memory would be so again."""
    pool = start(DIE_ONCE, workers=1, retry=Retry(), limits=Limits(memory="64MiB"))
    with pytest.raises(MemoryExceeded):
        get(pool, target="/?memory")
    assert tries() == 1


def test_behind_the_server(tries: Callable[[], int]) -> None:
    """G3, F3: `serve --retry 1`, and a table of a file: the client has its answer, and metrics the count."""
    with Served(DIE_ONCE, workers=1, retry=Retry(methods={"POST"})) as served, requests.Session() as session:
        assert session.post(served.url, data=b"body", timeout=30).text == "POST body"
    assert tries() == 2
    Path(os.environ["BLASTDOOR_TEST_TRIES"]).unlink()
    with Process(DIE_ONCE, "--retry=1", "--workers=1", "--port=0", "--admin=127.0.0.1:0") as process:
        assert requests.get(process.url, timeout=30).text == "GET "
        metrics = requests.get(f"{process.admin}/-/metrics", timeout=30).text
        assert 'outcome="retried"' in metrics
    assert tries() == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deaths": 0}, "deaths"),
        ({"deaths": True}, "deaths"),
        ({"methods": "GET"}, "methods"),
        ({"methods": {""}}, "methods"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], words: str) -> None:
    """F3: it is refused where it is made."""
    with pytest.raises(ConfigurationError, match=words):
        Retry(**options)
    with pytest.raises(ConfigurationError, match="Retry"):
        Pool(DIE_ONCE, retry=3)  # type: ignore[arg-type]
    assert blastdoor("serve", DIE_ONCE, "--retry=-1").returncode == 2
