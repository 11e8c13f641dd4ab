"""The log in one SQLite file, reached through aiosqlite.

One connection writes, in groups: appends collect while the last commit is under way and then
commit together. A few connections read, a page at a time, each cursor finished before its rows go
anywhere (an open one would keep the write-ahead log from being emptied). Only the writer
checkpoints. A commit that fails, on a full disk say, is tried again until it succeeds: what was
appended is never dropped, and what is not durable is never shown.
"""

import asyncio
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiosqlite

from ownware_gateway.errors import BootError
from ownware_gateway.log import (
    CHUNK_BYTES_MAX,
    Append,
    Chunk,
    Head,
    Permission,
    Record,
    Run,
    RunQuery,
    Stream,
    Thread,
    ThreadQuery,
)
from ownware_gateway.log.group import Entry, GroupConnection, permission_of, run_of
from ownware_gateway.log.statements import ACTIVE, schema_versions, statements
from ownware_gateway.log.tail import Tails, join_frames

#: Connections that read; each is a thread, and two cores can use two.
READERS: Final = 2

#: One commit takes at most so much, so that nobody waits long behind a burst.
GROUP_BYTES_MAX: Final = 4_194_304

#: A page of events; about what fits into one chunk.
PAGE_ROWS_MAX: Final = 300

#: A failing commit is tried again after this long, doubled each time up to the maximum.
RETRY_S: Final = 0.05
RETRY_S_MAX: Final = 2.0

_SQL: Final = statements()
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
        """Run a query with a cursor that keeps pages small.

        Overriding `cursor` would not do: sqlite3's own `execute` does not call it.
        """
        return self.cursor(PageCursor).execute(sql, parameters)


class Commit:
    """An append on its way into the database.

    It gets a future only when somebody waits for it: a future for every delta would cost more
    than storing the delta.
    """

    __slots__ = ("_entry", "_waiter")

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._waiter: asyncio.Future[None] | None = None

    def settle(self) -> None:
        """Let whoever waits go on; the entry says how it went."""
        self._entry.done = True
        if self._waiter is not None:
            self._waiter.set_result(None)

    async def wait(self) -> int:
        """Return the seq of the first event once all are durable; raises Refused."""
        if not self._entry.done:
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop().create_future()
            # Shielded: one who stops waiting must not take the future from another.
            await asyncio.shield(self._waiter)
        if self._entry.failure is not None:
            raise self._entry.failure
        return self._entry.records[0].seq


