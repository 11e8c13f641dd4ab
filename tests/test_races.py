"""What happens when two things are asked of a run, or of a thread, at the same moment."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import Gateways, post_json, run_events, start_run
from tests.provider import Call, Provider, Reply
from tests.test_engine import AUTO, first_of, of_type, only, question, resume, shell, write

MakeProfile = Callable[..., Path]
KEY = "-----BEGIN {0} PRIVATE KEY-----\nQUJDREVG\nR0hJSktM\n-----END {0} PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "stricter", [{"security": {"permissionMode": "deny"}}, {"tools": {"deny": ["write_file"]}}]
)
async def test_a_yes_does_not_outweigh_a_profile_that_became_stricter_meanwhile(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    make_profile: MakeProfile,
    stricter: dict[str, Any],
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt", "A")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    make_profile("assistant", **stricter)
    await resume(http, up, run, "approve", requestId=asked["requestId"])
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "tool.call.end")["isError"]
    assert said[-1]["status"] == "succeeded"
    assert not (up.workspace / "a.txt").exists()


async def test_a_profile_that_is_half_saved_keeps_nobody_from_going_on(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    profiles: Path,
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt", "A")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    (profiles / "assistant" / "agent.json").write_text("{")
    await resume(http, up, run, "approve", requestId=asked["requestId"])
    said = await run_events(http, up.url, run["runId"])
    assert said[-1]["status"] == "succeeded"
    assert (up.workspace / "a.txt").read_text() == "A"


async def test_many_cancellations_of_one_run_are_one(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    make_profile: MakeProfile,
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(calls=[shell("sleep 30", "c1")]))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "tool.call.execute")
    path = f"/runs/{run['runId']}/cancel"
    answers = await asyncio.gather(*(post_json(http, up.url, path) for _ in range(8)))
    assert {status for status, _ in answers} <= {200, 202}
    assert [answer["cancellation"] for _, answer in answers].count("requested") == 1
    said = await run_events(http, up.url, run["runId"])
    assert len(of_type(said, "run.cancel")) == len(of_type(said, "session.end")) == 1


@pytest.mark.parametrize("hang", [False, True])
async def test_of_many_deletions_of_one_thread_one_deletes(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider, hang: bool
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["x"], hang=hang))
    run = await start_run(http, up.url, "hi")
    await first_of(http, up, run, "turn.start")

    async def delete() -> int:
        async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as response:
            return response.status

    statuses = await asyncio.gather(*(delete() for _ in range(4)))
    assert sorted(statuses) == [200, 410, 410, 410]


async def test_no_more_runs_are_under_way_than_are_allowed(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.05)
    up = await start_gateway(runs_active_max=2)
    provider.default = Reply(text=["x"], hang=True)
    body = {"profileId": "assistant", "prompt": "x"}
    answers = await asyncio.gather(*(post_json(http, up.url, "/run", body) for _ in range(12)))
    assert sorted(status for status, _ in answers) == [200] * 2 + [503] * 10


async def test_arguments_nested_beyond_reading_are_the_models_to_hear_of(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    make_profile: MakeProfile,
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    deep = '{"path":"a","content":' + "[" * 2_000 + "]" * 2_000 + "}"
    provider.reply(Reply(calls=[Call("write_file", deep, "c1")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "tool.call.end")["isError"]
    assert said[-1]["status"] == "succeeded"


async def test_no_line_of_a_private_key_is_shown(
    start_gateway: Gateways,
    http: aiohttp.ClientSession,
    provider: Provider,
    make_profile: MakeProfile,
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    (up.workspace / "k").write_text("before\n" + KEY.format("OPENSSH") + "after\n")
    provider.reply(Reply(calls=[shell("cat k", "c1")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    shown = json.dumps(await run_events(http, up.url, run["runId"]))
    assert "before" in shown
    assert "after" in shown
    assert "QUJD" not in shown
    assert "R0hJ" not in shown


async def test_a_misspelt_tool_in_a_profile_is_named(
    start_gateway: Gateways, http: aiohttp.ClientSession, make_profile: MakeProfile
) -> None:
    make_profile("open", tools={"deny": ["shel_execute"]}, security=AUTO)
    up = await start_gateway()
    status, answer = await post_json(http, up.url, "/run", {"profileId": "open", "prompt": "x"})
    assert status == 404
    assert "'tools.deny' names no tool with 'shel_execute'" in answer["message"]
    assert "did you mean 'shell_execute'?" in answer["message"]


async def test_a_body_that_is_not_what_its_headers_say_is_a_bad_request(
    start_gateway: Gateways, http: aiohttp.ClientSession
) -> None:
    up = await start_gateway()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    url = f"{up.url}/api/v1/run"
    async with http.post(url, data=b"abcd", headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"] == "invalid_request"
