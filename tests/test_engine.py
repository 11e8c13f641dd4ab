import asyncio
import base64
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.approvals import Decision
from ownware_gateway.conversation import conversation
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import decode
from ownware_gateway.log import Append, Commit, Stream
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.run import RETRIES_MAX
from ownware_gateway.sse import Frame
from ownware_gateway.tools import OUTPUT_LIMIT_BYTES, Context, Output, Tool
from ownware_gateway.transcript import NOTICE, load
from tests.gateway import (
    FAKE_KEY,
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
    text,
    until_status,
)
from tests.provider import Call, Provider, Reply
from tests.test_run import check_whole

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]
Events = list[dict[str, Any]]

AUTO: Final = {"permissionMode": "auto"}

#: A key of no known shape, which only the gateway's own settings can tell.
SHAPELESS_KEY: Final = "plain" + "word" * 4
SHAPED: Final = "sk-" + "z" * 24


def types(said: Events) -> list[str]:
    """The types in order, runs of deltas as one."""
    found: list[str] = []
    for event in said:
        if not (event["type"].endswith("delta") and found and found[-1] == event["type"]):
            found.append(event["type"])
    return found


def of_type(said: Events, event_type: str) -> Events:
    return [event for event in said if event["type"] == event_type]


def only(said: Events, event_type: str) -> dict[str, Any]:
    (event,) = of_type(said, event_type)
    return event


def shell(command: str, call_id: str = "", **arguments: Any) -> Call:
    return Call("shell_execute", {"command": command, **arguments}, call_id)


def write(path: str, content: str = "x") -> Call:
    return Call("write_file", {"path": path, "content": content})


async def until(true: Callable[[], object]) -> None:
    """Wait for something that no event tells of."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.002)


async def question(http: Http, url: str, run: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """Wait for a run's question of this number and return it."""
    count = 0

    def fits(frame: Frame) -> bool:
        nonlocal count
        count += frame.event == "permission.request"
        return count == number

    async with open_stream(http, url, f"/runs/{run['runId']}/events") as response:
        asked = json.loads((await read_frames(response, fits))[-1].data)
    assert isinstance(asked, dict)
    return asked


async def resume(
    http: Http, up: Gateway, run: dict[str, Any], action: str, **body: Any
) -> tuple[int, Any]:
    path = f"/threads/{run['threadId']}/resume"
    return await post_json(http, up.url, path, {"action": action, **body})


async def first_of(http: Http, up: Gateway, run: dict[str, Any], event_type: str) -> None:
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        await read_frames(response, event_type)


def said_to(provider: Provider, number: int) -> list[tuple[str, Any]]:
    """Role and content of the messages in a request to the provider."""
    messages = provider.requests[number].body["messages"]
    return [(message["role"], message.get("content")) for message in messages]


