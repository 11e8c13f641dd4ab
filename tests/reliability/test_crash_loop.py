"""A run that kills the process ends before the gateway does, and takes nobody with it."""

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.engine import DEATHS_MAX
from ownware_gateway.settings import variable
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    open_stream,
    read_frames,
    run_events,
    start_run,
    write_profile,
)
from tests.provider import Call, Provider, Reply
from tests.reliability.process import (
    PATIENCE_S,
    Follower,
    Http,
    Served,
    ask,
    check_truth,
    rows,
    served,
    start,
)

#: The gateway is the shell's parent.
POISON: Final = Reply(calls=[Call("shell_execute", {"command": "kill -9 $PPID"})])


def environment(provider: Provider) -> dict[str, str]:
    """Settings of a gateway that knows the scripted provider."""
    return {
        variable("openai_base_url"): provider.base_url,
        variable("openai_api_key"): FAKE_KEY,
    }


@contextlib.asynccontextmanager
async def serving(folder: Path, provider: Provider) -> AsyncIterator[Served]:
    """Keep a gateway up whose profile `scripted` asks the scripted provider."""
    async with served(folder, environment=environment(provider)) as gateway:
        write_profile(
            gateway.profiles,
            "scripted",
            model="openai:test-model",
            security={"permissionMode": "auto"},
        )
        yield gateway


async def ends(*followers: Follower) -> list[dict[str, Any]]:
    """Wait until runs have ended; return how."""
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(follower.follow() for follower in followers))
    return [follower.events[-1] for follower in followers]


async def until_event(http: Http, gateway: Served, run: dict[str, Any], event_type: str) -> None:
    """Wait until a run's stream has an event of a type."""
    path = f"/runs/{run['runId']}/events"
    async with open_stream(http, gateway.url, path) as response:
        await read_frames(response, event_type)


async def status_of(http: Http, gateway: Served, run: dict[str, Any]) -> str:
    _, found = await ask(http, gateway, "GET", f"/runs/{run['runId']}")
    return str(found["status"])


@pytest.mark.timeout(90)
async def test_a_run_that_kills_the_process_three_times_ends_and_its_neighbours_end_well(
    http: Http, provider: Provider, tmp_path: Path
) -> None:
    provider.default = POISON
    async with serving(tmp_path, provider) as gateway:
        neighbours = [await start(http, gateway, "slowly count to 50") for _ in range(3)]
        waiting = await start(http, gateway, "run: echo x >> waited")
        await until_event(http, gateway, waiting, "permission.request")
        poison = await start(http, gateway, "go", "scripted")
        bad, *good = await ends(*(Follower(http, gateway, run) for run in (poison, *neighbours)))
        assert (bad["status"], bad["code"]) == ("failed", "crash_loop")
        assert [end["status"] for end in good] == ["succeeded"] * 3
        assert gateway.deaths == [-9] * 3
        assert await status_of(http, gateway, waiting) == "waiting"
        waited = Follower(http, gateway, waiting)
        (end,) = await ends(waited)
        assert end["status"] == "succeeded"
        check_truth(gateway.data, waited)
        deaths = dict(rows(gateway.data, "SELECT id, deaths FROM runs"))
        assert deaths[poison["runId"]] == 3
        assert all(deaths[run["runId"]] <= 2 for run in neighbours)
        assert deaths[waiting["runId"]] == 0


@pytest.mark.timeout(90)
async def test_an_agent_that_kills_the_process_three_times_ends_and_is_told_of_as_failed(
    http: Http, provider: Provider, tmp_path: Path
) -> None:
    provider.default = POISON
    async with serving(tmp_path, provider) as gateway:
        subagents = {"poison": {"profile": "scripted"}}
        write_profile(gateway.profiles, "calls", model="demo:assistant", subagents=subagents)
        run = await start(http, gateway, "ask poison to go", "calls")
        follower = Follower(http, gateway, run)
        (end,) = await ends(follower)
        assert end["status"] == "succeeded"
        assert gateway.deaths == [-9] * 3
        (complete,) = [event for event in follower.events if event["type"] == "agent.complete"]
        assert (complete["status"], complete["error"]) == ("error", "crash_loop")
        check_truth(gateway.data, follower)
        deaths = dict(rows(gateway.data, "SELECT agent_id = 'root', deaths FROM runs"))
        assert deaths[0] == 3
        assert deaths[1] <= 1, "who waits for it is not charged"


