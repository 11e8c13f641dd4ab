"""Server-sent events: the bytes of a frame, and a parser for those who read them.

The format is WHATWG HTML, section 9.2; the frame itself is set in docs/protocol.md.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

KEEP_ALIVE: Final = b": keep-alive\n\n"

#: More than this in one block is no frame, and must not fill the memory.
BLOCK_BYTES_MAX: Final = 64 * 1_048_576

_RETRY_DIGITS_MAX: Final = 9


def frame(event_id: str, event_type: str, data: bytes) -> bytes:
    r"""Return one log event as a frame; `data` is one line of JSON, the frame ends with `\n\n`."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), event_type.encode(), data)


class Sent(NamedTuple):
    """One log event as `frame` wrote it; `id` and `data` are as they went in."""

    id: bytes
    type: bytes
    data: bytes


def split(frames: bytes) -> Iterator[Sent]:
    """Yield the log events of frames that `frame` wrote, for whoever has them in another form."""
    for block in frames.split(b"\n\n")[:-1]:
        event_id, event_type, data = block.split(b"\n", 2)
        # Behind `id: `, `event: ` and `data: `.
        yield Sent(event_id[4:], event_type[7:], data[6:])


def envelope(event_type: str, fields: dict[str, Any], *, retry_ms: int | None = None) -> bytes:
    """Return a frame about the stream itself: it has no id, so it never moves a cursor."""
    data = json.dumps({"type": event_type, **fields}, separators=(",", ":"), ensure_ascii=False)
    retry = b"" if retry_ms is None else b"retry: %d\n" % retry_ms
    return retry + b"event: %b\ndata: %b\n\n" % (event_type.encode(), data.encode())


class Frame(NamedTuple):
    """One parsed frame; `id` is None where the frame carried none."""

    id: str | None
    event: str
    data: str


class Parser:
    r"""Turns the bytes of a stream, cut anywhere, into frames.

    A block that the connection cut off is dropped with the parser, as the standard wants it. Line
    ends may be `\n`, `\r\n` or `\r`.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._after_cr = False
        self._at_start = True
        self._block_bytes = 0
        self._id: str | None = None
        self._event = ""
        self._data: list[str] = []
        self.retry_ms: int | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes at once; return the frames that they complete.

        Raises ValueError for a block of more than BLOCK_BYTES_MAX bytes.
        """
        if self._after_cr and data:
            # The line ended at the \r already; this may be the other half of a \r\n.
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if not data:
            return iter(())
        self._after_cr = data.endswith(b"\r")
        if self._block_bytes + len(self._rest) > BLOCK_BYTES_MAX:
            raise ValueError(f"an event of more than {BLOCK_BYTES_MAX} bytes")
        self._rest += data
        if b"\n" not in data and b"\r" not in data:
            return iter(())
        *lines, rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest
        return iter([frame for line in lines if (frame := self._line(line)) is not None])

    def _line(self, line: bytearray) -> Frame | None:
        text = line.decode("utf-8", "replace")
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if text:
            self._block_bytes += len(line)
            self._field(text)
            return None
        frame = Frame(self._id, self._event or "message", "\n".join(self._data))
        complete = bool(self._data)
        self._id, self._event, self._data, self._block_bytes = None, "", [], 0
        return frame if complete else None

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and re.fullmatch(r"[0-9]+", value):
            self.retry_ms = int(value[:_RETRY_DIGITS_MAX])