@pytest.fixture
def abrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make gateways stop without waiting for the steps under way."""
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)
    monkeypatch.setattr("ownware_gateway.app.HANDLERS_GRACE_S", 0.05)


# -- runs


async def test_a_run_is_its_events_in_order(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello you")
    said = await run_events(http, up.url, run["runId"])
    assert [event["type"] for event in said] == [
        "user.message",
        "session.start",
        "turn.start",
        "text.delta",
        "text.delta",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    assert [event["seq"] for event in said] == list(range(1, 9))
    assert text(said) == only(said, "text.complete")["text"] == "hello you"
    end = only(said, "session.end")
    assert (end["status"], end["reason"], end["code"], end["turnCount"]) == (
        "succeeded",
        "end_turn",
        None,
        1,
    )
    assert only(said, "turn.end")["usage"]["inputTokens"] == 10
    assert only(said, "session.start")["model"] == "openai:test-model"
    shown = await get_json(http, up.url, f"/runs/{run['runId']}")
    assert (shown["status"], shown["endSeq"], shown["terminal"]) == ("succeeded", 8, True)
    assert shown["usage"] == end["totalUsage"]
    assert len(provider.requests) == 1


async def test_a_run_with_tools_takes_several_turns(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    provider.reply(
        Reply(thinking=["Hm"], text=["I look."], calls=[shell("echo one", "c1")]),
        Reply(calls=[write("a.txt", "A")]),
        Reply(text=["Done."]),
    )
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    tools = ["tool.call.start", "thinking.complete", "tool.call.args_delta", "text.complete"]
    assert types(said) == [
        "user.message",
        "session.start",
        "turn.start",
        "thinking.delta",
        "text.delta",
        *tools,
        "tool.call.execute",
        "tool.call.progress",
        "tool.call.end",
        "turn.end",
        "turn.start",
        *(item for item in tools if item != "thinking.complete"),
        "tool.call.execute",
        "tool.call.end",
        "turn.end",
        "turn.start",
        "text.delta",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    assert [event["stopReason"] for event in of_type(said, "turn.end")] == [
        "tool_use",
        "tool_use",
        "end_turn",
    ]
    assert [event["turnIndex"] for event in of_type(said, "turn.start")] == [0, 1, 2]
    assert (up.workspace / "a.txt").read_text() == "A"
    roles = [role for role, _ in said_to(provider, 2)]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    assert "one" in str(said_to(provider, 2)[2][1])


async def test_parallel_calls_run_at_the_same_time(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    meet = "touch {0}; until [ -e {1} ]; do sleep 0.01; done; echo {0} met {1}"
    provider.reply(
        Reply(calls=[shell(meet.format("a", "b"), "c1"), shell(meet.format("b", "a"), "c2")]),
        Reply(text=["Done."]),
    )
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    results = {end["toolCallId"]: end["result"] for end in of_type(said, "tool.call.end")}
    assert results["c1"].startswith("a met b")
    assert results["c2"].startswith("b met a")


async def test_a_call_that_cannot_run_is_told_to_the_model_and_the_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(
        Reply(
            calls=[
                Call("fly", {}, "c1"),
                Call("write_file", '{"path": "a', "c2"),
                Call("write_file", {"path": 7}, "c3"),
            ]
        ),
        Reply(text=["Done."]),
    )
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    ends = {end["toolCallId"]: end for end in of_type(said, "tool.call.end")}
    assert all(end["isError"] for end in ends.values())
    assert "There is no tool named 'fly'" in ends["c1"]["result"]
    assert "not JSON" in ends["c2"]["result"]
    assert "do not fit" in ends["c3"]["result"]
    assert not of_type(said, "tool.call.execute")
    assert only(said, "session.end")["status"] == "succeeded"
    tool_results = [content for role, content in said_to(provider, 1) if role == "tool"]
    assert len(tool_results) == 3


async def test_a_second_run_on_a_busy_thread_is_refused_with_the_first_ones_id(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["x"], gate=gate))
    run = await start_run(http, up.url, "one")
    body = {"profileId": "assistant", "prompt": "two", "threadId": run["threadId"]}
    status, answer = await post_json(http, up.url, "/run", body)
    assert (status, answer["error"], answer["runId"]) == (409, "run_in_progress", run["runId"])
    gate.set()
    await run_events(http, up.url, run["runId"])
    status, _ = await post_json(http, up.url, "/run", body)
    assert status == 200


@pytest.mark.usefixtures("abrupt")
async def test_of_many_runs_started_at_once_on_a_thread_one_wins(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    _, thread = await post_json(http, up.url, "/threads")
    provider.default = Reply(text=["x"], hang=True)
    body = {"profileId": "assistant", "prompt": "go", "threadId": thread["id"]}
    answers = await asyncio.gather(*(post_json(http, up.url, "/run", body) for _ in range(8)))
    assert sorted(status for status, _ in answers) == [200] + [409] * 7
    (winner,) = [answer["runId"] for status, answer in answers if status == 200]
    assert {answer["runId"] for _, answer in answers} == {winner}


async def test_a_later_run_sends_the_earlier_conversation(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    first = await start_run(http, up.url, "hello")
    await run_events(http, up.url, first["runId"])
    provider.reply(Reply(text=["Hm"], hang=True, hang_after=1))
    second = await start_run(http, up.url, "think", threadId=first["threadId"])
    await first_of(http, up, second, "text.delta")
    await post_json(http, up.url, f"/runs/{second['runId']}/cancel")
    await run_events(http, up.url, second["runId"])
    third = await start_run(http, up.url, "well?", threadId=first["threadId"])
    said = await run_events(http, up.url, third["runId"])
    assert said_to(provider, 2) == [
        ("user", "hello"),
        ("assistant", "hello"),
        ("user", "think"),
        ("assistant", "Hm\n\n[interrupted]"),
        ("user", "well?"),
    ]
    assert said[0]["seq"] == third["startSeq"] + 1 > 1


async def test_an_attached_image_reaches_the_model_now_and_later(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    data = base64.b64encode(b"\x89PNG not really").decode()
    file = {"filename": "a.png", "mimeType": "image/png", "data": data}
    run = await start_run(http, up.url, "look", attachments=[file])
    said = await run_events(http, up.url, run["runId"])
    assert said[0]["attachments"] == [
        {"filename": "a.png", "mimeType": "image/png", "sizeBytes": 15}
    ]
    again = await start_run(http, up.url, "and?", threadId=run["threadId"])
    await run_events(http, up.url, again["runId"])
    for number in (0, 1):
        role, parts = said_to(provider, number)[0]
        assert role == "user"
        (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        assert url == f"data:image/png;base64,{data}"


async def test_a_changed_profile_is_seen_by_the_next_run_and_not_by_the_one_under_way(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", soul="You are the first.")
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    make_profile("assistant", soul="You are the second.", security=AUTO)
    await resume(http, up, run, "deny")
    await run_events(http, up.url, run["runId"])
    later = await start_run(http, up.url, "go")
    await run_events(http, up.url, later["runId"])
    systems = [request.body["messages"][0]["content"] for request in provider.requests]
    assert systems == ["You are the first."] * 2 + ["You are the second."]


# -- permissions


async def test_a_run_asks_before_it_changes_something_and_does_it_when_allowed(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt", "A")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    shown = await until_status(http, up.url, run, "waiting")
    asked = await question(http, up.url, run)
    assert asked["input"] == {"path": "a.txt", "content": "A"}
    assert shown["pendingPermissions"][0]["requestId"] == asked["requestId"]
    assert not (up.workspace / "a.txt").exists()
    status, answer = await resume(http, up, run, "approve", requestId=asked["requestId"])
    assert (status, answer["approved"], answer["pendingCount"]) == (200, True, 0)
    said = await run_events(http, up.url, run["runId"])
    order = types(said)
    assert order[order.index("permission.request") :][:4] == [
        "permission.request",
        "permission.response",
        "tool.call.execute",
        "tool.call.end",
    ]
    response = only(said, "permission.response")
    assert (response["granted"], response["decidedBy"]) == (True, "user")
    assert (up.workspace / "a.txt").read_text() == "A"


async def test_a_denial_is_a_result_that_the_model_sees(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt")]), Reply(text=["A pity."]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    await resume(http, up, run, "deny")
    said = await run_events(http, up.url, run["runId"])
    end = only(said, "tool.call.end")
    assert (end["isError"], end["result"]) == (True, "Denied: the answer was no")
    assert said_to(provider, 1)[-1] == ("tool", "Error: Denied: the answer was no")
    assert only(said, "session.end")["status"] == "succeeded"
    assert not (up.workspace / "a.txt").exists()


async def test_a_question_that_nobody_answers_expires_to_a_denial(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"permissionMode": "ask", "hitlTimeoutMs": 200})
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt")]), Reply(text=["A pity."]))
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    response = only(said, "permission.response")
    assert (response["granted"], response["decidedBy"]) == (False, "timeout")
    assert only(said, "tool.call.end")["result"] == "Denied: nobody answered within 0.2 s"
    assert only(said, "session.end")["status"] == "succeeded"
    asked = only(said, "permission.request")
    status, answer = await resume(http, up, run, "approve", requestId=asked["requestId"])
    assert (status, answer["error"]) == (409, "permission_already_decided")
    assert (answer["granted"], answer["decidedBy"]) == (False, "timeout")


async def test_always_holds_for_the_tool_in_the_rest_of_the_thread(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(
        Reply(calls=[write("a")]),
        Reply(calls=[write("b")]),
        Reply(text=["Done."]),
        Reply(calls=[write("c")]),
        Reply(text=["Done."]),
        Reply(calls=[write("d")]),
    )
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    await resume(http, up, run, "always")
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "permission.response")["always"] is True
    later = await start_run(http, up.url, "go on", threadId=run["threadId"])
    said = await run_events(http, up.url, later["runId"])
    assert not of_type(said, "permission.request")
    assert sorted(path.name for path in up.workspace.iterdir()) == ["a", "b", "c"]
    elsewhere = await start_run(http, up.url, "go")
    await until_status(http, up.url, elsewhere, "waiting")


async def test_always_holds_for_the_very_command_of_a_shell(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(
        Reply(calls=[shell("echo one >> log")]),
        Reply(calls=[shell("echo one >> log")]),
        Reply(calls=[shell("echo two >> log")]),
        Reply(text=["Done."]),
    )
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    await resume(http, up, run, "always")
    second = await question(http, up.url, run, 2)
    assert second["input"] == {"command": "echo two >> log"}
    assert (up.workspace / "log").read_text() == "one\none\n"
    await resume(http, up, run, "deny", requestId=second["requestId"])
    said = await run_events(http, up.url, run["runId"])
    assert len(of_type(said, "permission.request")) == 2
    assert (up.workspace / "log").read_text() == "one\none\n"


async def test_questions_are_asked_one_at_a_time_and_free_calls_do_not_wait(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    (up.workspace / "free.txt").write_text("free")
    provider.reply(
        Reply(calls=[write("a"), write("b"), Call("read_file", {"path": "free.txt"}, "free")]),
        Reply(text=["Done."]),
    )
    run = await start_run(http, up.url, "go")
    shown = await until_status(http, up.url, run, "waiting")
    assert len(shown["pendingPermissions"]) == 1
    history = await get_json(http, up.url, f"/threads/{run['threadId']}/agents/root/events/history")
    (ended,) = of_type(history["events"], "tool.call.end")
    assert ended["toolCallId"] == "free"
    first = await question(http, up.url, run)
    await resume(http, up, run, "approve", requestId=first["requestId"])
    second = await question(http, up.url, run, 2)
    assert (first["input"]["path"], second["input"]["path"]) == ("a", "b")
    assert not (up.workspace / "a").exists(), "what is granted runs together, once all is decided"
    await resume(http, up, run, "approve", requestId=second["requestId"])
    await run_events(http, up.url, run["runId"])
    assert (up.workspace / "a").exists()
    assert (up.workspace / "b").exists()


async def test_a_decision_is_bound_to_the_operation_that_was_shown(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    path = f"/runs/{run['runId']}/permissions/{asked['requestId']}/decision"
    body = {"decision": "approve", "operationHash": "0" * 64}
    status, answer = await post_json(http, up.url, path, body)
    assert (status, answer["error"]) == (409, "permission_operation_mismatch")
    shown = await get_json(http, up.url, f"/runs/{run['runId']}")
    assert shown["status"] == "waiting"
    body["operationHash"] = asked["operationHash"]
    status, answer = await post_json(http, up.url, path, body)
    assert (status, answer["approved"]) == (200, True)
    await run_events(http, up.url, run["runId"])
    assert (up.workspace / "a").exists()


async def test_the_first_of_many_answers_wins(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    answers = await asyncio.gather(
        *(
            resume(http, up, run, action, requestId=asked["requestId"])
            for action in ("approve", "deny", "approve", "deny")
        )
    )
    assert sorted(status for status, _ in answers) == [200, 409, 409, 409]
    (won,) = [answer["approved"] for status, answer in answers if status == 200]
    assert {answer["granted"] for status, answer in answers if status == 409} == {won}
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "permission.response")["granted"] is won
    assert (up.workspace / "a").exists() is won


async def test_a_waiting_run_holds_no_task(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    await run_events(http, up.url, (await start_run(http, up.url, "warm up"))["runId"])
    names = {task.get_coro() for task in asyncio.all_tasks()}
    provider.default = Reply(calls=[write("a")])
    runs = [await start_run(http, up.url, "go") for _ in range(5)]
    for run in runs:
        await until_status(http, up.url, run, "waiting")
    await until(lambda: not up.engine._slots)
    engine = [
        task
        for task in asyncio.all_tasks()
        if task.get_coro() not in names and "Engine" in repr(task.get_coro())
    ]
    assert engine == []
    assert len((await get_json(http, up.url, "/approvals"))["items"]) == 5


async def test_a_question_is_answered_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt", "A")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    up = await start_gateway.restart(up)
    assert up.recovered == 1
    shown = await get_json(http, up.url, f"/runs/{run['runId']}")
    assert shown["status"] == "waiting"
    status, _ = await resume(http, up, run, "approve", requestId=asked["requestId"])
    assert status == 200
    said = await run_events(http, up.url, run["runId"])
    assert len(of_type(said, "permission.request")) == 1
    assert only(said, "session.end")["status"] == "succeeded"
    assert (up.workspace / "a.txt").read_text() == "A"


async def test_a_question_expires_over_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"permissionMode": "ask", "hitlTimeoutMs": 300})
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a.txt", "A")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "permission.response")["decidedBy"] == "timeout"
    assert only(said, "session.end")["status"] == "succeeded"


# -- limits


async def test_a_run_ends_at_its_most_turns_with_its_calls_done(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, maxTurns=2)
    up = await start_gateway()
    provider.default = Reply(calls=[shell("echo x >> log")])
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    end = only(said, "session.end")
    assert (end["status"], end["reason"], end["code"], end["turnCount"]) == (
        "failed",
        "max_turns",
        "max_turns",
        2,
    )
    assert [turn["stopReason"] for turn in of_type(said, "turn.end")] == ["tool_use"] * 2
    assert (up.workspace / "log").read_text() == "x\nx\n"
    assert len(provider.requests) == 2


async def test_a_run_ends_when_its_money_is_spent(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", model="openai:gpt-4o", security=AUTO, execution={"maxCostUsd": 0.001})
    up = await start_gateway()
    provider.default = Reply(calls=[shell("true")], usage=(100_000, 10))
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    end = only(said, "session.end")
    assert (end["status"], end["reason"], end["code"]) == (
        "failed",
        "budget_exceeded",
        "budget_exceeded",
    )
    assert end["totalUsage"]["costUsd"] > 0.001
    assert len(provider.requests) == 1


async def test_a_run_ends_when_its_time_is_up_while_the_model_hangs(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", execution={"timeout": 200})
    up = await start_gateway()
    provider.reply(Reply(text=["Hm"], hang=True, hang_after=1))
    run = await start_run(http, up.url, "go")
    assert run["timeoutMs"] == 200
    said = await run_events(http, up.url, run["runId"])
    assert types(said)[-3:] == ["text.delta", "turn.interrupted", "session.end"]
    assert only(said, "turn.interrupted")["reason"] == "timeout"
    end = only(said, "session.end")
    assert (end["status"], end["reason"], end["code"]) == ("timed_out", "aborted", "timed_out")
    await provider.left()


async def test_waiting_for_a_person_takes_none_of_a_runs_time(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", execution={"timeout": 700})
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    waited_from = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() - waited_from > 0.8)
    await resume(http, up, run, "approve", requestId=asked["requestId"])
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "session.end")["status"] == "succeeded"


async def test_a_long_output_is_cut_and_says_so(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    provider.reply(
        Reply(calls=[shell("head -c 200000 /dev/zero | tr '\\0' a")]), Reply(text=["Done."])
    )
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    end = only(said, "tool.call.end")
    assert end["truncated"] is True
    assert end["outputBytesRaw"] == 200_000
    assert len(end["result"].encode()) <= OUTPUT_LIMIT_BYTES
    assert "[cut: 200000 bytes in all" in end["result"]


async def test_a_command_that_takes_too_long_is_stopped_and_the_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(calls=[shell("sleep 60", timeout_s=0.1)]), Reply(text=["Done."]))
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    end = only(said, "tool.call.end")
    assert end["isError"] is True
    assert "0.1 s" in end["result"]
    assert only(said, "session.end")["status"] == "succeeded"


def with_tools(monkeypatch: pytest.MonkeyPatch, *more: Tool) -> None:
    """Give the next gateways tools of the test's own, too."""
    monkeypatch.setattr("ownware_gateway.app.tools", lambda _: {tool.name: tool for tool in more})


