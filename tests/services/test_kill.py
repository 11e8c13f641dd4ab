"""The gateway dies in the middle of a call: the service is called at most once."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import FAKE_KEY, write_profile
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Follower, served, start
from tests.services.shop import Shop

Http = aiohttp.ClientSession


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_call_that_a_kill_cut_off_is_not_made_again(
    trusted: bool, tmp_path: Path, provider: Provider, http: Http, shop: Shop
) -> None:
    shop.gate = asyncio.Event()
    provider.reply(Reply(calls=[Call("s__slow", {})]), Reply(text=["done"]))
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    service: dict[str, Any] = shop.settings(trusted=trusted)
    async with served(tmp_path, environment=environment) as gateway:
        write_profile(
            gateway.profiles,
            "mine",
            tools={"preset": "none", "services": {"s": service}},
            security={"permissionMode": "auto"},
        )
        follower = Follower(http, gateway, await start(http, gateway, "go", profile="mine"))
        async with asyncio.timeout(20):
            while not shop.came:
                await asyncio.sleep(0.01)
        gateway.kill()
        await gateway.died(1)
        shop.gate.set()
        await follower.follow()
        (end,) = (event for event in follower.events if event["type"] == "tool.call.end")
        assert "Interrupted: the gateway stopped" in end["result"]
        assert [came.raw_path for came in shop.came] == ["/slow"]
        assert follower.events[-1]["status"] == "succeeded"
