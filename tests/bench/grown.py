"""Logs of any size, made in bulk: by the gateway's own schema, with the events of real runs.

Everything stands where the gateway would have put it, in the order in which it would have. Only
the number of threads, and how much is in them, is chosen.
"""

import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ownware_gateway.events import (
    Event,
    PermissionRequest,
    PermissionResponse,
    SessionEnd,
    SessionStart,
    TextComplete,
    TextDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallStart,
    TurnEnd,
    TurnStart,
    Usage,
    UserMessage,
)
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import statements
from ownware_gateway.models import AssistantTurn
from ownware_gateway.transcript import Answer

#: A delta is as long as to make its event about 200 bytes; the whole answer that ends the turn is
#: as long as if each had been a token, for what it takes is not what grows here.
_DELTA: Final = "x" * 138
_TOKEN: Final = "word "

#: When the oldest event happened (2024-01-01), and how far apart the runs are.
_BEGAN_MS: Final = 1_704_067_200_000
_RUN_EVERY_MS: Final = 60_000

#: One run in so many asks a person, who answers.
_ASKS_EVERY: Final = 10

#: Stand for names of the same length until the run is stored.
_RUN: Final = "run_" + "0" * 20
_ASKED: Final = "perm_" + "0" * 20

#: The stream over all threads is the first that a log has.
_INBOX_KEY: Final = 1
FIRST_KEY: Final = _INBOX_KEY + 1

_SQL: Final = statements()
_ADD_THREAD: Final = (
    "INSERT INTO threads (key, id, profile_id, model, title, created_at, updated_at)"
    " VALUES (?, ?, 'bench', 'openai:bench', ?, ?, ?)"
)
_ADD_STREAM: Final = (
    "INSERT INTO streams (key, thread_key, agent_id, head) VALUES (?, ?, 'root', ?)"
)
_ADD_RUN: Final = (
    "INSERT INTO runs (key, id, thread_key, agent_id, profile_id, model, status, timeout_ms,"
    " under_way, start_seq, end_seq, usage, accepted_at, started_at, updated_at, terminal_at)"
    " VALUES (?, ?, ?, 'root', 'bench', 'openai:bench', 'succeeded', 600000, 0,"
    " ?, ?, ?, ?, ?, ?, ?)"
)
_ADD_PERMISSION: Final = (
    "INSERT INTO permissions (request_id, run_key, tool_name, operation_hash, turn_index,"
    " requested_at, expires_at, granted, decided_by, decided_at)"
    " VALUES (?, ?, 'shell_execute', 'hash', 0, ?, ?, 1, 'user', ?)"
)


@dataclass(frozen=True, slots=True)
class Threads:
    """So many threads, each of so many runs, each of so many events."""

    count: int
    runs: int
    events: int

    @property
    def head(self) -> int:
        """The last number in each of the threads."""
        return self.runs * self.events


@dataclass(frozen=True, slots=True)
class Shape:
    """What a log holds, in the order in which it came there."""

    parts: Sequence[Threads]

    @property
    def events(self) -> int:
        """How many events are in the threads."""
        return sum(part.count * part.head for part in self.parts)

    @property
    def threads(self) -> int:
        """How many threads there are."""
        return sum(part.count for part in self.parts)

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return sum(part.count * part.runs for part in self.parts)

    def __iter__(self) -> Iterator[tuple[int, Threads]]:
        """Yield each thread's key and what it is one of."""
        kinds = itertools.chain.from_iterable([part] * part.count for part in self.parts)
        return zip(itertools.count(FIRST_KEY), kinds, strict=False)


def thread_id(key: int) -> str:
    """Return the name of a thread; spread over the index as random ones are."""
    return f"thread_{_spread(key)}"


def run_id(key: int) -> str:
    """Return the name of a run."""
    return f"run_{_spread(key)}"


def _spread(key: int) -> str:
    # An odd factor modulo a power of two: no two keys share a name.
    return f"{key * 0x9E3779B97F4A7C15F39D % 2**80:020x}"


