"""The writer: what shares a commit, what never waits, and what a failure undoes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ownware_gateway.log import Append, Stream, writer as writer_module
from ownware_gateway.log.group import Chore, GroupConnection
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import STREAM, Clock, delta, drives, session_start, starts

HOUR_S = 3_600.0


@pytest.fixture
async def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteLog]:
    """A log with a run under way, in which deltas wait for an hour unless something hurries."""
    monkeypatch.setattr(writer_module, "DELTAS_EVERY_S_MIN", HOUR_S)
    monkeypatch.setattr(writer_module, "DELTAS_EVERY_S_MAX", HOUR_S)
    log = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", session_start("run_1"))).wait()
    yield log
    await log.close()


async def seen(log: SqliteLog, stream: Stream = STREAM) -> int:
    """How many events readers see."""
    return len(await log.read(stream, 0))


def commits(log: SqliteLog) -> int:
    assert log._writer._group is not None
    return log._writer._group.commits


async def first_delta(log: SqliteLog) -> None:
    """Append the one that does not wait, for none came before it, until it is seen."""
    log.append(drives("run_1", delta()))
    assert await log.wait(STREAM, 2, HOUR_S)


async def test_deltas_that_nobody_waits_for_share_a_commit(log: SqliteLog) -> None:
    await first_delta(log)
    before = commits(log)
    for _ in range(10):
        log.append(drives("run_1", delta()))
    assert await seen(log) == 3
    await log.append(drives("run_1", delta())).wait()
    assert await seen(log) == 14
    assert commits(log) == before + 1


async def test_a_delta_that_somebody_waits_for_later_waits_no_longer(log: SqliteLog) -> None:
    await first_delta(log)
    commit = log.append(drives("run_1", delta()))
    assert await seen(log) == 3
    assert await commit.wait() == 4


async def test_the_first_words_of_a_turn_never_wait_for_company(log: SqliteLog) -> None:
    await first_delta(log)
    log.append(drives("run_1", delta()))
    said = drives("run_1", delta())
    log.append(Append(said.stream, said.guard, said.events, at_once=True))
    assert await log.wait(STREAM, 4, HOUR_S)
    assert await seen(log) == 5


async def test_what_is_no_delta_takes_those_that_wait_along_in_order(log: SqliteLog) -> None:
    await first_delta(log)
    log.append(drives("run_1", delta("one")))
    log.append(starts("run_2", Stream("other")))
    assert await log.wait(Stream("other"), 0, HOUR_S)
    assert await seen(log) == 4


async def test_enough_deltas_are_company(log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "COMPANY_BYTES", 1_000)
    await first_delta(log)
    for _ in range(20):
        log.append(drives("run_1", delta("x" * 100)))
    # A commit takes what has come by then, so a few of the last may be waiting again.
    assert await log.wait(STREAM, 3, HOUR_S)
    assert await seen(log) >= 10


async def test_closing_commits_the_deltas_that_wait(log: SqliteLog, tmp_path: Path) -> None:
    await first_delta(log)
    log.append(drives("run_1", delta()))
    await log.close()
    again = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    assert await seen(again) == 4
    await again.close()


async def test_work_that_fails_unexpectedly_undoes_itself_and_nothing_else(log: SqliteLog) -> None:
    def fails(connection: GroupConnection, now: int) -> None:
        connection.run("rename", "changed", now, STREAM.thread_id)
        raise LookupError("a mistake of ours")

    commit = log.append(drives("run_1", delta("before")))
    broken = log._writer.take(Chore(fails))
    after = log.append(drives("run_1", delta("after")))
    assert (await commit.wait(), await after.wait()) == (3, 4)
    with pytest.raises(LookupError):
        await broken.wait()
    thread = await log.thread(STREAM.thread_id)
    assert thread is not None
    assert thread.title != "changed"
