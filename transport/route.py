"""Where a provider's handler is mounted: rewriting paths on the way in, locations on the way back.

No I/O and no client here; every client's transport uses the same `Route`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import unquote

from runner.errors import ConfigurationError
from runner.wire.messages import Header, JobContext
from transport.errors import TargetEscapes
from transport.identity import current_attribution, current_key_id

DEFAULT_ROOT: Final = "/api/v2/aibridge"

_MAX_DECODINGS: Final = 8
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@-]*)*/?")
_FORBIDDEN = re.compile(r"[/\\%?#\s\x00-\x20\x7f-\xa0]")
# RFC 3986, 3: a scheme, if there is one, and an authority.
_AUTHORITY = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?//([^/?#]*)")
_SLASHES = re.compile(r"/[/\\\s]+")
_ROOT = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True, slots=True)
class Route:
    """The mount `<root>/<provider>` and the trusted context of the requests that go there.

    `source` says where they come from, for logs and metrics; nothing depends on it. ConfigurationError for a
    provider that is not one plain path segment, or a root that is not a path without a trailing slash.
    """

    provider: str
    source: str = ""
    root: str = DEFAULT_ROOT
    mount: str = ""

    def __post_init__(self) -> None:
        check_provider(self.provider)
        if not isinstance(self.source, str):
            raise ConfigurationError(f"source is a str, not {self.source!r}")
        if _ROOT.fullmatch(self.root) is None or any(part in (".", "..") for part in self.root.split("/")):
            raise ConfigurationError(
                f"root {self.root!r} is not a path such as {DEFAULT_ROOT!r}: it begins with '/', does not end with "
                f"one, and holds letters, digits and ._~- only"
            )
        object.__setattr__(self, "mount", f"{self.root}/{self.provider}")

    def context(self) -> JobContext:
        """The trusted context of a request that is made now. MissingIdentity without a delegated API key id."""
        return JobContext("", self.provider, self.source, current_key_id(), current_attribution())

    def rewrite(self, target: str) -> str:
        """The target under the mount: its path cleaned of doubled slashes and dot segments, the rest byte for byte.

        TargetEscapes where the path would climb out of the mount, as it stands or once it is decoded.
        """
        path, mark, query = target.partition("?")
        if _PLAIN_PATH.fullmatch(path) is None:
            _refuse_escape(path)
            path = _clean(path)
            _refuse_escape(path)  # what was a separator to the first look, a backslash, was none to the cleaning
        return f"{self.mount}{path}{mark}{query}"

    def restore_locations(self, headers: list[Header], scheme: str, authority: str, prefix: str = "") -> list[Header]:
        """The headers with each Location and Content-Location inside the mount mapped to the caller's URL space.

        That begins with `prefix`, a path, or is empty.
        """
        if not any(name.lower() in ("location", "content-location") for name, _ in headers):
            return headers
        return [
            (name, self._restore(value, scheme, authority, prefix))
            if name.lower() in ("location", "content-location")
            else (name, value)
            for name, value in headers
        ]

    def _restore(self, location: str, scheme: str, authority: str, prefix: str) -> str:
        start = ""
        if (own := _AUTHORITY.match(location)) is not None:
            if (own[1] or scheme).lower() != scheme or own[2].lower() != authority.lower():
                return location
            start = own[0]
        rest = location[len(start) :]
        if not rest.startswith(self.mount):
            return location
        rest = rest[len(self.mount) :]
        if rest and rest[0] not in "/?#":
            return location  # a neighbor whose name begins alike
        if (lead := _SLASHES.match(rest)) is not None:
            rest = "/" + rest[lead.end() :]  # browsers read "/\\host" and "/<tab>/host" as "//host", another host
        return start + prefix + (rest if rest.startswith("/") else "/" + rest)


def scheme_for_handlers(scheme: str) -> Literal["http", "https"]:
    """What a handler is told of the scheme of a URL: a transport may be mounted under any, such as `app://`.

    It is https for those that end in s, and http for all others.
    """
    return "https" if scheme.endswith("s") else "http"


def under_scheme(headers: list[Header], scheme: str, authority: str) -> list[Header]:
    """The headers with what a handler says of its own URL under the caller's own scheme, where that is another."""
    told = f"{scheme_for_handlers(scheme)}://{authority}"
    if scheme in ("http", "https"):
        return headers
    return [
        (name, f"{scheme}://{authority}{value[len(told) :]}")
        if name.lower() in ("location", "content-location")
        and value.startswith(told)
        and value[len(told) : len(told) + 1] in ("", "/", "?", "#")
        else (name, value)
        for name, value in headers
    ]


def check_provider(provider: object) -> None:
    """ConfigurationError for a provider name that is not one plain path segment."""
    if not isinstance(provider, str) or not provider:
        raise ConfigurationError(f"a provider is a name such as 'openai', not {provider!r}")
    if provider in (".", "..") or _FORBIDDEN.search(provider) or not provider.isprintable():
        raise ConfigurationError(
            f"provider {provider!r} is not a single path segment: it may not be '.' or '..' nor hold "
            f"/ \\ % ? #, blanks or control characters"
        )
    if not provider.isascii():
        raise ConfigurationError(f"provider {provider!r} holds characters beyond ASCII")


def _refuse_escape(path: str) -> None:
    decoded = path
    for _ in range(_MAX_DECODINGS):
        depth = 0
        for segment in re.split(r"[/\\]", decoded):
            if segment == "..":
                depth -= 1
            elif segment not in ("", "."):
                depth += 1
            if depth < 0:
                raise TargetEscapes(f"the path {path[:200]!r} climbs out of its provider's mount")
        further = unquote(decoded)
        if further == decoded:
            return
        decoded = further
    raise TargetEscapes(f"the path {path[:200]!r} is percent-encoded over and over: it is refused")


def _clean(path: str) -> str:
    """Resolve doubled slashes and dot segments (RFC 3986, 5.2.4); a dot may be written %2E (2.3)."""
    kept: list[str] = []
    segments = path.split("/")
    last = ""
    for segment in segments:
        last = re.sub("%2e", ".", segment, flags=re.IGNORECASE) if "%" in segment else segment
        if last == "..":
            if kept:
                kept.pop()
        elif last not in ("", "."):
            kept.append(segment)
    slash = "/" if last in ("", ".", "..") and kept else ""
    return "/" + "/".join(kept) + slash