def _plain(count: int) -> list[Event]:
    """Return the events of a run that only answers."""
    return [*_opening(), *_answer(count - 4, 0), _end(1)]


def _asking(count: int) -> list[Event]:
    """Return the events of a run that asks a person before it answers."""
    tool: dict[str, Any] = {"tool_call_id": "call_1", "tool_name": "shell_execute"}
    asked: list[Event] = [
        ToolCallStart(**tool, turn_index=0),
        ToolCallArgsDelta(tool_call_id="call_1", delta='{"command":"ls"}', turn_index=0),
        TextComplete(text="", turn_index=0),
        PermissionRequest(
            **tool,
            request_id=_ASKED,
            input={"command": "ls"},
            reason="The profile asks.",
            operation_hash="hash",
            expires_at=_BEGAN_MS,
            turn_index=0,
        ),
        PermissionResponse(
            request_id=_ASKED, granted=True, decided_by="user", reason="", turn_index=0
        ),
        ToolCallExecute(**tool, input={"command": "ls"}, turn_index=0),
        ToolCallEnd(
            **tool, result="a", is_error=False, duration_ms=5, turn_index=0, output_bytes_raw=1
        ),
        TurnEnd(turn_index=0, stop_reason="tool_use", usage=Usage(), timestamp=_BEGAN_MS),
        TurnStart(turn_index=1, timestamp=_BEGAN_MS),
    ]
    return [*_opening(), *asked, *_answer(count - 4 - len(asked), 1), _end(2)]


def _opening() -> list[Event]:
    return [
        UserMessage(run_id=_RUN, text="Say something.", timestamp=_BEGAN_MS),
        SessionStart(
            run_id=_RUN,
            session_id=_RUN,
            profile_id="bench",
            model="openai:bench",
            timestamp=_BEGAN_MS,
        ),
        TurnStart(turn_index=0, timestamp=_BEGAN_MS),
    ]


def _answer(count: int, turn: int) -> list[Event]:
    deltas = count - 2
    return [
        *[TextDelta(text=_DELTA, turn_index=turn)] * deltas,
        TextComplete(text=_TOKEN * deltas, turn_index=turn),
        TurnEnd(turn_index=turn, stop_reason="end_turn", usage=Usage(), timestamp=_BEGAN_MS),
    ]


def _end(turns: int) -> Event:
    return SessionEnd(
        run_id=_RUN,
        session_id=_RUN,
        status="succeeded",
        reason="end_turn",
        total_usage=Usage(),
        turn_count=turns,
        timestamp=_BEGAN_MS,
    )


