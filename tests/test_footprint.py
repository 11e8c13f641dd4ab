"""What is held for what does not move: runs that wait, threads that are done, streams without news.

How many bytes that is, and that it stays so for long, is measured in bench/.
"""

import asyncio
import gc
import tracemalloc
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import recent
from ownware_gateway.app import Gateway
from ownware_gateway.events import (
    SessionEnd,
    SessionStart,
    TextComplete,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallStart,
    TurnEnd,
    TurnStart,
    Usage,
    UserMessage,
)
from ownware_gateway.log import Stream
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.models import AssistantTurn, ToolCall
from ownware_gateway.recent import Recent
from ownware_gateway.transcript import Answer, RunFacts
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession

WAITING: Final = 12
IDLE_STREAMS: Final = 200

#: aiohttp has so many for each connection; the gateway needs none.
TASKS_PER_STREAM: Final = 2


def own_tasks() -> list[str]:
    """Return the tasks whose coroutine is the gateway's."""
    codes = [getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()]
    return [code.co_qualname for code in codes if code and "ownware_gateway" in code.co_filename]


def timers(of: object) -> int:
    """Return how many timers call a method of this object."""
    loop: Any = asyncio.get_running_loop()
    return sum(
        getattr(timer._callback, "__self__", None) is of
        for timer in loop._scheduled
        if not timer.cancelled()
    )


async def settled() -> None:
    """Wait until no task of the gateway is left."""
    async with asyncio.timeout(PATIENCE_S):
        while own_tasks():
            await asyncio.sleep(0)


async def have_wait(http: Http, up: Gateway, provider: Provider, count: int) -> None:
    for number in range(count):
        provider.reply(Reply(calls=[Call("write_file", {"path": f"{number}", "content": ""})]))
        run = await start_run(http, up.url, "write")
        await until_status(http, up.url, run, "waiting")
    await settled()


# -- runs that wait


