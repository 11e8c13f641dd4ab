"""Many people answer one question in words, and the process dies meanwhile: one answer counts."""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import pytest

from tests.gateway import Gateways, open_stream, post_json, read_frames, run_events, start_run
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Follower, Http, ask, check_truth, served, start
from tests.reliability.test_approval_races import CLIENTS, sockets

#: Where the process dies: as it asks, and while it is answered.
POINTS: Final = (
    "commit.within:question.request",
    "commit.after:question.request",
    "commit.within:question.response",
    "commit.after:question.response",
)


def check_answers(got: list[tuple[int, Any]], said: list[dict[str, Any]]) -> None:
    """Fail unless one answer is the result, once, and everyone else was told that one had won."""
    (response,) = [event for event in said if event["type"] == "question.response"]
    (end,) = [event for event in said if event["type"] == "tool.call.end"]
    assert (response["decidedBy"], end["isError"]) == ("user", False)
    assert end["result"] == response["answer"]
    assert response["answer"] in {f"answer {client}" for client in range(CLIENTS)}
    for client, (status, answer) in enumerate(got):
        if status == 200:
            assert response["answer"] == f"answer {client}"
        else:
            assert (status, answer["error"]) == (409, "permission_already_decided")
            assert (answer["granted"], answer["decidedBy"]) == (True, "user")


def answers(request_id: str) -> list[dict[str, Any]]:
    return [
        {"action": "answer", "requestId": request_id, "answer": f"answer {client}"}
        for client in range(CLIENTS)
    ]


async def test_of_many_answers_one_is_the_result(
    start_gateway: Gateways, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(text=["Done."])
    async with sockets() as http:
        for _ in range(5):
            provider.reply(Reply(calls=[Call("ask_user", {"question": "Which?"})]))
            run = await start_run(http, up.url, "go")
            async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
                asked = json.loads((await read_frames(response, "question.request"))[-1].data)
            path = f"/threads/{run['threadId']}/resume"
            got = await asyncio.gather(
                *(post_json(http, up.url, path, body) for body in answers(asked["requestId"]))
            )
            check_answers(got, await run_events(http, up.url, run["runId"]))
            assert [status for status, _ in got].count(200) == 1


@pytest.mark.timeout(60)
async def test_a_question_outlives_a_kill_wherever_it_comes(http: Http, tmp_path: Path) -> None:
    async with served(tmp_path) as gateway, sockets() as many:
        for number, point in enumerate(POINTS):
            gateway.arm(point)
            run = await start(http, gateway, "ask me: Which? [red, green]")
            waits = Follower(http, gateway, run, None)
            following = asyncio.ensure_future(waits.follow())
            async with asyncio.timeout(25):
                request_id = await question_of(http, gateway, run)
                if number == 0:
                    # And once more while it waits, as rows and nothing else.
                    await gateway.died(1)
                    gateway.kill()
                    await gateway.died(2)
                path = f"/threads/{run['threadId']}/resume"
                got = await asyncio.gather(
                    *(ask(many, gateway, "POST", path, body) for body in answers(request_id))
                )
                await following
                await gateway.died(number + 2)
            check_answers(got, waits.events)
            check_truth(gateway.data, waits)
            assert waits.events[-1]["status"] == "succeeded"


async def question_of(http: Http, gateway: Any, run: dict[str, Any]) -> str:
    """Return the name of what the run asks, once it does."""
    while True:
        _, shown = await ask(http, gateway, "GET", f"/runs/{run['runId']}")
        if shown["pendingPermissions"]:
            (asked,) = shown["pendingPermissions"]
            return str(asked["requestId"])
        await asyncio.sleep(0.01)
