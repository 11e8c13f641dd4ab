"""The tail in memory: what it holds, what it lets go, and that nobody notices."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ownware_gateway import sse
from ownware_gateway.events import Event
from ownware_gateway.log import Record, Stream, sqlite, tail
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.tail import (
    CHUNKS_MAX,
    STREAMS_MAX,
    TAIL_BYTES_MAX,
    TAILS_BYTES_MAX,
    Tail,
    Tails,
)
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
    words,
)


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqliteLog]:
    opened = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    yield opened
    await opened.close()


def records(first: int, count: int, event: Event | None = None, size: int = 10) -> list[Record]:
    event = event or delta("x" * size)
    return [
        Record(seq, event.type, b'%b,"seq":%d}' % (event.encode()[:-1], seq))
        for seq in range(first, first + count)
    ]


def held_bytes(held: Tail) -> int:
    return sum(len(record.payload) for record in held._records or ())


def test_a_tail_holds_the_newest_events_and_never_more_than_its_limit() -> None:
    held, seq = Tail("e"), 1
    for size in [10] * 2000 + [50_000] * 60 + [2 * TAIL_BYTES_MAX, 10]:
        held.add(records(seq, 1, size=size))
        seq += 1
        assert held_bytes(held) <= TAIL_BYTES_MAX
        assert held.head == seq - 1
        assert held.holds(seq - 1)
    assert held.holds(seq - 2)
    assert not held.holds(0)


def test_a_tail_takes_the_events_of_one_commit_together_however_many() -> None:
    held = Tail("e")
    held.add(records(1, 20_000, size=100))
    assert held.head == 20_000
    assert 0 < held_bytes(held) <= TAIL_BYTES_MAX


def test_a_tail_never_has_a_hole() -> None:
    held = Tail("e")
    held.add(records(1, 5))
    held.add(records(9, 2))
    assert not held.holds(4)
    assert held.holds(8)
    chunk = held.chunk(8)
    assert chunk is not None
    assert chunk.last_seq == 10


def test_all_followers_at_one_cursor_get_the_same_chunk() -> None:
    held = Tail("e")
    held.add(records(1, 50))
    assert held.chunk(7) is held.chunk(7)
    assert held.chunk(50) is None


def test_followers_at_many_cursors_do_not_fill_the_memory() -> None:
    held = Tail("e")
    held.add(records(1, 3000, size=100))
    for after in range(3000):
        held.chunk(after)
    assert held._chunks is not None
    kept = held._chunks.values()
    assert len(kept) <= CHUNKS_MAX
    assert sum(len(chunk.data) for chunk in kept) <= CHUNKS_MAX * 65_536


def test_only_so_many_streams_have_a_tail_and_those_that_are_followed_keep_theirs() -> None:
    tails = Tails()
    loop = asyncio.new_event_loop()
    followed = tails.open(Stream("followed"), "e")
    followed.waiters.add(loop.create_future())
    loop.close()
    for n in range(STREAMS_MAX * 2):
        tails.add(Stream(f"t{n}"), "e", records(1, 1))

    assert len(tails._tails) <= STREAMS_MAX + 1
    assert tails.get(Stream("followed")) is followed
    assert tails.get(Stream("t0")) is None
    assert tails.get(Stream(f"t{STREAMS_MAX * 2 - 1}")) is not None


def test_a_stream_that_is_written_to_outlives_those_that_are_not() -> None:
    tails = Tails()
    for n in range(STREAMS_MAX):
        tails.add(Stream(f"t{n}"), "e", records(1, 1))
    tails.add(Stream("t0"), "e", records(2, 1))
    tails.add(Stream("one more"), "e", records(1, 1))
    assert tails.get(Stream("t0")) is not None
    assert tails.get(Stream("t1")) is None


@pytest.mark.parametrize("last", [session_end("run_1"), question("req_1"), words("q")])
def test_a_stream_at_rest_lets_its_events_go_and_its_tail_when_nobody_waits(last: Event) -> None:
    tails = Tails()
    tails.add(STREAM, "e", records(1, 3))
    tails.rest(STREAM)
    held = tails.get(STREAM)
    assert held is not None
    assert held.holds(0)
    tails.add(STREAM, "e", records(4, 1, last))
    assert held.holds(0), "those who follow it are about to read them"

    loop = asyncio.new_event_loop()
    waiter = loop.create_future()
    loop.close()
    held.waiters.add(waiter)
    tails.rest(STREAM)
    assert tails.get(STREAM) is held
    assert (tails.size_bytes, held.holds(3), held.holds(4)) == (0, False, True)
    held.waiters.remove(waiter)
    tails.leave(STREAM)
    assert tails.get(STREAM) is None


def test_all_tails_together_hold_no_more_than_their_limit() -> None:
    tails = Tails()
    for n in range(200):
        tails.add(Stream(f"t{n}"), "e", records(1, 10, size=50_000))
        assert tails.size_bytes <= TAILS_BYTES_MAX
        assert tails.size_bytes == sum(tail.size_bytes for tail in tails._tails.values())
    newest, oldest = tails.get(Stream("t199")), tails.get(Stream("t0"))
    assert newest is not None
    assert newest.holds(0)
    assert oldest is not None
    assert not oldest.holds(0)
    assert oldest.holds(10), "it knows how far its stream goes"


def test_a_chunk_from_a_tail_is_made_of_the_frames_of_the_wire() -> None:
    held = Tail("abc")
    stored = records(1, 3)
    held.add(stored)
    chunk = held.chunk(1)
    assert chunk is not None
    assert chunk.data == b"".join(
        sse.frame(f"abc.{item.seq}", item.type, item.payload) for item in stored[1:]
    )


# -- within the log


async def test_a_follower_that_fell_out_of_the_tail_reads_the_same_bytes_from_the_database(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "TAIL_BYTES_MAX", 20_000)
    await log.append(starts("run_1")).wait()
    for n in range(60):
        await log.append(drives("run_1", *[delta(f"{n} é " * 20) for _ in range(5)])).wait()
    held = log._tails.get(STREAM)
    assert held is not None
    assert not held.holds(0)
    assert held._records is not None
    oldest = held._records[0].seq
    assert oldest > 100

    behind = await read_chunks(log)
    parser = sse.Parser()
    assert [frame.id for frame in parser.feed(behind)] == [
        f"{held.epoch}.{seq}" for seq in range(1, 302)
    ]
    from_tail = await read_chunks(log, after=oldest - 1)
    await log.append(drives("run_1", session_end("run_1"))).wait()
    log._tails.rest(STREAM)
    assert log._tails.get(STREAM) is None
    from_database = await read_chunks(log, after=oldest - 1)
    assert behind.endswith(from_tail)
    assert from_database.startswith(from_tail)


async def test_followers_that_keep_up_read_no_database(log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", session_start("run_1"))).wait()
    queries: list[str] = []
    for reader in log._readers:
        await reader.set_trace_callback(queries.append)
    async with asyncio.timeout(PATIENCE_S):
        for last in range(2, 50):
            waits = [asyncio.create_task(log.wait(STREAM, last, PATIENCE_S)) for _ in range(20)]
            await log.append(drives("run_1", delta())).wait()
            assert all(await asyncio.gather(*waits))
            chunks = {id(await log.chunk(STREAM, last)) for _ in range(20)}
            assert len(chunks) == 1
    assert queries == []
    # What is counted here is counted at all.
    await log.head(STREAM)
    assert queries != []


async def test_a_stream_at_rest_is_let_go_when_its_last_follower_leaves(log: SqliteLog) -> None:
    await whole_run(log, "run_1", delta())
    log._tails.rest(STREAM)
    assert log._tails.get(STREAM) is None
    waiting = [asyncio.create_task(log.wait(STREAM, 3, PATIENCE_S)) for _ in range(2)]
    await log.run("run_1")
    assert log._tails.get(STREAM) is not None
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert log._tails.get(STREAM) is not None
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert log._tails.get(STREAM) is None


async def test_finished_streams_leave_nothing_in_memory(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "REST_S", 0.0)

    async def follow(stream: Stream) -> None:
        after = 0
        while True:
            await log.wait(stream, after, PATIENCE_S)
            while (chunk := await log.chunk(stream, after)) is not None:
                after = chunk.last_seq
                if chunk.ends_run:
                    return

    streams = [Stream(f"thread_{n}") for n in range(600)]
    async with asyncio.TaskGroup() as group:
        for n, stream in enumerate(streams):
            group.create_task(follow(stream))
            log.append(starts(f"run_{n}", stream))
            log.append(drives(f"run_{n}", session_start(f"run_{n}"), delta(), stream=stream))
        for n, stream in enumerate(streams):
            await log.append(drives(f"run_{n}", session_end(f"run_{n}"), stream=stream)).wait()

    async def gone() -> bool:
        return not log._tails._tails and log._writer.idle

    await until(gone)
