"""Where a server's records go, what they carry, and what is logged of a request."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving import ROOT, Process, Served
from tests.test_cli import blastdoor
from tests.waiting import wait_until
from transport.gateway.request_ids import RequestIds

QUIET = ("tests.handlers:app", "--port=0", "--admin=none")

CONFIG = """
[formatters.json]
"()" = "transport.serving.log_format.JSONFormatter"

[handlers.all]
class = "logging.FileHandler"
filename = "{directory}/all.log"
formatter = "json"

[handlers.access]
class = "logging.FileHandler"
filename = "{directory}/access.log"

[handlers.console]
class = "logging.StreamHandler"

[loggers."blastdoor.access"]
handlers = ["access"]
propagate = false

[root]
level = "INFO"
handlers = ["all", "console"]
"""


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_file_says_where_records_go(tmp_path: Path, fronts: int) -> None:
    """G10: dictConfig from TOML: our loggers, our formatter, files; in each of several fronts too."""
    file = tmp_path / "logging.toml"
    file.write_text(CONFIG.format(directory=tmp_path))
    options = f"--log-config={file}", f"--fronts={fronts}", f"--workers={fronts}"
    with Process(*QUIET, *options) as served:
        requests.get(f"{served.url}/hello", timeout=20)
        requests.get(f"{served.url}/die", timeout=20)
        wait_until(lambda: (tmp_path / "access.log").read_text().count("GET") == 2)
    records = [json.loads(line) for line in (tmp_path / "all.log").read_text().splitlines()]
    assert any("SIGSEGV" in record["message"] and record["job_id"] for record in records)
    assert {record["logger"] for record in records} >= {"blastdoor", "blastdoor.worker"}
    assert not any(record["logger"] == "blastdoor.access" for record in records)


def test_a_file_as_json(tmp_path: Path) -> None:
    """G10: the same as JSON, by a key of the configuration file."""
    tree: dict[str, Any] = {"root": {"level": "WARNING", "handlers": []}, "loggers": {"blastdoor": {"level": "INFO"}}}
    tree["handlers"] = {"own": {"class": "logging.FileHandler", "filename": str(tmp_path / "own.log")}}
    tree["handlers"]["console"] = {"class": "logging.StreamHandler"}
    tree["loggers"]["blastdoor"]["handlers"] = ["own", "console"]
    (tmp_path / "logging.json").write_text(json.dumps(tree))
    (tmp_path / "blastdoor.toml").write_text('app = "tests.handlers:app"\nlog_config = "logging.json"\nport = 0\n')
    with Process("--admin=none", cwd=tmp_path):
        pass
    assert "serving" in (tmp_path / "own.log").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "log_config"),
        ('[handlers.x]\nclass = "nosuch.Handler"\n', "No module named 'nosuch'"),
        ('[root]\nhandlers = ["nosuch"]\n', "nosuch"),
        ('[handlers.x]\nclass = "logging.FileHandler"\nfilename = "/nowhere/x"\n', "/nowhere/x"),
        (None, "No such file"),
    ],
)
def test_files_that_say_nothing(tmp_path: Path, text: str | None, words: str) -> None:
    """G11: one line that says what is wrong, and exit code 2."""
    file = tmp_path / "logging.toml"
    if text is not None:
        file.write_text(text)
    done = blastdoor("serve", *QUIET, f"--log-config={file}")
    assert (done.returncode, words in done.stderr.decode()) == (2, True), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_options_that_contradict(tmp_path: Path) -> None:
    """G11: what a file says all of is not said twice; there are no other fields."""
    for options, words in (
        (["--log-config=x.toml", "--log-format=json"], "leave out log_format"),
        (["--access-log-fields=client,nosuch"], "not 'nosuch'"),
        (["--access-log-fields=header:a b"], "not 'header:a b'"),
    ):
        done = blastdoor("serve", *QUIET, *options)
        assert (done.returncode, words in done.stderr.decode()) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_fields_of_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    """G10: those that were chosen, in their order, as a line and as attributes; what clients say ends no field."""
    caplog.set_level(logging.INFO, "blastdoor.access")
    fields = ["status", "header:user-agent", "target", "whole", "request_id", "header:x-not"]
    with Served(drain=0, admin="none", access_log_fields=fields, access_log_queries=False) as served:
        headers = {"user-agent": 'a "b" status=200\t', "x-request-id": "r 1"}
        requests.get(f"{served.url}/hello?secret=1", headers=headers, timeout=20)
        wait_until(lambda: "blastdoor.access" in {record.name for record in caplog.records})
    (record,) = [record for record in caplog.records if record.name == "blastdoor.access"]
    assert record.getMessage() == (
        'status=200 header:user-agent="a \\"b\\" status=200" target=/hello whole=true request_id="r 1" header:x-not=-'
    )
    assert vars(record)["header:user-agent"] == 'a "b" status=200'
    assert not hasattr(record, "client")


def test_the_request_s_id(log: pytest.LogCaptureFixture) -> None:
    """G10, L: each record of a job has it: what it prints, a traceback, a death, a limit; no other has."""
    with Served(drain=0, admin="none", workers=1, timeout=0.5, grace=0.1) as served:
        for target in ("die", "raise", "never_read"):
            requests.get(f"{served.url}/{target}", headers={"x-request-id": f"r-{target}\x85"}, timeout=20)
        requests.get(f"{served.url}/die", timeout=20)
        wait_until(lambda: sum("SIGSEGV" in record.getMessage() for record in log.records) == 2)
    known = [record for record in log.records if hasattr(record, "request_id") and record.name != "blastdoor.access"]
    for target, words in (("die", "SIGSEGV"), ("die", "last words"), ("raise", "boom"), ("never_read", "took longer")):
        (found,) = {record.job_id for record in known if record.request_id == f"r-{target}\\x85"}  # type: ignore[attr-defined]
        of_jobs = [record for record in log.records if record.name != "blastdoor.access"]
        about = [record for record in of_jobs if getattr(record, "job_id", "") == found]
        assert any(words in record.getMessage() for record in about), target
        assert {getattr(record, "request_id", "") for record in about} == {f"r-{target}\\x85"}, target
    assert any("SIGSEGV" in record.getMessage() and not hasattr(record, "request_id") for record in log.records)


def test_ids_are_bounded() -> None:
    """G10: of jobs that have ended a thousand are remembered, and one that goes on is not forgotten."""
    ids = RequestIds()
    ids.begin("long", "r-long" + "x" * 1000)
    for number in range(5000):
        ids.begin(f"j{number}", "r")
        ids.end(f"j{number}")
    assert len(ids._ids) == 1001
    record = logging.makeLogRecord({"job_id": "long"})
    assert ids.filter(record)
    assert len(record.request_id) == 200  # type: ignore[attr-defined]


def test_text_tells_the_request() -> None:
    """G10: where records are text as well."""
    with Process(*QUIET, "--workers=1") as served:
        requests.get(f"{served.url}/raise", headers={"x-request-id": "r-7"}, timeout=20)
        assert "/: request r-7: job" in served.wait_for("the handler raised")


def test_jobs_without_an_id_yet() -> None:
    """G10: a cluster's job has its id later; records about nothing are nobody's."""
    ids = RequestIds()
    ids.begin("", "r-1")
    record = logging.makeLogRecord({})
    assert ids.filter(record)
    assert not hasattr(record, "request_id")


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_log_that_can_not_be_written_any_more(tmp_path: Path, fronts: int) -> None:
    """G9, G10: a handler that raises as the server stops does not keep it from its requests, nor from its end."""
    (tmp_path / "broken.py").write_text(
        "import logging\n"
        "class Handler(logging.Handler):\n"
        "    def emit(self, record):\n"
        "        if 'draining' in record.getMessage(): raise OSError('the disk is full')\n"
    )
    config = '{"handlers": {"b": {"class": "broken.Handler"}, "e": {"class": "logging.StreamHandler"}}, '
    config += '"root": {"level": "INFO", "handlers": ["e", "b"]}}'
    (tmp_path / "logging.json").write_text(config)
    options = f"--log-config={tmp_path / 'logging.json'}", f"--fronts={fronts}", f"--workers={fronts}"
    go = tmp_path / "go"
    with Process(*QUIET, *options, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}) as served:
        with requests.get(f"{served.url}/head_then_wait?go={go}", stream=True, timeout=30) as answer:
            served.process.terminate()
            wait_until(lambda: any("draining" in line for line in served.lines))
            go.touch()
            assert answer.text == "done"
        assert served.process.wait(30) == 0
