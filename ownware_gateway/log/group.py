"""The group transaction: much work, one commit, all of it on the writer's thread.

Work that is refused has changed nothing: guards are checked first. Should a piece of work fail in
any other way, the group is done again with each piece under a savepoint of its own, so that the
one undoes nothing of the others.
"""

import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from ownware_gateway.events import Usage
from ownware_gateway.log import Permission, Record, Refused, Run, Stream
from ownware_gateway.log.statements import statements

_SQL: Final = statements()

#: What finds one row; the writer asks inside its transaction, the readers outside of it.
RUN_BY_ID: Final = _SQL["run_columns"] + " WHERE runs.id = ?"
ACTIVE_RUN: Final = (
    _SQL["run_columns"] + " WHERE threads.id = ? AND runs.agent_id = ? AND runs.terminal_at IS NULL"
)
PERMISSION_BY_ID: Final = _SQL["permission_columns"] + " WHERE permissions.request_id = ?"

Result = TypeVar("Result")


class Work(Protocol):
    """Something to be done in the group's transaction."""

    size_bytes: int
    #: Whether it may wait a moment for company, as long as nobody waits for it.
    patient: bool
    failure: Exception | None
    #: What was appended to which stream, for those who follow it.
    appended: list[tuple[Stream, list[Record]]]

    def perform(self, connection: "GroupConnection", now: int) -> None:
        """Do it, or raise Refused before anything is changed.

        A failed group is tried again, so this may be called more than once.
        """
        ...


class Chore(Generic[Result]):
    """Work that is no append: a function of the connection and the clock."""

    size_bytes = 0
    patient = False

    def __init__(self, do: "Callable[[GroupConnection, int], Result]") -> None:
        self._do = do
        self.failure: Exception | None = None
        self.appended: list[tuple[Stream, list[Record]]] = []
        self.result: Result | None = None

    def perform(self, connection: "GroupConnection", now: int) -> None:
        """Call the function and keep what it returns."""
        self.result = self._do(connection, now)


class TakenOver(sqlite3.OperationalError):
    """Another gateway has opened the log; this one writes nothing more, and trying is no use."""


class _Unexpected(Exception):
    """A piece of work has failed, and may have changed something before."""


class GroupConnection(sqlite3.Connection):
    """The one connection that writes.

    `executemany` is the only call of aiosqlite's public API that carries a Python object to the
    connection's thread in one hop, so with a group of work it means: commit this group.
    """

    #: The clock that stamps rows; set when the connection is made.
    now_ms: Callable[[], int]

    #: Who writes: the one that has opened the log last. Nobody else does, lock or no lock.
    owner: str | None = None

    #: How many groups this log has committed; kept beside the database too (see marker.py).
    commits: int = 0

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        """Commit the work in one transaction if `sql` is empty; otherwise as usual."""
        if sql:
            return super().executemany(sql, parameters)
        group: Sequence[Work] = parameters
        try:
            return self._commit(group, apart=False)
        except _Unexpected:
            return self._commit(group, apart=True)

    def _commit(self, group: Sequence[Work], *, apart: bool) -> sqlite3.Cursor:
        cursor = self.execute("BEGIN IMMEDIATE")
        try:
            counted = self.all("count_commit", owner=self.owner)
            if not counted:
                raise TakenOver("another gateway has opened it since")
            now = self.now_ms()
            for work in group:
                self._perform(work, now, apart=apart)
            if all(work.failure is not None for work in group):
                # Nothing was done, so there is nothing to wait for the disk for.
                self.rollback()
                return cursor
            cursor.execute("COMMIT")
        except BaseException:
            if self.in_transaction:
                self.rollback()
            raise
        ((self.commits,),) = counted
        return cursor

    def _perform(self, work: Work, now: int, *, apart: bool) -> None:
        work.failure = None
        work.appended = []
        if apart:
            self.execute("SAVEPOINT one")
        try:
            work.perform(self, now)
        except Refused as refused:
            work.failure = refused
        except Exception as failure:
            if is_of_the_database(failure):
                raise
            if not apart:
                raise _Unexpected from failure
            self.execute("ROLLBACK TO one")
            work.failure = failure
            work.appended = []
        if apart:
            self.execute("RELEASE one")

    def one(self, name: str, *values: Any) -> Any:
        """Return the first row of a named statement, or None."""
        return self.execute(_SQL[name], values).fetchone()

    def run(self, name: str, *values: Any, **named: Any) -> int:
        """Execute a named statement; return how many rows it changed."""
        return self.execute(_SQL[name], named or values).rowcount

    def all(self, name: str, *values: Any, **named: Any) -> list[Any]:
        """Return all rows of a named statement."""
        return self.execute(_SQL[name], named or values).fetchall()

    def find_run(self, run_id: str) -> Run | None:
        """Return the run as this transaction sees it."""
        row = self.execute(RUN_BY_ID, (run_id,)).fetchone()
        return None if row is None else run_of(row)

    def active_run(self, stream: Stream) -> Run | None:
        """Return the stream's unfinished run as this transaction sees it."""
        row = self.execute(
            ACTIVE_RUN,
            (stream.thread_id, stream.agent_id),
        ).fetchone()
        return None if row is None else run_of(row)

    def open_question(self, run_id: str) -> Permission | None:
        """Return what a person is asked now in the thread of a run, whichever agent asks."""
        row = self.one("asked_in_thread", run_id)
        return None if row is None else self.find_permission(row[0])

    def find_permission(self, request_id: str) -> Permission | None:
        """Return the question as this transaction sees it."""
        row = self.execute(PERMISSION_BY_ID, (request_id,)).fetchone()
        return None if row is None else permission_of(row)

    def find_stream(self, stream: Stream) -> tuple[int, int]:
        """Return the key and the head of a stream that exists."""
        row = self.one("stream", stream.thread_id, stream.agent_id)
        assert row is not None, stream
        return row[0], row[1]

    def store(self, stream_key: int, records: Sequence[Record]) -> None:
        """Add events to a stream and move its head."""
        super().executemany(
            _SQL["add_event"],
            [(stream_key, item.seq, item.type, item.payload) for item in records],
        )
        self.run("move_head", records[-1].seq, stream_key)


def is_of_the_database(failure: Exception) -> bool:
    """Whether the database is in trouble, and not what was asked of it wrong: it may pass."""
    return isinstance(failure, sqlite3.OperationalError) or type(failure) is sqlite3.DatabaseError


def numbered(head: int, types: Sequence[str], payloads: Sequence[bytes]) -> list[Record]:
    """Return events as they are stored after a head: each payload gets its number."""
    return [
        Record(seq, kind, b'%b,"seq":%d}' % (body[:-1], seq))
        for seq, (kind, body) in enumerate(zip(types, payloads, strict=True), head + 1)
    ]


def run_of(row: Sequence[Any]) -> Run:
    """Return the run in a row of `run_columns`."""
    fields = list(row[:19])
    fields[13] = Usage.model_validate_json(fields[13])
    return Run(*fields, *row[20:23])


def permission_of(row: Sequence[Any]) -> Permission:
    """Return the question in a row of `permission_columns`."""
    fields = list(row)
    fields[9] = None if fields[9] is None else bool(fields[9])
    fields[12] = None if fields[12] is None else json.loads(fields[12])
    return Permission(*fields)
