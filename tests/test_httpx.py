"""transport.httpx2 and transport.httpx: both clients, in threads and in tasks."""

from __future__ import annotations

import gc
import importlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from runner import CancelScope, Pool, StartError
from tests.waiting import wait_until
from transport import MissingIdentity, TransportFactory, attribution, delegated_api_key_id

URL = "http://app.local"
OPENAI = "https://api.openai.com"

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture(params=["httpx2", "httpx"])
def httpx(request: pytest.FixtureRequest) -> Any:
    """The client library."""
    return importlib.import_module(request.param)


@pytest.fixture
def transports(httpx: Any) -> Any:
    """The module of ours for it."""
    return importlib.import_module(f"transport.{httpx.__name__}")


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine function in an event loop of its own."""
    return lambda main: anyio.run(main, backend=request.param)


@pytest.fixture
def client(httpx: Any, transports: Any, pool: Pool) -> Iterator[Any]:
    """A client whose requests go to the pool as they are."""
    with httpx.Client(transport=transports.Transport(pool), timeout=30) as client:
        yield client


@pytest.fixture
def routed(httpx: Any, transports: Any, pool: Pool) -> Iterator[Any]:
    """A client whose requests go to a provider's mount."""
    route = TransportFactory(pool).route_for("openai", "agents")
    with httpx.Client(transport=transports.Transport(pool, route), timeout=30) as client:
        yield client


@pytest.fixture
def connect(httpx: Any, transports: Any) -> Callable[..., Any]:
    """Makes async clients for a pool."""
    return lambda pool, route=None, **settings: httpx.AsyncClient(
        transport=transports.AsyncTransport(pool, route), timeout=settings.pop("timeout", 30), **settings
    )


# -- the round trip --------------------------------------------------------------------------------


def test_a_round_trip(client: Any) -> None:
    """X, H7: the handler sees what a server behind the URL would; the answer comes back with all of its head."""
    response = client.post("http://app.local:8080/echo?a=%20b&", json={"x": 1}, headers={"X-Own": "1"})
    seen = response.json()
    assert (response.status_code, response.reason_phrase, response.http_version) == (200, "OK", "HTTP/1.1")
    assert (seen["method"], seen["target"], seen["scheme"]) == ("POST", "/echo?a=%20b&", "http")
    assert seen["server"] == ["app.local", 8080]
    assert ["Host", "app.local:8080"] in seen["headers"]
    assert ["X-Own", "1"] in seen["headers"]
    assert json.loads(seen["body"]) == {"x": 1}
    assert str(response.url) == "http://app.local:8080/echo?a=%20b&"
    assert response.extensions["served_target"] == "/echo?a=%20b&"


def test_an_async_round_trip(pool: Pool, connect: Callable[..., Any], run: Run) -> None:
    """X: the same for a task."""

    async def main() -> None:
        async with connect(pool) as client:
            response = await client.post(f"{URL}/echo?x=y", content=b"hi")
            assert (response.reason_phrase, response.http_version) == ("OK", "HTTP/1.1")
            assert (response.json()["target"], response.json()["body"]) == ("/echo?x=y", "hi")
            assert (await client.get(f"{URL}/status?status=418")).reason_phrase == "I'm a Teapot"

    run(main)


def test_the_mount_and_the_trusted_context(routed: Any) -> None:
    """T3, T5, T6, T7: the path is rewritten, and what the host vouches for travels beside the headers."""
    with delegated_api_key_id("key-1"), attribution(workspace="w-1"):
        response = routed.get(f"{OPENAI}/v1/%2F/echo/?q=%20x&", headers={"X-Delegated-Api-Key-Id": "forged"})
    seen = response.json()
    served = "/api/v2/aibridge/openai/v1/%2F/echo/?q=%20x&"
    assert (seen["target"], response.extensions["served_target"]) == (served, served)
    assert str(response.url) == str(response.request.url) == f"{OPENAI}/v1/%2F/echo/?q=%20x&"
    context = seen["context"]
    assert (context["delegated_api_key_id"], context["provider"], context["source"]) == ("key-1", "openai", "agents")
    assert context["attribution"] == {"workspace": "w-1"}


