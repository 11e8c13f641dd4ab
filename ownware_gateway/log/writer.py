"""The one connection that writes, and the group commit.

Work collects while the last commit is under way and then commits together, in one hop to the
connection's thread. A commit that fails, on a full disk say, is tried again until it succeeds:
what was taken is never dropped, and what is not durable is never shown. Only this connection
checkpoints.
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

#: How long a commit waits for another program's lock before it counts as failing.
BUSY_S: Final = 1.0

#: A failing commit is tried again after this long, doubled each time up to the maximum.
RETRY_S: Final = 0.05
RETRY_S_MAX: Final = 2.0

#: How often the counter beside the database is brought up to date.
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

    __slots__ = ("_done", "_waiter", "_work")

    def __init__(self, work: Work) -> None:
        self._work = work
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
        self._closing = False
        self._flush: asyncio.Task[None] | None = None
        self._marker: Marker | None = None
        self._marked_s = 0.0
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
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "secure_delete=ON"):
            await self.connection.execute(f"PRAGMA {pragma}")
        is_new = await self._upgrade()
        await self._identify()
        await self._own()
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
        for version, script in versions:
            if version > current:
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
        commit = Commit(work)
        self._pending.append((work, commit))
        if self._flush is None:
            self._flush = asyncio.get_running_loop().create_task(self._flush_all())
        return commit

    async def do(self, do: Callable[[GroupConnection, int], T]) -> T:
        """Have something done in the next group's transaction; return its result."""
        chore = Chore(do)
        await self.take(chore).wait()
        return cast(T, chore.result)

    async def _flush_all(self) -> None:
        try:
            while self._pending:
                await self._flush_group()
            # Nothing more may come for hours: an older file must be noticed then, too.
            self._marked_s = 0.0
            self._mark()
        finally:
            self._flush = None

    async def _flush_group(self) -> None:
        group: list[tuple[Work, Commit]] = []
        size = 0
        while self._pending and size < GROUP_BYTES_MAX:
            group.append(self._pending.popleft())
            size += group[-1][0].size_bytes
        await self._commit([work for work, _ in group])
        for work, commit in group:
            self._publish(work)
            commit.settle()

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
        now_s = asyncio.get_running_loop().time()
        if now_s - self._marked_s >= MARK_EVERY_S and self._marker and self._group:
            self._marked_s = now_s
            # It may be behind, on a full disk say; what was committed is acknowledged all the same.
            with contextlib.suppress(OSError):
                self._marker.write(self._group.commits)

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
        if self._flush is not None:
            await self._flush

    async def close(self) -> None:
        """Commit what is under way and close, which checkpoints."""
        await self.settle()
        if self._connected is not None:
            await self._connected.close()
        if self._marker is not None:
            if self._group is not None:
                with contextlib.suppress(OSError):
                    self._marker.write(self._group.commits)
            self._marker.close()
