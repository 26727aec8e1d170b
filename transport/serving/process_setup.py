"""What `serve` takes on for itself before it serves: a directory, variables from a file, a pid file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from runner.errors import ConfigurationError
from runner.extras import missing


def change_directory(directory: str) -> None:
    """Work in this directory from now on, where one is named. ConfigurationError where that can't be."""
    if directory:
        try:
            os.chdir(directory)
        except OSError as error:
            raise ConfigurationError(f"chdir: {error}") from error


class EnvFile:
    """Variables of a file, for the workers that start from now on. What the environment has already counts more.

    `load` may be called again, with another file: what the last one has set is taken back.
    """

    def __init__(self) -> None:
        self._set: dict[str, str] = {}

    def load(self, file: str) -> None:
        """Set what this file says, in the form of python-dotenv. ConfigurationError where it can't be read."""
        found: dict[str, str] = {}
        if file:
            try:
                from dotenv import dotenv_values
            except ModuleNotFoundError as error:
                raise ConfigurationError(missing("env_file", "python-dotenv", "serve")) from error
            try:
                with Path(file).open(encoding="utf-8") as stream:
                    found = {name: value or "" for name, value in dotenv_values(stream=stream).items()}
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"env_file: {error}") from error
        for name, value in self._set.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self._set = {name: value for name, value in found.items() if name not in os.environ}
        os.environ.update(self._set)


class PidFile:
    """A file with this process's pid, as long as the block lasts. None is made for an empty path.

    ConfigurationError where a process of the pid in it lives, or where it can't be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute() if path else None

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._write(self._path)
            except OSError as error:
                raise ConfigurationError(f"pid: {error}") from error
        return self

    @staticmethod
    def _write(path: Path) -> None:
        pid = 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int(path.read_text(encoding="ascii"))
        if pid and pid != os.getpid() and Path(f"/proc/{pid}").exists():
            raise ConfigurationError(
                f"pid: {str(path)!r} names process {pid}, which runs: it serves already, or remove the file"
            )
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(f"{os.getpid()}\n", encoding="ascii")
        new.replace(path)  # whoever reads it reads all of it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):
                if int(self._path.read_text(encoding="ascii")) == os.getpid():
                    self._path.unlink()
