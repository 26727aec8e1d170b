"""What the httpx2 and httpx transports share: requests translated, answers and errors translated back.

Nothing here imports either client. The two modules beside it give their classes of errors, and wrap the bodies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, cast

from runner.errors import (
    BlastdoorError,
    ConfigurationError,
    InvalidBody,
    InvalidLength,
    InvalidRequest,
    JobClosed,
    JobFailed,
    LeaseTimeout,
    PoolClosed,
    PoolForked,
    ReadTimeout,
    StartError,
    WorkersUnavailable,
    WriteTimeout,
)
from runner.model.request import Body, Request
from runner.wire.messages import JobContext, ResponseHead
from transport.errors import TargetEscapes, check_pool
from transport.problem_details import problem
from transport.route import Route, scheme_for_handlers, under_scheme

if TYPE_CHECKING:
    from runner.protocols import AnyAsyncJob, AnyJob, AnyPool

_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Errors:
    """A client's own classes of errors."""

    connect: type[Exception]
    connect_timeout: type[Exception]
    invalid_url: type[Exception]
    local_protocol: type[Exception]
    pool_timeout: type[Exception]
    read: type[Exception]
    read_timeout: type[Exception]
    remote_protocol: type[Exception]
    unsupported_protocol: type[Exception]
    write_timeout: type[Exception]


class ClientURL(Protocol):
    """The part of a client's URL that is looked at."""

    @property
    def scheme(self) -> str: ...
    @property
    def raw_host(self) -> bytes: ...
    @property
    def port(self) -> int | None: ...
    @property
    def netloc(self) -> bytes: ...
    @property
    def raw_path(self) -> bytes: ...


class ClientHeaders(Protocol):
    """The part of a client's headers that is looked at."""

    @property
    def raw(self) -> list[tuple[bytes, bytes]]: ...


