"""The worker's loop for handlers that are functions, one job after another in its main thread; and one job's run."""

from __future__ import annotations

from . import reaper
from .cancellation import Cancellation, Shield
from .exception_report import report_on
from .forks import is_fork, leave
from .handlers.adapter import Adapter
from .pipes import HostGone, IncomingRequest, OutgoingResponse, Pipes


def serve(pipes: Pipes, handler: Adapter, cancellation: Cancellation) -> None:
    """Run one job after another, until the host is gone."""
    try:
        while True:
            if reaper.possible:
                wait_and_reap(pipes)
            request = pipes.next_request()
            run_job(handler, request, OutgoingResponse(pipes, request.number), cancellation)
            request.skip()
    except HostGone:
        pass


def wait_and_reap(pipes: Pipes) -> None:
    """Wait for the next request, and reap what the handler's programs have left behind meanwhile."""
    reaper.reap()
    while reaper.possible and not pipes.wait(reaper.LOOK_SECONDS):
        reaper.reap()


def run_job(handler: Adapter, request: IncomingRequest, response: OutgoingResponse, cancellation: Shield) -> None:
    """Run one job to its end; whatever the handler raises becomes its fault."""
    try:
        try:
            cancellation.begin(request.number)
            handler(request, response)
            if is_fork():
                leave()
            if not response.ended:
                response.finish(200, [], [])
        finally:
            cancellation.end()
    except HostGone:
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt end the job, not the worker
        if is_fork():
            leave(error)
        report = report_on(error)
        response.fail(report, implied=(200, []) if report.kind == "aborted" else None)
