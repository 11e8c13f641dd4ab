"""A log that grows does not get slower: how SQLite finds things, and how many steps that takes.

No clock is read here. SQLite says how it would go about a statement (EXPLAIN QUERY PLAN), and calls
back at each step of its virtual machine, whose number is the same on every computer.
"""

import asyncio
import contextlib
import itertools
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.log import (
    Append,
    IdempotencyKey,
    NewRun,
    Private,
    Retention,
    RunQuery,
    Starts,
    Stream,
    ThreadQuery,
)
from ownware_gateway.log.appends import KEYS_KEPT_MS
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import schema_versions, statements
from tests.bench.grown import FIRST_KEY, Shape, Threads, build, run_id, thread_id
from tests.log import (
    Clock,
    decides,
    delta,
    drives,
    message,
    question,
    read_chunks,
    session_end,
    session_start,
    starts,
    whole_run,
)

#: A hundred times as many threads, and in the first of them a hundred times as many events.
SMALL: Final = Shape((Threads(1, 1, 60), Threads(30, 1, 8)))
LARGE: Final = Shape((Threads(1, 100, 60), Threads(3_000, 1, 8)))

LONG: Final = Stream(thread_id(FIRST_KEY))
USUAL: Final = Stream(thread_id(FIRST_KEY + 7))

#: Names of runs that the tests add.
NUMBERS: Final = itertools.count()
PAGE: Final = 10

#: A statement may take so many steps more on the large log. SQLite takes the same ones; the first
#: row of a search may lie elsewhere in its page.
STEPS_MORE: Final = 5

#: What these statements go over is no more than what has not ended, or is not answered.
UNFINISHED: Final = re.compile(
    r"SCAN (runs USING INDEX one_run_at_a_time"
    r"|permissions USING INDEX one_question_at_a_time"
    r"|json_each VIRTUAL TABLE.*)"
)

#: Statements that may go over a table, and why.
MAY_SCAN: Final = {
    "all_streams": "once, after a restore: every stream gets a gap",
    "run_columns": "the beginning of statements; whole ones are looked at as they are executed",
    "thread_columns": "the same",
    "permission_columns": "the same",
    "agents_above": "what it has found itself: as many as agents are deep",
    "agents_below": "what it has found itself: as many as a run may spawn",
}

#: Lists of everything go over a table in its order, and stop after a page.
PAGES: Final = (
    "SCAN runs",
    "SCAN threads USING INDEX threads_by_update",
    "SCAN threads USING INDEX threads_shown",
)


#: An age that every run has, the newest too.
SOON_MS: Final = -(10**13)

