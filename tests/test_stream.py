"""Streams over real sockets: what a client gets, live, late, cut off, slow or never reading."""

import asyncio
import contextlib
import fcntl
import json
import random
import re
import socket
import sqlite3
import struct
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web

from ownware_gateway import stream as streaming
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import CHUNK_BYTES_MAX, Chunk, Head
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.stream import (
    LINGER_S,
    SEND_BUFFER_BYTES,
    CaughtUp,
    Cursor,
    Plan,
    Silence,
    Streamer,
    check_cursor,
    follow,
    parse_cursor,
)
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    events,
    frames,
    get_json,
    open_stream,
    read_frames,
    run_events,
    start_run,
    until_status,
)
from tests.log import (
    STREAM,
    Clock,
    delta,
    drives,
    read_chunks,
    starts,
    until,
    whole_run,
)
from tests.provider import Provider, Reply

ROOT: Final = Path(__file__).parents[1]


# -- cursors


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("0", Cursor(0)),
        ("17", Cursor(17)),
        ("0f3a.17", Cursor(17, "0f3a")),
        (str(2**63 - 1), Cursor(2**63 - 1)),
    ],
)
def test_a_cursor_is_a_number_or_the_id_of_a_frame(text: str, cursor: Cursor) -> None:
    assert parse_cursor(text) == cursor


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        "1e3",
        " 1",
        "1 ",
        "1\n",
        "٣",
        "x.1",
        "AB.1",
        "ab.",
        ".1",
        str(2**63),
        "9" * 20,
        "a" * 65 + ".1",
        "undefined",
        "latest",
    ],
)
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(GatewayError) as raised:
        parse_cursor(text)
    assert raised.value.code == "cursor_invalid"


def test_a_cursor_is_checked_against_what_there_is() -> None:
    head = Head("ab", earliest=5, last=9)
    assert check_cursor(Cursor(9), head) == 9
    assert check_cursor(Cursor(7, "ab"), head) == 7
    with pytest.raises(GatewayError) as raised:
        check_cursor(Cursor(10, "ab"), head)
    assert raised.value.code == "cursor_ahead"
    assert raised.value.details == {"streamHighWaterCursor": 9}
    with pytest.raises(GatewayError) as raised:
        check_cursor(Cursor(7, "ba"), head)
    assert raised.value.code == "cursor_expired"
    assert raised.value.details == {"earliestRetainedCursor": 4}


# -- the loop


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqliteLog]:
    opened = await SqliteLog.open(tmp_path / "log.db", Clock())
    yield opened
    await opened.close()


