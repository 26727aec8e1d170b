"""Jobs at an agent: a round trip as on one machine, over a connection in the place of pipes."""

from __future__ import annotations

import time

from ..errors import WriteTimeout
from ..jobs.async_job import AsyncJob
from ..jobs.dispatch import Dispatch
from ..jobs.job import Job
from ..jobs.round_trip import RequestNotTaken, RoundTrip
from ..wire.frames import Frame
from .lane import RemoteExchange, RemoteLane
from .messages import error_of, lost
from .placement import too_late


class RemoteTrip(RoundTrip):
    """What is different of a round trip to an agent: how it ends where the response does not, and when a body is sent.

    A body that can't be sent twice is not begun before a worker has taken the job: until then it may go elsewhere.
    """

    __slots__ = ()

    _exchange_type = RemoteExchange
    _exchange: RemoteExchange
    _lane: RemoteLane

    @property
    def _wants_write(self) -> bool:
        if not self._uploading:
            return False
        return not self._channel.flushed or (self._exchange.pid is not None and self._upload.ready)

    def _push_upload(self) -> None:
        if self._exchange.pid is not None or not self._upload.lazy:
            super()._push_upload()
        elif not self._channel.flushed:
            try:
                self._channel.flush()
            except BrokenPipeError:
                self._channel.drop_unsent()

    def _on_ready(self, ready: tuple[bool, bool, bool], dead: bool) -> list[Frame] | None:
        """As on one machine; but of a node that was given up nothing more is taken, whatever comes."""
        return None if dead else super()._on_ready(ready, dead)

    def _receive(self, frames: list[Frame]) -> None:
        exchange = self._exchange
        exchange.receive(frames)
        self._worker.pid = exchange.pid
        if not exchange.open and not self._settled:
            self._settle()

    def _settle(self) -> None:
        exchange = self._exchange
        end = exchange.outcome
        if end is None:
            super()._settle()
            return
        if exchange.whole:
            self._outcome = "ok"
        elif end.kind == "busy" and exchange.head is None and not (self._upload.pulled or self._upload.closed):
            self._outcome = "not taken"
            leases = self._lane.link.leases
            self._end(
                (lambda _: leases.give_back_busy(self._lane)) if self._is_fit else self._supervisor.leases.discard
            )
            raise RequestNotTaken
        elif self._is_to_be_done_again and end.fault is not None and end.fault.kind == "died":
            self._outcome = "retried"
            self._let_lane_go()
            self._do_again(end.fault.detail)
        else:
            self._outcome = end.fault.kind if end.fault is not None else "lost" if end.kind == "closed" else "left"
        try:
            self._stop_upload()
        except BaseException:
            self._discard()
            raise
        self._let_lane_go()

    def _let_lane_go(self) -> None:
        leases = self._supervisor.leases
        self._end(leases.give_back if self._is_fit else leases.discard)

    @property
    def _is_fit(self) -> bool:
        """Whether the lane can have another job: nothing is still to be sent, and nothing to come."""
        return self._channel.ready_for_next and not self._exchange.violation

    @property
    def _awaits_worker(self) -> bool:
        """Whether a body waits until a worker has taken the job."""
        return self._uploading and self._channel.flushed and self._exchange.pid is None

    def _patience(self) -> float | None:
        patience = super()._patience()
        if self._awaits_worker and self._write_timeout is not None:
            return self._write_timeout if patience is None else min(patience, self._write_timeout)
        return patience

    def _time_is_up(self) -> None:
        super()._time_is_up()
        if self._awaits_worker and self._write_timeout is not None and self._closed_by is None:
            raise WriteTimeout(
                f"no worker took job {self.job_id} for {self._write_timeout} s, and it was ended: allow more time"
            )

    def _raise_worker_death(self) -> None:
        """The connection has ended inside the job."""
        if self._exchange.complete:
            self._let_tail_go()
            return
        begun = self._channel.written > 0
        self._outcome = "lost" if begun else "not taken"
        self._discard()
        if not begun:
            raise RequestNotTaken
        self._close_upload()
        raise self._lost()

    def _leave_refused_lane(self) -> None:
        """A connection is not refused: an agent says that it is busy."""

    def _lost(self) -> Exception:
        return lost(self.job_id, self._lane.link.lost or "the connection to its agent broke")

    def _check_end(self) -> None:
        end = self._exchange.outcome
        if end is not None and not self._exchange.whole:
            raise error_of(end, self.job_id)
        super()._check_end()

    def _what_went_wrong(self) -> str:
        end = self._exchange.outcome
        if end is not None:
            return end.words if end.fault is None else end.fault.detail
        if self._outcome == "lost":
            return str(self._lost())
        return super()._what_went_wrong()


class ClusterJob(RemoteTrip, Job):
    """A request at an agent, and its response, for threads: what `runner.Job` is on one machine."""

    __slots__ = ()


class ClusterAsyncJob(RemoteTrip, AsyncJob):
    """A request at an agent, and its response, for tasks: what `runner.AsyncJob` is on one machine."""

    __slots__ = ()


class RemoteDispatch(Dispatch):
    """A request on its way to a worker of some node: placed anew as long as none has taken it, and it has time."""

    __slots__ = ()

    _job_type = ClusterJob

    def _async_job_type(self) -> type[AsyncJob]:
        return ClusterAsyncJob

    def _try_again(self, never: RequestNotTaken) -> float | None:
        """As `Dispatch._try_again`, but any number of times, within the time that there was to find a worker."""
        timeout = self.lease_timeout
        if timeout is None:
            return None
        left = self.asked_at + timeout - time.monotonic()
        if left > 0:
            return left
        error = too_late(timeout)
        self._refused(error)
        raise error from None
