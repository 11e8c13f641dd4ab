from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from ownware_gateway import sse
from ownware_gateway.sse import KEEP_ALIVE, Frame, Parser, envelope, frame


def parse(*chunks: bytes) -> list[Frame]:
    parser = Parser()
    return [found for chunk in chunks for found in parser.feed(chunk)]


def test_a_frame_has_exactly_these_bytes() -> None:
    data = '{"type":"text.delta","text":"é","seq":7}'.encode()
    assert frame("k3.7", "text.delta", data) == (
        b'id: k3.7\nevent: text.delta\ndata: {"type":"text.delta","text":"\xc3\xa9","seq":7}\n\n'
    )


def test_an_envelope_has_no_id_and_its_type_comes_first() -> None:
    assert envelope("stream.start", {"threadId": "t", "since": 0}) == (
        b'event: stream.start\ndata: {"type":"stream.start","threadId":"t","since":0}\n\n'
    )


def test_an_envelope_can_say_when_to_come_back() -> None:
    assert envelope("done", {"status": "é\n"}, retry_ms=1500) == (
        b'retry: 1500\nevent: done\ndata: {"type":"done","status":"\xc3\xa9\\n"}\n\n'
    )


def test_what_is_written_is_what_is_read() -> None:
    stream = (
        envelope("stream.start", {"a": "x\r\ny"}, retry_ms=2000)
        + KEEP_ALIVE
        + frame("e.1", "text.delta", b'{"text":": \\n"}')
        + frame("e.2", "session.end", b"{}")
    )
    parser = Parser()
    assert list(parser.feed(stream)) == [
        Frame(None, "stream.start", '{"type":"stream.start","a":"x\\r\\ny"}'),
        Frame("e.1", "text.delta", '{"text":": \\n"}'),
        Frame("e.2", "session.end", "{}"),
    ]
    assert parser.retry_ms == 2000


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_three_ways(end: str) -> None:
    block = end.join(["event: a", "data: 1", "data: 2", "", "data: 3", "", ""])
    assert parse(block.encode()) == [Frame(None, "a", "1\n2"), Frame(None, "message", "3")]


def test_a_frame_is_there_as_soon_as_its_last_byte_is() -> None:
    assert parse(b"data: 1\r\r") == [Frame(None, "message", "1")]
    parser = Parser()
    assert list(parser.feed(b"data: 1\r\n\r")) == [Frame(None, "message", "1")]
    assert list(parser.feed(b"\ndata: 2\n\n")) == [Frame(None, "message", "2")]


def test_half_of_a_line_end_makes_no_empty_line() -> None:
    assert parse(b"data: 1\r", b"\ndata: 2\r", b"", b"\n\r", b"\n") == [
        Frame(None, "message", "1\n2")
    ]


@pytest.mark.parametrize(
    ("block", "frames"),
    [
        ("data\n\n", [Frame(None, "message", "")]),
        ("data:\n\n", [Frame(None, "message", "")]),
        ("data:x\n\n", [Frame(None, "message", "x")]),
        ("data:  x \n\n", [Frame(None, "message", " x ")]),
        ("data: a:b\n\n", [Frame(None, "message", "a:b")]),
        ("data: a\ndata\ndata: b\n\n", [Frame(None, "message", "a\n\nb")]),
        ("id\ndata: x\n\n", [Frame("", "message", "x")]),
        ("id: a\0b\ndata: x\n\n", [Frame(None, "message", "x")]),
        ("id: 1\nid: 2\nevent: a\nevent: b\ndata: x\n\n", [Frame("2", "b", "x")]),
        ("id: 1\nevent: a\n\ndata: x\n\n", [Frame(None, "message", "x")]),
        (": data: no\n:\n\n", []),
        ("\n\n\n", []),
        ("Data: x\nunknown: y\n data: z\n\n", []),
        ("\ufeffdata: x\n\n\ufeffdata: y\n\n", [Frame(None, "message", "x")]),
        ("data: [DONE]\n\n", [Frame(None, "message", "[DONE]")]),
    ],
)
def test_blocks_are_read_as_the_standard_says(block: str, frames: list[Frame]) -> None:
    assert parse(block.encode()) == frames


@pytest.mark.parametrize("cut", ["data: x", "data: x\n", "id: 1\ndata: x\n", "data: x\r\n"])
def test_a_block_that_was_cut_off_is_no_frame(cut: str) -> None:
    assert parse(cut.encode()) == []


@pytest.mark.parametrize(
    ("line", "retry_ms"),
    [
        ("retry: 1500", 1500),
        ("retry:0", 0),
        ("retry", None),
        ("retry: -1", None),
        ("retry: 1.5", None),
        ("retry: 1s", None),
        ("retry: ٣", None),
        ("retry: " + "9" * 5000, 999_999_999),
    ],
)
def test_when_to_come_back_is_a_plain_number(line: str, retry_ms: int | None) -> None:
    parser = Parser()
    assert list(parser.feed(line.encode() + b"\n\n")) == []
    assert parser.retry_ms == retry_ms


def test_bytes_that_are_not_utf_8_break_nothing() -> None:
    assert parse(b"data: \xff\xfe\n\ndata: \xc3", b"\xa9\n\n") == [
        Frame(None, "message", "\ufffd\ufffd"),
        Frame(None, "message", "é"),
    ]


def test_bytes_are_taken_even_if_nobody_looks_at_the_frames() -> None:
    parser = Parser()
    parser.feed(b"data: 1\n\ndata: 2\n")
    assert list(parser.feed(b"data: 3\n\n")) == [Frame(None, "message", "2\n3")]


@pytest.mark.parametrize("chunk", [b"x" * 40, b"data: x\n" * 5])
def test_a_block_without_end_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, chunk: bytes
) -> None:
    monkeypatch.setattr(sse, "BLOCK_BYTES_MAX", 100)
    parser = Parser()
    for _ in range(3):
        parser.feed(chunk)
    with pytest.raises(ValueError, match="an event of more than 100 bytes"):
        parser.feed(chunk)


def test_any_number_of_blocks_may_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "BLOCK_BYTES_MAX", 100)
    parser = Parser()
    for _ in range(10):
        assert len(list(parser.feed(b"data: 12345678\n\n" * 20))) == 20


PIECES = st.sampled_from(
    [
        *["data: a", "data:", "id: 1", "event: b", ": c", "retry: 5", "é", "\ufeff", "\0", ":"],
        *["\n", "\r", "\r\n", "\n\n", "\r\r", "\r\n\r\n"],
    ]
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=30), st.lists(st.integers(0, 200), max_size=6))
def test_a_stream_cut_anywhere_is_the_same_stream(
    pieces: Sequence[str], cuts: Sequence[int]
) -> None:
    stream = "".join(pieces).encode()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    whole = parse(stream)
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == whole
    assert parse(*(stream[a:b] for a, b in pairwise(edges))) == whole


@settings(deadline=None)
@given(st.lists(PIECES, max_size=30))
def test_line_ends_make_no_difference(pieces: Sequence[str]) -> None:
    stream = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
    whole = parse(stream.encode())
    assert parse(stream.replace("\n", "\r\n").encode()) == whole
    assert parse(stream.replace("\n", "\r").encode()) == whole