async def test_live_is_replay_that_has_caught_up(log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    following = follow(log, STREAM, 0, leaving=lambda: False)
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(following):
        first = await anext(following)
        assert isinstance(first, Chunk)
        assert await anext(following) == CaughtUp(1)
        for last in range(2, 6):
            following_on = asyncio.create_task(anext(following))
            await log.append(drives("run_1", delta())).wait()
            chunk = await following_on
            assert isinstance(chunk, Chunk)
            assert chunk.last_seq == last


async def test_silence_is_told_again_and_again(log: SqliteLog) -> None:
    await log.append(starts("run_1")).wait()
    following = follow(log, STREAM, 1, leaving=lambda: False, silence_s=0.01)
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(following):
        assert [await anext(following) for _ in range(3)] == [CaughtUp(1), Silence(), Silence()]


async def test_leaving_is_noticed_at_whatever_moment_it_comes(log: SqliteLog) -> None:
    await whole_run(log, "run_1")
    for turns in range(6):
        left = asyncio.Event()
        following = follow(log, STREAM, 2, leaving=left.is_set, silence_s=60)
        async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(following):
            assert await anext(following) == CaughtUp(2)
            more = asyncio.create_task(anext(following, None))
            # It may be looking for a chunk, looking for the head, or waiting already.
            for _ in range(turns):
                await asyncio.sleep(0)
            left.set()
            log.wake()
            assert await more is None


# -- the answer, of a streamer without a gateway


@dataclass(slots=True)
class Served:
    """A server that answers everything with one stream of a log."""

    port: int = 0
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    transports: list[asyncio.Transport] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


@contextlib.asynccontextmanager
async def serve(log: SqliteLog, **intervals: float) -> AsyncIterator[Served]:
    served = Served()
    streamer = Streamer(log, served.left.is_set, **intervals)

    async def respond(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        served.transports.append(request.transport)
        if "refuse" in request.query:
            return await streamer.refuse(request, "rate_limited", 1.5)
        head = await log.head(STREAM)
        assert head is not None
        plan = Plan(STREAM, head, 0, follow="once" not in request.query)
        try:
            return await streamer.respond(request, plan)
        finally:
            served.finished.set()

    app = web.Application()
    app.router.add_get("/", respond)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.port = runner.addresses[0][1]
    try:
        yield served
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw_client(
    port: int, path: str = "/", window: int = 4096, version: str = "1.0"
) -> AsyncIterator[socket.socket]:
    """A client that reads only when it is told to, with hardly any buffer of its own.

    With HTTP/1.0 the body comes as it is and ends with the connection.
    """
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        asked = f"GET {path} HTTP/{version}\r\nHost: 127.0.0.1\r\n\r\n"
        await loop.sock_sendall(client, asked.encode())
        yield client


async def receive(client: socket.socket, stop: Callable[[bytearray], bool] | None = None) -> bytes:
    """Read the body to its end, or until it is enough."""
    data = bytearray()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        while part := await loop.sock_recv(client, 65_536):
            data += part
            if stop is not None and stop(data):
                break
    return bytes(data).partition(b"\r\n\r\n")[2]


async def test_an_answer_is_these_bytes(log: SqliteLog) -> None:
    await whole_run(log, "run_1", delta("é"))
    head = await log.head(STREAM)
    assert head is not None
    names = '"threadId":"thread_1","agentId":"root"'
    async with serve(log) as served, raw_client(served.port, "/?once") as client:
        body = (await receive(client)).decode()
    *stored, empty = body.split("\n\n")
    assert empty == ""
    assert stored[0] == (
        "retry: 1000\nevent: stream.start\ndata: "
        f'{{"type":"stream.start",{names},"since":0,"maxSeqAtStart":3,"epoch":"{head.epoch}"}}'
    )
    assert stored[2] == (
        f"id: {head.epoch}.2\nevent: text.delta\n"
        'data: {"type":"text.delta","text":"é","turnIndex":0,"seq":2}'
    )
    assert [re.sub(r"\ndata: .*", "", block) for block in stored[1:4]] == [
        f"id: {head.epoch}.1\nevent: user.message",
        f"id: {head.epoch}.2\nevent: text.delta",
        f"id: {head.epoch}.3\nevent: session.end",
    ]
    assert stored[4:] == [
        f'event: stream.replay.complete\ndata: {{"type":"stream.replay.complete",{names},'
        '"since":0,"replayedThroughSeq":3,"maxSeqAtStart":3,"liveTail":false}',
        'event: done\ndata: {"type":"done","status":"complete"}',
    ]


async def test_a_silent_stream_is_kept_alive_by_comments(log: SqliteLog) -> None:
    await whole_run(log, "run_1")
    async with serve(log, keep_alive_s=0.02) as served, raw_client(served.port) as client:
        body = await receive(client, lambda data: data.count(b": keep-alive\n\n") == 3)
    assert body.endswith(b'"liveTail":false}\n\n' + b": keep-alive\n\n" * 3)


async def test_a_refusal_is_said_in_the_stream(log: SqliteLog) -> None:
    async with serve(log) as served, raw_client(served.port, "/?refuse") as client:
        assert await receive(client) == (
            b"retry: 1500\nevent: stream.shutdown\n"
            b'data: {"type":"stream.shutdown","reason":"rate_limited","retryAfterMs":1500}\n\n'
        )


async def fill(log: SqliteLog, size: int) -> bytes:
    """Store a run of about so many bytes that goes on; return its frames."""
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", *[delta("x" * 900) for _ in range(size // 1000)])).wait()
    return await read_chunks(log)


def cost(served: Served) -> int:
    """Return how many bytes the server holds for its first client, in the kernel too."""
    transport = served.transports[0]
    return transport.get_write_buffer_size() + unsent(transport)


def unsent(transport: asyncio.Transport) -> int:
    number = transport.get_extra_info("socket").fileno()
    (count,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0\0\0\0"))
    return int(count)


async def test_a_client_that_never_reads_costs_a_bounded_buffer_and_nobody_else_time(
    log: SqliteLog,
) -> None:
    stored = await fill(log, 5_000_000)
    async with serve(log) as served, raw_client(served.port):

        async def blocked() -> bool:
            return bool(served.transports) and served.transports[0].get_write_buffer_size() > 0

        await until(blocked)
        async with raw_client(served.port) as other:
            size = len(stored)
            body = await receive(other, lambda data: len(data) > size and b"complete" in data)
        assert stored in body
        # A chunk, and the kernel's buffer, which it makes twice as large as asked for.
        assert cost(served) <= 2 * CHUNK_BYTES_MAX + 2 * SEND_BUFFER_BYTES
        assert not served.finished.is_set()


async def test_a_client_that_takes_nothing_is_closed_with_the_reason(log: SqliteLog) -> None:
    stored = await fill(log, 2_000_000)
    async with serve(log, stall_s=0.2) as served, raw_client(served.port) as client:
        async with asyncio.timeout(PATIENCE_S):
            await served.finished.wait()
        # Now it reads on, in time to see why.
        body = await receive(client)
    opening, _, rest = body.partition(b"\n\n")
    received, _, last = rest.rpartition(b"retry: ")
    assert b"stream.start" in opening
    assert stored.startswith(received)
    assert 0 < len(received) < 600_000
    assert last == (
        b"2000\nevent: stream.shutdown\n"
        b'data: {"type":"stream.shutdown","threadId":"thread_1","agentId":"root",'
        b'"reason":"slow_consumer","retryAfterMs":2000}\n\n'
    )


async def test_a_body_in_chunks_is_closed_as_whole_too(log: SqliteLog) -> None:
    await fill(log, 2_000_000)
    async with (
        serve(log, stall_s=0.2) as served,
        raw_client(served.port, version="1.1") as client,
    ):
        async with asyncio.timeout(PATIENCE_S):
            await served.finished.wait()
        body = await receive(client)
    assert body.endswith(b'"reason":"slow_consumer","retryAfterMs":2000}\n\n\r\n0\r\n\r\n')


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_takes_nothing_even_then_is_cut_off(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("ownware_gateway.stream.LINGER_S", 0.05)
    await fill(log, 2_000_000)
    assert LINGER_S > 1
    async with serve(log, stall_s=0.1) as served, raw_client(served.port, version=version):

        async def cut() -> bool:
            if not served.transports:
                return False
            opened = served.transports[0].get_extra_info("socket")
            return opened is None or opened.fileno() < 0

        await until(cut)


async def test_a_slow_client_that_reads_is_never_closed_and_misses_nothing(log: SqliteLog) -> None:
    stored = await fill(log, 900_000)
    loop = asyncio.get_running_loop()
    async with serve(log, stall_s=0.3) as served, raw_client(served.port, window=16_384) as client:
        body = bytearray()
        async with asyncio.timeout(PATIENCE_S):
            while b"replay.complete" not in body[-1000:]:
                part = await loop.sock_recv(client, 16_384)
                assert part, "it was closed"
                body += part
                # This is the client's slowness, several times as long as a stall in all.
                await asyncio.sleep(0.04)
        assert stored in body
        assert not served.finished.is_set()


async def test_one_who_leaves_is_let_go_at_the_next_byte(log: SqliteLog) -> None:
    await whole_run(log, "run_1")
    async with serve(log, keep_alive_s=0.02) as served:
        async with raw_client(served.port) as client:
            await receive(client, lambda data: b"replay.complete" in data)
            assert not served.finished.is_set()
        async with asyncio.timeout(PATIENCE_S):
            await served.finished.wait()
    log._tails.rest(STREAM)
    assert log._tails.get(STREAM) is None, "nobody waits any more"


async def test_one_who_leaves_an_idle_stream_is_missed_without_a_byte_to_send(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LOOK_S", 0.02)
    await whole_run(log, "run_1")
    async with serve(log, keep_alive_s=3_600.0) as served:
        async with raw_client(served.port) as client:
            await receive(client, lambda data: b"replay.complete" in data)
            assert not served.finished.is_set()
        async with asyncio.timeout(PATIENCE_S):
            await served.finished.wait()


# -- a gateway's streams


async def body_of(http: aiohttp.ClientSession, url: str, path: str, **headers: str) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        async with http.get(f"{url}/api/v1{path}", headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.read()


def stored_frames(body: bytes) -> list[bytes]:
    """Return the frames of the log's events, as they came; an unfinished last one is dropped."""
    return [block for block in body.split(b"\n\n")[:-1] if block.startswith(b"id: ")]


def thread_path(run: dict[str, Any], query: str = "") -> str:
    return f"/threads/{run['threadId']}/agents/root/events{query}"


def run_path(run: dict[str, Any], query: str = "") -> str:
    return f"/runs/{run['runId']}/events{query}"


async def ended_run(http: aiohttp.ClientSession, url: str, **body: Any) -> dict[str, Any]:
    run = await start_run(http, url, "a b c", **body)
    return run | {"endSeq": (await until_status(http, url, run, "succeeded"))["endSeq"]}


async def error_of(
    http: aiohttp.ClientSession, url: str, path: str, method: str = "GET"
) -> tuple[int, dict[str, Any]]:
    async with http.request(method, f"{url}/api/v1{path}") as response:
        answer: dict[str, Any] = await response.json() if method != "HEAD" else {}
        return response.status, answer


async def test_the_headers_of_a_stream_let_nothing_in_between_hold_it_back(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    for path in (run_path(run), thread_path(run)):
        async with http.get(
            f"{up.url}/api/v1{path}", headers={"Accept-Encoding": "gzip, deflate, br, zstd"}
        ) as response:
            assert response.headers.getall("Content-Type") == ["text/event-stream"]
            assert response.headers.getall("Cache-Control") == ["no-cache, no-transform"]
            assert response.headers["X-Accel-Buffering"] == "no"
            assert "Content-Encoding" not in response.headers
            assert "Content-Length" not in response.headers


async def test_a_run_is_streamed_from_its_first_event_to_its_last(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    await ended_run(http, up.url)
    run = await ended_run(http, up.url)
    run = await ended_run(http, up.url, threadId=run["threadId"])
    await ended_run(http, up.url, threadId=run["threadId"])

    async with open_stream(http, up.url, run_path(run)) as response:
        read = await read_frames(response)

    assert [frame.event for frame in read] == [
        "stream.start",
        "user.message",
        "session.start",
        "turn.start",
        *["text.delta"] * 3,
        "text.complete",
        "turn.end",
        "session.end",
        "stream.replay.complete",
        "done",
    ]
    seqs = [event["seq"] for event in events(read)]
    assert seqs == list(range(run["startSeq"] + 1, run["endSeq"] + 1))
    start, complete = json.loads(read[0].data), json.loads(read[-2].data)
    assert start["runId"] == complete["runId"] == run["runId"]
    assert start["since"] == complete["since"] == run["startSeq"] > 0
    assert complete["replayedThroughSeq"] == run["endSeq"]
    assert all(frame.id is None for frame in (read[0], *read[-2:]))


async def test_a_frame_is_an_id_a_type_and_one_line_of_json(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    provider.reply(Reply(text=["line\nline\r\n", "\u2028 é 😀", "\n\nid: 9\n\n"]))
    up = await start_gateway()
    run = await ended_run(http, up.url)
    body = await body_of(http, up.url, run_path(run))
    history = await get_json(http, up.url, f"/threads/{run['threadId']}/agents/root/events/history")

    assert b"\r" not in body
    assert body.endswith(b'event: done\ndata: {"type":"done","status":"complete"}\n\n')
    found = stored_frames(body)
    assert len(found) == history["count"] == run["endSeq"]
    for seq, (block, event) in enumerate(zip(found, history["events"], strict=True), 1):
        first, second, third = block.split(b"\n")
        assert first == f"id: {history['epoch']}.{seq}".encode()
        assert second == f"event: {event['type']}".encode()
        assert json.loads(third.removeprefix(b"data: ")) == event
        assert third.startswith(f'data: {{"type":"{event["type"]}"'.encode())
        assert third.endswith(f',"seq":{seq}}}'.encode())


async def test_a_client_that_comes_in_the_middle_gets_replay_then_live(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["a", "b", "c", "d"], gate=gate, gate_after=2))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    async with open_stream(http, up.url, run_path(run)) as response:
        await read_frames(response, until=lambda frame: '"text":"b"' in frame.data)
    async with open_stream(http, up.url, thread_path(run)) as response:
        kinds, complete = [], {}
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                kinds.append(frame.event)
                if frame.event == "stream.replay.complete":
                    complete = json.loads(frame.data)
                    gate.set()
                if frame.event == "session.end":
                    break
    assert kinds == [
        "stream.start",
        "user.message",
        "session.start",
        "turn.start",
        "text.delta",
        "text.delta",
        "stream.replay.complete",
        "text.delta",
        "text.delta",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    assert (complete["replayedThroughSeq"], complete["liveTail"]) == (5, True)


async def test_a_thread_is_followed_from_run_to_run(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    async with open_stream(http, up.url, thread_path(run, f"?since={run['endSeq']}")) as response:
        ends, seqs = 0, []
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                if frame.id is not None:
                    seqs.append(int(frame.id.partition(".")[2]))
                ends += frame.event == "session.end"
                if frame.event in ("stream.replay.complete", "session.end"):
                    if ends == 3:
                        break
                    await start_run(http, up.url, "again", threadId=run["threadId"])
    assert seqs == list(range(run["endSeq"] + 1, run["endSeq"] + 1 + len(seqs)))


async def test_without_follow_a_thread_stream_ends_once_no_run_is_under_way(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["a", "b"], gate=gate, gate_after=1))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    async with open_stream(http, up.url, thread_path(run, "?follow=false")) as response:
        kinds = []
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                kinds.append(frame.event)
                if frame.event == "stream.replay.complete":
                    gate.set()
    assert kinds[-2:] == ["session.end", "done"]
    body = await body_of(http, up.url, thread_path(run, "?follow=false"))
    assert body.count(b"event: done\n") == 1


# -- cursors, asked for


@pytest.mark.parametrize("path", [run_path, thread_path])
async def test_both_forms_of_a_cursor_go_on_behind_it(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    path: Callable[[dict[str, Any], str], str],
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    whole = stored_frames(await body_of(http, up.url, run_path(run)))
    epoch = whole[0].removeprefix(b"id: ").partition(b".")[0].decode()
    for since in range(run["endSeq"] + 1):
        for form in (f"{since}", f"{epoch}.{since}"):
            query = f"?since={form}" + ("&follow=false" if path is thread_path else "")
            assert stored_frames(await body_of(http, up.url, path(run, query))) == whole[since:]


async def test_what_an_event_source_sends_beats_the_address_it_was_made_with(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    whole = stored_frames(await body_of(http, up.url, run_path(run)))
    event_id = whole[4].partition(b"\n")[0].removeprefix(b"id: ").decode()
    for path in (run_path(run, "?since=2"), thread_path(run, "?since=2&follow=false")):
        for cursor in (event_id, "5"):
            body = await body_of(http, up.url, path, **{"Last-Event-ID": cursor})
            assert stored_frames(body) == whole[5:]
        # Not even an address that could not be used otherwise matters then.
        bad = path.replace("since=2", "since=bad")
        body = await body_of(http, up.url, bad, **{"Last-Event-ID": "5"})
        assert stored_frames(body) == whole[5:]
        # A browser that has seen no id yet sends an empty one, or none.
        body = await body_of(http, up.url, path, **{"Last-Event-ID": ""})
        assert stored_frames(body) == whole[2:]


@pytest.mark.parametrize("path", [run_path, thread_path])
@pytest.mark.parametrize(
    ("since", "status", "code", "detail"),
    [
        ("x", 400, "cursor_invalid", {}),
        ("-1", 400, "cursor_invalid", {}),
        (str(2**63), 400, "cursor_invalid", {}),
        ("", 400, "cursor_invalid", {}),
        ("1000", 409, "cursor_ahead", {"streamHighWaterCursor": 9}),
        ("00000000.3", 410, "cursor_expired", {"earliestRetainedCursor": 0}),
    ],
)
async def test_a_cursor_that_cannot_be_used_is_an_error_before_the_stream_opens(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    path: Callable[[dict[str, Any], str], str],
    since: str,
    status: int,
    code: str,
    detail: dict[str, Any],
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    found, answer = await error_of(http, up.url, path(run, f"?since={since}"))
    assert (found, answer["error"]) == (status, code)
    assert answer.items() >= detail.items()


@pytest.mark.parametrize("path", [run_path, thread_path])
@pytest.mark.parametrize(
    ("cursor", "reason"),
    [("x", "cursor_invalid"), ("1000", "cursor_ahead"), ("00000000.3", "cursor_expired")],
)
async def test_on_an_automatic_reconnect_it_is_said_in_the_stream_which_then_starts_anew(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    path: Callable[[dict[str, Any], str], str],
    cursor: str,
    reason: str,
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    whole = stored_frames(await body_of(http, up.url, run_path(run)))
    query = "?since=7&follow=false" if path is thread_path else "?since=7"
    body = await body_of(http, up.url, path(run, query), **{"Last-Event-ID": cursor})
    blocks = body.decode().split("\n\n")
    kind, data = blocks[1].split("\n")
    assert kind == "event: stream.reset"
    reset = json.loads(data.removeprefix("data: "))
    assert (reset["reason"], reset["earliestRetainedCursor"]) == (reason, 0)
    assert reset["highWaterCursor"] == run["endSeq"]
    assert stored_frames(body) == whole


async def test_a_reconnect_from_the_end_of_an_ended_run_is_told_to_stop(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    last = stored_frames(await body_of(http, up.url, run_path(run)))[-1]
    event_id = last.partition(b"\n")[0].removeprefix(b"id: ").decode()
    for cursor in (event_id, str(run["endSeq"])):
        async with http.get(
            f"{up.url}/api/v1{run_path(run)}", headers={"Last-Event-ID": cursor}
        ) as response:
            assert response.status == 204
            assert await response.read() == b""


async def test_a_run_from_its_end_has_nothing_more_though_the_thread_goes_on(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    await ended_run(http, up.url, threadId=run["threadId"])

    body = await body_of(http, up.url, run_path(run, f"?since={run['endSeq']}"))

    assert stored_frames(body) == []
    assert [block.partition(b"\n")[0] for block in body.split(b"\n\n")[1:-1]] == [
        b"event: stream.replay.complete",
        b"event: done",
    ]


async def test_a_cursor_outside_of_a_run_is_a_mismatch(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    first = await ended_run(http, up.url)
    second = await ended_run(http, up.url, threadId=first["threadId"])
    for run, since in ((second, first["endSeq"] - 1), (first, first["endSeq"] + 1)):
        status, answer = await error_of(http, up.url, run_path(run, f"?since={since}"))
        assert (status, answer["error"]) == (409, "cursor_mismatch")
        body = await body_of(http, up.url, run_path(run), **{"Last-Event-ID": str(since)})
        assert b'"reason":"cursor_mismatch"' in body
        seqs = [int(block.partition(b"\n")[0].rpartition(b".")[2]) for block in stored_frames(body)]
        assert seqs == list(range(run["startSeq"] + 1, run["endSeq"] + 1))


async def test_what_is_not_there_is_said_before_the_stream_opens(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    for path, code in [
        ("/threads/unknown/agents/root/events", "not_found"),
        (f"/threads/{run['threadId']}/agents/nobody/events", "not_found"),
        ("/runs/unknown/events", "run_not_found"),
    ]:
        status, answer = await error_of(http, up.url, path)
        assert (status, answer["error"]) == (404, code)
    for path in (run_path(run), thread_path(run)):
        for method in ("HEAD", "POST"):
            status, _ = await error_of(http, up.url, path, method)
            assert status == 405


# -- the rules, through the door


async def test_nobody_is_shown_what_is_not_durable(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["a", "b"], gate=gate, gate_after=1))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    async with open_stream(http, up.url, thread_path(run)) as response:
        coming = frames(response)
        async with asyncio.timeout(PATIENCE_S):
            while (await anext(coming)).event != "text.delta":
                pass
        file = up.data_dir / "gateway.db"
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            gate.set()
            more = asyncio.ensure_future(anext(coming))
            starting = asyncio.ensure_future(start_run(http, up.url, "another"))
            await provider.requested(1)
            done, _ = await asyncio.wait([more, starting], timeout=0.3)
            assert not done
            other.execute("ROLLBACK")
        async with asyncio.timeout(PATIENCE_S):
            assert (await more).event == "text.delta"
            await run_events(http, up.url, (await starting)["runId"])


async def test_a_restart_changes_no_byte_and_reuses_no_number(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "é 😀 c d e f g")
    live = stored_frames(await body_of(http, up.url, run_path(run)))
    replayed = stored_frames(await body_of(http, up.url, run_path(run)))
    up = await start_gateway.restart(up)
    restarted = stored_frames(await body_of(http, up.url, thread_path(run, "?follow=false")))
    assert live == replayed == restarted
    await ended_run(http, up.url, threadId=run["threadId"])
    both = stored_frames(await body_of(http, up.url, thread_path(run, "?follow=false")))
    assert both[: len(live)] == live
    seqs = [int(block.partition(b"\n")[0].rpartition(b".")[2]) for block in both]
    assert seqs == list(range(1, len(both) + 1))


async def test_a_gateway_that_leaves_says_so_and_meets_nobody_who_comes_back(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    refused = []
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(open_stream(http, up.url, thread_path(run)))
            for _ in range(5)
        ]
        reading = [asyncio.create_task(response.read()) for response in opened]

        async def come_back() -> None:
            await reading[0]
            try:
                async with aiohttp.ClientSession() as other, other.get(up.url):
                    pass
            except aiohttp.ClientConnectorError as error:
                refused.append(error)

        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            group.create_task(come_back())
            group.create_task(start_gateway.stop(up))
        bodies = [task.result() for task in reading]
    assert len(refused) == 1
    for body in bodies:
        assert body.endswith(
            b"retry: 2000\nevent: stream.shutdown\n"
            b'data: {"type":"stream.shutdown","threadId":"%b","agentId":"root",'
            b'"reason":"gateway_shutdown","retryAfterMs":2000}\n\n' % run["threadId"].encode()
        )
        assert b"event: done" not in body


async def test_a_client_that_hangs_up_changes_nothing_for_the_run(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["a"] * 100, delay_s=0.002, gate=gate, gate_after=1))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    for path in (run_path(run), thread_path(run)):
        async with open_stream(http, up.url, path) as response:
            await read_frames(response, until="text.delta")
    found = await get_json(http, up.url, f"/runs/{run['runId']}")
    assert found["status"] == "running"
    gate.set()
    read = await run_events(http, up.url, run["runId"])
    assert read[-1]["status"] == "succeeded"
    assert not provider.disconnected.is_set()


async def test_a_client_that_hangs_up_at_once_is_no_error(
    start_gateway: Gateways, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    up = await start_gateway()
    run = await ended_run(http, up.url)
    port = int(up.url.rpartition(":")[2])
    for _ in range(10):
        # Gone before its request can have been looked at.
        async with raw_client(port, f"/api/v1{thread_path(run)}"):
            pass
        await body_of(http, up.url, run_path(run))
    assert [item.getMessage() for item in caplog.records if item.levelname == "ERROR"] == []


async def test_fifty_cut_connections_lose_nothing_and_repeat_nothing(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider
) -> None:
    provider.reply(Reply(text=["é"] * 2000, delay_s=0.0005))
    up = await start_gateway()
    run = await start_run(http, up.url, "go")
    chance = random.Random(50)
    seen: list[bytes] = []
    connections, over = 0, False
    last_event_id = ""
    while not over:
        connections += 1
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        url = f"{up.url}/api/v1{run_path(run)}"
        async with asyncio.timeout(PATIENCE_S), http.get(url, headers=headers) as response:
            over = response.status == 204
            # Wherever the connection is cut: the rest of what came is lost, as if it never had.
            cut, body = chance.randint(1, 8000), b""
            while len(body) < cut and (data := await response.content.readany()):
                body += data
            body = body[:cut]
            response.close()
        seen += stored_frames(body)
        over = over or body.endswith(b'"status":"complete"}\n\n')
        if seen:
            last_event_id = seen[-1].partition(b"\n")[0].removeprefix(b"id: ").decode()
    assert connections > 50
    whole = stored_frames(await body_of(http, up.url, run_path(run)))
    assert len(whole) > 2000
    assert seen == whole


# -- many followers of a gateway in a process of its own

RUNNER: Final = """
import asyncio, json, sys
from ownware_gateway.app import gateway
from ownware_gateway.settings import load

async def main():
    async with gateway(load(environ={}, overrides=json.loads(sys.argv[1]))) as up:
        print(up.url, flush=True)
        # Whoever started it closes its input to end it.
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def gateway_process(**settings: Any) -> AsyncIterator[tuple[str, Process]]:
    """Run a gateway in a process of its own; return its address and the process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        RUNNER,
        json.dumps({"port": 0, **settings}),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            url = (await process.stdout.readline()).decode().strip()
        yield url, process
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def memory_kib(pid: int, name: str) -> int:
    """Return `VmRSS`, what the process has in memory now, or `VmHWM`, the most it ever had."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


async def test_two_hundred_followers_see_the_same_bytes_and_cost_little(
    profiles: Path, tmp_path: Path
) -> None:
    settings = {"profiles": str(profiles), "data_dir": str(tmp_path / "many")}
    async with (
        gateway_process(**settings) as (url, process),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        contextlib.AsyncExitStack() as stack,
    ):
        demo = {"model": "demo:assistant"}
        first = await start_run(http, url, "count to 10", **demo)
        await body_of(http, url, run_path(first))
        before = memory_kib(process.pid, "VmRSS")
        port = int(url.rpartition(":")[2])
        never_reads = await stack.enter_async_context(
            raw_client(port, "/api/v1" + thread_path(first))
        )
        responses = [
            await stack.enter_async_context(open_stream(http, url, thread_path(first)))
            for _ in range(199)
        ]

        async def read(response: aiohttp.ClientResponse) -> bytes:
            body = bytearray()
            async for data in response.content.iter_any():
                body += data
                if (
                    body.count(b"\nevent: session.end\n", -3000)
                    and body.count(b"\nevent: session.end\n") == 2
                ):
                    break
            return bytes(body)

        async with asyncio.timeout(PATIENCE_S * 2), asyncio.TaskGroup() as group:
            reading = [group.create_task(read(response)) for response in responses]
            await start_run(http, url, "count to 2000", threadId=first["threadId"], **demo)
        seen = {b"\n\n".join(stored_frames(task.result() + b"\n\n")) for task in reading}
        grown_kib = memory_kib(process.pid, "VmHWM") - before
        late = await receive(never_reads, lambda data: data.count(b"\nevent: session.end\n") == 2)

    assert len(seen) == 1
    (one,) = seen
    assert one.count(b"event: text.delta\n") == 2010
    assert b"\n\n".join(stored_frames(late + b"\n\n")) == one
    assert grown_kib < 50 * 1024
