"""The layers put together: built once by the zygote, entered by each worker before the handler's code is imported."""

from __future__ import annotations

import errno
import importlib.machinery
import os
import resource
import signal
import site
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from typing import Final

import msgspec

from ..control.import_isolation import HOME
from ..errors import ErrorWithoutTraceback
from ..model.sandbox import Sandbox
from ..platform import linux
from . import cgroup, egress, import_finder, landlock, probe, seccomp
from .cgroup import Group
from .landlock import EXECUTE, READ, WRITE
from .mount_namespace import SCRATCH_PARENT, MountNamespace, first_closed

_UIDS_OF_A_POOL: Final = 512
_SIGNALS: Final = 256
"""Signals that may wait to be delivered, and timers: they count for the user."""

_LIBRARIES: Final = (
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
)
_PUBLIC: Final = (
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/proc/cpuinfo",
    "/sys/devices/system/cpu",
    "/usr/lib/ssl",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
)
_RESOLVER: Final = (
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/run/systemd/resolve",
)
_PROGRAMS: Final = ("/bin", "/usr/bin", "/usr/local/bin")


class SandboxError(ErrorWithoutTraceback):
    """The sandbox can't be what its profile says; the words name what is missing, and the way out."""


class WorkerResources(msgspec.Struct, frozen=True):
    """What is one worker's own: user, scratch directory, way into its control group; empty where it has none."""

    uid: int | None
    scratch: str
    group: str = ""