class _Kind:
    """The rows of one kind of run, but for its names and numbers."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.bodies = [(event.type, event.encode()[:-1]) for event in events]
        self.named = {at for at, (_, body) in enumerate(self.bodies) if b"0" * 20 in body}
        self.answers = [
            (at + 1, _stored(event.text))
            for at, event in enumerate(events)
            if isinstance(event, TextComplete)
        ]

    def rows(self, stream: int, start: int, name: bytes) -> Iterator[tuple[int, int, str, bytes]]:
        """Yield what `add_event` stores."""
        zeros = b"0" * 20
        for at, (kind, body) in enumerate(self.bodies):
            seq = start + at + 1
            said = body.replace(zeros, name) if at in self.named else body
            yield stream, seq, kind, b'%b,"seq":%d}' % (said, seq)


def _stored(text: str) -> bytes:
    turn = AssistantTurn(text=text, dialect="chat", model="bench")
    return Answer(turn, "end_turn", Usage()).dump()


class _Bulk:
    """Fills an empty log; one transaction, in the order of the keys."""

    def __init__(self, connection: sqlite3.Connection, profile: bytes) -> None:
        self._connection = connection
        self._profile = profile
        self._kinds: dict[tuple[int, bool], _Kind] = {}
        self._run_key = 0
        self._asked: list[tuple[bytes, _Kind, bytes]] = []
        self._usage = Usage().model_dump_json()

    def fill(self, shape: Shape) -> None:
        for key, kind in shape:
            self._thread(key, kind)
        self._inbox()

    def _thread(self, key: int, threads: Threads) -> None:
        began_ms = _BEGAN_MS + self._run_key * _RUN_EVERY_MS
        ended_ms = began_ms + threads.runs * _RUN_EVERY_MS
        execute = self._connection.execute
        execute(_ADD_THREAD, (key, thread_id(key), f"The thread {key}", began_ms, ended_ms))
        execute(_ADD_STREAM, (key, key, threads.head))
        for number in range(threads.runs):
            self._run(key, number * threads.events, threads.events)

    def _run(self, thread: int, start: int, events: int) -> None:
        self._run_key += 1
        key, now_ms = self._run_key, _BEGAN_MS + self._run_key * _RUN_EVERY_MS
        asks = key % _ASKS_EVERY == 0 and events >= 20
        if (events, asks) not in self._kinds:
            made = (_asking if asks else _plain)(events)
            assert len(made) == events
            self._kinds[events, asks] = _Kind(made)
        kind, name = self._kinds[events, asks], _spread(key).encode()
        self._many("add_event", kind.rows(thread, start, name))
        facts: list[tuple[int, str, bytes]] = [
            (1, "profile.00", self._profile),
            *((at, "message.00", body) for at, body in kind.answers),
        ]
        self._many("add_private", ((thread, start + at, which, body) for at, which, body in facts))
        end = start + events
        row = (key, run_id(key), thread, start, end, self._usage, *[now_ms] * 4)
        self._connection.execute(_ADD_RUN, row)
        if asks:
            asked = (f"perm_{_spread(key)}", key, now_ms, now_ms, now_ms)
            self._connection.execute(_ADD_PERMISSION, asked)
            self._asked.append((f'"threadId":"{thread_id(thread)}"'.encode(), kind, name))

    def _inbox(self) -> None:
        """Copy every question and answer to the stream over all threads."""
        rows: list[tuple[int, int, str, bytes]] = []
        for where, kind, name in self._asked:
            for _, _, which, body in kind.rows(_INBOX_KEY, 0, name):
                if which.startswith("permission."):
                    seq = len(rows) + 1
                    said = body.rpartition(b',"seq":')[0]
                    said += b',%b,"agentId":"root","runId":"run_%b","seq":%d}' % (where, name, seq)
                    rows.append((_INBOX_KEY, seq, which, said))
        self._many("add_event", rows)
        self._connection.execute(_SQL["move_head"], (len(rows), _INBOX_KEY))

    def _many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(_SQL[statement], rows)


async def build(file: Path, shape: Shape, profile: bytes = b"{}") -> None:
    """Make a log of a shape in a file that does not exist yet."""
    await (await SqliteLog.open(file, lambda: _BEGAN_MS)).close()
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        # A build that breaks off is thrown away, so nothing need be safe.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-262144"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("BEGIN")
        _Bulk(connection, profile).fill(shape)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL").fetchall()


def put_back(file: Path, shape: Shape) -> None:
    """Take away what was added to a log since it was built, so that it can be used again."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        last = shape.threads + _INBOX_KEY
        for table, column, highest in (
            ("events", "stream_key", last),
            ("private", "stream_key", last),
            ("streams", "key", last),
            ("threads", "key", last),
            ("runs", "key", shape.runs),
        ):
            connection.execute(f"DELETE FROM {table} WHERE {column} > ?", (highest,))
        longer = connection.execute(
            "SELECT key, head FROM streams WHERE key > ?", (_INBOX_KEY,)
        ).fetchall()
        for (key, threads), (found, head) in zip(shape, longer, strict=True):
            assert key == found
            if head > threads.head:
                for table in ("events", "private"):
                    connection.execute(
                        f"DELETE FROM {table} WHERE stream_key = ? AND seq > ?", (key, threads.head)
                    )
                connection.execute(_SQL["move_head"], (threads.head, key))
                connection.execute(
                    "UPDATE threads SET updated_at = (SELECT max(terminal_at) FROM runs"
                    " WHERE thread_key = threads.key) WHERE key = ?",
                    (key,),
                )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
