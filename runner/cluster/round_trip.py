"""One round trip to an agent seen from the host. It never waits: answers come by callback, into a mailbox.

`ClusterJob` and `ClusterAsyncJob` drive it, as `Job` and `AsyncJob` drive a local one. One call is under way for the
response at any time, and one for the request's body: `run`, which gives the head and what has come with it, then
`more` after `more`. Where the caller does not read, nothing more is asked for, and the worker waits at its pipe.

A job holds its slot until it settles: its end has come, its node is lost, or its caller has left and the agent has
acknowledged that.

One life cycle, longer than other modules: it does what `jobs.round_trip` does, over calls of Ray's in place of pipes.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import (
    Fault,
    JobClosed,
    JobFailed,
    LeaseTimeout,
    PoolClosed,
    WorkersUnavailable,
    closed_by,
)
from ..events import HEALTHY, JobAnswered, JobEnded, JobRefused, JobStarted, Outcome
from ..jobs.failures import failure
from ..wire.messages import ResponseHead
from .messages import (
    JobEnd,
    ResponseChunk,
    StartJob,
    decode,
    encode,
    error_of,
    lost,
)
from .placement import PATIENCE

if TYPE_CHECKING:
    from ..jobs.prepared import PreparedRequest
    from .agent_client import AgentClient, ClusterContext
    from .placement import Slot

logger = logging.getLogger("blastdoor")

ANSWER: Final = "answer"
FED: Final = "fed"
LOST: Final = "lost"

_MOST_TRIES: Final = 3


class NotTakenByNode(Exception):
    """No worker took the job at this node."""


class ClusterRoundTrip:
    """A request at an agent, and its response."""

    __slots__ = (
        "__weakref__",
        "_asked",
        "_body",
        "_closed_by",
        "_failure",
        "_feeding",
        "_head",
        "_host",
        "_link",
        "_lock",
        "_mail",
        "_outcome",
        "_piece",
        "_request",
        "_seat",
        "_settled",
        "_stopped",
        "_tries",
        "_try",
        "_upload",
        "_using",
        "_waited",
        "_worker",
        "began",
        "head",
        "job_id",
    )

    head: ResponseHead

    def __init__(self, host: ClusterContext, request: PreparedRequest) -> None:
        self.job_id = request.context.job_id
        self.began = time.monotonic()
        self._host = host
        self._request = request
        self._upload = request.upload
        self._lock = threading.Lock()
        self._mail: deque[tuple[str, int, object]] = deque()
        self._body: deque[bytes] = deque()
        self._head: ResponseHead | None = None
        self._failure: BaseException | None = None
        self._outcome: Outcome = "left"
        self._link: AgentClient | None = None
        self._seat: Slot | None = None
        self._worker: int | None = None
        self._closed_by: BaseException | None = None
        self._settled = True  # it holds no slot yet
        self._using = False
        self._feeding = False
        self._stopped = False
        self._piece: bytes | None = None
        self._try = 0
        self._tries = _MOST_TRIES

    def __del__(self) -> None:
        if not getattr(self, "_settled", True) and not self._host.in_forked_child:
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
    def settled(self) -> bool:
        """Whether the job holds no worker any more; pieces of its body may still be there to be read."""
        return self._settled

    @property
    def finished(self) -> bool:
        """Whether the response has ended well, and all of its body was read."""
        return self._settled and self._outcome == "ok" and not self._body

    def close(self, cause: BaseException | None = None) -> None:
        """End the job; from any thread. A thread that is blocked in `read` is freed at once, with JobClosed.

        Nothing happens where the response has ended. Nobody waits for the worker here.
        """
        if self._settled or self._host.in_forked_child:
            return
        with self._lock:
            if self._settled or self._closed_by is not None:
                return
            self._closed_by = cause or JobClosed("close() was called")
            if self._using:
                self._ring()
                return
        self._leave()

    def node_lost(self, why: str) -> None:
        """The agent is gone. From any thread."""
        self._mail.append((LOST, self._try, why))
        self._ring()

    def _ring(self) -> None:
        """Wake the driver, which looks what there is. From any thread."""
        raise NotImplementedError

    # -- placing -----------------------------------------------------------------------------------

    def _sit(self, slot: Slot, left: float | None) -> None:
        """Send the request to the agent of this slot. NotTakenByNode where that is lost already.

        `left` is how many seconds the caller waits for a worker at most.
        """
        request, host = self._request, self._host
        link = host.links.get(slot.node.name)
        self._try += 1
        self._seat, self._link = slot, link
        if link is None or host.closing or not link.take(self):
            if link is None:
                host.placement.remove(slot.node)
            host.placement.give_back(slot)
            raise PoolClosed("the pool is closed: open a new one") if host.closing else NotTakenByNode
        self._settled = self._stopped = self._feeding = False
        self.began = time.monotonic()
        if request.scope is not None:
            request.scope.watch(id(self), _closer(self))
        events = host.events
        self._waited = waited = self.began - request.asked_at
        if events.subscribers:
            context = request.context
            events.emit(JobStarted(self.job_id, context.provider, context.source, None, waited), healthy=True)
        upload = self._upload
        uploads = upload.lazy or self._piece is not None
        if upload.lazy:
            upload.on_ready(_ringer(self))
        patience = PATIENCE if left is None else min(PATIENCE, left)
        order = StartJob(host.name, self.job_id, request.head, upload.inline, uploads, patience, *request.timeouts)
        link.call("run", encode(order), answered=self._mailer(ANSWER))

    def _check_time(self, until: float | None) -> None:
        """Before a try: LeaseTimeout where a job that was placed before is out of time, and what it was closed with."""
        if self._closed_by is not None:
            raise self._closed()
        if self._try and until is not None and time.monotonic() >= until:
            raise LeaseTimeout(
                f"no worker became free within {self._request.lease_timeout} s, on any node: start the pool with more "
                f"workers, or wait longer (lease_timeout; the client's connect or pool timeout)"
            )

    def _refused(self, error: BaseException) -> None:
        """Tell of a caller that got no slot."""
        events = self._host.events
        if events.subscribers or events.minders:
            context, waited = self._request.context, time.monotonic() - self._request.asked_at
            events.emit(JobRefused(context.job_id, context.provider, context.source, waited, str(error)))

    def _mailer(self, kind: str) -> Callable[[object], None]:
        """Puts what comes for this job in its mailbox, without keeping it alive."""
        reference = weakref.ref(self)
        number = self._try

        def put(result: object) -> None:
            if (job := reference()) is not None:
                job._mail.append((kind, number, result))
                job._ring()

        return put

    # -- what the driver does ------------------------------------------------------------------------

    def _begin_use(self) -> None:
        """Become the one that uses the mailbox. Raises what the job was closed with."""
        with self._lock:
            if self._closed_by is not None:
                raise self._closed()
            if self._using:
                raise RuntimeError(f"job {self.job_id} is being read already: one thread or task reads at a time")
            self._using = True

    def _end_use(self) -> bool:
        """Use it no more; whether a close came meanwhile, which has been seen to."""
        with self._lock:
            self._using = False
            leave = self._closed_by is not None and not self._settled
        if leave:
            self._leave()
        return leave

    def _break_off(self, error: BaseException) -> None:
        self._closed_by = self._closed_by or error
        if not self._settled:
            self._leave()

    def _patience(self) -> float | None:
        """How long to wait for mail, in seconds."""
        scope = self._request.scope
        deadline = None if scope is None else scope.deadline
        return None if deadline is None else max(deadline - time.monotonic(), 0)

    def _look(self) -> None:
        """Take what has come, and send what can be sent."""
        if not self._mail and self._request.scope is not None and self._request.scope.cancelled:
            return  # its time is up, and this job was closed by it
        while self._mail and not self._settled:
            kind, number, result = self._mail.popleft()
            if number != self._try:
                continue  # of a try at another node
            if kind is ANSWER:
                self._receive(result)
            elif kind is FED:
                self._feeding = False
                self._fed(result)
            else:
                self._fail(lost(self.job_id, str(result)))
        if self._stopped and self._head is not None:
            self._close_upload()
        self._push_upload()

    def _fed(self, result: object) -> None:
        """What came of the piece that was fed."""
        if result == b"more":
            self._piece = None
        elif result == b"stop":
            self._stopped = True
        elif result != b"again":
            self._give_up(result)

    def _push_upload(self) -> None:
        """Feed the next piece of the body, if there is one, and the last one was taken."""
        if self._feeding or self._stopped or self._settled:
            return
        if self._piece is None:
            if not self._upload.lazy or not self._upload.ready:
                return
            self._piece = bytes(self._upload.pull())
        self._feeding = True
        assert self._link is not None
        self._link.call("feed", self.job_id, self._piece, answered=self._mailer(FED))

    def _close_upload(self) -> None:
        try:
            self._upload.close()
        except Exception:
            logger.exception("job %s: closing the request body failed", self.job_id)

    # -- receiving ---------------------------------------------------------------------------------

    def _receive(self, result: object) -> None:
        assert self._link is not None
        if isinstance(result, BaseException):
            self._give_up(result)
            return
        try:
            delivery = decode(result, ResponseChunk)
        except ValueError as error:
            self._break(str(error))
            return
        if delivery.worker is not None:
            self._worker = delivery.worker
        if self._head is None:
            self._head = delivery.head
        self._body.extend(filter(None, delivery.body))
        if delivery.end is not None:
            self._finish(delivery.end)
        elif self._head is None:
            self._break("an answer without a head")
        else:
            self._link.call("more", self.job_id, answered=self._mailer(ANSWER))

    def _finish(self, end: JobEnd) -> None:
        """The end of the job has come."""
        if self._head is None and end.kind in ("busy", "unavailable"):
            assert self._seat is not None
            placement = self._host.placement
            if end.kind == "unavailable":
                placement.update(self._seat.node, paused_until=time.monotonic() + max(end.retry_after, 0.1))
                self._tries -= 1
            self._unsettle()
            if end.kind == "unavailable" and not self._tries:
                raise WorkersUnavailable(end.words, end.retry_after)
            raise NotTakenByNode
        if end.kind == "ok" and self._head is not None:
            self._outcome = "ok"
            self._settle()
        elif end.kind == "ok":
            self._break("an end without a head")
        else:
            self._fail(error_of(end, self.job_id))

    def _give_up(self, result: object) -> None:
        """A call has failed; what has become of the job is not known."""
        assert self._link is not None
        if isinstance(result, BaseException):
            self._link.failed(result)
        why = self._link.lost or f"{type(result).__name__} came instead of an answer"
        self._fail(lost(self.job_id, why), sure=False)

    def _break(self, why: str) -> None:
        detail = f"the agent broke its protocol: {why}"
        self._fail(failure(Fault(kind="protocol", detail=detail, job_id=self.job_id)), sure=False)

    def _fail(self, error: BaseException, *, sure: bool = True) -> None:
        """The job has failed. Where it is not `sure` that it has ended at its agent, it is killed there."""
        self._failure = error
        self._outcome = error.fault.kind if isinstance(error, JobFailed) else "left"
        if sure:
            self._settle()
        else:
            self._kill()

    def _next_piece(self) -> bytes | None:
        """A piece of the body that is there, b"" at its end; None where it has to be waited for."""
        if self._closed_by is not None:
            raise self._closed()
        if self._body:
            return self._body.popleft()
        if not self._settled:
            return None
        if self._failure is not None:
            raise self._failure
        return b""

    def _answered(self) -> None:
        """The head is there, or what came instead is raised."""
        if self._head is None:
            assert self._failure is not None
            raise self._failure
        self.head = self._head
        events = self._host.events
        if not self._settled:
            context, seconds = self._request.context, time.monotonic() - self.began
            for batch in events.times:
                batch.add((context.provider, "", seconds, 0.0))
            if events.subscribers:
                worker, status = self._worker, self.head.status
                answered = JobAnswered(self.job_id, context.provider, context.source, worker, status, seconds)
                events.emit(answered, healthy=True)

    # -- the end -----------------------------------------------------------------------------------

    def _closed(self) -> BaseException:
        """What a read of a job that was ended raises: the fault that ended it, or that it was closed."""
        assert self._closed_by is not None
        if isinstance(self._closed_by, JobFailed):
            return self._closed_by
        return closed_by(self._closed_by, f"job {self.job_id}")

    def _leave(self) -> None:
        """The caller has left: have the job ended at its agent, and its slot given back then."""
        if isinstance(self._closed_by, JobFailed):
            self._outcome = self._closed_by.fault.kind
        self._kill()

    def _kill(self) -> None:
        assert self._link is not None
        assert self._seat is not None
        link, placement, slot = self._link, self._host.placement, self._seat
        if self._mark_settled():
            try:
                self._tidy_up(over=True)
            finally:
                link.kill(self.job_id, lambda: placement.give_back(slot))

    def _settle(self) -> None:
        """The job is over at its agent."""
        assert self._seat is not None
        if self._mark_settled():
            self._host.placement.give_back(self._seat)
            self._tidy_up(over=True)

    def _unsettle(self) -> None:
        """The job was not begun: its slot is given back, since no worker of its node was free, and it has none now."""
        assert self._seat is not None
        self._outcome = "not taken"
        if self._mark_settled():
            self._host.placement.full(self._seat)
            self._tidy_up(over=False)

    def _mark_settled(self) -> bool:
        """Whether this is the one end of the job, or of its try."""
        with self._lock:
            first = not self._settled
            self._settled = True
        return first

    def _tidy_up(self, *, over: bool) -> None:
        assert self._link is not None
        self._link.drop(self)
        if self._request.scope is not None:
            self._request.scope.unwatch(id(self))
        if over:
            self._close_upload()
        self._tell_end()

    def _tell_end(self) -> None:
        events = self._host.events
        events.count(self._outcome)
        context, seconds = self._request.context, time.monotonic() - self.began
        for batch in events.times:
            batch.add((context.provider, self._outcome, seconds, self._waited))
        healthy = self._outcome in HEALTHY
        if events.subscribers or (events.minders and not healthy):
            head = self._head
            why = self._failure or self._closed_by
            detail = why.fault.detail if isinstance(why, JobFailed) else str(why or "")
            status = None if head is None else head.status
            events.emit(
                JobEnded(
                    self.job_id, context.provider, context.source, self._worker, status, self._outcome, seconds, detail
                ),
                healthy=healthy,
            )


def remaining(until: float | None) -> float | None:
    """Seconds left until a moment on the monotonic clock, None for ever."""
    return None if until is None else max(until - time.monotonic(), 0)


def _closer(job: ClusterRoundTrip) -> Callable[[BaseException], None]:
    """Closes the job when its scope is cancelled, without keeping it alive."""
    reference = weakref.ref(job)

    def close(cause: BaseException) -> None:
        if (found := reference()) is not None:
            found.close(cause)

    return close


def _ringer(job: ClusterRoundTrip) -> Callable[[], None]:
    """Wakes the job's driver, without keeping the job alive."""
    reference = weakref.ref(job)

    def ring() -> None:
        if (found := reference()) is not None:
            found._ring()

    return ring