def test_each_task_has_its_own_identity(pool: Pool, connect: Callable[..., Any], run: Run) -> None:
    """T4: the context variables are those of the task."""

    async def main() -> None:
        async with connect(pool, TransportFactory(pool).route_for("openai")) as client:

            async def call(key: str) -> None:
                with delegated_api_key_id(key):
                    for _ in range(10):
                        seen = (await client.get(f"{OPENAI}/echo")).json()
                        assert seen["context"]["delegated_api_key_id"] == key

            async with anyio.create_task_group() as group:
                for number in range(10):
                    group.start_soon(call, f"key-{number}")
            with pytest.raises(MissingIdentity):
                await client.get(f"{OPENAI}/echo")

    run(main)


def test_no_identity_no_request(routed: Any, pool: Pool) -> None:
    """T4: an error at the boundary; no worker sees the request."""
    with pytest.raises(MissingIdentity, match="delegated_api_key_id"):
        routed.get(f"{OPENAI}/echo")
    assert next(pool._job_numbers) == 1


def test_a_path_that_climbs_out(httpx: Any, routed: Any) -> None:
    """T3: the client's own invalid-URL error."""
    with delegated_api_key_id("key-1"), pytest.raises(httpx.InvalidURL, match="mount"):
        routed.get(f"{OPENAI}/a/%2e%2e%2f%2e%2e/x")


def test_redirects_inside_the_mount(httpx: Any, routed: Any) -> None:
    """T8: a Location inside the mount is mapped back; following it does not double the prefix."""
    with delegated_api_key_id("key-1"):
        target = "/api/v2/aibridge/openai/echo"
        response = routed.get(f"{OPENAI}/location?to={target}", follow_redirects=True)
        assert [str(step.url) for step in response.history] == [f"{OPENAI}/location?to={target}"]
    assert str(response.url) == f"{OPENAI}/echo"
    assert response.json()["target"] == target


def test_another_scheme(httpx: Any, client: Any, pool: Pool) -> None:
    """X: any scheme that was mounted works: the handler sees http, or https where the scheme ends in s."""
    transport = client._transport
    with httpx.Client(mounts={"custom://": transport, "app+tls://": transport}) as mounted:
        assert mounted.get("custom://shop/echo").json()["scheme"] == "http"
        assert mounted.get("app+tls://shop/echo").json()["scheme"] == "https"


def test_a_head_over_the_cap(httpx: Any, client: Any) -> None:
    """X: refused before any worker sees it."""
    with pytest.raises(httpx.LocalProtocolError, match="over the cap"):
        client.get(URL, headers={"X-Big": "x" * 300_000})


def test_the_target_extension(httpx: Any, client: Any) -> None:
    """X: as with the clients' own transports, a request may give its target byte for byte."""
    assert client.get(URL, extensions={"target": b"/a//b/echo"}).json()["target"] == "/a//b/echo"
    assert client.get(URL, extensions={"target": "/a/echo"}).json()["target"] == "/a/echo"
    for target in (b"no-slash", b"/a\r\nb", b"*"):
        with pytest.raises(httpx.LocalProtocolError):
            client.get(URL, extensions={"target": target})


def test_a_name_beyond_ascii(client: Any) -> None:
    """H7: the handler sees it as it stands in Host, as ASCII (RFC 5890)."""
    seen = client.get("http://b\u00fccher.example/echo").json()
    assert seen["server"] == ["xn--bcher-kva.example", 80]
    assert ["Host", "xn--bcher-kva.example"] in seen["headers"]


# -- bodies ----------------------------------------------------------------------------------------


def test_request_bodies(client: Any, tmp_path: Path) -> None:
    """H6: none, bytes, text, a form, files, a file, a generator of unknown length."""

    def size(**body: Any) -> int:
        return int(client.post(f"{URL}/count", **body).text)

    (tmp_path / "file").write_bytes(bytes(200_000))
    assert size() == 0
    assert size(content=b"x" * 100) == 100
    assert size(content="é") == 2
    assert size(content=bytes(5_000_000)) == 5_000_000
    assert size(data={"a": "b"}) == 3
    assert size(content=(bytes(1000) for _ in range(100))) == 100_000
    with (tmp_path / "file").open("rb") as file:
        assert size(content=file) == 200_000
    assert size(files={"file": io.BytesIO(bytes(300_000))}) > 300_000


