"""A gateway as an ASGI server is given one: in a module."""

from runner import Pool
from transport.gateway import Gateway

gateway = Gateway(Pool("tests.handlers:app", workers=1))