async def test_a_tool_that_hangs_is_given_up_at_its_limit_and_one_that_breaks_tells_nothing(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang(_context: Context, _arguments: dict[str, Any]) -> Output:
        await asyncio.Event().wait()
        return Output("never")

    async def break_down(_context: Context, _arguments: dict[str, Any]) -> Output:
        raise RuntimeError("/internal/path")

    with_tools(
        monkeypatch,
        Tool("hang", "", {"type": "object"}, hang, timeout_s=0.05),
        Tool("break", "", {"type": "object"}, break_down),
    )
    make_profile("assistant", security=AUTO, tools={"preset": "full"})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("hang"), Call("break")]), Reply(text=["Done."]))
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    results = {end["toolName"]: end for end in of_type(said, "tool.call.end")}
    assert results["hang"]["result"] == "Stopped: hang took longer than 0.05 s."
    assert results["break"]["result"] == "break failed inside the gateway; its log says why."
    assert all(end["isError"] for end in results.values())
    assert "/internal/path" not in json.dumps(said)
    assert only(said, "session.end")["status"] == "succeeded"


# -- a provider's failures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first wait before a retry short."""
    monkeypatch.setattr("ownware_gateway.run.RETRY_S", 0.005)


async def test_a_refused_key_is_not_tried_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(status=401, error=f"Incorrect key: {FAKE_KEY}")
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    assert types(said)[-4:] == ["turn.start", "error", "turn.end", "session.end"]
    error = only(said, "error")
    assert error["code"] == "provider_error"
    assert "OPENAI_API_KEY" in error["message"]
    assert FAKE_KEY not in json.dumps(said)
    end = only(said, "session.end")
    assert (end["status"], end["reason"], end["code"]) == ("failed", "error", "provider_error")
    assert only(said, "turn.end")["stopReason"] == "error"
    assert len(provider.requests) == 1


