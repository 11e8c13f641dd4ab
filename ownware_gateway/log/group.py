"""The group transaction: many appends, one commit, all of it on the writer's thread.

Every append stands under a savepoint of its own, so one that is refused undoes nothing of the
others. Rows beside the events change here, in the transaction of the event that changes them.
"""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from ownware_gateway.events import (
    Event,
    PermissionRequest,
    PermissionResponse,
    RunCancel,
    SessionEnd,
    SessionStart,
    TurnEnd,
    Usage,
)
from ownware_gateway.log import (
    Append,
    Cancels,
    Decides,
    Drives,
    NewRun,
    Permission,
    Record,
    Refused,
    Run,
    Starts,
    Stream,
)
from ownware_gateway.log.statements import statements

_SQL: Final = statements()


class Entry:
    """An append on its way: what became of it is known once its group has been committed."""

    __slots__ = ("append", "done", "failure", "payloads", "records", "size_bytes")

    def __init__(self, append: Append) -> None:
        self.append = append
        self.payloads = [event.encode() for event in append.events]
        self.size_bytes = sum(map(len, self.payloads))
        self.records: list[Record] = []
        self.failure: Exception | None = None
        self.done = False


class GroupConnection(sqlite3.Connection):
    """The one connection that writes.

    `executemany` is the only call of aiosqlite's public API that carries a Python object to the
    connection's thread in one hop, so here it means: commit this group of entries.
    """

    #: The clock that stamps rows; set when the connection is made.
    now_ms: Callable[[], int]

    def executemany(self, sql: str, entries: Any, /) -> sqlite3.Cursor:
        """Commit the entries in one transaction; `sql` has no meaning."""
        group: Sequence[Entry] = entries
        cursor = self.execute("BEGIN IMMEDIATE")
        try:
            now = self.now_ms()
            for entry in group:
                self._one(entry, now)
            cursor.execute("COMMIT")
        except BaseException:
            if self.in_transaction:
                self.rollback()
            raise
        return cursor

    def _one(self, entry: Entry, now: int) -> None:
        entry.records, entry.failure = [], None
        self.execute("SAVEPOINT one")
        try:
            entry.records = self._write(entry, now)
        except sqlite3.OperationalError:
            raise  # The database's trouble, not this append's.
        except Exception as failure:  # noqa: BLE001 - one that cannot be stored fails alone
            self.execute("ROLLBACK TO one")
            entry.failure = failure
        self.execute("RELEASE one")

    def _write(self, entry: Entry, now: int) -> list[Record]:
        append = entry.append
        stream_key, head, run_id = self._enter(append, now)
        records = []
        for seq, (event, body) in enumerate(
            zip(append.events, entry.payloads, strict=True), head + 1
        ):
            records.append(Record(seq, event.type, b'%b,"seq":%d}' % (body[:-1], seq)))
        super().executemany(
            _SQL["add_event"], [(stream_key, item.seq, item.type, item.payload) for item in records]
        )
        last = records[-1].seq
        self.execute(_SQL["move_head"], (last, stream_key))
        for fact in append.private:
            kind = f"{fact.kind}.{fact.index:02d}"
            self.execute(_SQL["add_private"], (stream_key, last, kind, fact.body))
        if append.active_ms is not None:
            self.execute(_SQL["run_active_ms"], (append.active_ms, run_id))
        for record, event in zip(records, append.events, strict=True):
            self._change_rows(event, {"run_id": run_id, "seq": record.seq, "now": now})
        return records

    def _enter(self, append: Append, now: int) -> tuple[int, int, str]:
        """Check the guard; return the stream's key, its head and the id of the run."""
        if isinstance(append.guard, Starts):
            return self._start(append.stream, append.guard.run, now)
        run_id = self._check(append.guard, now)
        return *self._stream(append.stream), run_id

    def _check(self, guard: Drives | Decides | Cancels, now: int) -> str:
        """Return the id of the run that the guard is about; raise Refused if it does not hold."""
        match guard:
            case Drives(run_id, generation):
                row = self.execute(_SQL["fence"], (run_id,)).fetchone()
                if row is None or row[1] or row[0] != generation:
                    raise Refused(self.find_run(run_id))
                return run_id
            case Decides(request_id, late):
                asked = self.find_permission(request_id)
                if asked is None or asked.granted is not None:
                    raise Refused(asked)
                if (asked.expires_at <= now) is not late:
                    raise Refused(asked)
                return asked.run_id
            case Cancels(run_id):
                run = self.find_run(run_id)
                if run is None or run.terminal or run.cancel_requested_at is not None:
                    raise Refused(run)
                return run_id

    def _start(self, stream: Stream, run: NewRun, now: int) -> tuple[int, int, str]:
        active = self.active_run(stream)
        if active is not None:
            raise Refused(active)
        self.add_thread(
            stream.thread_id, title=run.title, profile_id=run.profile_id, model=run.model, now=now
        )
        self.execute(_SQL["add_stream"], (stream.agent_id, stream.thread_id))
        key, head = self._stream(stream)
        self.execute(
            _SQL["add_run"],
            {
                "id": run.id,
                "thread_id": stream.thread_id,
                "agent_id": stream.agent_id,
                "profile_id": run.profile_id,
                "model": run.model,
                "timeout_ms": run.timeout_ms,
                "start_seq": head,
                "now": now,
            },
        )
        return key, head, run.id

    def _stream(self, stream: Stream) -> tuple[int, int]:
        row = self.execute(_SQL["stream"], (stream.thread_id, stream.agent_id)).fetchone()
        assert row is not None, stream
        return row[0], row[1]

    def _change_rows(self, event: Event, row: dict[str, Any]) -> None:
        """Change the rows that the event is about. Most events are about none."""
        match event:
            case SessionStart():
                self.execute(_SQL["run_starts"], row)
            case TurnEnd():
                self._add_usage(row, event.usage)
            case PermissionRequest():
                question = {
                    "request_id": event.request_id,
                    "tool_name": event.tool_name,
                    "operation_hash": event.operation_hash,
                    "expires_at": event.expires_at,
                    "turn_index": event.turn_index,
                }
                self.execute(_SQL["ask"], row | question)
                self.execute(_SQL["run_waits"], row)
            case PermissionResponse():
                answer = {
                    "request_id": event.request_id,
                    "granted": event.granted,
                    "decided_by": event.decided_by,
                }
                self.execute(_SQL["decide"], row | answer)
                self.execute(_SQL["run_goes_on"], row)
            case RunCancel():
                self.execute(_SQL["run_cancel"], row)
            case SessionEnd():
                usage = event.total_usage.model_dump_json()
                ended = {"status": event.status, "code": event.code, "usage": usage}
                self.execute(_SQL["run_ends"], row | ended)
                self.execute(_SQL["touch_thread"], row)
            case _:
                pass

    def _add_usage(self, row: dict[str, Any], usage: Usage) -> None:
        run = self.find_run(row["run_id"])
        assert run is not None
        total = run.usage.plus(usage).model_dump_json()
        self.execute(_SQL["run_usage"], row | {"usage": total})

    def add_thread(
        self, thread_id: str, *, title: str, profile_id: str | None, model: str | None, now: int
    ) -> None:
        """Make the thread, or note that it was used again."""
        self.execute(
            _SQL["add_thread"],
            {
                "id": thread_id,
                "title": title,
                "profile_id": profile_id,
                "model": model,
                "now": now,
            },
        )

    def find_run(self, run_id: str) -> Run | None:
        """Return the run as this transaction sees it."""
        row = self.execute(_SQL["run_columns"] + " WHERE runs.id = ?", (run_id,)).fetchone()
        return None if row is None else run_of(row)

    def active_run(self, stream: Stream) -> Run | None:
        """Return the stream's unfinished run as this transaction sees it."""
        row = self.execute(
            _SQL["run_columns"]
            + " WHERE threads.id = ? AND runs.agent_id = ? AND runs.terminal_at IS NULL",
            (stream.thread_id, stream.agent_id),
        ).fetchone()
        return None if row is None else run_of(row)

    def find_permission(self, request_id: str) -> Permission | None:
        """Return the question as this transaction sees it."""
        row = self.execute(
            _SQL["permission_columns"] + " WHERE permissions.request_id = ?", (request_id,)
        ).fetchone()
        return None if row is None else permission_of(row)


def run_of(row: Sequence[Any]) -> Run:
    """Return the run in a row of `run_columns`."""
    fields = list(row[:18])
    fields[12] = Usage.model_validate_json(fields[12])
    return Run(*fields)


def permission_of(row: Sequence[Any]) -> Permission:
    """Return the question in a row of `permission_columns`."""
    fields = list(row)
    fields[9] = None if fields[9] is None else bool(fields[9])
    return Permission(*fields)
