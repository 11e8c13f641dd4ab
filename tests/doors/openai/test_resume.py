"""Streams of the OpenAI door that are cut: gone on with, joined by a retry, or left for good."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ownware_gateway import stream as stream_module
from ownware_gateway.doors.openai import readers
from ownware_gateway.sse import Frame, Parser
from tests.doors.openai import (
    CHAT,
    ask,
    chunks,
    content,
    finish,
    post,
    said,
    stream,
    streamed,
    user,
)
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    Proxy,
    frames,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

RETRY = {"x-stainless-retry-count": "1"}
CHAT_1 = {"X-Conversation-Id": "chat-1"}


async def go_on(
    http: Http, url: str, completion_id: str, last_event_id: str | None = None
) -> list[Frame]:
    """Return what a stream is gone on with."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with http.get(f"{url}{CHAT}/{completion_id}/stream", headers=headers) as response:
        assert response.status == 200, await response.text()
        return await read_frames(response)


async def runs(http: Http, url: str) -> list[dict[str, Any]]:
    return list((await get_json(http, url, "/runs"))["items"])


async def ended(http: Http, url: str, run_id: str) -> str:
    """Wait until a run has ended; return how."""
    return str((await run_events(http, url, run_id))[-1]["status"])


# -- going on


async def test_a_stream_goes_on_behind_every_frame_with_the_very_same_frames(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"permissionMode": "auto"})
    looks = Reply(thinking=["Hm"], text=["I", " look."], calls=[Call("list_files", {})])
    provider.reply(looks, Reply(text=["cut"], cut_after=1), Reply(text=["Done", "."]))
    up = await start_gateway()
    usage: dict[str, Any] = {"stream_options": {"include_usage": True}, "model": "assistant"}
    whole = await streamed(http, up.url, "go", **usage)
    completion_id = chunks(whole)[0]["id"]
    up = await start_gateway.restart(up)
    assert await go_on(http, up.url, completion_id) == whole
    for place, frame in enumerate(whole[:-1], start=1):
        assert await go_on(http, up.url, completion_id, frame.id) == whole[place:]
    assert len(await runs(http, up.url)) == 1


