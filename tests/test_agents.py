"""Agents that work for a run: spawned by its calls, each a run of its own, told of exactly once."""

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import agents
from ownware_gateway.app import Gateway
from ownware_gateway.calls import DEPTH_MAX
from ownware_gateway.events import (
    AgentSpawn,
    Event,
    PermissionRequest,
    PermissionResponse,
    RunCancel,
    ToolCallExecute,
    decode,
)
from ownware_gateway.log.writer import Commit, Writer
from ownware_gateway.permissions import Verdict
from ownware_gateway.run import (
    AGENTS_AT_ONCE_MAX,
    CANCELLED,
    TIMED_OUT,
    Agents,
    AgentState,
    Begin,
    Deliver,
    Finish,
    Question,
    Recall,
    Rest,
    RunTools,
    Spawn,
    Step,
    Wait,
    closing,
    next_step,
)
from ownware_gateway.transcript import Call as FoldedCall, RunFacts, grants
from tests.gateway import (
    PATIENCE_S,
    Gateways,
    events,
    frames,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
)
from tests.provider import Call, Provider, Reply
from tests.test_engine import AUTO, Events, MakeProfile, abrupt, of_type, only, until
from tests.test_footprint import own_tasks, timers
from tests.test_run import LIMITS, Recorder, check_whole

__all__ = ["abrupt"]

Http = aiohttp.ClientSession

ASK: Final = {"permissionMode": "ask"}


def spawn(task: str, agent: str = "helper", call_id: str = "") -> Call:
    return Call("spawn_agent", {"agent": agent, "task": task}, call_id)


def write(path: str, content: str = "x") -> Call:
    return Call("write_file", {"path": path, "content": content})


def helper_of(name: str, **agents: str) -> dict[str, dict[str, str]]:
    """The field `subagents`: `helper`, of the profile of this name, and others."""
    return {key: {"profile": profile} for key, profile in {"helper": name, **agents}.items()}


@pytest.fixture
def family(make_profile: MakeProfile) -> MakeProfile:
    """`assistant` may spawn `helper`, of the profile `helps`, whose model is `helps-model`."""
    make_profile("assistant", security=AUTO, subagents=helper_of("helps"))
    make_profile("helps", model="openai:helps-model", security=AUTO)
    return make_profile


async def agent_events(http: Http, up: Gateway, thread_id: str, agent_id: str) -> Events:
    """Follow an agent's stream to its end, and return its events."""
    path = f"/threads/{thread_id}/agents/{agent_id}/events"
    async with open_stream(http, up.url, path) as response:
        return events(await read_frames(response, until="done"))


async def all_events(http: Http, up: Gateway, run: dict[str, Any]) -> dict[str, Events]:
    """Wait until a run has ended; return the events of all agents of its thread."""
    said = await run_events(http, up.url, run["runId"])
    path = f"/threads/{run['threadId']}/agents"
    listed = (await get_json(http, up.url, path))["agents"]
    found = {"root": said}
    for agent in listed:
        if agent["agentId"] != "root":
            agent_id = agent["agentId"]
            found[agent_id] = await agent_events(http, up, run["threadId"], agent_id)
    for of_agent in found.values():
        if of_agent:
            assert [event["seq"] for event in of_agent] == list(range(1, len(of_agent) + 1))
            check_whole([decode(json.dumps(event).encode()) for event in of_agent])
    return found


async def nth(http: Http, up: Gateway, run: dict[str, Any], kind: str, number: int = 1) -> Any:
    """Wait for the event of this type and number on the stream of a run, and return it."""
    count = 0
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                count += frame.event == kind
                if count == number:
                    return json.loads(frame.data)
    raise AssertionError(f"{count} of {kind}")


async def resume(http: Http, up: Gateway, run: dict[str, Any], action: str, **body: Any) -> Any:
    path = f"/threads/{run['threadId']}/resume"
    status, answer = await post_json(http, up.url, path, {"action": action, **body})
    assert status == 200, answer
    return answer


async def shown(http: Http, up: Gateway, run_id: str) -> Any:
    return await get_json(http, up.url, f"/runs/{run_id}")


# -- what comes next: pure

SPAWN: Final = ("c_spawn", "spawn_agent")
SPAWN_2: Final = ("c_spawn_2", "spawn_agent")
READ: Final = ("c_read", "read_file")
SHELL: Final = ("c_shell", "shell_execute")


def judge(call: FoldedCall) -> Verdict:
    return Verdict("ask" if call.name == "shell_execute" else "run", "so it is")


def spawned(*calls: tuple[str, str], others: tuple[tuple[str, str], ...] = ()) -> RunFacts:
    """A run whose answer asks for these calls, and which has spawned an agent for the first."""
    recorder = Recorder().begin().answer("", *calls, *others)
    facts = recorder.run.facts()
    for call_id, name in calls:
        for event in spawning(call_id, name):
            facts.apply(event)
    return facts


def spawning(call_id: str, name: str = "spawn_agent") -> list[Event]:
    return [
        ToolCallExecute(tool_call_id=call_id, tool_name=name, input={}, turn_index=0),
        AgentSpawn(
            agent_id=f"agent_{call_id}",
            parent_agent_id="root",
            run_id=f"run_{call_id}",
            tool_call_id=call_id,
            name="helper",
            profile_name="helps",
            model="m",
            task="do",
            time_left_ms=1,
            turn_index=0,
        ),
    ]


def step_of(facts: RunFacts, *states: AgentState, timed_out: bool = False) -> Step:
    """What comes next, with the agents of the run's open calls in these states."""
    names = [call.agent.agent_id for call in facts.open_agents if call.agent is not None]
    known = Agents("spawn_agent", dict(zip(names, states, strict=True)))
    return next_step(facts, judge, LIMITS, known, TIMED_OUT if timed_out else None)


def ids(step: Step) -> list[str]:
    assert isinstance(step, Spawn | Begin | Deliver | Recall | RunTools)
    return [call.id for call in step.calls]


def test_calls_that_spawn_come_before_others_and_as_many_as_there_are_places() -> None:
    calls = [(f"c_{number}", "spawn_agent") for number in range(AGENTS_AT_ONCE_MAX + 3)]
    facts = Recorder().begin().answer("", READ, *calls).run.facts()
    step = step_of(facts)
    assert isinstance(step, Spawn)
    assert ids(step) == [call_id for call_id, _ in calls[:AGENTS_AT_ONCE_MAX]]
    assert step.of == len(calls)
    for call in step.calls:
        for event in spawning(call.id):
            facts.apply(event)
    states: list[AgentState] = ["under_way"] * AGENTS_AT_ONCE_MAX
    assert ids(step_of(facts, *states)) == ["c_read"], "others do not wait for a place"


def test_an_agent_begins_before_anything_else_is_done() -> None:
    facts = spawned(SPAWN, SPAWN_2, others=(READ,))
    assert ids(step_of(facts, "under_way", "spawned")) == ["c_spawn_2"]
    assert isinstance(step_of(facts, "under_way", "spawned"), Begin)


