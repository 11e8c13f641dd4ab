"""What retention removes, what stands in its place, and what it never touches."""

import asyncio
import contextlib
import json
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.events import (
    TextComplete,
    ThinkingDelta,
    ToolCallProgress,
    TurnInterrupted,
    TurnStart,
)
from ownware_gateway.log import INBOX, Gone, Retention, Stream, upkeep
from ownware_gateway.log.group import GroupConnection
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.tail import TAIL_BYTES_MAX
from tests.gateway import (
    Gateways,
    events,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    text,
    until_status,
)
from tests.log import (
    PATIENCE_S,
    STREAM,
    Clock,
    delta,
    drives,
    message,
    question,
    read_chunks,
    reply,
    session_end,
    session_start,
    starts,
    until,
    whole_run,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]

HOUR_MS: Final = 3_600_000

#: An age that everything has: nothing of a run that has ended need be kept.
AT_ONCE: Final = -HOUR_MS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def log(file: Path, clock: Clock) -> AsyncIterator[SqliteLog]:
    opened = await SqliteLog.open(file, clock)
    yield opened
    await opened.close()


def turn(index: int) -> TurnStart:
    return TurnStart(turn_index=index, timestamp=1)


def complete(said: str, index: int = 0) -> TextComplete:
    return TextComplete(text=said, turn_index=index)


def progress(line: str) -> ToolCallProgress:
    return ToolCallProgress(tool_call_id="call", progress=line, turn_index=0)


async def prune_all(log: Any, policy: Retention) -> int:
    """Prune until nothing more is let go; return how many events that were."""
    gone = 0
    async with asyncio.timeout(PATIENCE_S):
        while some := await log.prune(policy):
            gone += some
    return gone


async def shape(log: SqliteLog, stream: Stream = STREAM) -> list[tuple[Any, ...]]:
    """Type and seq of every event, of a gap its range and reason too."""
    found: list[tuple[Any, ...]] = []
    for record in await log.read(stream, 0):
        event = json.loads(record.payload)
        gap = (event["fromSeq"], event["reason"]) if record.type == "stream.gap" else ()
        found.append((record.type, record.seq, *gap))
    return found


# -- by age


async def test_deltas_of_an_old_run_go_and_a_gap_under_the_last_number_says_so(
    log: SqliteLog, clock: Clock
) -> None:
    said = [delta("a"), delta("b"), complete("ab"), progress("x"), progress("y"), progress("z")]
    await whole_run(log, "run_1", session_start("run_1"), turn(0), *said)
    policy = Retention(deltas_ms=HOUR_MS)
    clock.now_ms += HOUR_MS
    assert await log.prune(policy) == 0, "it is not old enough by one millisecond"
    clock.now_ms += 1
    assert await prune_all(log, policy) == 5
    assert await shape(log) == [
        ("user.message", 1),
        ("session.start", 2),
        ("turn.start", 3),
        ("stream.gap", 5, 4, "retention"),
        ("text.complete", 6),
        ("stream.gap", 9, 7, "retention"),
        ("session.end", 10),
    ]
    assert await log.prune(policy) == 0


async def test_a_gap_is_the_same_bytes_for_everybody_and_has_its_last_number_as_id(
    log: SqliteLog, clock: Clock
) -> None:
    following = asyncio.ensure_future(log.wait(STREAM, 0, PATIENCE_S))
    await asyncio.sleep(0)
    log.append(starts("run_1"))
    said = [turn(0), delta(), delta(), complete("x"), session_end("run_1")]
    log.append(drives("run_1", *said))
    # Followed, and in the same commit: memory holds both runs while this one is under way.
    await log.append(starts("run_2")).wait()
    assert await following
    clock.now_ms += HOUR_MS
    assert await prune_all(log, Retention(deltas_ms=1)) == 2
    data = await read_chunks(log)
    head = await log.head(STREAM)
    assert head is not None
    frame = b'id: %b.4\nevent: stream.gap\ndata: {"type":"stream.gap","fromSeq":3,"toSeq":4,'
    assert frame % head.epoch.encode() + b'"reason":"retention"}\n\n' in data
    assert b"text.delta" not in data
    for after in (2, 3):
        assert data.endswith(await read_chunks(log, after=after))
        chunk = await log.chunk(STREAM, after)
        assert chunk is not None
        assert chunk.data.startswith(frame % head.epoch.encode())