class ClientRequest(Protocol):
    """The part of a client's request that is looked at."""

    @property
    def method(self) -> str: ...
    @property
    def url(self) -> ClientURL: ...
    @property
    def headers(self) -> ClientHeaders: ...
    @property
    def extensions(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, as far as a client's own class of it needs to know."""

    status: int
    headers: list[tuple[bytes, bytes]]
    extensions: dict[str, Any]


class Core:
    """Runs a client's requests in a pool, rewritten by a route where there is one."""

    def __init__(self, pool: AnyPool, route: Route | None, errors: Errors) -> None:
        check_pool(pool)
        self._pool = pool
        self._route = route
        self._errors = errors

    def send(self, request: ClientRequest, body: object) -> tuple[Answer, SyncBody]:
        """Send a request; gives the answer as soon as its head is there, and its body."""
        call = _Call(self, request, body)
        try:
            job = self._pool.open(call.outgoing, context=call.context, **call.timeouts)
        except BlastdoorError as error:
            head, content = self._failed(error, call)
            return call.answer(head), SyncBody(None, content, self._errors)
        try:
            return call.answer(job.head), SyncBody(job, b"", self._errors)
        except BaseException as error:
            job.close(error)
            raise

    async def send_async(self, request: ClientRequest, body: object) -> tuple[Answer, AsyncBody]:
        """As `send`, for a task of an event loop."""
        call = _Call(self, request, body)
        try:
            job = await self._pool.aopen(call.outgoing, context=call.context, **call.timeouts)
        except BlastdoorError as error:
            head, content = self._failed(error, call)
            return call.answer(head), AsyncBody(None, content, self._errors)
        try:
            return call.answer(job.head), AsyncBody(job, b"", self._errors)
        except BaseException as error:
            job.close(error)
            raise

    def _failed(self, error: BlastdoorError, call: _Call) -> tuple[ResponseHead, bytes]:
        """The response that tells of a fault, or the client's own error, raised."""
        errors = self._errors
        if isinstance(error, LeaseTimeout) and self._pool.overload == "raise":
            raise call.lease_error(f"timed out: {error}") from error
        if isinstance(error, (JobFailed, WorkersUnavailable, LeaseTimeout)):
            head, content = problem(error, debug=self._pool.debug)
            return head, b"" if call.outgoing.method == "HEAD" else content
        if isinstance(error, (ConfigurationError, InvalidBody)):
            raise error  # a mistake in the program
        if isinstance(error, InvalidRequest):
            raise errors.local_protocol(str(error)) from error
        if isinstance(error, (PoolClosed, PoolForked, StartError)):
            raise errors.connect(f"All connection attempts failed: {error}") from error
        raise _translated(error, errors) from error


class _Call:
    """One request on its way."""

    __slots__ = ("_authority", "_route", "_scheme", "context", "lease_error", "outgoing", "timeouts")

    def __init__(self, core: Core, request: ClientRequest, body: object) -> None:
        errors = core._errors
        self._route = core._route
        self.context = JobContext() if self._route is None else self._route.context()
        limits: Mapping[str, float | None] = request.extensions.get("timeout") or {}
        lease, connect = limits.get("pool"), limits.get("connect")
        self.lease_error = errors.pool_timeout
        if connect is not None and (lease is None or connect < lease) and not core._pool.ready:
            lease, self.lease_error = connect, errors.connect_timeout
        read, write = limits.get("read"), limits.get("write")
        self.timeouts = {
            "lease_timeout": lease,
            "read_timeout": read,
            "write_timeout": math.inf if write is None else write,
        }
        url = request.url
        if not url.scheme or not url.raw_host:
            raise errors.unsupported_protocol(
                "Request URL is missing an 'http://' or 'https://' protocol, or its host: give the client a base_url"
            )
        scheme = scheme_for_handlers(url.scheme)
        self._scheme = url.scheme
        target = request.extensions.get("target", url.raw_path)
        target = target if isinstance(target, str) else bytes(target).decode("latin-1")
        self._authority = url.netloc.decode("ascii")
        try:
            if self._route is not None:
                target = self._route.rewrite(target)
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw]
            server = url.raw_host.decode("ascii"), url.port or _PORTS[scheme]
            self.outgoing = Request(request.method, target, headers, cast("Body", body), scheme, server)
        except TargetEscapes as error:
            raise errors.invalid_url(str(error)) from error
        except InvalidRequest as error:
            raise errors.local_protocol(str(error)) from error

    def answer(self, head: ResponseHead) -> Answer:
        """The head as the client takes it."""
        headers = head.headers
        if self._route is not None:
            headers = self._route.restore_locations(headers, self.outgoing.scheme, self._authority)
        headers = under_scheme(headers, self._scheme, self._authority)
        return Answer(
            head.status,
            [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
            {
                "http_version": b"HTTP/1.1",
                "reason_phrase": head.reason.encode("latin-1"),
                "served_target": self.outgoing.target,
            },
        )


class SyncBody:
    """A response's body: each piece as it comes, with the client's own errors."""

    def __init__(self, job: AnyJob | None, content: bytes, errors: Errors) -> None:
        self._job = job
        self._content = content
        self._errors = errors

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data, self._content = self._content, b""
        if self._job is not None:
            try:
                data = self._job.read()
            except BlastdoorError as error:
                raise _translated(error, self._errors) from error
        if data:
            return data
        raise StopIteration

    def close(self) -> None:
        """End the job, if it has not ended."""
        if self._job is not None:
            self._job.close()


class AsyncBody:
    """A response's body: each piece as it comes, with the client's own errors."""

    def __init__(self, job: AnyAsyncJob | None, content: bytes, errors: Errors) -> None:
        self._job = job
        self._content = content
        self._errors = errors

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data, self._content = self._content, b""
        if self._job is not None:
            try:
                data = await self._job.read()
            except BlastdoorError as error:
                raise _translated(error, self._errors) from error
        if data:
            return data
        raise StopAsyncIteration

    def close(self) -> None:
        """End the job, if it has not ended."""
        if self._job is not None:
            self._job.close()


def _translated(error: BlastdoorError, errors: Errors) -> Exception:
    """The client's own error for what ended a job."""
    if isinstance(error, ReadTimeout):
        return errors.read_timeout(f"timed out: {error}")
    if isinstance(error, WriteTimeout):
        return errors.write_timeout(f"timed out: {error}")
    if isinstance(error, JobClosed):
        if isinstance(error.__cause__, TimeoutError):
            return errors.read_timeout(f"timed out: {error}")
        return errors.read(str(error))
    if isinstance(error, InvalidBody):
        return error
    if isinstance(error, InvalidLength):
        return errors.local_protocol(str(error))
    return errors.remote_protocol(f"peer closed connection without sending complete message body: {error}")
