"""The newest events of the streams in use, in memory, and those who wait for more.

Two hundred followers of one run then cost one encoding and no read of the database. Nothing here
is needed to be right: a follower that finds nothing in a tail reads the database.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ownware_gateway import sse
from ownware_gateway.events import ASKING
from ownware_gateway.log import CHUNK_BYTES_MAX, Chunk, Record, Stream

#: What the tail of one stream holds at most, before its older half is let go.
TAIL_BYTES_MAX: Final = 1_048_576

#: How many streams may have a tail at once; the one longest untouched is let go first.
STREAMS_MAX: Final = 512

#: What all tails together hold at most; the ones longest untouched let go first.
TAILS_BYTES_MAX: Final = 67_108_864

#: A stream at rest keeps its newest events for so long: those who follow it have read them by then.
REST_S: Final = 1.0

#: Followers of one stream share at most so many chunks; they are mostly at the same cursor.
CHUNKS_MAX: Final = 16

#: After one of these a stream may be silent for long.
_RESTS: Final = ASKING | {"agent.spawn", "session.end"}

#: What a run's last event can be: what was removed may have held its end.
_MAY_END_A_RUN: Final = frozenset({"session.end", "stream.gap"})

#: Bytes that a record takes beside its payload, roughly.
_RECORD_BYTES: Final = 200


class Tail:
    """The newest events of one stream, and the futures of those who wait for the next."""

    __slots__ = ("_chunks", "_records", "epoch", "head", "resting", "size_bytes", "waiters")

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.head: int | None = None
        self.resting = True
        self.waiters: set[asyncio.Future[bool]] = set()
        self.size_bytes = 0
        self._records: list[Record] | None = None
        self._chunks: dict[int, Chunk] | None = None

    def add(self, records: Sequence[Record]) -> None:
        """Take events that were just committed and wake everyone who waits."""
        if self._records is None or (self.head is not None and records[0].seq != self.head + 1):
            self._records = []
            self.size_bytes = 0
        self._records += records
        self.size_bytes += _size_bytes(records)
        while self.size_bytes > TAIL_BYTES_MAX:
            self._records = self._records[len(self._records) // 2 + 1 :]
            self.size_bytes = _size_bytes(self._records)
        self.head = records[-1].seq
        self.resting = records[-1].type in _RESTS
        self._chunks = None
        self.wake()

    def let_go(self) -> None:
        """Forget the events; they are in the database."""
        self._records = self._chunks = None
        self.size_bytes = 0

    def wake(self) -> None:
        """End every wait; a wake-up carries no data."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(True)

    def holds(self, after: int) -> bool:
        """Whether all events above a cursor are here."""
        if self._records:
            return self._records[0].seq <= after + 1
        return self.head is not None and after >= self.head

    def chunk(self, after: int) -> Chunk | None:
        """Return the frames above a cursor that `holds`; the same chunk to all who ask."""
        if not self._records or after >= self._records[-1].seq:
            return None
        if self._chunks is None or len(self._chunks) >= CHUNKS_MAX:
            self._chunks = {}
        chunk = self._chunks.get(after)
        if chunk is None:
            start = after + 1 - self._records[0].seq
            chunk = self._chunks[after] = join_frames(self.epoch, self._records[start:])
        return chunk


class Tails:
    """The tails of all streams in use, the one longest untouched first."""

    def __init__(self) -> None:
        self._tails: OrderedDict[Stream, Tail] = OrderedDict()
        self.size_bytes = 0

    def get(self, stream: Stream) -> Tail | None:
        """Return the stream's tail, if it has one."""
        return self._tails.get(stream)

    def open(self, stream: Stream, epoch: str) -> Tail:
        """Return the stream's tail, made if there is none."""
        tail = self._tails.get(stream)
        if tail is None:
            tail = self._tails[stream] = Tail(epoch)
            self._make_room()
        return tail

    def add(self, stream: Stream, epoch: str, records: Sequence[Record]) -> None:
        """Take committed events."""
        tail = self.open(stream, epoch)
        self.size_bytes -= tail.size_bytes
        tail.add(records)
        self.size_bytes += tail.size_bytes
        self._tails.move_to_end(stream)
        if self.size_bytes > TAILS_BYTES_MAX:
            self._let_oldest_go()

    def rest(self, stream: Stream) -> None:
        """Let the events of a stream go that is at rest, and its tail if nobody waits."""
        tail = self._tails.get(stream)
        if tail is not None and tail.resting:
            self._let_go(tail)
            self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """Let an empty tail go if nobody waits and nothing is coming."""
        tail = self._tails.get(stream)
        if tail is not None and tail.resting and not tail.waiters and not tail.size_bytes:
            del self._tails[stream]

    def drop(self, stream: Stream) -> None:
        """Forget a stream that has been deleted; whoever waits looks again and finds it gone."""
        tail = self._tails.pop(stream, None)
        if tail is not None:
            self._let_go(tail)
            tail.wake()

    def clear(self) -> None:
        """Forget what all tails hold; whoever waits looks again, in the database."""
        tails, self._tails, self.size_bytes = self._tails, OrderedDict(), 0
        for tail in tails.values():
            tail.wake()

    def wake(self) -> None:
        """End every wait on every stream."""
        for tail in self._tails.values():
            tail.wake()

    def _let_go(self, tail: Tail) -> None:
        self.size_bytes -= tail.size_bytes
        tail.let_go()

    def _let_oldest_go(self) -> None:
        for tail in self._tails.values():
            if self.size_bytes <= TAILS_BYTES_MAX:
                return
            self._let_go(tail)

    def _make_room(self) -> None:
        for stream, tail in list(self._tails.items())[: max(0, len(self._tails) - STREAMS_MAX)]:
            if not tail.waiters:
                self._let_go(tail)
                del self._tails[stream]


def _size_bytes(records: Sequence[Record]) -> int:
    return sum(len(record.payload) + _RECORD_BYTES for record in records)


def give_up(waiter: asyncio.Future[bool]) -> None:
    """End one wait: its time is over."""
    if not waiter.done():
        waiter.set_result(False)


def join_frames(epoch: str, rows: Sequence[tuple[int, str, bytes]]) -> Chunk:
    """Return as many of the records, or of the rows that they stand in, as fit into one chunk."""
    frames: list[bytes] = []
    size = 0
    last_seq = 0
    for seq, event_type, payload in rows:
        frame = sse.frame(f"{epoch}.{seq}", event_type, payload)
        size += len(frame)
        if size > CHUNK_BYTES_MAX and frames:
            break
        frames.append(frame)
        last_seq = seq
        if event_type in _MAY_END_A_RUN:
            return Chunk(b"".join(frames), last_seq, ends_run=True)
    return Chunk(b"".join(frames), last_seq, ends_run=False)