Logs = tuple[SqliteLog, SqliteLog]
Operation = Callable[[SqliteLog], Awaitable[Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small log and the large one."""
    folder = tmp_path_factory.mktemp("grown")
    for name, shape in (("small.db", SMALL), ("large.db", LARGE)):
        asyncio.run(build(folder / name, shape))
    return folder / "small.db", folder / "large.db"


@pytest.fixture
async def logs(files: tuple[Path, Path]) -> AsyncIterator[Logs]:
    async with contextlib.AsyncExitStack() as stack:
        opened = [await SqliteLog.open(file, Clock()) for file in files]
        for log in opened:
            stack.push_async_callback(log.close)
        yield opened[0], opened[1]


def connections(log: SqliteLog) -> list[Any]:
    return [log._writer.connection, *log._readers]


def outside(file: Path) -> contextlib.closing[sqlite3.Connection]:
    """Another program that opens the file."""
    return contextlib.closing(sqlite3.connect(file, isolation_level=None))


async def steps(log: SqliteLog, operation: Operation) -> int:
    """How many steps of SQLite's virtual machine something takes."""
    counter = itertools.count()
    # Twice: at the first time statements are prepared, which newer versions count as well.
    await operation(log)
    for connection in connections(log):
        await connection.set_progress_handler(lambda: next(counter) < 0, 1)
    await operation(log)
    for connection in connections(log):
        await connection.set_progress_handler(None, 0)
    return next(counter)


async def grown(logs: Logs, operations: dict[str, Operation]) -> dict[str, Any]:
    """The operations that take more steps on the large log, with both numbers."""
    taken = {
        name: [await steps(log, operation) for log in logs]
        for name, operation in operations.items()
    }
    assert all(small for small, _ in taken.values()), taken
    return {
        name: (small, large) for name, (small, large) in taken.items() if large > small + STEPS_MORE
    }


async def from_the_end(log: SqliteLog, stream: Stream, back: int) -> None:
    """Open a stream a little before its end, as a client does that has lost its connection."""
    head = await log.head(stream)
    assert head is not None
    since = head.last - back
    await log.gap(stream, since)
    assert (await log.chunk(stream, since) is not None) == (back > 0)
    await log.active_run(stream)


async def has_a_run(log: SqliteLog, thread: str | None) -> None:
    """Have a run with a key and a question, as the engine does: in a thread, or in a new one."""
    name = f"{next(NUMBERS)}"
    stream = Stream(thread or f"thread_{name}")
    run = NewRun(id=f"run_{name}", profile_id="p", model="m", timeout_ms=60_000, title="")
    key = IdempotencyKey("caller", "route", name, "")
    await log.kept_start(key)
    profile = [Private("profile", b"{}")]
    await log.append(Append(stream, Starts(run, key), [message(run.id)], profile)).wait()
    driven = (session_start(run.id), *[delta()] * 20, question(name))
    await log.append(drives(run.id, *driven, stream=stream)).wait()
    await log.append(replace(decides(name), stream=stream)).wait()
    answer = [Private("message", b"{}"), Private("summary", b"{}")]
    ended = session_end(run.id)
    await log.append(drives(run.id, ended, stream=stream, private=answer)).wait()


async def second_page(log: SqliteLog, profile_id: str | None) -> None:
    first = await log.threads(ThreadQuery(profile_id, limit=PAGE))
    assert await log.threads(ThreadQuery(profile_id, before=first[-1][0], limit=PAGE))


async def last_run(log: SqliteLog) -> None:
    """Read of a long thread what a run that goes on needs to know of itself."""
    head = await log.head(LONG)
    assert head is not None
    start = head.last - 60
    assert await log.read(LONG, start, deltas=False)
    assert await log.private(LONG, "profile", after=start)
    assert await log.private(LONG, "message", after=start)


OPENING: Final[dict[str, Operation]] = {
    "at its end": lambda log: from_the_end(log, LONG, 0),
    "ten events before": lambda log: from_the_end(log, LONG, 10),
    "another one": lambda log: from_the_end(log, USUAL, 10),
    "as JSON": lambda log: log.read(LONG, 7, limit=PAGE),
}
FINDING: Final[dict[str, Operation]] = {
    "threads": lambda log: log.threads(ThreadQuery(limit=PAGE)),
    "threads, on": lambda log: second_page(log, None),
    "threads of a profile": lambda log: log.threads(ThreadQuery("bench", limit=PAGE)),
    "threads of a profile, on": lambda log: second_page(log, "bench"),
    "threads of none": lambda log: log.threads(ThreadQuery("nobody")),
    "thread": lambda log: log.thread(LONG.thread_id),
    "no thread": lambda log: log.thread("thread_no"),
    "tombstone": lambda log: log.tombstone("thread_no"),
    "agents": lambda log: log.agents(LONG.thread_id),
    "runs": lambda log: log.runs(RunQuery(limit=PAGE)),
    "runs, on": lambda log: log.runs(RunQuery(before=25, limit=PAGE)),
    "runs of a status": lambda log: log.runs(RunQuery("succeeded", limit=PAGE)),
    "runs of a status, on": lambda log: log.runs(RunQuery("succeeded", before=25, limit=PAGE)),
    "runs of a status that none has": lambda log: log.runs(RunQuery("failed")),
    "active runs": lambda log: log.runs(RunQuery("active")),
    "active runs of a thread": lambda log: log.runs(RunQuery("active", LONG.thread_id)),
    "runs of a thread": lambda log: log.runs(RunQuery(thread_id=LONG.thread_id, limit=1)),
    "run": lambda log: log.run(run_id(9)),
    "active run": lambda log: log.active_run(LONG),
    "questions": lambda log: log.pending(),
    "questions of a run": lambda log: log.pending(run_id=run_id(20)),
    "question": lambda log: log.permission("perm_no"),
    "a summary": lambda log: log.last_summary(LONG, 10**9),
    "what was spent": lambda log: log.spent("bench", 20_000),
}
STARTING: Final[dict[str, Operation]] = {
    "charge": lambda log: log.charge(),
    "unfinished": lambda log: log.unfinished(),
    "rest": lambda log: log.rest(),
}
RUNNING: Final[dict[str, Operation]] = {
    "in a new thread": lambda log: has_a_run(log, None),
    "in a long thread": lambda log: has_a_run(log, LONG.thread_id),
    "its own facts": last_run,
}


async def test_a_stream_opens_the_same_whatever_is_in_it_and_beside_it(logs: Logs) -> None:
    assert await grown(logs, OPENING) == {}


async def test_lists_and_single_things_are_found_the_same(logs: Logs) -> None:
    assert await grown(logs, FINDING) == {}


async def test_the_start_of_a_gateway_looks_at_what_has_not_ended_alone(logs: Logs) -> None:
    assert await grown(logs, STARTING) == {}


async def test_a_run_is_stored_the_same(logs: Logs) -> None:
    assert await grown(logs, RUNNING) == {}


async def test_facts_are_read_without_a_look_at_the_deltas(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    taken = []
    for name, deltas in (("few", 5), ("many", 5_000)):
        stream = Stream(f"thread_{name}")
        await whole_run(log, f"run_{name}", *[delta()] * deltas, stream=stream)
        taken.append(
            await steps(log, partial(SqliteLog.read, stream=stream, after=0, deltas=False))
        )
    await log.close()
    assert taken[1] <= taken[0] + STEPS_MORE


@pytest.mark.parametrize("level", [1, 2])
async def test_runs_that_were_pruned_are_not_gone_over_again(
    files: tuple[Path, Path], tmp_path: Path, level: int
) -> None:
    ages = {1: Retention(deltas_ms=SOON_MS), 2: Retention(events_ms=SOON_MS)}
    taken = []
    for file in files:
        copy = shutil.copy(file, tmp_path)
        with outside(Path(copy)) as other:
            other.execute("UPDATE runs SET pruned = ? WHERE key > 3", (level,))
        log = await SqliteLog.open(Path(copy), Clock())
        assert await log.prune(ages[level]) > 0
        taken.append(await steps(log, lambda log: log.prune(ages[level])))
        assert await log.prune(ages[level]) == 0
        await log.close()
    assert taken[1] <= taken[0] + STEPS_MORE


async def test_a_start_forgets_old_keys_some_at_a_time(tmp_path: Path) -> None:
    file, clock = tmp_path / "gateway.db", Clock()
    log = await SqliteLog.open(file, clock)
    with outside(file) as other:
        old_ms = clock.now_ms - KEYS_KEPT_MS
        row = "INSERT INTO idempotency VALUES ('caller', 'route', ?, '', 'run', NULL, ?)"
        other.executemany(row, [(f"old{n}", old_ms - 1 + n // 250) for n in range(260)])

        def left() -> int:
            return int(other.execute("SELECT count(*) FROM idempotency").fetchone()[0])

        counts = []
        for _ in range(4):
            await has_a_run(log, None)
            counts.append(left())
    await log.close()
    # Each start keeps its own key; the ten that are not too old stay.
    assert counts == [161, 62, 13, 14]


# -- how SQLite goes about it


def plan(database: sqlite3.Connection, sql: str) -> list[str]:
    """What SQLite says that it would do."""
    names = re.findall(r":(\w+)", sql)
    values: Any = dict.fromkeys(names) if names else [None] * sql.count("?")
    rows = database.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
    return [row[3].replace("TABLE ", "", 1) if "SCAN TABLE" in row[3] else row[3] for row in rows]


def scans(database: sqlite3.Connection, sql: str) -> list[str]:
    """What a statement goes over from one end to the other, but for what is never much."""
    lines = plan(database, sql)
    found = [line for line in lines if line.startswith("SCAN") and not UNFINISHED.match(line)]
    stops = "LIMIT" in sql and not any("TEMP B-TREE" in line for line in lines)
    return [line for line in found if not (stops and line in PAGES)]


def test_no_named_statement_goes_over_a_table() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        for _, script in schema_versions():
            database.executescript(script)
        found = {name: scans(database, sql) for name, sql in statements().items()}
    assert {name for name, lines in found.items() if lines} == set(MAY_SCAN)


async def test_no_statement_that_serves_a_request_goes_over_a_table(
    logs: Logs, files: tuple[Path, Path]
) -> None:
    executed: set[str] = set()
    log = logs[0]
    for connection in connections(log):
        await connection.set_trace_callback(executed.add)
    for operation in (OPENING | FINDING | STARTING | RUNNING).values():
        await operation(log)
    for connection in connections(log):
        await connection.set_trace_callback(None)
    asked = [sql for sql in executed if sql.startswith(("SELECT", "INSERT", "UPDATE", "DELETE"))]
    assert len(asked) > len(OPENING | FINDING | STARTING | RUNNING)
    with outside(files[0]) as database:
        found = {sql: scans(database, sql) for sql in asked}
    assert {sql: lines for sql, lines in found.items() if lines} == {}


# -- logs that were made before


def turn_back(newest: Path, version: int) -> Path:
    """Return a file of an older version with the same rows, as far as it has their columns."""
    older = newest.with_name("older.db")
    with contextlib.closing(sqlite3.connect(older)) as database:
        database.executescript(f"ATTACH '{newest}' AS newest; PRAGMA user_version={version};")
        for _, script in schema_versions()[:version]:
            database.executescript(script)
        tables = database.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'")
        for (table,) in tables.fetchall():
            rows = database.execute("SELECT name FROM pragma_table_info(?, 'main')", (table,))
            columns = ", ".join(f'"{name}"' for (name,) in rows)
            database.execute(
                f"INSERT INTO {table} ({columns}) SELECT {columns} FROM newest.{table}"
            )
        database.commit()
    return older


@pytest.mark.parametrize("version", range(1, schema_versions()[-1][0]))
async def test_a_log_of_an_older_version_becomes_a_newer_one_with_all_that_is_in_it(
    tmp_path: Path, version: int
) -> None:
    log = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    await whole_run(log, "run_1", delta(), question("asked"))
    log.append(starts("run_2"))
    await log.append(drives("run_2", session_start("run_2"), question("open"))).wait()
    before = await read_chunks(log), await log.runs(RunQuery()), await log.pending()
    await log.close()
    file = turn_back(tmp_path / "gateway.db", version)

    log = await SqliteLog.open(file, Clock())
    assert (await read_chunks(log), await log.runs(RunQuery()), await log.pending()) == before
    assert [run.id for run in await log.unfinished()] == ["run_2"]
    assert await log.prune(Retention(events_ms=SOON_MS)) > 0
    await log.close()
    with outside(file) as upgraded, contextlib.closing(sqlite3.connect(":memory:")) as new:
        for _, script in schema_versions():
            new.executescript(script)
        schema = "SELECT name, sql FROM sqlite_schema ORDER BY name"
        assert upgraded.execute(schema).fetchall() == new.execute(schema).fetchall()
