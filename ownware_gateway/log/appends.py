"""What an append does in its transaction: check its guard, number its events, change the rows.

Rows beside the events are changed here, by the event that changes them.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from ownware_gateway.events import (
    ASKED,
    ASKING,
    DELTAS,
    AgentComplete,
    AgentSpawn,
    Asks,
    ClientCall,
    ClientResult,
    CompactionEnd,
    Event,
    Fallback,
    PermissionRequest,
    PermissionResponse,
    QuestionRequest,
    QuestionResponse,
    RunCancel,
    SessionEnd,
    SessionStart,
    TurnEnd,
    Usage,
)
from ownware_gateway.log import (
    DAY_MS,
    INBOX,
    Append,
    Cancels,
    Decides,
    Drives,
    Guard,
    IdempotencyKey,
    KeptStart,
    Record,
    Refused,
    Run,
    Spent,
    Starts,
    Stream,
    Tombstone,
)
from ownware_gateway.log.group import GroupConnection, numbered

#: How long a key names the run that it started.
KEYS_KEPT_MS: Final = 8 * 86_400_000

INBOX_STREAM: Final = Stream(INBOX)

_NOTHING: Final = Spent()


class Appending:
    """An append on its way. Its events are encoded at once, and then let go: most are deltas."""

    def __init__(self, append: Append) -> None:
        self._stream = append.stream
        self._guard = append.guard
        self._private = append.private
        self._active_ms = append.active_ms
        self._charged_ms = append.charged_ms
        self._spent = append.spent
        self._types = [event.type for event in append.events]
        self._payloads = [event.encode() for event in append.events]
        opening = append.guard.opening if isinstance(append.guard, Starts) else None
        own = opening.history if opening is not None else 0
        #: Those that rows are about, by their place; what is history changes none.
        self._facts = [
            (place, event)
            for place, event in enumerate(append.events)
            if place >= own and event.type not in DELTAS
        ]
        self.size_bytes = sum(map(len, self._payloads))
        for fact in append.private:
            self.size_bytes += len(fact.body)
        self.patient = not self._facts and not append.at_once
        self.failure: Exception | None = None
        self.appended: list[tuple[Stream, list[Record]]] = []
        #: The run that it started, if it did.
        self.started: Run | None = None

    @property
    def first_seq(self) -> int:
        """The number of the first event, once it is stored."""
        return self.appended[0][1][0].seq

    def perform(self, connection: GroupConnection, now: int) -> None:
        """Store the events if the guard holds; raises Refused if not."""
        run_id, key, head = _enter(connection, self._stream, self._guard, now)
        records = numbered(head, self._types, self._payloads)
        connection.store(key, records)
        self.appended.append((self._stream, records))
        for fact in self._private:
            seq = records[fact.place].seq
            connection.run("add_private", key, seq, f"{fact.kind}.{fact.index:02d}", fact.body)
        if self._active_ms is not None:
            cost_usd, turns, _ = self._spent or _NOTHING
            spent = Spent(cost_usd, turns, self._active_ms)
            count_active(connection, run_id, now, spent, self._charged_ms)
        for place, event in self._facts:
            row = {"run_id": run_id, "seq": records[place].seq, "now": now}
            _change_rows(connection, event, row)
        self._tell_others(connection, run_id, now)
        if isinstance(self._guard, Starts):
            self.started = connection.find_run(run_id)

    def _tell_others(self, connection: GroupConnection, run_id: str, now: int) -> None:
        """Copy what people are asked, and their answers, to where people look.

        That is the stream over all threads, and those of the agents that this one works for.
        """
        asked = [
            (kind, body)
            for kind, body in zip(self._types, self._payloads, strict=True)
            if kind in ASKED
        ]
        if not asked:
            return
        agent = {"agentId": self._stream.agent_id}
        names = {"threadId": self._stream.thread_id, **agent, "runId": run_id}
        self._copy(connection, INBOX_STREAM, asked, names)
        change = "agent_waits" if asked[-1][0] in ASKING else "agent_goes_on"
        for above_id, *stream in connection.all("agents_above", run_id):
            self._copy(connection, Stream(*stream), asked, agent)
            connection.run(change, run_id=above_id, now=now)

    def _copy(
        self,
        connection: GroupConnection,
        stream: Stream,
        events: Sequence[tuple[str, bytes]],
        names: dict[str, str],
    ) -> None:
        """Append events of this stream to another one, with where they come from."""
        where = json.dumps(names).encode()
        bodies = [b"%b,%b" % (body[:-1], where[1:]) for _, body in events]
        key, head = connection.find_stream(stream)
        records = numbered(head, [kind for kind, _ in events], bodies)
        connection.store(key, records)
        self.appended.append((stream, records))


def count_active(
    connection: GroupConnection, run_id: str, now: int, spent: Spent, charged_ms: int = 0
) -> None:
    """Note how long a run has been active in all, and add to the day's sum of its profile.

    In this order: what it has been active since then is the difference to its row.
    """
    connection.run(
        "add_spent",
        run_id=run_id,
        day=now // DAY_MS,
        cost_usd=spent.cost_usd,
        turns=spent.turns,
        active_ms=spent.active_ms,
        charged_ms=charged_ms,
    )
    connection.run("run_active_ms", spent.active_ms, run_id)


def _enter(
    connection: GroupConnection, stream: Stream, guard: Guard, now: int
) -> tuple[str, int, int]:
    """Check the guard; return the run that the append is about, and its stream's key and head."""
    if isinstance(guard, Drives):
        # In one look, for this is what nearly all appends are.
        row = connection.one("fence", guard.run_id)
        if row is None or row[1] or row[0] != guard.generation:
            raise Refused(connection.find_run(guard.run_id))
        if guard.asks and (asked := connection.open_question(guard.run_id)) is not None:
            raise Refused(asked)
        return guard.run_id, row[2], row[3]
    run_id = _admit(connection, stream, guard, now)
    return run_id, *connection.find_stream(stream)