async def test_a_gateway_that_is_told_to_stop_charges_nobody(
    start_gateway: Gateways, http: Http, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)
    up = await start_gateway()
    times = DEATHS_MAX + 2
    provider.reply(*(Reply(text=["Half"], hang=True, hang_after=1) for _ in range(times)))
    run = await start_run(http, up.url, "go")
    for number in range(times):
        await provider.requested(number + 1)
        up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert said[-1]["status"] == "succeeded"
    assert rows(up.data_dir, "SELECT deaths FROM runs") == [(0,)]


@pytest.mark.timeout(60)
async def test_sigterm_ends_in_good_order_and_the_run_goes_on(http: Http, tmp_path: Path) -> None:
    async with served(tmp_path) as gateway:
        run = await start(http, gateway, "run: echo x >> a; then run: echo x >> b")
        follower = Follower(http, gateway, run)
        following = asyncio.ensure_future(follower.follow())
        await until_event(http, gateway, run, "permission.request")
        gateway.kill(signal.SIGTERM)
        await gateway.died(1)
        async with asyncio.timeout(PATIENCE_S):
            await following
        assert gateway.deaths == [0]
        assert follower.events[-1]["status"] == "succeeded"
        check_truth(gateway.data, follower)
        assert rows(gateway.data, "SELECT deaths FROM runs") == [(0,)]


@pytest.mark.timeout(60)
async def test_what_is_gone_after_a_kill_ends_the_run_with_its_reason(
    http: Http, provider: Provider, tmp_path: Path
) -> None:
    async with serving(tmp_path, provider) as gateway:
        write_profile(gateway.profiles, "leaves", model="demo:assistant")
        provider.default = Reply(hang=True)
        no_model = await start(http, gateway, "go", "scripted")
        no_profile = await start(http, gateway, "slowly count to 5000", "leaves")
        waits = await start(http, gateway, "run: echo x >> waited")
        await until_event(http, gateway, waits, "permission.request")
        await until_event(http, gateway, no_profile, "text.delta")
        shutil.rmtree(gateway.profiles / "leaves")
        del gateway.environment[variable("openai_api_key")]
        gateway.kill()
        await gateway.died(1)
        followers = [Follower(http, gateway, run) for run in (no_model, no_profile, waits)]
        model_end, profile_end, end = await ends(*followers)
        assert (model_end["status"], model_end["code"]) == ("failed", "unknown_model")
        assert (profile_end["status"], profile_end["code"]) == ("failed", "profile_gone")
        assert end["status"] == "succeeded"
        for follower in followers:
            check_truth(gateway.data, follower)


@pytest.mark.timeout(60)
async def test_a_cancellation_that_was_committed_before_a_kill_holds_after_it(
    http: Http, provider: Provider, tmp_path: Path
) -> None:
    async with serving(tmp_path, provider) as gateway:
        provider.default = Reply(text=["Half"], hang=True, hang_after=1)
        hanging = await start(http, gateway, "go", "scripted")
        await until_event(http, gateway, hanging, "text.delta")
        waiting = await start(http, gateway, "run: echo x >> waited")
        await until_event(http, gateway, waiting, "permission.request")
        for run in (hanging, waiting):
            deaths = len(gateway.deaths)
            gateway.arm("commit.after:run.cancel")
            status, answer = await ask(http, gateway, "POST", f"/runs/{run['runId']}/cancel")
            assert status in (200, 202), answer
            await gateway.died(deaths + 1)
        followers = [Follower(http, gateway, run, None) for run in (hanging, waiting)]
        for end in await ends(*followers):
            assert (end["status"], end["code"]) == ("cancelled", "cancelled")
        for follower in followers:
            check_truth(gateway.data, follower)
        assert not (gateway.work / "waited").exists()
        # The thread's next run finds everything closed.
        provider.default = None
        (end,) = await ends(
            Follower(
                http,
                gateway,
                await start(http, gateway, "go", "scripted", threadId=hanging["threadId"]),
            )
        )
        assert end["status"] == "succeeded"
