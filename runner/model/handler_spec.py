"""A handler by name: `package.module:attribute`, a factory with its arguments, or a module alone. No import here."""

from __future__ import annotations

import ast
from typing import Any, Final

import msgspec

from ..errors import ConfigurationError

APPS: Final = ("app", "application")
"""What is looked for in a module that is named alone, in this order, as Flask's and Django's commands have it."""

FACTORIES: Final = ("create_app", "make_app")
"""The same where a factory is asked for."""


class FactoryArguments(msgspec.Struct, frozen=True):
    """The arguments that a factory is called with."""

    arguments: list[Any]
    keywords: dict[str, Any]


class HandlerSpec(msgspec.Struct, frozen=True):
    """What an import string says. `attributes` is empty for a module alone; `call` is None for what is no factory."""

    module: str
    attributes: list[str]
    call: FactoryArguments | None


def parse_handler_spec(text: str) -> HandlerSpec:
    """Read an import string. ConfigurationError for what is none."""
    module, colon, rest = text.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise _no_spec(text)
    if not colon:
        return HandlerSpec(module, [], None)
    try:
        found = ast.parse(rest, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _no_spec(text) from None
    call: FactoryArguments | None = None
    if isinstance(found, ast.Call):
        call = _factory_arguments(text, found)
        found = found.func
    attributes: list[str] = []
    while isinstance(found, ast.Attribute):
        attributes.insert(0, found.attr)
        found = found.value
    if not isinstance(found, ast.Name):
        raise _no_spec(text)
    return HandlerSpec(module, [found.id, *attributes], call)


def _factory_arguments(text: str, call: ast.Call) -> FactoryArguments:
    try:
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        keywords = {"**": None}
    if "**" in keywords:
        raise ConfigurationError(
            f"handler {text!r}: the arguments of a factory are literals, as in 'shop:create_app(\"test\", debug=True)'"
        )
    return FactoryArguments(arguments, keywords)


def _no_spec(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"handler {text!r} is not an import string: it has the form 'package.module:attribute', "
        f"'package.module:factory()', or 'package.module' where that has an app"
    )