def _admit(
    connection: GroupConnection, stream: Stream, guard: Starts | Decides | Cancels, now: int
) -> str:
    """Check the guard of what comes from outside; return the run that it is about."""
    match guard:
        case Starts():
            _start(connection, stream, guard, now)
            return guard.run.id
        case Decides(request_id, late):
            asked = connection.find_permission(request_id)
            if asked is None or asked.granted is not None:
                raise Refused(asked)
            if (asked.expires_at <= now) is not late:
                raise Refused(asked)
            run = connection.find_run(asked.run_id)
            if run is None or run.cancel_requested_at is not None:
                # Whoever ends the run answers its question too.
                raise Refused(asked)
            return asked.run_id
        case Cancels(run_id):
            run = connection.find_run(run_id)
            if run is None or run.terminal or run.cancel_requested_at is not None:
                raise Refused(run)
            return run_id


def _start(connection: GroupConnection, stream: Stream, guard: Starts, now: int) -> None:
    """Make the rows of a run that starts."""
    if guard.key is not None and (kept := find_start(connection, guard.key)) is not None:
        raise Refused(kept)
    if (row := connection.one("tombstone", stream.thread_id)) is not None:
        raise Refused(Tombstone(*row))
    if (active := connection.active_run(stream)) is not None:
        raise Refused(active)
    if guard.run.parent_run_id is not None:
        _check_parent(connection, guard.run.id, guard.run.parent_run_id)
    if guard.goes_on and not _is_thread(connection, stream.thread_id):
        raise Refused(None)
    if guard.opening is not None and _is_thread(connection, stream.thread_id):
        raise Refused(None)
    run = guard.run
    if run.parent_run_id is None:
        # A thread says of itself what its own agent is, and not what this one calls in.
        connection.run(
            "add_thread",
            id=stream.thread_id,
            title=run.title,
            profile_id=run.profile_id,
            model=run.model,
            now=now,
        )
    connection.run("add_stream", stream.agent_id, stream.thread_id)
    _, head = connection.find_stream(stream)
    if (opening := guard.opening) is not None:
        head = opening.history
        connection.run("open_thread", id=stream.thread_id, history_to=head, hidden=opening.hidden)
    connection.run(
        "add_run",
        id=run.id,
        thread_id=stream.thread_id,
        agent_id=stream.agent_id,
        profile_id=run.profile_id,
        model=run.model,
        timeout_ms=run.timeout_ms,
        start_seq=head,
        now=now,
        parent_run_id=run.parent_run_id,
        agent_name=run.name,
    )
    if guard.key is not None:
        key, fallback = guard.key, guard.fallback
        said = fallback.model_dump_json() if fallback is not None else None
        connection.run("forget_starts", now - KEYS_KEPT_MS)
        connection.run(
            "keep_start", key.caller, key.route, key.key, key.fingerprint, run.id, said, now
        )