async def test_a_rate_limit_is_waited_for_as_long_as_the_provider_says(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(status=429, headers={"Retry-After": "0.3"}))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "recovery")
    began_s = asyncio.get_running_loop().time()
    await provider.requested(2)
    assert asyncio.get_running_loop().time() - began_s > 0.2
    said = await run_events(http, up.url, run["runId"])
    recovery = only(said, "recovery")
    assert (recovery["reason"], recovery["attempt"]) == ("rate_limit", 1)
    assert "Trying again in 0.3 s." in recovery["detail"]
    assert "supersedes" not in recovery
    assert [turn["turnIndex"] for turn in of_type(said, "turn.start")] == [0]
    assert only(said, "session.end")["status"] == "succeeded"


@pytest.mark.usefixtures("quick")
async def test_a_failing_provider_is_asked_again_until_it_answers(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(status=500), Reply(status=503), Reply(status=529))
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    recoveries = [(event["reason"], event["attempt"]) for event in of_type(said, "recovery")]
    assert recoveries == [("provider_error", 1), ("provider_error", 2), ("provider_error", 3)]
    assert text(said) == "go"
    assert only(said, "session.end")["status"] == "succeeded"


@pytest.mark.usefixtures("quick")
async def test_a_provider_that_always_fails_ends_the_run(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(status=500)
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    assert len(of_type(said, "recovery")) == RETRIES_MAX
    assert len(provider.requests) == RETRIES_MAX + 1
    assert types(said)[-3:] == ["error", "turn.end", "session.end"]
    assert only(said, "session.end")["code"] == "provider_error"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        pytest.param(Reply(cut_after=-1), "connection", id="cut before an answer"),
        pytest.param(Reply(text=["x"], cut_after=0), "connection", id="cut before a delta"),
        pytest.param(Reply(error="overloaded"), "provider_error", id="error before any event"),
        pytest.param(Reply(hang=True, hang_after=-1), "connection", id="silence before headers"),
        pytest.param(Reply(hang=True), "connection", id="silence after headers"),
        pytest.param(Reply(body=b""), "connection", id="empty"),
    ],
)
async def test_a_failure_before_anything_was_shown_is_tried_again_in_the_same_turn(
    start_gateway: Gateways, http: Http, provider: Provider, reply: Reply, reason: str
) -> None:
    up = await start_gateway(model_silence_s=0.2)
    provider.reply(reply)
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    assert types(said) == [
        "user.message",
        "session.start",
        "turn.start",
        "recovery",
        "text.delta",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    recovery = only(said, "recovery")
    assert (recovery["reason"], recovery["attempt"]) == (reason, 1)
    assert text(said) == "go"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Reply(text=["Half", " of"], cut_after=1), id="cut"),
        pytest.param(
            Reply(text=["Half", " of"], delay_s=0.02, error="overloaded"), id="error in the stream"
        ),
        pytest.param(Reply(text=["Half"], hang=True, hang_after=1), id="silence"),
        pytest.param(Reply(thinking=["Hm"], cut_after=1), id="cut after thinking"),
    ],
)
async def test_a_failure_after_something_was_shown_begins_a_new_turn_that_says_so(
    start_gateway: Gateways, http: Http, provider: Provider, reply: Reply
) -> None:
    up = await start_gateway(model_silence_s=0.2)
    provider.reply(reply)
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    cut = said.index(only(said, "recovery"))
    notice, recovery, turn = said[cut - 1 : cut + 2]
    assert (notice["type"], notice["text"], notice["notice"]) == ("text.delta", NOTICE, True)
    assert (recovery["supersedes"], recovery["turnIndex"]) == (0, 0)
    assert (turn["type"], turn["turnIndex"]) == ("turn.start", 1)
    assert only(said, "session.end")["status"] == "succeeded"
    assert only(said, "session.end")["turnCount"] == 1
    _, reply_shown = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    assert reply_shown["content"] == "go"
    assert said_to(provider, 1) == [("user", "go")]
    later = await start_run(http, up.url, "more", threadId=run["threadId"])
    await run_events(http, up.url, later["runId"])
    assert said_to(provider, 2) == [("user", "go"), ("assistant", "go"), ("user", "more")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"data: {nonsense\n\n", id="no JSON"),
        pytest.param(b"data: [1, 2]\n\n", id="no object"),
        pytest.param(b'data: {"choices": "many"}\n\n', id="wrong types"),
        pytest.param(b"\xff\xfe\x00 noise \x00\n\n", id="noise"),
    ],
)
async def test_garbage_ends_the_run_and_never_the_gateway(
    start_gateway: Gateways, http: Http, provider: Provider, body: bytes
) -> None:
    up = await start_gateway()
    provider.default = Reply(body=body)
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    end = only(said, "session.end")
    assert (end["status"], end["reason"]) == ("failed", "error")
    assert only(said, "error")["code"] == "provider_error"
    provider.default = None
    said = await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    assert only(said, "session.end")["status"] == "succeeded"


