"""kill -9 while a run waits for its client's tools: the results find it, and once is enough."""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.events import decode
from ownware_gateway.settings import variable
from tests.doors.openai import CHAT, content, user
from tests.gateway import FAKE_KEY, write_profile
from tests.provider import Call, Provider, Reply
from tests.reliability.process import AGAIN_S, CUT, PATIENCE_S, Served, rows, served
from tests.test_run import check_whole

POINTS: Final = (
    "commit.before:client.call",
    "commit.within:client.call",
    "commit.after:client.call",
    "commit.before:client.result",
    "commit.within:client.result",
    "commit.after:client.result",
)

TOOLS: Final = [{"type": "function", "function": {"name": "weather"}}]


async def stubborn(
    http: aiohttp.ClientSession, gateway: Served, *messages: dict[str, Any]
) -> dict[str, Any]:
    """Ask as an SDK does that sends its request again until there is an answer."""
    body = {"model": "client", "messages": messages, "tools": TOOLS}
    retries = 0
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await gateway.up.wait()
            headers = {
                "X-Conversation-Id": "one",
                "x-stainless-retry-count": str(retries),
            }
            try:
                async with http.post(f"{gateway.url}{CHAT}", json=body, headers=headers) as sent:
                    answer: dict[str, Any] = await sent.json()
                    if sent.status != 503:
                        assert sent.status == 200, answer
                        return answer
            except CUT:
                pass
            retries += 1
            await asyncio.sleep(AGAIN_S)


@pytest.mark.parametrize("point", POINTS)
async def test_a_client_and_its_run_find_each_other_again(
    tmp_path: Path, provider: Provider, http: aiohttp.ClientSession, point: str
) -> None:
    environment = {
        variable("openai_base_url"): provider.base_url,
        variable("openai_api_key"): FAKE_KEY,
    }
    provider.reply(Reply(calls=[Call("weather", '{"city"', id="w1")]))
    provider.default = Reply(text=["Sunny."])
    async with served(tmp_path, environment=environment) as gateway:
        write_profile(gateway.profiles, "client")
        gateway.arm(point)
        first = await stubborn(http, gateway, user("How is Rome?"))
        message = first["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert call["function"]["arguments"] == '{"city"'
        result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
        last = await stubborn(http, gateway, user("How is Rome?"), message, result)
        assert (content(last), last["run_id"]) == ("Sunny.", first["run_id"])
        assert not gateway.armed
        assert gateway.deaths
        assert len(provider.requests) == 2, "nothing that was answered is asked again"
        payloads = [row[0] for row in rows(gateway.data, "SELECT payload FROM events ORDER BY seq")]
    events = [json.loads(payload) for payload in payloads]
    check_whole([decode(json.dumps(event).encode()) for event in events])
    results = [event["result"] for event in events if event["type"] == "tool.call.end"]
    assert results == ["sunny"]