def _check_parent(connection: GroupConnection, run_id: str, parent_run_id: str) -> None:
    """Refuse an agent's run that has begun before, or whose own run ends."""
    if (begun := connection.find_run(run_id)) is not None:
        raise Refused(begun)
    parent = connection.find_run(parent_run_id)
    if parent is None or parent.terminal or parent.cancel_requested_at is not None:
        raise Refused(parent)


def _is_thread(connection: GroupConnection, thread_id: str) -> bool:
    return thread_id != INBOX and connection.one("thread_exists", thread_id) is not None


def find_start(connection: GroupConnection, key: IdempotencyKey) -> KeptStart | None:
    """Return what was started with this key before."""
    row = connection.one("kept_start", key.caller, key.route, key.key)
    return None if row is None else kept_start_of(row, connection.find_run(row[1]))


def kept_start_of(row: Sequence[Any], run: Run | None) -> KeptStart:
    """Return the start in a row of `kept_start`."""
    fallback = Fallback.model_validate_json(row[2]) if row[2] is not None else None
    return KeptStart(row[0], row[1], run, fallback)


def _change_rows(connection: GroupConnection, event: Event, row: dict[str, Any]) -> None:
    """Change the rows that the event is about. Most events are about none."""
    match event:
        case SessionStart():
            connection.run("run_starts", **row)
        case TurnEnd():
            total = _usage_of(connection, row).plus(event.usage)
            connection.run("run_usage", **row, usage=total.model_dump_json())
        case CompactionEnd(usage=Usage() as used):
            # First, for the sum names the model that has answered last.
            total = _usage_of(connection, row)
            used = used.plus(total) if total.model else used
            connection.run("run_usage", **row, usage=used.model_dump_json())
        case PermissionRequest() | QuestionRequest() | ClientCall():
            connection.run(
                "ask",
                **row,
                request_id=event.request_id,
                tool_name=_tool_name(event),
                operation_hash=event.operation_hash,
                expires_at=event.expires_at,
                turn_index=event.turn_index,
                question=_question(event),
            )
            connection.run("run_waits", **row)
        case PermissionResponse() | QuestionResponse() | ClientResult():
            connection.run(
                "decide",
                **row,
                request_id=event.request_id,
                granted=event.granted,
                decided_by=event.decided_by,
            )
            connection.run("run_goes_on", **row)
            connection.run("line_moves", **row)
        case RunCancel():
            connection.run("run_cancel", **row)
        case SessionEnd():
            usage = event.total_usage.model_dump_json()
            connection.run("run_ends", **row, status=event.status, code=event.code, usage=usage)
            connection.run("parent_goes_on", **row)
            connection.run("touch_thread", **row)
        case AgentSpawn():
            # So that it can be followed as soon as it is heard of.
            connection.run("stream_of_agent", **row, agent_id=event.agent_id)
        case AgentComplete(usage=Usage() as used):
            total = _usage_of(connection, row).plus_agent(used)
            connection.run("run_usage", **row, usage=total.model_dump_json())
        case _:
            pass


def _tool_name(event: Asks) -> str:
    """Return the tool that a row is about; where several calls wait together, the first one's."""
    return event.calls[0].tool_name if isinstance(event, ClientCall) else event.tool_name


def _question(event: Asks) -> str | None:
    """Return what a question asks as JSON, for its row; None where a call asks whether it may run.

    In ASCII: a model may spell half a character, which is no text to the database.
    """
    if isinstance(event, PermissionRequest):
        return None
    if isinstance(event, ClientCall):
        return json.dumps({"calls": [called.model_dump() for called in event.calls]})
    shown = {"question": event.question, "options": event.options, "multiple": event.multiple}
    return json.dumps(shown)


def _usage_of(connection: GroupConnection, row: dict[str, Any]) -> Usage:
    run = connection.find_run(row["run_id"])
    assert run is not None
    return run.usage
