"""Ways for ordinary HTTP client code to reach the handlers of a pool as if they were a remote server.

`transport.requests` has the `requests` adapter, `transport.httpx2` and `transport.httpx` have transports for those
clients, in threads and in tasks.
"""

import transport._import_runner  # noqa: F401 - first: it finds the `runner` that belongs here
from runner.errors import BlastdoorError
from runner.model.cancel_scope import CancelScope
from transport.errors import MissingIdentity, TargetEscapes, UnknownProvider
from transport.factory import TransportFactory
from transport.identity import attribution, delegated_api_key_id
from transport.route import Route

__all__ = [
    "BlastdoorError",
    "CancelScope",
    "MissingIdentity",
    "Route",
    "TargetEscapes",
    "TransportFactory",
    "UnknownProvider",
    "attribution",
    "delegated_api_key_id",
]
