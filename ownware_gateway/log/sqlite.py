"""The log in one SQLite file, reached through aiosqlite.

One connection writes (writer.py). A few connections read, a page at a time, each cursor finished
before its rows go anywhere: an open one would keep the write-ahead log from being emptied.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiosqlite

from ownware_gateway.errors import BootError
from ownware_gateway.events import Event
from ownware_gateway.log import (
    CHUNK_BYTES_MAX,
    ROOT,
    Append,
    Chunk,
    Drives,
    Gone,
    Head,
    IdempotencyKey,
    KeptStart,
    Permission,
    Record,
    Refused,
    RestsOn,
    Retention,
    Run,
    RunQuery,
    Spent,
    Stream,
    Thread,
    ThreadQuery,
    Tombstone,
)
from ownware_gateway.log.appends import INBOX_STREAM, Appending, count_active, kept_start_of
from ownware_gateway.log.group import (
    ACTIVE_RUN,
    PERMISSION_BY_ID,
    RUN_BY_ID,
    GroupConnection,
    TakenOver,
    Work,
    is_of_the_database,
    permission_of,
    run_of,
)
from ownware_gateway.log.statements import statements
from ownware_gateway.log.tail import REST_S, Tail, Tails, give_up, join_frames
from ownware_gateway.log.upkeep import adopt, delete, fork, prune
from ownware_gateway.log.writer import CACHE_KIB, RETRY_S, Commit, Writer

#: Connections that read; each is a thread, and two cores can use two.
READERS: Final = 2

#: A page of events; deltas are small, and about so many fit into one chunk.
PAGE_ROWS_MAX: Final = 500

#: A read is tried so often before whoever asked is told that it fails.
READ_TRIES: Final = 5

_SQL: Final = statements()

#: Named, for the planner goes over every run there ever was to have them in the order of the table.
_UNFINISHED_COLUMNS: Final = _SQL["run_columns"].replace(
    "FROM runs", "FROM runs INDEXED BY one_run_at_a_time"
)

#: Named for the same reason: a thread may have had very many runs.
_PENDING_IN_THREAD_COLUMNS: Final = _SQL["permission_columns"].replace(
    "JOIN runs", "JOIN runs INDEXED BY one_run_at_a_time"
)

_log: Final = logging.getLogger(__name__)


class PageCursor(sqlite3.Cursor):
    """A cursor whose `fetchall` stops at a chunk's worth of payloads, so that memory stays flat."""

    def fetchall(self) -> list[Any]:
        """Return rows until their last column sums up to a chunk; at least one if there is one."""
        rows: list[Any] = []
        size = 0
        for row in self:
            rows.append(row)
            size += len(row[-1]) if isinstance(row[-1], bytes) else 0
            if size >= CHUNK_BYTES_MAX:
                break
        return rows


class ReadConnection(sqlite3.Connection):
    """A connection that only reads."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Execute with a cursor that keeps pages small; by itself it would make a plain one."""
        return self.cursor(PageCursor).execute(sql, parameters)


