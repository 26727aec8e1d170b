"""The same pool on many machines: `ClusterPool` on a Ray cluster. Needs the extra `cluster` (blastdoor[cluster]).

Importing `runner` never imports this package, and so never Ray.
"""

from __future__ import annotations

from ..extras import missing

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError(missing("runner.cluster", "ray", "cluster")) from error

from .pool import ClusterPool
from .tls import ClusterTLS

__all__ = ["ClusterPool", "ClusterTLS"]