async def test_all_of_an_old_run_goes_and_the_numbers_go_on(log: SqliteLog, clock: Clock) -> None:
    await whole_run(log, "run_1", turn(0), delta(), complete("x"))
    await prune_all(log, Retention(deltas_ms=AT_ONCE))
    clock.now_ms += HOUR_MS + 1
    await whole_run(log, "run_2")
    assert await prune_all(log, Retention(events_ms=HOUR_MS)) > 0
    assert await shape(log) == [
        ("stream.gap", 5, 1, "retention"),
        ("user.message", 6),
        ("session.end", 7),
    ]
    await whole_run(log, "run_3")
    assert [seq for _, seq, *_ in await shape(log)] == [5, 6, 7, 8, 9]
    run = await log.run("run_1")
    assert run is not None
    assert (run.status, run.start_seq, run.end_seq) == ("succeeded", 0, 5)


async def test_a_stream_whose_beginning_is_gone_is_read_from_the_gap_that_says_so(
    log: SqliteLog,
) -> None:
    await whole_run(log, "run_1", delta())
    await prune_all(log, Retention(events_ms=AT_ONCE))
    head = await log.head(STREAM)
    assert head is not None
    assert (head.earliest, head.last) == (1, 3)
    for after, end in ((0, None), (1, 3), (2, 3), (3, None)):
        assert await log.gap(STREAM, after) == (None if after == 0 else end)


async def test_runs_that_have_not_ended_are_never_touched(log: SqliteLog, clock: Clock) -> None:
    running, waiting = Stream("running"), Stream("waiting")
    log.append(starts("run_1", running))
    log.append(drives("run_1", session_start("run_1"), turn(0), delta(), stream=running))
    log.append(starts("run_2", waiting))
    asked = drives("run_2", session_start("run_2"), turn(0), question("q"), stream=waiting)
    await log.append(asked).wait()
    before = await shape(log, running), await shape(log, waiting), await shape(log, Stream(INBOX))
    clock.now_ms += 1_000 * HOUR_MS
    everything = Retention(deltas_ms=AT_ONCE, events_ms=AT_ONCE, bytes_max=1)
    assert await prune_all(log, everything) == 0
    after = await shape(log, running), await shape(log, waiting), await shape(log, Stream(INBOX))
    assert after == before


async def test_what_was_shown_of_an_answer_that_was_cut_off_stands_nowhere_else_and_stays(
    log: SqliteLog,
) -> None:
    cut = TurnInterrupted(turn_index=1, reason="aborted", timestamp=1)
    first = [turn(0), ThinkingDelta(text="h", turn_index=0), delta("whole"), complete("whole")]
    await whole_run(log, "run_1", *first, turn(1), delta("par"), delta("tial"), cut)
    assert await prune_all(log, Retention(deltas_ms=AT_ONCE)) == 2
    assert [kind for kind, *_ in await shape(log)] == [
        "user.message",
        "turn.start",
        "stream.gap",
        "text.complete",
        "turn.start",
        "text.delta",
        "text.delta",
        "turn.interrupted",
        "session.end",
    ]