def test_what_came_of_an_agent_is_told_at_once() -> None:
    facts = spawned(SPAWN, SPAWN_2)
    step = step_of(facts, "under_way", "ended")
    assert isinstance(step, Deliver)
    assert ids(step) == ["c_spawn_2"]


def test_a_run_whose_agents_are_under_way_does_the_rest_of_its_turn_then_rests() -> None:
    facts = spawned(SPAWN, others=(READ, SHELL))
    assert ids(step_of(facts, "under_way")) == ["c_read"]
    facts = spawned(SPAWN, others=(SHELL,))
    assert isinstance(step_of(facts, "under_way"), Question)
    for event in Recorder().asks(*SHELL).run.appends[-1]:
        facts.apply(event)
    assert step_of(facts, "under_way") == Wait("perm_c_shell")
    assert step_of(spawned(SPAWN), "under_way") == Rest(1)


@pytest.mark.parametrize("timed_out", [True, False])
def test_a_run_ends_after_its_agents(timed_out: bool) -> None:
    facts = spawned(SPAWN, SPAWN_2)
    if not timed_out:
        facts.apply(RunCancel(run_id="run_1", requested_by="local"))
    assert ids(step_of(facts, "under_way", "stopping", timed_out=timed_out)) == ["c_spawn"]
    assert step_of(facts, "stopping", "stopping", timed_out=timed_out) == Rest(2)
    assert ids(step_of(facts, "stopping", "ended", timed_out=timed_out)) == ["c_spawn_2"]
    end = step_of(facts, "spawned", "spawned", timed_out=timed_out)
    assert isinstance(end, Finish)
    assert end == (Finish("timed_out", "aborted", "timed_out") if timed_out else CANCELLED)


def test_an_agent_that_never_began_is_ended_with_its_run() -> None:
    facts = spawned(SPAWN)
    kinds = [event.type for event in closing(facts, CANCELLED, 0)]
    assert kinds == ["agent.complete", "tool.call.end", "turn.interrupted", "session.end"]
    assert facts.turn is not None
    complete = facts.turn.calls["c_spawn"].complete
    assert complete is not None
    assert complete.status == "aborted"


def test_what_an_agent_asks_is_no_call_of_the_run_above_and_what_is_allowed_holds_there() -> None:
    facts = spawned(SPAWN)
    request = PermissionRequest(
        request_id="perm_1",
        tool_call_id="of another stream",
        tool_name="write_file",
        input={},
        reason="",
        operation_hash="hash",
        expires_at=0,
        turn_index=7,
        agent_id="agent_c_spawn",
    )
    facts.apply(request)
    assert facts.question() is None
    said = {"request_id": "perm_1", "granted": True, "decided_by": "user", "reason": ""}
    facts.apply(
        PermissionResponse.model_validate(
            {**said, "always": True, "turn_index": 7, "agent_id": "agent_c_spawn"}
        )
    )
    assert grants([facts]) == {"write_file", "hash"}
    facts.copied = True
    assert grants([facts]) == set()


# -- one agent


async def test_an_agent_does_a_task_and_its_last_words_are_the_result(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    (up.workspace / "a.txt").write_text("A")
    provider.reply_as("test-model", Reply(calls=[spawn("Look")]), Reply(text=["It", " says A."]))
    provider.reply_as(
        "helps-model",
        Reply(text=["I look."], calls=[Call("read_file", {"path": "a.txt"})]),
        Reply(text=["It is", " A."]),
    )
    run = await start_run(http, up.url, "go")
    of = await all_events(http, up, run)
    root = of.pop("root")
    ((agent_id, said),) = of.items()
    begun = only(root, "agent.spawn")
    assert begun["agentId"] == agent_id
    assert begun["seq"] == only(root, "tool.call.execute")["seq"] + 1
    assert (begun["name"], begun["profileName"], begun["task"]) == ("helper", "helps", "Look")
    assert said[0] == {
        "type": "user.message",
        "runId": begun["runId"],
        "text": "Look",
        "attachments": None,
        "timestamp": said[0]["timestamp"],
        "seq": 1,
    }
    assert [event["type"] for event in said if "tool" in event["type"]] == [
        "tool.call.start",
        "tool.call.args_delta",
        "tool.call.execute",
        "tool.call.end",
    ]
    complete, end = only(root, "agent.complete"), only(root, "tool.call.end")
    assert end["seq"] == complete["seq"] + 1
    assert complete["result"] == end["result"] == "It is A."
    assert (complete["status"], end["isError"], complete["turnCount"]) == ("completed", False, 2)
    child_run = await shown(http, up, begun["runId"])
    assert (child_run["parentRunId"], child_run["agentId"]) == (run["runId"], agent_id)
    assert await run_events(http, up.url, begun["runId"]) == said
    thread = await get_json(http, up.url, f"/threads/{run['threadId']}")
    assert (thread["profileId"], thread["title"]) == ("assistant", "go")


async def test_agents_are_seen_in_the_messages_and_in_the_list_of_agents(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("Look")]))
    run = await start_run(http, up.url, "go")
    await run_events(http, up.url, run["runId"])
    _, reply = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    tool, agent, *_ = reply["parts"]
    assert agent == {
        "kind": "subagent",
        "toolCallId": tool["toolCallId"],
        "agentId": agent["agentId"],
        "name": "helper",
        "status": "completed",
    }
    listed = await get_json(http, up.url, f"/threads/{run['threadId']}/agents")
    root, child = listed["agents"]
    assert (root["agentId"], root["parentAgentId"], root["name"]) == ("root", None, None)
    assert child["agentId"] == agent["agentId"]
    assert (child["parentAgentId"], child["name"]) == ("root", "helper")
    assert (child["profileId"], child["status"]) == ("helps", "succeeded")


async def test_a_profile_that_names_no_agents_has_no_tool_for_them(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "full"})
    up = await start_gateway()
    await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    tools = [tool["function"]["name"] for tool in provider.requests[0].body["tools"]]
    assert "spawn_agent" not in tools


async def test_the_tool_is_the_profiles_own_under_any_preset_and_tells_when_to_use_whom(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    agents = {"reviewer": {"profile": "assistant", "description": "Reads code."}}
    make_profile("assistant", tools={"preset": "none"}, subagents=agents)
    up = await start_gateway()
    await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    (tool,) = (tool["function"] for tool in provider.requests[0].body["tools"])
    assert tool["name"] == "spawn_agent"
    assert "reviewer: Reads code." in tool["description"]
    assert tool["parameters"]["properties"]["agent"]["enum"] == ["reviewer"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"subagents": {"a__b": {"profile": "helps"}}}, "subagents"),
        ({"subagents": {"a": {}}}, "subagents.a.profile"),
        ({"subagents": {f"a{n}": {"profile": "p"} for n in range(17)}}, "16"),
        (
            {
                "subagents": helper_of("helps"),
                "policies": [
                    {"tool": "spawn_agent", "when": {"who": {"equals": "x"}}, "decision": "deny"}
                ],
            },
            "no argument 'who'",
        ),
    ],
)
async def test_agents_that_are_declared_wrongly_make_the_profile_unusable(
    start_gateway: Gateways,
    http: Http,
    make_profile: MakeProfile,
    fields: dict[str, Any],
    why: str,
) -> None:
    make_profile("wrong", **fields)
    up = await start_gateway()
    (broken,) = (await get_json(http, up.url, "/profiles"))["broken"]
    assert why in broken["message"]


