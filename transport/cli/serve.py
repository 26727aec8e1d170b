"""`blastdoor serve`: settings from the file and the terminal, logs to stderr, and the service until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from runner.errors import ConfigurationError
from runner.extras import missing
from runner.model.recycle import Recycle
from runner.model.retry import Retry
from runner.platform import descriptors
from transport.serving.first_process import leave_pid_1

if TYPE_CHECKING:
    from transport.serving.addresses import Listeners
    from transport.serving.process_setup import Account


def serve_until_stopped(apps: list[str], config: str | None, given: dict[str, Any]) -> None:
    """Run it. ConfigurationError for what can't work, StartError where a handler can't be loaded."""
    leave_pid_1()
    try:
        from transport.serving.server import Service
    except ModuleNotFoundError as error:
        raise ConfigurationError(missing("serving", error.name or "a library", "serve")) from error
    from transport.fronts.shares import how_many
    from transport.serving.log_format import set_up_logging
    from transport.serving.loops import loop_factory
    from transport.serving.notifier import Notifier
    from transport.serving.process_setup import Account, EnvFile, PidFile, change_directory
    from transport.serving.settings import Settings, load_settings, passed_over
    from transport.serving.settings_parsing import parse_mounts

    if apps:
        given["mounts"] = parse_mounts(apps)
    if recycle := _recycle(given):
        given["recycle"] = recycle
    if (deaths := given.pop("retry", 0)) > 0:
        given["retry"] = Retry(deaths=deaths)
    if "per_provider" in given:
        given["per_provider"] = _limits(given["per_provider"])
    if "env" in given:
        given["env"] = _environment(given["env"])
    if "set_env" in given:
        given["set_env"] = _environment(given["set_env"])
    if "access_log_fields" in given:
        given["access_log_fields"] = given["access_log_fields"].split(",")
    if "log_config" in given and (other := {"log_format", "log_level"} & set(given)):
        raise ConfigurationError(f"log_config says all of logging: leave out {', '.join(sorted(other))}")
    before = dict(os.environ)
    here = os.getcwd()
    env_file = EnvFile()

    def read() -> Settings:
        settings = load_settings(config, given, before, here)
        for name in ("env_file", "log_config", "tls_cert", "tls_key"):
            if file := getattr(settings, name):
                setattr(settings, name, os.path.join(here, file))
        env_file.load(settings.env_file)
        return settings

    settings = read()
    pid_file = PidFile(settings.pid)
    change_directory(settings.chdir)
    set_up_logging(settings.log_level, settings.log_format, settings.log_config)
    for words in passed_over(before):
        logging.getLogger("blastdoor").warning("the environment: %s", words)
    settings.connections = _make_room(settings.connections)
    account = Account.of(settings.user, settings.group)
    notifier = Notifier(os.environ)
    service: Service | Fronts
    if (fronts := how_many(settings)) > 1:
        from transport.fronts.parent import Fronts

        service = Fronts(settings, fronts, read, notifier)
    else:
        service = Service(settings, read, notifier=notifier)
    try:
        with pid_file:
            if account is not None:
                _become(account, service.listeners)
            with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
                runner.run(service.run())
    except KeyboardInterrupt:
        pass  # before it had started: what it had begun is ended by now


def _become(account: Account, listeners: Listeners) -> None:
    try:
        listeners.give(account.uid, account.gid)
        for reference in logging._handlerList:  # type: ignore[attr-defined] # typeshed does not know it
            if isinstance(handler := reference(), logging.FileHandler) and handler.stream is not None:
                os.fchown(handler.stream.fileno(), account.uid, account.gid)
        account.take_on()
    except OSError as error:
        listeners.close()
        raise ConfigurationError(f"user: {error}") from error


def _make_room(connections: int) -> int:
    """Have the descriptors that connections need; gives how many of these the hard limit allows."""
    wanted = 2 * connections + _OTHERS
    room = descriptors.make_room(wanted, "connections")
    if room >= wanted:
        return connections
    fewer = max((room - min(_OTHERS, room // 2)) // 2, 1)
    logging.getLogger("blastdoor").warning(
        "%d descriptors are too few for %d connections: %d are taken at once; raise the limit (ulimit -n)",
        room,
        connections,
        fewer,
    )
    return fewer


_OTHERS: Final = 1024
"""Descriptors that are left for what is no connection."""

_RECYCLING: Final = {"max_requests": "after_jobs", "max_rss": "above_rss", "max_age": "after_seconds"}


def _recycle(given: dict[str, Any]) -> Recycle | None:
    """When workers are replaced, from the options that say so, which are taken out; None where there are none."""
    told = {name: given.pop(option) for option, name in _RECYCLING.items() if option in given}
    jitter = given.pop("max_requests_jitter", None)
    if jitter is not None:
        if "after_jobs" not in told:
            raise ConfigurationError("max_requests_jitter adds to max_requests: give that too")
        told["jitter"] = min(jitter / max(told["after_jobs"], 1), 1)
    return Recycle(**told) if told else None


def _limits(given: list[str]) -> dict[str, int]:
    limits = {}
    for entry in given:
        name, _, number = entry.rpartition("=")
        if not name or not number.isdecimal():
            raise ConfigurationError(f"per_provider has the form NAME=N, as in 'openai=8', not {entry!r}")
        limits[name] = int(number)
    return limits


def _environment(given: list[str]) -> dict[str, str]:
    env = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals and name not in os.environ:
            raise ConfigurationError(f"env: {name!r} is not set here: give its value too, as in {name}=...")
        env[name] = value if equals else os.environ[name]
    return env
