"""What the SQLite log owes to its file: modes, versions, full disks, crashes, and no leftovers."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from ownware_gateway.errors import BootError
from ownware_gateway.events import PermissionRequest, TextDelta
from ownware_gateway.log import (
    CHUNK_BYTES_MAX,
    Append,
    Drives,
    Private,
    Refused,
    RunQuery,
    ThreadQuery,
    writer,
)
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import schema_versions
from tests.log import (
    PATIENCE_S,
    STREAM,
    Clock,
    delta,
    drives,
    question,
    read_chunks,
    session_end,
    session_start,
    starts,
    until,
    whole_run,
)

#: The version that a log of this gateway has.
NEWEST: Final = schema_versions()[-1][0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
async def log(file: Path) -> AsyncIterator[SqliteLog]:
    opened = await SqliteLog.open(file, Clock())
    yield opened
    await opened.close()


def outside(file: Path) -> contextlib.closing[sqlite3.Connection]:
    """Another program that opens the file; it waits for nothing."""
    return contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=0))


async def pragma(log: SqliteLog, text: str) -> object:
    rows = list(await log._writer.connection.execute_fetchall(f"PRAGMA {text}"))
    return rows[0][0]


async def fill_disk(log: SqliteLog) -> None:
    """Let the file grow no more: what SQLite then says is what it says of a full disk."""
    await pragma(log, f"max_page_count={await pragma(log, 'page_count')}")


async def free_disk(log: SqliteLog) -> None:
    await pragma(log, "max_page_count=1000000")


def large() -> list[TextDelta]:
    return [delta("x" * 100_000)]


# -- the file


async def test_nobody_else_may_read_the_file_or_those_beside_it(file: Path) -> None:
    umask = os.umask(0)
    try:
        log = await SqliteLog.open(file, Clock())
        await log.append(starts("run_1")).wait()
        modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in file.parent.iterdir()}
        await log.close()
    finally:
        os.umask(umask)
    assert modes == dict.fromkeys(
        ("gateway.counter", "gateway.db", "gateway.db-wal", "gateway.db-shm"), 0o600
    )


async def test_a_file_that_others_could_read_is_made_private(file: Path) -> None:
    await (await SqliteLog.open(file, Clock())).close()
    file.chmod(0o644)
    log = await SqliteLog.open(file, Clock())
    await log.append(starts("run_1")).wait()
    modes = {stat.S_IMODE(item.stat().st_mode) for item in file.parent.iterdir()}
    await log.close()
    assert modes == {0o600}


async def test_the_writer_syncs_every_commit_and_readers_only_read(log: SqliteLog) -> None:
    assert await pragma(log, "journal_mode") == "wal"
    assert await pragma(log, "synchronous") == 2
    assert await pragma(log, "mmap_size") == 0
    assert await pragma(log, "secure_delete") == 1
    for reader in log._readers:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await reader.execute("DELETE FROM meta")


async def test_every_log_has_a_name_and_a_secret_of_its_own(tmp_path: Path) -> None:
    seen = set()
    for name in ("one.db", "two.db"):
        log = await SqliteLog.open(tmp_path / name, Clock())
        await log.append(starts("run_1")).wait()
        head = await log.head(STREAM)
        assert head is not None
        seen |= {head.epoch, log.secret}
        assert len(log.secret) == 32
        await log.close()
    assert len(seen) == 4


async def test_a_file_of_a_newer_version_is_left_alone(file: Path) -> None:
    await (await SqliteLog.open(file, Clock())).close()
    with outside(file) as other:
        other.execute("PRAGMA user_version=99")
    before = file.read_bytes()

    with pytest.raises(BootError, match=r"version 99.*newer gateway"):
        await SqliteLog.open(file, Clock())

    assert file.read_bytes() == before
    await no_leftovers(file)


@pytest.mark.parametrize("content", [b"this is no database at all. " * 100, b"SQLite format 3\0"])
async def test_a_file_that_is_no_log_is_refused_and_left_alone(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    with pytest.raises(BootError, match=r"gateway\.db cannot be opened"):
        await SqliteLog.open(file, Clock())

    assert file.read_bytes() == content
    await no_leftovers(file)


async def test_a_log_of_an_older_version_is_copied_before_it_is_upgraded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await SqliteLog.open(file, Clock())
    await whole_run(log, "run_1", delta())
    before = await read_chunks(log)
    await log.close()
    newer = [*schema_versions(), (NEWEST + 1, "ALTER TABLE threads ADD COLUMN colour TEXT;")]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "schema_versions", lambda: newer)
        log = await SqliteLog.open(file, Clock())
        assert await pragma(log, "user_version") == NEWEST + 1
        assert await read_chunks(log) == before
        await whole_run(log, "run_2")
        await log.close()

    backup = file.with_name(f"gateway.v{NEWEST}.backup")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    log = await SqliteLog.open(backup, Clock())
    assert await read_chunks(log) == before
    await log.close()


async def test_an_upgrade_that_fails_changes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await SqliteLog.open(file, Clock())
    await whole_run(log, "run_1")
    before = await read_chunks(log)
    await log.close()
    broken = "ALTER TABLE threads ADD COLUMN colour TEXT; ALTER TABLE nothing ADD COLUMN x;"
    newer = [*schema_versions(), (NEWEST + 1, broken)]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "schema_versions", lambda: newer)
        with pytest.raises(BootError, match="nothing"):
            await SqliteLog.open(file, Clock())

    log = await SqliteLog.open(file, Clock())
    assert await pragma(log, "user_version") == NEWEST
    assert await read_chunks(log) == before
    rows = await log._writer.connection.execute_fetchall(
        "SELECT name FROM pragma_table_info('threads')"
    )
    assert ("colour",) not in list(rows)
    await log.close()


# -- commits that fail


async def test_a_full_disk_loses_nothing_and_is_said_until_there_is_room(log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    assert await log.healthy() is None
    await fill_disk(log)
    commits = [log.append(drives("run_1", *large())) for _ in range(3)]

    async def unhealthy() -> bool:
        return await log.healthy() is not None

    await until(unhealthy)
    assert "full" in str(await log.healthy())
    commits.append(log.append(drives("run_1", delta("behind"))))
    assert await log.chunk(STREAM, 1) is None
    await free_disk(log)

    async with asyncio.timeout(PATIENCE_S):
        assert [await commit.wait() for commit in commits] == [2, 3, 4, 5]
    assert await log.healthy() is None
    assert [record.seq for record in await log.read(STREAM, 0)] == [1, 2, 3, 4, 5]
    rows = list(await log._writer.connection.execute_fetchall("PRAGMA integrity_check"))
    assert rows[0][0] == "ok"


async def test_a_locked_file_is_tried_again(file: Path, log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    await pragma(log, "busy_timeout=1")
    with outside(file) as other:
        other.execute("BEGIN IMMEDIATE")
        commit = log.append(drives("run_1", delta()))

        async def unhealthy() -> bool:
            return "locked" in str(await log.healthy())

        await until(unhealthy)
        other.execute("ROLLBACK")
    assert await commit.wait() == 2
    assert await log.healthy() is None


async def test_closing_a_log_that_cannot_be_written_fails_what_waits_and_does_not_hang(
    file: Path,
) -> None:
    log = await SqliteLog.open(file, Clock())
    await log.append(starts("run_1")).wait()
    await fill_disk(log)
    commits = [log.append(drives("run_1", *large())) for _ in range(3)]
    await log.run("run_1")

    async with asyncio.timeout(PATIENCE_S):
        await log.close()

    for commit in commits:
        with pytest.raises(sqlite3.OperationalError, match="full"):
            await commit.wait()
    await no_leftovers(file)
    log = await SqliteLog.open(file, Clock())
    assert [record.seq for record in await log.read(STREAM, 0)] == [1]
    await log.close()


async def test_an_append_to_a_closed_log_fails(file: Path) -> None:
    log = await SqliteLog.open(file, Clock())
    await log.append(starts("run_1")).wait()
    await log.close()
    with pytest.raises(ValueError):
        async with asyncio.timeout(PATIENCE_S):
            await log.append(drives("run_1", delta())).wait()


async def test_closing_commits_what_is_under_way(file: Path) -> None:
    log = await SqliteLog.open(file, Clock())
    log.append(starts("run_1"))
    commits = [log.append(drives("run_1", delta())) for _ in range(50)]
    await log.close()
    assert [await commit.wait() for commit in commits] == list(range(2, 52))


@pytest.mark.parametrize(
    "poison",
    [
        pytest.param([delta(), question("req_1", expires_at=2**63)], id="a number too large"),
        pytest.param(
            [PermissionRequest(**question("req_1").model_dump() | {"toolName": "\ud800"})],
            id="half a character",
        ),
        pytest.param([delta(), question("req_1"), question("req_2")], id="two questions"),
        pytest.param([], id="nothing"),
    ],
)
async def test_an_append_that_cannot_be_stored_fails_alone(
    log: SqliteLog, poison: list[PermissionRequest]
) -> None:
    await log.append(starts("run_1")).wait()
    before = log.append(drives("run_1", delta("before")))
    bad = log.append(Append(STREAM, Drives("run_1", 1), poison, [Private("message", b"never")]))
    after = log.append(drives("run_1", delta("after")))

    async with asyncio.timeout(PATIENCE_S):
        assert await before.wait() == 2
        assert await after.wait() == 3
        with pytest.raises((ValueError, LookupError, OverflowError, sqlite3.IntegrityError)):
            await bad.wait()
    assert await log.private(STREAM, "message") == []
    assert await log.pending() == []
    assert await log.healthy() is None


# -- the write-ahead log


async def test_the_write_ahead_log_stays_small_under_a_slow_follower(
    file: Path, log: SqliteLog
) -> None:
    await log.append(starts("run_1")).wait()
    after, largest = 0, 0
    wal = file.with_name("gateway.db-wal")
    for _ in range(60):
        await log.append(drives("run_1", *[delta("x" * 1000) for _ in range(400)])).wait()
        # It reads a little of each page, far behind, and takes its time in between.
        chunk = await log.chunk(STREAM, after)
        assert chunk is not None
        after = chunk.last_seq
        largest = max(largest, wal.stat().st_size)
    assert after < 5_000
    assert file.stat().st_size > 20_000_000
    assert largest < 8_000_000


async def test_a_reader_fetches_no_more_than_a_chunk_at_a_time(log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", *[delta("x" * 10_000) for _ in range(40)])).wait()
    for reader in log._readers:
        rows = list(await reader.execute_fetchall("SELECT payload FROM events"))
        assert CHUNK_BYTES_MAX <= sum(len(row[0]) for row in rows) < CHUNK_BYTES_MAX + 20_000


async def test_no_reader_holds_the_database_open_between_its_pages(
    file: Path, log: SqliteLog
) -> None:
    private = [Private("attachment", b"x" * 50_000, index) for index in range(8)]
    await log.append(starts("run_1", private=private)).wait()
    events = [session_start("run_1"), *[delta("x" * 1000) for _ in range(2000)], question("req_1")]
    await log.append(drives("run_1", *events)).wait()
    for _ in range(2):  # Once on each reader.
        assert await log.chunk(STREAM, 0)
        assert await log.read(STREAM, 0, limit=5)
        assert await log.private(STREAM, "attachment")
        assert await log.head(STREAM)
        assert await log.runs(RunQuery(limit=1))
        assert await log.threads(ThreadQuery(limit=1))
        assert await log.pending()

    with outside(file) as other:
        busy, _, _ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0
    assert file.with_name("gateway.db-wal").stat().st_size == 0


# -- leftovers


async def no_leftovers(file: Path) -> None:
    """No thread and no open file of the log is left."""

    async def gone() -> bool:
        threads = [item for item in threading.enumerate() if "_connection_worker" in item.name]
        return not threads

    await until(gone)
    opened = []
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            opened.append(number.readlink())
    assert not [item for item in opened if item.name.startswith(file.name)]


async def test_a_closed_log_leaves_no_thread_and_no_open_file(file: Path) -> None:
    log = await SqliteLog.open(file, Clock())
    await whole_run(log, "run_1", delta())
    await read_chunks(log)
    await log.close()
    await no_leftovers(file)
    left = sorted(item.name for item in file.parent.iterdir())
    assert left == ["gateway.counter", "gateway.db"]


# -- kill -9

#: Appends in groups of random size and says, after each acknowledgement, how far it has come.
WRITER: Final = """
import asyncio, random, sys
from pathlib import Path
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import Clock, delta, drives

