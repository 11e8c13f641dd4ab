"""A full, read-only, locked or damaged disk, no file handles left, clocks that go back.

Nothing that was acknowledged is lost, everybody is told, and all goes on by itself when the cause
is gone.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import pytest

from ownware_gateway import app, doors
from ownware_gateway.app import Gateway
from ownware_gateway.errors import BootError
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.stream import Streamer
from tests.gateway import (
    FAKE_KEY,
    PATIENCE_S,
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
    write_profile,
)
from tests.log import until
from tests.provider import Call, Provider, Reply
from tests.test_cli import OWNWARE

Http = aiohttp.ClientSession
Json = dict[str, Any]
Trouble = Callable[[Gateway], contextlib.AbstractAsyncContextManager[None]]

DAY_MS: Final = 86_400_000

#: More than fits into what a file that cannot grow has left.
LARGE: Final = "x" * 60_000


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make streams break a silence soon, and gateways leave without waiting for steps."""
    monkeypatch.setattr("ownware_gateway.app.Streamer", partial(Streamer, keep_alive_s=0.05))
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.1)


async def pragma(up: Gateway, words: str) -> Any:
    # The only way to have the real database fail for want of space or rights, and then not.
    rows = await cast(SqliteLog, up.log)._writer.connection.execute_fetchall(f"PRAGMA {words}")
    return [*rows, (None,)][0][0]


@contextlib.asynccontextmanager
async def full_disk(up: Gateway) -> AsyncIterator[None]:
    """Let the file grow no more: what SQLite then says is what it says of a full disk."""
    await pragma(up, f"max_page_count={await pragma(up, 'page_count')}")
    yield
    await pragma(up, "max_page_count=1000000")


@contextlib.asynccontextmanager
async def read_only(up: Gateway) -> AsyncIterator[None]:
    """Refuse every write, as a file that may only be read does."""
    await pragma(up, "query_only=ON")
    yield
    await pragma(up, "query_only=OFF")


