"""The Dockerfile and the Compose file in docs/container/: all that can run without a container runtime."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from runner.model.limits import parse_size
from tests.serving import ROOT
from tests.waiting import wait_until
from transport.serving.settings import from_environment

FOLDER = ROOT / "docs" / "container"

KNOWN = {"FROM", "COPY", "RUN", "WORKDIR", "USER", "ENV", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """What the Dockerfile says, line continuations joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last(name: str) -> str:
    return [rest for known, rest in instructions() if known == name][-1]


def command() -> list[str]:
    found: list[str] = json.loads(last("CMD"))
    return found


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["shop"]
    return found


def option(name: str) -> str:
    return command()[command().index(name) + 1]


def test_the_dockerfile_is_one() -> None:
    """G10: its instructions are Docker's, its shell commands are a shell's, its extras are ours."""
    assert {name for name, _ in instructions()} == KNOWN
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    runs = [rest for name, rest in instructions() if name == "RUN"]
    for run in runs:
        assert subprocess.run(["sh", "-n", "-c", run], check=False).returncode == 0
    (asked,) = re.findall(r"\.whl\)\[(.*?)\]", " ".join(runs))
    assert set(asked.split(",")) <= set(extras)
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()}
    assert {"blastdoor-*.whl", "requirements.txt", "shop.py", "--from=build"} <= copied
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["shop"]
    assert "useradd" in runs[-1]
    assert users[0] in shlex.split(runs[-1])


def test_both_files_fit_together() -> None:
    """G10: ports, times and sizes of the one are those of the other."""
    service = compose()
    assert {port.rpartition(":")[2] for port in service["ports"]} == set(last("EXPOSE").split())
    assert option("--port") in last("EXPOSE").split()
    assert option("--admin").rpartition(":")[2] in last("EXPOSE").split()
    assert float(service["stop_grace_period"].removesuffix("s")) > float(option("--drain"))
    workers = int(option("--workers").partition(":")[2])
    assert parse_size(service["mem_limit"].replace("g", "GiB")) >= workers * parse_size(option("--memory"))
    assert service["pids_limit"] > 4 * workers
    assert from_environment(service["environment"]) == {"log_level": "info"}


def test_the_command_runs_as_pid_1(tmp_path: Path) -> None:
    """G10: what CMD says serves, the health check says so, and what STOPSIGNAL says ends it in its time."""
    (tmp_path / "shop.py").write_text("def app(request, response):\n    return b'shop'\n")
    free = {"--port": "0", "--admin": "127.0.0.1:0"}
    words = [free.get(before, word) for before, word in zip(["", *command()], command(), strict=False)]
    assert words[0] == "blastdoor"
    spaces = ["unshare", "--pid", "--fork", "--mount-proc", *(["--map-root-user"] if os.getuid() else [])]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict(word.split("=", 1) for word in last("ENV").split()[1:])}
    with subprocess.Popen(
        [*spaces, sys.executable, "-m", "transport.cli", *words[1:]],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    ) as container:
        assert container.stderr is not None
        try:
            told = iter(json.loads(line)["message"] for line in container.stderr)
            url = next(message for message in told if "serving" in message).split()[-1]
            admin = next(message for message in told if "status at" in message).split()[-1].removesuffix("/-/status")
            assert requests.get(url.replace("0.0.0.0", "127.0.0.1"), timeout=20).text == "shop"
            check: list[str] = json.loads(last("HEALTHCHECK").partition("CMD")[2])
            check = [sys.executable, *(word.replace("http://127.0.0.1:9180", admin) for word in check[1:])]
            wait_until(lambda: subprocess.run(check, check=False, capture_output=True).returncode == 0)
            (first,) = _children(container.pid)
            os.kill(first, getattr(signal, last("STOPSIGNAL")))
            assert container.wait(30) == 0
            assert subprocess.run(check, check=False, capture_output=True).returncode != 0
        finally:
            if container.poll() is None:
                container.kill()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml"])
def test_the_page_names_it(name: str) -> None:
    """G10: whoever runs containers finds it."""
    assert f"(container/{name})" in (ROOT / "docs" / "deployment.md").read_text()
