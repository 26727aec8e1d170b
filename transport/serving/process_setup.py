"""What `serve` takes on for itself before it serves: a directory, variables from a file, a pid file, a user."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

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
        self._fd = -1

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._write(self._path)
            except OSError as error:
                raise ConfigurationError(f"pid: {error}") from error
        return self

    def _write(self, path: Path) -> None:
        pid = 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int(path.read_text(encoding="ascii"))
        if pid and pid != os.getpid() and Path(f"/proc/{pid}").exists():
            raise ConfigurationError(
                f"pid: {str(path)!r} names process {pid}, which runs: it serves already, or remove the file"
            )
        new = path.with_name(f".{path.name}.{os.getpid()}")
        self._fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.write(self._fd, f"{os.getpid()}\n".encode())
        new.replace(path)  # whoever reads it reads all of it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None or self._fd < 0:
            return
        try:
            if int(self._path.read_text(encoding="ascii")) == os.getpid():
                self._path.unlink()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):  # in a directory of root's, say: at least it names nobody any more
                os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)
            self._fd = -1


class Account(msgspec.Struct, frozen=True):
    """Who a process is to be: a user and a group, by number; the user's name and home, where it has them."""

    uid: int
    gid: int
    name: str = ""
    home: str = "/"

    @classmethod
    def of(cls, user: str, group: str) -> Account | None:
        """By names or numbers; None where none is given, or this process is it already.

        ConfigurationError where there is none of the name, or only root could become it.
        """
        if not user and not group:
            return None
        found = _user(user) if user else cls(os.geteuid(), os.getegid())
        if group:
            found = msgspec.structs.replace(found, gid=_group(group))
        if (found.uid, found.gid) == (os.geteuid(), os.getegid()):
            return None
        if os.geteuid() != 0:
            option = "user" if found.uid != os.geteuid() else "group"
            raise ConfigurationError(f"{option}: only root can become another: start it as root, or leave {option} out")
        return found

    def take_on(self) -> None:
        """Be this user, in its groups alone, for good (credentials(7)).

        OSError where that can't be; ConfigurationError where this user can't read the interpreter or this package.
        """
        if self.name:
            os.initgroups(self.name, self.gid)
        else:
            os.setgroups([self.gid])
        os.setresgid(self.gid, self.gid, self.gid)
        if self.uid != os.geteuid():
            os.environ.update({"HOME": self.home, "USER": self.name, "LOGNAME": self.name})
            os.setresuid(self.uid, self.uid, self.uid)
        for place in (sys.executable, os.path.dirname(os.__file__), os.path.dirname(msgspec.__file__), __file__):
            if not os.access(place, os.R_OK):
                real = os.path.realpath(place)
                raise ConfigurationError(f"user: {self.name or self.uid} can't read {real}: install it elsewhere")


def _user(user: str) -> Account:
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        if user.isdecimal() and int(user) < _MOST_IDS:
            return Account(int(user), int(user))
        raise ConfigurationError(f"user: there is no user {user!r}") from None
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir)


def _group(group: str) -> int:
    if group.isdecimal() and int(group) < _MOST_IDS:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigurationError(f"group: there is no group {group!r}") from None


_MOST_IDS: Final = (1 << 32) - 1
"""Users and groups are numbered below this one, which means "none" (setresuid(2))."""
