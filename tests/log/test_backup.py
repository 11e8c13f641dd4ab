"""Copies of the log: whole while a run is under way, told apart when they come back."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.errors import BootError
from ownware_gateway.log import INBOX, Stream
from ownware_gateway.log.backup import backup, check, count_unfinished, restore
from ownware_gateway.log.marker import Marker
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.statements import schema_versions
from ownware_gateway.log.upkeep import RESTORE_JUMP
from tests.gateway import (
    Gateways,
    events,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
)
from tests.log import (
    PATIENCE_S,
    STREAM,
    Clock,
    delta,
    drives,
    question,
    session_start,
    starts,
    whole_run,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]

WRITE: Final = Call("write_file", {"path": "a", "content": "a"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@contextlib.asynccontextmanager
async def opened(file: Path) -> AsyncIterator[SqliteLog]:
    log = await SqliteLog.open(file, Clock())
    try:
        yield log
    finally:
        await log.close()


async def epoch(file: Path) -> str:
    """The name of the stream in the log that is there now."""
    async with opened(file) as log:
        head = await log.head(STREAM)
        assert head is not None
        return head.epoch


async def heads(log: SqliteLog) -> list[int]:
    found = [await log.head(stream) for stream in (STREAM, Stream(INBOX))]
    return [head.last for head in found if head is not None]


# -- copying


async def test_a_copy_that_is_made_during_appends_is_whole_and_ends_at_one_commit(
    file: Path, tmp_path: Path
) -> None:
    async with opened(file) as log:
        log.append(starts("run_1"))
        commit = log.append(drives("run_1", session_start("run_1")))
        await commit.wait()
        copies = []
        for number in range(4):
            copy = tmp_path / f"copy-{number}"
            copying = asyncio.ensure_future(asyncio.to_thread(backup, file, copy))
            while not copying.done():
                # Three at a time: a copy never holds a part of an append.
                commit = log.append(drives("run_1", *[delta(str(number))] * 3))
                await commit.wait()
            assert await copying == copy.stat().st_size
            copies.append(copy)
        last = await commit.wait() + 2
    ends = []
    for copy in copies:
        check(copy)
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert count_unfinished(copy) == (1, 0)
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            numbers = [n for (n,) in connection.execute("SELECT seq FROM events ORDER BY seq")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert (len(numbers) - 2) % 3 == 0
        ends.append(len(numbers))
    assert ends == sorted(ends)
    assert 2 < ends[-1] <= last
    assert not list(tmp_path.glob("*.part"))


def test_without_a_log_there_is_nothing_to_copy(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="There is no log"):
        backup(file, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


async def test_a_copy_replaces_no_file_and_a_failed_one_leaves_none(
    file: Path, tmp_path: Path
) -> None:
    async with opened(file) as log:
        await whole_run(log, "run_1")
    there = tmp_path / "there"
    there.write_text("mine")
    with pytest.raises(BootError, match="exists already"):
        backup(file, there)
    assert there.read_text() == "mine"
    with pytest.raises(BootError, match="cannot be copied"):
        backup(file, tmp_path / "no folder" / "copy")
    file.write_bytes(b"no database" * 1_000)
    with pytest.raises(BootError, match="cannot be copied"):
        backup(file, tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} <= {
        "there",
        "gateway.db",
        "gateway.counter",
        "gateway.db-wal",
        "gateway.db-shm",
    }


# -- putting back


async def test_a_restored_log_has_another_name_and_its_numbers_jump(
    file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    async with opened(file) as log:
        await whole_run(log, "run_1")
        before = await heads(log)
        backup(file, copy)
        await whole_run(log, "lost")
    old = await epoch(file)
    newest = file.read_bytes()
    kept = restore(file, copy)
    assert kept is not None
    assert kept.read_bytes() == newest, "what was replaced is kept as it was"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    async with opened(file) as log:
        assert await heads(log) == [head + RESTORE_JUMP for head in before]
        gap = (await log.read(STREAM, 2))[0]
        assert json.loads(gap.payload) == {
            "type": "stream.gap",
            "fromSeq": 3,
            "toSeq": 2 + RESTORE_JUMP,
            "reason": "restored",
        }
        assert await log.run("lost") is None
        await whole_run(log, "run_2")
        run = await log.run("run_2")
        assert run is not None
        assert (run.start_seq, run.end_seq) == (2 + RESTORE_JUMP, 4 + RESTORE_JUMP)
    assert await epoch(file) != old
    check(file)


async def test_a_restored_log_is_not_taken_for_an_older_one_at_the_next_start(
    file: Path, tmp_path: Path
) -> None:
    async with opened(file) as log:
        await whole_run(log, "run_1")
        backup(file, tmp_path / "copy")
        for number in range(20):
            await whole_run(log, f"lost_{number}")
    restore(file, tmp_path / "copy")
    names = {await epoch(file) for _ in range(3)}
    assert len(names) == 1
    async with opened(file) as log:
        assert (await heads(log))[0] == 2 + RESTORE_JUMP


async def test_the_same_copy_may_be_restored_again_and_every_log_that_it_replaces_is_kept(
    file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    async with opened(file) as log:
        await whole_run(log, "run_1")
    backup(file, copy)
    names, kept = set(), set()
    for _ in range(3):
        kept.add(restore(file, copy))
        names.add(await epoch(file))
    assert len(names) == len(kept) == 3
    file.unlink()
    assert restore(file, copy) is None


async def test_a_damaged_log_can_be_replaced_by_a_copy(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    async with opened(file) as log:
        await whole_run(log, "run_1")
    backup(file, copy)
    file.write_bytes(b"damage" * 5_000)
    Path(f"{file}-wal").write_bytes(b"more of it")
    kept = restore(file, copy)
    assert kept is not None
    assert kept.read_bytes() == b"damage" * 5_000
    async with opened(file) as log:
        assert await log.run("run_1") is not None


def garbage(copy: Path) -> None:
    copy.write_bytes(os.urandom(20_000))


def empty(copy: Path) -> None:
    copy.write_bytes(b"")


def missing(copy: Path) -> None:
    copy.unlink()


def newer(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.execute(f"PRAGMA user_version={schema_versions()[-1][0] + 1}")


def of_another_program(copy: Path) -> None:
    copy.unlink()
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.execute("CREATE TABLE things (name TEXT)")


def cut_short(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-4096])


def overwritten(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[8192:16384] = b"\xff" * 8192
    copy.write_bytes(data)


def orphaned(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("DELETE FROM threads WHERE id = 'thread_1'")


@pytest.mark.parametrize(
    "spoil",
    [garbage, empty, missing, newer, of_another_program, cut_short, overwritten, orphaned],
)
async def test_what_is_no_sound_log_of_ours_is_not_restored_and_nothing_changes(
    file: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    copy = tmp_path / "copy"
    async with opened(file) as log:
        for number in range(30):
            await whole_run(log, f"run_{number}", delta("x" * 1_000))
    backup(file, copy)
    spoil(copy)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("gateway*")}
    with pytest.raises(BootError):
        restore(file, copy)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("gateway*")} == before


# -- an older file, put back by hand


async def test_an_older_file_that_is_copied_back_by_hand_is_noticed(
    file: Path, tmp_path: Path
) -> None:
    async with opened(file) as log:
        await whole_run(log, "run_1")
    old = await epoch(file)
    shutil.copyfile(file, tmp_path / "by hand")
    async with opened(file) as log:
        await whole_run(log, "lost")
    shutil.copyfile(tmp_path / "by hand", file)
    async with opened(file) as log:
        head = await log.head(STREAM)
        assert head is not None
        assert head.epoch != old
        assert head.last == 2 + RESTORE_JUMP
        assert await log.run("lost") is None
    assert await epoch(file) != old


async def test_an_older_file_is_noticed_too_when_the_process_that_wrote_on_made_it(
    file: Path, tmp_path: Path
) -> None:
    """A copy is made, work goes on and the process is killed, all within a moment."""
    log = await SqliteLog.open(file, Clock())
    try:
        await whole_run(log, "run_1")
        backup(file, tmp_path / "by hand")
        for number in range(3):
            await whole_run(log, f"lost_{number}")
        await whole_run(log, "lost")
        killed = tmp_path / "killed"
        killed.mkdir()
        for path in tmp_path.glob("gateway*"):
            shutil.copyfile(path, killed / path.name)
    finally:
        await log.close()
    back = killed / file.name
    for rest in ("-wal", "-shm"):
        Path(f"{back}{rest}").unlink()
    shutil.copyfile(tmp_path / "by hand", back)
    async with opened(back) as log:
        assert (await heads(log))[0] == 2 + RESTORE_JUMP


@pytest.mark.parametrize("marker", [None, b"", b"what is this?", b"-1", b"0" * 20])
async def test_a_marker_that_is_missing_or_unreadable_stops_nothing(
    file: Path, marker: bytes | None
) -> None:
    async with opened(file) as log:
        await whole_run(log, "run_1")
    name = await epoch(file)
    path = file.with_suffix(".counter")
    path.unlink()
    if marker is not None:
        path.write_bytes(marker)
    assert await epoch(file) == name
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or marker is not None
    assert int(path.read_bytes()) > 0, "it is right again from here on"


def test_a_marker_holds_a_count_of_any_size(file: Path) -> None:
    marker = Marker(file)
    for count in (7, 10**15, 3):
        marker.write(count)
        assert marker.read() == count
    marker.close()


#: Appends until it is killed; says when the first events are durable.
WRITER: Final = """
import asyncio, sys
from pathlib import Path
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import Clock, delta, drives, starts

