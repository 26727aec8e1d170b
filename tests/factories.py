"""Factories of apps, and a module with an app by a usual name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def create_app(name: str = "created by default", mark: list[str] | None = None) -> Callable[..., bytes]:
    def app(request: Any, response: Any) -> bytes:
        return (name + "".join(mark or [])).encode()

    return app


def bare_factory() -> Callable[..., bytes]:
    return create_app("bare")


class Makers:
    @staticmethod
    def nested() -> Callable[..., bytes]:
        return create_app("nested")


application = create_app("the application")


def echo_target(request: Any, response: Any) -> bytes:
    target: str = request.target
    return target.encode()
