"""Whom a request acts for: values that the caller puts on its context, and that no header can set.

They are context variables (PEP 567): each thread and each task has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from transport.errors import MissingIdentity

_key_id: ContextVar[str] = ContextVar("delegated_api_key_id", default="")
_attribution: ContextVar[Mapping[str, str]] = ContextVar("attribution")


@contextmanager
def delegated_api_key_id(key_id: str) -> Iterator[None]:
    """Requests in this block act for the API key with this id (the id, never the key itself).

    MissingIdentity for an empty one, TypeError for what is no str.
    """
    if not isinstance(key_id, str):
        raise TypeError(f"a delegated API key id is a str, not {type(key_id).__name__}")
    if not key_id:
        raise MissingIdentity("the delegated API key id is empty: give the id of the key that is acted for")
    token = _key_id.set(key_id)
    try:
        yield
    finally:
        _key_id.reset(token)


@contextmanager
def attribution(**values: str) -> Iterator[None]:
    """Requests in this block carry these values for the handler's books, such as a workspace id.

    They add to those of an outer block. TypeError for a value that is no str.
    """
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"attribution {name!r} is a str, not {type(value).__name__}")
    token = _attribution.set({**_attribution.get({}), **values})
    try:
        yield
    finally:
        _attribution.reset(token)


def current_key_id() -> str:
    """The delegated API key id of the running context. MissingIdentity where there is none."""
    key_id = _key_id.get()
    if not key_id:
        raise MissingIdentity(
            "no delegated API key id on this context: make the call inside "
            "'with transport.delegated_api_key_id(\"...\"):', with the id of the key that it acts for"
        )
    return key_id


def current_attribution() -> dict[str, str]:
    """The attribution of the running context, empty where there is none."""
    return dict(_attribution.get({}))
