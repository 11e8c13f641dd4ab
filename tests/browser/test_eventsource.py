"""A browser's own EventSource, over connections that are cut: nothing lost, nothing twice."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web

from tests.gateway import Gateways, open_stream, read_frames, start_run
from tests.provider import Provider, Reply

CHROMIUM: Final = Path("/usr/bin/chromium")

#: A browser takes a while to start, and comes back a second after each cut.
BROWSER_PATIENCE_S: Final = 45.0

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed"),
]

#: The page notes every event of the log, and reports once the EventSource has stopped by itself.
PAGE: Final = """<!doctype html>
<script>
const types = TYPES, seen = [], resets = []
let opened = 0
const source = new EventSource("URL")
source.onopen = () => { opened += 1 }
for (const type of types) source.addEventListener(type, event => {
  if (event.data !== undefined && "seq" in JSON.parse(event.data))
    seen.push([event.lastEventId, event.data])
})
source.addEventListener("stream.reset", event => resets.push(event.data))
source.onerror = () => {
  if (source.readyState === EventSource.CLOSED)
    fetch("/report", {method: "POST", body: JSON.stringify({seen, opened, resets})})
}
</script>
"""


@contextlib.asynccontextmanager
async def cutting_proxy(port: int, cuts: list[int]) -> AsyncIterator[int]:
    """A way to a port that cuts its first connections after so many bytes of the answer."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None
    ) -> None:
        while data := await reader.read(4096):
            if limit is not None and len(data) >= limit:
                writer.write(data[:limit])
                return
            limit = None if limit is None else limit - len(data)
            writer.write(data)
            await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limit = cuts.pop(0) if cuts else None
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        there = asyncio.create_task(carry(reader, onward_writer, None))
        back = asyncio.create_task(carry(onward_reader, writer, limit))
        tasks.update((there, back))
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        for task in (there, back):
            task.cancel()
        for end in (writer, onward_writer):
            end.close()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def page(content: str) -> AsyncIterator[tuple[str, asyncio.Future[Any]]]:
    """Serve a page; the future is what it reports."""
    report: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def show(_: web.Request) -> web.Response:
        return web.Response(text=content, content_type="text/html")

    async def take(request: web.Request) -> web.Response:
        report.set_result(await request.json())
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/", show), web.post("/report", take)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/", report
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def browser(url: str, folder: Path) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder}",
        url,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def test_an_event_source_follows_a_run_over_cut_connections_and_stops_at_its_end(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider, tmp_path: Path
) -> None:
    provider.reply(Reply(text=[f"{n} é " for n in range(400)], delay_s=0.005))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    port = int(up.url.rpartition(":")[2])
    cuts = [3000, 7001, 10_007]
    async with contextlib.AsyncExitStack() as stack:
        way = await stack.enter_async_context(cutting_proxy(port, cuts))
        types = ["user.message", "session.start", "turn.start", "text.delta", "text.complete"]
        types += ["turn.end", "session.end"]
        content = PAGE.replace("TYPES", json.dumps(types)).replace(
            "URL", f"http://127.0.0.1:{way}/api/v1/runs/{run['runId']}/events?since=0"
        )
        url, report = await stack.enter_async_context(page(content))
        await stack.enter_async_context(browser(url, tmp_path / "browser"))
        async with asyncio.timeout(BROWSER_PATIENCE_S):
            reported = await report

    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        whole = [
            [frame.id, frame.data] for frame in await read_frames(response) if frame.id is not None
        ]
    assert cuts == []
    assert reported["opened"] == 4
    assert reported["resets"] == []
    assert len(whole) > 400
    assert reported["seen"] == whole


async def test_an_event_source_that_comes_back_to_another_log_starts_anew_and_is_told_so(
    start_gateway: Gateways, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "a b c")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        whole = [
            [frame.id, frame.data] for frame in await read_frames(response) if frame.id is not None
        ]
    # The proxy answers the first connection itself, with an event of a log that is no more.
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Access-Control-Allow-Origin: *\r\nConnection: close\r\n\r\n"
        b"retry: 50\n\nid: 0bad0bad.7\nevent: user.message\ndata: {}\n\n"
    )
    port = int(up.url.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as stack:
        first = True
        onward = await stack.enter_async_context(cutting_proxy(port, []))

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal first
            asked = await reader.readuntil(b"\r\n\r\n")
            if first:
                first = False
                writer.write(answer)
            else:
                onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", onward)
                onward_writer.write(asked.replace(b"keep-alive", b"close"))
                while data := await onward_reader.read(4096):
                    writer.write(data)
                onward_writer.close()
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        stack.callback(server.close)
        way = server.sockets[0].getsockname()[1]
        types = sorted({json.loads(data)["type"] for _, data in whole})
        content = PAGE.replace("TYPES", json.dumps(types)).replace(
            "URL", f"http://127.0.0.1:{way}/api/v1/runs/{run['runId']}/events"
        )
        url, report = await stack.enter_async_context(page(content))
        await stack.enter_async_context(browser(url, tmp_path / "browser"))
        async with asyncio.timeout(BROWSER_PATIENCE_S):
            reported = await report
    assert [json.loads(reset)["reason"] for reset in reported["resets"]] == ["cursor_expired"]
    assert reported["seen"] == whole
