"""Attacks on the sandbox, from inside it: each fails, does no harm, and the next caller is served."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.waiting import wait_until

MODES = [
    pytest.param((user, profile), id=f"{user}-{profile}")
    for user in (["root", "user"] if os.geteuid() == 0 else ["user"])
    for profile in ("default", "strict")
]
REFUSED = ("not permitted", "not implemented", "Permission denied")


class Driver:
    """A process that is the host of a sandboxed pool, and the target of attacks."""

    def __init__(self, user: str, profile: str) -> None:
        command = [sys.executable, "-m", "tests.hostile.driver", user, profile]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._hear()

    def tell(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something; what it says of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def attack(
        self, name: str, arguments: dict[str, Any], pool: str = "plain", timeout: float | None = None
    ) -> dict[str, Any]:
        return self.tell("attack", name=name, arguments=arguments, pool=pool, timeout=timeout)

    def children(self) -> list[psutil.Process]:
        """All that it has started, but for its victim."""
        everything = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in everything if child.pid != self.facts["victim"]]

    def names(self) -> list[str]:
        """The names of all that it has started."""
        names = []
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(child.name())
        return names

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the host has died"
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture(scope="module")
def drivers() -> Iterator[Callable[[tuple[str, str]], Driver]]:
    """Starts the host for a user and a profile, once."""
    started: dict[tuple[str, str], Driver] = {}

    def driver(mode: tuple[str, str]) -> Driver:
        if mode not in started:
            started[mode] = Driver(*mode)
        return started[mode]

    yield driver
    for each in started.values():
        each.close()


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, drivers: Callable[[tuple[str, str]], Driver]) -> Driver:
    """The host of one mode, its pools open."""
    driver = drivers(request.param)
    for pool in ("plain", "processes", "network"):
        driver.attack("nothing", {}, pool)
    return driver


every_mode = pytest.mark.parametrize("host", MODES, indirect=True)


@dataclass(frozen=True)
class Attack:
    """What is tried: an attack, its arguments (those in braces are the host's facts), and how it may end."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ("answer",)
    pool: str = "plain"
    timeout: float | None = None
    refused: bool = False
    words: str = ""
    """What the fault says."""
    feigned: bool = False
    """The kernel calls it a success where nothing was achieved, as it does with kill(-1) that reaches nobody."""

    @property
    def id(self) -> str:
        words = "-".join(str(value).strip("{}/").replace("/", "_") for value in self.arguments.values())
        return f"{self.name}-{words}-{self.pool}"[:60]


def reading(path: str) -> list[Attack]:
    return [Attack(name, {"path": path}) for name in ("read", "symlink", "hard_link", "by_handle")]


def calls() -> Iterator[Attack]:
    """System calls that nobody needs, with arguments that would do where they were allowed."""
    if platform.machine() != "x86_64":
        return
    wanted: dict[int, list[int]] = {
        29: [0, 4096, 0o1600],  # shmget
        56: [0x10000000 | 17, 0, 0, 0, 0],  # clone into a user namespace
        64: [0, 1, 0o1600],  # semget
        68: [0, 0o1600],  # msgget
        101: [0, 0, 0, 0],  # ptrace, TRACEME
        103: [10, 0, 0],  # syslog
        135: [0xFFFFFFFF],  # personality
        153: [],  # vhangup
        154: [0, 0, 0],  # modify_ldt
        161: [0],  # chroot
        162: [],  # sync
        163: [0],  # acct
        165: [0, 0, 0, 0, 0],  # mount
        169: [0, 0, 0, 0],  # reboot
        170: [0, 0],  # sethostname
        175: [0, 0, 0],  # init_module
        206: [8, 0],  # io_setup
        203: [0, 8, 0],  # sched_setaffinity
        240: [0, 0, 0, 0],  # mq_open
        246: [0, 0, 0, 0],  # kexec_load
        250: [0, -3, 0],  # keyctl, GET_KEYRING_ID
        272: [0x10000000],  # unshare the user namespace
        276: [0, 1, 1, 0],  # tee
        278: [1, 0, 0, 0],  # vmsplice
        294: [0],  # inotify_init1
        298: [0, 0, -1, -1, 0],  # perf_event_open
        300: [0, 0],  # fanotify_init
        308: [0, 0],  # setns
        317: [1, 0, 0],  # seccomp
        321: [0, 0, 0],  # bpf
        323: [1],  # userfaultfd, user mode only
        425: [8, 0],  # io_uring_setup
        444: [0, 0, 1],  # landlock_create_ruleset
        600: [],  # not yet a call
        447: [0],  # memfd_secret
        452: [-100, 0, 0o777, 0],  # fchmodat2
    }
    for number, arguments in wanted.items():
        yield Attack("call", {"number": number, "arguments": arguments}, refused=True)
    yield Attack("call", {"number": 56, "arguments": [0x8000 | 17, 0, 0, 0, 0]}, pool="processes", refused=True)
    # The kernel reads an int from the lower half of a register: what stands in the upper half must not matter.
    high = 1 << 32
    for option, value in ((22, 2), (1, 0), (4, 1), (high | 4, 1), (36, 0), (high | 36, 0)):
        yield Attack("prctl", {"option": option, "value": value}, refused=True)


ATTACKS = [
    *reading("/etc/shadow"),
    *reading("{canary}"),
    Attack("read", {"path": "/proc/{host}/environ"}),
    Attack("read", {"path": "/proc/{host}/mem"}),
    Attack("read", {"path": "/proc/{host}/maps"}),
    Attack("read", {"path": "/proc/1/environ"}),
    Attack("read", {"path": "/proc/self/mem"}),
    Attack("list", {"path": "/"}),
    Attack("list", {"path": "/proc"}),
    Attack("list", {"path": "/tmp"}),
    Attack("list", {"path": "{directory}"}),
    Attack("list", {"path": "/proc/{host}/fd"}),
    Attack("environment", {"secret": "{secret}"}),
    Attack("own_environ", {"secret": "{secret}"}),
    Attack("watch", {"path": "{directory}"}),
    *(
        Attack(name, {"path": "{canary}"})
        for name in (
            *("write", "truncate", "unlink", "rename", "chmod", "fchmod", "chown", "utime", "setxattr", "lease"),
        )
    ),
    Attack("write", {"path": "{directory}/new"}),
    Attack("write", {"path": "/tmp/new"}),
    Attack("write", {"path": "/var/tmp/new"}),
    Attack("write", {"path": "/dev/shm/new"}),
    Attack("own_code"),
    Attack("lease", {"path": sys.executable}),
    Attack("chmod", {"path": os.path.abspath(__file__)}, refused=True),
    Attack("fchmod", {"path": os.path.abspath(__file__)}, refused=True),
    Attack("fill_one_file", {"size": "{scratch}"}),
    Attack("fill_many_files", {"size": "{scratch}"}),
    Attack("fill_many_files", {"size": "{scratch}", "each": 0}),
    Attack("ptrace", {"pid": "{host}"}),
    Attack("ptrace", {"pid": "{victim}"}),
    Attack("read_memory", {"pid": "{host}"}),
    Attack("pidfd", {"pid": "{host}"}),
    *(Attack("kill", {"pid": pid}, pool=pool) for pid in ("{host}", "{victim}") for pool in ("plain", "processes")),
    Attack("kill", {"pid": -1}),
    Attack("kill", {"pid": -1}, pool="processes", feigned=True),
    Attack("kill_group", {"pid": "{victim}"}),
    Attack("kill_group", {"pid": "{victim}"}, pool="processes"),
    Attack("tkill", {"pid": "{victim}"}),
    Attack("queue_signal", {"pid": "{victim}"}),
    Attack("prlimit", {"pid": "{host}"}),
    Attack("prlimit", {"pid": "{victim}"}),
    Attack("renice", {"pid": "{host}"}),
    Attack("renice", {"pid": "{victim}"}),
    Attack("renice_user", {"pid": 0}, refused=True),
    *(Attack("signal_by_file", {"pid": "{victim}", "command": number}, refused=True) for number in (8, 10, 15)),
    Attack("signal_by_ioctl", {"pid": "{victim}"}, refused=True),
    Attack("pipe_pages", refused=True),
    Attack("timers", {"most": 1000}),
    Attack("inode_flags", {"path": os.path.abspath(__file__)}, refused=True),
    Attack("affinity", {"pid": "{host}"}),
    Attack("scheduler", {"pid": "{victim}"}),
    Attack("fork", refused=True),
    Attack("clone3", refused=True),
    Attack("exec", refused=True),
    Attack("shell", refused=True),
    Attack("fork_bomb", {"most": "{threads}"}, ("answer", "memory"), pool="processes"),
    Attack("thread_bomb", {"most": "{threads}"}),
    Attack("thread_bomb", {"most": "{threads}"}, pool="processes"),
    Attack("tcp", {"port": "{tcp}"}),
    Attack("udp", {"port": "{udp}"}),
    Attack("tcp_any", {"port": "{tcp}"}),
    Attack("udp", {"port": "{udp}"}, pool="network"),
    Attack("tcp_any", {"port": "{tcp}"}, pool="network"),
    Attack("fast_open", {"port": "{tcp}"}, pool="network"),
    Attack("tcp", {"port": 9}, pool="network"),
    Attack("listen", refused=True),
    Attack("listen", pool="network", refused=True),
    *(
        Attack(name, {"path": path}, pool=pool)
        for name, path in (
            ("unix", "{unix}"),
            ("unix", "{abstract}"),
            ("datagram_pair", "{datagrams}"),
            ("reconnect_pair", "{unix}"),
        )
        for pool in ("plain", "network")
    ),
    *(
        Attack("family", {"family": family, "kind": kind}, pool=pool, refused=True)
        for family, kind in (
            (1, 1),
            (16, 3),
            (17, 3),
            (38, 5),
            (40, 1),
            (2, 3),
        )  # unix, netlink, packet, alg, vsock, raw
        for pool in ("plain", "network")
    ),
    Attack("heap", ends=("memory",)),
    Attack("shared_mapping", ends=("memory", "answer")),
    Attack("memfd", refused=True),
    Attack("descriptors", {"most": "{open_files}"}),
    Attack("raise_limits"),
    Attack("spin", ends=("timeout",), words="processor time"),
    Attack("spinning_children", ends=("timeout",), pool="processes", words="processor time"),
    Attack("hold_up", ends=("DeadlineExceeded", "JobClosed"), timeout=0.2),
    Attack("stubborn", ends=("DeadlineExceeded", "JobClosed"), timeout=0.2),
    Attack("held"),
    Attack("every_descriptor", ends=("protocol",)),
    Attack("half_frame", ends=("died",)),
    Attack("huge_frame", ends=("protocol",)),
    Attack("pickle", {"path": "{canary}"}, ends=("protocol",)),
    Attack("frame_flood", ends=("protocol",)),
    Attack("output_flood"),
    Attack("exit", ends=("died",)),
    Attack("segfault", ends=("died",)),
    Attack("abort", ends=("died",)),
    Attack("close_all", ends=("died", "protocol")),
    Attack("undumpable_no_more", refused=True),
    Attack("unfilter"),
    Attack("set_user", refused=True),
    Attack("root_by_id"),
    Attack("capabilities"),
    *calls(),
]


def fill_in(value: Any, facts: dict[str, Any]) -> Any:
    """An argument with the host's facts in the place of names in braces."""
    if not isinstance(value, str) or "{" not in value:
        return value
    return (
        facts[value[1:-1]] if value[0] == "{" and value[-1] == "}" and value.count("{") == 1 else value.format(**facts)
    )


@every_mode
@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.id for attack in ATTACKS])
def test_attack(host: Driver, attack: Attack) -> None:
    """S: it achieves nothing, the host is whole, and a benign request is answered."""
    arguments = {name: fill_in(value, host.facts) for name, value in attack.arguments.items()}
    found = host.attack(attack.name, arguments, attack.pool, attack.timeout)
    assert found["harm"] == []
    assert found["benign"] == "fine"
    assert found["outcome"] in attack.ends, found
    assert attack.words in found["body"], found
    if found["outcome"] == "answer":
        assert found["body"].startswith("denied") or found["body"] == "fine" or attack.feigned, found
        if attack.refused:
            assert any(words in found["body"] for words in REFUSED), found