LOCKER: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def locked(up: Gateway) -> AsyncIterator[None]:
    """Have another process hold the database locked."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LOCKER, str(up.data_dir / "gateway.db"), stdin=PIPE, stdout=PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"locked\n"
    try:
        yield
    finally:
        await process.communicate(b"")


TROUBLES: Final[dict[str, tuple[Trouble, str]]] = {
    "full": (full_disk, "full"),
    "read-only": (read_only, "readonly"),
    "locked": (locked, "locked"),
}


async def ready(http: Http, url: str) -> tuple[int, Json]:
    async with http.get(f"{url}/api/v1/ready") as response:
        return response.status, await response.json()


async def is_ready(http: Http, up: Gateway) -> bool:
    return (await ready(http, up.url))[0] == 200


async def is_failing(http: Http, up: Gateway) -> bool:
    return not await is_ready(http, up)


async def history(http: Http, up: Gateway, run: Json) -> list[Json]:
    path = f"/threads/{run['threadId']}/agents/root/events/history"
    found: list[Json] = (await get_json(http, up.url, path))["events"]
    return found


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", TROUBLES)
async def test_trouble_with_the_disk_is_said_stops_new_work_and_is_survived_without_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, name: str
) -> None:
    trouble, word = TROUBLES[name]
    up = await start_gateway()
    before = await start_run(http, up.url, "before")
    said = await run_events(http, up.url, before["runId"])
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", LARGE, " end"], gate=gate, gate_after=1))
    run = await start_run(http, up.url, "go", threadId=before["threadId"])
    path = f"/runs/{run['runId']}/events"
    async with open_stream(http, up.url, path) as response:
        acknowledged = events(await read_frames(response, until="text.delta"))
    async with open_stream(http, up.url, path) as response, contextlib.AsyncExitStack() as stack:
        stream = asyncio.ensure_future(read_frames(response, until="done"))
        await stack.enter_async_context(trouble(up))
        gate.set()
        await until(lambda: is_failing(http, up))
        status, answer = await ready(http, up.url)
        assert (status, answer["ready"]) == (503, False)
        assert "The log cannot be written" in answer["missing"][0]
        assert word in answer["missing"][0]
        async with http.post(
            f"{up.url}/api/v1/run", json={"profileId": "assistant", "prompt": "more"}
        ) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert (await refused.json())["error"] == "overloaded"
        # Reading goes on, and shows what is durable and no more.
        assert await history(http, up, before) == said + acknowledged
        async with open_stream(http, up.url, path) as another:
            stalled = (await read_frames(another, until="stream.stalled"))[-1]
        told = json.loads(stalled.data)
        assert (told["reason"], stalled.id) == ("log_unavailable", None)
        assert "cannot be written" in told["message"]
        await stack.aclose()
        read = await stream
    assert "stream.stalled" in [frame.event for frame in read]
    whole = events(read)
    assert whole[: len(acknowledged)] == acknowledged
    assert whole[-1]["status"] == "succeeded"
    assert text(whole) == f"one {LARGE} end"
    assert await history(http, up, before) == said + whole
    await until(lambda: is_ready(http, up))
    after = await start_run(http, up.url, "after", threadId=before["threadId"])
    assert (await run_events(http, up.url, after["runId"]))[-1]["status"] == "succeeded"
    assert await pragma(up, "integrity_check") == "ok"


@pytest.mark.usefixtures("brief")
async def test_a_gateway_whose_disk_is_full_leaves_when_it_is_told_to_and_loses_nothing(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", LARGE, " end"], gate=gate, gate_after=1))
    run = await start_run(http, up.url, "go")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        acknowledged = events(await read_frames(response, until="text.delta"))
    await pragma(up, f"max_page_count={await pragma(up, 'page_count')}")
    gate.set()
    await until(lambda: is_failing(http, up))
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        up = await start_gateway.restart(up)
    assert time.monotonic() - began < 5
    whole = await run_events(http, up.url, run["runId"])
    assert whole[: len(acknowledged)] == acknowledged
    assert whole[-1]["status"] == "succeeded"


@pytest.mark.usefixtures("brief")
async def test_a_cancel_and_an_answer_are_taken_once_the_disk_has_room_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(text=["Done."])
    asked = []
    for name in ("a", "b"):
        provider.reply(Reply(calls=[Call("write_file", {"path": name, "content": name})]))
        run = await start_run(http, up.url, "go")
        asked.append((run, await until_status(http, up.url, run, "waiting")))
    async with read_only(up):
        path = f"/threads/{asked[0][0]['threadId']}/resume"
        body = {"action": "approve", "requestId": asked[0][1]["pendingPermissions"][0]["requestId"]}
        answering = asyncio.ensure_future(post_json(http, up.url, path, body))
        cancelling = asyncio.ensure_future(
            post_json(http, up.url, f"/runs/{asked[1][0]['runId']}/cancel")
        )
        await until(lambda: is_failing(http, up))
        assert not answering.done()
        assert not (up.workspace / "a").exists(), "nothing happens that is not on the disk"
    assert (await answering)[0] == 200
    assert (await cancelling)[0] == 202
    ends = [(await run_events(http, up.url, run["runId"]))[-1]["status"] for run, _ in asked]
    assert ends == ["succeeded", "cancelled"]
    assert (up.workspace / "a").exists()
    assert not (up.workspace / "b").exists()


# -- a real file system that is small


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a file system")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room that a file system has left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65_536, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


@pytest.mark.usefixtures("brief")
async def test_a_file_system_that_is_really_full_is_survived(
    start_gateway: Gateways, http: Http, provider: Provider, small_disk: Path, tmp_path: Path
) -> None:
    up = await start_gateway(data_dir=str(small_disk), workspace=str(tmp_path / "work"))
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", LARGE, " end"], gate=gate, gate_after=1))
    run = await start_run(http, up.url, "go")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        acknowledged = events(await read_frames(response, until="text.delta"))
    filler = fill(small_disk)
    gate.set()
    await until(lambda: is_failing(http, up))
    assert await history(http, up, run) == acknowledged
    filler.unlink()
    whole = await run_events(http, up.url, run["runId"])
    assert whole[: len(acknowledged)] == acknowledged
    assert text(whole) == f"one {LARGE} end"
    await until(lambda: is_ready(http, up))
    assert await pragma(up, "integrity_check") == "ok"


async def test_a_start_on_a_full_disk_is_refused_in_a_sentence_and_works_later(
    start_gateway: Gateways, http: Http, small_disk: Path, tmp_path: Path
) -> None:
    work = str(tmp_path / "work")
    filler = fill(small_disk)
    with pytest.raises(BootError) as refused:
        await start_gateway(data_dir=str(small_disk), workspace=work)
    assert str(refused.value).endswith(".")
    filler.unlink()
    up = await start_gateway(data_dir=str(small_disk), workspace=work)
    run = await start_run(http, up.url, "hello")
    assert (await run_events(http, up.url, run["runId"]))[-1]["status"] == "succeeded"


async def test_a_start_on_a_disk_that_may_only_be_read_is_refused_in_a_sentence(
    start_gateway: Gateways, small_disk: Path, tmp_path: Path
) -> None:
    work = str(tmp_path / "work")
    await start_gateway.stop(await start_gateway(data_dir=str(small_disk), workspace=work))
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True, check=False).returncode:
        pytest.skip("the file system cannot be made read-only here")
    with pytest.raises(BootError) as refused:
        await start_gateway(data_dir=str(small_disk), workspace=work)
    assert "cannot be" in str(refused.value)


async def test_a_database_that_may_only_be_read_is_refused_in_a_sentence(
    start_gateway: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = await start_gateway()
    await start_gateway.stop(up)
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("gateway.db"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BootError, match=r"gateway\.db cannot be opened: Permission denied"):
        await start_gateway()
    monkeypatch.undo()
    await start_gateway()


# -- damage


def garbage(database: Path) -> None:
    database.write_bytes(os.urandom(50_000))


def another_text(database: Path) -> None:
    database.write_text("not a database at all\n" * 1_000)


def broken_schema(database: Path) -> None:
    raw = bytearray(database.read_bytes())
    raw[200:4096] = b"\xff" * (4096 - 200)
    database.write_bytes(raw)


def cut_short(database: Path) -> None:
    database.write_bytes(database.read_bytes()[:5_000])


@pytest.mark.parametrize("damage", [garbage, another_text, broken_schema, cut_short])
async def test_a_damaged_log_is_refused_in_a_sentence_and_left_as_it_is(
    start_gateway: Gateways, http: Http, damage: Callable[[Path], None]
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    await run_events(http, up.url, run["runId"])
    await start_gateway.stop(up)
    database = up.data_dir / "gateway.db"
    damage(database)
    before = database.read_bytes()
    with pytest.raises(BootError, match=r"gateway\.db") as refused:
        await start_gateway()
    assert "doctor" in str(refused.value)
    assert database.read_bytes() == before


# -- file handles


@pytest.mark.timeout(60)
async def test_without_file_handles_left_nothing_is_lost_and_all_goes_on(
    http: Http, provider: Provider, tmp_path: Path
) -> None:
    profiles = tmp_path / "profiles"
    write_profile(profiles, "assistant", security={"permissionMode": "auto"})
    script = 'ulimit -n 48; exec "$@"'
    folders = ("--data-dir", str(tmp_path / "data"), "--profiles", str(profiles))
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script, "bash", *OWNWARE, "serve", "--port", "0", *folders),
        stdout=PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={
            **os.environ,
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_API_KEY": FAKE_KEY,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "OWNWARE_WORKSPACE": str(tmp_path / "work"),
        },
    )
    connections: list[asyncio.StreamWriter] = []
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stdout.readline()
            url = line.decode().split()[-1]
            while not line.startswith(b"Models"):
                line = await process.stdout.readline()
                assert line
        gate = asyncio.Event()
        calls = [Call("shell_execute", {"command": "echo made > made"})]
        provider.reply(Reply(text=["a ", "b"], calls=calls, gate=gate, gate_after=1))
        provider.reply(Reply(text=["Done."]))
        run = await start_run(http, url, "go")
        async with open_stream(http, url, f"/runs/{run['runId']}/events") as response:
            acknowledged = events(await read_frames(response, until="text.delta"))
        host, _, port = url.removeprefix("http://").rpartition(":")
        opening = [asyncio.open_connection(host, int(port)) for _ in range(64)]
        connections += [writer for _, writer in await asyncio.gather(*opening)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), http.get(f"{url}/api/v1/health"):
                pass
        gate.set()
        # The shell cannot start and the model cannot be asked anew, or they find a handle.
        await asyncio.sleep(0.3)
        for writer in connections:
            writer.transport.abort()
        whole = await run_events(http, url, run["runId"])
        assert whole[: len(acknowledged)] == acknowledged
        assert whole[-1]["status"] == "succeeded"
        (ended,) = (event for event in whole if event["type"] == "tool.call.end")
        assert ended["isError"] is not (tmp_path / "work" / "made").exists()
        assert (await ready(http, url))[0] == 200
        later = await start_run(http, url, "later")
        assert (await run_events(http, url, later["runId"]))[-1]["status"] == "succeeded"
        process.terminate()
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    finally:
        for writer in connections:
            writer.transport.abort()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


# -- clients that do not finish what they say


async def half_said(up: Gateway, said: str) -> bytes:
    """Send the beginning of a request and nothing more; return all that comes back."""
    host, _, port = up.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(said.replace("\n", "\r\n").encode())
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("path", ["/api/v1/run", "/v1/chat/completions"])
async def test_a_body_that_does_not_arrive_is_not_waited_for_forever(
    start_gateway: Gateways, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(doors, "BODY_S", 0.05)
    monkeypatch.setattr(app, "LINGER_S", 0.05)
    up = await start_gateway()
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: 100\n"
    answer = await half_said(up, head + 'Content-Type: application/json\n\n{"model": ')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.05 s" in answer


@pytest.mark.parametrize("said", ["", "GET /api/v1/health HTTP/1.1\nHost: local"])
async def test_a_request_that_does_not_begin_is_not_waited_for_forever(
    start_gateway: Gateways, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.05)
    up = await start_gateway()
    assert await half_said(up, said) == b""


# -- clocks


async def test_a_clock_that_goes_back_over_a_restart_loses_and_mixes_up_nothing(
    start_gateway: Gateways, http: Http, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = await start_gateway()
    first = await start_run(http, up.url, "one")
    said = await run_events(http, up.url, first["runId"])
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": "a"})]))
    waiting = await start_run(http, up.url, "write")
    await until_status(http, up.url, waiting, "waiting")
    await start_gateway.stop(up)
    wall = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: wall() - DAY_MS * 1_000_000)
    up = await start_gateway()
    second = await start_run(http, up.url, "two", threadId=first["threadId"])
    said += await run_events(http, up.url, second["runId"])
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
    assert await history(http, up, first) == said
    body = {"action": "approve"}
    status, _ = await post_json(http, up.url, f"/threads/{waiting['threadId']}/resume", body)
    assert status == 200, "an answer in time is taken, whatever the clock was set to"
    await run_events(http, up.url, waiting["runId"])
    listed = (await get_json(http, up.url, "/runs"))["items"]
    assert [run["runId"] for run in listed] == [
        second["runId"],
        waiting["runId"],
        first["runId"],
    ], "the newest first, by when they came and not by what the clock said"