class SqliteLog:
    """The contract of `ownware_gateway.log`, in a file."""

    def __init__(self, path: Path, clock_ms: Callable[[], int]) -> None:
        self._path = path
        self._clock_ms = clock_ms
        self._writer: aiosqlite.Connection
        self._readers: list[aiosqlite.Connection] = []
        self._next_reader = itertools.count()
        self._tails = Tails()
        self._pending: deque[tuple[Entry, Commit]] = deque()
        self._closing = False
        self._flush: asyncio.Task[None] | None = None
        self._failure: str | None = None
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
        except sqlite3.DatabaseError as error:
            await log.close()
            raise BootError(f"The log {path.name} cannot be opened: {error}.") from error
        except BaseException:
            await log.close()
            raise
        return log

    async def _open(self) -> None:
        # Made by us and not by SQLite, so that nobody else may read it from the first byte on.
        file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)
        finally:
            os.close(file)

        def make_writer(*args: Any, **options: Any) -> GroupConnection:
            connection = GroupConnection(*args, **options)
            connection.now_ms = self._clock_ms
            return connection

        self._writer = await aiosqlite.connect(
            self._path, factory=make_writer, isolation_level=None
        )
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "secure_delete=ON"):
            await self._writer.execute(f"PRAGMA {pragma}")
        await self._upgrade()
        await self._identify()
        for _ in range(READERS):
            reader = await aiosqlite.connect(
                self._path, factory=ReadConnection, isolation_level=None
            )
            self._readers.append(reader)
            await reader.execute("PRAGMA query_only=ON")
            await reader.execute("PRAGMA wal_autocheckpoint=0")

    async def _upgrade(self) -> None:
        rows = await self._writer.execute_fetchall("PRAGMA user_version")
        (current,) = next(iter(rows))
        versions = schema_versions()
        newest = versions[-1][0]
        if current > newest:
            raise BootError(
                f"The log {self._path.name} is of version {current}, made by a newer gateway; "
                f"this one knows versions up to {newest}. Use the newer gateway."
            )
        if 0 < current < newest:
            # Fetched, for a statement under way would keep the upgrade from being committed.
            await self._writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            backup = self._path.with_suffix(f".v{current}.backup")
            await asyncio.to_thread(shutil.copy2, self._path, backup)
        for version, script in versions:
            if version > current:
                await self._writer.executescript(
                    f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version={version};\nCOMMIT;"
                )

    async def _identify(self) -> None:
        for name in ("log_id", "secret"):
            await self._writer.execute(
                "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (name, secrets.token_hex(32)),
            )
        rows = await self._writer.execute_fetchall("SELECT name, value FROM meta")
        meta: dict[str, str] = {row[0]: row[1] for row in rows}
        self._log_id = meta["log_id"]
        self.secret = bytes.fromhex(meta["secret"])

    def append(self, append: Append) -> Commit:
        """Take events to be committed with the next group, in the order of the calls."""
        entry = Entry(append)
        commit = Commit(entry)
        self._pending.append((entry, commit))
        if self._flush is None:
            self._flush = asyncio.get_running_loop().create_task(self._flush_all())
        return commit

    async def _flush_all(self) -> None:
        try:
            while self._pending:
                await self._flush_group()
        finally:
            self._flush = None

    async def _flush_group(self) -> None:
        group: list[tuple[Entry, Commit]] = []
        size = 0
        while self._pending and size < GROUP_BYTES_MAX:
            group.append(self._pending.popleft())
            size += group[-1][0].size_bytes
        await self._commit([entry for entry, _ in group])
        for entry, commit in group:
            if entry.records:
                stream = entry.append.stream
                self._tails.add(stream, self._epoch(stream), entry.records)
            commit.settle()

    async def _commit(self, entries: Sequence[Entry]) -> None:
        delay_s = RETRY_S
        while True:
            try:
                await self._writer.executemany("", entries)
            except (sqlite3.Error, ValueError) as error:
                # A ValueError is what aiosqlite says of a connection that was closed.
                if self._failure is None:
                    _log.error("the log cannot be written, trying again: %s", error)
                self._failure = f"The log cannot be written: {error}."
                if self._closing:
                    for entry in entries:
                        entry.records, entry.failure = [], error
                    return
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)
            else:
                if self._failure is not None:
                    _log.warning("the log can be written again")
                self._failure = None
                return

    async def take_over(self, run_id: str) -> Run:
        """Raise the run's generation, so that whoever drove it can write nothing more."""
        await self._writer.execute(_SQL["take_over"], (run_id,))
        run = await self.run(run_id)
        assert run is not None
        return run

    async def make_thread(self, thread_id: str, *, title: str, profile_id: str | None) -> Thread:
        """Make an empty thread."""
        now = self._clock_ms()
        await self._writer.execute(
            _SQL["add_thread"],
            {"id": thread_id, "title": title, "profile_id": profile_id, "model": None, "now": now},
        )
        thread = await self.thread(thread_id)
        assert thread is not None
        return thread

    def _epoch(self, stream: Stream) -> str:
        """Return the stream's name in this log: short, and another one in any other log."""
        text = f"{self._log_id}\0{stream.thread_id}\0{stream.agent_id}"
        return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()

    async def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        reader = self._readers[next(self._next_reader) % len(self._readers)]
        return list(await reader.execute_fetchall(sql, parameters))

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
            records += [Record(*row) for row in rows]
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

    async def chunk(self, stream: Stream, after: int) -> Chunk | None:
        """Return the next frames after a cursor, as many as fit; None when there are none yet."""
        tail = self._tails.get(stream)
        if tail is not None and tail.holds(after):
            return tail.chunk(after)
        key = await self._stream_key(stream)
        if key is None:
            return None
        rows = await self._rows(_SQL["records"], (key, after, PAGE_ROWS_MAX))
        if not rows:
            return None
        return join_frames(self._epoch(stream), [Record(*row) for row in rows])

    async def wait(self, stream: Stream, after: int, timeout_s: float) -> bool:
        """Return True once there may be events above `after`; False when the time is over."""
        tail = self._tails.open(stream, self._epoch(stream))
        waiter = asyncio.get_running_loop().create_future()
        # Registered before the head is looked up: a commit in between wakes it.
        tail.waiters.add(waiter)
        try:
            if tail.head is None:
                head = await self.head(stream)
                if tail.head is None:
                    tail.head = 0 if head is None else head.last
            if tail.head > after:
                return True
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            tail.waiters.discard(waiter)
            self._tails.leave(stream)
        return True

    def wake(self) -> None:
        """End every wait now; for a gateway that is leaving."""
        self._tails.wake()

    async def run(self, run_id: str) -> Run | None:
        """Return a run."""
        rows = await self._rows(_SQL["run_columns"] + " WHERE runs.id = ?", (run_id,))
        return run_of(rows[0]) if rows else None

    async def active_run(self, stream: Stream) -> Run | None:
        """Return the unfinished run of a stream."""
        where = " WHERE threads.id = ? AND runs.agent_id = ? AND runs.terminal_at IS NULL"
        rows = await self._rows(_SQL["run_columns"] + where, (stream.thread_id, stream.agent_id))
        return run_of(rows[0]) if rows else None

    async def runs(self, query: RunQuery) -> list[tuple[int, Run]]:
        """Return (position, run), newest first."""
        where: list[str] = ["1"]
        values: list[str] = []
        if query.status is not None:
            names = ACTIVE if query.status == "active" else (query.status,)
            where.append(f"runs.status IN ({', '.join('?' * len(names))})")
            values += names
        if query.thread_id is not None:
            where.append("threads.id = ?")
            values.append(query.thread_id)
        if query.before is not None:
            where.append("runs.key < ?")
            values.append(str(query.before))
        sql = f"{_SQL['run_columns']} WHERE {' AND '.join(where)} ORDER BY runs.key DESC LIMIT ?"
        rows = await self._rows(sql, (*values, query.limit))
        return [(row[18], run_of(row)) for row in rows]

    async def unfinished(self) -> list[Run]:
        """Return every run that has not ended, oldest first."""
        where = " WHERE runs.terminal_at IS NULL ORDER BY runs.key"
        return [run_of(row) for row in await self._rows(_SQL["run_columns"] + where)]

    async def thread(self, thread_id: str) -> Thread | None:
        """Return a thread."""
        rows = await self._rows(_SQL["thread_columns"] + " WHERE threads.id = ?", (thread_id,))
        return Thread(*rows[0][:7]) if rows else None

    async def threads(self, query: ThreadQuery) -> list[tuple[str, Thread]]:
        """Return (position, thread), most recently changed first."""
        where: list[str] = ["1"]
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
        return [(f"{row[5]}.{row[7]}", Thread(*row[:7])) for row in rows]

    async def agents(self, thread_id: str) -> list[tuple[str, int]]:
        """Return (agent id, last seq) of the thread's streams."""
        return [(agent, head) for agent, head in await self._rows(_SQL["agents"], (thread_id,))]

    async def permission(self, request_id: str) -> Permission | None:
        """Return a question to a person."""
        where = " WHERE permissions.request_id = ?"
        rows = await self._rows(_SQL["permission_columns"] + where, (request_id,))
        return permission_of(rows[0]) if rows else None

    async def pending(self, *, run_id: str | None = None) -> list[Permission]:
        """Return the undecided questions, of one run or of all, oldest first."""
        where = " WHERE permissions.granted IS NULL" + (" AND runs.id = ?" if run_id else "")
        sql = f"{_SQL['permission_columns']}{where} ORDER BY permissions.key"
        return [permission_of(row) for row in await self._rows(sql, (run_id,) if run_id else ())]

    async def healthy(self) -> str | None:
        """Return None when the log can write, otherwise a sentence that says what is wrong."""
        return self._failure

    async def close(self) -> None:
        """Commit what is under way and close the log; the writer last, which checkpoints."""
        self._closing = True
        if self._flush is not None:
            await self._flush
        for reader in self._readers:
            await reader.close()
        self._readers.clear()
        if hasattr(self, "_writer"):
            await self._writer.close()