def test_async_request_bodies(pool: Pool, connect: Callable[..., Any], run: Run) -> None:
    """H6: an async generator, and files."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
            yield bytes(10_000)

    async def main() -> None:
        async with connect(pool) as client:
            assert (await client.post(f"{URL}/count", content=body())).text == "1000000"
            files = {"file": io.BytesIO(bytes(300_000))}
            assert int((await client.post(f"{URL}/count", files=files)).text) > 300_000
            assert (await client.post(f"{URL}/count", content=bytes(5_000_000))).text == "5000000"

    run(main)


def test_an_upload_of_100_mb(start: Callable[..., Pool], connect: Callable[..., Any], run: Run) -> None:
    """H6, T12: from an async generator."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1_000_000)

    async def main() -> None:
        async with connect(start(workers=1)) as client:
            assert (await client.post(f"{URL}/count", content=body())).text == "100000000"

    run(main)


def lag_of(piece: str | bytes) -> float | None:
    """How long ago an event was written, in seconds; None for the blank line after it."""
    words = (piece.decode() if isinstance(piece, bytes) else piece).split()
    return time.monotonic() - float(words[2]) if words else None


def test_tokens_come_as_they_are_written(client: Any) -> None:
    """T10: iter_lines and iter_bytes with default arguments."""
    for iterate in ("iter_lines", "iter_bytes", "iter_text", "iter_raw"):
        with client.stream("GET", f"{URL}/stream?count=6&pause=0.05") as response:
            lags = [lag for piece in getattr(response, iterate)() if (lag := lag_of(piece)) is not None]
        assert len(lags) == 6
        assert max(lags) < 0.05, iterate


def test_tokens_come_to_tasks(pool: Pool, connect: Callable[..., Any], run: Run) -> None:
    """T10: aiter_lines with default arguments."""

    async def main() -> None:
        async with connect(pool) as client, client.stream("GET", f"{URL}/stream?count=6&pause=0.05") as response:
            lags = [lag async for line in response.aiter_lines() if (lag := lag_of(line)) is not None]
        assert len(lags) == 6
        assert max(lags) < 0.05

    run(main)


def test_compressed_bodies(client: Any, tmp_path: Path) -> None:
    """X, T10: what the handler has compressed is decoded piece by piece."""
    (tmp_path / "0").touch()
    with client.stream("GET", f"{URL}/compressed?coding=gzip&go={tmp_path}") as response:
        pieces = response.iter_lines()
        for number in range(3):
            (tmp_path / str(number)).touch()
            assert next(pieces) == f"event {number}"


def test_bodyless_responses(client: Any) -> None:
    """H5: HEAD, 204 and 304."""
    assert client.head(f"{URL}/hello").content == b""
    assert client.get(f"{URL}/status?status=204").content == b""


def test_cookies(client: Any) -> None:
    """X: Set-Cookie twice is two cookies."""
    client.get(f"{URL}/cookies")
    assert len(client.cookies) == 2


# -- faults ----------------------------------------------------------------------------------------


def test_faults_before_the_head(client: Any) -> None:
    """F1, F3, F6: a problem+json response, with what is known of the fault."""
    response = client.get(f"{URL}/die?how=SIGKILL")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-should-retry"] == "false"
    assert (response.json()["fault"], response.json()["signal"]) == ("died", "SIGKILL")
    assert client.get(f"{URL}/raise").json()["fault"] == "raised"
    assert "boom" not in client.get(f"{URL}/raise").text
    assert client.post(f"{URL}/protocol", content=b"total nonsense").status_code == 502
    assert client.head(f"{URL}/raise").content == b""


@pytest.mark.parametrize("target", ["/raise_late", "/die?late=1", "/abort_late", "/content?length=10&size=3"])
def test_faults_in_the_body(httpx: Any, client: Any, target: str) -> None:
    """F1, F2, F3, H5: never a clean end."""
    with pytest.raises(httpx.RemoteProtocolError, match=r"^peer closed connection without"):
        client.get(f"{URL}{target}")
    assert client.get(f"{URL}/hello").text == "hello"


def test_faults_for_tasks(httpx: Any, pool: Pool, connect: Callable[..., Any], run: Run) -> None:
    """F1, F3: the same."""

    async def main() -> None:
        async with connect(pool) as client:
            assert (await client.get(f"{URL}/die?how=exit")).json()["exit_code"] == 3
            with pytest.raises(httpx.RemoteProtocolError, match=r"^peer closed connection without"):
                await client.get(f"{URL}/die?late=1")
            async with client.stream("GET", f"{URL}/raise_late") as response:
                pieces = response.aiter_raw()
                assert await anext(pieces) == b"first piece"
                with pytest.raises(httpx.RemoteProtocolError, match="ValueError"):
                    await anext(pieces)

    run(main)


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(50_000)


