"""Many people answer one question at the same moment: one decides, and it is done at most once."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from tests.gateway import (
    Gateways,
    events,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
)
from tests.provider import Call, Provider, Reply
from tests.reliability.process import (
    Follower,
    Http,
    ask,
    check_effects,
    check_truth,
    served,
    start,
)

CLIENTS: Final = 16

#: Where the process dies while they answer.
POINTS: Final = (
    "decide.before",
    "commit.before:permission.response",
    "commit.within:permission.response",
    "commit.after:permission.response",
    "publish.after:permission.response",
    "decide.after",
    "commit.after:tool.call.execute",
    "tool:shell_execute.after",
)


def sockets() -> Http:
    """A client whose every request has a connection of its own."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


def answers() -> list[str]:
    """What the clients answer: both, in any order, and some for the rest of the thread."""
    found = ["approve", "deny"] * (CLIENTS // 2 - 1) + ["always", "deny"]
    random.shuffle(found)
    return found


def check_answers(
    sent: list[str], got: list[tuple[int, dict[str, Any]]], said: list[dict[str, Any]]
) -> bool:
    """Fail unless one answer won and everyone else was told which; return what was decided."""
    (response,) = [event for event in said if event["type"] == "permission.response"]
    assert response["decidedBy"] == "user"
    winners = [action for action, (status, _) in zip(sent, got, strict=True) if status == 200]
    assert len(winners) <= 1
    for action in winners:
        assert response["granted"] is (action != "deny")
    for status, answer in got:
        if status != 200:
            assert (status, answer["error"]) == (409, "permission_already_decided")
            assert (answer["granted"], answer["decidedBy"]) == (response["granted"], "user")
    return bool(response["granted"])


async def race(start_gateway: Gateways, provider: Provider, rounds: int) -> None:
    up = await start_gateway()
    provider.default = Reply(text=["Done."])
    async with sockets() as http:
        for number in range(rounds):
            call = Call("shell_execute", {"command": f"echo x >> c{number}"})
            provider.reply(Reply(calls=[call]))
            run = await start_run(http, up.url, "go")
            async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
                await read_frames(response, "permission.request")
            (asked,) = await up.log.pending(run_id=run["runId"])
            by_thread = f"/threads/{run['threadId']}/resume"
            by_run = f"/runs/{run['runId']}/permissions/{asked.request_id}/decision"
            sent = answers()
            got = await asyncio.gather(
                *(
                    post_json(
                        http, up.url, by_thread, {"action": action, "requestId": asked.request_id}
                    )
                    if action == "always" or client % 2
                    else post_json(
                        http,
                        up.url,
                        by_run,
                        {"decision": action, "operationHash": asked.operation_hash},
                    )
                    for client, action in enumerate(sent)
                )
            )
            said = await run_events(http, up.url, run["runId"])
            granted = check_answers(sent, got, said)
            assert [status for status, _ in got].count(200) == 1
            assert len([event for event in said if event["type"] == "tool.call.execute"]) == granted
            file = up.workspace / f"c{number}"
            assert (file.read_text() if file.exists() else "") == "x\n" * granted


async def race_with_kills(folder: Path, points: tuple[str, ...]) -> None:
    async with served(folder) as gateway, sockets() as http:
        for number, point in enumerate(points):
            run = await start(http, gateway, f"run: echo x >> c{number}")
            async with open_stream(http, gateway.url, f"/runs/{run['runId']}/events") as response:
                await read_frames(response, "permission.request")
            _, shown = await ask(http, gateway, "GET", f"/runs/{run['runId']}")
            (asked,) = shown["pendingPermissions"]
            gateway.arm(point)
            # Nobody denies here, so that what is to be killed is reached.
            sent = ["approve"] * CLIENTS
            body = {"action": "approve", "requestId": asked["requestId"]}
            path = f"/threads/{run['threadId']}/resume"
            follower = Follower(http, gateway, run, None)
            async with asyncio.timeout(20):
                got = await asyncio.gather(
                    *(ask(http, gateway, "POST", path, body) for _ in range(CLIENTS))
                )
                await follower.follow()
                await gateway.died(number + 1)
            assert check_answers(sent, got, follower.events)
            check_truth(gateway.data, follower)
            check_effects(gateway.work, follower.events)
            assert follower.events[-1]["status"] == "succeeded"


async def test_of_many_answers_one_decides_and_the_others_are_told_which(
    start_gateway: Gateways, provider: Provider
) -> None:
    await race(start_gateway, provider, rounds=10)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_of_many_answers_one_decides_in_many_rounds(
    start_gateway: Gateways, provider: Provider
) -> None:
    await race(start_gateway, provider, rounds=200)


@pytest.mark.timeout(60)
async def test_an_answer_counts_once_though_the_process_dies_while_it_is_given(
    tmp_path: Path,
) -> None:
    await race_with_kills(
        tmp_path, ("commit.within:permission.response", "commit.after:permission.response")
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_an_answer_counts_once_wherever_the_process_dies(tmp_path: Path) -> None:
    await race_with_kills(tmp_path, POINTS * 10)


async def test_an_answer_and_the_expiry_never_both_win(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    make_profile("assistant", security={"permissionMode": "ask", "hitlTimeoutMs": 60})
    up = await start_gateway()
    provider.default = Reply(text=["Done."])
    for number in range(8):
        provider.reply(Reply(calls=[Call("shell_execute", {"command": f"echo x >> e{number}"})]))
        run = await start_run(http, up.url, "go")
        async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
            asked = events(await read_frames(response, "permission.request"))[-1]
        body = {"action": "approve", "requestId": asked["requestId"]}
        # The race itself: around the moment of the expiry.
        await asyncio.sleep(0.05 + random.random() * 0.015)
        status, answer = await post_json(http, up.url, f"/threads/{run['threadId']}/resume", body)
        said = await run_events(http, up.url, run["runId"])
        (decided,) = [event for event in said if event["type"] == "permission.response"]
        assert decided["decidedBy"] == ("user" if status == 200 else "timeout")
        assert decided["granted"] is (status == 200)
        if status != 200:
            assert (status, answer["decidedBy"]) == (409, "timeout")
        assert (up.workspace / f"e{number}").exists() is decided["granted"]
