"""Transports by provider: what an application holds, and asks for a transport when it needs one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.errors import ConfigurationError
from transport.errors import UnknownProvider
from transport.route import DEFAULT_ROOT, Route, check_provider

if TYPE_CHECKING:
    from runner.protocols import AnyPool
    from transport.requests import Transport


class TransportFactory:
    """Makes transports that act for a provider and a source.

    `pool` serves all providers, or is a mapping with a pool for each; None says that none is registered yet,
    which `transport_for` then refuses. `root` is the path that the providers' mounts lie under.
    """

    def __init__(self, pool: AnyPool | Mapping[str, AnyPool] | None, root: str = DEFAULT_ROOT) -> None:
        if isinstance(pool, Mapping):
            for provider in pool:
                check_provider(provider)
        self._pool = pool
        self._root = root
        Route("check", root=root)

    def route_for(self, provider: str, source: str = "") -> Route:
        """The route to a provider's mount. ConfigurationError or UnknownProvider where there is none."""
        route = Route(provider, source, self._root)
        self.pool_for(provider)
        return route

    def pool_for(self, provider: str) -> AnyPool:
        """The pool that serves a provider."""
        check_provider(provider)
        if self._pool is None or self._pool == {}:
            raise ConfigurationError(
                "no pool is registered with this TransportFactory: give it a runner.Pool, or one per provider"
            )
        if not isinstance(self._pool, Mapping):
            return self._pool
        pool = self._pool.get(provider)
        if pool is None:
            known = ", ".join(sorted(self._pool))
            raise UnknownProvider(f"no pool for provider {provider!r}: this TransportFactory has {known}")
        return pool

    def transport_for(self, provider: str, source: str = "") -> Transport:
        """A `requests` adapter for a provider, to be mounted on a session. The same errors as `route_for`."""
        from transport.requests import Transport

        route = self.route_for(provider, source)
        return Transport(self.pool_for(provider), route)