async def test_an_agent_whose_profile_is_missing_is_an_error_that_the_model_sees(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, subagents=helper_of("nobody"))
    up = await start_gateway()
    provider.reply(Reply(calls=[spawn("Look")]), Reply(text=["A pity."]))
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    end = only(said, "tool.call.end")
    assert end["isError"]
    assert "no profile named 'nobody'" in end["result"]
    assert not of_type(said, "agent.spawn")
    assert only(said, "session.end")["status"] == "succeeded"


async def test_an_agent_that_fails_is_an_error_that_the_model_sees_and_the_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    family("helps", model="openai:helps-model", security=AUTO, maxTurns=1)
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]), Reply(text=["Well."]))
    provider.reply_as(
        "helps-model",
        Reply(text=["I read."], calls=[Call("read_file", {"path": "a"})]),
        Reply(status=400, error="It does not like this."),
    )
    run = await start_run(http, up.url, "go")
    root = (await all_events(http, up, run))["root"]
    results = sorted(event["result"] for event in of_type(root, "agent.complete"))
    assert [event["status"] for event in of_type(root, "agent.complete")] == ["error", "error"]
    assert "It does not like this." in "".join(results)
    assert any("max_turns" in result and "I read." in result for result in results)
    assert all(event["isError"] for event in of_type(root, "tool.call.end"))
    assert only(root, "session.end")["status"] == "succeeded"


async def test_an_agent_whose_model_cannot_be_used_ends_its_call_and_nothing_else(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    family("helps", model="nowhere:model")
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]), Reply(text=["Well."]))
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    assert only(root, "agent.complete")["status"] == "error"
    assert only(root, "tool.call.end")["isError"]
    assert only(root, "session.end")["status"] == "succeeded"


async def test_an_agent_can_be_followed_as_soon_as_it_is_heard_of(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(text=["Hm", " well"], gate=gate, gate_after=1))
    run = await start_run(http, up.url, "go")
    begun = await nth(http, up, run, "agent.spawn")
    path = f"/threads/{run['threadId']}/agents/{begun['agentId']}/events"
    async with open_stream(http, up.url, path) as response:
        reading = asyncio.ensure_future(read_frames(response, until="done"))
        await provider.requested(2)
        gate.set()
        read = await reading
    assert [event["type"] for event in events(read)][-1] == "session.end"


# -- more than one, and deeper


async def test_agents_of_one_turn_work_at_the_same_time_and_beside_the_other_calls(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    calls = [spawn("a"), write("own.txt"), spawn("b"), spawn("c")]
    provider.reply_as("test-model", Reply(calls=calls), Reply(text=["All done."]))
    provider.reply_as("helps-model", *[Reply(text=["Done."], gate=gate)] * 3)
    run = await start_run(http, up.url, "go")
    await provider.requested(4)
    await until(lambda: (up.workspace / "own.txt").exists())
    assert not gate.is_set(), "all of them are asked at once, and nobody waits for them"
    gate.set()
    of = await all_events(http, up, run)
    assert len(of) == 4
    assert (
        len(of_type(of["root"], "agent.spawn")) == len(of_type(of["root"], "agent.complete")) == 3
    )


async def test_more_agents_than_may_work_at_once_begin_as_others_end(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    count = AGENTS_AT_ONCE_MAX + 3
    gate = asyncio.Event()
    provider.reply_as("test-model", Reply(calls=[spawn(f"{n}") for n in range(count)]))
    provider.reply_as("helps-model", *[Reply(text=["Done."], gate=gate)] * count)
    run = await start_run(http, up.url, "go")
    await provider.requested(1 + AGENTS_AT_ONCE_MAX)
    await until(lambda: run["runId"] not in up.engine._slots)
    assert len(provider.requests) == 1 + AGENTS_AT_ONCE_MAX
    gate.set()
    root = (await all_events(http, up, run))["root"]
    open_now = most = 0
    for event in root:
        open_now += (event["type"] == "agent.spawn") - (event["type"] == "agent.complete")
        most = max(most, open_now)
    assert most == AGENTS_AT_ONCE_MAX
    assert len(of_type(root, "agent.complete")) == count


async def test_agents_spawn_agents_as_deep_as_is_allowed_and_their_words_come_up(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, subagents=helper_of("assistant"))
    up = await start_gateway()
    provider.reply(
        *(Reply(calls=[spawn(f"{depth}")]) for depth in range(DEPTH_MAX + 1)),
        Reply(text=["Not", " deeper."]),
    )
    run = await start_run(http, up.url, "go")
    of = await all_events(http, up, run)
    assert len(of) == 1 + DEPTH_MAX
    tools = [[t["function"]["name"] for t in asked.body["tools"]] for asked in provider.requests]
    assert ["spawn_agent" in names for names in tools[: DEPTH_MAX + 1]] == [True] * 3 + [False]
    deepest = [said for said in of.values() if not of_type(said, "agent.spawn")]
    (said,) = deepest
    assert f"{DEPTH_MAX} deep" in only(said, "tool.call.end")["result"]
    listed = (await get_json(http, up.url, f"/threads/{run['threadId']}/agents"))["agents"]
    assert [agent["parentAgentId"] for agent in listed] == [
        None,
        *(agent["agentId"] for agent in listed[:-1]),
    ]


async def test_a_run_and_its_agents_spawn_so_many_and_no_more(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    family: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "AGENTS_MAX", 2)
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b"), spawn("c")]))
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    assert len(of_type(root, "agent.spawn")) == 2
    (refused,) = [end for end in of_type(root, "tool.call.end") if end["isError"]]
    assert "as many as a run may have" in refused["result"]


# -- what they may do


@pytest.mark.parametrize(
    ("above", "own", "verdict"),
    [
        ({"permissionMode": "deny"}, AUTO, "denied"),
        (AUTO, {"permissionMode": "deny"}, "denied"),
        (AUTO, AUTO, "runs"),
        (ASK, AUTO, "asks"),
        (AUTO, ASK, "asks"),
        ({"permissionMode": "allowlist"}, AUTO, "denied"),
    ],
)
async def test_an_agent_may_do_no_more_than_those_that_it_works_for(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    above: dict[str, str],
    own: dict[str, str],
    verdict: str,
) -> None:
    tools = {"preset": "readonly", "allow": ["spawn_agent"]}
    make_profile("assistant", security=above, tools=tools, subagents=helper_of("helps"))
    make_profile("helps", model="openai:helps-model", security=own)
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]))
    run = await start_run(http, up.url, "go")
    if verdict == "asks":
        await nth(http, up, run, "permission.request")
        await resume(http, up, run, "deny")
    of = await all_events(http, up, run)
    (child,) = (said for agent_id, said in of.items() if agent_id != "root")
    assert bool(of_type(child, "permission.request")) is (verdict == "asks")
    assert (up.workspace / "a.txt").exists() is (verdict == "runs")
    if verdict == "denied" and above != AUTO:
        assert "'assistant'" in only(child, "tool.call.end")["result"]


