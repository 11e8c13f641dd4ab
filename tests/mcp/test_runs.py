"""Agents that use tools of MCP servers: real gateways, and a server of our own as their child."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import Gateways, get_json, post_json, run_events, start_run, until_status
from tests.mcp import SERVER, alive, gone, local, pids, written
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

AUTO = {"permissionMode": "auto"}


def ends(said: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What the model was told of its calls."""
    return [
        (event["result"], event["isError"]) for event in said if event["type"] == "tool.call.end"
    ]


async def calls(
    http: Http, url: str, provider: Provider, *wanted: Call, **body: Any
) -> list[tuple[str, bool]]:
    """Have the model call tools one after the other in one run; return what it was told."""
    provider.reply(*(Reply(calls=[call]) for call in wanted), Reply(text=["done"]))
    run = await start_run(http, url, "go", **body)
    return ends(await run_events(http, url, run["runId"]))


def offered(request: Any) -> set[str]:
    """The names of the tools that a model was given."""
    return {tool["function"]["name"] for tool in request.body.get("tools", ())}


async def test_an_agent_calls_the_tools_of_its_profiles_server(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        tools={"preset": "none", "mcp": {"t": local()}, "deny": ["t__wipe"]},
        security=AUTO,
    )
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("t__echo", {"text": "hello"}),
        Call("t__picture", {}),
        Call("t__structured", {}),
        Call("t__fail", {}),
        Call("t__ask", {}),
        Call("t__echo", {}),
        Call("t__wipe", {"path": "x"}),
    )
    names = offered(provider.requests[0])
    assert "t__echo" in names
    assert "t__wipe" not in names
    assert all(name.startswith("t__") for name in names)
    assert said[0] == ("hello", False)
    assert said[1] == (
        "look:\n[image/png, 6 bytes, which cannot be shown as text]\n[a.txt](urn:a.txt)\nb!",
        False,
    )
    assert said[2] == ('{"answer": 42}', False)
    assert said[3] == ("it did not work", True)
    assert said[4][0].count("not supported") == 3
    assert "text missing" in said[5][0]
    assert "There is no tool named 't__wipe'" in said[6][0]


async def test_what_a_server_says_of_its_tools_counts_only_when_it_is_trusted(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    servers = {"good": local(trusted=True), "odd": local()}
    make_profile("assistant", tools={"preset": "none", "mcp": servers})
    up = await start_gateway()
    assert await calls(http, up.url, provider, Call("good__echo", {"text": "free"})) == [
        ("free", False)
    ]
    provider.reply(Reply(calls=[Call("odd__echo", {"text": "asked"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    waiting = await until_status(http, up.url, run, "waiting")
    (question,) = waiting["pendingPermissions"]
    assert question["toolName"] == "odd__echo"
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
    assert ends(await run_events(http, up.url, run["runId"])) == [("asked", False)]


@pytest.mark.parametrize(
    ("server", "tool", "asked_again"),
    [
        pytest.param(local(trusted=True), "append", False, id="trusted: by its name"),
        pytest.param(local(trusted=True), "wipe", True, id="destructive: the very same call"),
        pytest.param(local(), "append", True, id="not trusted: the very same call"),
    ],
)
async def test_always_covers_a_tool_or_only_the_very_same_call(
    server: dict[str, Any],
    tool: str,
    asked_again: bool,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": server}})
    up = await start_gateway()

    async def call(line: str, **body: Any) -> dict[str, Any]:
        arguments = {"path": str(tmp_path / "file"), "line": line}
        provider.reply(Reply(calls=[Call(f"t__{tool}", arguments)]), Reply(text=["done"]))
        return await start_run(http, up.url, "go", **body)

    run = await call("one")
    thread = {"threadId": run["threadId"]}
    await until_status(http, up.url, run, "waiting")
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "always"})
    await until_status(http, up.url, run, "succeeded")
    await until_status(http, up.url, await call("one", **thread), "succeeded")
    other = await call("another", **thread)
    await until_status(http, up.url, other, "waiting" if asked_again else "succeeded")


async def test_what_a_person_allowed_holds_for_no_other_server_of_the_same_name(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local()}})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("t__echo", {"text": "one"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local("--chatty")}})
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "always"})
    ((result, is_error),) = ends(await run_events(http, up.url, run["runId"]))
    assert is_error
    assert "not what it was when a person was asked" in result
    provider.reply(Reply(calls=[Call("t__echo", {"text": "one"})]), Reply(text=["done"]))
    again = await start_run(http, up.url, "go", threadId=run["threadId"])
    await until_status(http, up.url, again, "waiting")