async def test_questions_of_a_run_that_is_gone_are_gone_from_the_stream_of_all_questions(
    log: SqliteLog, clock: Clock
) -> None:
    for number in (1, 2):
        stream = Stream(f"thread_{number}")
        log.append(starts(f"run_{number}", stream))
        asked = [turn(0), question(f"q{number}")]
        answered = [reply(f"q{number}"), session_end(f"run_{number}")]
        log.append(drives(f"run_{number}", *asked, stream=stream))
        await log.append(drives(f"run_{number}", *answered, stream=stream)).wait()
        clock.now_ms += HOUR_MS
    await prune_all(log, Retention(events_ms=HOUR_MS + HOUR_MS // 2))
    assert await shape(log, Stream(INBOX)) == [
        ("stream.gap", 1, 1, "retention"),
        ("stream.gap", 2, 2, "retention"),
        ("permission.request", 3),
        ("permission.response", 4),
    ]


async def test_many_runs_go_in_portions(log: SqliteLog) -> None:
    for number in range(2 * upkeep.PRUNED_AT_ONCE + 1):
        await whole_run(log, f"run_{number}", turn(0), delta(), complete(""))
    portions = []
    while gone := await log.prune(Retention(deltas_ms=AT_ONCE)):
        portions.append(gone)
    assert portions == [upkeep.PRUNED_AT_ONCE, upkeep.PRUNED_AT_ONCE, 1]


# -- by size


async def test_a_log_that_is_too_large_loses_deltas_first_and_the_oldest_first(
    log: SqliteLog, clock: Clock
) -> None:
    for number in range(60):
        stream = Stream(f"thread_{number}")
        answer = [delta("x" * 10_000), complete("y" * 10_000)]
        await whole_run(log, f"run_{number}", turn(0), *answer, stream=stream)
        clock.now_ms += 1
    assert await log.prune(Retention(bytes_max=2_000_000)) == 0
    await prune_all(log, Retention(bytes_max=1_300_000))

    async def kinds(number: int) -> set[str]:
        return {kind for kind, *_ in await shape(log, Stream(f"thread_{number}"))}

    assert all(["text.complete" in await kinds(number) for number in range(60)])
    assert "text.delta" not in await kinds(0)
    assert "text.delta" in await kinds(59)
    await prune_all(log, Retention(bytes_max=600_000))
    assert await kinds(0) == {"stream.gap"}
    assert "text.complete" in await kinds(59)
    assert not any(["text.delta" in await kinds(number) for number in range(60)])
    await prune_all(log, Retention(bytes_max=1))
    assert await kinds(59) == {"stream.gap"}


# -- deleting


async def test_a_deletion_that_a_crash_cut_short_is_finished_at_the_next_start(
    file: Path, clock: Clock
) -> None:
    log = await SqliteLog.open(file, clock)
    threads = [Stream(f"{name}_{number}") for number in range(4) for name in ("gone", "kept")]
    chance = random.Random(4)
    for stream in threads:
        log.append(starts(stream.thread_id, stream))
    for number in range(400):
        # Rows of many threads push each other about, from page to page.
        stream = chance.choice(threads)
        words = f"word of {stream.thread_id} ".replace("_", " ")
        said = [delta(words * chance.choice((1, 1, 1, 1, 30))) for _ in range(12)]
        commit = log.append(drives(stream.thread_id, *said, stream=stream))
        if number % 5 == 0:
            await commit.wait()
    for stream in threads:
        end = session_end(stream.thread_id)
        await log.append(drives(stream.thread_id, end, stream=stream)).wait()

    def remove(connection: GroupConnection, now: int) -> None:
        for stream in threads[0::2]:
            upkeep.delete(connection, now, stream.thread_id, "test")

    await log._writer.do(remove)
    await log.close()
    with contextlib.closing(sqlite3.connect(file)) as outside:
        assert outside.execute("SELECT value FROM meta WHERE name = 'unscrubbed'").fetchone()
    log = await SqliteLog.open(file, clock)
    try:
        assert b"word of gone" not in file.read_bytes() + Path(f"{file}-wal").read_bytes()
        assert b"word of kept" in file.read_bytes()
        assert len(await log.read(Stream("kept_0"), 0, limit=9_000)) > 100
    finally:
        await log.close()


async def test_whoever_waits_for_a_deleted_stream_is_told_at_once(log: SqliteLog) -> None:
    await whole_run(log, "run_1")
    waiting = asyncio.ensure_future(log.wait(STREAM, 2, PATIENCE_S))
    await asyncio.sleep(0)
    await log.delete(STREAM.thread_id, "test")
    assert await waiting
    for look in (log.chunk(STREAM, 2), log.wait(STREAM, 2, PATIENCE_S)):
        with pytest.raises(Gone):
            await look


# -- over HTTP


async def settle(http: Http, up: Gateway, prompt: str, **body: Any) -> Json:
    run = await start_run(http, up.url, prompt, **body)
    await run_events(http, up.url, run["runId"])
    found: Json = await get_json(http, up.url, f"/runs/{run['runId']}")
    return found


async def test_messages_stay_whole_when_deltas_are_gone(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(
        Reply(thinking=["hm"], text=["I ", "write"], calls=[Call("write_file", {"path": "a"})]),
        Reply(text=["It ", "did ", "not ", "work."]),
    )
    run = await settle(http, up, "hello")
    provider.reply(Reply(text=["par", "tial", "never"], hang=True, hang_after=2))
    cut = await start_run(http, up.url, "again", threadId=run["threadId"])
    async with open_stream(http, up.url, f"/runs/{cut['runId']}/events") as response:
        await read_frames(response, lambda frame: '"tial"' in frame.data)
    await post_json(http, up.url, f"/runs/{cut['runId']}/cancel")
    await run_events(http, up.url, cut["runId"])
    path = f"/threads/{run['threadId']}/messages"
    before = await get_json(http, up.url, path)
    assert before[-1]["content"] == "partial"
    assert await prune_all(up.log, Retention(deltas_ms=AT_ONCE)) > 4
    assert await get_json(http, up.url, path) == before
    asked = len(provider.requests)
    await settle(http, up, "more", threadId=run["threadId"])
    sent = json.dumps(provider.requests[asked].body)
    assert "It did not work." in sent
    assert "partial" in sent


@pytest.mark.parametrize("everything", [False, True], ids=["deltas", "events"])
async def test_a_cursor_inside_a_gap_is_refused_or_reset_and_0_never_is(
    start_gateway: Gateways, http: Http, provider: Provider, everything: bool
) -> None:
    up = await start_gateway()
    run = await settle(http, up, "a b c d")
    later = await settle(http, up, "e", threadId=run["threadId"])
    policy = Retention(events_ms=AT_ONCE) if everything else Retention(deltas_ms=AT_ONCE)
    assert await up.log.prune(policy)
    path = f"/threads/{run['threadId']}/agents/root/events"
    async with open_stream(http, up.url, f"{path}?since=0&follow=false") as response:
        whole = await read_frames(response, until="done")
    kept = events(whole)
    gap = next(event for event in kept if event["type"] == "stream.gap")
    epoch = next(frame.id for frame in whole if frame.id is not None).split(".")[0]
    first, last = gap["fromSeq"], gap["toSeq"]
    assert last > first
    assert next(f.id for f in whole if f.event == "stream.gap") == f"{epoch}.{last}"
    for cursor in (str(first), str(last - 1), f"{epoch}.{last - 1}"):
        for route in (path, f"{path}/history"):
            async with http.get(f"{up.url}/api/v1{route}?since={cursor}") as response:
                answer = await response.json()
            assert (response.status, answer["error"]) == (410, "cursor_expired")
            assert answer["earliestRetainedCursor"] == last
    for fine in (first - 1, last):
        async with open_stream(http, up.url, f"{path}?since={fine}&follow=false") as response:
            read = await read_frames(response, until="done")
        assert [frame for frame in read if frame.id] == [
            frame for frame in whole if frame.id and int(frame.id.split(".")[1]) > fine
        ]
    async with open_stream(
        http, up.url, f"{path}?follow=false", last_event_id=f"{epoch}.{last - 1}"
    ) as response:
        read = await read_frames(response, until="done")
    reset = json.loads(next(frame.data for frame in read if frame.event == "stream.reset"))
    assert reset["reason"] == "cursor_expired"
    assert reset["earliestRetainedCursor"] == 0
    assert [frame for frame in read if frame.id] == [frame for frame in whole if frame.id]
    assert later["endSeq"] == kept[-1]["toSeq" if everything else "seq"]


async def test_the_stream_of_a_run_that_is_gone_says_so_and_shows_no_later_run(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    run = await settle(http, up, "old")
    assert await prune_all(up.log, Retention(events_ms=AT_ONCE)) > 0
    await settle(http, up, "young", threadId=run["threadId"])
    said = await run_events(http, up.url, run["runId"])
    gap = {"type": "stream.gap", "fromSeq": 1, "toSeq": run["endSeq"], "reason": "retention"}
    assert said == [gap]
    found = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    assert [item["content"] for item in found] == ["young", "young"]


async def test_a_follower_of_a_waiting_run_misses_nothing_while_older_runs_are_removed(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    run = await settle(http, up, "old")
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": "a"})]))
    provider.reply(Reply(text=["Done."]))
    asked = await start_run(http, up.url, "go", threadId=run["threadId"])
    shown = await until_status(http, up.url, asked, "waiting")
    async with open_stream(http, up.url, f"/runs/{asked['runId']}/events") as response:
        following = asyncio.ensure_future(read_frames(response, until="done"))
        await prune_all(up.log, Retention(events_ms=AT_ONCE, bytes_max=1))
        body = {"action": "approve", "requestId": shown["pendingPermissions"][0]["requestId"]}
        await post_json(http, up.url, f"/threads/{run['threadId']}/resume", body)
        said = events(await following)
    assert [event["seq"] for event in said] == list(range(run["endSeq"] + 1, said[-1]["seq"] + 1))
    assert text(said) == "Done."


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        ("retention_deltas_days", {"user.message", "turn.start", "stream.gap", "text.complete"}),
        ("retention_days", {"stream.gap"}),
        ("retention_max_mb", {"stream.gap"}),
    ],
)
async def test_a_gateway_prunes_by_its_settings_and_by_itself(
    start_gateway: Gateways, http: Http, tmp_path: Path, setting: str, left: set[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    log = await SqliteLog.open(data / "gateway.db", Clock())
    large = "x" * TAIL_BYTES_MAX
    await whole_run(log, "run_1", turn(0), delta("x"), complete(large))
    await log.close()
    up = await start_gateway(**{setting: 1})

    async def pruned() -> bool:
        return "text.delta" not in {record.type for record in await up.log.read(STREAM, 0)}

    await until(pruned)
    if left == {"stream.gap"}:

        async def gone() -> bool:
            return [record.type for record in await up.log.read(STREAM, 0)] == ["stream.gap"]

        await until(gone)
    kinds = {record.type for record in await up.log.read(STREAM, 0)} - {"session.end"}
    assert kinds == left


async def test_without_a_setting_everything_is_kept(
    start_gateway: Gateways, http: Http, tmp_path: Path
) -> None:
    up = await start_gateway()
    run = await settle(http, up, "hello there")
    up = await start_gateway.restart(up)
    assert await up.log.prune(Retention()) == 0
    said = await run_events(http, up.url, run["runId"])
    assert text(said) == "hello there"
    assert message("x").type == said[0]["type"]
