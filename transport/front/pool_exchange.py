"""A request that a pool answers: what comes of its body goes to a job, what the job answers to the client.

A small body is there before a worker is leased: a slow client can't hold it. A longer one is sent on as it comes. The
client is waited for only while its body is wanted and none of it is there.
"""

from __future__ import annotations

import logging
from asyncio import TimerHandle
from typing import TYPE_CHECKING, Final, Protocol

from runner import Pool
from runner.errors import InvalidRequest, JobClosed, JobFailed, PoolClosed, PoolForked, StartError
from runner.jobs.pushed_upload import PushedUpload
from runner.model.request import INLINE, Upload
from transport.front.exchange import ConnectionProtocol, Exchange
from transport.front.task_call import TaskCall
from transport.gateway.patience import Patience
from transport.gateway.router import BodyTooLarge, BodyTooSlow, Refused
from transport.problem_details import refusal

if TYPE_CHECKING:
    from runner.jobs.poller import Poller
    from runner.protocols import AnyPool
    from runner.wire.messages import ResponseHead
    from transport.gateway.router import Asked, Call, Router
    from transport.gateway.traces import Span

logger = logging.getLogger("blastdoor")

_BROKEN: Final = {"detail": "the server failed", "fault": "server"}


class Running(Protocol):
    """A request on its way to a worker, then its job."""

    @property
    def job_id(self) -> str: ...

    @property
    def begun(self) -> bool: ...

    def begin(self) -> None: ...

    def leave(self, cause: BaseException | None = None) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class PoolExchange(Exchange):
    """A request that goes to the pool of its mount. It is the `Listener` of its job."""

    _mount = _job_id = _noted = ""
    _span: Span | None = None
    _call: Call | None = None
    _pool: AnyPool | None = None
    _running: Running | None = None
    _upload: PushedUpload | None = None
    _pieces: list[bytes] | None = None
    _received = 0
    _patience: Patience | None = None
    _timer: TimerHandle | None = None
    _held = False

    def __init__(self, router: Router, poller: Poller, connection: ConnectionProtocol, asked: Asked) -> None:
        self.connection = connection
        self.asked = asked
        self._router = router
        self._poller = poller

    # -- Exchange ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Route it. What goes to no pool is answered at once."""
        router, asked = self._router, self.asked
        router.active += 1
        try:
            call = self._call = router.route(asked)
        except Refused as refused:
            self._mount, self._span = refused.mount, refused.span
            self._give(*refused.answer)
            return
        self._mount, self._span = call.path, call.span
        length = asked.length
        if self._is_too_large:
            self._fail(BodyTooLarge())
        elif not length or self.whole or length > INLINE:
            self._open()
        else:
            self._await_body()

    def take_body(self, data: bytes) -> None:
        """A piece of the request's body has come."""
        self._received += len(data)
        if self.over:
            return
        if self._is_too_large and self.begun:
            self._fail(BodyTooLarge())
            return
        self._waited(len(data))
        if self._upload is not None:
            self._upload.push(data)
        elif self._pieces is None:
            self._pieces = [data]
        else:
            self._pieces.append(data)

    def take_body_end(self) -> None:
        """All of the request has come."""
        if not self.begun or self.over:
            return
        if self._timer is not None:
            self._waited(0)
        if self._upload is not None:
            self._upload.end()
        elif self._running is None and self._call is not None:
            self._open()

    @property
    def _is_too_large(self) -> bool:
        most = self._router.max_body
        return most is not None and self._received > most

    @property
    def backlog(self) -> int:
        """How many bytes of the body have come and are not taken yet."""
        if self._upload is not None:
            return self._upload.waiting
        return self._received if self._pieces is not None else 0

    def abandon(self) -> None:
        """The client has gone, or what it sends is no request."""
        running, self._running = self._running, None
        if running is not None:
            running.leave(JobClosed("the client has gone"))
        self.end()

    def hold(self) -> None:
        """Take no more of the job's answer."""
        self._held = True
        if self._running is not None:
            self._running.pause()

    def go_on(self) -> None:
        """Take the job's answer again."""
        self._held = False
        if self._running is not None:
            self._running.resume()

    def finish(self) -> None:
        """Tell of it."""
        if self._timer is not None:
            self._end_timer()
        if self._upload is not None:
            self._upload.close()
        self._running = self._pieces = None
        if self._noted:
            self._router.request_ids.end(self._noted)
        self._router.active -= 1
        self._router.tell(
            self._mount, self.asked, self.status, self.sent, self._job_id, self._span, whole=self.complete
        )

    # -- the job -------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Have a worker take the request."""
        call = self._call
        assert call is not None
        self._pool = pool = call.mount.pool
        upload: Upload | None = None
        if self.asked.length != 0:
            pieces = self._pieces or []
            if self.whole and self._received <= INLINE:
                upload = Upload(b"".join(pieces))
            else:
                upload = self._upload = PushedUpload(self._on_starved)
                for piece in pieces:
                    upload.push(piece)
                if self.whole:
                    upload.end()
                self._pieces = None
        try:
            if self._span is None:
                self._begin(pool, call, upload)
            else:
                with self._span.active():
                    self._begin(pool, call, upload)
        except (InvalidRequest, PoolClosed, PoolForked, StartError) as error:
            self.on_failure(error)

    def _begin(self, pool: AnyPool, call: Call, upload: Upload | None) -> None:
        running: Running
        if isinstance(pool, Pool):
            running = pool.open_for(self, call.request, self._poller, upload, call.context)
        else:
            running = TaskCall(pool, call.request, upload, call.context, self, self._poller.loop)
        self._running = running
        self._note_request(running)
        if self._held:
            running.pause()
        running.begin()

    def on_head(self, head: ResponseHead, data: bytes, *, ended: bool) -> None:
        """The head of the job's response is there."""
        running, call = self._running, self._call
        assert running is not None
        assert call is not None
        self._job_id = running.job_id
        self._note_request(running)  # a cluster's job has its id by now
        try:
            head = call.passed_on(head)
        except Refused as refused:
            running.leave(JobClosed("its status is none of HTTP's"))
            self._give(*refused.answer)
        else:
            self.answer(head, data, ended=ended)

    def _note_request(self, running: Running) -> None:
        job_id, ids = running.job_id, self._router.request_ids
        if job_id and job_id != self._noted and (request_id := self.asked.header("x-request-id")):
            if self._noted:
                ids.end(self._noted)  # it waited for a pool that was replaced
            self._noted = job_id
            ids.begin(job_id, request_id)

    def on_body(self, data: bytes, *, ended: bool) -> None:
        """More of its body, or its end."""
        self.go_on_with(data, ended=ended)

    def on_failure(self, error: BaseException) -> None:
        """There is no more, and it is not whole."""
        running, self._running = self._running, None
        call = self._call
        assert call is not None
        if self.started:
            self._break_off()
            return
        if isinstance(error, PoolClosed) and call.mount.pool is not self._pool and not (running and running.begun):
            self._open_again()  # the pool was replaced while this waited for a worker; nothing of it was taken
            return
        answer = self._router.fault_answer(error, debug=call.mount.pool.debug)
        if isinstance(error, JobFailed):
            self._job_id = error.fault.job_id
        if answer is None:
            logger.error("a request failed", exc_info=error)
            answer = refusal(500, _BROKEN)
        self._give(*answer)

    def _open_again(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            self._pieces = upload.unpulled()
        self._open()

    # -- the body ------------------------------------------------------------------------------------

    def _on_starved(self) -> None:
        """The job wants more of the body than there is."""
        if not self.whole:
            self._await_body()
            self.connection.update_reading()

    def _await_body(self) -> None:
        """The client has to send, and has so long to do it."""
        self.ask_for_body()
        if self._timer is None:
            if self._patience is None:
                self._patience = Patience(self._router.body_timeout)
            self._timer = self._poller.loop.call_later(self._patience.begin(), self._on_body_late)

    def _waited(self, received: int) -> None:
        if self._timer is not None:
            self._end_timer()
            assert self._patience is not None
            self._patience.end(received)
            if self._upload is None and not self.whole:
                self._await_body()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_body_late(self) -> None:
        self._timer = None
        self._fail(BodyTooSlow())

    # -- the end -------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """The client's body ends the request."""
        running, self._running = self._running, None
        if running is not None:
            running.leave(error)
        if self.started:
            self._break_off()
        else:
            answer = self._router.fault_answer(error, debug=False)
            assert answer is not None
            self._give(*answer)

    def _give(self, head: ResponseHead, body: bytes) -> None:
        """All of a response that is the gateway's own."""
        self.answer(head, b"" if self.asked.method == "HEAD" else body, ended=True)

    def _break_off(self) -> None:
        self.connection.break_off()
        self.abandon()