@pytest.mark.parametrize(
    ("server", "why"),
    [
        pytest.param(local("--die"), "ended with exit code 7", id="it dies"),
        pytest.param(
            local("--silent", startTimeout="300ms"), "was not up within 0.3 s", id="it is silent"
        ),
        pytest.param({"command": "no-such-program"}, "there is no program", id="it is not there"),
        pytest.param(
            local(env={"KEY": "${env:NO_SUCH_VARIABLE}"}), "NO_SUCH_VARIABLE", id="it lacks a key"
        ),
        pytest.param({"url": "http://127.0.0.1:9/mcp"}, "cannot be reached", id="nobody listens"),
    ],
)
async def test_a_server_that_does_not_come_up_costs_its_tools_and_no_more(
    server: dict[str, Any],
    why: str,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
) -> None:
    servers = {"bad": server, "good": local()}
    make_profile("assistant", tools={"preset": "none", "mcp": servers}, security=AUTO, soul="Be.")
    up = await start_gateway()
    provider.reply(
        Reply(calls=[Call("bad__echo", {"text": "x"}), Call("good__echo", {"text": "y"})]),
        Reply(text=["done"]),
    )
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    assert said[-1]["status"] == "succeeded"
    # The person is told once, and the model each time.
    (notice,) = (event for event in said if event.get("notice"))
    assert "The MCP server 'bad' is not available" in notice["text"]
    assert why in notice["text"]
    for request in provider.requests:
        told = json.dumps(request.body)
        assert "The MCP server 'bad' is not available" in told
    refused, result = sorted(ends(said), key=lambda end: not end[1])
    assert "The MCP server 'bad' is not available" in refused[0]
    assert result == ("y", False)


