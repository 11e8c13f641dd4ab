"""Rules and floors in a real gateway: what a model asks for, what happens, and what is told."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.sse import Frame
from ownware_gateway.tools import Context, Output, Tool
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]
MakeProfile = Callable[..., Path]

AUTO: Final = {"permissionMode": "auto"}
DONE: Final = Reply(text=["Done."])


def write(path: str, content: str = "x") -> Call:
    return Call("write_file", {"path": path, "content": content})


def shell(command: str) -> Call:
    return Call("shell_execute", {"command": command})


def rule(tool: str, decision: str, **conditions: Any) -> Json:
    return {"tool": tool, "when": conditions, "decision": decision}


async def ask(http: Http, up: Gateway, provider: Provider, *calls: Call, **body: Any) -> Json:
    """Start a run in which the model makes these calls, one turn after the other."""
    provider.reply(*(Reply(calls=[call]) for call in calls), DONE)
    return await start_run(http, up.url, "go", **body)


async def told(http: Http, up: Gateway, run: Json, *types: str) -> list[Json]:
    """Wait until a run has ended and return its events of these types."""
    said = await run_events(http, up.url, run["runId"])
    return [event for event in said if event["type"] in types]


async def answer(http: Http, up: Gateway, run: Json, action: str) -> None:
    """Wait for the run's question and answer it."""
    await until_status(http, up.url, run, "waiting")
    body = {"action": action}
    status, said = await post_json(http, up.url, f"/threads/{run['threadId']}/resume", body)
    assert status == 200, said


