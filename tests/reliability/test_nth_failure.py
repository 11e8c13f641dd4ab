"""The 1st, 2nd, 3rd … call to the database fails, until a run goes through clean.

Nothing that was acknowledged is lost, the run ends well, and the gateway says so meanwhile.
"""

import asyncio
import functools
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.events import decode
from ownware_gateway.log.group import GroupConnection
from ownware_gateway.log.marker import Marker
from ownware_gateway.log.sqlite import PageCursor, ReadConnection
from ownware_gateway.stream import Streamer
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    events,
    get_json,
    open_stream,
    post_json,
    read_frames,
    start_run,
)
from tests.reliability.process import Http, rows
from tests.test_engine import follow_and_approve
from tests.test_run import check_whole

#: What SQLite says of a broken disk, a full one, a locked and a damaged file, and no file handles.
ERRORS: Final = (
    sqlite3.OperationalError("disk I/O error"),
    sqlite3.OperationalError("database or disk is full"),
    sqlite3.OperationalError("database is locked"),
    sqlite3.OperationalError("unable to open database file"),
    sqlite3.DatabaseError("database disk image is malformed"),
)

PROMPT: Final = "read a.txt and also run: echo x >> log"

#: More than a run makes, so that a sweep that never ends is a failure.
CALLS_MAX: Final = 5_000


class Faults:
    """Fails calls to the database: from the one of this number on, so many, or until `mended`."""

    def __init__(self, error: sqlite3.Error) -> None:
        self.error = error
        self.calls = 0
        self.failed = 0
        self._from = CALLS_MAX
        self._count = 0

    def arm(self, number: int, count: int = 1) -> None:
        self.calls, self.failed = 0, 0
        self._from, self._count = number, count

    def mend(self) -> None:
        self._from = CALLS_MAX

    def call(self) -> None:
        self.calls += 1
        if self._from <= self.calls < self._from + self._count:
            self.failed += 1
            raise self.error


class FaultyCursor(sqlite3.Cursor):
    """A cursor whose calls may fail."""

    faults: Faults

    def execute(self, *args: Any) -> Any:
        self.faults.call()
        return super().execute(*args)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Faults]:
    """`faults(connection_class, error)` makes all calls of such connections able to fail."""

    def install(connection: type[sqlite3.Connection], error: sqlite3.Error) -> Faults:
        made = Faults(error)
        base = PageCursor if connection is ReadConnection else sqlite3.Cursor
        kind = type("Faulty", (FaultyCursor, base), {"faults": made})

        def execute(self: sqlite3.Connection, *args: Any) -> Any:
            return self.cursor(kind).execute(*args)

        monkeypatch.setattr(connection, "execute", execute)
        if connection is GroupConnection:
            store = GroupConnection.store

            def stored(self: GroupConnection, *args: Any) -> None:
                made.call()
                store(self, *args)

            monkeypatch.setattr(connection, "store", stored)
        return made

    return install


async def one_run(http: Http, up: Gateway, number: int) -> list[dict[str, Any]]:
    """Let a run go through, and check that it is whole and that all of it is kept."""
    prompt = PROMPT + str(number)
    run = await start_run(http, up.url, prompt)
    said = await follow_and_approve(http, up, run)
    check_whole([decode(json.dumps(event).encode()) for event in said])
    kept = rows(
        up.data_dir,
        "SELECT payload FROM events JOIN streams ON stream_key = streams.key "
        "JOIN threads ON thread_key = threads.key WHERE threads.id = ? ORDER BY seq",
        run["threadId"],
    )
    assert [json.loads(payload) for (payload,) in kept] == said
    assert said[-1]["status"] == "succeeded"
    assert (up.workspace / f"log{number}").read_text() == "x\n"
    return said


async def sweep(up: Gateway, http: Http, faults: Faults, step: int, count: int) -> int:
    """Fail call after call until a run makes fewer; return how many runs that took."""
    runs = 0
    for number in range(1, CALLS_MAX, step):
        runs += 1
        faults.arm(number, count)
        async with asyncio.timeout(PATIENCE_S):
            await one_run(http, up, number)
        if not faults.failed:
            break
        faults.mend()
        assert await get_json(http, up.url, "/ready") == {"ready": True, "missing": []}
    else:
        pytest.fail("no run went through clean")
    assert rows(up.data_dir, "PRAGMA integrity_check") == [("ok",)]
    return runs


