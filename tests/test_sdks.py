"""The openai and anthropic SDKs over our transports, against a provider that runs isolated."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import anyio
import httpx2
import openai
import pytest

from runner import Pool
from tests.provider_app import PAUSE, TOKENS
from transport import TransportFactory, delegated_api_key_id
from transport.httpx2 import AsyncTransport, Transport

ASK: Any = {"messages": [{"role": "user", "content": "hi"}]}


class SDK:
    """One SDK's way to ask: the two are alike but for names."""

    def __init__(self, name: str, journal: Path, start: Callable[..., Pool]) -> None:
        self.name = name
        self.module: Any = {"openai": openai, "anthropic": anthropic}[name]
        self.journal = journal
        self.pool = start(
            "tests.provider_app:app",
            workers=1,
            root_path=f"/api/v2/aibridge/{name}",
            env={"JOURNAL": str(journal)},
            grace=10,
        )
        self.route = TransportFactory(self.pool).route_for(name, "tests")

    def client(self, **settings: Any) -> Any:
        http_client = httpx2.Client(transport=Transport(self.pool, self.route))
        make = self.module.OpenAI if self.name == "openai" else self.module.Anthropic
        return make(api_key="k", http_client=http_client, **settings)

    def async_client(self, **settings: Any) -> Any:
        http_client = httpx2.AsyncClient(transport=AsyncTransport(self.pool, self.route))
        make = self.module.AsyncOpenAI if self.name == "openai" else self.module.AsyncAnthropic
        return make(api_key="k", http_client=http_client, **settings)

    def ask(self, client: Any, model: str = "good", stream: bool = False, count: int = TOKENS) -> Any:
        if self.name == "openai":
            return client.chat.completions.create(model=model, stream=stream, max_completion_tokens=count, **ASK)
        return client.messages.create(model=model, stream=stream, max_tokens=count, **ASK)

    def text(self, answer: Any) -> str:
        text: str = answer.choices[0].message.content if self.name == "openai" else answer.content[0].text
        return text

    def token(self, chunk: Any) -> str | None:
        """The token in a chunk of a stream, None where it holds none."""
        if self.name == "openai":
            return str(chunk.choices[0].delta.content)
        return chunk.delta.text if chunk.type == "content_block_delta" else None

    def asked(self) -> list[str]:
        """The models that the provider was asked for."""
        return self.journal.read_text().split() if self.journal.exists() else []


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest, start: Callable[..., Pool], tmp_path: Path) -> SDK:
    return SDK(request.param, tmp_path / "journal", start)


@pytest.fixture(autouse=True)
def key() -> Iterator[None]:
    with delegated_api_key_id("key-1"):
        yield


def check_pace(seen: list[tuple[float, str]]) -> None:
    """The first token was seen before the last was written, and the gaps between them are those of the writer."""
    assert len(seen) == TOKENS
    written = [float(token.split()[1]) for _, token in seen]
    assert seen[0][0] < written[-1]
    for (arrived, _), moment in zip(seen, written, strict=True):
        assert arrived - moment < PAUSE, "a token was held back until the next one"


def test_an_answer(sdk: SDK) -> None:
    """X, T4: the SDK's own classes hold the provider's answer; the provider knows whom it acts for."""
    with sdk.client() as client:
        answer = sdk.ask(client)
    assert sdk.text(answer) == ("hello key-1" if sdk.name == "openai" else "hello")


def test_an_answer_to_a_task(sdk: SDK) -> None:
    """X: the async client."""

    async def main() -> None:
        async with sdk.async_client() as client:
            assert sdk.text(await sdk.ask(client)).startswith("hello")

    anyio.run(main)


def test_a_stream(sdk: SDK) -> None:
    """X, T10: token by token, at the provider's pace."""
    with sdk.client() as client:
        stream = sdk.ask(client, stream=True)
        seen = [(time.monotonic(), token) for chunk in stream if (token := sdk.token(chunk)) is not None]
    check_pace(seen)


def test_a_stream_to_a_task(sdk: SDK) -> None:
    """X, T10: the same for the async client."""

    async def main() -> None:
        async with sdk.async_client() as client:
            stream: AsyncIterator[Any] = await sdk.ask(client, stream=True)
            seen = [(time.monotonic(), token) async for chunk in stream if (token := sdk.token(chunk)) is not None]
        check_pace(seen)

    anyio.run(main)


