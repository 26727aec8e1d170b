"""Reading requests from a connection's bytes: by httptools, with what it lets pass and RFC 9112 does not.

Of a head, of trailers or of chunks' sizes `MOST_HEAD` bytes may come that make nothing complete. Trailers are dropped:
they are no headers.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import abstractmethod
from typing import Any, Final

import httptools

from runner.wire.messages import Header

logger = logging.getLogger("blastdoor")

MOST_HEAD: Final = 64 * 1024
_LONG_HEAD: Final = f"the request's head is over {MOST_HEAD} bytes"
_HOST: Final = re.compile(r"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]*")
_METHOD: Final = re.compile(rb"(?:\r\n)*[!#$%&'*+\-.^_`|~0-9A-Za-z]+ ")


class NoRequest(Exception):
    """What has come is none; raised through the parser."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class RequestReader(asyncio.Protocol):
    """The part of a connection that reads. What it finds it gives to the methods that are abstract here.

    `_in_head` tells that a head is coming, `_progress` that the bytes of this turn have made something complete. Once
    it has `_ended` nothing is taken any more, though the parser may still be at it.
    """

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = self._progress = self._ended = False
        self._head_size = 0
        self._fruitless = 0
        self._upgrading = False
        self._replaying = False
        self._data = self._rest = b""

    # -- what is found -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _is_full(self) -> bool:
        """Whether no more requests are taken before others are answered."""

    @abstractmethod
    def _take_request(
        self, method: str, target: str, headers: list[Header], length: int | None, *, http_1_0: bool, keep_alive: bool
    ) -> None:
        """A head is there. `length` is the body's, 0 for none, None for chunks."""

    @abstractmethod
    def on_body(self, body: bytes) -> None:
        """A piece of a body."""

    @abstractmethod
    def _take_end(self) -> None:
        """The end of a request is there."""

    @abstractmethod
    def _refuse_input(self, refused: NoRequest) -> None:
        """What has come is no request, and nothing more is taken."""

    @abstractmethod
    def _is_last(self) -> bool:
        """Whether the request that has just come to its end is the last one, by its own word."""

    @abstractmethod
    def _ignore_input(self) -> None:
        """What follows the last request is for nobody (RFC 9112, 9.6)."""

    @abstractmethod
    def _give_up(self) -> None:
        """Taking a request has failed: it is in the log."""

    # -- reading -------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """Take what has come, of what completes nothing no more than there may be."""
        while data:
            self._progress = False
            self._data, self._rest = data, b""
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._decline_upgrade(upgrade)
            except httptools.HttpParserError as error:
                self._end_input(error)
                break
            self._fruitless = 0 if self._progress else self._fruitless + len(data)
            if self._fruitless > MOST_HEAD:
                self._refuse_input(NoRequest(431, f"over {MOST_HEAD} bytes of head, or of trailers"))
                break
            data = self._rest  # what follows an upgrade that is not made
        self._data = self._rest = b""

    # -- httptools -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._replaying or self._ended:
            return
        if self._is_full:
            raise NoRequest(400, "too many requests wait for their turn")
        self._url = b""
        self._headers = []
        self._in_head = True
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        if not self._replaying:
            self._url += url
            self._head_size += len(url)
            if self._head_size > MOST_HEAD:
                raise NoRequest(431, _LONG_HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer, which no handler may take for one."""
        if self._in_head and not self._ended:
            self._head_size += len(name) + len(value) + 4
            if self._head_size > MOST_HEAD:
                raise NoRequest(431, _LONG_HEAD)
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """A head is there."""
        if self._replaying or self._ended:
            return
        self._in_head = False
        self._progress = True
        parser = self._parser
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise NoRequest(505, f"HTTP/{version} is not spoken here (RFC 9112, 2.3)")
        http_1_0 = version == "1.0"
        headers, length = _checked(self._headers, http_1_0=http_1_0)
        self._upgrading = parser.should_upgrade()
        method = parser.get_method().decode("latin-1")
        url = self._url
        if not url.startswith((b"/", b"*")):
            url = _origin_form(url, method, headers)
        keep_alive = not http_1_0 and parser.should_keep_alive()
        self._take_request(method, url.decode("latin-1"), headers, length, http_1_0=http_1_0, keep_alive=keep_alive)

    def on_message_complete(self) -> None:
        """The end of a request is there."""
        if self._upgrading:
            return  # it is the end of its head, see `_decline_upgrade`
        self._progress = True
        self._take_end()

    # ------------------------------------------------------------------------------------------------

    def _decline_upgrade(self, upgrade: httptools.HttpParserUpgrade) -> None:
        """An upgrade that is asked for is not made: the message goes on as any other (RFC 9110, 7.8).

        The parser takes what follows such a head for another protocol's: a new one reads on, after a head that frames
        the same body, and asks for nothing.
        """
        self._rest = self._data[upgrade.args[0] :]
        framing = [pair for pair in self._headers if pair[0].lower() in (b"content-length", b"transfer-encoding")]
        version = self._parser.get_http_version().encode()
        head = b"POST / HTTP/%b\r\n%b\r\n" % (version, b"".join(b"%b: %b\r\n" % pair for pair in framing))
        self._upgrading = False
        self._parser = httptools.HttpRequestParser(self)
        self._replaying = True
        try:
            self._parser.feed_data(head)
        finally:
            self._replaying = False

    def _end_input(self, error: httptools.HttpParserError) -> None:
        """The parser goes no further."""
        cause = error.__context__
        if isinstance(cause, NoRequest):
            self._refuse_input(cause)
        elif isinstance(error, httptools.HttpParserCallbackError):
            logger.error("a connection is broken off: taking a request failed", exc_info=cause or error)
            self._give_up()
        elif not self._in_head and self._is_last():
            self._ignore_input()
        elif (
            isinstance(error, httptools.HttpParserInvalidMethodError)
            and not self._progress  # else it is further on in what has come, and nobody knows where
            and _METHOD.match(self._data)
        ):
            self._refuse_input(NoRequest(501, "the method is none that this server knows (RFC 9110, 9.1)"))
        else:
            self._refuse_input(NoRequest(400, "Invalid HTTP request received."))


def _checked(raw: list[tuple[bytes, bytes]], *, http_1_0: bool) -> tuple[list[Header], int | None]:
    """The headers, names in small letters, and the body's length, None for chunks. NoRequest for what the parser lets
    pass."""
    hosts = 0
    codings: list[str] = []
    length: int | None = 0
    headers: list[Header] = []
    for raw_name, raw_value in raw:
        name = raw_name.decode("latin-1").lower()
        value = raw_value.decode("latin-1").strip(" \t")  # RFC 9110, 5.5: the blanks are no part of it
        if name == "host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                raise NoRequest(400, "the Host header is no host (RFC 9112, 3.2)")
        elif name == "content-length":
            if not (value.isascii() and value.isdigit() and len(value) < 20):
                raise NoRequest(400, "a Content-Length is a number of bytes (RFC 9110, 8.6)")
            length = int(value)  # the parser has seen that it is the only one
        elif name == "transfer-encoding":
            codings.append(value)
        headers.append((name, value))
    if codings:
        length = None
        if ",".join(codings).strip(" \t").lower() != "chunked":
            raise NoRequest(501, "of transfer codings only chunked is known (RFC 9112, 6.1)")
    if hosts != 1 and (hosts or not http_1_0):
        raise NoRequest(400, f"a request has one Host header, not {hosts} (RFC 9112, 3.2)")
    return headers, length


def _origin_form(url: bytes, method: str, headers: list[Header]) -> bytes:
    """The target of one in absolute form. Its host takes the place of Host's (RFC 9112, 3.2.2)."""
    _, mark, rest = url.partition(b"://")
    if not mark:
        return url
    place = re.split(b"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(place) :]
    if not path.startswith(b"/"):  # no path: RFC 9112, 3.2.4, and RFC 9110, 4.2.3
        path = b"*" if method == "OPTIONS" and not path else b"/" + path
    authority = place.rpartition(b"@")[2].decode("latin-1")
    if not authority or _HOST.fullmatch(authority) is None:
        raise NoRequest(400, "the target names no host (RFC 9110, 4.2.1)")
    headers[:] = [("host", authority), *(pair for pair in headers if pair[0] != "host")]
    return path
