"""runner.supervision.logs: what handlers print, in the host's log."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import pytest

from runner import Pool, Request
from runner.supervision.channel import make_pipe
from runner.supervision.logs import BUDGET, LogPipe


def get(pool: Pool, target: str) -> bytes:
    with pool.open(Request("GET", target)) as job:
        return b"".join(job)


def test_prints_reach_the_log(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: line by line, with worker and job ids, control characters made harmless; the answer is whole."""
    pool = start(workers=1)
    (worker,) = pool._supervisor._workers.values()  # type: ignore[union-attr]
    with pool.open(Request("GET", "/print")) as job:
        assert b"".join(job) == b"printed"
    pool.close()
    lines = [record.message for record in log.records if record.name == "blastdoor.worker"]
    label = f"worker {worker.pid} job {job.job_id}: "
    assert label + "a line on stdout" in lines
    assert label + "a line on stderr \\x1b[31m" in lines
    assert label + "raw bytes \\xff" in lines


def test_a_flood_blocks_nothing(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: 50 MB on stderr neither corrupt nor block the job, and the log gets no more than its budget."""
    pool = start(workers=1)
    assert get(pool, "/flood?megabytes=50") == b"flooded"
    assert get(pool, "/hello") == b"hello"
    pool.close()
    lines = [record.message for record in log.records if record.name == "blastdoor.worker"]
    assert sum(map(len, lines)) < 4 * BUDGET
    assert any("bytes of output over the budget were dropped" in line for line in lines)


def test_last_words_after_a_flood(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9, F3: the stack of a crash is logged though the budget was used up."""
    pool = start(workers=1)
    assert get(pool, "/flood?megabytes=5") == b"flooded"
    with pytest.raises(Exception, match="SIGSEGV"):
        get(pool, "/die?how=segfault")
    assert "in do_die" in log.text


def test_lines_that_come_in_pieces(log: pytest.LogCaptureFixture) -> None:
    """W9: a line is logged once it is whole; the last one also without its end; an endless one in parts."""
    read, write = make_pipe()
    err_read, err_write = os.pipe()
    os.close(err_write)
    pipe = LogPipe(read, err_read, "worker 1")
    for data in (b"one ", b"line\ntwo\r\n\nthr", b"ee"):
        os.write(write, data)
        assert read not in pipe.read()
    os.write(write, b"x" * 20_000)
    pipe.read()
    os.close(write)
    assert read in pipe.read()
    pipe.job_id = "7"
    pipe.close()
    pipe.close()
    lines = [record.message.partition(": ")[2] for record in log.records]
    assert lines[:3] == ["one line", "two", ""]
    assert "".join(lines[3:]).startswith("threexxx")
    assert all(len(line) <= 20_005 for line in lines)


def test_two_floods_at_once(start: Callable[..., Pool]) -> None:
    """W9: nor does one worker's flood hold up another's job."""
    pool = start(workers=2)
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(get(pool, "/flood?megabytes=20"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"flooded", b"flooded"]


def test_each_line_has_its_own_job_s_id(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: 500 jobs one after the other on a worker: no line carries another's id."""
    pool = start(workers=1)
    for _ in range(500):
        get(pool, "/print_id")
    pool.close()
    lines = [record.message.split() for record in log.records if "printed in" in record.message]
    assert len(lines) == 500
    assert all(words[3].rstrip(":") == words[-1] for words in lines)


def test_a_flood_of_empty_lines(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: the budget is one of lines, too: half a million of them are a few thousand records."""
    pool = start(workers=1)
    assert get(pool, "/newlines") == b""
    pool.close()
    assert len(log.records) < 12_000


def test_logging_that_raises(start: Callable[..., Pool], log: pytest.LogCaptureFixture) -> None:
    """W9: an application's logging that fails does not take the supervisor with it."""

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("no logging today")

    for name in ("blastdoor", "blastdoor.worker"):
        logging.getLogger(name).addFilter(refuse)
    try:
        pool = start(workers=1)
        with pytest.raises(Exception, match=r"SIGKILL|no logging"):
            get(pool, "/die?how=SIGKILL")
        assert get(pool, "/hello") == b"hello"
        pool.close()
    finally:
        for name in ("blastdoor", "blastdoor.worker"):
            logging.getLogger(name).removeFilter(refuse)