def test_streams_read_to_the_end_keep_the_worker(sdk: SDK) -> None:
    """C4: an SDK stops at [DONE], before the stream's own end: that costs no worker."""
    pid = sdk.pool.workers()[0].pid
    with sdk.client() as client:
        for _ in range(5):
            for _ in sdk.ask(client, stream=True, count=2):
                pass
    assert [worker.pid for worker in sdk.pool.workers()] == [pid]
    assert sdk.pool.stats().deaths == 0


def test_an_early_break(sdk: SDK) -> None:
    """C1, C4: leaving a stream after its first token ends the provider's job, and keeps its worker."""
    pid = sdk.pool.workers()[0].pid
    with sdk.client() as client:
        for _ in range(3):
            with sdk.ask(client, stream=True, count=10_000) as stream:
                for chunk in stream:
                    if sdk.token(chunk):
                        break
        assert sdk.text(sdk.ask(client)).startswith("hello")
    assert [worker.pid for worker in sdk.pool.workers()] == [pid]


def test_an_early_break_of_a_task(sdk: SDK) -> None:
    """C1, C4: the same for the async client, and for a task that is cancelled in mid-stream."""
    pid = sdk.pool.workers()[0].pid

    async def main() -> None:
        async with sdk.async_client() as client:
            async with await sdk.ask(client, stream=True, count=10_000) as stream:
                async for chunk in stream:
                    if sdk.token(chunk):
                        break
            with anyio.CancelScope() as scope:
                async with await sdk.ask(client, stream=True, count=10_000) as stream:
                    async for _ in stream:
                        scope.cancel()
            assert scope.cancelled_caught
            assert sdk.text(await sdk.ask(client)).startswith("hello")

    anyio.run(main)
    assert [worker.pid for worker in sdk.pool.workers()] == [pid]


def test_a_time_out(sdk: SDK) -> None:
    """X: the SDK's own time-out error, in threads and in tasks."""
    with sdk.client(timeout=0.2, max_retries=0) as client, pytest.raises(sdk.module.APITimeoutError):
        sdk.ask(client, "hang")

    async def main() -> None:
        async with sdk.async_client(timeout=0.2, max_retries=0) as client:
            with pytest.raises(sdk.module.APITimeoutError):
                await sdk.ask(client, "hang")

    anyio.run(main)


def test_a_crash(sdk: SDK) -> None:
    """F3: the SDK's internal server error, with the fault, and no retry of a job that may have had effects."""
    with sdk.client(max_retries=3) as client, pytest.raises(sdk.module.InternalServerError) as caught:
        sdk.ask(client, "crash")
    assert caught.value.status_code == 500
    assert caught.value.response.json()["signal"] == "SIGSEGV"
    assert sdk.asked() == ["crash"]

    async def main() -> None:
        async with sdk.async_client(max_retries=3) as client:
            with pytest.raises(sdk.module.InternalServerError):
                await sdk.ask(client, "crash", stream=True)

    anyio.run(main)
    assert sdk.asked() == ["crash", "crash"]


def test_a_crash_in_mid_stream(sdk: SDK) -> None:
    """F3: never a clean end of the stream, and no retry."""
    seen = []
    with sdk.client(max_retries=3) as client, pytest.raises((httpx2.RemoteProtocolError, sdk.module.APIError)):
        for chunk in sdk.ask(client, "crash-late", stream=True):
            seen.append(sdk.token(chunk))  # noqa: PERF401 - what came before the error counts
    assert len([token for token in seen if token]) == 2
    assert sdk.asked() == ["crash-late"]


def test_an_older_app_with_httpx(sdk: SDK) -> None:
    """X: the same provider, asked by a plain httpx client."""
    import httpx

    from transport.httpx import Transport as HttpxTransport

    with httpx.Client(transport=HttpxTransport(sdk.pool, sdk.route)) as client:
        path = "chat/completions" if sdk.name == "openai" else "messages"
        response = client.post(f"https://api.example/v1/{path}", json={"model": "good", **ASK, "max_tokens": 1})
        assert response.status_code == 200
