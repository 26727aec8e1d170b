"""Handlers of which no kind, or the wrong one, can be told."""

from typing import Any


def one_argument(request: Any) -> None: ...


def unknown(this: Any, that: Any) -> None: ...


async def coroutine(request: Any) -> None: ...
