"""A round trip for threads: the caller's own thread waits for the pipes and does all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..model.durations import min_timeout
from ..wire.frames import Frame
from .job_base import BaseJob
from .round_trip import EXIT_LIMIT, NOTHING, RoundTrip

if TYPE_CHECKING:
    from ..supervision.record import Lane
    from .prepared import PreparedRequest
    from .supervisor_protocol import SupervisorProtocol


class Job(RoundTrip, BaseJob):
    """A request in a worker, and its response.

    `Pool.open` makes it and returns once the head is there. Iterate for the body: each piece as it comes.
    A context manager; leaving it early, `close`, or dropping the job ends it.
    """

    __slots__ = ()

    def __init__(
        self,
        lane: Lane,
        supervisor: SupervisorProtocol,
        request: PreparedRequest,
    ) -> None:
        try:
            super().__init__(lane, supervisor, request)
            if self._scope is not None:
                self._watch_scope(self._scope)
            self._use(self._await_head, request)
            head = self._exchange.head
            if head is None:
                self._check_end()
                raise AssertionError("a response that has ended, without a head, has failed")
            self._answered(head)
        except BaseException as error:
            self._fail_to_open(error)
            raise

    def _await_head(self, request: PreparedRequest) -> None:
        self._send_request(request)
        if self._may_wait_long:
            frames = self._channel.wait_and_receive()
            if frames:
                self._receive(frames)
        while self._exchange.awaits_head and self._closed_by is None:
            self._advance()

    def read(self) -> bytes:
        """The next piece of the body as it comes, b"" at its end.

        Raises a JobFailed where the body ends badly, ReadTimeout, WriteTimeout, and JobClosed once the job was closed.
        """
        while (piece := self._next_piece()) is None:
            self._use(self._advance)
        return piece

    def read_ready(self, into: list[bytes], seconds: float | None = None) -> None:
        """Append to `into` the pieces of the body that are there; where none is, wait for one, or for the end.

        No longer than for so many seconds, None for ever. Raises as `read` does.
        """
        body = self._exchange.body
        until = None if seconds is None else time.monotonic() + seconds
        looked = False
        while not body and self._exchange.open:
            if looked and until is not None and time.monotonic() >= until:
                return
            looked = True
            self._use(self._advance, until)
        if self._closed_by is not None:
            raise self._closed()
        into += body
        body.clear()

    def _use(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step on the channel, as the one thread that uses it; a close that comes meanwhile follows it."""
        try:
            try:
                self._take_channel(step)
                step(*arguments)
            except BaseException as error:
                self._break_off(step, error)
                raise
            finally:
                left = self._release_channel(step)
        except BaseException:
            self._forget_user(step)
            raise
        if left:
            raise self._closed()

    def _advance(self, until: float | None = None) -> None:
        """Wait for the next frames of the response and take them; the upload goes on meanwhile.

        It gives up at the moment `until`, on the clock of `time.monotonic`.
        """
        frames = self._wait_for_frames(until)
        if frames is None and self._closed_by is not None:
            return  # the worker may have died of that: `_use` has the rest
        if frames is None:
            self._leave_refused_lane()
            self._supervisor.leases.kill(self._worker)  # one that lives on without its pipe is of no use
            self._worker.exited.wait(EXIT_LIMIT)
            self._raise_worker_death()
        else:
            self._receive(frames)

    def _wait_for_frames(self, until: float | None) -> list[Frame] | None:
        """The next frames, none where the job is closed meanwhile; None at the end of the worker's stream."""
        while True:
            dead = self._worker.dead
            patience = self._patience() if until is None else min_timeout(self._patience(), until)
            ready = self._channel.wait(patience, write=self._wants_write)
            if until is not None and not dead and not any(ready) and time.monotonic() >= until:
                return NOTHING
            frames = self._on_ready(ready, dead)
            if frames is not NOTHING or self._closed_by is not None or self._settled:
                return frames
