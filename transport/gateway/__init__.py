"""The gateway: plain HTTP in, pools behind.

gateway = Gateway(pool)                                     # any ASGI server can serve it
gateway = Gateway({"/openai": openai, "/tools": tools})     # several mounts, each with a pool of its own
"""

from transport.gateway.app import Gateway
from transport.gateway.finished import RequestFinished
from transport.gateway.mounts import Mount, TrustedHeaders

__all__ = ["RequestFinished", "Gateway", "Mount", "TrustedHeaders"]