async def test_a_rule_of_the_agent_above_binds_those_below_and_may_forbid_them_as_such(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    rules = [
        {"tool": "write_file", "when": {"path": {"glob": "secret/**"}}, "decision": "deny"},
        {"tool": "spawn_agent", "when": {"agent": {"equals": "other"}}, "decision": "deny"},
    ]
    family("assistant", security=AUTO, policies=rules, subagents=helper_of("helps", other="helps"))
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b", "other")]))
    provider.reply_as("helps-model", Reply(calls=[write("secret/a"), write("b")]))
    of = await all_events(http, up, await start_run(http, up.url, "go"))
    assert len(of_type(of["root"], "agent.spawn")) == 1
    denied = next(end for end in of_type(of["root"], "tool.call.end") if end["isError"])
    assert denied["rule"].startswith("policies.1 ")
    (child,) = (said for agent_id, said in of.items() if agent_id != "root")
    assert [end["isError"] for end in of_type(child, "tool.call.end")] == [True, False]


# -- people


@pytest.fixture
def asking(make_profile: MakeProfile) -> MakeProfile:
    """As `family`, and `helper` asks before it changes something."""
    make_profile("assistant", security=AUTO, subagents=helper_of("helps"))
    make_profile("helps", model="openai:helps-model", security=ASK)
    return make_profile


@pytest.mark.parametrize("how", ["named", "unnamed", "decision of the run", "decision of its own"])
async def test_what_an_agent_asks_stands_in_all_streams_and_one_answer_decides(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile, how: str
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]))
    run = await start_run(http, up.url, "go")
    asked = await nth(http, up, run, "permission.request")
    begun = await nth(http, up, run, "agent.spawn")
    assert asked["agentId"] == begun["agentId"]
    waiting = await shown(http, up, run["runId"])
    assert waiting["status"] == (await shown(http, up, begun["runId"]))["status"] == "waiting"
    assert [item["requestId"] for item in waiting["pendingPermissions"]] == [asked["requestId"]]
    listed = await get_json(http, up.url, "/runs?status=waiting")
    assert {item["runId"] for item in listed["items"]} == {run["runId"], begun["runId"]}
    (item,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert (item["agentId"], item["runId"]) == (begun["agentId"], begun["runId"])
    if how.startswith("decision"):
        run_id = run["runId"] if how == "decision of the run" else begun["runId"]
        path = f"/runs/{run_id}/permissions/{asked['requestId']}/decision"
        body = {"decision": "approve", "operationHash": asked["operationHash"]}
        assert (await post_json(http, up.url, path, body))[0] == 200
    else:
        named = {"requestId": asked["requestId"]} if how == "named" else {}
        await resume(http, up, run, "approve", **named)
    of = await all_events(http, up, run)
    child = of[begun["agentId"]]
    for kind in ("permission.request", "permission.response"):
        own, above = only(child, kind), only(of["root"], kind)
        assert above.pop("agentId") == begun["agentId"]
        del own["seq"], above["seq"]
        assert own == above
    assert (up.workspace / "a.txt").exists()
    assert (await shown(http, up, run["runId"]))["status"] == "succeeded"
    assert (await get_json(http, up.url, "/approvals"))["items"] == []


async def test_a_question_of_one_deep_below_stands_in_every_stream_above(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("helps", model="openai:helps-model", security=AUTO, subagents=helper_of("deep"))
    asking("deep", model="openai:deep-model", security=ASK)
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(calls=[spawn("b")]))
    provider.reply_as("deep-model", Reply(calls=[write("a.txt")]))
    run = await start_run(http, up.url, "go")
    asked = await nth(http, up, run, "permission.request")
    runs = (await get_json(http, up.url, f"/runs?threadId={run['threadId']}"))["items"]
    assert [item["status"] for item in runs] == ["waiting"] * 3
    await resume(http, up, run, "approve")
    of = await all_events(http, up, run)
    assert len(of) == 3
    for agent_id, said in of.items():
        request = only(said, "permission.request")
        assert request["requestId"] == asked["requestId"]
        assert request.get("agentId") == (
            None if agent_id == asked["agentId"] else asked["agentId"]
        )
        assert only(said, "permission.response")["granted"]


async def test_a_question_in_words_stands_in_all_streams_too_and_waits_in_the_same_line(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]))
    question = Call("ask_user", {"question": "Which colour?"})
    provider.reply_as(
        "helps-model", Reply(calls=[question]), Reply(calls=[write("a.txt")]), Reply(), Reply()
    )
    run = await start_run(http, up.url, "go")
    # Whoever comes first asks first, and the other one only then.
    kinds = ["question.request", "permission.request"]
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        frames = await read_frames(response, until=lambda frame: frame.event in kinds)
    if frames[-1].event == "permission.request":
        kinds.reverse()
    for kind in kinds:
        await nth(http, up, run, kind)
        (item,) = (await get_json(http, up.url, "/approvals"))["items"]
        assert f"{item['kind']}.request" == kind
        body = {"action": "answer", "answer": "green"} if item["kind"] == "question" else {}
        await resume(http, up, run, **{"action": "approve", **body})
    of = await all_events(http, up, run)
    asked, said = only(of["root"], "question.request"), only(of["root"], "question.response")
    child = of[asked["agentId"]]
    assert said["answer"] == only(child, "question.response")["answer"] == "green"
    assert only(child, "tool.call.end")["result"] == "green"
    assert not of_type(of["root"], "tool.call.end")[0]["isError"]