async def main():
    log = await SqliteLog.open(Path(sys.argv[1]), Clock())
    run = await log.take_over("run_1")
    while True:
        for _ in range(random.randint(1, 20)):
            events = [delta("x" * random.randint(0, 300)) for _ in range(random.randint(1, 5))]
            commit = log.append(drives("run_1", *events, generation=run.generation))
        first = await commit.wait()
        print(first + len(events) - 1, flush=True)

asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_kill_9(file: Path) -> None:
    log = await SqliteLog.open(file, Clock())
    await log.append(starts("run_1")).wait()
    await log.close()
    chance = random.Random()
    for _ in range(5):
        writer = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            WRITER,
            str(file),
            cwd=Path(__file__).parents[2],
            stdout=asyncio.subprocess.PIPE,
        )
        assert writer.stdout is not None
        async with asyncio.timeout(PATIENCE_S * 2):
            lines = [await writer.stdout.readline() for _ in range(chance.randint(1, 40))]
            await asyncio.sleep(chance.random() * 0.01)
            writer.send_signal(signal.SIGKILL)
            lines += (await writer.stdout.read()).splitlines(keepends=True)
            await writer.wait()
        # A line that the kill has cut in two says nothing.
        acknowledged = max(int(item) for item in lines if item.endswith(b"\n"))

        log = await SqliteLog.open(file, Clock())
        head = await log.head(STREAM)
        assert head is not None
        assert head.last >= acknowledged
        records = await log.read(STREAM, 0, limit=1_000_000)
        assert [record.seq for record in records] == list(range(1, head.last + 1))
        rows = list(await log._writer.connection.execute_fetchall("PRAGMA integrity_check"))
        assert rows[0][0] == "ok"
        with pytest.raises(Refused):
            await log.append(starts("run_2")).wait()
        await log.close()
    log = await SqliteLog.open(file, Clock())
    run = await log.take_over("run_1")
    await log.append(drives("run_1", session_end("run_1"), generation=run.generation)).wait()
    await log.close()
