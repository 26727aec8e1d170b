"""A plug-in for pytest: apps run in worker processes of the test session, and a worker that dies fails the test.

pytest finds it by itself where blastdoor is installed (entry point `blastdoor`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin

import pytest

if TYPE_CHECKING:
    import requests

    from runner import Pool
    from runner.events import Event

_MARKER: Final = "blastdoor_deaths"
_TIMEOUT: Final = 60.0
"""Seconds that a client waits for each piece of an answer, where a test says nothing."""

_BASE: Final = "http://testserver/"
_RECORDS: Final = 1000

PoolFactory = Callable[..., "Pool"]
ClientFactory = Callable[..., "requests.Session"]


class _Records(logging.Handler):
    """What was logged about workers and jobs lately: the stack of a crash stands there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        del self.records[:-_RECORDS]

    def about(self, name: str, value: object) -> str:
        """The messages of the records with this attribute."""
        return "\n".join(record.getMessage() for record in self.records if getattr(record, name, None) == value)


class _Pools:
    """The pools of a test session, and the deaths of their workers that no test was told of."""

    def __init__(self) -> None:
        self._made: list[tuple[object, dict[str, Any], Pool]] = []
        self._clients: list[requests.Session] = []
        self._deaths: list[tuple[int | None, str, str]] = []
        self._records = _Records()
        logging.getLogger("blastdoor").addHandler(self._records)

    def pool(self, app: Any, *, fresh: bool = False, **options: Any) -> Pool:
        """A pool that serves this app with these options; the same for the same, unless it is to be `fresh`."""
        from runner import Pool  # loaded by who uses it

        for known, how, pool in self._made:
            if not fresh and known == app and how == options and not pool.closed:
                return pool
        pool = Pool(app, **{"workers": 1, **options})
        pool.subscribe(self._note)
        self._made.append((app, options, pool))
        return pool.start()

    def client(self, app: Any, *, fresh: bool = False, **options: Any) -> requests.Session:
        """A session of requests whose paths go to this app."""
        client = _client(self.pool(app, fresh=fresh, **options))
        self._clients.append(client)
        return client

    def take_deaths(self) -> str:
        """What is to be told of the workers that have died since the last time; empty where none has."""
        told = []
        deaths, self._deaths = self._deaths, []
        for pid, job_id, how in deaths:
            if not job_id and any(other and pid == known for known, other, _ in deaths):
                continue  # that of its job tells more
            words = self._records.about("job_id", job_id) if job_id else self._records.about("worker", pid)
            told.append(f"{how}\n{words}".rstrip())
        return "\n\n".join(told)

    def close(self) -> None:
        """End all of it."""
        for client in self._clients:
            client.close()
        for _, _, pool in self._made:
            pool.close(drain=0)
        logging.getLogger("blastdoor").removeHandler(self._records)

    def _note(self, event: Event) -> None:
        from runner.events import JobEnded, WorkerEnded

        if isinstance(event, JobEnded) and event.outcome == "died":
            how = f"worker {event.worker} died at {event.method} {event.target}: {event.detail}"
            self._deaths.append((event.worker, event.job_id, how))
        elif isinstance(event, WorkerEnded) and (event.exit_code or (event.signal or "SIGKILL") != "SIGKILL"):
            how = f"worker {event.pid} died: {event.signal or f'exit code {event.exit_code}'}"
            self._deaths.append((event.pid, "", how))


def _client(pool: Pool) -> requests.Session:
    import requests

    from transport.requests import Transport

    class Client(requests.Session):
        def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
            kwargs.setdefault("timeout", _TIMEOUT)
            url = url.decode() if isinstance(url, bytes) else url
            return super().request(method, urljoin(_BASE, url), *args, **kwargs)

    client = Client()
    client.trust_env = False  # no proxy stands between the test and its app
    client.mount(_BASE, Transport(pool))
    return client


_pools: pytest.StashKey[_Pools] = pytest.StashKey()


@pytest.fixture(scope="session")
def blastdoor_pool(request: pytest.FixtureRequest) -> Iterator[PoolFactory]:
    """What makes started pools: `blastdoor_pool("shop:app", workers=2)`, with the arguments of `runner.Pool`.

    One worker by default. The same arguments give the same pool, as long as the session lasts; with `fresh=True` it is
    a new one. A worker that dies fails the test that runs, with its stack, unless that is marked `blastdoor_deaths`.
    """
    pools = request.config.stash[_pools] = _Pools()
    try:
        yield pools.pool
    finally:
        pools.close()
        del request.config.stash[_pools]
    if deaths := pools.take_deaths():
        pytest.fail(f"after the last test:\n{deaths}", pytrace=False)


@pytest.fixture(scope="session")
def blastdoor_client(request: pytest.FixtureRequest, blastdoor_pool: PoolFactory) -> ClientFactory:
    """What makes clients: `blastdoor_client("shop:app").get("/")`, with the arguments of `blastdoor_pool`.

    A client is a `requests.Session`, with cookies of its own. It takes paths as URLs, and waits for 60 s at most.
    """
    return request.config.stash[_pools].client


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", f"{_MARKER}: workers of blastdoor may die in this test.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test in which a worker has died; where it has failed already, tell of the death."""
    pools = item.config.stash.get(_pools, None)
    before = "" if pools is None else pools.take_deaths()
    try:
        result = yield
    except BaseException:
        if deaths := _deaths_in(item, before):
            item.add_report_section("call", "blastdoor", deaths)
        raise
    deaths = _deaths_in(item, before)
    if deaths and item.get_closest_marker(_MARKER) is None:
        pytest.fail(deaths, pytrace=False)
    return result


def _deaths_in(item: pytest.Item, before: str) -> str:
    pools = item.config.stash.get(_pools, None)
    during = "" if pools is None else pools.take_deaths()
    return "\n\n".join(filter(None, [before and f"before this test, or as it was set up:\n{before}", during]))
