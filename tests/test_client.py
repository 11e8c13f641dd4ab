"""The client, against real gateways: through cuts, restarts and refusals, and what it raises."""

import asyncio
import random
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from ownware_gateway import client as client_module
from ownware_gateway.app import Gateway
from ownware_gateway.client import Client, ClientError
from ownware_gateway.errors import GatewayError
from tests.gateway import PATIENCE_S, Gateways, Proxy, text
from tests.loopback import Loopback
from tests.provider import Call, Provider, Reply

DEMO = "demo:assistant"
WRITE = Reply(calls=[Call("write_file", {"path": "a.txt", "content": "hi"})])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.001)
    monkeypatch.setattr(client_module, "RETRY_AFTER_MAX_S", 0.02)


@pytest.fixture
async def up(start_gateway: Gateways, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    # Read when a gateway starts: nobody waits here for a run that hangs.
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.05)
    return await start_gateway()


@pytest.fixture
async def client(up: Gateway) -> AsyncIterator[Client]:
    async with Client(up.url) as connected:
        yield connected


def unused_address() -> str:
    """Return an address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


async def all_events(client: Client, run: dict[str, Any]) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_S):
        return [e async for e in client.events(run["threadId"], run_id=run["runId"])]


def seqs(events: list[dict[str, Any]]) -> list[int]:
    return [event["seq"] for event in events]


async def test_a_run_is_followed_from_its_first_event_to_its_last(client: Client) -> None:
    run = await client.start("assistant", "hello you")
    events = await all_events(client, run)
    assert events[0]["type"] == "user.message"
    assert events[-1]["type"] == "session.end"
    assert seqs(events) == list(range(1, len(events) + 1))
    assert text(events) == "hello you"


async def test_a_second_run_of_a_thread_is_streamed_alone(client: Client) -> None:
    first = await client.start("assistant", "one")
    known = await all_events(client, first)
    second = await client.start("assistant", "two", thread_id=first["threadId"])
    events = await all_events(client, second)
    assert second["threadId"] == first["threadId"]
    assert events[0]["seq"] == len(known) + 1
    assert text(events) == "two"


async def test_a_thread_is_followed_over_its_runs_from_a_known_event(client: Client) -> None:
    first = await client.start("assistant", "one")
    await all_events(client, first)
    await client.start("assistant", "two", thread_id=first["threadId"])
    said = []
    async with asyncio.timeout(PATIENCE_S), aclosing(client.events(first["threadId"], 2)) as events:
        async for event in events:
            said.append(event)
            if [e["type"] for e in said].count("session.end") == 2:
                break
    assert said[0]["seq"] == 3
    assert text(said) == "onetwo"


async def test_what_a_gateway_knows_can_be_asked(client: Client) -> None:
    run = await client.start("assistant", "hello")
    await all_events(client, run)
    assert (await client.run(run["runId"]))["status"] == "succeeded"
    assert [m["content"] for m in await client.messages(run["threadId"])] == ["hello", "hello"]
    assert [p["id"] for p in await client.profiles()] == ["assistant"]
    assert DEMO in [model["id"] for model in await client.models()]
    assert (await client.health())["status"] == "healthy"


async def test_an_attachment_goes_with_the_prompt(client: Client) -> None:
    file = {"filename": "a.txt", "mimeType": "text/plain", "data": "aGk="}
    run = await client.start("assistant", "read it", attachments=[file])
    events = await all_events(client, run)
    assert events[0]["attachments"] == [
        {"filename": "a.txt", "mimeType": "text/plain", "sizeBytes": 2}
    ]


async def test_a_question_is_answered(client: Client, provider: Provider, up: Gateway) -> None:
    provider.reply(WRITE, Reply(text=["done"]))
    run = await client.start("assistant", "write")
    async for event in client.events(run["threadId"], run_id=run["runId"]):
        if event["type"] == "permission.request":
            answered = await client.resume(run["threadId"], "approve", event["requestId"])
            assert answered["approved"] is True
    assert (up.workspace / "a.txt").read_text(encoding="utf-8") == "hi"


async def test_a_question_in_words_is_answered(client: Client) -> None:
    run = await client.start("assistant", "ask me: Which?", model=DEMO)
    events = []
    async for event in client.events(run["threadId"], run_id=run["runId"]):
        events.append(event)
        if event["type"] == "question.request":
            await client.resume(run["threadId"], "answer", event["requestId"], "that one")
    assert text(events).endswith("ask_user answered: that one")


async def test_a_run_is_cancelled(client: Client, provider: Provider) -> None:
    provider.reply(Reply(text=["never"], hang=True))
    run = await client.start("assistant", "hang")
    await provider.requested()
    assert (await client.cancel(run["runId"]))["cancellation"] == "requested"
    assert (await all_events(client, run))[-1]["status"] == "cancelled"


@pytest.mark.parametrize("seed", range(3))
async def test_cut_anywhere_no_event_is_lost_and_none_comes_twice(
    client: Client, up: Gateway, seed: int
) -> None:
    chance = random.Random(seed)
    budgets: dict[int, int] = {}

    def cut(brought: bytes) -> int | None:
        # The headers and the first frame are about 700 bytes; some connections bring no more.
        budget = budgets.setdefault(proxy.cuts, chance.randint(600, 2_000))
        return budget if len(brought) >= budget else None

    run = await client.start("assistant", "slowly count to 80", model=DEMO)
    async with Proxy(up.url, cut) as proxy, Client(proxy.url) as far:
        events = await all_events(far, run)
    assert proxy.cuts > 5
    assert events == await all_events(client, run)
    assert seqs(events) == list(range(1, len(events) + 1))


async def test_a_stream_that_is_cut_right_after_the_end_ends(client: Client, up: Gateway) -> None:
    def cut(brought: bytes) -> int | None:
        end = brought.find(b"\n\n", brought.find(b"event: session.end"))
        return end + 2 if b"event: session.end" in brought and end > 0 else None

    run = await client.start("assistant", "hello")
    async with Proxy(up.url, cut) as proxy, Client(proxy.url) as far:
        events = await all_events(far, run)
    assert proxy.cuts == 1
    assert [event["type"] for event in events].count("session.end") == 1


async def test_a_restart_of_the_gateway_is_waited_out(
    client: Client, up: Gateway, start_gateway: Gateways, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(text=["done"]))
    run = await client.start("assistant", "write")
    events = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in client.events(run["threadId"], run_id=run["runId"]):
            events.append(event)
            if event["type"] == "permission.request":
                await start_gateway.restart(up)
                await client.resume(run["threadId"], "approve", event["requestId"])
    assert text(events) == "done"
    assert seqs(events) == list(range(1, len(events) + 1))
    assert events[-1]["status"] == "succeeded"


async def test_a_restart_in_the_middle_of_an_answer_is_waited_out(
    client: Client,
    up: Gateway,
    start_gateway: Gateways,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ownware_gateway.stream.SHUTDOWN_RETRY_MS", 50)
    provider.reply(Reply(text=["half ", "never"], hang=True, hang_after=1), Reply(text=["whole"]))
    run = await client.start("assistant", "go")
    events = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in client.events(run["threadId"], run_id=run["runId"]):
            events.append(event)
            if event.get("text") == "half ":
                await start_gateway.restart(up)
    assert "recovery" in [event["type"] for event in events]
    assert events[-1]["status"] == "succeeded"
    assert seqs(events) == list(range(1, len(events) + 1))
    assert (await client.messages(run["threadId"]))[-1]["content"] == "whole"


async def test_refused_connections_are_tried_again(
    client: Client, up: Gateway, start_gateway: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await client.start("assistant", "hello")
    await all_events(client, run)
    await start_gateway.stop(up)
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            await start_gateway(port=urlsplit(up.url).port)

    monkeypatch.setattr("ownware_gateway.client.asyncio.sleep", sleep)
    events = [e async for e in client.events(run["threadId"], run_id=run["runId"])]
    assert text(events) == "hello"
    assert pauses == [0.001, 0.002, 0.004]


async def test_a_reader_gives_up_after_so_many_vain_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FAILURES_MAX", 3)
    async with Client(unused_address()) as client:
        with pytest.raises(ClientError, match="3 times in a row"):
            await anext(client.events("thread_1"))


async def test_what_cannot_be_gone_on_with_is_said(
    client: Client, up: Gateway, start_gateway: Gateways, tmp_path: Path
) -> None:
    run = await client.start("assistant", "one")
    before = await all_events(client, run)
    await start_gateway.stop(up)
    shutil.copytree(tmp_path / "data", tmp_path / "older")
    port = urlsplit(up.url).port
    up = await start_gateway(port=port)
    await client.start("assistant", "two", thread_id=run["threadId"])
    after_reset: list[dict[str, Any]] = []
    ends = 0
    async with asyncio.timeout(PATIENCE_S), aclosing(client.events(run["threadId"])) as events:
        async for event in events:
            ends += event["type"] == "session.end"
            if event["type"] == "stream.reset" or after_reset:
                after_reset.append(event)
            if ends == 2 and not after_reset:
                ends = 3
                await start_gateway.stop(up)
                await start_gateway(port=port, data_dir=str(tmp_path / "older"))
            if len(after_reset) > len(before):
                break
    assert after_reset[0]["reason"] == "cursor_ahead"
    assert after_reset[1:] == before


async def test_a_connection_that_has_died_silently_is_opened_again(
    client: Client, up: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    run = await client.start("assistant", "hello")
    async with Proxy(up.url, lambda _: None, deaf=1) as proxy, Client(proxy.url) as far:
        assert text(await all_events(far, run)) == "hello"
        assert not proxy.deaf


@pytest.fixture
async def stranger() -> AsyncIterator[tuple[str, list[web.Response]]]:
    """A server that answers with the given responses, one after the other; no gateway."""
    answers: list[web.Response] = []

    async def answer(_: web.Request) -> web.Response:
        return answers.pop(0)

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    async with Loopback(app) as server:
        yield server.url, answers


def stream(*numbers: int, done: bool = False, epoch: str = "e") -> web.Response:
    """Return a stream of events with these numbers that ends well or is cut off."""
    body = "".join(
        f'id: {epoch}.{n}\nevent: text.delta\ndata: {{"type":"text.delta","seq":{n}}}\n\n'
        for n in numbers
    )
    body += 'event: done\ndata: {"type":"done"}\n\n' if done else 'id: e.9\ndata: {"type":"te'
    return web.Response(text=body, content_type="text/event-stream")


async def test_what_is_replayed_without_need_does_not_come_twice(
    stranger: tuple[str, list[web.Response]],
) -> None:
    url, answers = stranger
    answers += [stream(1, 2), stream(1, 2, 3), stream(3), stream(2, 3, 4, done=True)]
    async with Client(url) as client:
        assert seqs([event async for event in client.events("thread_1")]) == [1, 2, 3, 4]


async def test_numbers_of_another_log_are_not_compared(
    stranger: tuple[str, list[web.Response]],
) -> None:
    url, answers = stranger
    answers += [stream(1, 2), stream(1, epoch="f", done=True)]
    async with Client(url) as client:
        assert seqs([event async for event in client.events("thread_1")]) == [1, 2, 1]


async def test_a_stream_of_something_else_is_a_client_error(
    stranger: tuple[str, list[web.Response]],
) -> None:
    url, answers = stranger
    body = "id: e.1\ndata: no JSON\n\n"
    answers.append(web.Response(text=body, content_type="text/event-stream"))
    async with Client(url) as client:
        with pytest.raises(ClientError, match="no gateway's"):
            await anext(client.events("thread_1"))


async def test_an_answer_that_means_later_is_tried_again(
    stranger: tuple[str, list[web.Response]],
) -> None:
    url, answers = stranger
    later = [web.Response(status=status) for status in (503, 429, 502)]
    answers += [*later, stream(done=True)]
    async with Client(url) as client:
        assert [event async for event in client.events("thread_1")] == []
    assert answers == []


async def test_an_error_of_the_gateway_keeps_code_sentence_and_details(
    client: Client, provider: Provider
) -> None:
    provider.reply(Reply(text=["never"], hang=True))
    run = await client.start("assistant", "hang")
    with pytest.raises(GatewayError) as caught:
        await client.start("assistant", "again", thread_id=run["threadId"])
    assert caught.value.code == "run_in_progress"
    assert caught.value.details["runId"] == run["runId"]
    assert caught.value.message
    await client.cancel(run["runId"])


async def test_a_stream_that_does_not_exist_is_no_reason_to_wait(client: Client) -> None:
    with pytest.raises(GatewayError) as caught:
        await anext(client.events("thread_nobody"))
    assert caught.value.code == "not_found"


async def test_the_token_is_shown(start_gateway: Gateways) -> None:
    up = await start_gateway(require_auth=True)
    async with Client(up.url, up.token) as client:
        assert await client.models()
    async with Client(up.url) as stranger:
        with pytest.raises(GatewayError) as caught:
            await stranger.models()
    assert caught.value.code == "unauthorized"


async def test_no_gateway_and_no_known_answer_are_client_errors(
    stranger: tuple[str, list[web.Response]],
) -> None:
    url, answers = stranger
    answers += [
        web.Response(status=500, text="<html>"),
        web.json_response({"error": "from_the_future", "message": "What is this?"}, status=400),
        web.Response(text="[not JSON"),
    ]
    async with Client(url) as client:
        with pytest.raises(ClientError, match="answers 500"):
            await client.models()
        with pytest.raises(ClientError, match="What is this"):
            await client.models()
        with pytest.raises(ClientError):
            await client.models()
    async with Client(unused_address()) as client:
        with pytest.raises(ClientError, match="does not answer"):
            await client.health()
