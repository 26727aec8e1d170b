"""What lies under a path of the gateway: a pool, and whom its requests act for.

Nothing that a client sends decides for whom a request acts: that comes from the configuration, or from headers that a
front has set which proves itself by a secret. Those headers never reach a handler, whoever has sent them.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from runner.errors import ConfigurationError
from runner.wire.headers import is_token
from runner.wire.messages import Header, JobContext

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.route import Route

_MOUNT: Final = re.compile(r"(/[A-Za-z0-9._~-]+)+")


class Unauthorized(Exception):
    """The request can't be told for whom it acts. The words may be shown to anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedHeaders:
    """Headers from which a mount learns whom a request acts for, where `secret` comes in `secret_header` with them.

    `key_id` and `source` name the headers of these values, empty for none; `attribution` maps names of values to
    headers. A wrong secret is refused with a 401. Without one the values of the mount count.
    """

    secret: str = field(repr=False)
    secret_header: str = "x-blastdoor-secret"
    key_id: str = "x-delegated-api-key-id"
    source: str = ""
    attribution: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.secret, str) or len(self.secret) < 16 or not self.secret.isascii():
            raise ConfigurationError("the secret of trusted headers has 16 ASCII characters or more")
        for name in self.names():
            if not isinstance(name, str) or not is_token(name):
                raise ConfigurationError(f"a trusted header's name is a token (RFC 9110, 5.1), not {name!r}")

    def names(self) -> set[str]:
        """All the headers that no handler sees, in small letters."""
        named = {self.secret_header, self.key_id, self.source, *self.attribution.values()} - {""}
        return {name.lower() if isinstance(name, str) else name for name in named}


class Mount:
    """A pool behind a path of the gateway.

    With a `route` requests are rewritten to its mount, as a `TransportFactory`'s transports do, and must act for
    somebody. Without one the handler sees the path as it came: give a web app's pool the mount's path as `root_path`.
    `key_id`, `source` and `attribution` are what the handlers are told, unless `trusted_headers` tell otherwise.
    """

    def __init__(
        self,
        pool: AnyPool,
        *,
        route: Route | None = None,
        key_id: str = "",
        source: str = "",
        attribution: Mapping[str, str] | None = None,
        trusted_headers: TrustedHeaders | None = None,
    ) -> None:
        self.pool = pool
        self.route = route
        self._trusted = trusted_headers
        self._dropped = trusted_headers.names() if trusted_headers is not None else set()
        for name, value in (("key_id", key_id), ("source", source), *(attribution or {}).items()):
            if not isinstance(value, str):
                raise ConfigurationError(f"a mount's {name} is a str, not {type(value).__name__}")
        source = source or (route.source if route is not None else "")
        provider = route.provider if route is not None else ""
        self._own = JobContext("", provider, source, key_id, dict(attribution or {}))
        if route is not None and not key_id and (trusted_headers is None or not trusted_headers.key_id):
            raise ConfigurationError(
                f"the requests of provider {provider!r} act for nobody: give the mount a key_id, "
                f"or trusted headers that tell it"
            )

    def admit(self, headers: list[Header]) -> tuple[list[Header], JobContext]:
        """The headers that the handler may see, and what is vouched for. Unauthorized where that can't be told."""
        context = self._own
        if self._trusted is not None:
            told = [(name.lower(), value) for name, value in headers if name.lower() in self._dropped]
            if told:
                headers = [header for header in headers if header[0].lower() not in self._dropped]
                context = self._told(self._trusted, told)
        if self.route is not None and not context.delegated_api_key_id:
            raise Unauthorized("the request does not tell for whom it acts")
        return headers, context

    def _told(self, trusted: TrustedHeaders, told: list[Header]) -> JobContext:
        own = self._own
        values = dict(told)
        secret = values.get(trusted.secret_header.lower())
        if secret is None:
            return own
        if len(values) < len(told):
            raise Unauthorized("a header that tells for whom the request acts came twice")
        if not hmac.compare_digest(secret.encode("latin-1"), trusted.secret.encode()):
            raise Unauthorized("the secret that goes with the trusted headers is wrong")
        attribution = {
            name: values[header.lower()] for name, header in trusted.attribution.items() if header.lower() in values
        }
        return JobContext(
            "",
            own.provider,
            values.get(trusted.source.lower(), own.source),
            values.get(trusted.key_id.lower(), own.delegated_api_key_id),
            {**own.attribution, **attribution},
        )


def plain_path(path: str) -> str:
    """A mount's path as a prefix of targets, empty for "/". ConfigurationError for what can't be one."""
    plain = "" if path == "/" else path
    if plain and (_MOUNT.fullmatch(plain) is None or {".", ".."} & set(plain.split("/"))):
        raise ConfigurationError(
            f"a mount is '/', or a path such as '/openai' without a trailing slash, of letters, digits "
            f"and ._~- only, not {path!r}"
        )
    return plain


class Mounts:
    """Which mount a path belongs to. ConfigurationError for paths that can't be mounts."""

    def __init__(self, mounts: Mapping[str, Mount]) -> None:
        if not mounts:
            raise ConfigurationError("a gateway needs a pool, or a mapping of paths to pools: the mapping is empty")
        self.by_path: dict[str, Mount] = {}
        for path, mount in mounts.items():
            plain = plain_path(path)
            if plain in self.by_path:
                raise ConfigurationError(f"two mounts for {path!r}")
            self.by_path[plain] = mount
        self._longest_first = sorted(self.by_path, key=len, reverse=True)

    def find(self, path: str) -> tuple[str, Mount] | None:
        """The mount that a raw path lies under, by whole segments, the longest first; and where it lies."""
        if path == "*":  # RFC 9110, 9.3.7
            return ("", self.by_path[""]) if "" in self.by_path else None
        for prefix in self._longest_first:
            if path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == "/"):
                return prefix, self.by_path[prefix]
        return None