# -- cancelling


async def test_a_cancel_cuts_off_a_hanging_model_at_once(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(text=["Hm"], hang=True, hang_after=1)
    took_ms = []
    for _ in range(3):
        run = await start_run(http, up.url, "go")
        await first_of(http, up, run, "text.delta")
        provider.disconnected.clear()
        status, answer = await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
        assert (status, answer["cancellation"]) == (202, "requested")
        await provider.left()
        said = await run_events(http, up.url, run["runId"])
        shown = await get_json(http, up.url, f"/runs/{run['runId']}")
        took_ms.append(shown["terminalAt"] - shown["cancelRequestedAt"])
        assert types(said)[-3:] == ["run.cancel", "turn.interrupted", "session.end"]
        assert only(said, "run.cancel")["requestedBy"] == "local"
        assert only(said, "turn.interrupted")["reason"] == "aborted"
        assert shown["status"] == "cancelled"
        status, answer = await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
        assert (status, answer["cancellation"]) == (200, "already_terminal")
    assert min(took_ms) <= 100, took_ms
    assert provider.disconnects == 3


async def test_a_waiting_run_is_cancelled_and_its_question_answered(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    status, answer = await post_json(http, up.url, f"/threads/{run['threadId']}/abort")
    assert (status, answer) == (
        200,
        {"aborted": True, "cancelRequested": True, "threadId": run["threadId"]},
    )
    said = await run_events(http, up.url, run["runId"])
    response = only(said, "permission.response")
    assert (response["granted"], response["decidedBy"]) == (False, "cancel")
    assert only(said, "tool.call.end")["isError"] is True
    assert only(said, "session.end")["status"] == "cancelled"
    status, answer = await resume(http, up, run, "approve", requestId=asked["requestId"])
    assert (status, answer["error"]) == (409, "permission_already_decided")
    assert answer["decidedBy"] == "cancel"
    assert not (up.workspace / "a").exists()


async def test_an_answer_and_a_cancel_at_the_same_time_answer_a_question_once(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.default = Reply(text=["Done."])
    for _ in range(4):
        provider.reply(Reply(calls=[write("a")]))
        run = await start_run(http, up.url, "go")
        asked = await question(http, up.url, run)
        (_, answer), *_ = await asyncio.gather(
            post_json(http, up.url, f"/runs/{run['runId']}/cancel"),
            *(resume(http, up, run, "deny", requestId=asked["requestId"]) for _ in range(3)),
        )
        said = await run_events(http, up.url, run["runId"])
        assert len(of_type(said, "permission.response")) == 1
        assert len(of_type(said, "tool.call.end")) == 1
        too_late = answer["cancellation"] == "already_terminal"
        status = "succeeded" if too_late else "cancelled"
        assert only(said, "session.end")["status"] == status


async def test_a_question_takes_no_answer_once_its_run_was_asked_to_stop(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]))
    run = await start_run(http, up.url, "go")
    asked = await question(http, up.url, run)
    cancelling = asyncio.ensure_future(up.engine.cancel(run["runId"], "test"))
    assert await up.log.wait(Stream(run["threadId"]), asked["seq"], PATIENCE_S)
    with pytest.raises(GatewayError) as refused:
        await up.engine.approvals.decide(
            run["threadId"], asked["requestId"], Decision(granted=True)
        )
    assert refused.value.code == "permission_already_decided"
    assert refused.value.details["decidedBy"] == "cancel"
    await cancelling
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "permission.response")["decidedBy"] == "cancel"


async def test_a_cancel_kills_a_command_that_ignores_sigterm(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    command = "trap '' TERM; echo $$ > pid.new; mv pid.new pid; while :; do sleep 0.05; done"
    provider.reply(Reply(calls=[shell(command)]))
    run = await start_run(http, up.url, "go")
    pid_file = up.workspace / "pid"
    await until(pid_file.exists)
    pid = int(pid_file.read_text())
    await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
    said = await run_events(http, up.url, run["runId"])
    end = only(said, "tool.call.end")
    assert (end["isError"], end["result"]) == (True, "Interrupted: the run ended.")
    assert only(said, "session.end")["status"] == "cancelled"

    def gone() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return False
        return True

    await until(gone)


async def test_a_cancelled_retry_does_not_wait(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(status=429, headers={"Retry-After": "60"}))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "recovery")
    await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "session.end")["status"] == "cancelled"
    assert len(provider.requests) == 1


# -- a run outlives its process


@pytest.mark.usefixtures("abrupt")
async def test_an_answer_cut_off_by_a_restart_is_begun_anew(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["Half"], hang=True, hang_after=1))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "text.delta")
    up = await start_gateway.restart(up)
    assert up.recovered == 1
    said = await run_events(http, up.url, run["runId"])
    recovery = only(said, "recovery")
    assert (recovery["reason"], recovery["supersedes"]) == ("restart", 0)
    assert text(said) == f"Half{NOTICE}go"
    assert len(of_type(said, "session.start")) == 1
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
    assert only(said, "session.end")["status"] == "succeeded"
    _, reply = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    assert reply["content"] == "go"


