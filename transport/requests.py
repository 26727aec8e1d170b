"""The `requests` adapter: mount it on a session, and its requests go to a pool's handler.

    session = requests.Session()
    session.mount("http://app.local/", Transport(pool))

`verify`, `cert` and `proxies` are ignored: nothing leaves the machine. Redirects and statuses are the
session's business. Timeouts are those of requests: connect is the wait for a free worker, read the wait
for each sign of progress.
"""

from __future__ import annotations

import http.client
import io
import warnings
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.cookies import extract_cookies_to_jar
from requests.exceptions import ConnectionError as RequestsConnectionError
from requests.exceptions import ConnectTimeout, InvalidHeader, InvalidURL, ReadTimeout
from requests.utils import get_encoding_from_headers, requote_uri
from urllib3 import HTTPHeaderDict, HTTPResponse
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError, ProtocolError, ReadTimeoutError
from urllib3.util import Retry, Timeout

from runner.errors import (
    BlastdoorError,
    InvalidBody,
    InvalidLength,
    InvalidRequest,
    JobClosed,
    JobFailed,
    LeaseTimeout,
    PoolClosed,
    PoolForked,
    StartError,
    WorkersUnavailable,
)
from runner.errors import ReadTimeout as JobReadTimeout
from runner.model.request import Request
from runner.wire.headers import check_headers
from runner.wire.messages import Header, JobContext, ResponseHead
from transport.errors import TargetEscapes, check_pool
from transport.problem_details import problem
from transport.route import Route, scheme_for_handlers, under_scheme

if TYPE_CHECKING:
    from runner.protocols import AnyJob, AnyPool

_PORTS: Final = {"http": 80, "https": 443}


