"""The request's body on its way to the worker: whoever waits for the response sends it on, as the worker takes it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..wire.frames import BODY, END, STOP, encode, pack_header
from .channel_guard import ChannelGuard

if TYPE_CHECKING:
    from ..model.request import Upload

logger = logging.getLogger("blastdoor")


class Sending(ChannelGuard):
    """The part of a round trip that sends. `_uploading` says that there is something to send, now or later."""

    __slots__ = ("_number", "_owes_end", "_upload", "_uploading")

    _number: int
    _owes_end: bool
    _upload: Upload
    _uploading: bool

    @property
    def _wants_write(self) -> bool:
        """Whether there is something to send, once the worker takes more."""
        return self._uploading and (self._upload.ready or not self._channel.flushed)

    def _push_upload(self) -> None:
        """Send on: what is left over, then one more piece of the source."""
        channel = self._channel
        upload = self._upload
        try:
            channel.flush()
            if channel.flushed and upload.lazy and upload.ready:
                piece = upload.pull()
                if piece:
                    channel.send(pack_header(BODY, self._number, len(piece)), piece)
                else:
                    self._end_upload(END)
        except BrokenPipeError:
            # The worker takes no more: its answer, or its death, tells the rest.
            channel.drop_unsent()
            self._close_upload()
        self._uploading = upload.lazy or not channel.flushed

    def _close_upload(self) -> None:
        try:
            self._upload.close()
        except Exception:
            logger.exception("job %s: closing the request body failed", self.job_id, extra={"job_id": self.job_id})

    def _stop_upload(self) -> None:
        """End an upload that has not come to its end: complete the frame that is under way, then STOP."""
        if self._uploading or (self._owes_end and self._channel.written):
            self._uploading = False
            self._close_upload()
            if self._owes_end:
                try:
                    self._end_upload(STOP)
                except BrokenPipeError:
                    self._channel.drop_unsent()

    def _end_upload(self, kind: int) -> None:
        """Send the frame that ends the request: once, or the stream counts as torn."""
        frame = encode(kind, self._number)
        self._channel.torn, self._owes_end = True, False
        self._channel.send(frame)


def waker(job: ChannelGuard) -> Callable[[], None]:
    """Wakes the job, without keeping it alive."""
    reference = weakref.ref(job)

    def wake() -> None:
        if (found := reference()) is not None:
            found._wake()

    return wake
