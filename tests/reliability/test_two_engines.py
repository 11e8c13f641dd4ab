"""Two gateways on one log, though the lock forbids it: of a run that the second has taken over, the
first writes nothing more.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.datadir import LOCK_FILE
from ownware_gateway.errors import BootError
from ownware_gateway.events import decode
from ownware_gateway.log import Stream
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
)
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Http, rows
from tests.test_run import check_whole

AUTO: Final = {"permissionMode": "auto"}


async def until_event(http: Http, up: Gateway, run: dict[str, Any], event_type: str) -> None:
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        await read_frames(response, event_type)


@asynccontextmanager
async def taken_over(start_gateway: Gateways, first: Gateway) -> AsyncIterator[Gateway]:
    """Start a second gateway on the log of the first, whose lock is removed by force."""
    with pytest.raises(BootError, match="Another gateway"):
        await start_gateway()
    (first.data_dir / LOCK_FILE).unlink()
    yield await start_gateway()


async def idle(up: Gateway) -> None:
    """Wait until a gateway drives nothing, which no event tells of."""
    async with asyncio.timeout(PATIENCE_S):
        while up.engine._slots:
            await asyncio.sleep(0.002)


def check_once(up: Gateway, said: list[dict[str, Any]]) -> None:
    check_whole([decode(json.dumps(event).encode()) for event in said])
    kept = rows(up.data_dir, "SELECT payload FROM events WHERE stream_key > 1 ORDER BY seq")
    assert [json.loads(payload) for (payload,) in kept] == said


async def test_an_answer_that_comes_to_the_first_is_written_no_more(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    first = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["mine ", "not ", "mine"], gate=gate, gate_after=1))
    run = await start_run(http, first.url, "go")
    await until_event(http, first, run, "text.delta")
    async with taken_over(start_gateway, first) as second:
        said = await run_events(http, second.url, run["runId"])
        gate.set()
        await idle(first)
        check_once(second, said)
        assert said[-1]["status"] == "succeeded"
        texts = [event["text"] for event in said if event["type"] == "text.delta"]
        assert texts[0] == "mine "
        assert "not " not in texts
        # Both see the same end, and the thread is free.
        assert await first.log.active_run(Stream(run["threadId"])) is None


async def test_a_tool_of_the_first_ends_unheard_and_is_not_run_again(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    make_profile("assistant", security=AUTO)
    first = await start_gateway()
    command = "echo x >> effect; until [ -e go ]; do sleep 0.01; done; echo late"
    provider.reply(Reply(calls=[Call("shell_execute", {"command": command})]))
    provider.default = Reply(text=["Done."])
    run = await start_run(http, first.url, "go")
    async with asyncio.timeout(PATIENCE_S):
        while not (first.workspace / "effect").exists():
            await asyncio.sleep(0.002)
    async with taken_over(start_gateway, first) as second:
        said = await run_events(http, second.url, run["runId"])
        (first.workspace / "go").touch()
        await idle(first)
        check_once(second, said)
        (end,) = [event for event in said if event["type"] == "tool.call.end"]
        assert end["result"].startswith("Interrupted")
        assert (first.workspace / "effect").read_text() == "x\n"


async def test_answers_to_both_decide_once_and_the_call_runs_once(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    first = await start_gateway()
    provider.default = Reply(text=["Done."])
    provider.reply(Reply(calls=[Call("shell_execute", {"command": "echo x >> effect"})]))
    run = await start_run(http, first.url, "go")
    await until_event(http, first, run, "permission.request")
    async with taken_over(start_gateway, first) as second:
        (asked,) = await second.log.pending(run_id=run["runId"])
        body = {"action": "approve", "requestId": asked.request_id}
        path = f"/threads/{run['threadId']}/resume"
        got = await asyncio.gather(
            *(post_json(http, up.url, path, body) for up in (first, second) for _ in range(4))
        )
        # Whoever asks the first is told that it has failed, not that it has worked.
        assert sorted(status for status, _ in got) == [200] + [409] * 3 + [500] * 4
        await idle(first)
        await idle(second)
        said = (
            await get_json(
                http, second.url, f"/threads/{run['threadId']}/agents/root/events/history"
            )
        )["events"]
        check_once(second, said)
        assert said[-1]["status"] == "succeeded"
        assert (first.workspace / "effect").read_text() == "x\n"


async def test_what_is_sent_to_the_first_is_refused_and_changes_nothing(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    first = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["Half"], hang=True, hang_after=1))
    provider.default = Reply(text=["Done."], gate=gate)
    run = await start_run(http, first.url, "go")
    await until_event(http, first, run, "text.delta")
    async with taken_over(start_gateway, first) as second:
        await provider.requested(2)
        body = {"profileId": "assistant", "prompt": "another"}
        for path, sent in ((f"/runs/{run['runId']}/cancel", None), ("/run", body)):
            status, _ = await post_json(http, first.url, path, sent)
            assert status >= 500
        async with http.delete(f"{first.url}/api/v1/threads/{run['threadId']}") as response:
            assert response.status >= 500
        async with http.get(f"{first.url}/api/v1/ready") as response:
            assert response.status == 503
            assert "another gateway" in (await response.json())["missing"][0]
        await start_gateway.stop(first)
        assert rows(second.data_dir, "SELECT under_way FROM runs") == [(1,)]
        gate.set()
        said = await run_events(http, second.url, run["runId"])
        assert said[-1]["status"] == "succeeded"
        assert "run.cancel" not in {event["type"] for event in said}
        check_once(second, said)