class Transport(BaseAdapter):
    """A `requests` adapter that has a pool run each request.

    With a `route` (as `TransportFactory.transport_for` gives it) the path is rewritten to the provider's mount
    and a delegated API key id is asked for; without one, requests pass as they are. The pool stays its
    owner's: closing the session or the adapter does not close it.
    """

    def __init__(self, pool: AnyPool, route: Route | None = None) -> None:
        super().__init__()
        check_pool(pool)
        self._pool = pool
        self._route = route

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | Timeout | None = None,
        verify: bool | str = True,
        cert: object = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send a prepared request; the response comes as soon as its head is there.

        Raises ValueError for a timeout of another form, InvalidURL and InvalidHeader, MissingIdentity,
        ConnectTimeout where no worker came free in time, ReadTimeout, and ConnectionError for a pool that is
        closed or can't be started.
        A job that fails before its head gives a 500, 502 or 503 with an application/problem+json body.
        """
        # One function, though long: the order of its checks is that of requests' own adapter, which users rely on.
        connect, read = _timeouts(timeout)
        context = JobContext() if self._route is None else self._route.context()
        try:
            outgoing, authority = self._translate(request)
            try:
                job = self._pool.open(outgoing, context=context, lease_timeout=connect, read_timeout=read)
                head = job.head
                body: io.BytesIO | _JobBody = _JobBody(job, _pool_of(request), read)
            except (JobFailed, WorkersUnavailable) as error:
                head, content = problem(error, debug=self._pool.debug)
                body = io.BytesIO(b"" if outgoing.method == "HEAD" else content)
            try:
                if self._route is not None:
                    headers = self._route.restore_locations(head.headers, outgoing.scheme, authority)
                    head = ResponseHead(head.status, headers, head.phrase)
                own = urlsplit(request.url or "").scheme.lower()
                if own not in _PORTS:
                    head = ResponseHead(head.status, under_scheme(head.headers, own, authority), head.phrase)
                return self._respond(request, head, RawResponse(head, body, outgoing))
            except BaseException:
                body.close()
                raise
        except InvalidBody:
            raise  # a TypeError, as of http.client's
        except InvalidLength as error:
            raise RequestsConnectionError(ProtocolError(str(error), error), request=request) from error
        except InvalidRequest as error:
            raise InvalidURL(error, request=request) from error
        except LeaseTimeout as error:
            if self._pool.overload == "raise":
                reason = ConnectTimeoutError(f"Connection timed out. (connect timeout={connect}) {error}")
                raise ConnectTimeout(self._given_up(request, reason), request=request) from error
            head, content = problem(error, debug=self._pool.debug)
            content = b"" if outgoing.method == "HEAD" else content
            return self._respond(request, head, RawResponse(head, io.BytesIO(content), outgoing))
        except JobReadTimeout as error:
            raise ReadTimeout(_read_timeout(_pool_of(request), read, error), request=request) from error
        except JobClosed as error:
            if isinstance(error.__cause__, TimeoutError):
                late = _read_timeout(_pool_of(request), read, error)
                raise ReadTimeout(late, request=request) from error.__cause__
            aborted = ProtocolError(f"Connection aborted. {error}", error)
            raise RequestsConnectionError(aborted, request=request) from (error.__cause__ or error)
        except (PoolClosed, PoolForked, StartError) as error:
            refused = NewConnectionError(_pool_of(request), f"Failed to establish a new connection: {error}")  # type: ignore[arg-type]
            raise RequestsConnectionError(self._given_up(request, refused), request=request) from error

    def close(self) -> None:
        """Do nothing: the pool is its owner's to close."""

    @staticmethod
    def _given_up(request: requests.PreparedRequest, reason: Exception) -> MaxRetryError:
        """What urllib3 raises where a connection could not be had."""
        return MaxRetryError(_pool_of(request), _target(request.url or ""), reason)  # type: ignore[arg-type]

    def _translate(self, request: requests.PreparedRequest) -> tuple[Request, str]:
        """The request as the pool takes it, and the authority of its URL."""
        url = request.url
        if not isinstance(url, str) or request.method is None:
            raise InvalidURL("the request has no method or no URL: prepare it first", request=request)
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidURL(error, request=request) from error
        scheme = scheme_for_handlers(parts.scheme.lower())
        if not host:
            raise InvalidURL(f"the URL {url!r} has no host", request=request)
        authority = parts.netloc.rpartition("@")[2]
        if port is not None and port == _PORTS.get(scheme):
            authority = authority.rpartition(":")[0]
        target = _target(requote_uri(url) if parts.scheme.lower() not in _PORTS else url)
        try:
            if self._route is not None:
                target = self._route.rewrite(target)
        except TargetEscapes as error:
            raise InvalidURL(error, request=request) from error
        headers = _headers(request, authority)
        body: Any = request.body
        return (
            Request(request.method, target, headers, body, scheme, (host, port or _PORTS.get(scheme, 80))),
            authority,
        )

    def _respond(self, request: requests.PreparedRequest, head: ResponseHead, raw: RawResponse) -> requests.Response:
        response = requests.Response()
        response.status_code = head.status
        response.headers = requests.structures.CaseInsensitiveDict(raw.headers)
        response.encoding = get_encoding_from_headers(response.headers)
        response.raw = raw
        response.reason = head.reason
        response.url = request.url or ""
        if "set-cookie" in raw.headers:
            extract_cookies_to_jar(response.cookies, request, raw)  # type: ignore[no-untyped-call]
        response.request = request
        response.connection = self  # type: ignore[assignment]
        return response