async def test_a_stream_that_is_cut_anywhere_is_gone_on_with_to_the_same_end(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    await cut_and_go_on(start_gateway, http, provider, responses=4, cuts=6)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_stream_that_is_cut_thirty_times_is_gone_on_with_to_the_same_end(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    await cut_and_go_on(start_gateway, http, provider, responses=50, cuts=30)


async def cut_and_go_on(
    start_gateway: Gateways, http: Http, provider: Provider, *, responses: int, cuts: int
) -> None:
    up = await start_gateway()
    async for prompt, url, whole in cut_streams(up.url, provider, responses, cuts):
        read, headers = await until_cut(http, url, prompt)
        while not read or read[-1].data != "[DONE]":
            ids = [frame.id for frame in read if frame.id is not None]
            path = f"{CHAT}/{headers['completion']}/stream"
            after = {"Last-Event-ID": ids[-1]} if ids else {}
            more, _ = await until_end(http.get(f"{url}{path}", headers=after))
            read += more
        assert said(read) == whole
        assert len([frame for frame in read if frame.id]) == len({f.id for f in read if f.id})
        assert finish(read) == "stop"
    assert len(await runs(http, up.url)) == responses


async def cut_streams(
    url: str, provider: Provider, responses: int, cuts: int
) -> AsyncIterator[tuple[str, str, str]]:
    """Yield prompts, where to send each so that its stream is cut, and what is said to it."""
    dice = random.Random(7)
    for number in range(responses):
        words = [f"{dice.choice('äöü€✓abc')}{n} " for n in range(60)]
        provider.reply(Reply(text=words, delay_s=0.001))
        async with Proxy(url, Cuts(dice, cuts)) as proxy:
            yield f"prompt {number}", proxy.url, "".join(words)


class Cuts:
    """Cuts so many connections, each at a byte of its body."""

    def __init__(self, dice: random.Random, left: int) -> None:
        self.dice = dice
        self.left = left

    def __call__(self, brought: bytes) -> int | None:
        begun = brought.find(b"\r\n\r\n")
        if self.left <= 0 or begun < 0 or len(brought) < begun + 300:
            return None
        self.left -= 1
        return self.dice.randrange(begun + 4, len(brought))


async def until_cut(http: Http, url: str, prompt: str) -> tuple[list[Frame], dict[str, str]]:
    body = {"messages": [user(prompt)], "stream": True}
    read, headers = await until_end(http.post(f"{url}{CHAT}", json=body))
    run_id = headers["X-Run-Id"]
    return read, {"completion": f"chatcmpl-{run_id.removeprefix('run_')}"}


async def until_end(request: Any) -> tuple[list[Frame], Any]:
    """Return the frames of a response up to its end, whoever brought that about."""
    read: list[Frame] = []
    parser = Parser()
    async with asyncio.timeout(PATIENCE_S), request as response:
        try:
            async for data in response.content.iter_any():
                read += parser.feed(data)
        except aiohttp.ClientPayloadError:
            pass
        return read, response.headers


@pytest.mark.parametrize(
    ("cursor", "status", "code"),
    [
        ("nonsense", 400, "cursor_invalid"),
        ("abcdef12.3.0", 410, "cursor_expired"),
        ("9999.0", 409, "cursor_ahead"),
        ("{epoch}.9999.0", 409, "cursor_ahead"),
    ],
)
async def test_a_cursor_that_is_none_is_refused(
    start_gateway: Gateways, http: Http, cursor: str, status: int, code: str
) -> None:
    up = await start_gateway()
    first = (await streamed(http, up.url, "go"))[0]
    assert first.id is not None
    headers = {"Last-Event-ID": cursor.format(epoch=first.id.partition(".")[0])}
    path = f"{CHAT}/{json.loads(first.data)['id']}/stream"
    async with http.get(f"{up.url}{path}", headers=headers) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code


async def test_a_completion_that_is_none_is_a_404(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    for name in ("chatcmpl-x", "resp_1", "chatcmpl-x-y"):
        async with http.get(f"{up.url}{CHAT}/{name}/stream") as response:
            assert response.status == 404


async def test_a_stream_that_the_gateway_leaves_says_so_and_goes_on_afterwards(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    cut = Reply(text=["one ", "two"], hang=True, hang_after=1)
    provider.reply(cut, Reply(text=["again"]))
    up = await start_gateway()
    async with stream(http, up.url, "go", headers=CHAT_1) as response:
        await provider.requested()
        read: list[Frame] = []
        coming = frames(response)
        async for frame in coming:
            read.append(frame)
            if "one" in frame.data:
                break
        stopping = asyncio.ensure_future(start_gateway.restart(up))
        read += [frame async for frame in coming]
        up = await stopping
    *seen, wrong, done = read
    assert json.loads(wrong.data)["error"]["code"] == "shutting_down"
    assert (wrong.id, done.data) == (None, "[DONE]")
    more = await go_on(http, up.url, chunks([*seen, done])[0]["id"], seen[-1].id)
    assert said([*seen, *more]) == "one \n\n[interrupted, answering again]\n\nagain"
    assert finish(more) == "stop"


# -- retries


async def test_a_retry_joins_the_run_that_is_under_way(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate, gate_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go") as first:
        await provider.requested()
        run_id = first.headers["X-Run-Id"]
    async with stream(http, up.url, "go", headers=RETRY) as second:
        assert second.headers["X-Run-Id"] == run_id
        gate.set()
        assert said(await read_frames(second)) == "one two"
    assert len(await runs(http, up.url)) == 1


async def test_a_retry_joins_it_after_a_restart_as_well(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["x"], hang=True), Reply(text=["again"], gate=gate))
    up = await start_gateway()
    async with stream(http, up.url, "go") as first:
        await provider.requested()
        up = await start_gateway.restart(up)
        await provider.requested(2)
        async with stream(http, up.url, "go", headers=RETRY) as second:
            assert second.headers["X-Run-Id"] == first.headers["X-Run-Id"]
            gate.set()
            assert said(await read_frames(second)) == "again"
    assert len(await runs(http, up.url)) == 1


async def test_what_is_no_retry_or_is_another_request_is_another_run(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.default = Reply(text=["x"], hang=True)
    up = await start_gateway()
    started = []
    asked: list[tuple[str, dict[str, str]]] = [
        ("go", {}),
        ("go", {}),
        ("other", RETRY),
        ("go", {**RETRY, **CHAT_1}),
    ]
    for text, headers in asked:
        async with stream(http, up.url, text, headers=headers) as response:
            started.append(response.headers["X-Run-Id"])
    assert len(set(started)) == len(asked)


async def test_two_that_were_cut_join_one_run_each(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.default = Reply(text=["x"], hang=True)
    up = await start_gateway()
    first, again = set(), set()
    for _ in range(2):
        async with stream(http, up.url, "go") as response:
            first.add(response.headers["X-Run-Id"])
    await provider.requested(2)
    async with (
        stream(http, up.url, "go", headers=RETRY) as one,
        stream(http, up.url, "go", headers=RETRY) as two,
    ):
        again = {one.headers["X-Run-Id"], two.headers["X-Run-Id"]}
    assert again == first
    assert len(first) == 2


async def test_a_retry_never_joins_a_run_that_is_dead(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(status=400, error="no"), Reply(text=["better"]))
    up = await start_gateway()
    status, _, _ = await post(http, up.url, CHAT, {"messages": [user("go")]})
    assert status == 502
    assert content(await ask(http, up.url, "go", headers=RETRY)) == "better"


async def test_an_idempotency_key_gives_the_answer_of_the_first_time_unless_that_failed(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(status=400, error="no"), Reply(text=["better"]), Reply(text=["never"]))
    up = await start_gateway()
    key = {"Idempotency-Key": "k1"}
    status, _, _ = await post(http, up.url, CHAT, {"messages": [user("go")]}, key)
    assert status == 502
    second = await ask(http, up.url, "go", headers=key)
    assert content(second) == "better"
    up = await start_gateway.restart(up)
    assert await ask(http, up.url, "go", headers=key) == second
    status, _, answer = await post(http, up.url, CHAT, {"messages": [user("no")]}, key)
    assert (status, answer["error"]["code"]) == (409, "idempotency_conflict")


# -- leaving


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Cancel at once what nobody reads; the event is set when a reader has left."""
    left, leave = asyncio.Event(), readers.Readers.leave

    def noticed(*args: Any, **more: Any) -> None:
        leave(*args, **more)
        left.set()

    monkeypatch.setattr(readers, "LEFT_S", 0.02)
    monkeypatch.setattr(readers.Readers, "leave", noticed)
    monkeypatch.setattr(stream_module, "LOOK_S", 0.05)
    return left


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("streams", [True, False])
async def test_a_run_that_nobody_reads_any_more_is_cancelled(
    start_gateway: Gateways, http: Http, provider: Provider, streams: bool
) -> None:
    provider.reply(Reply(text=["x"], hang=True))
    up = await start_gateway()
    body = {"messages": [user("go")], "stream": streams}
    asked = asyncio.ensure_future(post(http, up.url, CHAT, body))
    await provider.requested()
    asked.cancel()
    await provider.left()
    (run,) = await runs(http, up.url)
    assert await ended(http, up.url, run["runId"]) == "cancelled"


@pytest.mark.parametrize(
    ("settings", "headers"), [({}, CHAT_1), ({"disconnect": "keep"}, {})], ids=["named", "keep"]
)
async def test_a_conversation_goes_on_without_readers_and_so_does_all_where_it_is_set(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    impatient: asyncio.Event,
    settings: Any,
    headers: dict[str, str],
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate, gate_after=1))
    up = await start_gateway(**settings)
    async with stream(http, up.url, "go", headers=headers) as response:
        await provider.requested()
        run_id = response.headers["X-Run-Id"]
    async with asyncio.timeout(PATIENCE_S):
        await impatient.wait()
    # Longer than a run without a conversation is left.
    await asyncio.sleep(readers.LEFT_S * 2)
    gate.set()
    assert await ended(http, up.url, run_id) == "succeeded"


@pytest.mark.usefixtures("impatient")
async def test_a_run_that_waits_for_a_person_after_a_delivered_finish_is_let_wait(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": ""})]))
    up = await start_gateway()
    read = await streamed(http, up.url, "go")
    await asyncio.sleep(readers.LEFT_S * 2)
    run_id = chunks(read)[-1]["run_id"]
    assert (await get_json(http, up.url, f"/runs/{run_id}"))["status"] == "waiting"


async def test_a_reader_of_this_door_that_stalls_costs_nobody_else(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    words = ["word " * 200] * 3_000
    provider.reply(Reply(text=words))
    up = await start_gateway()
    async with stream(http, up.url, "go", headers=CHAT_1) as stalled:
        run_id = stalled.headers["X-Run-Id"]
        completion_id = f"chatcmpl-{run_id.removeprefix('run_')}"
        assert said(await go_on(http, up.url, completion_id)) == "".join(words)
        assert await ended(http, up.url, run_id) == "succeeded"


async def test_a_run_that_was_cancelled_from_elsewhere_ends_the_stream_and_says_how(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(text=["one"], hang=True, hang_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go") as response:
        await provider.requested()
        await post_json(http, up.url, f"/runs/{response.headers['X-Run-Id']}/cancel")
        read = await read_frames(response)
    assert chunks(read)[-1]["run_status"] == "cancelled"
    assert finish(read) == "stop"


async def test_a_thread_that_is_deleted_under_a_stream_ends_it_with_an_error(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(text=["one"], hang=True, hang_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go", headers=CHAT_1) as response:
        await provider.requested()
        run = (await runs(http, up.url))[0]
        async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as deleted:
            assert deleted.status == 200
        last = chunks(await read_frames(response))[-1]
    # It sees the run's end, or that there is nothing left, whichever comes first.
    assert last.get("run_status") == "cancelled" or last["error"]["code"] == "thread_deleted"


async def test_a_native_reader_and_one_of_this_door_see_the_same_run(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate))
    up = await start_gateway()
    async with stream(http, up.url, "go") as response:
        path = f"/runs/{response.headers['X-Run-Id']}/events"
        async with open_stream(http, up.url, path) as native:
            gate.set()
            theirs = await read_frames(native, until="done")
        mine = await read_frames(response)
    text = "".join(json.loads(f.data)["text"] for f in theirs if f.event == "text.delta")
    assert said(mine) == text == "one two"