class SqliteLog:
    """The contract of `ownware_gateway.log`, in a file."""

    def __init__(self, path: Path, clock_ms: Callable[[], int]) -> None:
        self._path = path
        self._writer = Writer(path, clock_ms, self._publish)
        self._readers: list[aiosqlite.Connection] = []
        self._next_reader = itertools.count()
        self._tails = Tails()
        self._log_id = ""
        self.secret = b""

    @classmethod
    async def open(cls, path: Path, clock_ms: Callable[[], int]) -> "SqliteLog":
        """Open the log, making or upgrading its file.

        Raises BootError when the file is from a newer version or is no log.
        """
        log = cls(path, clock_ms)
        try:
            await log._open()
        except (sqlite3.DatabaseError, OSError) as error:
            await log.close()
            reason = error.strerror if isinstance(error, OSError) else error
            raise BootError(
                f"The log {path.name} cannot be opened: {reason}. See `ownware doctor`."
            ) from error
        except BaseException:
            await log.close()
            raise
        return log

    async def _open(self) -> None:
        meta = await self._writer.open()
        self._log_id = meta["log_id"]
        self.secret = bytes.fromhex(meta["secret"])
        for _ in range(READERS):
            reader = await aiosqlite.connect(
                self._path, factory=ReadConnection, isolation_level=None
            )
            self._readers.append(reader)
            for pragma in ("query_only=ON", "wal_autocheckpoint=0", f"cache_size={CACHE_KIB}"):
                await reader.execute(f"PRAGMA {pragma}")

    def _publish(self, work: Work) -> None:
        for stream, records in work.appended:
            tail = self._tail(stream)
            self._tails.add(stream, tail.epoch, records)
            if tail.resting:
                asyncio.get_running_loop().call_later(REST_S, self._tails.rest, stream)

    def append(self, append: Append) -> Commit:
        """Take events to be committed with the next group, in the order of the calls."""
        return self._writer.take(Appending(append))

    async def begin(self, append: Append) -> Run:
        """Append what a run starts with; return the run as it is then."""
        work = Appending(append)
        await self._writer.take(work).wait()
        assert work.started is not None, append.guard
        return work.started

    async def take_over(self, run_id: str) -> Run:
        """Raise the run's generation, so that whoever drove it can write nothing more."""

        def do(connection: GroupConnection, _: int) -> Run | None:
            connection.run("take_over", run_id)
            return connection.find_run(run_id)

        run = await self._writer.do(do)
        assert run is not None
        return run

    async def park(
        self,
        guard: Drives,
        rests_on: RestsOn,
        *,
        agents: int,
        cancelled: bool,
        active_ms: int | None = None,
    ) -> bool:
        """Note that a run has no task, and what it waits for; False if it has something to do."""
        seen = {"rests_on": rests_on, "agents": agents, "cancelled": cancelled}

        def do(connection: GroupConnection, now: int) -> bool:
            row = connection.one("fence", guard.run_id)
            if row is None or row[1] or row[0] != guard.generation:
                raise Refused(connection.find_run(guard.run_id))
            if active_ms is not None:
                count_active(connection, guard.run_id, now, Spent(active_ms=active_ms))
            return connection.run("park", run_id=guard.run_id, **seen) > 0

        return await self._writer.do(do)

    async def ready(self, thread_id: str) -> list[str]:
        """Return the unfinished runs of a thread that have something to do, oldest first."""
        return [run_id for (run_id,) in await self._rows(_SQL["ready"], (thread_id,))]

    async def agents_below(self, run_id: str) -> int:
        """Return how many agents a run, and its agents in turn, have begun."""
        ((count,),) = await self._rows(_SQL["agents_below"], (run_id,))
        return int(count)

    async def charge(self) -> None:
        """Count a death for every run that was under way when the last process ended."""

        def do(connection: GroupConnection, _: int) -> None:
            connection.run("charge")
            connection.run("rest")

        await self._writer.do(do)

    async def rest(self) -> None:
        """Note that no run is under way: the process ends in good order."""
        with contextlib.suppress(TakenOver):
            await self._writer.do(lambda db, _: db.run("rest"))

    async def kept_start(self, key: IdempotencyKey) -> KeptStart | None:
        """Return what was started with this key before."""
        rows = await self._rows(_SQL["kept_start"], (key.caller, key.route, key.key))
        return kept_start_of(rows[0], await self.run(rows[0][1])) if rows else None

    async def make_thread(self, thread_id: str, *, title: str, profile_id: str | None) -> Thread:
        """Make an empty thread, whose root stream can be followed already."""
        row = {"id": thread_id, "title": title, "profile_id": profile_id, "model": None}

        def do(connection: GroupConnection, now: int) -> None:
            connection.run("add_thread", **row, now=now)
            connection.run("add_stream", ROOT, thread_id)

        await self._writer.do(do)
        return await self._made(thread_id)

    async def rename(self, thread_id: str, title: str) -> None:
        """Give the thread another title."""
        await self._writer.do(lambda db, now: db.run("rename", title, now, thread_id))

    async def fork(self, thread_id: str, at_seq: int, new_id: str) -> Thread:
        """Make a thread whose root stream begins as a copy of another's up to a number."""
        stream = Stream(thread_id)
        await self._writer.do(lambda db, now: fork(db, now, stream, at_seq, new_id))
        return await self._made(new_id)

    async def adopt(self, thread_id: str, title: str, events: Sequence[Event]) -> Thread:
        """Make a thread of events from elsewhere: history that is never driven."""
        await self._writer.do(lambda db, now: adopt(db, now, thread_id, title, events))
        return await self._made(thread_id)

    async def _made(self, thread_id: str) -> Thread:
        thread = await self.thread(thread_id)
        assert thread is not None
        return thread

    async def delete(self, thread_id: str, by: str) -> list[str]:
        """Remove every trace of a thread but its name; return the threads forked from it.

        Raises Refused while a run is under way. The bytes of what was deleted are gone from the
        file and from the write-ahead log before this returns; it takes some seconds for each GB.
        """
        agents = await self.agents(thread_id)
        forks = await self._writer.do(lambda db, now: delete(db, now, thread_id, by))
        for agent_id, _ in agents:
            self._tails.drop(Stream(thread_id, agent_id))
        # What the thread asked people is gone from there, too.
        self._tails.drop(INBOX_STREAM)
        await self._writer.scrub()
        return forks

    async def tombstone(self, thread_id: str) -> Tombstone | None:
        """Return what is left of a deleted thread."""
        rows = await self._rows(_SQL["tombstone"], (thread_id,))
        return Tombstone(*rows[0]) if rows else None

    async def prune(self, policy: Retention) -> int:
        """Remove some of what need not be kept; return how many events, 0 when nothing is left."""
        gone = await self._writer.do(lambda db, now: prune(db, now, policy))
        if gone:
            # Everybody reads the gap, nobody what memory still holds.
            self._tails.clear()
        return gone

    def _tail(self, stream: Stream) -> Tail:
        return self._tails.get(stream) or self._tails.open(stream, self._epoch(stream))

    def _epoch(self, stream: Stream) -> str:
        """Return the stream's name in this log: short, and another one in any other log."""
        text = f"{self._log_id}\0{stream.thread_id}\0{stream.agent_id}"
        return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()

    async def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        tries = 0
        while True:
            reader = self._readers[next(self._next_reader) % len(self._readers)]
            try:
                return list(await reader.execute_fetchall(sql, parameters))
            except sqlite3.Error as error:
                tries += 1
                if tries == READ_TRIES or not is_of_the_database(error):
                    raise
                await asyncio.sleep(RETRY_S * 2**tries)

    async def _stream_key(self, stream: Stream) -> int | None:
        rows = await self._rows(_SQL["stream"], (stream.thread_id, stream.agent_id))
        return rows[0][0] if rows else None

    async def head(self, stream: Stream) -> Head | None:
        """Return what is known of the stream; None when there is no such stream."""
        rows = await self._rows(_SQL["head"], (stream.thread_id, stream.agent_id))
        if not rows:
            return None
        last, earliest = rows[0]
        return Head(self._epoch(stream), last + 1 if earliest is None else earliest, last)

    async def read(
        self, stream: Stream, after: int, *, limit: int = 500, deltas: bool = True
    ) -> list[Record]:
        """Return the events with a seq above `after`, in order, at most `limit`."""
        key = await self._stream_key(stream)
        records: list[Record] = []
        sql = _SQL["records" if deltas else "facts"]
        while key is not None and len(records) < limit:
            rows = await self._rows(sql, (key, after, min(limit - len(records), PAGE_ROWS_MAX)))
            if not rows:
                break
            records += map(Record._make, rows)
            after = records[-1].seq
        return records

    async def private(
        self, stream: Stream, kind: str, *, after: int = 0
    ) -> list[tuple[int, int, bytes]]:
        """Return (seq, index, body) of the private facts of a kind above a seq, in order."""
        key = await self._stream_key(stream)
        facts: list[tuple[int, int, bytes]] = []
        # Names of a kind are "<kind>.00" and so on; "/" is the character after ".".
        lowest, highest = f"{kind}.", f"{kind}/"
        position = (after, highest)
        while key is not None:
            rows = await self._rows(_SQL["private"], (key, lowest, highest, *position))
            if not rows:
                break
            facts += [(seq, int(name.rpartition(".")[2]), body) for seq, name, body in rows]
            position = (rows[-1][0], rows[-1][1])
        return facts

    async def last_summary(self, stream: Stream, to: int) -> tuple[int, bytes] | None:
        """Return (seq, body) of the last private fact `summary` up to a seq."""
        key = await self._stream_key(stream)
        rows = await self._rows(_SQL["last_summary"], (key, to)) if key is not None else []
        return (rows[0][0], rows[0][1]) if rows else None

    async def spent(self, profile_id: str, day: int) -> Spent:
        """Return what a profile's runs have spent in a day of UTC."""
        rows = await self._rows(_SQL["spent"], (profile_id, day))
        return Spent(*rows[0]) if rows else Spent()

    async def private_at(self, stream: Stream, seq: int, kind: str, index: int = 0) -> bytes | None:
        """Return one private fact of an event; None when there is none."""
        key = await self._stream_key(stream)
        rows = await self._rows(_SQL["private_at"], (key, seq, f"{kind}.{index:02d}"))
        return rows[0][0] if rows else None

    async def kept_output(self, stream: Stream, tool_call_id: str) -> bytes | None:
        """Return the whole output of a stream's latest call with this id of which one is kept."""
        rows = await self._rows(_SQL["kept_output"], (await self._stream_key(stream), tool_call_id))
        return rows[0][0] if rows else None

    async def chunk(self, stream: Stream, after: int) -> Chunk | None:
        """Return the next frames after a cursor, as many as fit; None when there are none yet."""
        tail = self._tails.get(stream)
        if tail is not None and tail.holds(after):
            return tail.chunk(after)
        place = (stream.thread_id, stream.agent_id, after, PAGE_ROWS_MAX)
        rows = await self._rows(_SQL["chunk"], place)
        if rows:
            return join_frames(self._epoch(stream), rows)
        if await self._stream_key(stream) is None:
            raise Gone
        return None

    async def gap(self, stream: Stream, after: int) -> int | None:
        """Return the end of the gap that a cursor is inside of; None when it is in none."""
        key = await self._stream_key(stream)
        rows = await self._rows(_SQL["next_event"], (key, after)) if key is not None else []
        if not rows or rows[0][1] != "stream.gap":
            return None
        seq, _, payload = rows[0]
        return seq if json.loads(payload)["fromSeq"] <= after else None

    async def wait(self, stream: Stream, after: int, timeout_s: float) -> bool:
        """Return True once there may be events above `after`; False when the time is over."""
        tail = self._tail(stream)
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        # Registered before the head is looked up: a commit in between wakes it.
        tail.waiters.add(waiter)
        # A timer of the loop's own: a scope for every wait would cost more than all the rest of it.
        timer = loop.call_later(timeout_s, give_up, waiter)
        try:
            if tail.head is None:
                head = await self.head(stream)
                if head is None and await self.tombstone(stream.thread_id) is not None:
                    raise Gone
                if tail.head is None:
                    tail.head = 0 if head is None else head.last
            return tail.head > after or await waiter
        finally:
            timer.cancel()
            tail.waiters.discard(waiter)
            self._tails.leave(stream)

    def wake(self) -> None:
        """End every wait now; for a gateway that is leaving."""
        self._tails.wake()

    async def run(self, run_id: str) -> Run | None:
        """Return a run."""
        rows = await self._rows(RUN_BY_ID, (run_id,))
        return run_of(rows[0]) if rows else None

    async def active_run(self, stream: Stream) -> Run | None:
        """Return the unfinished run of a stream."""
        rows = await self._rows(ACTIVE_RUN, (stream.thread_id, stream.agent_id))
        return run_of(rows[0]) if rows else None

    async def runs(self, query: RunQuery) -> list[tuple[int, Run]]:
        """Return (position, run), newest first."""
        columns = _SQL["run_columns"]
        where: list[str] = ["1"]
        values: list[str] = []
        if query.status == "active":
            columns = _UNFINISHED_COLUMNS
            where.append("runs.terminal_at IS NULL")
        elif query.status is not None:
            where.append("runs.status = ?")
            values.append(query.status)
        if query.thread_id is not None:
            where.append("threads.id = ?")
            values.append(query.thread_id)
        if query.before is not None:
            where.append("runs.key < ?")
            values.append(str(query.before))
        sql = f"{columns} WHERE {' AND '.join(where)} ORDER BY runs.key DESC LIMIT ?"
        rows = await self._rows(sql, (*values, query.limit))
        return [(row[19], run_of(row)) for row in rows]

    async def unfinished(self) -> list[Run]:
        """Return every run that has not ended, oldest first."""
        sql = f"{_UNFINISHED_COLUMNS} WHERE runs.terminal_at IS NULL ORDER BY runs.key"
        return [run_of(row) for row in await self._rows(sql)]

    async def thread(self, thread_id: str) -> Thread | None:
        """Return a thread."""
        rows = await self._rows(_SQL["thread_columns"] + " WHERE threads.id = ?", (thread_id,))
        return _thread_of(rows[0]) if rows else None

    async def threads(self, query: ThreadQuery) -> list[tuple[str, Thread]]:
        """Return (position, thread), most recently changed first."""
        where: list[str] = ["threads.id NOT LIKE '~%'"]
        if not query.hidden:
            where.append("threads.hidden = 0")
        values: list[str] = []
        if query.profile_id is not None:
            where.append("threads.profile_id = ?")
            values.append(query.profile_id)
        if query.before is not None:
            where.append("(threads.updated_at, threads.key) < (?, ?)")
            values += query.before.split(".")
        sql = (
            f"{_SQL['thread_columns']} WHERE {' AND '.join(where)}"
            " ORDER BY threads.updated_at DESC, threads.key DESC LIMIT ?"
        )
        rows = await self._rows(sql, (*values, query.limit))
        return [(f"{row[5]}.{row[10]}", _thread_of(row)) for row in rows]

    async def agents(self, thread_id: str) -> list[tuple[str, int]]:
        """Return (agent id, last seq) of the thread's streams."""
        return [(agent, head) for agent, head in await self._rows(_SQL["agents"], (thread_id,))]

    async def agent_runs(self, thread_id: str) -> dict[str, Run]:
        """Return the latest run of each of the thread's agents, by the agent's id."""
        runs = f"{_SQL['run_columns']} WHERE threads.id = ?"
        spawned = await self._rows(f"{runs} AND runs.parent_key IS NOT NULL", (thread_id,))
        # The thread's own may have had very many; one that was spawned has one.
        own = f"{runs} AND runs.parent_key IS NULL ORDER BY runs.key DESC LIMIT 1"
        return {row[2]: run_of(row) for row in [*spawned, *await self._rows(own, (thread_id,))]}

    async def permission(self, request_id: str) -> Permission | None:
        """Return a question to a person."""
        rows = await self._rows(PERMISSION_BY_ID, (request_id,))
        return permission_of(rows[0]) if rows else None

    async def pending(
        self, *, run_id: str | None = None, thread_id: str | None = None
    ) -> list[Permission]:
        """Return the undecided questions, of a run, of a thread or of all, oldest first."""
        where = " WHERE permissions.granted IS NULL"
        values: list[str] = []
        if run_id is not None:
            where += " AND runs.id = ?"
            values.append(run_id)
        if thread_id is not None:
            where += " AND threads.id = ? AND runs.terminal_at IS NULL"
            values.append(thread_id)
        columns = _PENDING_IN_THREAD_COLUMNS if thread_id else _SQL["permission_columns"]
        # Sorted afterwards (+): in the order of the table every question ever asked is gone over.
        sql = f"{columns}{where} ORDER BY +permissions.key"
        return [permission_of(row) for row in await self._rows(sql, values)]

    async def healthy(self) -> str | None:
        """Return None when the log can write, otherwise a sentence that says what is wrong."""
        return self._writer.failure

    async def close(self) -> None:
        """Commit what is under way and close the log; the writer last, which checkpoints."""
        await self._writer.settle()
        for reader in self._readers:
            await reader.close()
        self._readers.clear()
        await self._writer.close()


def _thread_of(row: Sequence[Any]) -> Thread:
    """Return the thread in a row of `thread_columns`."""
    *fields, hidden = row[:10]
    return Thread._make([*fields, bool(hidden)])