@pytest.mark.usefixtures("abrupt")
async def test_a_model_that_had_not_answered_before_a_restart_is_asked_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(hang=True))
    run = await start_run(http, up.url, "go")
    await provider.requested(1)
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert types(said) == [
        "user.message",
        "session.start",
        "turn.start",
        "recovery",
        "text.delta",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    assert only(said, "recovery")["reason"] == "restart"


@pytest.mark.usefixtures("abrupt")
async def test_a_cancel_before_a_restart_still_holds_after_it(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["Half"], hang=True, hang_after=1))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "text.delta")
    up.engine.refuse()
    cancelling = asyncio.ensure_future(post_json(http, up.url, f"/runs/{run['runId']}/cancel"))
    await first_of(http, up, run, "run.cancel")
    await cancelling
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "session.end")["status"] == "cancelled"
    assert len(provider.requests) == 1


@pytest.mark.usefixtures("abrupt")
async def test_a_tool_that_is_safe_to_repeat_runs_again_after_a_restart(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    async def first_hangs(_context: Context, _arguments: dict[str, Any]) -> Output:
        ran.append("once")
        if len(ran) == 1:
            await asyncio.Event().wait()
        return Output("done")

    tool = Tool("look", "", {"type": "object"}, first_hangs, safe_to_repeat=True)
    with_tools(monkeypatch, tool)
    make_profile("assistant", security=AUTO, tools={"preset": "full"})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("look")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    await until(lambda: ran)
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "tool.call.end")["result"] == "done"
    assert len(of_type(said, "tool.call.execute")) == 2
    assert only(said, "session.end")["status"] == "succeeded"


