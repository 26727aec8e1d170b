"""runner.model.request and runner.wire.headers: what can be sent, and how a body is read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from runner import ConfigurationError, Headers, InvalidRequest, Pool, Request
from runner.model.request import INLINE, Upload
from runner.wire.frames import MAX_BODY


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "GE T"},
        {"method": ""},
        {"method": "GET\r\nX: 1"},
        {"target": ""},
        {"target": "x"},
        {"target": "http://host/x"},
        {"target": "/a b"},
        {"target": "/a\r\nX: 1"},
        {"target": "/a#fragment"},
        {"target": "/ä"},
        {"headers": [("a b", "c")]},
        {"headers": [("a", "b\r\nc: d")]},
        {"headers": [("a", "b\nc")]},
        {"headers": [("a", "\0")]},
        {"headers": [("a", "\u20ac")]},
        {"headers": [("a", 1)]},
        {"headers": {"a": "b"}},
    ],
)
def test_what_can_not_be_sent_is_refused_when_it_is_made(arguments: dict[str, Any]) -> None:
    """W2: a request that HTTP does not allow is refused before any worker is leased."""
    with pytest.raises(InvalidRequest):
        Request(**{"method": "GET", "target": "/", **arguments})


@pytest.mark.parametrize("target", ["/", "/a%2Fb/?", "/a?b=c%20d&&e", "*", '/a"b<c>|{}^`'])
def test_targets_stay_as_they_are(target: str) -> None:
    """T3: any origin-form target passes, byte for byte."""
    assert Request("OPTIONS", target).target == target


def test_an_asterisk_is_for_options() -> None:
    """T3: RFC 9112, 3.2.4."""
    with pytest.raises(InvalidRequest):
        Request("GET", "*")


def pieces(upload: Upload) -> list[bytes]:
    found = [upload.inline] if upload.inline else []
    while upload.lazy:
        found.append(bytes(upload.pull()))
    return [piece for piece in found if piece]


class Closing:
    """An iterator that knows whether it was closed."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = iter(parts)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.parts)

    def close(self) -> None:
        self.closed += 1


def test_small_bodies_are_there_at_once() -> None:
    """H6: none, bytes, text."""
    assert pieces(Upload(None)) == []
    assert Upload(b"bytes").inline == b"bytes"
    assert Upload("tëxt").inline == "tëxt".encode()
    assert not Upload(b"x" * INLINE).lazy


def test_large_bodies_are_cut_into_pieces() -> None:
    """H6: no piece is larger than what is sent at once, wherever it comes from."""
    data = bytes(range(256)) * 10_000
    for body in (data, bytearray(data), memoryview(data), io.BytesIO(data), iter([data]), [data[:5], b"", data[5:]]):
        upload = Upload(body)
        found = pieces(upload)
        assert b"".join(found) == data
        assert max(map(len, found)) <= MAX_BODY


def test_an_iterator_is_closed_at_its_end_and_when_it_is_left() -> None:
    """H6: a request body is always closed, once; a file stays open for its owner."""
    to_the_end = Closing(b"a", b"b")
    assert pieces(Upload(to_the_end)) == [b"a", b"b"]
    left = Closing(b"a", b"b")
    upload = Upload(left)
    upload.pull()
    upload.close()
    upload.close()
    assert (to_the_end.closed, left.closed) == (1, 1)
    file = io.BytesIO(b"abc")
    assert pieces(Upload(file)) == [b"abc"]
    assert not file.closed


def test_bodies_of_other_types_are_refused() -> None:
    """H6: at once where it can be known, else with the piece that is wrong."""
    with pytest.raises(InvalidRequest, match="int"):
        Upload(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="dict"):
        Upload(iter([{}])).pull()  # type: ignore[arg-type]


def test_headers_by_name() -> None:
    """H1: multi-value and case-insensitive, order and repeats kept."""
    headers = Headers([("A", "1"), ("b", "2"), ("a", "3")])
    assert headers["a"] == "1, 3"
    assert headers.get_all("A") == ["1", "3"]
    assert list(headers) == ["a", "b"]
    assert len(headers) == 2
    headers["A"] = "4"
    headers.add("B", "5")
    assert headers.pairs() == [("b", "2"), ("A", "4"), ("B", "5")]
    del headers["b"]
    assert "B" not in headers
    with pytest.raises(KeyError):
        headers["b"]
    with pytest.raises(KeyError):
        del headers["b"]


@pytest.mark.parametrize(
    ("handler", "settings", "words"),
    [
        ("no colon", {}, "package.module:attribute"),
        ("a:b:c", {}, "package.module:attribute"),
        ("", {}, "package.module:attribute"),
        ("os; import x:y", {}, "package.module:attribute"),
        (5, {}, "import string"),
        (None, {}, "import string"),
        ("a:b", {"kind": "cgi"}, "'native'"),
        ("a:b", {"kind": "cgi"}, "asgi"),
        ("a:b", {"stop_timeout": -1}, "stop_timeout"),
        ("a:b", {"workers": 0}, "1 or more"),
        ("a:b", {"workers": -1}, "1 or more"),
        ("a:b", {"workers": 1.5}, "1 or more"),
        ("a:b", {"workers": True}, "1 or more"),
        ("a:b", {"env": {"A": 1}}, "str to str"),
        ("a:b", {"root_path": "x"}, "begins with '/'"),
        ("a:b", {"grace": -1}, "grace"),
        ("a:b", {"drain": "5"}, "drain"),
        ("a:b", {"start_timeout": float("nan")}, "start_timeout"),
    ],
)
def test_a_pool_of_nonsense_is_refused_when_it_is_made(handler: Any, settings: dict[str, Any], words: str) -> None:
    """F8: settings that can't work are told at once, with what to do."""
    with pytest.raises(ConfigurationError, match=words):
        Pool(handler, **settings)


def test_a_callable_that_can_not_be_sent_by_value() -> None:
    """W2: the error names the way out, an import string."""
    import threading

    lock = threading.Lock()
    generator = (x for x in [lock])

    def handler(request: Any, response: Any) -> None:
        next(generator)

    with pytest.raises(ConfigurationError, match="import string"):
        Pool(handler)
