"""runner.wire.frames: bytes to frames, whatever the split and whatever the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.wire.frames import (
    BODY,
    END,
    FAULT,
    HEAD,
    HEADER_SIZE,
    INVALID,
    MAX_BODY,
    MAX_FAULT,
    MAX_HEAD,
    READY,
    TO_HOST,
    Frame,
    FrameDecoder,
    encode,
    pack_header,
)

numbers = st.integers(0, 0xFFFFFFFF)
frames = st.one_of(
    st.tuples(st.just(BODY), numbers, st.binary(min_size=1, max_size=2000)),
    st.tuples(st.sampled_from([HEAD, FAULT]), numbers, st.binary(max_size=2000)),
    st.tuples(st.just(READY), numbers, st.binary(max_size=64)),
    st.tuples(st.just(END), numbers, st.just(b"")),
)


def joined(found: list[Frame]) -> list[Frame]:
    """The frames with neighboring pieces of a job's body put together: how they come is the stream's affair."""
    whole: list[Frame] = []
    for kind, job, payload in found:
        if kind == BODY and whole and whole[-1][:2] == (BODY, job):
            whole[-1] = (BODY, job, whole[-1][2] + payload)
        else:
            whole.append((kind, job, payload))
    return whole


def test_bodies_that_come_together_are_one() -> None:
    """T10, I14: a reader that lags behind catches up; the bodies of two jobs stay two."""
    data = b"".join(encode(BODY, job, bytes([job]) * 3) for job in (1, 1, 2, 2, 2)) + encode(END, 2)
    assert FrameDecoder(TO_HOST).feed(data) == [(BODY, 1, b"\1" * 6), (BODY, 2, b"\2" * 9), (END, 2, b"")]


def feed_split(decoder: FrameDecoder, data: bytes, cuts: list[int]) -> list[Frame]:
    found: list[Frame] = []
    at = 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        found += decoder.feed(data[at:cut])
        at = cut
    return found


@given(st.lists(frames, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=30))
def test_any_split_gives_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    """I14: any split of a valid byte stream gives the same frames."""
    decoder = FrameDecoder(TO_HOST)
    found = feed_split(decoder, b"".join(encode(*frame) for frame in sent), cuts)
    assert joined(found) == joined(sent)
    assert decoder.clean


@given(st.lists(frames, min_size=1, max_size=5))
def test_byte_by_byte(sent: list[Frame]) -> None:
    """I14: the smallest split of all."""
    decoder = FrameDecoder(TO_HOST)
    found = [frame for byte in b"".join(encode(*frame) for frame in sent) for frame in decoder.feed(bytes([byte]))]
    assert joined(found) == joined(sent)


@settings(max_examples=500)
@given(st.binary(max_size=4000), st.lists(st.integers(0, 4000), max_size=10))
def test_no_bytes_crash_or_grow_the_decoder(data: bytes, cuts: list[int]) -> None:
    """I14: no invalid byte stream hangs, crashes or grows the host."""
    decoder = FrameDecoder(TO_HOST)
    found = feed_split(decoder, data, cuts)
    assert sum(len(payload) for kind, _, payload in found if kind != INVALID) <= len(data)
    invalid = [frame for frame in found if frame[0] == INVALID]
    assert len(invalid) <= 1
    if invalid:
        assert found[-1] == invalid[0]
        assert decoder.feed(encode(END, 1)) == []
        assert not decoder.clean
    assert len(decoder._partial) <= len(data)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_the_place_of_the_fault_does_not_depend_on_the_split(data: bytes, cuts: list[int]) -> None:
    """I14: a stream that turns invalid gives the same good bytes before, however it is split."""

    def outcome(found: list[Frame]) -> tuple[bytes, list[Frame]]:
        return b"".join(f[2] for f in found if f[0] == BODY), [f for f in found if f[0] != BODY]

    valid = encode(HEAD, 1, b"head") + encode(BODY, 1, b"body")
    one = FrameDecoder(TO_HOST).feed(valid + data)
    split = feed_split(FrameDecoder(TO_HOST), valid + data, cuts)
    assert outcome(one) == outcome(split)


@pytest.mark.parametrize(("kind", "cap"), [(HEAD, MAX_HEAD), (BODY, MAX_BODY), (FAULT, MAX_FAULT), (END, 1)])
def test_a_length_over_the_cap_is_refused_from_the_header_alone(kind: int, cap: int) -> None:
    """I14: a 4 GiB length is refused before a byte of it came, and nothing is allocated for it."""
    for length in (cap + 1, 0xFFFFFFFF):
        found = FrameDecoder(TO_HOST).feed(pack_header(kind, 1, length))
        assert [frame[0] for frame in found] == [INVALID]
        assert str(length).encode() in found[0][2]


def test_an_unknown_kind_and_an_empty_body_are_refused() -> None:
    """I14: frames that no honest worker sends."""
    assert FrameDecoder(TO_HOST).feed(pack_header(99, 1, 0))[0][0] == INVALID
    assert FrameDecoder(TO_HOST).feed(pack_header(BODY, 1, 0))[0][0] == INVALID


def test_body_bytes_come_out_before_their_frame_is_whole() -> None:
    """T10: no token is held back for the rest of its frame."""
    decoder = FrameDecoder(TO_HOST)
    assert decoder.feed(pack_header(BODY, 3, 10) + b"first") == [(BODY, 3, b"first")]
    assert not decoder.clean
    assert decoder.feed(b"later") == [(BODY, 3, b"later")]
    assert decoder.clean


def test_a_dribbled_head_is_held_in_one_buffer() -> None:
    """I14: a head that comes byte by byte costs its own size, and is given once."""
    decoder = FrameDecoder(TO_HOST)
    frame = encode(HEAD, 1, b"h" * 10_000)
    for at in range(len(frame) - 1):
        assert decoder.feed(frame[at : at + 1]) == []
        assert len(decoder._partial) <= HEADER_SIZE + 10_000
    assert decoder.feed(frame[-1:]) == [(HEAD, 1, b"h" * 10_000)]
