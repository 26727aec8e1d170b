"""The documentation: its site builds, and every code block of the README and of docs/ is run, or checked.

Python blocks run as they stand, against real workers; one with a title is a file, which the blocks below it use. What a
comment `# -> text` behind a print says is what it prints. Sessions of a shell run with real servers; commands alone are
parsed by the command's own parser. `CHECKED` and `NOT_RUN` name what can't be run, and why.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import typer

from scripts import documentation
from tests.documented import PAGES, ROOT, Block, blocks, blocks_of, commands
from tests.serving import Process
from transport.cli.commands import app
from transport.gateway import Gateway
from transport.serving.settings import load_settings
from transport.serving.settings_parsing import parse_mounts

COMMAND: Final[Any] = typer.main.get_command(app)

CHECKED: Final = {
    "text": "pictures and outputs of measurements: there is nothing to run",
    "mermaid": "diagrams, which a browser draws: that their kind is known is checked",
    "nginx": "there is no nginx where the tests run: that each directive ends is checked",
    "ini": "a unit's directives are checked by systemd-analyze, its command by the command's own parser",
    "json": "a document: it is parsed",
    "toml": "settings: they are loaded, and pools made of them",
}
"""What is not run of languages, and why."""

NOT_RUN: Final = {
    "ray": "it starts daemons on the machine; tests/test_cluster.py starts clusters",
    "export": "it sets variables for Ray, which tests/test_cluster.py sets: that they are the same is checked",
    "pip": "it changes the environment that the tests run in: that the extras exist is checked",
    "uvicorn": "tests/test_gateway.py has the gateway under it: that the app is there, and is a gateway, is checked",
    "scripts/demo": "CI runs it: that it is there is checked",
    "scripts/test": "it is what runs this test",
}
"""Commands that are not run, and why."""


_API: Final = ROOT / "docs" / "api.md"
_LISTED: Final = r"^::: (\S+)(?:\n    options:\n      members: \[(.*?)\])?"


def _listed(found: list[Block]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("block", found, ids=str)


# -- the site -----------------------------------------------------------------------------------------


def test_the_site_builds(tmp_path: Path) -> None:
    """G10: strictly: no dead link, no page outside of the navigation, no public name without a docstring."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        name = "" if page.stem == "index" else page.stem
        assert (tmp_path / "site" / name / "index.html").exists(), page
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name, members in re.findall(_LISTED, _API.read_text(), re.MULTILINE):
        assert all(f'id="{name}.{member}"' in api for member in members.split(", ") if member), name
        assert f'id="{name}"' in api
    assert 'class="mermaid"' in (tmp_path / "site" / "cancellation" / "index.html").read_text()


def test_gaps_of_the_api_page_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: a public name without a docstring, or a method without one, is named."""

    class Bare:
        """Documented, all but for its method."""

        def method(self) -> None: ...

    def bare() -> None: ...

    module = ModuleType("runner_gaps")
    Bare.method.__module__ = bare.__module__ = "runner_gaps"
    vars(module).update(Bare=Bare, bare=bare, __all__=["Bare", "bare"])
    monkeypatch.setitem(sys.modules, "runner_gaps", module)
    monkeypatch.setattr(documentation, "MODULES", ("runner_gaps",))
    names = list(documentation.public_names())
    assert names == ["runner_gaps.Bare", "runner_gaps.bare"]
    assert [gap for name in names for gap in documentation.undocumented(name)] == [
        "runner_gaps.Bare.method",
        "runner_gaps.bare",
    ]


def test_the_readme_is_short() -> None:
    """G10: it says what this is; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_every_block_has_a_way_to_be_checked() -> None:
    """G10: a block of another language needs a test here, or a reason in `CHECKED`."""
    known = {"python", "sh", "console", *CHECKED}
    assert {block.language for page in PAGES for block in blocks_of(page)} == known


