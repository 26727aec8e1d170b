"""Header names and values: what may stand in them, and a case-insensitive, multi-value view of them.

The same checks run on both sides: in the worker, so that a handler's slip is the handler's error,
and in the host, which takes no worker's word for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence

from .messages import Header

# RFC 9110, 5.6.2: a name is a token. 5.5: a value holds no CR, LF or NUL; other controls but tab are refused too.
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_TRIMMED_VALUE = re.compile(r"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_LENGTH = re.compile(r"[0-9]{1,18}")

_name_matches = _NAME.fullmatch
_value_matches = _VALUE.fullmatch
_trimmed_value_matches = _TRIMMED_VALUE.fullmatch


def is_token(text: str) -> bool:
    """Whether `text` is a token as RFC 9110, 5.6.2 has it (a method, a header's name)."""
    return _name_matches(text) is not None


def check_phrase(phrase: str | None) -> None:
    """Raise ValueError for a reason phrase that could not stand in an HTTP/1.1 message (RFC 9112, 4)."""
    if phrase and _value_matches(phrase) is None:
        raise ValueError(f"the reason phrase {phrase[:80]!r} holds a control character, or one beyond latin-1")


def check_headers(headers: Iterable[Header]) -> None:
    """Raise ValueError for the first header that could not stand in an HTTP/1.1 message."""
    for name, value in headers:
        if _name_matches(name) is None:
            raise ValueError(f"header name {name[:80]!r} is not a token (RFC 9110, 5.6.2)")
        if _value_matches(value) is None:
            raise ValueError(
                f"the value of header {name!r} holds a line break, another control character, or a "
                f"character beyond latin-1: {value[:80]!r}"
            )


def plain_headers(headers: Sequence[Header]) -> list[Header]:
    """The headers as they can stand in a message: checked, plain str, values without the blanks around them.

    RFC 9110, 5.5: blanks and tabs around a value are no part of it. TypeError for what is no pair of str, ValueError
    for what could not stand in an HTTP/1.1 message.
    """
    for name, value in headers:
        if (
            type(name) is not str
            or type(value) is not str
            or _name_matches(name) is None
            or _trimmed_value_matches(value) is None
        ):
            return _made_plain(headers)
    return headers if type(headers) is list else list(headers)


def _made_plain(headers: Iterable[Header]) -> list[Header]:
    made = []
    for name, value in headers:
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"header names and values must be str, not {name!r}: {value!r}")
        # Of a subclass what it is as text, whatever its methods say.
        made.append((str.__str__(name), str.__str__(value).strip(" \t")))
    check_headers(made)
    return made


def content_length(headers: Iterable[Header]) -> int | None:
    """The Content-Length that the headers announce, in bytes, or None. ValueError where it makes no sense."""
    length: str | None = None
    for name, value in headers:
        if len(name) == 14 and name.lower() == "content-length":
            value = value.strip()
            if _LENGTH.fullmatch(value) is None:
                raise ValueError(f"Content-Length {value[:40]!r} is not a number of bytes")
            if length is not None and int(length) != int(value):
                raise ValueError(f"two Content-Length headers that differ: {length} and {value}")
            length = value
    return None if length is None else int(length)


class Headers(MutableMapping[str, str]):
    """Headers by name, whatever the case; order and repeats are kept.

    `headers["x"]` joins repeats with ", " (RFC 9110, 5.3), `get_all` keeps them apart, setting an item
    replaces all of that name, `add` adds one more.
    """

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[Header] = ()) -> None:
        self._pairs: list[Header] = list(pairs)

    def __getitem__(self, name: str) -> str:
        values = self.get_all(name)
        if not values:
            raise KeyError(name)
        return ", ".join(values)

    def __setitem__(self, name: str, value: str) -> None:
        lowered = name.lower()
        self._pairs = [pair for pair in self._pairs if pair[0].lower() != lowered]
        self._pairs.append((name, value))

    def __delitem__(self, name: str) -> None:
        lowered = name.lower()
        kept = [pair for pair in self._pairs if pair[0].lower() != lowered]
        if len(kept) == len(self._pairs):
            raise KeyError(name)
        self._pairs = kept

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.lower() for name, _ in self._pairs))

    def __len__(self) -> int:
        return len({name.lower() for name, _ in self._pairs})

    def __repr__(self) -> str:
        return f"Headers({self._pairs!r})"

    def add(self, name: str, value: str) -> None:
        """Add one more header of this name."""
        self._pairs.append((name, value))

    def get_all(self, name: str) -> list[str]:
        """All values of this name in their order, empty where there is none."""
        lowered = name.lower()
        return [value for key, value in self._pairs if key.lower() == lowered]

    def pairs(self) -> list[Header]:
        """All headers as (name, value), in order, as they were given."""
        return list(self._pairs)
