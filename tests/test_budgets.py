"""What runs may take: by the clock, and together in a day."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.events import Usage
from ownware_gateway.log import DAY_MS
from ownware_gateway.models import AssistantTurn
from ownware_gateway.permissions import Verdict
from ownware_gateway.run import Finish, Limits, next_step
from ownware_gateway.transcript import Answer
from tests.gateway import (
    Gateways,
    get_json,
    post_json,
    run_events,
    start_run,
    text,
    until_status,
)
from tests.provider import Call, Provider, Reply
from tests.test_run import READ, begun, facts_of

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]
Events = list[dict[str, Any]]

AUTO: Final = {"permissionMode": "auto"}

#: Each answer asks for more, so that only a budget ends the run.
ON_AND_ON: Final = Reply(calls=[Call("list_files")])


class Clock:
    """A clock of milliseconds that stands still until it is set."""

    def __init__(self) -> None:
        self.now_ms = 20_000 * DAY_MS + 36_000_000  # ten in the morning of a day

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the gateways that are started."""
    made = Clock()
    monkeypatch.setattr("ownware_gateway.app.steady_clock", lambda: made)
    return made


async def go(http: Http, url: str, **body: Any) -> Events:
    return await run_events(http, url, (await start_run(http, url, "go", **body))["runId"])


async def refused(http: Http, url: str) -> tuple[dict[str, Any], int]:
    """Start a run, which must be refused; return the answer and after how long to come again."""
    body = {"profileId": "assistant", "prompt": "go"}
    async with http.post(f"{url}/api/v1/run", json=body) as response:
        answer = await response.json()
        assert (response.status, answer["error"]) == (429, "budget_exceeded")
        assert answer["category"] == "rate_limit"
        return answer, int(response.headers["Retry-After"])


def ended(said: Events) -> tuple[str, str, str]:
    return said[-1]["status"], said[-1]["reason"], said[-1]["code"]


def error(said: Events) -> str:
    (found,) = (event["message"] for event in said if event["type"] == "error")
    return str(found)


OVER: Final = ("failed", "budget_exceeded", "budget_exceeded")


# -- a day


async def test_a_day_has_so_many_model_calls_for_all_runs_of_a_profile(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, clock: Clock
) -> None:
    make_profile("assistant", security=AUTO, execution={"perDay": {"maxTurns": 5}})
    make_profile("other", security=AUTO)
    up = await start_gateway()
    provider.reply(*[Reply(text=["Yes."])] * 3)
    for _ in range(3):
        assert (await go(http, up.url))[-1]["status"] == "succeeded"
    provider.default = ON_AND_ON
    said = await go(http, up.url)
    assert ended(said) == OVER
    assert len(provider.requests) == 5
    assert "5 of 5 model calls today (execution.perDay.maxTurns)" in error(said)
    assert "2024-10-05 00:00 UTC" in error(said)
    answer, after_s = await refused(http, up.url)
    assert answer["message"] == error(said)
    assert after_s == 14 * 3_600
    assert answer["resetsAt"] == 20_001 * DAY_MS
    # It is this profile's budget, and it is there again with the next day.
    provider.default = Reply(text=["Yes."])
    assert (await go(http, up.url, profileId="other"))[-1]["status"] == "succeeded"
    clock.now_ms = 20_001 * DAY_MS - 1
    assert (await refused(http, up.url))[1] == 1
    clock.now_ms += 1
    assert (await go(http, up.url))[-1]["status"] == "succeeded"


async def test_what_was_spent_outlives_the_process_and_the_thread(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, clock: Clock
) -> None:
    make_profile("assistant", execution={"perDay": {"maxTurns": 1}})
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    await run_events(http, up.url, run["runId"])
    async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as response:
        assert response.status == 200
    up = await start_gateway.restart(up)
    await refused(http, up.url)
    shown = await get_json(http, up.url, "/usage?profileId=assistant")
    assert (shown["turns"], shown["perDay"]["maxTurns"]) == (1, 1)
    assert shown["resetsAt"] == 20_001 * DAY_MS


async def test_a_day_s_money_is_counted_over_runs_and_ends_them(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o",
        security=AUTO,
        execution={"perDay": {"maxCostUsd": 0.6}},
    )
    up = await start_gateway()
    # A quarter of a dollar each.
    provider.reply(Reply(text=["Yes."], usage=(100_000, 10)))
    assert (await go(http, up.url))[-1]["status"] == "succeeded"
    provider.default = Reply(calls=[Call("list_files")], usage=(100_000, 10))
    said = await go(http, up.url)
    assert (ended(said), len(provider.requests)) == (OVER, 3)
    assert "0.75" in error(said)
    assert "perDay.maxCostUsd" in (await refused(http, up.url))[0]["message"]
    shown = await get_json(http, up.url, "/usage?profileId=assistant")
    assert shown["costUsd"] == pytest.approx(0.75, abs=0.01)


async def test_a_day_s_active_time_is_counted(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, execution={"perDay": {"maxTime": 150}})
    up = await start_gateway()
    provider.default = Reply(calls=[Call("shell_execute", {"command": "sleep 0.1"})])
    said = await go(http, up.url)
    assert ended(said) == OVER
    assert len(provider.requests) <= 2
    assert "perDay.maxTime" in error(said)
    shown = await get_json(http, up.url, "/usage?profileId=assistant")
    run = await get_json(http, up.url, "/runs?limit=1")
    assert 150 <= shown["activeMs"] < 30_000
    assert run["items"][0]["code"] == "budget_exceeded"