async def aendless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(50_000)


def test_time_limits(httpx: Any, transports: Any, start: Callable[..., Pool], tmp_path: Path) -> None:
    """X, F7: pool, read and write time-outs, each as the client's own error."""
    pool = start(workers=1, grace=0.05)
    blocked = f"{URL}/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"
    with httpx.Client(transport=transports.Transport(pool), timeout=None) as client:
        with client.stream("GET", f"{URL}/endless"), pytest.raises(httpx.PoolTimeout, match="no worker"):
            client.get(URL, timeout=httpx.Timeout(None, pool=0.05, connect=0.01))
        with pytest.raises(httpx.ReadTimeout, match="no progress"):
            client.get(blocked, timeout=httpx.Timeout(None, read=0.1))
        with client.stream("GET", f"{URL}/stream?count=2&pause=5", timeout=httpx.Timeout(None, read=0.1)) as response:
            pieces = response.iter_raw()
            assert next(pieces)
            with pytest.raises(httpx.ReadTimeout):
                next(pieces)
        with pytest.raises(httpx.WriteTimeout, match="request body"):
            client.post(blocked, content=endless(), timeout=httpx.Timeout(None, write=0.1))
        assert client.get(f"{URL}/hello").text == "hello"


def test_time_limits_of_tasks(
    httpx: Any, start: Callable[..., Pool], connect: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    """X, F7: the same."""
    pool = start(workers=1, grace=0.05)
    blocked = f"{URL}/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"

    async def main() -> None:
        async with connect(pool, timeout=None) as client:
            async with client.stream("GET", f"{URL}/endless"):
                with pytest.raises(httpx.PoolTimeout, match="no worker"):
                    await client.get(URL, timeout=httpx.Timeout(None, pool=0.05))
            with pytest.raises(httpx.ReadTimeout, match="no progress"):
                await client.get(blocked, timeout=httpx.Timeout(None, read=0.1))
            with pytest.raises(httpx.WriteTimeout, match="request body"):
                await client.post(blocked, content=aendless(), timeout=httpx.Timeout(None, write=0.1))
            assert (await client.get(f"{URL}/hello")).text == "hello"

    run(main)


def test_the_connect_time_limit(httpx: Any, transports: Any) -> None:
    """X: it is the wait for a pool that has no worker yet."""
    pool = Pool("tests.handlers:app", workers=1)
    try:
        with httpx.Client(transport=transports.Transport(pool)) as client:
            with pytest.raises(httpx.ConnectTimeout):
                client.get(URL, timeout=httpx.Timeout(30, connect=0.001))
            assert client.get(f"{URL}/hello", timeout=30).text == "hello"
    finally:
        pool.close()


def test_a_full_pool_that_answers(
    httpx: Any, transports: Any, start: Callable[..., Pool], connect: Callable[..., Any], run: Run
) -> None:
    """F7: where the pool is set to answer: 503 with Retry-After."""
    pool = start(workers=1, overload="answer", queue=0)

    async def main() -> None:
        async with connect(pool) as client, client.stream("GET", f"{URL}/endless"):
            response = await client.get(URL)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")

    run(main)
    with httpx.Client(transport=transports.Transport(pool)) as client, client.stream("GET", f"{URL}/endless"):
        assert client.get(URL).json()["fault"] == "overload"


def test_pools_that_do_not_work(httpx: Any, transports: Any, connect: Callable[..., Any], run: Run) -> None:
    """F8: closed, or unable to start: the client's connect error, with the reason."""
    pool = Pool("tests.no_such_module:app", workers=1)

    async def main() -> None:
        async with connect(pool) as client:
            with pytest.raises(httpx.ConnectError, match="no_such_module") as caught:
                await client.get(URL)
            assert isinstance(caught.value.__cause__, StartError)

    run(main)
    with httpx.Client(transport=transports.Transport(pool)) as client:
        with pytest.raises(httpx.ConnectError, match="no_such_module"):
            client.get(URL)
        pool.close()
        with pytest.raises(httpx.ConnectError, match="closed"):
            client.get(URL)


# -- leaving ---------------------------------------------------------------------------------------


def test_an_early_break_keeps_the_worker(httpx: Any, transports: Any, start: Callable[..., Pool]) -> None:
    """C1, C4: leaving the stream ends the job; a handler that ends in time keeps its worker warm."""
    pool = start(workers=1, grace=10)
    with httpx.Client(transport=transports.Transport(pool), timeout=30) as client:
        pid = client.get(f"{URL}/pid").text
        for _ in range(10):
            with client.stream("GET", f"{URL}/endless") as response:
                for _ in response.iter_bytes():
                    break
        assert client.get(f"{URL}/pid").text == pid


@pytest.mark.filterwarnings("ignore:Async generator 'httpx")  # the clients' own, of which trio would have them closed
def test_an_early_break_of_tasks(start: Callable[..., Pool], connect: Callable[..., Any], run: Run) -> None:
    """C1, C4: the same, and for a task that is cancelled in mid-stream."""
    pool = start("tests.asgi_apps:app", workers=1, grace=10)
    pid = pool.workers()[0].pid

    async def main() -> None:
        async with connect(pool) as client:
            for _ in range(10):
                async with client.stream("GET", f"{URL}/stream?count=1000") as response:
                    async for _ in response.aiter_bytes():
                        break
            with anyio.CancelScope() as scope:
                async with client.stream("GET", f"{URL}/stream?count=1000") as response:
                    async for _ in response.aiter_bytes():
                        scope.cancel()
            assert scope.cancelled_caught
            assert (await client.get(f"{URL}/hello")).text == "hello"

    run(main)
    assert [worker.pid for worker in pool.workers()] == [pid]


def test_aclose_while_another_task_reads(
    httpx: Any, start: Callable[..., Pool], connect: Callable[..., Any], run: Run
) -> None:
    """X, C2: the reader is freed at once, with an error."""
    pool = start("tests.asgi_apps:app", workers=1, grace=10)

    async def main() -> None:
        async with connect(pool) as client:
            request = client.build_request("GET", f"{URL}/stream?count=2&pause=1000")
            response = await client.send(request, stream=True)
            async with anyio.create_task_group() as group:

                async def read() -> None:
                    with pytest.raises(httpx.ReadError, match=r"close\(\) was called"):
                        await response.aread()

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                with anyio.fail_after(5):
                    await response.aclose()

    run(main)


def test_a_scope_of_ours(httpx: Any, client: Any, pool: Pool, tmp_path: Path) -> None:
    """C1, C2: its deadline is a read time-out to the client, its cancel a read error."""
    blocked = f"{URL}/wait_for?here={tmp_path / 'here'}&go={tmp_path / 'never'}"
    with CancelScope(timeout=0.1), pytest.raises(httpx.ReadTimeout):
        client.get(blocked)
    (tmp_path / "here").unlink(missing_ok=True)
    with CancelScope() as scope:

        def cancel() -> None:
            wait_until((tmp_path / "here").exists)
            scope.cancel("the user left")

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(httpx.ReadError, match="the user left"):
            client.get(blocked)
        thread.join()


def test_responses_that_are_dropped(
    start: Callable[..., Pool], httpx: Any, transports: Any, connect: Callable[..., Any], run: Run
) -> None:
    """C1, X: a finalizer ends what nobody closes, with a ResourceWarning."""
    pool = start(workers=1)
    with httpx.Client(transport=transports.Transport(pool)) as client:
        responses = [client.send(client.build_request("GET", f"{URL}/endless"), stream=True)]
        with pytest.warns(ResourceWarning, match="dropped before its end"):
            drop(responses)

    async def main() -> None:
        async with connect(pool) as client:
            responses = [await client.send(client.build_request("GET", f"{URL}/endless"), stream=True)]
            with pytest.warns(ResourceWarning, match="dropped before its end"):
                drop(responses)
            assert (await client.get(f"{URL}/hello")).text == "hello"

    run(main)


def drop(responses: list[Any]) -> None:
    responses.clear()
    gc.collect()


def test_closing_a_client_closes_no_pool(httpx: Any, transports: Any, pool: Pool, run: Run) -> None:
    """C6: the pool is its owner's."""
    with httpx.Client(transport=transports.Transport(pool)) as client:
        client.get(f"{URL}/hello")

    async def main() -> None:
        async with httpx.AsyncClient(transport=transports.AsyncTransport(pool)) as client:
            await client.get(f"{URL}/hello")

    run(main)
    assert pool.ready