async def test_a_run_that_uses_no_server_waits_for_none(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    silent = local("--silent", startTimeout="1h")
    make_profile("slow", tools={"preset": "none", "mcp": {"bad": silent}})
    up = await start_gateway()
    waits = await start_run(http, up.url, "go", profileId="slow")
    await until_status(http, up.url, await start_run(http, up.url, "go"), "succeeded")
    assert (await get_json(http, up.url, f"/runs/{waits['runId']}"))["status"] == "accepted"
    await post_json(http, up.url, f"/runs/{waits['runId']}/cancel")
    await until_status(http, up.url, waits, "cancelled")


async def test_a_server_that_behaves_badly_is_survived_and_what_it_did_is_said(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    servers = {
        "t": local("--chatty", "--pids", str(tmp_path / "pids")),
        "h": local(callTimeout="300ms"),
    }
    make_profile("assistant", tools={"preset": "none", "mcp": servers}, security=AUTO)
    up = await start_gateway()
    echo = Call("t__echo", {"text": "well"})
    said = await calls(
        http,
        up.url,
        provider,
        *(Call("t__huge", {"bytes": 50_000_000}), echo),
        *(Call("h__hang", {}), Call("h__echo", {"text": "well"})),
        *(Call("t__die", {}), echo),
        *(Call("t__flood", {}), echo),
    )
    assert said[1::2] == [("well", False)] * 4
    huge, hang, die, flood = said[::2]
    assert huge[1]
    assert "bytes or more, 8388608 are allowed" in huge[0]
    assert hang[1]
    assert "did not answer within 0.3 s" in hang[0]
    assert die[1]
    assert "went away during the call: it ended with exit code 3" in die[0]
    assert flood[1]
    assert "that nobody asked for" in flood[0]
    assert "its effect, in whole or in part" in flood[0]
    # It was started anew where it had to be, and only there.
    assert len(pids(tmp_path / "pids")) == 3
    await start_gateway.stop(up)
    await gone(tmp_path / "pids")


async def test_a_server_that_answers_nobody_any_more_is_started_anew(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ownware_gateway.mcp.session.PING_S", 0.2)
    server = local("--pids", str(tmp_path / "pids"), callTimeout="300ms")
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": server}}, security=AUTO)
    up = await start_gateway()
    ((result, is_error),) = await calls(http, up.url, provider, Call("t__hang_for_ever", {}))
    assert is_error
    assert "did not answer" in result
    await written(tmp_path / "pids", "\n")
    async with asyncio.timeout(10):
        while len(pids(tmp_path / "pids")) < 2:
            await asyncio.sleep(0.02)
    assert await calls(http, up.url, provider, Call("t__echo", {"text": "well"})) == [
        ("well", False)
    ]


async def test_a_tool_that_a_server_adds_can_be_called_in_the_same_run(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local()}}, security=AUTO)
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(
        Reply(calls=[Call("t__change", {})]),
        Reply(calls=[Call("t__extra_0", {})], gate=gate),
        Reply(text=["done"]),
    )
    run = await start_run(http, up.url, "go")
    await provider.requested(2)
    async with asyncio.timeout(10):
        while True:
            (server,) = await get_json(http, up.url, "/mcp/servers")
            if any(tool["name"] == "t__extra_0" for tool in server["tools"]):
                break
            await asyncio.sleep(0.01)
    gate.set()
    said = ends(await run_events(http, up.url, run["runId"]))
    assert said == [("changed", False), ("this is extra_0", False)]
    assert "t__extra_0" in offered(provider.requests[2])


async def test_a_server_of_the_newest_protocol_is_used_and_left_like_any_other(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    modern = {"command": sys.executable, "args": [str(SERVER.with_name("modern.py"))]}
    make_profile("assistant", tools={"preset": "none", "mcp": {"m": modern}}, security=AUTO)
    up = await start_gateway()
    assert await calls(
        http, up.url, provider, Call("m__add", {"a": 2, "b": 3}), Call("m__grow", {})
    ) == [("5", False), ("grown", False)]
    async with asyncio.timeout(10):
        while True:
            (server,) = await get_json(http, up.url, "/mcp/servers")
            if any(tool["name"] == "m__later" for tool in server["tools"]):
                break
            await asyncio.sleep(0.01)
    assert server["protocolVersion"] > "2026"
    await start_gateway.stop(up)
    assert not alive(server["pid"])


async def test_progress_of_a_server_is_progress_of_the_call(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local()}}, security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("t__progress", {})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    lines = [event["progress"] for event in said if event["type"] == "tool.call.progress"]
    assert lines == ["on it (1 of 3)", "on it (2 of 3)", "on it (3 of 3)"]


async def test_a_run_that_is_cancelled_tells_the_server_and_leaves_it_to_the_others(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    server = local("--pids", str(tmp_path / "pids"))
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": server}}, security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("t__slow", {"path": str(tmp_path / "slow")})]))
    run = await start_run(http, up.url, "go")
    await written(tmp_path / "slow", "begun")
    await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
    await until_status(http, up.url, run, "cancelled")
    await written(tmp_path / "slow", "cancelled")
    assert await calls(http, up.url, provider, Call("t__echo", {"text": "well"})) == [
        ("well", False)
    ]
    assert len(pids(tmp_path / "pids")) == 1


async def test_nothing_is_left_of_a_server_that_wants_to_stay(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    server = local("--deaf", "--child", "--pids", str(tmp_path / "pids"))
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": server}}, security=AUTO)
    up = await start_gateway()
    assert await calls(http, up.url, provider, Call("t__echo", {"text": "x"})) == [("x", False)]
    assert len(pids(tmp_path / "pids")) == 2
    await start_gateway.stop(up)
    await gone(tmp_path / "pids", 0.1)


async def test_a_server_sees_only_what_it_was_given_and_its_secrets_are_seen_by_nobody(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = "word-" + "of-mouth"
    monkeypatch.setenv("TEST_TOKEN", secret)
    monkeypatch.setenv("TEST_OTHER", "not for servers")
    env = {"API_TOKEN": "${env:TEST_TOKEN}", "GREETING": "hello there", "PASSWORD": "in the file"}
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local(env=env)}}, security=AUTO)
    up = await start_gateway(tool_env=("TEST_OTHER",))
    ((said, _),) = await calls(http, up.url, provider, Call("t__env", {}))
    seen = json.loads(said)
    assert seen["API_TOKEN"] == "[secret]"
    assert seen["GREETING"] == "hello there"
    assert "TEST_OTHER" not in seen
    assert "TEST_TOKEN" not in seen
    shown = json.dumps(
        [
            await get_json(http, up.url, "/mcp/servers"),
            await get_json(http, up.url, "/profiles"),
            await get_json(http, up.url, "/profiles/assistant"),
        ]
    )
    assert secret not in shown
    assert "in the file" not in shown
    assert "${env:TEST_TOKEN}" in shown


async def test_the_rules_and_floors_of_a_profile_hold_for_tools_of_servers(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    policies = [
        {"tool": "t__echo", "when": {"text": {"pattern": "no*"}}, "decision": "deny"},
        {"tool": "t__echo", "when": {"text": {"pattern": "ask*"}}, "decision": "ask"},
        {"tool": "t__*", "decision": "allow"},
    ]
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local()}}, policies=policies)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("t__echo", {"text": "yes"}),
        Call("t__echo", {"text": "no thanks"}),
        Call("t__append", {"path": str(tmp_path / ".env"), "line": "x"}),
        Call("t__append", {"path": str(up.data_dir / "gateway.db"), "line": "x"}),
    )
    assert said[0] == ("yes", False)
    assert said[1][1]
    assert "A rule of the profile denies this: policies.0" in said[1][0]
    assert [result for result, _ in said[2:]] == [
        "It names a file that holds keys, or one of the gateway's own; no tool reads those."
    ] * 2
    provider.reply(Reply(calls=[Call("t__echo", {"text": "ask me"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    waiting = await until_status(http, up.url, run, "waiting")
    (question,) = waiting["pendingPermissions"]
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "always"})
    end = ends(await run_events(http, up.url, run["runId"]))
    assert (question["toolName"], end) == ("t__echo", [("ask me", False)])


async def test_without_the_sdk_a_profile_that_names_servers_runs_without_their_tools(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    make_profile("assistant", tools={"preset": "readonly", "mcp": {"t": local()}})
    up = await start_gateway()
    found = await get_json(http, up.url, "/profiles")
    assert ([item["id"] for item in found["items"]], found["broken"]) == (["assistant"], [])
    said = await calls(http, up.url, provider, Call("t__echo", {"text": "x"}))
    for command in (".venv/bin/pip install mcp", "pip install 'ownware-gateway[mcp]'"):
        assert command in said[0][0]
    assert "read_file" in offered(provider.requests[0])
    system = provider.requests[0].body["messages"][0]["content"]
    assert "The MCP server 't' is not available: it cannot be used. MCP servers need" in system
