"""A pool's zygote as the host sees it: how it is started, told to fork, and heard.

The interpreter is started with `subprocess` and inherits the control socket and nothing else. Its program
reads the modules' path and the configuration from standard input, loads this package from where it lies, and then runs
its `zygote`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import msgspec

from ..control.import_isolation import BOOTSTRAP, HOME, NAMES, OTHER_NAME, taken_names
from ..control.zygote_messages import MAX_MESSAGE, News, Spawn, ZygoteConfig
from ..platform.descriptors import receive
from .channel import make_pipe
from .logs import LogPipe

_encode = msgspec.msgpack.Encoder().encode
_decode_news = msgspec.msgpack.Decoder(News).decode


class ZygoteClient:
    """A running zygote. `pidfd` and `control_fd` are to be watched; `close` frees all, once it has ended.

    `silent` is set once its end of the control socket is closed: there will be no more news.
    """

    def __init__(self, config: ZygoteConfig, env: Mapping[str, str] | None, code_fd: int = -1) -> None:
        """Start it. Raises OSError where the machine has no process or descriptor to spare."""
        apps = [*(config.sandbox.path if config.sandbox is not None else ()), *config.path]
        host = [entry for entry in sys.path if isinstance(entry, str)]  # as the import system does
        if config.by_name and os.getcwd() not in map(os.path.abspath, [*apps, *host]):
            host.append(os.getcwd())
            taken = taken_names([*apps, os.getcwd(), *host], len(apps) + 1)
        else:
            taken = taken_names([*apps, *host], len(apps)) if config.by_name else []
        path = [*apps, *(host if config.sandbox is None else map(os.path.abspath, host))]
        config = msgspec.structs.replace(config, path=path, taken=taken)
        # One function, though long: each thing that is opened is closed by the handler next to it.
        preamble = _preamble(path if config.sandbox is None else _trusted(host), config)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            out_read, out_write = make_pipe()
            try:
                err_read, err_write = make_pipe()
            except BaseException:
                os.close(out_read)
                os.close(out_write)
                raise
            self.log = LogPipe(out_read, err_read, "zygote")
            try:
                self._process = subprocess.Popen(
                    _program(theirs.fileno(), code_fd),
                    stdin=subprocess.PIPE,
                    stdout=out_write,
                    stderr=err_write,
                    pass_fds=(theirs.fileno(), code_fd) if code_fd >= 0 else (theirs.fileno(),),
                    start_new_session=True,
                    env=None if env is None else dict(env),
                )
            except BaseException:
                self.log.close()
                raise
            finally:
                os.close(out_write)
                os.close(err_write)
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.silent = False
        self.log.label = f"{config.label}{': ' if config.label else ''}zygote {self.pid}"
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._process.kill()
            self._process.communicate()
            self.log.close()
            self._control.close()
            raise
        self.control_fd = self._control.fileno()
        self._control.setblocking(False)
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(preamble)
        except BrokenPipeError:
            pass  # it has ended already, which its pidfd tells

    def spawn(self, number: int, fds: Sequence[int]) -> None:
        """Order a worker with these descriptors. Raises OSError where the zygote is gone or stuck."""
        socket.send_fds(self._control, [_encode(Spawn(number))], fds)

    def hear(self) -> tuple[News, int] | None:
        """The next news, and the pidfd that came with a birth (else -1); None where nothing more is there."""
        try:
            data, fds = receive(self._control, MAX_MESSAGE, 1)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data = b""
        if not data:
            self.silent = True
            return None
        return _decode_news(data), fds[0] if fds else -1

    def end(self) -> None:
        """Order it to end: it kills what it has started, and exits."""
        self._control.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """SIGKILL it; by their death signal the workers end with it."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> int:
        """Reap it and close all descriptors; its exit status, minus the signal that ended it."""
        status = self._process.wait()
        self.log.close()
        self._control.close()
        os.close(self.pidfd)
        return status

    def after_fork_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, and leave the process alone."""
        self._process.returncode = 0  # not ours to wait for
        self.log.after_fork_in_child()
        self._control.close()
        os.close(self.pidfd)


def _program(control_fd: int, code_fd: int) -> list[str]:
    """The command: this interpreter with this one's flags, told its control socket's descriptor and the snapshot's."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", BOOTSTRAP, str(control_fd), str(code_fd)]


def _trusted(path: list[str]) -> list[str]:
    """The entries of a `sys.path` that are not the app's: interpreter, packages, and what this package lies in."""
    ours = os.path.dirname(HOME)
    homes = [os.path.realpath(home) + os.sep for home in (sys.prefix, sys.base_prefix)]
    return [
        entry
        for entry in path
        if os.path.abspath(entry or ".") == ours or any(os.path.realpath(entry).startswith(home) for home in homes)
    ]


def _preamble(sys_path: list[str], config: ZygoteConfig) -> bytes:
    """What the bootstrap reads: how long the next is; our package's name and place, `sys.path`; the configuration."""
    name = OTHER_NAME if NAMES[0] in config.taken else NAMES[0]
    places = "\0".join([name, HOME, *sys_path]).encode("utf-8", "surrogateescape")
    return b"%d\n%b%b" % (len(places), places, _encode(config))