async def test_runs_at_the_same_time_share_a_day_s_model_calls(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, execution={"perDay": {"maxTurns": 20}})
    up = await start_gateway()
    provider.default = ON_AND_ON
    said = await asyncio.gather(*[go(http, up.url) for _ in range(8)])
    assert {ended(one) for one in said} == {OVER}
    # A call may be counted both as one under way and as one that is done: never too many.
    assert 12 <= len(provider.requests) <= 20
    shown = await get_json(http, up.url, "/usage?profileId=assistant")
    assert shown["turns"] == len(provider.requests)


async def test_a_run_over_midnight_spends_of_both_days(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, clock: Clock
) -> None:
    make_profile("assistant", security={"permissionMode": "ask"})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": ""})]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    assert (await get_json(http, up.url, "/usage?profileId=assistant"))["turns"] == 1
    # Within the half hour that a question waits.
    clock.now_ms = 20_001 * DAY_MS - 1_000
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": ""})]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    clock.now_ms += 2_000
    assert (await get_json(http, up.url, "/usage?profileId=assistant"))["turns"] == 0
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
    await run_events(http, up.url, run["runId"])
    assert (await get_json(http, up.url, "/usage?profileId=assistant"))["turns"] == 1


async def test_usage_is_of_a_profile_that_there_is(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    for path, status in (("/usage", 400), ("/usage?profileId=nobody", 404)):
        async with http.get(f"{up.url}/api/v1{path}") as response:
            assert response.status == status
    shown = await get_json(http, up.url, "/usage?profileId=assistant")
    resets_at = shown.pop("resetsAt")
    assert resets_at % DAY_MS == 0
    assert 0 < resets_at - time.time() * 1000 <= DAY_MS
    assert shown == {
        "profileId": "assistant",
        "costUsd": 0.0,
        "turns": 0,
        "activeMs": 0,
        "perDay": {"maxCostUsd": None, "maxTurns": None, "maxTime": None},
    }


# -- by the clock


async def test_a_run_ends_when_its_time_by_the_clock_is_up_while_the_model_hangs(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", execution={"maxWallTime": 200})
    up = await start_gateway()
    provider.reply(Reply(text=["Hm"], hang=True, hang_after=1))
    said = await go(http, up.url)
    kinds = [event["type"] for event in said[-4:]]
    assert kinds == ["text.delta", "error", "turn.interrupted", "session.end"]
    assert ended(said) == OVER
    assert "0.2 s by the clock" in error(said)
    await provider.left()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_run_that_waits_for_a_person_ends_when_its_time_by_the_clock_is_up(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    restarted: bool,
) -> None:
    make_profile("assistant", execution={"maxWallTime": 400})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": ""})]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    if restarted:
        up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert ended(said) == OVER
    assert "maxWallTime" in error(said)
    assert not (up.workspace / "a").exists()
    assert len(provider.requests) == 1
    assert (await get_json(http, up.url, "/approvals"))["items"] == []


async def test_time_by_the_clock_does_not_make_a_run_time_out_that_is_active_for_too_long(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", execution={"timeout": 200, "maxWallTime": "1h"})
    up = await start_gateway()
    provider.reply(Reply(text=["Hm"], hang=True, hang_after=1))
    assert (await go(http, up.url))[-1]["status"] == "timed_out"


# -- money that cannot be counted


async def test_a_budget_of_money_that_no_price_is_known_for_is_said_once(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant", security=AUTO, execution={"maxCostUsd": 1, "perDay": {"maxCostUsd": 1}}
    )
    up = await start_gateway()
    provider.reply(ON_AND_ON)
    said = await go(http, up.url)
    notices = [event["text"] for event in said if event.get("notice")]
    assert len(notices) == 1
    assert "openai:test-model is not known" in notices[0]
    assert "execution.maxCostUsd and execution.perDay.maxCostUsd" in notices[0]
    assert said[-1]["status"] == "succeeded"
    make_profile("assistant", model="openai:gpt-4o", execution={"maxCostUsd": 1})
    said = await go(http, up.url)
    assert "notice" not in str(said)
    assert text(said) == "go"


def test_a_call_without_a_price_does_not_hide_what_the_others_cost() -> None:
    recorder = begun().answer("", READ).executes(READ).ends(*READ, "x").turn_ends().turn()
    recorder.answer("", READ).executes(READ).ends(*READ, "x")
    free = Answer(AssistantTurn(""), "tool_use", Usage(input_tokens=5, model="m"))
    recorder.run.answers[1] = recorder.run.answers[1].__class__(
        recorder.run.answers[1].turn, "tool_use", free.usage
    )
    facts = facts_of(recorder)
    assert facts.usage.cost_usd is None
    step = next_step(facts, lambda _: Verdict("run", ""), Limits(100, 0.25))
    assert isinstance(step, Finish)
    assert step.code == "budget_exceeded"
    assert step.message is not None
    assert "execution.maxCostUsd" in step.message
