"""Settings as text, from options, variables and files: worker counts, sandboxes, addresses, mounts."""

from __future__ import annotations

from runner.errors import ConfigurationError
from runner.model.sandbox import Sandbox


def parse_workers(workers: int | str) -> int | tuple[int, int]:
    """A number of workers, or a text such as "4" or "2:16". ConfigurationError for another."""
    if isinstance(workers, int):
        return workers
    least, colon, most = workers.partition(":")
    try:
        return (int(least), int(most)) if colon else int(least)
    except ValueError:
        raise ConfigurationError(
            f"workers is a number, or the least and the most, as in '2:16', not {workers!r}"
        ) from None


def parse_sandbox(sandbox: str | Sandbox) -> Sandbox | None:
    """A sandbox by the name of its profile, or itself. ConfigurationError for another."""
    if sandbox == "none":
        return None
    if sandbox in ("default", "strict"):
        return Sandbox(profile="strict" if sandbox == "strict" else "default")
    if not isinstance(sandbox, Sandbox):
        raise ConfigurationError(f"sandbox is 'none', 'default' or 'strict', not {sandbox!r}")
    return sandbox


def parse_address(address: str) -> tuple[str, int]:
    """A host and a port, as in "127.0.0.1:9180" or "[::1]:9180". ConfigurationError for another."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigurationError(f"an address has the form HOST:PORT, as in '127.0.0.1:9180', not {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_bind(address: str) -> str | tuple[str, int]:
    """A path, of "unix:/run/shop.sock", or a host and a port, as `parse_address` has them; ":8000" is all of IPv4.

    ConfigurationError for another.
    """
    if address.startswith("unix:"):
        if not address.removeprefix("unix:"):
            raise ConfigurationError("bind takes a path, as in 'unix:/run/shop.sock', not 'unix:'")
        return address.removeprefix("unix:")
    try:
        return parse_address(f"0.0.0.0{address}" if address.startswith(":") else address)
    except ConfigurationError:
        raise ConfigurationError(
            f"bind takes HOST:PORT, as in '0.0.0.0:8000' or '[::1]:8000', or unix:PATH, not {address!r}"
        ) from None


def parse_mounts(apps: list[str]) -> dict[str, dict[str, str]]:
    """The mounts' tables of a command line: 'shop:app', '/openai=app1:app'. ConfigurationError for what is neither."""
    mounts: dict[str, dict[str, str]] = {}
    for app in apps:
        path, equals, spec = app.partition("=")
        if not equals or ":" in path:  # none, or one among a factory's arguments
            path, spec = "/", app
        if path in mounts:
            raise ConfigurationError(f"two apps for {path!r}: give each a path of its own, as in '/tools=tools:app'")
        mounts[path] = {"app": spec}
    return mounts
