"""The errors of the transport's own boundary; all else comes from `runner.errors` or is the client's."""

from __future__ import annotations

from runner.errors import BlastdoorError


class MissingIdentity(BlastdoorError):
    """No delegated API key id on the caller's context: wrap the call in `with delegated_api_key_id("..."):`."""


class UnknownProvider(BlastdoorError, LookupError):
    """The factory holds no pool for this provider."""


class TargetEscapes(BlastdoorError, ValueError):
    """The request's path would climb out of the provider's mount. Clients raise it as their invalid-URL error."""


def check_pool(pool: object) -> None:
    """TypeError for what a transport can't be made of."""
    if not hasattr(pool, "aopen"):
        raise TypeError(f"a transport is made of a pool, as in Transport(Pool('shop:app')), not of {pool!r}")