async def main():
    log = await SqliteLog.open(Path(sys.argv[1]), Clock())
    head = await log.head(stream := starts("x").stream)
    if head is None:
        log.append(starts("run_1"))
    print(head and head.epoch, head and head.last, flush=True)
    while True:
        await log.append(drives("run_1", delta())).wait()
        print(".", end="", flush=True)

asyncio.run(main())
"""


async def kill_again_and_again(file: Path, kills: int, seed: int) -> None:
    """Kill a process that writes at any moment; its log must stay the one it was."""
    chance = random.Random(seed)
    names, last = set(), 0
    for _ in range(kills):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(file), stdout=PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                line = (await process.stdout.readline()).split()
                await process.stdout.readexactly(chance.randrange(1, 40))
        finally:
            process.send_signal(signal.SIGKILL)
            said = await process.stdout.read()
            await process.wait()
        if line[0] != b"None":
            names.add(line[0])
            assert int(line[1]) >= last
            last = int(line[1]) + len(said)
            assert last < RESTORE_JUMP
    assert len(names) == 1
    assert await epoch(file) == names.pop().decode()


async def test_a_killed_process_leaves_no_log_that_looks_older_than_it_is(file: Path) -> None:
    await kill_again_and_again(file, 5, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_hundred_killed_processes_leave_no_log_that_looks_older(file: Path) -> None:
    await kill_again_and_again(file, 100, seed=2)


# -- over HTTP


async def copy_and_lose(
    start_gateway: Gateways, up: Gateway, http: Http, run: Json, copy: Path
) -> Gateway:
    """Copy the log, let something happen that the copy does not hold, put the copy back."""
    backup(up.data_dir / "gateway.db", copy)
    lost = await start_run(http, up.url, "lost")
    await run_events(http, up.url, lost["runId"])
    database = up.data_dir / "gateway.db"
    await start_gateway.stop(up)
    restore(database, copy)
    return await start_gateway()


async def test_cursors_of_before_a_restore_are_refused_or_reset(
    start_gateway: Gateways, http: Http, tmp_path: Path
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    path = f"/threads/{run['threadId']}/agents/root/events"
    await run_events(http, up.url, run["runId"])
    async with open_stream(http, up.url, f"{path}?follow=false") as response:
        before = await read_frames(response, until="done")
    ids = [frame.id for frame in before if frame.id is not None]
    up = await copy_and_lose(start_gateway, up, http, run, tmp_path / "copy")
    last = len(ids)
    async with open_stream(http, up.url, f"{path}?since=0&follow=false") as response:
        after = await read_frames(response, until="done")
    said = events(after)
    assert said[:-1] == events(before), "the events are the same, under another epoch"
    assert said[-1]["toSeq"] == last + RESTORE_JUMP
    for stale in ids:
        async with http.get(f"{up.url}/api/v1{path}?since={stale}") as response:
            answer = await response.json()
        assert (response.status, answer["error"]) == (410, "cursor_expired")
        assert answer["earliestRetainedCursor"] == 0
    # A bare number that a client may have seen of what is lost.
    async with http.get(f"{up.url}/api/v1{path}?since={last + 1}") as response:
        answer = await response.json()
    assert (response.status, answer["error"]) == (410, "cursor_expired")
    assert answer["earliestRetainedCursor"] == last + RESTORE_JUMP
    async with open_stream(http, up.url, f"{path}?follow=false", last_event_id=ids[-1]) as response:
        read = await read_frames(response, until="done")
    reset = json.loads(next(frame.data for frame in read if frame.event == "stream.reset"))
    assert reset["reason"] == "cursor_expired"
    assert events(read) == said
    inbox = await get_json(http, up.url, "/approvals")
    assert inbox["cursor"].endswith(f".{RESTORE_JUMP}")
    again = await start_run(http, up.url, "go on", threadId=run["threadId"])
    assert again["startSeq"] == last + RESTORE_JUMP
    assert (await run_events(http, up.url, again["runId"]))[-1]["status"] == "succeeded"
    found = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    assert [item["content"] for item in found] == ["hello", "hello", "go on", "go on"]


async def test_runs_that_were_unfinished_in_the_copy_end_and_nothing_of_them_runs(
    start_gateway: Gateways, http: Http, provider: Provider, tmp_path: Path
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[WRITE]))
    waiting = await start_run(http, up.url, "write")
    await until_status(http, up.url, waiting, "waiting")
    provider.reply(Reply(text=["a", "b"], hang=True, hang_after=1))
    hanging = await start_run(http, up.url, "talk")
    async with open_stream(http, up.url, f"/runs/{hanging['runId']}/events") as response:
        await read_frames(response, until="text.delta")
    asked = len(provider.requests)
    copy = tmp_path / "copy"
    backup(up.data_dir / "gateway.db", copy)
    assert count_unfinished(copy) == (2, 1)
    for run in (waiting, hanging):
        await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
        await run_events(http, up.url, run["runId"])
    database = up.data_dir / "gateway.db"
    await start_gateway.stop(up)
    restore(database, copy)
    up = await start_gateway()
    for run in (waiting, hanging):
        said = await run_events(http, up.url, run["runId"])
        assert (said[-1]["status"], said[-1]["code"]) == ("failed", "restored")
        error = next(event for event in said if event["type"] == "error")
        assert "restored" in error["message"]
        found = await get_json(http, up.url, f"/runs/{run['runId']}")
        assert (found["status"], found["code"]) == ("failed", "restored")
    assert (await get_json(http, up.url, "/approvals"))["items"] == []
    assert list(up.workspace.iterdir()) == []
    assert len(provider.requests) == asked
    # The conversations go on.
    for run in (waiting, hanging):
        later = await start_run(http, up.url, "and now?", threadId=run["threadId"])
        assert (await run_events(http, up.url, later["runId"]))[-1]["status"] == "succeeded"


async def test_a_client_that_follows_through_a_restore_is_told_and_reads_anew(
    start_gateway: Gateways, http: Http, tmp_path: Path
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    said = await run_events(http, up.url, run["runId"])
    up = await copy_and_lose(start_gateway, up, http, run, tmp_path / "copy")
    path = f"/runs/{run['runId']}/events"
    async with open_stream(http, up.url, path, last_event_id="0badc0de.3") as response:
        read = await read_frames(response, until="done")
    assert [frame.event for frame in read if frame.event == "stream.reset"]
    assert events(read) == said


async def test_questions_of_the_copy_can_not_be_answered_after_a_restore(
    start_gateway: Gateways, http: Http, provider: Provider, tmp_path: Path
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[WRITE]))
    run = await start_run(http, up.url, "write")
    shown = await until_status(http, up.url, run, "waiting")
    request_id = shown["pendingPermissions"][0]["requestId"]
    database = up.data_dir / "gateway.db"
    backup(database, tmp_path / "copy")
    await start_gateway.stop(up)
    restore(database, tmp_path / "copy")
    up = await start_gateway()
    body = {"action": "approve", "requestId": request_id}
    await run_events(http, up.url, run["runId"])
    status, answer = await post_json(http, up.url, f"/threads/{run['threadId']}/resume", body)
    assert (status, answer["error"], answer["granted"]) == (
        409,
        "permission_already_decided",
        False,
    )
    assert list(up.workspace.iterdir()) == []


async def test_a_question_is_one_of_the_copy_too(file: Path, tmp_path: Path) -> None:
    async with opened(file) as log:
        log.append(starts("run_1"))
        await log.append(drives("run_1", session_start("run_1"), question("q"))).wait()
        backup(file, tmp_path / "copy")
    assert count_unfinished(tmp_path / "copy") == (1, 1)