class RawResponse(HTTPResponse):
    """What `response.raw` is: a urllib3 response whose body comes over the pipe.

    `stream` gives each piece as it comes; its chunk size is an upper bound, never something to wait for.
    `served_target` is the target as the handler got it.
    """

    def __init__(self, head: ResponseHead, body: io.BytesIO | _JobBody, request: Request) -> None:
        headers = HTTPHeaderDict()
        for name, value in head.headers:
            headers.add(name, value)
        super().__init__(
            body=body,
            headers=headers,
            status=head.status,
            version=11,
            version_string="HTTP/1.1",
            reason=head.reason,
            preload_content=False,
            decode_content=False,
            original_response=_OriginalResponse(head.headers),  # type: ignore[arg-type]
            request_method=request.method,
            request_url=request.target,
            retries=Retry(0, read=False),
        )
        self.served_target = request.target
        # The job itself holds the body to its Content-Length, and its end is more than the last byte.
        self.length_remaining = None

    def __del__(self) -> None:
        body: object = self._fp
        if isinstance(body, _JobBody) and not body.settled:
            try:
                warnings.warn(
                    f"a response of {self.served_target} was dropped before its end: read it, or close it",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            finally:
                self.close()

    def stream(self, amt: int | None = 2**16, decode_content: bool | None = None) -> Generator[bytes]:
        """The body piece by piece as it comes, each at most `amt` bytes, decoded where that is asked for."""
        if amt == 0:
            return
        while data := self.read1(amt, decode_content):
            yield data


class _OriginalResponse:
    """What http.client's response is looked up for: the headers, for the cookie jar."""

    def __init__(self, headers: list[Header]) -> None:
        self._headers = headers
        self._message: http.client.HTTPMessage | None = None

    @property
    def msg(self) -> http.client.HTTPMessage:
        if self._message is None:
            self._message = http.client.HTTPMessage()
            for name, value in self._headers:
                self._message[name] = value
        return self._message

    def isclosed(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to do: the body is closed by itself."""


class _JobBody(io.RawIOBase):
    """A job's body as the binary file that urllib3 reads, with urllib3's errors."""

    def __init__(self, job: AnyJob, pool: str, timeout: float | None) -> None:
        self._job = job
        self._pool = pool
        self._timeout = timeout
        self._rest = b""

    @property
    def settled(self) -> bool:
        """Whether no worker is held any more."""
        return self._job.settled

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        """The next piece as it comes, at most `size` bytes; b"" at the end, which closes the file."""
        data = self._rest or self._next()
        if 0 <= size < len(data):
            self._rest = data[size:]
            return data[:size]
        self._rest = b""
        return data

    def read(self, size: int | None = -1, /) -> bytes:
        """Exactly `size` bytes where the body has them, all of it without."""
        if size is None or size < 0:
            pieces = []
            while piece := self.read1():
                pieces.append(piece)
            return b"".join(pieces)
        pieces = []
        while size and (piece := self.read1(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self) -> bytes:
        if self.closed:
            return b""
        try:
            data = self._job.read()
        except JobReadTimeout as error:
            raise _read_timeout(self._pool, self._timeout, error) from error
        except InvalidBody:
            raise
        except BlastdoorError as error:
            raise ProtocolError(f"Connection broken: {error}", error) from error
        if not data:
            self.close()
        return data

    def close(self) -> None:
        """End the job, if it has not ended."""
        if not self.closed:
            super().close()
            self._job.close()


def _pool_of(request: requests.PreparedRequest) -> str:
    """What urllib3's errors begin with."""
    parts = urlsplit(request.url or "")
    scheme = scheme_for_handlers(parts.scheme.lower())
    kind = "HTTPSConnectionPool" if scheme == "https" else "HTTPConnectionPool"
    return f"{kind}(host={parts.hostname!r}, port={parts.port or _PORTS[scheme]})"


def _read_timeout(pool: str, timeout: float | None, error: BlastdoorError) -> ReadTimeoutError:
    """urllib3's error, with its words, which programs look for, and ours."""
    words = f"Read timed out. (read timeout={timeout}) {error}"
    return ReadTimeoutError(pool, None, words)  # type: ignore[arg-type]


def _timeouts(timeout: object) -> tuple[float | None, float | None]:
    """The waits for a worker and for progress, in seconds, from any form that requests takes."""
    if timeout is None:
        return None, None
    if isinstance(timeout, Timeout):
        resolved = timeout
    else:
        if isinstance(timeout, tuple):
            try:
                connect, read = timeout
            except ValueError:
                raise ValueError(
                    f"invalid timeout {timeout}: pass a (connect, read) pair, or one number for both"
                ) from None
        else:
            connect = read = timeout
        resolved = Timeout(connect=connect, read=read)
    running = resolved.clone()
    running.start_connect()  # a total counts from here
    connect, read = running.connect_timeout, running.read_timeout
    return (
        float(connect) if isinstance(connect, (int, float)) else None,
        float(read) if isinstance(read, (int, float)) else None,
    )


def _target(url: str) -> str:
    """Path and query of a URL, byte for byte: urlsplit would drop an empty query's mark."""
    rest = url.partition("#")[0].partition("://")[2]
    at = min((index for index in (rest.find("/"), rest.find("?")) if index >= 0), default=len(rest))
    target = rest[at:]
    return target if target.startswith("/") else "/" + target


def _headers(request: requests.PreparedRequest, authority: str) -> list[Header]:
    """The request's headers as http.client would send them: Host first, where the caller sets none."""
    headers: list[Header] = []
    has_host = False
    for name, value in request.headers.items():
        pair = _text(name), _text(value)
        has_host = has_host or pair[0].lower() == "host"
        headers.append(pair)
    if not has_host:
        headers.insert(0, ("Host", authority))
    try:
        check_headers(headers)
    except ValueError as error:
        raise InvalidHeader(error, request=request) from error
    return headers


def _text(value: str | bytes) -> str:
    """As text; of a subclass what it is, whatever its methods say."""
    return bytes.decode(value, "latin-1") if isinstance(value, bytes) else str.__str__(value)