#: A gateway in a process of its own, to be killed; it says where it is and lives on.
SERVE: Final = """
import asyncio, json, sys
from ownware_gateway.app import gateway
from ownware_gateway.settings import load

async def main():
    async with gateway(load(environ={}, overrides=json.loads(sys.argv[1]))) as up:
        print(up.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.usefixtures("abrupt")
async def test_a_killed_gateway_goes_on_where_it_was_and_redoes_nothing(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    profiles: Path,
    tmp_path: Path,
) -> None:
    make_profile("assistant", security=AUTO)
    settings = {
        "port": 0,
        "profiles": str(profiles),
        "data_dir": str(tmp_path / "data"),
        "workspace": str(tmp_path / "work"),
        "openai_base_url": provider.base_url,
        "openai_api_key": FAKE_KEY,
    }
    # The second command ends by itself once the test is over: killing the gateway leaves it alone.
    lingers = "echo x >> second; until [ -e stop ] || [ ! -e second ]; do sleep 0.05; done"
    provider.reply(
        Reply(calls=[shell("echo x >> first", "c1")]),
        Reply(calls=[shell("echo x >> third", "c2"), shell(lingers, "c3")]),
        Reply(text=["Half"], hang=True, hang_after=1),
        Reply(text=["Done."]),
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, json.dumps(settings), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        run = await start_run(http, url, "go")
        async with open_stream(http, url, f"/runs/{run['runId']}/events") as response:
            await read_frames(
                response,
                lambda frame: (
                    '"toolCallId":"c2","toolName"' in frame.data and frame.event == "tool.call.end"
                ),
            )
        await until((tmp_path / "work" / "second").exists)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
        (tmp_path / "work" / "stop").touch()
    up = await start_gateway(workspace=settings["workspace"])
    await first_of(http, up, run, "text.delta")
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    ends = {end["toolCallId"]: end for end in of_type(said, "tool.call.end")}
    assert len(of_type(said, "tool.call.end")) == 3
    assert not ends["c1"]["isError"]
    assert not ends["c2"]["isError"]
    assert ends["c3"]["isError"]
    assert ends["c3"]["result"].startswith("Interrupted: the gateway stopped while this ran.")
    for name in ("first", "second", "third"):
        assert (tmp_path / "work" / name).read_text() == "x\n"
    assert only(said, "recovery")["supersedes"] == 2
    assert only(said, "session.end")["status"] == "succeeded"
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
    check_frames_survive(up, run, said)


def check_frames_survive(up: Gateway, run: dict[str, Any], said: Events) -> None:
    stored = rows(up, "SELECT payload FROM events ORDER BY seq")
    assert [json.loads(payload) for (payload,) in stored] == said, run


def rows(up: Gateway, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(up.data_dir / "gateway.db")) as database:
        return database.execute(sql).fetchall()


async def test_a_gateway_that_leaves_lets_the_step_under_way_end(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    command = "touch began; until [ -e go ]; do sleep 0.01; done; echo finished"
    provider.reply(Reply(calls=[shell(command)]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    await until((up.workspace / "began").exists)
    stopping = asyncio.ensure_future(start_gateway.restart(up))
    await until(lambda: up.engine._stopping)
    (up.workspace / "go").touch()
    up = await stopping
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "tool.call.end")["result"].startswith("finished")
    assert not of_type(said, "recovery")
    assert only(said, "session.end")["status"] == "succeeded"


async def test_a_drive_whose_run_was_taken_over_writes_nothing_more(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["mine", "not", "mine"], gate=gate, gate_after=1))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "text.delta")
    stream = Stream(run["threadId"])
    before = await up.log.head(stream)
    await up.log.take_over(run["runId"])
    gate.set()
    await until(lambda: not up.engine._slots)
    assert await up.log.head(stream) == before
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, run["runId"])
    assert text(said) == f"mine{NOTICE}go"


async def test_a_drive_whose_run_was_taken_over_while_tools_run_leaves_quietly(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    command = "touch began; until [ -e go ]; do sleep 0.01; done"
    provider.reply(Reply(calls=[shell(command), shell(command)]))
    run = await start_run(http, up.url, "go")
    await until((up.workspace / "began").exists)
    before = await up.log.head(Stream(run["threadId"]))
    await up.log.take_over(run["runId"])
    (up.workspace / "go").touch()
    await until(lambda: not up.engine._slots)
    assert await up.log.head(Stream(run["threadId"])) == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_what_was_loaded_from_the_log_is_what_the_model_was_asked_with(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(text=["I try."], calls=[shell("echo hi", "c1")]), Reply(text=["Done."]))
    run = await start_run(http, up.url, "go")
    await run_events(http, up.url, run["runId"])
    runs = await load(up.log, Stream(run["threadId"]))
    assert [type(message).__name__ for message in conversation(runs)] == [
        "UserTurn",
        "AssistantTurn",
        "ToolTurn",
        "AssistantTurn",
    ]


# -- whatever happens, wherever it happens

#: About as many appends as the run below has, from its first event to its last.
APPENDS: Final = 46

#: A turn with a free call and one to ask for, one with a call that changes something, an answer.
#: The free call may be repeated.
READ_CALL: Final = "call_1_1"
PROMPT: Final = "read a.txt and also run: echo x >> log; then write b.txt: B"


class Never:
    """The commit of a gateway that died before it."""

    async def wait(self) -> int:
        await asyncio.Event().wait()
        return 0


class Watch:
    """Looks at what is appended; `reached` is set with the append of this number or event type.

    A `deadly` one loses that append, and all that follow it.
    """

    def __init__(self, moment: int | str, *, deadly: bool) -> None:
        self.reached = asyncio.Event()
        self._moment = moment
        self._deadly = deadly
        self._count = 0
        self._append = SqliteLog.append

    def __call__(self, log: SqliteLog, append: Append) -> Commit:
        self._count += 1
        if self._moment in (self._count, append.events[0].type) or self.reached.is_set():
            self.reached.set()
            if self._deadly:
                return Never()
        return self._append(log, append)


@contextlib.contextmanager
def watched(moment: int | str, *, deadly: bool = False) -> Iterator[Watch]:
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(moment, deadly=deadly)
        patch.setattr(SqliteLog, "append", lambda log, append: watch(log, append))
        yield watch


async def follow_and_approve(http: Http, up: Gateway, run: dict[str, Any]) -> Events:
    """Allow whatever the run asks, and return its events."""
    said: Events = []
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        async with asyncio.timeout(PATIENCE_S):
            async for frame in frames(response):
                if frame.id is not None:
                    said.append(json.loads(frame.data))
                if frame.event == "permission.request":
                    await resume(http, up, run, "approve", requestId=said[-1]["requestId"])
    return said


async def either(task: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Wait until the task is done or the event has come."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def check_run(said: Events) -> None:
    """Fail unless the run is whole and in order."""
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
    check_whole([decode(json.dumps(event).encode()) for event in said])


@pytest.fixture
async def demo(abrupt: None, start_gateway: Gateways, make_profile: MakeProfile) -> Gateway:
    """A gateway whose profile asks the offline model, which answers the same each time."""
    make_profile("assistant", model="demo:assistant")
    up = await start_gateway()
    (up.workspace / "a.txt").write_text("A")
    return up


@pytest.mark.parametrize("number", range(2, APPENDS + 1))
async def test_a_run_survives_a_crash_at_every_append(
    start_gateway: Gateways, http: Http, demo: Gateway, number: int
) -> None:
    with watched(number, deadly=True) as watch:
        run = await start_run(http, demo.url, PROMPT)
        following = asyncio.ensure_future(follow_and_approve(http, demo, run))
        await either(following, watch.reached)
        following.cancel()
        await start_gateway.stop(demo)
    up = await start_gateway()
    said = await follow_and_approve(http, up, run)
    check_run(said)
    end = only(said, "session.end")
    assert end["status"] == "succeeded"
    interrupted = [
        end["toolName"]
        for end in of_type(said, "tool.call.end")
        if end["result"].startswith("Interrupted")
    ]
    executed = [event["toolCallId"] for event in of_type(said, "tool.call.execute")]
    changing = [call_id for call_id in executed if call_id != READ_CALL]
    assert len(changing) == len(set(changing)), "what changes something is never run twice"
    if "shell_execute" not in interrupted:
        assert (up.workspace / "log").read_text() == "x\n"
    if not interrupted:
        assert (up.workspace / "b.txt").read_text() == "B"


@pytest.mark.parametrize("number", range(1, APPENDS + 1))
async def test_a_run_cancelled_at_every_append_is_whole(
    http: Http, demo: Gateway, number: int
) -> None:
    with watched(number) as watch:
        run = await start_run(http, demo.url, PROMPT)
        following = asyncio.ensure_future(follow_and_approve(http, demo, run))
        await either(following, watch.reached)
        _, outcome = await demo.engine.cancel(run["runId"], "test")
        said = await following
    check_run(said)
    end = only(said, "session.end")
    if outcome == "already_terminal":
        assert end["status"] == "succeeded"
    else:
        assert end["status"] == "cancelled"


@pytest.mark.usefixtures("abrupt")
async def test_no_tool_has_an_effect_before_its_beginning_is_in_the_log(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    async def act(_context: Context, _arguments: dict[str, Any]) -> Output:
        ran.append("once")
        return Output("done")

    with_tools(monkeypatch, Tool("act", "", {"type": "object"}, act))
    make_profile("assistant", security=AUTO, tools={"preset": "full"})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("act")]), Reply(text=["Done."]))
    with watched("tool.call.execute", deadly=True) as watch:
        run = await start_run(http, up.url, "go")
        await asyncio.wait_for(watch.reached.wait(), PATIENCE_S)
        for _ in range(10):
            await asyncio.sleep(0)
        assert ran == []
        await start_gateway.stop(up)
    up = await start_gateway()
    said = await run_events(http, up.url, run["runId"])
    assert ran == ["once"]
    check_run(said)


async def test_a_run_whose_profile_cannot_be_read_any_more_ends(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[write("a")]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    await start_gateway.stop(up)
    with contextlib.closing(sqlite3.connect(up.data_dir / "gateway.db")) as database:
        database.execute("UPDATE private SET body = '{}' WHERE kind LIKE 'profile%'")
        database.commit()
    up = await start_gateway()
    await resume(http, up, run, "approve")
    said = await run_events(http, up.url, run["runId"])
    end = only(said, "session.end")
    assert (end["status"], end["code"]) == ("failed", "internal")
    check_run(said)


@pytest.mark.usefixtures("abrupt")
async def test_a_cancelled_run_ends_as_cancelled_even_when_its_model_is_gone(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["Half"], hang=True, hang_after=1))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "text.delta")
    with watched("turn.interrupted", deadly=True) as watch:
        cancelling = asyncio.ensure_future(up.engine.cancel(run["runId"], "test"))
        await asyncio.wait_for(watch.reached.wait(), PATIENCE_S)
        await start_gateway.stop(up)
        cancelling.cancel()
    up = await start_gateway(openai_api_key="", ollama_host="127.0.0.1:9")
    said = await run_events(http, up.url, run["runId"])
    assert only(said, "session.end")["status"] == "cancelled"
    check_run(said)


# -- secrets


async def test_secrets_never_reach_a_frame_a_message_or_a_public_table(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    up = await start_gateway(openai_api_key=SHAPELESS_KEY)
    secret = f"{SHAPED} {SHAPELESS_KEY}"
    (up.workspace / "known.txt").write_text(secret)
    provider.reply(
        Reply(
            calls=[
                shell("cat known.txt; cat known.txt >&2; exit 3"),
                write("a.txt", SHAPED),
                write("b.txt", secret),
                Call("read_file", {"path": f"missing/{SHAPED}"}),
                Call("write_file", f'{{"path": "{secret}'),
                Call("fly", {"key": secret, "password": "hunter2hunter2"}),
            ]
        ),
        Reply(calls=[Call("read_file", {"path": "known.txt"})]),
        Reply(status=400, error=f"bad key {secret}"),
    )
    run = await start_run(http, up.url, "go")
    shown = b""
    for number in (1, 2):
        asked = await question(http, up.url, run, number)
        await resume(http, up, run, "approve", requestId=asked["requestId"])
    async with http.get(f"{up.url}/api/v1/runs/{run['runId']}/events") as response:
        shown += await response.read()
    async with http.get(f"{up.url}/api/v1/threads/{run['threadId']}/messages") as response:
        shown += await response.read()
    async with http.get(f"{up.url}/api/v1/runs/{run['runId']}") as response:
        shown += await response.read()
    assert (up.workspace / "a.txt").read_text() == SHAPED, "the tool itself gets what was meant"
    assert not (up.workspace / "b.txt").exists(), "but for what is the gateway's own"
    assert b"[secret]" in shown
    public = b"".join(public_bytes(up))
    for hidden in (SHAPED, SHAPELESS_KEY, "hunter2hunter2"):
        assert hidden.encode() not in shown
        assert hidden.encode() not in public
    assert SHAPED not in json.dumps(said_to(provider, 1)[-1])


def public_bytes(up: Gateway) -> Iterable[bytes]:
    """All that stands in the log's tables, but for the private one and its own keys."""
    tables = {name for (name,) in rows(up, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {"events", "runs", "threads", "permissions", "private", "meta"} <= tables
    for table in tables - {"private", "meta"}:
        for row in rows(up, f"SELECT * FROM {table}"):
            yield from (item if isinstance(item, bytes) else str(item).encode() for item in row)


# -- the model that stands in


@pytest.fixture
async def without_key(start_gateway: Gateways) -> Gateway:
    """A gateway without a key for the profile's provider, and without a local server."""
    return await start_gateway(openai_api_key="", ollama_host="127.0.0.1:9")


async def test_the_offline_model_stands_in_where_there_is_no_key_and_says_why(
    without_key: Gateway, http: Http, provider: Provider
) -> None:
    run = await start_run(http, without_key.url, "hello")
    assert run["model"] == "demo:assistant"
    assert run["fallback"]["requestedModel"] == "openai:test-model"
    assert "OPENAI_API_KEY" in run["fallback"]["reason"]
    said = await run_events(http, without_key.url, run["runId"])
    assert only(said, "session.start")["fallback"] == run["fallback"]
    assert only(said, "session.end")["status"] == "succeeded"
    again = await start_run(http, without_key.url, "and?", threadId=run["threadId"])
    assert again["model"] == "demo:assistant"
    assert not provider.requests


async def test_a_named_model_is_never_replaced(without_key: Gateway, http: Http) -> None:
    body = {"profileId": "assistant", "prompt": "hello", "model": "openai:gpt-5.5"}
    status, answer = await post_json(http, without_key.url, "/run", body)
    assert (status, answer["error"]) == (400, "unknown_model")
    assert "OPENAI_API_KEY" in answer["message"]


async def test_nobody_stands_in_on_a_thread_that_the_real_model_began(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    run = await start_run(http, up.url, "hello")
    await run_events(http, up.url, run["runId"])
    up = await start_gateway.restart(up, openai_api_key="", ollama_host="127.0.0.1:9")
    body = {"profileId": "assistant", "prompt": "more", "threadId": run["threadId"]}
    status, answer = await post_json(http, up.url, "/run", body)
    assert (status, answer["error"]) == (400, "unknown_model")


async def test_nobody_stands_in_on_an_exposed_bind(start_gateway: Gateways) -> None:
    up = await start_gateway(host="0.0.0.0", openai_api_key="", ollama_host="127.0.0.1:9")
    assert up.access.exposed
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {up.token}"}) as caller:
        body = {"profileId": "assistant", "prompt": "hello"}
        status, answer = await post_json(caller, up.url, "/run", body)
        assert (status, answer["error"]) == (400, "unknown_model")
        run = await start_run(caller, up.url, "hello", model="demo:assistant")
        assert run["model"] == "demo:assistant"


@pytest.mark.usefixtures("abrupt")
async def test_nobody_stands_in_for_a_run_that_goes_on_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(text=["Half"], hang=True, hang_after=1))
    run = await start_run(http, up.url, "go")
    await first_of(http, up, run, "text.delta")
    up = await start_gateway.restart(up, openai_api_key="", ollama_host="127.0.0.1:9")
    said = await run_events(http, up.url, run["runId"])
    end = only(said, "session.end")
    assert (end["status"], end["code"]) == ("failed", "unknown_model")
    assert "OPENAI_API_KEY" in only(said, "error")["message"]


@pytest.mark.usefixtures("abrupt")
async def test_a_gateway_with_as_many_runs_as_it_may_have_is_overloaded(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway(runs_active_max=2)
    provider.default = Reply(hang=True)
    for _ in range(2):
        await start_run(http, up.url, "go")
    body = {"profileId": "assistant", "prompt": "one more"}
    async with http.post(f"{up.url}/api/v1/run", json=body) as response:
        answer = await response.json()
        assert (response.status, answer["error"]) == (503, "overloaded")
        assert int(response.headers["Retry-After"]) >= 1


async def test_deltas_stand_in_the_log_one_by_one_and_whole(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    pieces = [f"{number} " for number in range(3_000)]
    provider.reply(Reply(text=pieces))
    run = await start_run(http, up.url, "count")
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        said = events(await read_frames(response, "done"))
    assert text(said) == only(said, "text.complete")["text"] == "".join(pieces)
    assert [event["seq"] for event in said] == list(range(1, len(said) + 1))