async def test_agents_that_want_to_ask_at_once_stand_in_line(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("assistant", security=ASK, subagents=helper_of("helps"))
    up = await start_gateway()
    calls = [write("own"), spawn("a"), spawn("b"), spawn("c")]
    provider.reply_as("test-model", Reply(calls=calls))
    provider.reply_as("helps-model", *(Reply(calls=[write(name)]) for name in "abc"))
    run = await start_run(http, up.url, "go")
    for number in range(1, 5):
        asked = await nth(http, up, run, "permission.request", number)
        await until(lambda: not up.engine._slots)
        items = (await get_json(http, up.url, "/approvals"))["items"]
        assert [item["requestId"] for item in items] == [asked["requestId"]]
        assert not own_tasks()
        answer = await resume(http, up, run, "approve" if number != 2 else "deny")
        assert answer["requestId"] == asked["requestId"]
    of = await all_events(http, up, run)
    asked_ids = [event["requestId"] for event in of_type(of["root"], "permission.request")]
    answered = [event["requestId"] for event in of_type(of["root"], "permission.response")]
    assert asked_ids == answered
    assert len(set(asked_ids)) == 4
    written = [name for name in ("own", "a", "b", "c") if (up.workspace / name).exists()]
    assert len(written) == 3


async def test_a_line_goes_on_when_the_one_that_asked_is_cancelled(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]))
    provider.reply_as("helps-model", *[Reply(calls=[write("a")])] * 2)
    run = await start_run(http, up.url, "go")
    first = await nth(http, up, run, "permission.request")
    (item,) = (await get_json(http, up.url, "/approvals"))["items"]
    await until(lambda: not up.engine._slots)
    assert (await post_json(http, up.url, f"/runs/{item['runId']}/cancel"))[0] == 202
    second = await nth(http, up, run, "permission.request", 2)
    assert second["agentId"] != first["agentId"]
    await resume(http, up, run, "approve")
    root = (await all_events(http, up, run))["root"]
    statuses = sorted(event["status"] for event in of_type(root, "agent.complete"))
    assert statuses == ["aborted", "completed"]
    assert only(root, "session.end")["status"] == "succeeded"


async def test_always_holds_for_all_agents_of_the_thread_and_its_later_runs(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("assistant", security=ASK, subagents=helper_of("helps"))
    up = await start_gateway()
    provider.reply_as(
        "test-model",
        Reply(calls=[spawn("a"), spawn("b")]),
        Reply(calls=[write("own")]),
        Reply(text=["Done."]),
        Reply(calls=[write("later")]),
    )
    provider.reply_as("helps-model", Reply(calls=[write("a")]), Reply(calls=[write("b")]))
    run = await start_run(http, up.url, "go")
    await nth(http, up, run, "permission.request")
    await until(lambda: not up.engine._slots)
    await resume(http, up, run, "always")
    root = (await all_events(http, up, run))["root"]
    assert len(of_type(root, "permission.request")) == 1
    later = await start_run(http, up.url, "more", threadId=run["threadId"])
    said = await run_events(http, up.url, later["runId"])
    assert not of_type(said, "permission.request")
    assert all((up.workspace / name).exists() for name in ("a", "b", "own", "later"))


async def test_a_question_that_an_agent_asks_expires_by_itself(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    security = {**ASK, "hitlTimeoutMs": 150}
    asking("helps", model="openai:helps-model", security=security)
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]))
    provider.reply_as("helps-model", *[Reply(calls=[write("a")])] * 2)
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    assert [e["decidedBy"] for e in of_type(root, "permission.response")] == ["timeout"] * 2
    first, second = of_type(root, "permission.request")
    assert second["expiresAt"] >= first["expiresAt"] + 150, "it is counted from when it is asked"


async def test_a_tree_that_waits_is_rows_and_goes_on_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]))
    provider.reply_as("helps-model", *(Reply(calls=[write(name)]) for name in "ab"))
    run = await start_run(http, up.url, "go")
    await nth(http, up, run, "permission.request")
    await until(lambda: not up.engine._slots)
    up = await start_gateway.restart(up)
    assert up.recovered == 3
    await until(lambda: not own_tasks())
    assert timers(up.engine.approvals) == 1
    generations = {item.id: item.generation for item in await up.log.unfinished()}
    assert set(generations.values()) == {1}, "nobody was looked at who has nothing to do"
    await resume(http, up, run, "approve")
    await nth(http, up, run, "permission.request", 2)
    await resume(http, up, run, "approve")
    of = await all_events(http, up, run)
    assert only(of["root"], "session.end")["status"] == "succeeded"
    assert all((up.workspace / name).exists() for name in "ab")


async def test_a_run_that_waits_itself_is_told_of_its_agents_and_waits_on_as_before(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    family("assistant", security=ASK, subagents=helper_of("helps"))
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), write("own")]))
    provider.reply_as("helps-model", Reply(text=["Done."], gate=gate))
    run = await start_run(http, up.url, "go")
    await nth(http, up, run, "permission.request")
    gate.set()
    await nth(http, up, run, "agent.complete")
    await until(lambda: not up.engine._slots)
    (waiting,) = await up.log.unfinished()
    assert (waiting.status, waiting.rests_on) == ("waiting", "person")
    up = await start_gateway.restart(up)
    await resume(http, up, run, "approve")
    root = (await all_events(http, up, run))["root"]
    assert only(root, "session.end")["status"] == "succeeded"
    assert (up.workspace / "own").exists()


# -- what they cost


async def test_a_run_costs_what_its_agents_cost_and_shares_what_it_may(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o",
        security=AUTO,
        execution={"maxCostUsd": 1.0, "timeout": 60_000},
        subagents=helper_of("helps", cheap="cheap"),
    )
    make_profile("helps", model="openai:gpt-4o-mini", security=AUTO)
    make_profile("cheap", model="openai:gpt-4o-mini", execution={"maxCostUsd": 0.01})
    up = await start_gateway()
    calls = [spawn("a"), spawn("b", "cheap")]
    provider.reply_as("gpt-4o", Reply(calls=calls, usage=(1_000, 10)), Reply(text=["Done."]))
    provider.reply_as("gpt-4o-mini", *[Reply(text=["Done."], usage=(100_000, 10))] * 2)
    run = await start_run(http, up.url, "go")
    of = await all_events(http, up, run)
    root = of.pop("root")
    ends = [only(said, "session.end")["totalUsage"] for said in of.values()]
    completes = [event["usage"] for event in of_type(root, "agent.complete")]
    assert sorted(map(str, completes)) == sorted(map(str, ends))
    turns = [event["usage"] for event in of_type(root, "turn.end")]
    total = only(root, "session.end")["totalUsage"]
    for field in ("inputTokens", "outputTokens"):
        assert total[field] == sum(item[field] for item in [*turns, *ends])
    assert math.isclose(total["costUsd"], sum(item["costUsd"] for item in [*turns, *ends]))
    assert total["model"] == turns[-1]["model"]
    assert (await shown(http, up, run["runId"]))["usage"] == total
    first, second = of_type(root, "agent.spawn")
    assert math.isclose(first["maxCostUsd"], (1.0 - turns[0]["costUsd"]) / 2)
    assert second["maxCostUsd"] == 0.01
    limits = [(await shown(http, up, item["runId"]))["timeoutMs"] for item in (first, second)]
    assert all(59_000 < limit <= 60_000 for limit in limits)


