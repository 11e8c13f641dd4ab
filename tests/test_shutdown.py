"""SIGTERM and SIGINT: quick whatever is under way, said to every client, and nothing is lost.

The second signal, which exits at once, is in test_cli.py.
"""

import asyncio
import contextlib
import json
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import pytest

from ownware_gateway.app import GRACE_S, HANDLERS_GRACE_S
from ownware_gateway.client import Client
from ownware_gateway.sse import Frame
from tests.gateway import (
    FAKE_KEY,
    PATIENCE_S,
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
from tests.test_cli import OWNWARE, Serving

Http = aiohttp.ClientSession
Json = dict[str, Any]

#: What a start and an exit of Python may take on a busy machine.
MARGIN_S: Final = 3.0

WRITE: Final = Call("write_file", {"path": "asked.txt", "content": "asked"})

#: A command that ignores what it is told, as its child does; both say who they are.
STUBBORN: Final = "trap '' TERM INT HUP; echo $$ > pid; (sleep 61 & echo $! >> pid; wait); sleep 62"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider) -> Path:
    """A current folder with profiles, for a gateway that asks the scripted provider."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # From any folder it is the code beside these tests that runs.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", FAKE_KEY)
    write_profile(folder / "profiles", "assistant")
    write_profile(folder / "profiles", "free", security={"permissionMode": "auto"})
    return folder


FLAGS: Final = ("--data-dir", "data", "--workspace", "work")


@contextlib.asynccontextmanager
async def serving(*flags: str) -> AsyncIterator[Serving]:
    """Run `ownware serve` in the current folder."""
    arguments = (*OWNWARE, "serve", "--port", "0", *FLAGS, *flags)
    process = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, stderr=DEVNULL)
    try:
        serve = Serving(process, "", [])
        await asyncio.wait_for(serve.until("Ownware Gateway"), PATIENCE_S)
        serve.url = serve.lines[0].split()[-1]
        yield serve
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def follower(http: Http, url: str, path: str) -> AsyncIterator["asyncio.Task[list[Frame]]"]:
    """Read a stream to its end in the background; it has caught up when this begins."""
    here = asyncio.Event()

    def look(frame: Frame) -> bool:
        if frame.event == "stream.replay.complete":
            here.set()
        return frame.event in ("stream.shutdown", "done")

    async def read() -> list[Frame]:
        async with open_stream(http, url, path) as response:
            return await read_frames(response, look)

    task = asyncio.ensure_future(read())
    caught_up = asyncio.ensure_future(here.wait())
    try:
        await asyncio.wait({task, caught_up}, return_when=asyncio.FIRST_COMPLETED)
        assert caught_up.done(), task.result()
        yield task
    finally:
        task.cancel()
        caught_up.cancel()


async def stop_timed(serve: Serving, number: signal.Signals = signal.SIGTERM) -> float:
    """Send a signal; return how long the process took to exit with 0, in seconds."""
    began = time.monotonic()
    assert await serve.stop(number) == 0
    return time.monotonic() - began


def check_told(read: Sequence[Frame]) -> None:
    """A stream that a leaving gateway ended says so, and when to come back."""
    last = read[-1]
    assert last.event == "stream.shutdown"
    said = json.loads(last.data)
    assert said["reason"] == "gateway_shutdown"
    assert said["retryAfterMs"] > 0
    assert last.id is None


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_streams_and_open_questions_do_not_hold_it_up(
    here: Path, http: Http, provider: Provider, number: signal.Signals
) -> None:
    async with serving() as serve, contextlib.AsyncExitStack() as stack:
        run = await start_run(http, serve.url, "hello")
        await run_events(http, serve.url, run["runId"])
        provider.reply(Reply(calls=[WRITE]))
        waiting = await start_run(http, serve.url, "write")
        shown = await until_status(http, serve.url, waiting, "waiting")
        paths = [f"/threads/{item['threadId']}/agents/root/events" for item in (run, waiting)]
        paths += [f"/runs/{waiting['runId']}/events", "/approvals/events"]
        following = [
            await stack.enter_async_context(follower(http, serve.url, path)) for path in paths
        ]
        assert await stop_timed(serve, number) < MARGIN_S
        for task in following:
            check_told(await task)
    async with serving() as serve:
        found = await get_json(http, serve.url, f"/runs/{waiting['runId']}")
        assert found["status"] == "waiting"
        assert found["pendingPermissions"] == shown["pendingPermissions"]


async def test_whatever_is_under_way_it_is_gone_in_time_and_goes_on_at_the_next_start(
    here: Path, http: Http, provider: Provider
) -> None:
    """A model that hangs, a command that ignores signals and a question, all at once."""
    async with serving() as serve, contextlib.AsyncExitStack() as stack:
        provider.reply(Reply(text=["part ", "never"], hang=True, hang_after=1))
        hanging = await start_run(http, serve.url, "hang")
        await provider.requested(1)
        provider.reply(Reply(calls=[Call("shell_execute", {"command": STUBBORN})]))
        shell = await start_run(http, serve.url, "run it", profileId="free")
        await provider.requested(2)
        pids = here / "work" / "pid"

        async def both() -> bool:
            return pids.exists() and len(pids.read_text().split()) == 2

        await until(both)
        running = [int(pid) for pid in pids.read_text().split()]
        assert all(alive(pid) for pid in running)
        provider.reply(Reply(calls=[WRITE]))
        waiting = await start_run(http, serve.url, "write")
        await until_status(http, serve.url, waiting, "waiting")
        following = [
            await stack.enter_async_context(
                follower(http, serve.url, f"/runs/{run['runId']}/events")
            )
            for run in (hanging, shell, waiting)
        ]
        took_s = await stop_timed(serve)
        assert took_s < GRACE_S + HANDLERS_GRACE_S + MARGIN_S
        for task in following:
            check_told(await task)
        assert not any(alive(pid) for pid in running), "no command lives on"
    provider.reply(Reply(text=["whole"]), Reply(text=["whole"]))
    async with serving() as serve:
        await serve.until("Runs")
        assert serve.field("Runs").startswith("3 unfinished")
        told = [await run_events(http, serve.url, run["runId"]) for run in (hanging, shell)]
        for said in told:
            assert said[-1]["status"] == "succeeded"
            assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
        ends = [event for event in told[1] if event["type"] == "tool.call.end"]
        assert [event["isError"] for event in ends] == [True]
        assert "nterrupted" in ends[0]["result"]
        found = await get_json(http, serve.url, f"/runs/{waiting['runId']}")
        assert found["status"] == "waiting"
        path = f"/threads/{waiting['threadId']}/resume"
        assert (await post_json(http, serve.url, path, {"action": "approve"}))[0] == 200
        await run_events(http, serve.url, waiting["runId"])
        assert (here / "work" / "asked.txt").read_text() == "asked"


async def test_new_work_on_a_connection_that_is_open_is_refused_with_a_word_when_to_come_back(
    here: Path, http: Http
) -> None:
    """A request whose body is still on its way when the signal comes."""
    async with serving() as serve, contextlib.AsyncExitStack() as stack:
        run = await start_run(http, serve.url, "hello")
        path = f"/threads/{run['threadId']}/agents/root/events"
        told = await stack.enter_async_context(follower(http, serve.url, path))
        address = urlsplit(serve.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        body = json.dumps({"profileId": "assistant", "prompt": "too late"}).encode()
        writer.write(
            b"POST /api/v1/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body[:10])
        await writer.drain()
        # Answered on another connection, so the half of a request has been read by now.
        await get_json(http, serve.url, "/health")
        serve.process.send_signal(signal.SIGTERM)
        check_told(await told)
        writer.write(body[10:])
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        head, _, said = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: " in head
        assert json.loads(said)["error"] == "shutting_down"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.hostname, address.port or 0), timeout=PATIENCE_S)
        assert await asyncio.wait_for(serve.process.wait(), PATIENCE_S) == 0
    async with serving() as serve:
        assert len((await get_json(http, serve.url, "/runs"))["items"]) == 1


async def test_a_restart_by_a_supervisor_is_invisible_to_a_client_that_follows(
    here: Path, provider: Provider
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        serve = await stack.enter_async_context(serving())
        port = str(urlsplit(serve.url).port)
        client = await stack.enter_async_context(Client(serve.url))
        provider.reply(Reply(text=["one "], calls=[WRITE]), Reply(text=["two ", "three"]))
        run = await client.start("assistant", "count")
        seen: list[Json] = []
        asked: asyncio.Queue[str] = asyncio.Queue()

        async def follow() -> None:
            events = client.events(run["threadId"], run_id=run["runId"])
            async with contextlib.aclosing(events):
                async for event in events:
                    seen.append(event)
                    if event["type"] == "permission.request":
                        asked.put_nowait(event["requestId"])

        following = asyncio.ensure_future(follow())
        request_id = await asyncio.wait_for(asked.get(), PATIENCE_S)
        assert await serve.stop() == 0
        await stack.enter_async_context(serving("--port", port))
        await client.resume(run["threadId"], "approve", request_id)
        await asyncio.wait_for(following, PATIENCE_S)
        history = await client.messages(run["threadId"])
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1)), "no reset, no gap"
    assert seen[-1]["status"] == "succeeded"
    assert text(seen) == "one two three"
    assert history[-1]["content"] == "one \n\ntwo three"


async def test_a_stream_that_is_asked_for_while_it_leaves_opens_and_says_so(
    here: Path, http: Http
) -> None:
    """A status would end an EventSource for good."""
    async with serving() as serve, contextlib.AsyncExitStack() as stack:
        run = await start_run(http, serve.url, "hello")
        await run_events(http, serve.url, run["runId"])
        path = f"/threads/{run['threadId']}/agents/root/events"
        told = await stack.enter_async_context(follower(http, serve.url, path))
        address = urlsplit(serve.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        # Half a request line keeps the connection from counting as idle.
        head = f"GET /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.wait_for(reader.readuntil(b"stream.replay.complete"), PATIENCE_S)
        serve.process.send_signal(signal.SIGTERM)
        check_told(await told)
        rest = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert b"event: stream.shutdown" in rest
        assert b"retry: " in rest
        writer.close()
