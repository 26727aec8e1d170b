"""One round trip seen from the host: what is sent, what came back, and how the worker is let go. It never waits.

`Job` and `AsyncJob` drive it: they wait for the pipes, and call it when there is something to do. Whoever waits for
the response serves the upload meanwhile, as the worker takes it; a response that comes first goes first, and
one that ends early stops the upload.

A job holds its lane until it settles, exactly once, in one of three ways:

- the response ended: the lane is given back;
- the job was left early, or has background work to do: the lane goes to the supervisor;
- the worker broke or died: the lane is discarded.

`gate` says who uses the channel, `sending` sends the body. What is left is one life cycle, which is longer than other
modules.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from ..errors import JobFailed, JobTimedOut, ReadTimeout, WorkerDied, WriteTimeout
from ..events import HEALTHY, JobAnswered, JobEnded, JobStarted, Outcome
from ..model.durations import min_timeout
from ..model.limits import over_wall_time
from ..supervision.abandoned_jobs import Remainder, log_background_failure
from ..wire.exchange import ResponseExchange
from ..wire.frames import Frame
from ..wire.messages import ResponseHead
from ..wire.printable import quoted
from .channel_guard import ChannelGuard
from .failures import over_limit, response_failure, worker_death
from .prepared import PreparedRequest, job_number
from .sending import Sending, waker

if TYPE_CHECKING:
    from ..supervision.job_protocol import JobProtocol
    from ..supervision.record import Lane
    from .supervisor_protocol import SupervisorProtocol

logger = logging.getLogger("blastdoor")

EXIT_LIMIT: Final = 5.0
"""Seconds to wait for the death of a worker whose stream has ended, and that was killed."""

TAIL_PATIENCE: Final = 0.005
"""Seconds that the end of a complete body is waited for: the worker is mostly about to be free."""

LAST_WORDS: Final = "; its last output:\n"
"""In the log, between how a worker has died in its job and what it had printed."""

NOTHING: Final[list[Frame]] = []
"""Instead of frames: there are none yet."""


class RequestNotTaken(Exception):
    """The worker was gone before it took a byte of the request: another worker may have it.

    `error` is what to raise where no other worker is tried; None where nothing was written at all.
    """

    def __init__(self, error: WorkerDied | None = None) -> None:
        super().__init__()
        self.error = error


class RoundTrip(Sending):
    """A request in a worker, and its response."""

    __slots__ = (
        "_context",
        "_exchange",
        "_expires",
        "_lane",
        "_outcome",
        "_read_timeout",
        "_retriable",
        "_scope",
        "_waited",
        "_wall_seconds",
        "_worker",
        "_write_timeout",
        "began",
        "head",
        "method",
        "target",
    )

    _exchange_type = ResponseExchange

    head: ResponseHead

    def __init__(
        self,
        lane: Lane,
        supervisor: SupervisorProtocol,
        request: PreparedRequest,
    ) -> None:
        self._settled = True  # until the last line: whoever leased the lane sees to it
        context = request.context
        wall_seconds = supervisor.limits.wall_seconds
        self.job_id = job_id = context.job_id
        self._context = context
        self.method, self.target = request.method, request.target
        sent_at = request.sent_at
        self.began = time.monotonic() if sent_at is None else sent_at
        self._outcome: Outcome = "left"
        self._scope = request.scope
        self._lane = lane
        self._worker = worker = lane.worker
        self._channel = lane.channel
        self._supervisor = supervisor
        self._upload = request.upload
        self._retriable = request if request.retries and not request.upload.lazy else None
        self._read_timeout, self._write_timeout = request.timeouts
        ChannelGuard.__init__(self)
        lane.jobs += 1
        self._number = job_number(lane.jobs)
        lane.name_job(job_id, self._number)
        self._expires = None if wall_seconds is None else self.began + wall_seconds
        self._wall_seconds = wall_seconds or 0.0
        self._exchange = self._exchange_type(self._number, request.method)
        if sent_at is None:
            self._channel.begin()
            self._uploading = False
        else:
            self._uploading = self._upload.lazy or not self._channel.flushed
        self._owes_end = self._upload.lazy
        reference: weakref.ref[JobProtocol] = weakref.ref(self)
        # From here on the job is the one that has to let the worker go. No signal is handled within this line.
        self._settled, lane.job = False, reference
        if self._upload.lazy:
            self._upload.on_ready(waker(self))
        self._waited = waited = self.began - request.asked_at
        if supervisor.events.subscribers:
            started = JobStarted(job_id, context.provider, context.source, worker.pid, waited)
            supervisor.events.emit(started, healthy=True)

    def __del__(self) -> None:
        if not getattr(self, "_settled", True) and not self._supervisor.in_forked_child:
            try:
                warnings.warn(
                    f"job {self.job_id} was dropped before its end: read it to the end, or close it",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            finally:
                self.close()

    @property
    def worker_pid(self) -> int | None:
        """The process that does the job."""
        return self._worker.pid

    @property
    def finished(self) -> bool:
        """Whether the response has ended well, and all of its body was read."""
        return self._settled and self._outcome == "ok" and not self._exchange.body

    def _answered(self, head: ResponseHead) -> None:
        """The head is there: hand it out, and tell of it where the body is still to come."""
        self.head = head
        events = self._supervisor.events
        if not self._settled and (events.subscribers or events.times):
            context, seconds = self._context, time.monotonic() - self.began
            for batch in events.times:
                batch.add((context.provider, "", seconds, 0.0))
            if events.subscribers:
                worker, status = self._worker.pid, head.status
                answered = JobAnswered(self.job_id, context.provider, context.source, worker, status, seconds)
                events.emit(answered, healthy=True)

    def _next_piece(self) -> bytes | None:
        """A piece of the body that is there, b"" at its end; None where it has to be waited for."""
        if self._closed_by is not None:
            raise self._closed()
        exchange = self._exchange
        if exchange.body:
            return exchange.body.popleft()
        if exchange.open:
            return None
        if self._outcome != "ok":
            self._check_end()
        return b""

    def over_time(self, detail: str) -> None:
        """End the job, which is over a time limit of the pool, with these words."""
        self.close(over_limit("timeout", detail, self.job_id))

    def _send_request(self, request: PreparedRequest) -> None:
        upload = self._upload
        channel = self._channel
        try:
            if request.sent_at is None:
                request.send(channel, self._number)
            elif channel.torn:
                # Whoever sent it was interrupted. What the worker has read of it, if anything, its end will show.
                self._supervisor.leases.kill(self._worker)
            request.sent_at = None
        except BrokenPipeError:
            self._leave_refused_lane()
            self._outcome = "not taken"
            self._discard()
            raise RequestNotTaken from None
        self._uploading = upload.lazy or not channel.flushed

    @property
    def _may_wait_long(self) -> bool:
        """Whether nothing limits the wait for the response, and nothing else is to be done meanwhile."""
        return not self._uploading and self._read_timeout is None and self._scope is None and self._expires is None

    def _patience(self) -> float | None:
        """How long to wait for the channel now, in seconds."""
        if self._worker.dead:
            return 0
        if self._exchange.complete and not self._uploading:
            return TAIL_PATIENCE
        timeout = self._write_timeout if self._wants_write else None if self._uploading else self._read_timeout
        if self._scope is not None:
            timeout = min_timeout(timeout, self._scope.deadline)
        if self._expires is not None:
            timeout = min_timeout(timeout, self._expires)
        return timeout

    def _on_ready(self, ready: tuple[bool, bool, bool], dead: bool) -> list[Frame] | None:
        """Do what the channel is ready for: (readable, writable, woken), none of them where the time is up.

        Gives the next frames, None at the end of the worker's stream, and NOTHING where there is more to wait for.
        """
        readable, writable, woken = ready
        if readable:
            frames = self._channel.receive()
            if frames is None or frames:
                return frames
        elif dead:
            return None  # what the handler has started may hold the pipe open: there is no other end
        elif writable:
            self._push_upload()
        elif not woken:
            self._time_is_up()
        return NOTHING

    def _time_is_up(self) -> None:
        if self._exchange.complete and not self._uploading:
            self._let_tail_go()
            return
        if self._expires is not None and time.monotonic() >= self._expires:
            raise over_limit("timeout", over_wall_time(self._wall_seconds), self.job_id)
        if self._scope is not None and self._scope.cancelled:
            return  # its time is up, and this job was closed by it
        if self._wants_write:
            if self._write_timeout is not None:
                raise WriteTimeout(
                    f"job {self.job_id} took nothing of its request body for {self._write_timeout} s and was ended: "
                    f"allow more time, or look at why its handler does not read"
                )
        elif self._read_timeout is not None and not self._uploading:
            raise ReadTimeout(
                f"job {self.job_id} made no progress for {self._read_timeout} s and was ended: "
                f"allow more time, or look at what its handler waits for"
            )

    def _receive(self, frames: list[Frame]) -> None:
        """Take the next frames of the response."""
        self._exchange.receive(frames)
        if not self._exchange.open and not self._settled:
            self._settle()

    def _let_tail_go(self) -> None:
        """The body is complete, and the worker is not done: nobody waits for that here."""
        if not self._worker.dead:
            self._stop_upload()
        self._exchange.conclude()
        self._outcome = "ok"
        if self._channel.torn:
            self._discard()
        else:
            self._end(self._hand_tail_over)

    def _leave_refused_lane(self) -> None:
        """Go elsewhere, where the worker has closed a new lane untaken: it had no descriptors, or no thread, for it."""
        worker, upload = self._worker, self._upload
        if (
            worker.concurrency > 1
            and self._lane.jobs == 1
            and not worker.dead
            and self._exchange.head is None
            and not (upload.pulled or upload.closed)
            and self._channel.unread() >= self._channel.written
        ):
            self._outcome = "not taken"
            self._end(self._supervisor.leases.refuse_lane)
            raise RequestNotTaken

    def _raise_worker_death(self) -> None:
        """The worker's stream ended inside the job, and it is dead, or will not die: raise why."""
        worker = self._worker
        if self._exchange.complete:
            self._let_tail_go()
            return
        never_taken = (
            self._exchange.head is None
            and not self._upload.pulled
            and not self._upload.closed
            and worker.dead
            and self._channel.unread() >= self._channel.written
        )
        tail = "" if worker.last_words_told else worker.log.tail(self.job_id)
        again = self._is_to_be_done_again and not worker.limit_exceeded
        if never_taken:
            self._outcome = "not taken"
        elif again:
            self._outcome = "retried"
        else:
            self._outcome = "memory" if worker.limit_exceeded else "died"
        self._discard()
        death = worker_death(worker.status, self.job_id, worker.casualties)
        if never_taken:
            raise RequestNotTaken(death)
        if again:
            self._do_again(death.fault.detail)
        self._close_upload()
        if worker.limit_exceeded:
            raise over_limit("memory", worker.limit_exceeded, self.job_id)
        worker.last_words_told = worker.concurrency > 1  # once is enough, where others have died with it
        logger.error(
            "job %s: worker %s: %s%s",
            self.job_id,
            worker.pid,
            death.fault.detail,
            f"{LAST_WORDS}{quoted(tail)}" if tail else "",
            extra=self._extra(),
        )
        raise death

    @property
    def _is_to_be_done_again(self) -> bool:
        """Whether another worker is to have the request where this one dies now."""
        request = self._retriable
        return request is not None and request.retries > 0 and self._exchange.head is None

    def _do_again(self, why: str) -> NoReturn:
        assert self._retriable is not None
        self._retriable.retries -= 1
        self._retriable.asked_at = time.monotonic()  # it may wait for the other as long as for this one
        logger.warning("job %s: %s: it is done again, by another", self.job_id, why, extra=self._extra())
        raise RequestNotTaken

    def _check_end(self) -> None:
        """Raise what a response that did not end well ended with."""
        failure = response_failure(self._exchange, self.job_id)
        if failure is not None:
            raise failure
        if self._exchange.open and self._closed_by is not None:
            raise self._closed()

    def _extra(self) -> dict[str, object]:
        """What a log record about this job carries, for structured logs."""
        context = self._context
        return {
            "job_id": context.job_id,
            "provider": context.provider,
            "source": context.source,
            "worker": self._worker.pid,
        }

    # -- settling ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """The response has ended, well or not: let the worker go on to its next job, if it is fit to."""
        exchange = self._exchange
        channel = self._channel
        if exchange.sound and channel.ready_for_next and not (self._uploading or self._owes_end):
            self._outcome = "ok"  # the ordinary end, in few steps
            self._end(self._supervisor.leases.give_back)
            return
        if exchange.violation or not channel.clean:
            logger.error(
                "job %s: worker %s broke the protocol and is killed: %s",
                self.job_id,
                self._worker.pid,
                exchange.violation or "half a frame after the end of the response",
                extra=self._extra(),
            )
            self._close_upload()
            self._outcome = "protocol"
            self._supervisor.leases.kill(self._worker)  # whatever else it is at
            self._discard()
            return
        if exchange.surplus:
            logger.warning(
                "job %s: a response body is longer than its Content-Length: the rest is cut off",
                self.job_id,
                extra=self._extra(),
            )
        report = exchange.report
        if report is not None and exchange.whole:
            log_background_failure(self._worker, self.job_id, report)
            report = None
        self._outcome = "ok"
        if exchange.missing:
            self._outcome = "incomplete"
        elif report is not None and report.kind != "cancelled":
            self._outcome = report.kind
        if exchange.printed:
            self._worker.log.read()  # so that the next job's lines are not taken for this one's
        if report is not None and report.kind in ("raised", "memory"):
            text = quoted(report.traceback)
            if self._worker.log.charge(len(text.encode())):
                logger.error("job %s: the handler raised\n%s", self.job_id, text, extra=self._extra())
        try:
            self._stop_upload()
        except BaseException:
            self._discard()  # its upload has no end: the next request would be taken for the rest of it
            raise
        channel = self._channel
        if channel.torn:
            self._end(self._supervisor.leases.discard)
        elif channel.flushed and not exchange.background:
            self._end(self._supervisor.leases.give_back)
        else:
            self._end(self._hand_over)

    def _abandon(self) -> None:
        """Hand the worker, with a response that nobody waits for any more, to the supervisor."""
        try:
            self._ending = True
            if isinstance(self._closed_by, JobFailed):
                self._outcome = self._closed_by.fault.kind
            try:
                self._stop_upload()
            except BaseException:
                self._discard()
                raise
            channel = self._channel
            if channel.torn:
                self._end(self._supervisor.leases.discard)  # nobody knows what it has heard
            elif channel.written or not channel.flushed:
                self._end(self._hand_over)
            else:
                self._end(self._supervisor.leases.give_back)  # it has not heard of this job
        finally:
            self._ending = False

    def _end(self, let_go: Callable[[Lane], object]) -> None:
        """The job is over: tell of it, and let the worker go, whatever whoever is told raises."""
        # Under the lock, before the worker is let go: `close` wakes a channel only while it is held.
        with self._lock:
            self._settled = True
        try:
            self._ending = True
            try:
                self._tell_of_end()
            finally:
                let_go(self._lane)
        finally:
            self._ending = False

    def _hand_over(self, lane: Lane) -> None:
        """Let the supervisor see to the rest of the job."""
        exchange = self._exchange
        error = self._closed_by
        if exchange.background:
            exchange = ResponseExchange.of_background(exchange.job)
        elif not exchange.open:
            exchange = ResponseExchange.of_end(exchange.job)  # this one's body is still to be read, here
        rest = Remainder(
            exchange,
            timed_out=error.fault.detail if isinstance(error, JobTimedOut) else "",
            expires=self._expires,
        )
        self._supervisor.adopt(lane, rest)

    def _hand_tail_over(self, lane: Lane) -> None:
        tail = ResponseExchange.of_tail(self._exchange.job)
        self._supervisor.adopt(lane, Remainder(tail, timed_out="", expires=self._expires))

    def _discard(self) -> None:
        self._end(self._supervisor.leases.discard)

    def _tell_of_end(self) -> None:
        if self._scope is not None:
            self._scope.unwatch(id(self))
        events = self._supervisor.events
        outcome = self._outcome
        events.count(outcome)
        if events.times:
            time_of_job = self._context.provider, outcome, time.monotonic() - self.began, self._waited
            for batch in events.times:
                batch.add(time_of_job)
        healthy = outcome in HEALTHY
        if events.subscribers or (events.minders and not healthy):
            head, context = self._exchange.head, self._context
            ended = JobEnded(
                self.job_id,
                context.provider,
                context.source,
                self._worker.pid,
                None if head is None else head.status,
                outcome,
                time.monotonic() - self.began,
                "" if outcome == "ok" else self._what_went_wrong(),
                self.method,
                self.target,
            )
            events.emit(ended, healthy=healthy)

    def _what_went_wrong(self) -> str:
        if self._outcome in ("died", "not taken", "retried"):
            return worker_death(self._worker.status, self.job_id, self._worker.casualties).fault.detail
        if self._outcome == "memory" and self._worker.limit_exceeded:
            return self._worker.limit_exceeded
        report = self._exchange.report
        if report is not None and report.kind == "raised":
            return f"the handler raised {report.exception}"
        failure = response_failure(self._exchange, self.job_id)
        if failure is None and isinstance(self._closed_by, JobFailed):
            failure = self._closed_by
        if failure is not None:
            return failure.fault.detail
        return "" if self._closed_by is None else str(self._closed_by)
