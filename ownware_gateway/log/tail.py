"""The newest events of the streams in use, in memory, and those who wait for more.

Two hundred followers of one run then cost one encoding and no read of the database. Nothing here
is needed to be right: a follower that finds nothing in a tail reads the database.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ownware_gateway import sse
from ownware_gateway.log import CHUNK_BYTES_MAX, Chunk, Record, Stream

#: What the tail of one stream holds at most, before its older half is let go.
TAIL_BYTES_MAX: Final = 1_048_576

#: How many streams may have a tail at once; the one longest untouched is let go first.
STREAMS_MAX: Final = 512

#: Followers of one stream share at most so many chunks; they are mostly at the same cursor.
CHUNKS_MAX: Final = 16

#: After one of these a stream may be silent for long, so its tail is kept for followers only.
_RESTS: Final = frozenset({"session.end", "permission.request"})

#: What a run's last event can be: what was removed may have held its end.
_MAY_END_A_RUN: Final = frozenset({"session.end", "stream.gap"})

#: Bytes that a record takes beside its payload, roughly.
_RECORD_BYTES: Final = 200


class Tail:
    """The newest events of one stream, and the futures of those who wait for the next."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.head: int | None = None
        self.resting = True
        self.waiters: set[asyncio.Future[None]] = set()
        self._records: list[Record] = []
        self._bytes = 0
        self._chunks: dict[int, Chunk] = {}

    def add(self, records: Sequence[Record]) -> None:
        """Take events that were just committed and wake everyone who waits."""
        if self.head is not None and records[0].seq != self.head + 1:
            self._records, self._bytes = [], 0
        self._records += records
        self._bytes += sum(len(item.payload) + _RECORD_BYTES for item in records)
        while self._bytes > TAIL_BYTES_MAX:
            self._records = self._records[len(self._records) // 2 + 1 :]
            self._bytes = sum(len(item.payload) + _RECORD_BYTES for item in self._records)
        self.head = records[-1].seq
        self.resting = records[-1].type in _RESTS
        self._chunks.clear()
        self.wake()

    def wake(self) -> None:
        """End every wait; a wake-up carries no data."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def holds(self, after: int) -> bool:
        """Whether all events above a cursor are here."""
        if self._records:
            return self._records[0].seq <= after + 1
        return self.head is not None and after >= self.head

    def chunk(self, after: int) -> Chunk | None:
        """Return the frames above a cursor that `holds`; the same chunk to all who ask."""
        chunk = self._chunks.get(after)
        if chunk is None and self._records and after < self._records[-1].seq:
            start = after + 1 - self._records[0].seq
            if len(self._chunks) >= CHUNKS_MAX:
                self._chunks.clear()
            chunk = self._chunks[after] = join_frames(self.epoch, self._records[start:])
        return chunk


class Tails:
    """The tails of all streams in use."""

    def __init__(self) -> None:
        self._tails: OrderedDict[Stream, Tail] = OrderedDict()

    def get(self, stream: Stream) -> Tail | None:
        """Return the stream's tail, if it has one."""
        return self._tails.get(stream)

    def open(self, stream: Stream, epoch: str) -> Tail:
        """Return the stream's tail, made if there is none."""
        tail = self._tails.get(stream)
        if tail is None:
            tail = self._tails[stream] = Tail(epoch)
            self._let_go()
        return tail

    def add(self, stream: Stream, epoch: str, records: Sequence[Record]) -> None:
        """Take committed events; a stream at rest that nobody waits for needs no tail."""
        tail = self.open(stream, epoch)
        tail.add(records)
        self._tails.move_to_end(stream)
        self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """Let the tail go if nobody waits and nothing is coming."""
        tail = self._tails.get(stream)
        if tail is not None and tail.resting and not tail.waiters:
            del self._tails[stream]

    def drop(self, stream: Stream) -> None:
        """Forget a stream that has been deleted; whoever waits looks again and finds it gone."""
        tail = self._tails.pop(stream, None)
        if tail is not None:
            tail.wake()

    def clear(self) -> None:
        """Forget what all tails hold; whoever waits looks again, in the database."""
        tails, self._tails = self._tails, OrderedDict()
        for tail in tails.values():
            tail.wake()

    def wake(self) -> None:
        """End every wait on every stream."""
        for tail in self._tails.values():
            tail.wake()

    def _let_go(self) -> None:
        for stream, tail in list(self._tails.items())[: max(0, len(self._tails) - STREAMS_MAX)]:
            if not tail.waiters:
                del self._tails[stream]


def join_frames(epoch: str, records: Sequence[Record]) -> Chunk:
    """Return as many of the records as fit into one chunk, as frames."""
    frames: list[bytes] = []
    size = 0
    ends_run = False
    last = records[0]
    for record in records:
        frame = sse.frame(f"{epoch}.{record.seq}", record.type, record.payload)
        size += len(frame)
        if frames and size > CHUNK_BYTES_MAX:
            break
        frames.append(frame)
        last = record
        if record.type in _MAY_END_A_RUN:
            ends_run = True
            break
    return Chunk(b"".join(frames), last.seq, ends_run)