async def test_a_run_whose_agents_have_spent_its_money_ends(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o",
        security=AUTO,
        execution={"maxCostUsd": 0.01},
        subagents=helper_of("helps"),
    )
    make_profile("helps", model="openai:gpt-4o-mini", security=AUTO)
    up = await start_gateway()
    provider.reply_as("gpt-4o", Reply(calls=[spawn("a")]))
    look = Reply(calls=[Call("list_files")], usage=(100_000, 10))
    provider.reply_as("gpt-4o-mini", look, look, look)
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    assert only(root, "agent.complete")["error"] == "budget_exceeded"
    assert only(root, "session.end")["code"] == "budget_exceeded"
    assert len(provider.requests) == 2


async def test_a_run_has_no_more_time_than_its_own_though_its_agents_take_it(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    family("assistant", security=AUTO, execution={"timeout": 250}, subagents=helper_of("helps"))
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b")]))
    provider.reply_as("helps-model", Reply(text=["Hm"], hang=True, hang_after=1), Reply())
    run = await start_run(http, up.url, "go")
    of = await all_events(http, up, run)
    ends = {agent_id: only(said, "session.end")["status"] for agent_id, said in of.items()}
    assert ends["root"] == "timed_out"
    assert sorted(ends.values()) == ["succeeded", "timed_out", "timed_out"]
    assert [asked.body["model"] for asked in provider.requests].count("test-model") == 1


async def test_a_run_that_must_be_over_by_the_clock_ends_then_though_its_agents_wait_for_people(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    execution = {"maxWallTime": "400ms"}
    asking("assistant", security=AUTO, execution=execution, subagents=helper_of("helps"))
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]))
    run = await start_run(http, up.url, "go")
    of = await all_events(http, up, run)
    begun = only(of["root"], "agent.spawn")
    late_ms = only(of["root"], "permission.request")["expiresAt"] - begun["endsAt"]
    assert 0 <= late_ms < 5_000, "but for the moment that it took to begin the agent's run"
    assert {only(said, "session.end")["reason"] for said in of.values()} == {"budget_exceeded"}


async def test_an_agent_that_must_be_over_by_the_clock_ends_then_though_others_ask_before_it(
    abrupt: None, start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("assistant", security=AUTO, subagents=helper_of("helps", quick="quick"))
    execution = {"maxWallTime": "1s"}
    asking("quick", model="openai:quick-model", security=ASK, execution=execution)
    up = await start_gateway()
    first = asyncio.Event()
    provider.reply_as("test-model", Reply(calls=[spawn("a"), spawn("b", "quick")]), Reply())
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]), Reply())
    provider.reply_as("quick-model", Reply(calls=[write("b.txt")], gate=first))
    run = await start_run(http, up.url, "go")
    asked = await nth(http, up, run, "permission.request")
    first.set()
    in_line = (await nth(http, up, run, "agent.spawn", 2))["runId"]
    await provider.requested(3)
    await until(lambda: in_line not in up.engine._slots)
    up = await start_gateway.restart(up)
    complete = await nth(http, up, run, "agent.complete")
    assert complete["error"] == "budget_exceeded"
    assert complete["agentId"] != asked["agentId"]
    await resume(http, up, run, "approve", requestId=asked["requestId"])
    of = await all_events(http, up, run)
    assert only(of["root"], "session.end")["status"] == "succeeded"


# -- their end


async def hanging(
    http: Http, up: Gateway, provider: Provider, count: int = 2
) -> tuple[dict[str, Any], Events]:
    """Start a run whose agents hang in the middle of a word; return it and what began them."""
    provider.reply_as("test-model", Reply(calls=[spawn(f"{n}") for n in range(count)]))
    provider.reply_as("helps-model", *[Reply(text=["Hm"], hang=True, hang_after=1)] * count)
    run = await start_run(http, up.url, "go")
    await nth(http, up, run, "agent.spawn", count)
    await provider.requested(1 + count)
    await until(lambda: run["runId"] not in up.engine._slots)
    said = await get_json(http, up.url, f"/threads/{run['threadId']}/agents/root/events/history")
    return run, of_type(said["events"], "agent.spawn")


async def test_a_cancel_stops_all_agents_and_the_run_ends_last(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    run, begun = await hanging(http, up, provider)
    assert (await post_json(http, up.url, f"/runs/{run['runId']}/cancel"))[0] == 202
    of = await all_events(http, up, run)
    assert len(of) == 3
    assert {only(said, "session.end")["status"] for said in of.values()} == {"cancelled"}
    assert [e["status"] for e in of_type(of["root"], "agent.complete")] == ["aborted"] * 2
    ended = [(await shown(http, up, event["runId"]))["terminalAt"] for event in begun]
    assert (await shown(http, up, run["runId"]))["terminalAt"] >= max(ended)
    cancels = [only(of[event["agentId"]], "run.cancel")["requestedBy"] for event in begun]
    assert cancels == ["parent"] * 2


async def test_one_agent_that_is_cancelled_is_an_error_and_the_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model")
    run, (begun,) = await hanging(http, up, provider, 1)
    assert (await post_json(http, up.url, f"/runs/{begun['runId']}/cancel"))[0] == 202
    root = (await all_events(http, up, run))["root"]
    assert only(root, "agent.complete")["status"] == "aborted"
    end = only(root, "tool.call.end")
    assert end["isError"]
    assert "was stopped" in end["result"]
    assert "Hm" in end["result"]
    assert only(root, "session.end")["status"] == "succeeded"


async def test_a_cancel_is_carried_on_after_the_process_died_over_it(
    abrupt: None, start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    run, begun = await hanging(http, up, provider)
    up.engine.refuse()
    cancelling = asyncio.ensure_future(post_json(http, up.url, f"/runs/{run['runId']}/cancel"))
    await nth(http, up, run, "run.cancel")
    await cancelling
    for event in begun:
        assert (await shown(http, up, event["runId"]))["cancelRequestedAt"] is None
    up = await start_gateway.restart(up)
    of = await all_events(http, up, run)
    assert {only(said, "session.end")["status"] for said in of.values()} == {"cancelled"}


async def test_a_run_that_cannot_go_on_stops_its_agents_first(
    abrupt: None, start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    run, _ = await hanging(http, up, provider)
    provider.default = Reply(text=["Hm"], hang=True, hang_after=1)
    # Set going by one end, it finds that its profile is gone.
    profiles = Path(up.profiles._folder)
    (profiles / "assistant" / "agent.json").unlink()
    up = await start_gateway.restart(up)
    (first, *_) = [item for item in await up.log.unfinished() if item.parent_run_id]
    assert (await post_json(http, up.url, f"/runs/{first.id}/cancel"))[0] == 202
    of = await all_events(http, up, run)
    ends = {agent: only(said, "session.end") for agent, said in of.items()}
    assert ends["root"]["code"] == "profile_gone"
    assert [end["status"] for agent, end in ends.items() if agent != "root"] == ["cancelled"] * 2


async def test_a_thread_is_deleted_with_all_its_agents(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    run, begun = await hanging(http, up, provider)
    path = f"/threads/{run['threadId']}/agents/{begun[0]['agentId']}/events"
    async with open_stream(http, up.url, path) as response:
        reading = asyncio.ensure_future(read_frames(response, until="done"))
        async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as deleted:
            assert deleted.status == 200
        await reading
    async with http.get(f"{up.url}/api/v1{path}") as gone:
        assert gone.status == 410
    assert (await get_json(http, up.url, "/runs"))["items"] == []
    await until(lambda: not up.engine._slots)


async def test_a_copy_tells_of_agents_and_has_none(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]))
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]))
    run = await start_run(http, up.url, "go")
    await nth(http, up, run, "permission.request")
    await resume(http, up, run, "always")
    said = await run_events(http, up.url, run["runId"])
    path = f"/threads/{run['threadId']}"
    _, fork = await post_json(http, up.url, f"{path}/fork", {"atSeq": said[-1]["seq"]})
    async with http.get(f"{up.url}/api/v1{path}/export") as response:
        file = await response.read()
    async with http.post(f"{up.url}/api/v1/threads/import", data=file) as response:
        assert response.status == 201, await response.text()
        imported = await response.json()
    for copy in (fork, imported):
        listed = (await get_json(http, up.url, f"/threads/{copy['id']}/agents"))["agents"]
        assert [agent["agentId"] for agent in listed] == ["root"]
        _, reply = await get_json(http, up.url, f"/threads/{copy['id']}/messages")
        (part,) = [part for part in reply["parts"] if part["kind"] == "subagent"]
        assert part["status"] == "completed"
        provider.reply_as("test-model", Reply(calls=[spawn("b")]))
        provider.reply_as("helps-model", Reply(calls=[write("b.txt")]))
        again = await start_run(http, up.url, "more", threadId=copy["id"])
        await nth(http, up, again, "permission.request")
        await resume(http, up, again, "deny")
        await run_events(http, up.url, again["runId"])


