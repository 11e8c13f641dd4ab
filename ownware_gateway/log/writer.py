"""The one connection that writes, and the group commit.

Work collects while the last commit is under way and then commits together, in one hop to the
connection's thread. Deltas that nobody waits for also collect for a moment between two commits:
each commit wakes every follower, which costs far more than the delta.

A commit that fails, on a full disk say, is tried again until it succeeds: what was taken is never
dropped, and what is not durable is never shown. Only this connection checkpoints.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import aiosqlite

from ownware_gateway.errors import BootError
from ownware_gateway.log import INBOX, ROOT
from ownware_gateway.log.appends import Appending
from ownware_gateway.log.group import Chore, GroupConnection, TakenOver, Work
from ownware_gateway.log.marker import Marker
from ownware_gateway.log.statements import schema_versions, statements
from ownware_gateway.log.upkeep import rejoin

#: One commit takes at most so much, so that nobody waits long behind a burst.
GROUP_BYTES_MAX: Final = 4_194_304

#: Deltas come out at most this often, rather seldom than often: too short for a person to see, long
#: enough for several runs' deltas to share a commit.
DELTAS_EVERY_S_MIN: Final = 0.010
DELTAS_EVERY_S_MAX: Final = 0.020

#: In between, about so many deltas of each run are to come out together: they share a write to each
#: follower, which is what costs most.
TOGETHER: Final = 2.0

#: With very many followers the time between is this many times what waking all of them took last,
#: up to a maximum, so that most of the event loop's time is left for everything else.
REST_RATIO: Final = 2.0
REST_S_MAX: Final = 0.1

#: So much is enough company: it is committed at once.
COMPANY_BYTES: Final = 262_144

#: What the connection keeps of the file, in KiB (as SQLite wants it, below zero).
CACHE_KIB: Final = -1024

#: How long a commit waits for another program's lock before it counts as failing.
BUSY_S: Final = 1.0

#: A failing commit is tried again after this long, doubled each time up to the maximum.
RETRY_S: Final = 0.05
RETRY_S_MAX: Final = 2.0

#: How often, at most, the counter beside the database is brought up to date.
MARK_EVERY_S: Final = 1.0

#: How often, and how long apart, the write-ahead log is asked to be emptied.
WAL_TRIES: Final = 50
WAL_PAUSE_S: Final = 0.02

T = TypeVar("T")

_SQL: Final = statements()
_log: Final = logging.getLogger(__name__)


class Commit:
    """Work on its way into the database.

    It gets a future only when somebody waits for it: a future for every delta would cost more
    than storing the delta.
    """

    __slots__ = ("_done", "_hurry", "_waiter", "_work")

    def __init__(self, work: Work, hurry: Callable[[], None]) -> None:
        self._work = work
        self._hurry = hurry
        self._done = False
        self._waiter: asyncio.Future[None] | None = None

    def settle(self) -> None:
        """Let whoever waits go on; the work says how it went."""
        self._done = True
        if self._waiter is not None:
            self._waiter.set_result(None)

    async def wait(self) -> int:
        """Return the seq of the first event once all are durable; raises Refused."""
        if not self._done:
            self._hurry()
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop().create_future()
            # Shielded: one who stops waiting must not take the future from another.
            await asyncio.shield(self._waiter)
        if self._work.failure is not None:
            raise self._work.failure
        return self._work.first_seq if isinstance(self._work, Appending) else 0


class Writer:
    """Takes work and commits it. `publish` is told of all that has become durable, in order."""

    def __init__(
        self, path: Path, clock_ms: Callable[[], int], publish: Callable[[Work], None]
    ) -> None:
        self._path = path
        self._clock_ms = clock_ms
        self._publish = publish
        self._pending: deque[tuple[Work, Commit]] = deque()
        self._pending_bytes = 0
        self._urgent = False
        self._pause: asyncio.TimerHandle | None = None
        self._every_s = DELTAS_EVERY_S_MAX
        self._closing = False
        self._flush: asyncio.Task[None] | None = None
        self._marker: Marker | None = None
        self._marking: asyncio.TimerHandle | None = None
        self._group: GroupConnection | None = None
        self._connected: aiosqlite.Connection | None = None
        #: What is wrong while the log cannot be written, in a sentence.
        self.failure: str | None = None

    @property
    def connection(self) -> aiosqlite.Connection:
        """The connection itself, for what is no transaction of ours."""
        assert self._connected is not None, "the log is not open"
        return self._connected

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be committed."""
        return not self._pending and self._flush is None

    async def open(self) -> dict[str, str]:
        """Open the file, making or upgrading it; return what identifies the log, by name.

        Raises BootError for a file from a newer version.
        """
        # Made by us and not by SQLite, so that nobody else may read it from the first byte on.
        file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)
        finally:
            os.close(file)

        def make_writer(*args: Any, **options: Any) -> GroupConnection:
            connection = GroupConnection(*args, **options)
            connection.now_ms = self._clock_ms
            self._group = connection
            return connection

        self._connected = await aiosqlite.connect(
            self._path, factory=make_writer, isolation_level=None, timeout=BUSY_S
        )
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "mmap_size=0",
            "secure_delete=ON",
            f"cache_size={CACHE_KIB}",
        ):
            await self.connection.execute(f"PRAGMA {pragma}")
        is_new = await self._upgrade()
        # Together: a commit for each statement would wait for the disk as often.
        await self.connection.execute("BEGIN IMMEDIATE")
        await self._identify()
        await self._own()
        await self.connection.execute("COMMIT")
        return await self._recognise(is_new=is_new)

    async def _upgrade(self) -> bool:
        """Bring the schema up to date; return whether there was none."""
        rows = await self.connection.execute_fetchall("PRAGMA user_version")
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
            await self.connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            backup = self._path.with_suffix(f".v{current}.backup")
            await asyncio.to_thread(shutil.copy2, self._path, backup)
        steps = [step for step in versions if step[0] > current]
        if current == 0:
            # Of a new file nothing is kept halfway; each commit would wait for the disk.
            steps = [(newest, "\n".join(script for _, script in versions))]
        for version, script in steps:
            await self.connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version={version};\nCOMMIT;"
            )
        return bool(current == 0)

    async def _identify(self) -> None:
        for name in ("log_id", "secret"):
            await self.connection.execute(_SQL["add_meta"], (name, secrets.token_hex(32)))
        await self.connection.execute(_SQL["add_meta"], ("commits", "0"))
        row = {"id": INBOX, "title": "", "profile_id": None, "model": None, "now": 0}
        await self.connection.execute(_SQL["add_thread"], row)
        await self.connection.execute(_SQL["add_stream"], (ROOT, INBOX))

    async def _own(self) -> None:
        """Be the one that writes; whoever had the log open before writes nothing more."""
        assert self._group is not None
        owner = secrets.token_hex(8)
        await self.connection.execute(_SQL["own"], (owner,))
        self._group.owner = owner

    async def _recognise(self, *, is_new: bool) -> dict[str, str]:
        """Learn the log's name; give it another one when the file is older than it should be."""
        self._marker = Marker(self._path)
        ((commits,),) = await self.connection.execute_fetchall(_SQL["commits"])
        if not is_new and commits < self._marker.read():
            _log.warning("the log is older than it was: every stream goes on after a gap")
            await self.do(rejoin)
        rows = await self.connection.execute_fetchall("SELECT name, value FROM meta")
        meta: dict[str, str] = {row[0]: row[1] for row in rows}
        assert self._group is not None
        self._group.commits = int(meta["commits"])
        self._marker.write(self._group.commits)
        if "unscrubbed" in meta:
            await self.scrub()
        return meta

    def take(self, work: Work) -> Commit:
        """Have work committed with the next group, in the order of the calls."""
        commit = Commit(work, self._hurry)
        self._pending.append((work, commit))
        self._pending_bytes += work.size_bytes
        if not work.patient or self._pending_bytes >= COMPANY_BYTES:
            self._hurry()
        elif self._pause is None:
            self._begin()
        return commit

    async def do(self, do: Callable[[GroupConnection, int], T]) -> T:
        """Have something done in the next group's transaction; return its result."""
        chore = Chore(do)
        await self.take(chore).wait()
        return cast(T, chore.result)

    def _hurry(self) -> None:
        """Let what is pending wait for nothing but the commit under way."""
        self._urgent = True
        self._begin()

    def _begin(self) -> None:
        if self._flush is None and self._pending:
            self._end_pause()
            self._flush = asyncio.get_running_loop().create_task(self._flush_all())

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    async def _flush_all(self) -> None:
        try:
            more_follows = await self._flush_group()
            while self._pending and (self._urgent or not more_follows):
                more_follows = await self._flush_group()
            if not more_follows and self._marker is not None and self._group is not None:
                # Nothing more may come for hours: an older file must be noticed at once.
                self._write_mark(self._marker, self._group.commits)
        finally:
            self._flush = None

    async def _flush_group(self) -> bool:
        """Commit what is pending, as much as one commit takes; return whether deltas were in it."""
        group: list[tuple[Work, Commit]] = []
        size = 0
        while self._pending and size < GROUP_BYTES_MAX:
            group.append(self._pending.popleft())
            size += group[-1][0].size_bytes
        self._pending_bytes -= size
        self._urgent = self._urgent and bool(self._pending)
        await self._commit([work for work, _ in group])
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for work, commit in group:
            self._publish(work)
            commit.settle()
        deltas = [work for work, _ in group if work.patient]
        if deltas:
            streams = {stream for work in deltas for stream, _ in work.appended}
            every_s = self._every_s * TOGETHER * len(streams) / len(deltas)
            self._every_s = min(max(every_s, DELTAS_EVERY_S_MIN), DELTAS_EVERY_S_MAX)
            self._rest(self._every_s)
            # Called when everyone who was woken just now has had a turn.
            loop.call_soon(self._rest_longer, began_s)
        return bool(deltas)

    def _rest(self, seconds: float) -> None:
        """Let deltas collect for a while."""
        self._end_pause()
        self._pause = asyncio.get_running_loop().call_later(seconds, self._pause_over)

    def _rest_longer(self, began_s: float) -> None:
        """Make the pause fit what the last deltas cost, unless it is over already."""
        took_s = asyncio.get_running_loop().time() - began_s
        if self._pause is not None and took_s * REST_RATIO > self._every_s:
            self._rest(min(took_s * REST_RATIO, REST_S_MAX))

    def _pause_over(self) -> None:
        self._pause = None
        self._begin()

    async def _commit(self, group: Sequence[Work]) -> None:
        delay_s = RETRY_S
        while True:
            try:
                await self.connection.executemany("", group)
            except (sqlite3.Error, ValueError) as error:
                # A ValueError is what aiosqlite says of a connection that was closed.
                if self.failure is None:
                    _log.error("the log cannot be written, trying again: %s", error)
                self.failure = f"The log cannot be written: {error}."
                if self._closing or isinstance(error, TakenOver):
                    for work in group:
                        work.appended, work.failure = [], error
                    return
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)
            else:
                if self.failure is not None:
                    _log.warning("the log can be written again")
                self.failure = None
                self._mark()
                return

    def _mark(self) -> None:
        """Bring the counter beside the database up to date: now, and again if more follows."""
        if self._marking is None and self._marker is not None and self._group is not None:
            self._write_mark(self._marker, self._group.commits)
            loop = asyncio.get_running_loop()
            self._marking = loop.call_later(MARK_EVERY_S, self._mark_again, self._group.commits)

    def _mark_again(self, marked: int) -> None:
        self._marking = None
        if self._group is not None and self._group.commits != marked:
            self._mark()

    def _write_mark(self, marker: Marker, commits: int) -> None:
        # It may be behind, on a full disk say; what was committed is acknowledged all the same.
        with contextlib.suppress(OSError):
            marker.write(commits)

    async def scrub(self) -> None:
        """Write the file anew, and empty the write-ahead log.

        `secure_delete` overwrites rows where they stood last. Where they stood before the file's
        pages were split among their neighbours, their bytes are still there.
        """
        try:
            await self.connection.execute("VACUUM")
            await self.do(lambda db, _: db.run("is_scrubbed"))
        except sqlite3.Error as error:
            _log.warning("bytes of what was deleted are left in the file for now: %s", error)
        await self._empty_wal()

    async def _empty_wal(self) -> None:
        """Move the write-ahead log into the file and cut it to nothing."""
        for _ in range(WAL_TRIES):
            rows = await self.connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            (busy, *_) = next(iter(rows))
            if not busy:
                return
            # A reader is in the middle of a page; none stays long.
            await asyncio.sleep(WAL_PAUSE_S)
        _log.warning("the write-ahead log could not be emptied now; it will be at the next chance")

    async def settle(self) -> None:
        """Commit what is under way; a commit that fails from here on is given up."""
        self._closing = True
        self._hurry()
        if self._flush is not None:
            await self._flush
        self._end_pause()

    async def close(self) -> None:
        """Commit what is under way and close, which checkpoints."""
        await self.settle()
        if self._connected is not None:
            await self._connected.close()
        if self._marking is not None:
            self._marking.cancel()
        if self._marker is not None:
            if self._group is not None:
                self._write_mark(self._marker, self._group.commits)
            self._marker.close()