class SandboxSetup:
    """A profile on this machine. `lacking` are the layers that it has to do without."""

    def __init__(self, sandbox: Sandbox, handler: str, path: list[str], memory: int | None) -> None:
        """Build it, in the zygote; `path` is the worker's `sys.path`, `memory` its limit, in bytes.

        SandboxError where the profile asks for what the machine can't give.
        """
        self._sandbox = sandbox
        self._memory = memory
        self._group_parent = cgroup.delegated()
        self._groups: dict[int, Group] = {}
        self._dying: list[Group] = []
        layers = {layer.name: layer for layer in probe.probe_layers()}
        wanted = wanted_layers(sandbox, own_user=probe.OWN_USER in layers)
        app = _code_paths(handler, path)
        self.notes = [_note_of(handler, directory) for directory in app.folders if _others(handler, directory)]
        self._beside = app.beside
        self._rights = _rights(sandbox, handler, app)
        closed = [path for path in self._rights if first_closed(path)] if probe.OWN_USER in wanted else []
        if closed and layers[probe.SCRATCH].lacking:
            why = f"it could not read {closed[0]}, below a directory that is closed to others: install it elsewhere"
            layers[probe.OWN_USER] = msgspec.structs.replace(layers[probe.OWN_USER], lacking=why)
        if probe.NAMESPACES in wanted and layers[probe.NAMESPACES].lacking and sandbox.processes:
            wanted.append(probe.SIGNALS)  # without pids of its own, and with children to signal
        if probe.OWN_USER in wanted and layers[probe.OWN_USER].lacking:
            wanted += [name for name in wanted_layers(sandbox, own_user=False) if name not in wanted]
        missing = [layers[name] for name in wanted if layers[name].lacking]
        if missing and sandbox.require == "all":
            words = "\n".join(f"- {layer.what}: {layer.lacking}" for layer in missing)
            raise SandboxError(
                f"this machine can't give all of the sandbox's {sandbox.profile} profile:\n{words}\n"
                f"(`blastdoor doctor` shows all layers; Sandbox.{sandbox.profile}(require='available') goes without)"
            )
        self.lacking = [f"{layer.what}: {layer.lacking}" for layer in missing]
        has = {name for name in wanted if not layers[name].lacking}
        self._own_user = probe.OWN_USER in has
        if self._own_user and (place := _closed_to_others(app)):
            raise SandboxError(
                f"workers run as users of their own, to whom {place!r} is closed, where the handler's module lies: "
                f"open it (chmod -R o+rX), or run the pool as an ordinary user"
            )
        self._files = probe.FILES in has
        self._users = probe.USERS in has
        self.nested = probe.NAMESPACES in has
        self.network = bool(sandbox.connect)
        self.egress = bool(sandbox.connect_hosts)
        if self.egress and not self.nested:
            raise SandboxError(
                f"connect_hosts needs a network namespace for each worker: {layers[probe.NAMESPACES].lacking}"
            )
        self._filters: list[bytes] = []
        if probe.CALLS in has:
            deny = seccomp.deny_filter(
                processes=sandbox.processes,
                network=sandbox.has_network,
                own_user=self._own_user,
                own_pids=self.nested,
            )
            allow = [seccomp.allow_filter()] if sandbox.strictly else []
            self._filters = [seccomp.request_filter(), *allow, deny]  # after the last one no filter can be loaded
        # An ordinary user may make namespaces in the user namespace that comes with the mounts.
        staged = probe.SCRATCH in has or (closed and self._own_user) or (self.nested and os.geteuid() != 0)
        self._mounts = self._set_up_mounts() if staged else None
        linux.set_dumpable(dumpable=False)

    def _set_up_mounts(self) -> MountNamespace:
        here = os.getcwd()
        # One that is closed to others would close what is granted in it, were it kept as it is.
        kept = [] if self._own_user and not os.stat(here).st_mode & stat.S_IXOTH else [here]
        mounts = MountNamespace([*self._rights, *kept], other_users=self._own_user)
        try:
            os.chdir(here)  # into what is mounted there now
        except FileNotFoundError:
            os.chdir("/")
        return mounts

    def resources(self, number: int) -> WorkerResources:
        """Make what is a worker's own. In the zygote."""
        uid = None
        if self._own_user:
            uid = probe.FIRST_UID + os.getpid() * _UIDS_OF_A_POOL + number % _UIDS_OF_A_POOL
        size = self._sandbox.scratch_bytes
        scratch = ""
        if self._mounts is not None and size is not None:
            owner = (uid, uid) if uid is not None else (os.geteuid(), os.getegid())
            scratch = self._mounts.add_scratch(number, size, *owner)
        group = ""
        if self._group_parent:
            made = self._groups[number] = Group(self._group_parent, number, self._memory, self._sandbox.threads)
            group = made.entrance
        return WorkerResources(uid, scratch, group)

    def clear(self, number: int) -> None:
        """Remove what was a worker's own."""
        if number in self._groups:
            self._dying.append(self._groups.pop(number))
        self._dying = [group for group in self._dying if not group.remove()]
        if self._mounts is not None and self._sandbox.scratch is not None:
            self._mounts.remove_scratch(number)

    def enter(self, resources: WorkerResources, parent: int) -> None:
        """Shut this process, a worker, in for good. OSError or SandboxError where a layer does not hold."""
        os.umask(0o077)
        if resources.group:
            cgroup.enter(resources.group)
        if resources.uid is not None:
            probe.switch_user(resources.uid)
        if self._users:
            linux.unshare(linux.NEW_USERS)
        linux.drop_capabilities()
        linux.set_no_new_privs()
        linux.die_with_parent(signal.SIGKILL)  # a change of user has cleared it (prctl(2))
        if os.getppid() != parent:
            os._exit(1)
        linux.set_dumpable(dumpable=False)
        self._limit(resources)
        self._furnish(resources)
        import_finder.install(self._beside, [path for path in self._rights if path not in self._beside])
        if self._files:
            rights = dict(self._rights)
            if resources.scratch:
                rights[resources.scratch] = WRITE | (EXECUTE if self._sandbox.processes else 0)
            landlock.restrict(rights, (egress.PORT,) if self.egress else self._sandbox.connect)
        for compiled in self._filters:
            seccomp.load(compiled, os.getpid())
        self._probe(resources)

    def _limit(self, resources: WorkerResources) -> None:
        scratch = self._sandbox.scratch_bytes
        limits = {
            resource.RLIMIT_MEMLOCK: 1 << 20,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NICE: 0,
            resource.RLIMIT_RTPRIO: 0,
            resource.RLIMIT_SIGPENDING: _SIGNALS,
        }
        if self._users or resources.uid is not None:
            limits[resource.RLIMIT_NPROC] = self._sandbox.threads
        if scratch is not None and resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY:
            limits[resource.RLIMIT_FSIZE] = scratch
        for which, value in limits.items():
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))

    def _furnish(self, resources: WorkerResources) -> None:
        """Have the handler find its scratch directory, and its way out."""
        if self.egress:
            for name in ("HTTPS_PROXY", "https_proxy"):
                os.environ[name] = egress.URL
            for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
                os.environ.pop(name, None)
        place = resources.scratch or "/nonexistent"
        os.environ["HOME"] = place
        os.environ["TMPDIR"] = place
        tempfile.tempdir = None
        try:
            os.chdir(os.getcwd())
        except OSError:
            os.chdir(resources.scratch or "/")

    def _probe(self, resources: WorkerResources) -> None:
        """Try the sandbox from within: what does not hold here would not hold for the handler."""
        holes = []
        if linux.has_capabilities():
            holes.append("it has capabilities")
        if not linux.has_no_new_privs():
            holes.append("it could gain privileges")
        if linux.is_dumpable():
            holes.append("others may look into it")
        if resources.uid is not None and os.geteuid() == 0:
            holes.append("it is root")
        if self._files and _works(lambda: os.listdir("/")):
            holes.append("it can list /")
        if self._filters:
            if not linux.has_seccomp_filter():
                holes.append("its system calls are not filtered")
            if not self._sandbox.has_network and _works(lambda: socket.socket().close()):
                holes.append("it can make sockets")
            if self.egress and not _is_cut_off():
                holes.append("it has another way out than its proxy")
            if _works(lambda: linux.unshare(linux.NEW_USERS)):
                holes.append("it can make namespaces")
        if holes:
            raise SandboxError(f"the sandbox does not hold: {', '.join(holes)}; please report it")


def _is_cut_off() -> bool:
    """Whether there is no route to anywhere, by a port that may be connected to (192.0.2.1 is nobody's, RFC 5737)."""
    with socket.socket() as sock:
        sock.setblocking(False)
        return sock.connect_ex(("192.0.2.1", egress.PORT)) == errno.ENETUNREACH


