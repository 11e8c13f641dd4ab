"""The gateway dies in the middle of a call: it is made at most once, and leaves no process."""

from pathlib import Path

import aiohttp
import pytest

from tests.custom import AUTO, gone, pids, write_tools, written
from tests.gateway import FAKE_KEY, write_profile
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Follower, served, start

SLOW = """
    import os, signal, subprocess, sys, time
    from ownware_gateway.tool import tool

    @tool({said})
    def slow() -> str:
        '''Begin, and take long the first time.'''
        again = os.path.exists({file!r})
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open({file!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n{{child.pid}}\\n")
        if not again:
            time.sleep(600)
        return "slept"
"""


@pytest.mark.parametrize(
    ("said", "begun", "told"),
    [
        pytest.param("", 1, "Interrupted: the gateway stopped", id="once, as a rule"),
        pytest.param("safe_to_repeat=True", 2, "slept", id="again, if the tool says it may be"),
    ],
)
async def test_a_call_that_a_kill_cut_off_is_not_made_again_unless_it_is_safe(
    said: str, begun: int, told: str, tmp_path: Path, provider: Provider
) -> None:
    file = tmp_path / "pids"
    provider.reply(Reply(calls=[Call("slow")]), Reply(text=["done"]))
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    async with (
        aiohttp.ClientSession() as http,
        served(tmp_path, "--trust-profile", "mine", environment=environment) as gateway,
    ):
        profile = write_profile(gateway.profiles, "mine", tools={"preset": "none"}, security=AUTO)
        write_tools(profile, slow=SLOW.format(said=said, file=str(file)))
        follower = Follower(http, gateway, await start(http, gateway, "go", profile="mine"))
        await written(file, 2)
        before = tmp_path / "before"
        before.write_text(file.read_text())
        gateway.kill()
        await gateway.died(1)
        await gone(before, 2)
        await follower.follow()
        (end,) = (event for event in follower.events if event["type"] == "tool.call.end")
        assert told in end["result"]
        assert len(pids(file)) == 2 * begun
        assert follower.events[-1]["status"] == "succeeded"
    await gone(file, 2 * begun)


async def test_a_command_that_a_kill_cut_off_does_not_live_on_beside_what_comes_after_it(
    tmp_path: Path, provider: Provider
) -> None:
    file = tmp_path / "pids"
    command = f"trap '' TERM HUP PIPE; (sleep 600) & echo $! >> {file}; echo $$ >> {file}; wait"
    provider.reply(Reply(calls=[Call("shell_execute", {"command": command})]), Reply(text=["done"]))
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    async with (
        aiohttp.ClientSession() as http,
        served(tmp_path, environment=environment) as gateway,
    ):
        write_profile(gateway.profiles, "mine", security=AUTO)
        follower = Follower(http, gateway, await start(http, gateway, "go", profile="mine"))
        await written(file, 2)
        gateway.kill()
        await gateway.died(1)
        await gone(file, 2)
        await follower.follow()
        (end,) = (event for event in follower.events if event["type"] == "tool.call.end")
        assert "Interrupted: the gateway stopped" in end["result"]
        assert len(pids(file)) == 2
