"""Find a handler and the way to call it. Runs in a worker, or in the zygote of a preloading pool.

A handler is an import string (`package.module:attribute`), perhaps of a factory, or a dill pickle of a callable. Its
kind is told from what it is: an ASGI app is or has a coroutine function of three arguments; a WSGI app takes
`environ, start_response`; a native handler takes `request, response`. Where two arguments have other names,
their annotations decide; where nothing does, the kind has to be given.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from ...control import nested_pools
from ...control.zygote_messages import ZygoteConfig
from ...errors import ErrorWithoutTraceback
from ...model.handler_spec import APPS, FACTORIES, FactoryArguments, parse_handler_spec
from ...wire.messages import HandlerKind
from .adapter import Adapter, AsyncAdapter

_REQUEST_NAMES = frozenset({"request", "req", "r", "rq"})
_ENVIRON_NAMES = frozenset({"environ", "env", "environment", "wsgi_environ"})
_START_NAMES = frozenset({"start_response", "start", "startresponse", "start_resp"})


class HandlerError(ErrorWithoutTraceback):
    """The handler can't be used: it is not there, is not callable, or is of another kind than was said."""


def load(config: ZygoteConfig) -> Adapter | AsyncAdapter:
    """Import or unpickle the handler and give the adapter that calls it."""
    with nested_pools.importing_handler():
        target = _target(config)
    name = repr(config.handler)
    kind = config.kind
    if not callable(target):
        raise HandlerError(f"handler {name} is a {type(target).__name__}, which can't be called")
    found = find_kind(target)
    if kind == "auto":
        if found is None:
            raise HandlerError(
                f"can't tell how to call handler {name}: its arguments are neither (request, response) nor "
                f"(environ, start_response), nor those of ASGI; say kind='native', 'wsgi' or 'asgi'"
            )
        kind = found
    elif found is not None and found != kind:
        raise HandlerError(f"handler {name} looks like a {found} handler, not the {kind} one that kind= says")
    if kind == "wsgi":
        from .wsgi import WSGIAdapter

        return WSGIAdapter(target, config.root_path, config.spool_uploads, threads=config.concurrency > 1)
    if kind == "asgi":
        from .asgi import ASGIAdapter

        return ASGIAdapter(target, config.root_path)
    if is_coroutine_function(target):
        from .async_native import AsyncNativeAdapter

        return AsyncNativeAdapter(target)
    from .native import NativeAdapter

    return NativeAdapter(target)


def _target(config: ZygoteConfig) -> object:
    if config.pickle is None:
        return import_handler(config.handler, factory=config.factory)
    import dill

    target = dill.loads(config.pickle)
    return _made_by(target, repr(config.handler), FactoryArguments([], {})) if config.factory else target


def is_coroutine_function(target: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, be it a function, a partial or an object with `__call__`."""
    while isinstance(target, functools.partial):
        target = target.func
    call = target if inspect.isroutine(target) else getattr(target, "__call__", target)  # noqa: B004
    return inspect.iscoroutinefunction(call)


def import_handler(text: str, *, factory: bool = False) -> object:
    """What an import string names, or what the factory that it names makes."""
    spec = parse_handler_spec(text)
    module_name = spec.module
    try:
        target: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise HandlerError(
                f"there is no module {error.name!r} for handler {text!r}: check the name, and that its directory "
                f"is on the host's sys.path or is its working directory"
            ) from error
        raise
    attributes = spec.attributes
    if not attributes:
        usual = FACTORIES if factory else APPS
        attributes = [name for name in usual if hasattr(target, name)][:1]
        if not attributes:
            raise HandlerError(
                f"module {module_name!r} has no {' and no '.join(usual)}: "
                f"name the handler, as in '{module_name}:handler'"
            )
    for name in attributes:
        try:
            target = getattr(target, name)
        except AttributeError:
            known = ", ".join(sorted(key for key in dir(target) if not key.startswith("_"))[:20])
            raise HandlerError(
                f"handler {text!r}: {module_name!r} has no {'.'.join(attributes)!r}; it has {known or 'nothing public'}"
            ) from None
    call = spec.call or (FactoryArguments([], {}) if factory else None)
    return target if call is None else _made_by(target, repr(text), call)


def _made_by(factory: object, name: str, call: FactoryArguments) -> object:
    """What a factory makes. HandlerError where it can't be called so; else it raises what the factory raises."""
    if not callable(factory):
        raise HandlerError(f"handler {name}: a {type(factory).__name__} is no factory, it can't be called")
    try:
        inspect.signature(factory).bind(*call.arguments, **call.keywords)
    except TypeError as error:
        raise HandlerError(f"handler {name}: the factory can't be called with these arguments: {error}") from None
    except ValueError:
        pass  # a builtin without a signature
    made: object = factory(*call.arguments, **call.keywords)
    if inspect.iscoroutine(made):
        made.close()
        raise HandlerError(f"handler {name}: a factory is a plain function, and this one is a coroutine function")
    return made


def find_kind(target: Callable[..., Any]) -> HandlerKind | None:
    """The kind that a callable shows, None where it shows none. Raises HandlerError for what fits no kind."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None  # a builtin without a signature
    positional = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = [parameter for parameter in positional if parameter.default is parameter.empty]
    is_async = is_coroutine_function(target) or is_coroutine_function(inspect.unwrap(target))
    if len(required) == 3 and (is_async or [p.name for p in required][1:] == ["receive", "send"]):
        return "asgi"
    try:
        signature.bind(None, None)
    except TypeError:
        if not positional:
            raise HandlerError(
                f"the handler takes the arguments {signature}: name the app, not a view of it; if it makes the app, "
                f"say so by parentheses ('shop:create_app()'), by factory=True, or by --factory"
            ) from None
        raise HandlerError(
            f"the handler takes the arguments {signature}, but a native handler is called with "
            f"(request, response), a WSGI app with (environ, start_response), an ASGI app with (scope, receive, send)"
        ) from None
    if len(positional) < 2:
        return None
    first, second = positional[:2]
    notes = f"{_text(first.annotation)} {_text(second.annotation)}"
    if "WSGIEnvironment" in notes or "StartResponse" in notes:
        return "wsgi"
    if "HandlerRequest" in notes or "HandlerResponse" in notes:
        return "native"
    names = first.name.lower().strip("_"), second.name.lower().strip("_")
    if names[0] in _ENVIRON_NAMES or names[1] in _START_NAMES:
        return "wsgi"
    if names[0] in _REQUEST_NAMES or names[1] in ("response", "resp", "res", "w", "writer"):
        return "native"
    return None


def _text(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))