# -- Python -------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, on the path as a script's is; the log's handlers are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    handlers, level = logging.root.handlers[:], logging.root.level
    yield tmp_path
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@_listed([block for block in blocks("python", titled=False) if not block.needs_cluster])
def test_python(block: Block, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T1, H1: an example runs as it stands, and prints what it says that it prints. Ray's are in `test_cluster`."""
    block.write_files(directory)
    if "Sandbox" in block.text:  # it makes the host undumpable, which is not to be undone
        directory.chmod(0o755)  # of root's workers each is a user of its own
        (directory / "example.py").write_text(block.text)
        command = [sys.executable, "-W", "error", "example.py"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr().out
    block.check_output(printed)


@_listed(blocks("python", titled=True))
def test_python_files(block: Block) -> None:
    """H1: a file can be compiled, and some block of its page, or a page that shares it, uses it."""
    compile(block.text, block.title, "exec")
    users = blocks_of(block.page) if block.page.name != "index.md" else [b for page in PAGES for b in blocks_of(page)]
    module = block.title.removesuffix(".py").removesuffix("/__init__")
    assert any(f"{module}:" in user.text or f" {block.title} " in user.text for user in users)


# -- commands -----------------------------------------------------------------------------------------


@_listed(blocks("console"))
def test_sessions(block: Block, directory: Path) -> None:
    """G1, G11: a session with a shell gives what it shows: servers are real, on ports of their own."""
    if shutil.which("curl") is None:
        pytest.skip("sessions use curl, which is not installed")
    block.write_files(directory)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        served: Process | None = None
        for command, output in commands(block):
            words = shlex.split(command)
            if words[:2] == ["blastdoor", "serve"]:
                assert words[-1] == "&"
                check_blastdoor(words[:-1], block)
                served = stack.enter_context(
                    Process(*words[2:-1], "--port=0", "--admin=127.0.0.1:0", cwd=directory)
                )  # what is given last counts
                continue
            if served is not None:
                command = command.replace("http://127.0.0.1:8000", served.url)
                command = command.replace("http://127.0.0.1:9180", served.admin)
            done = subprocess.run(
                ["bash", "-c", command], cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert _plain(done.stdout) == _plain(output), done.stderr


def _plain(text: str) -> str:
    """With one job id for all, and no blanks at its end."""
    return re.sub(r'"[0-9a-f]{8}-\d+"', '"id"', text).rstrip()


@_listed(blocks("sh"))
def test_commands(block: Block, directory: Path) -> None:
    """G11: a command is one that its own parser takes, with options that there are; or it is named in NOT_RUN."""
    block.write_files(directory)
    for command, _ in commands(block):
        words = shlex.split(command, comments=True)
        CHECKS[words[0]](words, block)


def check_blastdoor(words: list[str], block: Block) -> None:
    """The command takes it; of `serve` settings and pools are made."""
    context = COMMAND.commands[words[1]].make_context(words[1], words[2:])
    if words[1] == "serve":
        given = {name: value for name, value in context.params.items() if value not in (None, ())}
        given.pop("config", None)
        apps = given.pop("apps", [])
        _make_pools(load_settings(None, given | ({"mounts": parse_mounts(apps)} if apps else {})))
        for mount in apps:
            _find_app(mount.rpartition("=")[2], block)


def _find_app(name: str, block: Block) -> None:
    """An app that a command names is in a file of the page, by that name."""
    module, _, attribute = name.partition(":")
    (file,) = [file for file in block.files if file.title.removesuffix(".py") == module]
    attribute = re.split(r"\W", attribute)[0]
    assert not attribute or re.search(rf"^(def )?{attribute}\b", file.text, re.MULTILINE), name


def _make_pools(settings: Any) -> None:
    for path, mount in settings.all_mounts.items():
        mount.pool_with(path, settings.defaults)


def check_pip(words: list[str], block: Block) -> None:
    """Its extras are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install"
    named = re.findall(r"\[(.*?)\]", words[2])
    assert named
    assert set(named[0].split(",")) <= set(extras)


def check_uvicorn(words: list[str], block: Block) -> None:
    """The app that it serves is a gateway of the page's."""
    module, _, attribute = words[1].partition(":")
    (file,) = [file for file in block.files if file.title == f"{module}.py"]
    namespace: dict[str, Any] = {"__name__": module}
    exec(compile(file.text, file.title, "exec"), namespace)
    assert isinstance(namespace[attribute], Gateway)


def check_script(words: list[str], block: Block) -> None:
    """It is there, and can be run."""
    assert os.access(ROOT / words[0], os.X_OK)


def check_export(words: list[str], block: Block) -> None:
    """The tests of clusters set the same."""
    name, _, value = words[1].partition("=")
    assert f'"{name}": "{value}"' in (ROOT / "tests" / "test_cluster.py").read_text()


def check_ray(words: list[str], block: Block) -> None:
    """Only `ray start` is named."""
    assert words[1] == "start"


CHECKS: Final[dict[str, Callable[[list[str], Block], None]]] = {
    "blastdoor": check_blastdoor,
    "pip": check_pip,
    "uvicorn": check_uvicorn,
    "export": check_export,
    "ray": check_ray,
    "scripts/demo": check_script,
    "scripts/test": check_script,
}


def test_what_is_not_run_is_named() -> None:
    """G11: with a reason, and no more than that."""
    assert set(CHECKS) == {"blastdoor", *NOT_RUN}
    used = {shlex.split(command)[0] for block in blocks("sh") for command, _ in commands(block)}
    assert used == set(CHECKS)


# -- files --------------------------------------------------------------------------------------------


@_listed(blocks("toml"))
def test_settings_files(block: Block, directory: Path) -> None:
    """G10: a settings file is loaded, and pools are made of it; one for logging is taken by the command."""
    if block.title == "logging.toml":
        (directory / block.title).write_text(block.text.replace("/var/log/shop", str(directory)))
        options = "--log-config=logging.toml", "--port=0", "--admin=none"
        command = [sys.executable, "-m", "transport.cli", "serve", "nosuch:app", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stderr
        assert "there is no module 'nosuch'" in done.stderr
        assert (directory / "access.log").exists()
        return
    (directory / "blastdoor.toml").write_text(block.text)
    settings = load_settings(None, {})
    assert settings.all_mounts
    _make_pools(settings)


@_listed(blocks("ini"))
def test_units(block: Block, directory: Path) -> None:
    """G11: systemd knows each directive of a unit, and the command what it starts."""
    (command,) = re.findall(r"^ExecStart=(.*)$", block.text, re.MULTILINE)
    check_blastdoor(["blastdoor", *shlex.split(command)[1:]], block)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    unit = directory / block.title
    unit.write_text(re.sub(r"=/srv/\S+/blastdoor", f"={sys.executable}", block.text))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line and "DelegateSubgroup" not in line]
    assert complaints == []  # DelegateSubgroup is systemd 254's


@_listed(blocks("json", "nginx", "mermaid"))
def test_documents(block: Block) -> None:
    """G10: what can be read without a browser or a proxy is well formed."""
    if block.language == "json":
        assert json.loads(block.text)
    elif block.language == "mermaid":
        assert block.text.split()[0] in ("flowchart", "sequenceDiagram", "stateDiagram-v2")
    else:
        lines = [line.partition("#")[0].strip() for line in block.text.splitlines()]
        assert all(line.endswith((";", "{")) or line == "}" for line in lines if line)
        assert block.text.count("{") == block.text.count("}")
