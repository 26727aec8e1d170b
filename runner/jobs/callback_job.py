"""A round trip for the callbacks of an event loop: no task, no thread, nothing that waits.

The loop's `Poller` calls the job when its channel has something; the job does what can be done and tells its listener.
It uses its channel from its beginning to its end, in the loop's thread: `close` from another one wakes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from .round_trip import EXIT_LIMIT, TAIL_PATIENCE, RequestNotTaken, RoundTrip

if TYPE_CHECKING:
    from ..platform.deadlines import Deadline
    from ..supervision.record import Lane
    from ..wire.messages import ResponseHead
    from .poller import Poller
    from .prepared import PreparedRequest
    from .supervisor_protocol import SupervisorProtocol

logger = logging.getLogger("blastdoor")

_READS: Final = 64
"""How often the pipe of a dead worker is read in a turn: it held less, unless another process writes to it."""

_LOOP: Final = object()
"""Uses the channel: the loop's callbacks, from the beginning to the end of the job."""


class Listener(Protocol):
    """Whoever is answered. It is called in the loop's thread, at last with `ended` or with a failure; not if it left.

    `data` is what has come of the body, possibly nothing; `ended` says that there is no more.
    """

    def on_head(self, head: ResponseHead, data: bytes, *, ended: bool) -> None:
        """The head of the response is there."""

    def on_body(self, data: bytes, *, ended: bool) -> None:
        """More of its body, or its end."""

    def on_failure(self, error: BaseException) -> None:
        """There is no more, and it is not whole: before the head as `Pool.open` raises it, after it as `Job.read`."""


class Retries(Protocol):
    """Whoever has made the job, and another one where its worker never took the request."""

    def not_taken(self, never: RequestNotTaken) -> None:
        """The worker was gone before it took the request."""

    def failed(self, error: BaseException) -> None:
        """There is no response, or no more of it."""