# -- nothing is left, nothing is lost


async def test_many_agents_one_after_the_other_leave_nothing(
    start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    turns, together = 25, 8
    calls = [Reply(calls=[spawn(f"{n}") for n in range(together)])] * turns
    provider.reply_as("test-model", *calls, Reply(text=["All done."]))
    provider.default = Reply(text=["Done."])
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    assert len(of_type(said, "agent.complete")) == turns * together == agents.AGENTS_MAX
    await until(lambda: not own_tasks())
    engine: Any = up.engine
    assert not engine._slots
    assert not engine._cancelling
    assert not engine._recent._kept, "no stream of an agent has a next run"
    assert not engine.approvals._expires_at
    assert {only(said, "session.end")["status"]} == {"succeeded"}


class Lost:
    """The commit of a gateway that died before it."""

    async def wait(self) -> int:
        await asyncio.Event().wait()
        return 0


@contextlib.contextmanager
def comes_to(number: int, *, deadly: bool) -> Iterator[asyncio.Event]:
    """Set the event when so much was given to the log to be written; lose it and all that follows.

    If it is not `deadly`, nothing is lost.
    """
    reached = asyncio.Event()
    take: Callable[..., Commit] = Writer.take
    count = 0

    def counted(writer: Writer, work: Any) -> Any:
        nonlocal count
        count += 1
        if count >= number:
            reached.set()
        if deadly and reached.is_set():
            return Lost()
        return take(writer, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "take", counted)
        yield reached


#: Two agents at once, one of which asks; about as many pieces of work as that is for the log.
TASKS: Final = "ask reader to read a.txt and also ask writer to run: echo x >> log"
WORKS: Final = 70
#: It has never fewer than these.
WORKS_MIN: Final = 48


async def approve_all(http: Http, up: Gateway, run: dict[str, Any]) -> list[bytes]:
    """Allow whatever is asked, and return the frames of the run."""
    read: list[bytes] = []
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                if frame.id is not None:
                    read.append(frame.data.encode())
                if frame.event == "permission.request":
                    asked = json.loads(frame.data)
                    path = f"/threads/{run['threadId']}/resume"
                    body = {"action": "approve", "requestId": asked["requestId"]}
                    assert (await post_json(http, up.url, path, body))[0] in (200, 409)
    return read


async def start_and_approve(
    http: Http, up: Gateway, body: dict[str, str], key: dict[str, str]
) -> None:
    async with http.post(f"{up.url}/api/v1/run", json=body, headers=key) as response:
        run = await response.json()
    await approve_all(http, up, run)


@pytest.fixture
def demos(make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of the offline model, which answers the same each time: two agents that ask."""
    monkeypatch.setattr("ownware_gateway.engine.REST_S", 0.01)
    model = {"model": "demo:assistant"}
    subagents = {"reader": {"profile": "r"}, "writer": {"profile": "w"}}
    make_profile("assistant", **model, security=AUTO, subagents=subagents)
    make_profile("r", **model, security=ASK)
    make_profile("w", **model, security=ASK)


#: Every fifth here, and each of them in the soak.
MOMENTS: Final = [
    pytest.param(number, marks=() if number % 5 == 2 else pytest.mark.soak)
    for number in range(2, WORKS)
]


@pytest.mark.usefixtures("abrupt", "demos")
@pytest.mark.parametrize("number", MOMENTS)
async def test_agents_survive_a_death_at_every_piece_of_work(
    start_gateway: Gateways, http: Http, number: int
) -> None:
    up = await start_gateway()
    (up.workspace / "a.txt").write_text("A")
    key = {"Idempotency-Key": "once"}
    body = {"profileId": "assistant", "prompt": TASKS}
    with comes_to(number, deadly=True) as reached:
        living = asyncio.ensure_future(start_and_approve(http, up, body, key))
        died = asyncio.ensure_future(reached.wait())
        await asyncio.wait([living, died], return_when=asyncio.FIRST_COMPLETED)
        assert reached.is_set() or number > WORKS_MIN
        for task in (living, died):
            task.cancel()
        await asyncio.gather(living, died, return_exceptions=True)
        await start_gateway.stop(up)
    up = await start_gateway()
    async with http.post(f"{up.url}/api/v1/run", json=body, headers=key) as response:
        run = await response.json()
    seen = await approve_all(http, up, run)
    of = await all_events(http, up, run)
    assert [json.loads(frame) for frame in seen] == of["root"]
    assert only(of["root"], "session.end")["status"] == "succeeded"
    begun = Counter(event["toolCallId"] for event in of_type(of["root"], "agent.spawn"))
    assert set(begun.values()) == {1}
    assert len(begun) == len(of_type(of["root"], "agent.complete")) == len(of) - 1 == 2
    for said in of.values():
        assert len(of_type(said, "session.end")) == 1
    log = up.workspace / "log"
    interrupted = any(
        event["result"].startswith("Interrupted")
        for said in of.values()
        for event in of_type(said, "tool.call.end")
    )
    assert interrupted or log.read_text() == "x\n"
    assert not log.exists() or log.read_text() == "x\n"


@pytest.mark.usefixtures("demos")
@pytest.mark.parametrize("number", MOMENTS)
async def test_agents_of_a_run_that_is_cancelled_at_any_piece_of_work_end_before_it(
    start_gateway: Gateways, http: Http, number: int
) -> None:
    up = await start_gateway()
    (up.workspace / "a.txt").write_text("A")
    with comes_to(number, deadly=False) as reached:
        run = await start_run(http, up.url, TASKS)
        following = asyncio.ensure_future(approve_all(http, up, run))
        died = asyncio.ensure_future(reached.wait())
        await asyncio.wait([following, died], return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        _, outcome = await up.engine.cancel(run["runId"], "test")
        await following
    of = await all_events(http, up, run)
    end = only(of["root"], "session.end")
    assert end["status"] == ("succeeded" if outcome == "already_terminal" else "cancelled")
    begun = of_type(of["root"], "agent.spawn")
    assert len(begun) == len(of_type(of["root"], "agent.complete"))
    for said in of.values():
        if said:
            assert only(said, "session.end")["timestamp"] <= end["timestamp"]
    assert not await up.log.unfinished()


async def test_a_death_between_an_agents_end_and_its_telling_tells_it_once(
    abrupt: None, start_gateway: Gateways, http: Http, provider: Provider, family: MakeProfile
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]), Reply(text=["Done."]))
    provider.reply_as("helps-model", Reply(text=["It is so."], gate=gate))
    run = await start_run(http, up.url, "go")
    begun = await nth(http, up, run, "agent.spawn")
    await provider.requested(2)
    await until(lambda: run["runId"] not in up.engine._slots)
    # Nobody is set going any more, as when the process dies in that moment.
    up.engine.refuse()
    gate.set()
    await agent_events(http, up, run["threadId"], begun["agentId"])
    await until(lambda: not up.engine._slots)
    up = await start_gateway.restart(up)
    root = (await all_events(http, up, run))["root"]
    assert only(root, "agent.complete")["result"] == "It is so."
    assert only(root, "session.end")["status"] == "succeeded"
    assert len(provider.requests) == 3


# -- where trees, budgets, questions and deletions meet


async def test_the_money_known_to_be_spent_is_not_shared_again_though_a_price_is_not_known(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o-mini",
        security=AUTO,
        execution={"maxCostUsd": 1.0},
        subagents=helper_of("helps", unpriced="unpriced"),
    )
    make_profile("helps", model="openai:gpt-4o-mini", security=AUTO)
    make_profile("unpriced", model="openai:helps-model", security=AUTO)
    up = await start_gateway()
    provider.reply_as(
        "gpt-4o-mini",
        Reply(calls=[spawn("a", "unpriced")], usage=(1_000_000, 10)),
        Reply(calls=[spawn("b")], usage=(1_000_000, 10)),
        Reply(text=["Done."]),
        Reply(text=["Done."]),
    )
    provider.reply_as("helps-model", Reply(text=["Done."]))
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    first, second = of_type(root, "agent.spawn")
    spent = sum(event["usage"]["costUsd"] for event in of_type(root, "turn.end")[:2])
    assert first["maxCostUsd"] < 1.0
    assert math.isclose(second["maxCostUsd"], 1.0 - spent)


async def test_what_is_known_of_an_agents_cost_counts_though_not_all_of_it_is_known(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o-mini",
        security=AUTO,
        execution={"maxCostUsd": 0.4},
        subagents=helper_of("middle"),
    )
    make_profile("middle", model="openai:gpt-4o", security=AUTO, subagents=helper_of("unpriced"))
    make_profile("unpriced", model="openai:helps-model", security=AUTO)
    up = await start_gateway()
    provider.reply_as("gpt-4o-mini", Reply(calls=[spawn("a")]), Reply(text=["Not to be asked."]))
    last = Reply(text=["Done."], usage=(200_000, 10))
    provider.reply_as("gpt-4o", Reply(calls=[spawn("b")]), last)
    provider.reply_as("helps-model", Reply(text=["Done."]))
    root = (await all_events(http, up, await start_run(http, up.url, "go")))["root"]
    complete = only(root, "agent.complete")
    assert complete["usage"]["costUsd"] is None
    assert complete["knownCostUsd"] > 0.4
    assert only(root, "session.end")["code"] == "budget_exceeded"


async def test_the_time_of_an_agent_counts_once_for_the_day_of_its_profile(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, subagents=helper_of("assistant"))
    up = await start_gateway()
    child = Reply(text=["Done."], delay_s=0.3)
    provider.reply(Reply(calls=[spawn("a")]), child, Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    root = (await all_events(http, up, run))["root"]
    own = await up.log.run(run["runId"])
    below = await up.log.run(only(root, "agent.spawn")["runId"])
    assert own is not None
    assert below is not None
    usage = await get_json(http, up.url, "/usage?profileId=assistant")
    # What the run above was charged with stands in its row, and is the agent's.
    assert below.active_ms <= usage["activeMs"] < own.active_ms + below.active_ms


async def test_a_run_whose_time_is_up_ends_so_though_its_agents_must_stop_first(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("assistant", security=AUTO, execution={"timeout": 400}, subagents=helper_of("helps"))
    up = await start_gateway()
    sleep = Call("shell_execute", {"command": "sleep 30"})
    provider.reply_as("test-model", Reply(calls=[spawn("a"), sleep]))
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]))
    of = await all_events(http, up, await start_run(http, up.url, "go"))
    assert only(of["root"], "session.end")["status"] == "timed_out"
    assert [asked.body["model"] for asked in provider.requests].count("test-model") == 1


async def test_every_run_above_one_that_asks_shows_the_question_that_it_waits_for(
    start_gateway: Gateways, http: Http, provider: Provider, asking: MakeProfile
) -> None:
    asking("assistant", security=AUTO, subagents=helper_of("middle"))
    asking("middle", model="openai:middle-model", security=AUTO, subagents=helper_of("helps"))
    up = await start_gateway()
    provider.reply_as("test-model", Reply(calls=[spawn("a")]), Reply())
    provider.reply_as("middle-model", Reply(calls=[spawn("b")]), Reply())
    provider.reply_as("helps-model", Reply(calls=[write("a.txt")]), Reply())
    run = await start_run(http, up.url, "go")
    asked = await nth(http, up, run, "permission.request")
    listed = (await get_json(http, up.url, "/runs?status=waiting"))["items"]
    assert len(listed) == 3
    for item in [*listed, *[await shown(http, up, item["runId"]) for item in listed]]:
        assert [q["requestId"] for q in item["pendingPermissions"]] == [asked["requestId"]]
    await resume(http, up, run, "approve")
    await all_events(http, up, run)