async def test_runs_that_wait_have_no_task_and_one_timer_together(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    await have_wait(http, up, provider, WAITING)
    assert timers(up.engine.approvals) == 1
    up = await start_gateway.restart(up)
    assert len((await get_json(http, up.url, "/approvals"))["items"]) == WAITING
    await settled()
    assert timers(up.engine.approvals) == 1


@pytest.mark.parametrize("how", ["answered", "cancelled", "deleted"])
async def test_a_question_that_is_over_leaves_nothing(
    start_gateway: Gateways, http: Http, provider: Provider, how: str
) -> None:
    provider.default = Reply(text=["Done."])
    up = await start_gateway()
    await have_wait(http, up, provider, 1)
    (asked,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert up.engine.approvals._expires_at
    if how == "answered":
        path, body = f"/threads/{asked['threadId']}/resume", {"action": "deny"}
        assert (await post_json(http, up.url, path, body))[0] == 200
        await run_events(http, up.url, asked["runId"])
    elif how == "cancelled":
        assert (await post_json(http, up.url, f"/runs/{asked['runId']}/cancel"))[0] in (200, 202)
        await run_events(http, up.url, asked["runId"])
    else:
        async with http.delete(f"{up.url}/api/v1/threads/{asked['threadId']}") as response:
            assert response.status in (200, 204)
    await settled()
    assert not up.engine.approvals._expires_at


# -- threads that are done


async def test_threads_that_are_done_leave_nothing_but_what_has_a_bound(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.default = Reply(text=["word "] * 50)
    up = await start_gateway()
    for _ in range(8):
        run = await start_run(http, up.url, "go")
        path = f"/threads/{run['threadId']}/agents/root/events"
        async with AsyncExitStack() as stack:
            # More than one: the first may wait again before the last has read the end.
            readers = [
                await stack.enter_async_context(open_stream(http, up.url, path)) for _ in range(3)
            ]
            for reader in readers:
                await read_frames(reader, until="session.end")
    await settled()
    engine: Any = up.engine
    assert not engine._slots
    assert not engine._tasks
    assert not engine._cancelling
    assert 0 < engine._recent.size_bytes < recent.BYTES_MAX


# -- streams without news


class Idle(asyncio.Protocol):
    """A client that reads, and is neither a task nor a timer itself."""

    def __init__(self) -> None:
        self.data = b""
        self.caught_up = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        if b"stream.replay.complete" in self.data:
            self.caught_up.set()


async def test_idle_streams_are_no_tasks_but_those_of_their_connections(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    _, thread = await post_json(http, up.url, "/threads", {"profileId": "assistant"})
    path = f"/api/v1/threads/{thread['id']}/agents/root/events"
    host, _, port = up.url.removeprefix("http://").partition(":")
    await settled()
    before = len(asyncio.all_tasks())
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(IDLE_STREAMS):
        _, client = await loop.create_connection(Idle, host, int(port))
        assert client.transport is not None
        client.transport.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        clients.append(client)
    async with asyncio.timeout(PATIENCE_S):
        for client in clients:
            await client.caught_up.wait()
    assert not own_tasks()
    assert len(asyncio.all_tasks()) - before <= TASKS_PER_STREAM * IDLE_STREAMS
    for client in clients:
        assert client.transport is not None
        client.transport.abort()


# -- conversations that were used last


def facts(number: int, text: str = "", *, raw: Any = None) -> RunFacts:
    """Return a run as a drive leaves it: one turn, which made one call."""
    run_id, call_id = f"run_{number:020}", f"call_{number}"
    asked = AssistantTurn((text + " ")[:-1], tool_calls=[ToolCall(call_id, "glob", "{}")], raw=raw)
    usage = Usage(input_tokens=number)
    run = RunFacts(UserMessage(run_id=run_id, text=f"{number}", timestamp=number))
    for event in (
        SessionStart(
            run_id=run_id, session_id=run_id, profile_id="a", model="demo:a", timestamp=number
        ),
        TurnStart(turn_index=0, timestamp=number),
        ToolCallStart(tool_call_id=call_id, tool_name="glob", turn_index=0),
        TextComplete(text=text, turn_index=0),
        ToolCallExecute(tool_call_id=call_id, tool_name="glob", input={"a": text}, turn_index=0),
        ToolCallEnd(
            tool_call_id=call_id,
            tool_name="glob",
            result=f"{number}",
            is_error=False,
            duration_ms=number,
            turn_index=0,
            output_bytes_raw=number,
        ),
        TurnEnd(turn_index=0, stop_reason="end_turn", usage=usage, timestamp=number),
        SessionEnd(
            run_id=run_id,
            session_id=run_id,
            status="succeeded",
            reason="end_turn",
            code=None,
            total_usage=usage,
            turn_count=1,
            timestamp=number,
        ),
    ):
        run.apply(event)
    run.turns[0].answer = Answer(asked, "end_turn", usage)
    return run


@pytest.fixture
async def kept(tmp_path: Path) -> Any:
    log = await SqliteLog.open(tmp_path / "log.db", lambda: 0)
    yield Recent(log)
    await log.close()


async def test_recent_conversations_never_take_more_than_their_bytes(kept: Recent) -> None:
    text = "x" * (recent.BYTES_MAX // 40)
    for number in range(1_000, 1_100):
        kept.keep(Stream(f"{number}"), 1, [facts(number, text + f"{number}")])
        assert 0 < kept.size_bytes <= recent.BYTES_MAX
    assert kept.size_bytes > recent.BYTES_MAX / 2
    newest = Stream("1099")
    assert [run.message.text for run in await kept.before(newest, 1)] == ["1099"]
    assert await kept.before(Stream("1000"), 1) == [], "the oldest was let go, and no log has it"
    kept.clear()
    assert kept.size_bytes == 0


@pytest.mark.parametrize("heavy", ["text", "raw"])
async def test_a_conversation_that_is_too_heavy_is_not_kept_and_drives_nobody_out(
    kept: Recent, heavy: str
) -> None:
    light, stream = Stream("light"), Stream("heavy")
    kept.keep(light, 1, [facts(1)])
    kept.keep(stream, 1, [facts(2)])
    before = kept.size_bytes
    much = "x" * recent.ONE_BYTES_MAX
    more = facts(3, much) if heavy == "text" else facts(3, raw={"content": [{"text": much}]})
    kept.keep(stream, 2, [facts(2), more])
    assert 0 < kept.size_bytes < before
    assert len(await kept.before(light, 1)) == 1
    assert kept.size_bytes == 0, "what is in use counts nothing, for it is not kept"


async def test_a_long_conversation_is_kept_while_it_is_the_one_in_use(kept: Recent) -> None:
    kept.keep(Stream("short"), 1, [facts(1)])
    kept.keep(Stream("long"), 1, [facts(2, "x" * recent.BYTES_MAX)])
    assert kept.size_bytes > recent.BYTES_MAX
    assert await kept.before(Stream("short"), 1) == []
    kept.keep(Stream("next"), 1, [facts(3)])
    assert 0 < kept.size_bytes < recent.BYTES_MAX


async def test_what_a_conversation_is_said_to_take_is_what_it_takes(kept: Recent) -> None:
    def make(count: int) -> list[RunFacts]:
        return [facts(number, f"{number} " * 500) for number in range(1_000, 1_000 + count)]

    make(2)
    gc.collect()
    tracemalloc.start()
    try:
        history = make(100)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept.keep(Stream("a"), 1, history)
    assert 0.8 * taken <= kept.size_bytes <= 2 * taken


async def test_a_model_that_nests_deeply_stops_nothing(kept: Recent) -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    kept.keep(Stream("a"), 1, [facts(1, raw=deep)])
    assert kept.size_bytes > 5_000 * 56