async def test_the_first_rule_that_fits_decides_and_the_events_say_which(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    policies = [
        rule("shell_execute", "allow", command={"prefix": ["echo", "ls"]}),
        rule("write_file", "deny", path={"glob": "secrets/**"}),
        {"tool": "write_file", "decision": "allow"},
        {"tool": "*", "decision": "deny"},
    ]
    make_profile("assistant", policies=policies)
    up = await start_gateway()
    calls = [shell("echo one && ls"), write("secrets/a"), write("a"), shell("echo $(pwd)")]
    run = await ask(http, up, provider, *calls)
    said = await told(http, up, run, "tool.call.execute", "tool.call.end")
    decisions = [
        (event["type"], event["decision"], event["rule"].partition(" ")[0])
        for event in said
        if "rule" in event
    ]
    assert decisions == [
        ("tool.call.execute", "allow", "policies.0"),
        ("tool.call.end", "deny", "policies.1"),
        ("tool.call.execute", "allow", "policies.2"),
        ("tool.call.end", "deny", "policies.3"),
    ]
    assert [event["isError"] for event in said if event["type"] == "tool.call.end"] == [
        False,
        True,
        False,
        True,
    ]
    assert "secrets/**" in said[2]["result"], "the model is told which rule it met"
    assert sorted(path.name for path in up.workspace.iterdir()) == ["a"]


async def test_auto_skips_no_rule(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant", security=AUTO, policies=[rule("write_file", "ask", path={"glob": "*.md"})]
    )
    up = await start_gateway()
    run = await ask(http, up, provider, write("a.txt"), write("a.md"))
    await answer(http, up, run, "deny")
    said = await told(http, up, run, "permission.request", "tool.call.execute")
    assert [event["type"] for event in said] == ["tool.call.execute", "permission.request"]
    assert "rule" not in said[0], "the mode is no rule"
    assert said[1]["rule"] == (
        'policies.0 {"tool": "write_file", "when": {"path": {"glob": ["*.md"]}}, "decision": "ask"}'
    )
    assert not (up.workspace / "a.md").exists()


async def test_a_floor_beats_a_rule_that_allows_everything(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, policies=[{"tool": "*", "decision": "allow"}])
    up = await start_gateway()
    hidden = "what-nobody-" + "may-see"
    (up.workspace / ".env").write_text(f"A={hidden}\n")
    outside = up.data_dir / "precious"
    outside.write_text("x")
    calls = [
        Call("read_file", {"path": ".env"}),
        Call("grep", {"pattern": "A="}),
        shell("cat .e*"),
        shell("cat ../gateway.db | wc -c"),
        shell("rm -f ../precious"),
        shell(f"echo {FAKE_KEY}"),
        write("key.txt", FAKE_KEY),
    ]
    run = await ask(http, up, provider, *calls)
    said = await told(http, up, run, "tool.call.execute", "tool.call.end")
    ends = [event for event in said if event["type"] == "tool.call.end"]
    assert [event.get("rule") for event in ends] == [
        *("floor.keys", None, "floor.keys", "floor.keys", "floor.deletion"),
        *("floor.secrets", "floor.secrets"),
    ]
    assert [event["toolName"] for event in said if event["type"] == "tool.call.execute"] == ["grep"]
    assert ends[1]["result"].startswith("No line matches.")
    assert "[left out, as they hold keys: 1]" in ends[1]["result"]
    everything = json.dumps(await run_events(http, up.url, run["runId"]))
    assert hidden not in everything
    assert FAKE_KEY not in everything
    assert hidden not in json.dumps([request.body for request in provider.requests])
    assert outside.exists()
    assert not (up.workspace / "key.txt").exists()


async def test_an_answer_for_the_thread_lowers_no_floor(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    command = shell('rm -rf "$NOWHERE"')
    run = await ask(http, up, provider, command, command, Call("read_file", {"path": "id_rsa"}))
    await answer(http, up, run, "always")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        asked = 0

        def second(frame: Frame) -> bool:
            nonlocal asked
            asked += frame.event == "permission.request"
            return asked == 2

        question = json.loads((await read_frames(response, second))[-1].data)
    assert question["rule"] == "floor.deletion"
    await answer(http, up, run, "deny")
    ends = await told(http, up, run, "tool.call.end")
    assert [event["isError"] for event in ends] == [False, True, True]
    assert ends[2]["rule"] == "floor.keys"


async def test_always_does_not_override_a_rule_that_denies(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    up = await start_gateway()
    run = await ask(http, up, provider, write("a"), write("b"))
    await answer(http, up, run, "always")
    ends = await told(http, up, run, "tool.call.end")
    assert [event["isError"] for event in ends] == [False, False], "the second was not asked"
    make_profile("assistant", policies=[rule("write_file", "deny", path={"glob": "b"})])
    run = await ask(http, up, provider, write("b"), write("c"), threadId=run["threadId"])
    ends = await told(http, up, run, "tool.call.end")
    assert [event["isError"] for event in ends] == [True, False]
    assert ends[0]["rule"].startswith("policies.0 ")


async def test_always_answers_the_rule_that_asked_and_no_other(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    policies = [
        rule("write_file", "ask", path={"glob": "a*"}),
        rule("write_file", "ask", path={"glob": "b*"}),
    ]
    make_profile("assistant", security=AUTO, policies=policies)
    up = await start_gateway()
    run = await ask(http, up, provider, write("a1"), write("a2"), write("b1"))
    await answer(http, up, run, "always")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        await read_frames(response, lambda frame: b'"path":"b1"' in frame.data.encode())
    await answer(http, up, run, "deny")
    asked = await told(http, up, run, "permission.request")
    assert [event["input"]["path"] for event in asked] == ["a1", "b1"]


async def test_a_run_keeps_its_rules_over_a_restart_and_obeys_new_ones_too(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    asks = {"tool": "write_file", "decision": "ask"}
    kept = rule("write_file", "deny", path={"glob": "kept"})
    make_profile("assistant", security=AUTO, policies=[kept, asks])
    up = await start_gateway()
    run = await ask(http, up, provider, write("first"), write("kept"), write("new"))
    await until_status(http, up.url, run, "waiting")
    new = rule("write_file", "deny", path={"glob": "new"})
    make_profile("assistant", security=AUTO, policies=[new])
    up = await start_gateway.restart(up)
    await answer(http, up, run, "always")
    ends = await told(http, up, run, "tool.call.end")
    assert [event["isError"] for event in ends] == [False, True, True]
    assert '"kept"' in ends[1]["rule"]
    assert '"new"' in ends[2]["rule"]


async def test_what_a_person_has_granted_meanwhile_is_not_run_against_a_new_rule(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    up = await start_gateway()
    run = await ask(http, up, provider, shell("echo hello"))
    await until_status(http, up.url, run, "waiting")
    make_profile("assistant", policies=[{"kind": "shell", "denyPatterns": ["echo *"]}])
    up = await start_gateway.restart(up)
    await answer(http, up, run, "approve")
    (end,) = await told(http, up, run, "tool.call.end")
    assert end["isError"]
    assert end["decision"] == "deny"


async def test_a_call_that_was_cut_off_is_not_repeated_against_a_new_rule(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = asyncio.Event()

    async def hangs(_context: Context, _arguments: Json) -> Output:
        assert not began.is_set(), "it ran again"
        began.set()
        await asyncio.Event().wait()
        raise AssertionError

    look = Tool("look", "", {"type": "object", "properties": {}}, hangs, safe_to_repeat=True)
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)
    monkeypatch.setattr("ownware_gateway.app.HANDLERS_GRACE_S", 0.05)
    monkeypatch.setattr("ownware_gateway.app.tools", lambda _: {"look": look})
    make_profile("assistant", security=AUTO, tools={"preset": "full"})
    up = await start_gateway()
    run = await ask(http, up, provider, Call("look"))
    await began.wait()
    make_profile(
        "assistant",
        security=AUTO,
        tools={"preset": "full"},
        policies=[{"tool": "look", "decision": "ask"}],
    )
    up = await start_gateway.restart(up)
    (end,) = await told(http, up, run, "tool.call.end")
    assert end["result"].startswith("Interrupted")


async def test_a_profile_with_a_misspelt_rule_is_not_used(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", policies=[{"tool": "shell_exec", "decision": "deny"}])
    up = await start_gateway()
    (broken,) = (await get_json(http, up.url, "/profiles"))["broken"]
    assert "did you mean 'shell_execute'?" in broken["message"]
    body = {"profileId": "assistant", "prompt": "go"}
    status, said = await post_json(http, up.url, "/run", body)
    assert (status, said["error"]) == (404, "not_found")
    assert broken["message"] in said["message"]
    assert not provider.requests


async def test_a_profile_is_shown_with_its_rules(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile
) -> None:
    make_profile("assistant", policies=[rule("write_file", "deny", path={"glob": "a"})])
    up = await start_gateway()
    shown = await get_json(http, up.url, "/profiles/assistant")
    assert shown["policies"] == [
        {
            "kind": "rule",
            "tool": "write_file",
            "when": {"path": {"glob": ["a"]}},
            "decision": "deny",
        }
    ]