def _works(step: Callable[[], object]) -> bool:
    try:
        step()
    except OSError:
        return False
    return True


def wanted_layers(sandbox: Sandbox, *, own_user: bool) -> list[str]:
    """The layers that a profile is made of."""
    wanted = [probe.FILES, probe.CALLS]
    if own_user:
        wanted.append(probe.OWN_USER)
    else:
        wanted.append(probe.USERS)  # threads are counted for a user, and this one is shared
    if sandbox.has_network:
        wanted.append(probe.PORTS)
    if sandbox.scratch is not None:
        wanted.append(probe.SCRATCH)
    if sandbox.strictly:
        wanted += [probe.USERS, probe.NAMESPACES]
    elif sandbox.processes or sandbox.connect_hosts:
        wanted.append(probe.NAMESPACES)  # so that none of its processes gets away, and no connection
    return list(dict.fromkeys(wanted))


def _rights(sandbox: Sandbox, handler: str, app: CodePaths) -> dict[str, int]:
    """What may be done below which path."""
    execute = EXECUTE if sandbox.processes else 0
    rights = {"/dev/null": WRITE}
    packages = [*site.getsitepackages(), os.path.dirname(os.path.dirname(os.__file__))]
    readable = [*_PUBLIC, sys.prefix, sys.base_prefix, *packages, HOME]
    readable += [*app.packages, *app.folders]
    if not handler:  # one by value: what it imports is not known
        readable += sandbox.path
    if sandbox.connect:
        readable += _RESOLVER
    for path in readable:
        rights[path] = READ
    for path in (*_LIBRARIES, sys.base_prefix, sys.prefix, *(_PROGRAMS if sandbox.processes else ())):
        rights[path] = READ | execute
    for path in sandbox.readable:
        rights[path] = READ | execute
    for path in sandbox.writable:
        rights[path] = WRITE
    return {path: right for path, right in rights.items() if os.path.exists(path)}


class CodePaths(msgspec.Struct, frozen=True):
    """Where the handler's code is: its package, or the folder of its single module; and what the package lies in.

    `packages` and `folders` are granted whole, of `beside` nothing is. `file` is the module's own.
    """

    packages: list[str] = []
    folders: list[str] = []
    beside: list[str] = []
    file: str = ""


def _code_paths(handler: str, path: list[str]) -> CodePaths:
    """Where the handler's module is found. SandboxError where that would grant far more than an app."""
    if not handler:
        return CodePaths()
    name = handler.partition(":")[0].partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(name, path)  # no finder that the app's code could have a say in
    if spec is None or (not spec.origin and not spec.submodule_search_locations):
        return CodePaths()  # importing it will tell
    home = os.path.expanduser("~")
    packages = [os.path.abspath(place) for place in spec.submodule_search_locations or []]
    folders = [] if packages else [os.path.dirname(os.path.abspath(spec.origin or ""))]
    if archives := [archive for place in (*packages, *folders) if (archive := _archive_of(place))]:
        return CodePaths(archives)  # a file (zipimport): all of it is the app's
    for directory in (*packages, *folders):
        if directory == SCRATCH_PARENT:
            raise SandboxError(
                f"the handler's module {name!r} lies in {directory!r} itself, which workers have anew: "
                f"put it in a directory of its own"
            )
        if directory in ("/", home) or home.startswith(directory + "/"):
            raise SandboxError(
                f"the handler's module {name!r} lies in {directory!r}, all of which it could read then: "
                f"put it in a directory of its own"
            )
    file = "" if spec.origin is None else os.path.abspath(spec.origin)
    return CodePaths(packages, folders, [os.path.dirname(package) for package in packages], file)


def _closed_to_others(app: CodePaths) -> str:
    """What of an app's code others may not read, by its mode (inode(7)); empty where there is nothing, or an ACL."""
    for place in (*app.packages, *app.folders, app.file):
        if place:
            mode = os.stat(place).st_mode
            needed = stat.S_IROTH | stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
            if mode & needed != needed and "system.posix_acl_access" not in _attributes(place):
                return place
    return ""


def _attributes(place: str) -> list[str]:
    try:
        return os.listxattr(place)
    except OSError:
        return []  # its file system has none


def _archive_of(place: str) -> str:
    """The file that a place lies in, where it is in an archive; empty for one in the file system."""
    while place and not os.path.exists(place):
        place = os.path.dirname(place)
    return place if os.path.isfile(place) else ""


def _others(handler: str, directory: str) -> list[str]:
    """What lies in a single module's folder beside it, hidden files first."""
    name = handler.partition(":")[0].partition(".")[0]
    try:
        found = os.listdir(directory)
    except OSError:
        return []
    return sorted(entry for entry in found if entry.partition(".")[0] != name and entry != "__pycache__")


def _note_of(handler: str, directory: str) -> str:
    others = _others(handler, directory)
    more = ", ..." if len(others) > 5 else ""
    return (
        f"the sandbox lets handler {handler!r} read all of {directory!r}, in which its module lies: also "
        f"{', '.join(others[:5])}{more}. Put it into a package, of which only that package is granted"
    )