@pytest.fixture
async def up(
    start_gateway: Gateways, make_profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Gateway:
    """A gateway that tries a failed commit again at once."""
    monkeypatch.setattr("ownware_gateway.log.writer.RETRY_S", 0.001)
    make_profile("assistant", model="demo:assistant")
    gateway = await start_gateway()
    (gateway.workspace / "a.txt").write_text("A")
    return gateway


@pytest.mark.parametrize("error", ERRORS, ids=str)
async def test_a_run_outlives_any_call_that_fails(
    up: Gateway, http: Http, faults: Callable[..., Faults], error: sqlite3.Error
) -> None:
    runs = await sweep(up, http, faults(GroupConnection, error), step=47, count=1)
    assert runs > 3


@pytest.mark.soak
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("error", ERRORS, ids=str)
async def test_a_run_outlives_every_call_that_fails(
    up: Gateway,
    http: Http,
    faults: Callable[..., Faults],
    error: sqlite3.Error,
    count: int,
) -> None:
    runs = await sweep(up, http, faults(GroupConnection, error), step=1, count=count)
    assert runs > 100


async def test_a_run_outlives_any_read_that_fails(
    up: Gateway, http: Http, faults: Callable[..., Faults]
) -> None:
    await sweep(up, http, faults(ReadConnection, ERRORS[0]), step=5, count=1)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ERRORS, ids=str)
async def test_a_run_outlives_every_read_that_fails(
    up: Gateway, http: Http, faults: Callable[..., Faults], error: sqlite3.Error
) -> None:
    await sweep(up, http, faults(ReadConnection, error), step=1, count=1)


@pytest.mark.parametrize("error", ERRORS[:2], ids=str)
async def test_while_nothing_can_be_written_everybody_is_told_and_then_all_goes_on(
    start_gateway: Gateways,
    http: Http,
    make_profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    faults: Callable[..., Faults],
    error: sqlite3.Error,
) -> None:
    monkeypatch.setattr("ownware_gateway.log.writer.RETRY_S", 0.001)
    quick = functools.partial(Streamer, keep_alive_s=0.02)
    monkeypatch.setattr("ownware_gateway.app.Streamer", quick)
    make_profile("assistant", model="demo:assistant")
    up = await start_gateway()
    broken = faults(GroupConnection, error)
    run = await start_run(http, up.url, "slowly count to 30")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        broken.arm(1, CALLS_MAX)
        stalled = await read_frames(response, "stream.stalled")
    said = json.loads(stalled[-1].data)
    assert said["reason"] == "log_unavailable"
    assert str(error) in said["message"]
    async with http.get(f"{up.url}/api/v1/ready") as response:
        assert response.status == 503
        assert str(error) in (await response.json())["missing"][0]
    status, answer = await post_json(
        http, up.url, "/run", {"profileId": "assistant", "prompt": "another"}
    )
    assert (status, answer["error"]) == (503, "overloaded")
    seen = events(stalled)
    broken.mend()
    last = f"{json.loads(stalled[0].data)['epoch']}.{seen[-1]['seq']}"
    async with open_stream(
        http, up.url, f"/runs/{run['runId']}/events", last_event_id=last
    ) as response:
        seen += events(await read_frames(response, "done"))
    check_whole([decode(json.dumps(event).encode()) for event in seen])
    assert seen[-1]["status"] == "succeeded"
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert await get_json(http, up.url, "/ready") == {"ready": True, "missing": []}


async def test_a_gateway_that_cannot_write_leaves_all_the_same(
    start_gateway: Gateways,
    http: Http,
    make_profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    faults: Callable[..., Faults],
) -> None:
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.1)
    make_profile("assistant", model="demo:assistant")
    up = await start_gateway()
    broken = faults(GroupConnection, ERRORS[1])
    run = await start_run(http, up.url, "slowly count to 30")
    broken.arm(1, CALLS_MAX)
    async with asyncio.timeout(PATIENCE_S):
        await start_gateway.stop(up)
    broken.mend()
    up = await start_gateway()
    said = await follow_and_approve(http, up, run)
    assert said[-1]["status"] == "succeeded"
    check_whole([decode(json.dumps(event).encode()) for event in said])


async def test_a_counter_that_cannot_be_written_stops_nothing(
    up: Gateway, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_marker: Marker, _commits: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Marker, "write", fails)
    monkeypatch.setattr("ownware_gateway.log.writer.MARK_EVERY_S", 0.0)
    async with asyncio.timeout(PATIENCE_S):
        await one_run(http, up, 1)
    assert await get_json(http, up.url, "/ready") == {"ready": True, "missing": []}
