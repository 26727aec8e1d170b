"""Frames: bytes to frames and back, incremental and size-capped, with no I/O.

A frame is a nine-byte header and a payload:

    kind 1 byte | job 4 bytes | length 4 bytes | payload

little-endian. `job` is the number of the job on its worker, so that a late frame of one job can never
be taken for the next one's. What may come is a table of kinds with the cap of each; a kind that is not
in the table, a length over its cap, or an empty body frame makes the stream invalid for good.

Body frames are handed on as their bytes come, without waiting for the whole frame: no token is held
back and nothing is buffered on the word of a length field. Those that have come together are handed on
together, as one: a reader that lags behind catches up. All other frames are handed on whole.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

INVALID: Final = 0
"""The kind of the last frame that a decoder gives when the stream is invalid; its payload says why."""

REQUEST: Final = 1
BODY: Final = 2
END: Final = 3
STOP: Final = 4
READY: Final = 5
HEAD: Final = 6
FAULT: Final = 7
IDLE: Final = 8

PRINTED: Final = 1
"""A bit in the payload of END and IDLE: the handler has printed something, and the log pipe is to be read first."""

BUSY: Final = 2
"""A bit in the payload of END: the response is whole, but the worker goes on with the job's rest, until its IDLE."""

MAX_HEAD: Final = 256 * 1024
"""The cap on an encoded request or response head, in bytes."""

MAX_BODY: Final = 1024 * 1024
"""The cap on one body frame, in bytes; a body has as many frames as it needs."""

MAX_FAULT: Final = 128 * 1024
MAX_READY: Final = 64

TO_WORKER: Final[Mapping[int, int]] = {REQUEST: MAX_HEAD, BODY: MAX_BODY, END: 0, STOP: 0}
"""What the host sends: a request; its body, ended by END, or by STOP where the body was cut short."""

TO_HOST: Final[Mapping[int, int]] = {
    READY: MAX_READY,
    HEAD: MAX_HEAD,
    BODY: MAX_BODY,
    END: 1,
    FAULT: MAX_FAULT,
    IDLE: 1,
}
"""What a worker sends: READY once (or FAULT); then for each job a head, body frames, and END or FAULT.

After an END that says BUSY, IDLE or FAULT follows when the job's background work has ended.
"""

Frame = tuple[int, int, bytes]
"""Kind, job number, payload."""

_HEADER = struct.Struct("<BII")
HEADER_SIZE: Final = _HEADER.size

pack_header = _HEADER.pack
_unpack_header = _HEADER.unpack_from


def encode(kind: int, job: int, payload: bytes = b"") -> bytes:
    """One whole frame as bytes."""
    return pack_header(kind, job, len(payload)) + payload


class FrameDecoder:
    """Turns a byte stream, however it is split, into frames.

    `feed` takes the next bytes and gives the frames that they complete. It never raises on bad input:
    the frames before the fault come out, then one `INVALID` frame, and after it nothing more. It holds
    at most one frame that is not complete, within its kind's cap.
    """

    __slots__ = ("_body_job", "_body_left", "_caps", "_need", "_partial", "_valid")

    def __init__(self, caps: Mapping[int, int]) -> None:
        self._caps = caps
        self._partial = bytearray()
        self._need = HEADER_SIZE
        self._body_job = 0
        self._body_left = 0
        self._valid = True

    @property
    def clean(self) -> bool:
        """Whether the stream stands between two frames."""
        return self._valid and not self._partial and not self._body_left

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order."""
        if not self._valid:
            return []
        if self._partial:
            self._partial += data
            if len(self._partial) < self._need:
                return []
            data = bytes(self._partial)
            self._partial.clear()
        frames: list[Frame] = []
        at = 0
        end = len(data)
        if self._body_left and end:
            at = min(self._body_left, end)
            self._body_left -= at
            frames.append((BODY, self._body_job, data if at == end else data[:at]))
        run: list[bytes] = []
        run_job = 0
        last = end - HEADER_SIZE
        while at <= last:
            kind, job, length = _unpack_header(data, at)
            if kind == BODY and 0 < length <= MAX_BODY and (not run or job == run_job):
                start = at + HEADER_SIZE
                at = start + length
                run_job = job
                run.append(data[start:at])
                if at > end:
                    self._body_job = job
                    self._body_left = at - end
                continue
            if run:
                frames.append((BODY, run_job, run[0] if len(run) == 1 else b"".join(run)))
                run.clear()
                continue
            cap = self._caps.get(kind)
            if cap is None or length > cap or (kind == BODY and not length):
                self._valid = False
                frames.append((INVALID, job, _complaint(kind, length, cap).encode()))
                return frames
            start = at + HEADER_SIZE
            at = start + length
            if at <= end:
                frames.append((kind, job, data[start:at]))
            else:
                self._partial += memoryview(data)[start - HEADER_SIZE :]
                self._need = HEADER_SIZE + length
                return frames
        if run and (whole := b"".join(run)):
            frames.append((BODY, run_job, whole))
        if at < end:
            self._partial += memoryview(data)[at:]
            self._need = HEADER_SIZE
        return frames


def _complaint(kind: int, length: int, cap: int | None) -> str:
    if cap is None:
        return f"frame of unknown kind {kind}"
    if length > cap:
        return f"frame of kind {kind} announces {length} bytes, more than its cap of {cap}"
    return "empty body frame"