@every_mode
def test_state_left_behind(host: Driver) -> None:
    """S: the next job in a warm worker finds what a module holds, which is documented; a strict one is never reused."""
    answers = [host.attack("leave_state", {})["body"] for _ in range(3)]
    pids = host.tell("workers", pool="plain")["workers"]
    assert len(pids) <= 2
    if "strict" in host.facts["profile"]:
        assert answers == ["fine"] * 3
    else:
        assert answers[-1].startswith("GOT what")


@every_mode
def test_what_goes_on_after_its_job(host: Driver) -> None:
    """S: a worker that computes without a job is replaced."""
    pids = host.tell("workers", pool="plain")["workers"]
    assert host.attack("leave_spinning", {})["body"] == "fine"
    wait_until(lambda: host.tell("workers", pool="plain")["workers"] != pids)
    assert host.attack("nothing", {})["body"] == "fine"


@every_mode
def test_what_a_handler_starts_ends_with_its_worker(host: Driver) -> None:
    """S, W11: a process that has left session and parent is gone with its worker, at the latest."""
    assert host.attack("daemon", {}, "processes")["body"] == "fine"
    if "strict" not in host.facts["profile"]:
        assert host.attack("exit", {}, "processes")["outcome"] == "died"
    wait_until(lambda: "harm-daemon" not in host.names())


@every_mode
def test_nothing_is_left_when_the_pools_close(host: Driver) -> None:
    """S, W11: no process of any namespace, and no scratch directory."""
    assert host.attack("nothing", {})["body"] == "fine"
    assert host.tell("close_pools")["scratch"] == []
    wait_until(lambda: host.children() == [])