class CallbackJob(RoundTrip):
    """A request in a worker, and its response: the twin of `Job` for callbacks."""

    __slots__ = (
        "_call",
        "_deadline",
        "_deaf",
        "_listener",
        "_patience_over",
        "_poller",
        "_request",
        "_told",
        "_waits_for_room",
    )

    def __init__(
        self,
        lane: Lane,
        supervisor: SupervisorProtocol,
        request: PreparedRequest,
        call: Retries,
        poller: Poller,
        listener: Listener,
    ) -> None:
        self._request = request
        self._call = call
        self._poller = poller
        self._listener = listener
        self._told = self._deaf = self._waits_for_room = False
        self._deadline: Deadline | None = None
        self._patience_over: Deadline | None = None
        super().__init__(lane, supervisor, request)

    def begin(self) -> None:
        """Send the request, and listen. RequestNotTaken where the worker is gone; the job has let it go then."""
        try:
            self._take_channel(_LOOP)
            self._send_request(self._request)
            self._poller.listen(self, self._channel)
            if self._wall_seconds:
                self._deadline = self._poller.after(self._wall_seconds).start(self._on_time_up)
            if self._uploading:
                self._serve_upload()
        except BaseException as error:
            self._fail(error)
            raise

    def leave(self, cause: BaseException) -> None:
        """End the job, for a listener that wants no more of it, and is told nothing more."""
        self._fail(cause)

    def pause(self) -> None:
        """Tell the listener nothing, until `resume`: it can't take more."""
        if not self._settled:
            self._poller.leave_answer(self._channel)

    def resume(self) -> None:
        """Tell the listener again."""
        if not self._settled and not self._deaf:
            self._poller.listen_to_answer(self, self._channel)

    # -- the loop ------------------------------------------------------------------------------------

    def on_event(self, fd: int) -> None:
        """The channel has something: at this descriptor of it."""
        channel = self._channel
        if fd == channel.response_fd:
            self._guard(self._advance)
        elif fd == channel.request_fd:
            self._guard(self._serve_upload)
        else:
            channel.take_wake()
            self._guard(self._advance)

    def _guard(self, step: Callable[[], object]) -> None:
        """Take a step. What it raises ends the job, and is told."""
        try:
            step()
        except RequestNotTaken as never:
            self._call.not_taken(never)
        except Exception as error:  # noqa: BLE001 - it is the listener's
            self._fail(error)
            self._call.failed(error)

    def _advance(self) -> None:
        """Take what has come of the response."""
        if self._closed_by is not None:
            self._release_channel(_LOOP)
            raise self._closed()
        worker, channel = self._worker, self._channel
        for _ in range(_READS):
            if self._settled:
                return
            dead = worker.dead
            if self._deaf:
                if dead:
                    self._end_with_worker()
                return
            frames = channel.receive()
            if frames:
                self._receive(frames)
                self._tell()
                if not dead:
                    return  # the others' turn; what is left is told of again
            elif frames is None or (dead and channel.starved):  # what it has started may hold the pipe open
                self._await_death()
                if not worker.dead:
                    return
            elif not dead:
                return
        if not self._settled and worker.dead:
            self._await_death()  # what it has started goes on writing: that is no response
            self._end_with_worker()

    def _await_death(self) -> None:
        """The worker's stream has ended: go on once it is known how the worker has."""
        self._leave_refused_lane()
        self._deaf = True
        self._supervisor.leases.kill(self._worker)  # one that lives on without its pipe is of no use
        self._poller.leave_answer(self._channel)
        if not self._worker.dead:
            self._patience_over = self._poller.after(EXIT_LIMIT).start(lambda: self._guard(self._end_with_worker))

    def _end_with_worker(self) -> None:
        self._raise_worker_death()
        self._tell()  # the response was complete

    def _tell(self) -> None:
        """Tell the listener what has come."""
        exchange = self._exchange
        body = exchange.body
        data = b"" if not body else body.popleft() if len(body) == 1 else b"".join(body)
        body.clear()
        ended = not exchange.open
        failed = ended and self._outcome != "ok"
        if not self._told:
            head = exchange.head
            if head is None:
                if ended:
                    self._check_end()
                return
            self._told = True
            self._answered(head)
            self._listener.on_head(head, data, ended=ended and not failed)
        elif data or (ended and not failed):
            self._listener.on_body(data, ended=ended and not failed)
        if failed:
            self._check_end()
        elif not ended:
            self._watch_tail()

    def _watch_tail(self) -> None:
        """Where the body is complete, and all is sent, the end is waited for no longer than for a moment."""
        if self._exchange.complete and not self._uploading and not self._settled and self._patience_over is None:
            self._patience_over = self._poller.after(TAIL_PATIENCE).start(self._on_tail_time_up)

    def _serve_upload(self) -> None:
        """Send on what there is of the request's body, as far as the worker takes it."""
        channel = self._channel
        while self._wants_write and not self._settled:
            self._push_upload()
            if not channel.flushed:
                if not self._waits_for_room:
                    self._waits_for_room = True
                    self._poller.listen_for_room(self, channel)
                return
        if self._waits_for_room:
            self._waits_for_room = False
            self._poller.leave_room(channel)
        if self._uploading and not self._settled:
            self._upload.starve()
        elif self._told:
            self._watch_tail()

    def _wake(self) -> None:
        """The upload has something to send; in the loop's thread."""
        if not self._settled and self._closed_by is None and not self._waits_for_room:
            self._guard(self._serve_upload)

    def _on_time_up(self) -> None:
        if not self._settled:
            self._guard(self._end_for_time)

    def _end_for_time(self) -> None:
        self._time_is_up()
        if self._settled:
            self._tell()  # its body was complete, and nobody waits for the rest

    def _on_tail_time_up(self) -> None:
        if not self._settled and self._exchange.complete and not self._uploading:
            self._guard(self._end_with_tail)

    def _end_with_tail(self) -> None:
        self._let_tail_go()
        self._tell()

    # -- the end -------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        self._break_off(_LOOP, error)
        self._stop()

    def _end(self, let_go: Callable[[Lane], object]) -> None:
        self._stop()  # first: the lane's next job may begin within `let_go`
        super()._end(let_go)

    def _stop(self) -> None:
        self._poller.unlisten(self, self._channel)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._patience_over is not None:
            self._patience_over.cancel()
