"""What `serve` takes on before it serves, and options that users of other servers know."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import requests

from runner import ConfigurationError, Pool
from tests.serving import Process
from tests.test_cli import blastdoor
from tests.waiting import wait_until
from transport.serving.process_setup import EnvFile, PidFile
from transport.serving.settings import load_settings

QUIET = ("--port=0", "--admin=none", "--workers=1")

SHOP = """
import os
def app(request, response):
    return f"{os.environ.get('GREETING')} {os.environ.get('OTHER')} {os.getcwd()} {os.getpid()}".encode()
"""


def get(served: Process) -> str:
    return requests.get(served.url, timeout=20).text


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with an app."""
    directory = tmp_path / "shop"
    directory.mkdir()
    (directory / "shop.py").write_text(SHOP)
    return directory


def test_an_app_in_another_directory(shop: Path, tmp_path: Path) -> None:
    """G10: --app-dir says where the app is, --chdir where all of it works."""
    with Process("shop:app", f"--app-dir={shop}", *QUIET, cwd=tmp_path) as served:
        assert get(served).split()[2] == str(tmp_path)
    with Process("shop:app", "--chdir=shop", *QUIET, cwd=tmp_path) as served:
        assert get(served).split()[2] == str(shop)


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_file_keeps_its_place(shop: Path, tmp_path: Path, fronts: int) -> None:
    """G10: the configuration file is looked for before, and again at a reload; apps are found from the new place."""
    (tmp_path / "blastdoor.toml").write_text('app = "shop:app"\nchdir = "shop"\nset_env = { GREETING = "one" }\n')
    options = "--port=0", "--admin=none", f"--workers={fronts}", f"--fronts={fronts}"
    with Process(*options, cwd=tmp_path) as served:
        assert get(served).split()[0] == "one"
        (tmp_path / "blastdoor.toml").write_text('app = "shop:app"\nchdir = "shop"\nset_env = { GREETING = "two" }\n')
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: get(served).split()[0] == "two", 30)


def test_variables_from_a_file(shop: Path) -> None:
    """G10: workers see them, what the environment has counts more, and a reload reads them again."""
    file = shop / "variables"
    file.write_text('# of the shop\nexport GREETING="hi"\nOTHER=from_file\n')
    with Process("shop:app", f"--env-file={file}", *QUIET, cwd=shop, env={"OTHER": "own"}) as served:
        assert get(served).split()[:2] == ["hi", "own"]
        file.write_text("GREETING=anew\n")
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: get(served).split()[0] == "anew", 30)


def test_what_a_file_has_set_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: a variable that is in the file no more is gone; one that has another value by now is somebody else's."""
    file = tmp_path / "variables"
    file.write_text("ONE_OF_OURS=1\nTWO_OF_OURS=2\n")
    env_file = EnvFile()
    env_file.load(str(file))
    assert os.environ["ONE_OF_OURS"] == "1"
    monkeypatch.setenv("TWO_OF_OURS", "changed")
    file.write_text("")
    env_file.load(str(file))
    assert "ONE_OF_OURS" not in os.environ
    assert os.environ["TWO_OF_OURS"] == "changed"


def test_a_pid_file(shop: Path, tmp_path: Path) -> None:
    """G10: it has the server's pid as long as it runs; another server does not take it over."""
    file = tmp_path / "run.pid"
    file.write_text("999999999\n")  # of one that died
    with Process("shop:app", f"--pid={file}", *QUIET, cwd=shop) as served:
        assert int(file.read_text()) == served.process.pid
        other = blastdoor("serve", "shop:app", f"--pid={file}", *QUIET, cwd=shop)
        assert other.returncode == 2
        assert b"names process %d, which runs" % served.process.pid in other.stderr
        assert int(file.read_text()) == served.process.pid
    assert not file.exists()


def test_somebody_else_s_pid_file(tmp_path: Path) -> None:
    """G10: one that was taken over is left alone."""
    file = tmp_path / "run.pid"
    with PidFile(str(file)):
        file.write_text("1\n")
    assert file.read_text() == "1\n"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--app-dir=nowhere", "app_dir: there is no directory"),
        ("--chdir=nowhere", "chdir: "),
        ("--env-file=nowhere", "env_file: "),
        ("--pid=nowhere/run.pid", "pid: "),
        ("--per-provider=openai", "per_provider has the form NAME=N"),
        ("--max-requests-jitter=3", "give that too"),
        ("--max-rss=much", "'much' is not a size"),
    ],
)
def test_what_can_not_work(shop: Path, option: str, words: str) -> None:
    """G10: one line that says what is wrong, and exit code 2."""
    done = blastdoor("serve", "shop:app", option, *QUIET, cwd=shop)
    assert done.returncode == 2
    assert words.encode() in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_recycling_by_options(shop: Path) -> None:
    """G10, W9: --max-requests and its kin replace workers."""
    with Process("shop:app", "--max-requests=2", "--max-requests-jitter=0", *QUIET, cwd=shop) as served:
        pids = [get(served).split()[3] for _ in range(6)]
        assert len(set(pids)) == 3
    with Process("shop:app", "--max-rss=1MiB", *QUIET, cwd=shop) as served:
        assert len({get(served).split()[3] for _ in range(3)}) == 3
    with Process("shop:app", "--max-age=0.01", *QUIET, cwd=shop) as served:
        assert len({get(served).split()[3] for _ in range(3)}) > 1


def test_limits_of_providers_by_options() -> None:
    """G10, W8: --per-provider, and a table of a file."""
    from transport.cli.serve import _limits

    assert _limits(["openai=8", "a=b=2"]) == {"openai": 8, "a=b": 2}
    settings = load_settings(None, {"mounts": {"/": {"app": "a:b"}}, "per_provider": {"openai": 8}})
    (mount,) = settings.all_mounts.values()
    pool = mount.pool_with("/", settings.defaults)
    assert isinstance(pool, Pool)
    assert pool._options.queueing.per_provider == {"openai": 8}
    with pytest.raises(ConfigurationError, match="1 or more"):
        mount.pool_with("/", {**settings.defaults, "per_provider": {"openai": 0}})
