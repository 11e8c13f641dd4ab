"""The gateway dies in the middle of a call: it is made at most once, and no server stays behind."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import FAKE_KEY, write_profile
from tests.mcp import gone, local, pids, written
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Follower, served, start

Http = aiohttp.ClientSession


@pytest.mark.parametrize(
    ("server", "begun", "told"),
    [
        pytest.param(
            local("--idempotent"), 1, "Interrupted: the gateway stopped", id="once, as a rule"
        ),
        pytest.param(
            local("--idempotent", trusted=True),
            2,
            "slept",
            id="again, if a trusted server says that it may be",
        ),
    ],
)
async def test_a_call_that_a_kill_cut_off_is_not_made_again_unless_it_is_safe(
    server: dict[str, Any],
    begun: int,
    told: str,
    tmp_path: Path,
    provider: Provider,
    http: Http,
) -> None:
    file, processes = tmp_path / "slow", tmp_path / "pids"
    server["args"] += ["--deaf", "--child", "--pids", str(processes)]
    provider.reply(Reply(calls=[Call("t__slow", {"path": str(file)})]), Reply(text=["done"]))
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    async with served(tmp_path, environment=environment) as gateway:
        write_profile(
            gateway.profiles,
            "mine",
            tools={"preset": "none", "mcp": {"t": server}},
            security={"permissionMode": "auto"},
        )
        follower = Follower(http, gateway, await start(http, gateway, "go", profile="mine"))
        await written(file, "begun")
        assert len(pids(processes)) == 2
        before = tmp_path / "before"
        before.write_text(processes.read_text())
        gateway.kill()
        await gateway.died(1)
        # Deaf as they are.
        await gone(before)
        await follower.follow()
        (end,) = (event for event in follower.events if event["type"] == "tool.call.end")
        assert told in end["result"]
        assert file.read_text() == "begun\n" * begun
        assert follower.events[-1]["status"] == "succeeded"
    # The second gateway was killed as well, when this was over.
    await gone(processes)
