"""Tools of the client through the Responses API: called, made, handed in, gone on with."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from tests.doors.openai import post, user
from tests.doors.openai.test_responses import (
    RESPONSES,
    asked_of,
    bodies,
    get,
    go_on,
    named,
    refused,
    respond,
    streamed,
    text,
)
from tests.gateway import Gateways, get_json, post_json, read_frames, run_events
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]
MakeProfile = Callable[..., Path]

SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Final = {"type": "function", "name": "weather", "parameters": SCHEMA}
TOOLS: Final = [TOOL]
WEATHER: Final = Call("weather", {"city": "Rome"}, id="w1")
CLOCK: Final = Call("clock", "", id="c1")
BOTH: Final = [TOOL, {"type": "function", "name": "clock", "parameters": None, "strict": None}]
CALLS: Final = Reply(text=["I look."], calls=[WEATHER])
DONE: Final = Reply(text=["It is sunny."])

#: The ways in which a request says what it goes on with.
WAYS: Final = (
    *("previous", "conversation", "messages", "nothing stored"),
    *("references", "words last"),
)


def calls(response: Json) -> list[Json]:
    found = [item for item in response["output"] if item["type"] == "function_call"]
    assert found, response
    return found


def results(response: Json, *texts: str) -> list[Json]:
    made = calls(response)
    given = texts or ["sunny"] * len(made)
    return [
        {"type": "function_call_output", "call_id": call["call_id"], "output": said}
        for call, said in zip(made, given, strict=True)
    ]


def first(way: str) -> Json:
    """What the first request of a way has beside its input."""
    more: Json = {"conversation": {"conversation": "chat-1"}, "nothing stored": {"store": False}}
    return {"tools": TOOLS, **more.get(way, {})}


def follows(way: str, before: Json, *more: Json, said: str = "How is Rome?") -> Json:
    """What the request has that brings the results."""
    given = [*results(before), *more]
    if way == "previous":
        return {"input": given, "previous_response_id": before["id"], "tools": TOOLS}
    if way == "references":
        given = [user(said), *map(named, before["output"]), *given]
    if way == "words last":
        words, *made = before["output"]
        given = [user(said), *made, words, *given]
    if way in ("messages", "nothing stored"):
        given = [user(said), *before["output"], *given]
    return {"input": given, **first(way)}


async def runs(http: Http, url: str) -> list[str]:
    return [item["runId"] for item in (await get_json(http, url, "/runs"))["items"]]


async def answer(http: Http, url: str, body: Json, headers: Any = None) -> Json:
    status, _, response = await post(http, url, RESPONSES, body, headers)
    assert status == 200, response
    return dict(response)


# -- there and back


@pytest.mark.parametrize("way", WAYS)
async def test_the_client_makes_the_call_and_the_same_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    assert (one["status"], text(one)) == ("completed", "I look.")
    (call,) = calls(one)
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Rome"}')
    assert call["status"] == "completed"
    assert one["usage"]["total_tokens"] == 15
    assert one["tools"] == [{**TOOL, "strict": False, "description": None}]

    two = await answer(http, up.url, follows(way, one))
    assert (text(two), two["run_id"]) == ("It is sunny.", one["run_id"])
    assert two["id"] != one["id"]
    assert two["usage"]["total_tokens"] == 15, "the first answer was counted before"
    assert [role for role, _ in asked_of(provider)[-1]] == ["user", "assistant", "tool"]
    assert asked_of(provider)[-1][-1] == ("tool", "sunny")
    assert await runs(http, up.url) == [one["run_id"]]
    for response in (one, two):
        assert await get(http, up.url, response["id"]) == (200, response)


async def test_the_items_of_a_request_with_results_are_listed(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER, CLOCK]), DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "Go", tools=BOTH)
    given = results(one, "sunny", "noon")
    two = await answer(
        http, up.url, {"input": given[::-1], "previous_response_id": one["id"], "tools": BOTH}
    )
    _, page = await get(http, up.url, f"{two['id']}/input_items?order=asc")
    shown = [(item["type"], item["call_id"], item["output"]) for item in page["data"]]
    assert shown == [(item["type"], item["call_id"], item["output"]) for item in given]
    assert asked_of(provider)[-1][-2:] == [("tool", "sunny"), ("tool", "noon")]


async def test_a_stream_tells_each_call_and_goes_on_behind_every_number(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(text=["I look."], calls=[WEATHER, CLOCK]), DONE)
    up = await start_gateway()
    read = await streamed(http, up.url, "Go", tools=BOTH)
    said = bodies(read)
    kinds = [item["type"] for item in said if "function_call" in item["type"]]
    one = "response.function_call_arguments"
    assert kinds == [f"{one}.delta", f"{one}.done"] * 2
    done = [item for item in said if item["type"] == f"{one}.done"]
    assert [item["arguments"] for item in done] == ['{"city": "Rome"}', "{}"]
    response = said[-1]["response"]
    assert [item["type"] for item in response["output"]] == [
        "message",
        "function_call",
        "function_call",
    ]
    assert [item["item_id"] for item in done] == [item["id"] for item in calls(response)]
    up = await start_gateway.restart(up)
    for number in range(-1, len(said)):
        again = bodies(await go_on(http, up.url, response["id"], number if number >= 0 else None))
        assert again == said[number + 1 :]

    rest = {"previous_response_id": response["id"], "tools": BOTH}
    read = await streamed(http, up.url, results(response), **rest)
    last = bodies(read)[-1]["response"]
    assert (text(last), last["run_id"]) == ("It is sunny.", response["run_id"])
    assert bodies(await go_on(http, up.url, last["id"])) == bodies(read)


async def test_a_background_response_ends_with_calls_that_wait(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    begun = await respond(http, up.url, "Go", tools=TOOLS, background=True)
    await go_on(http, up.url, begun["id"])
    _, one = await get(http, up.url, begun["id"])
    assert one["status"] == "completed"
    body = {**follows("previous", one), "background": True}
    two = await answer(http, up.url, body)
    await run_events(http, up.url, begun["run_id"])
    _, two = await get(http, up.url, two["id"])
    assert text(two) == "It is sunny."


async def test_each_request_brings_its_own_tools_and_choice(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    choice = {"type": "function", "name": "weather"}
    one = await respond(
        http, up.url, "Go", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
    )
    body = provider.requests[-1].body
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["parallel_tool_calls"] is False
    assert (one["tool_choice"], one["parallel_tool_calls"]) == (choice, False)
    two = await respond(http, up.url, results(one), previous_response_id=one["id"])
    body = provider.requests[-1].body
    assert "tool_choice" not in body
    assert "weather" not in [item["function"]["name"] for item in body["tools"]]
    assert (two["tools"], two["tool_choice"]) == ([], "auto")
    assert (await get(http, up.url, one["id"]))[1]["tool_choice"] == choice


async def test_the_gateways_own_calls_are_items_beside_the_clients(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    read = Call("read_file", {"path": "none.txt"}, id="r1")
    provider.reply(Reply(calls=[WEATHER, read]), DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "Go", tools=TOOLS)
    assert [item["type"] for item in one["output"]] == ["mcp_call", "function_call"]
    two = await answer(http, up.url, follows("messages", one, said="Go"))
    assert (text(two), two["run_id"]) == ("It is sunny.", one["run_id"])
    assert [item["type"] for item in two["output"]] == ["message"]


async def test_a_permission_is_settled_before_the_client_is_called(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    write = Call("write_file", {"path": "a.txt", "content": "x"}, id="f1")
    provider.reply(Reply(calls=[WEATHER, write]), DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "Go", tools=TOOLS)
    (asked,) = [item for item in one["output"] if item["type"] == "mcp_approval_request"]
    yes = {"type": "mcp_approval_response", "approval_request_id": asked["id"], "approve": True}
    two = await respond(http, up.url, [yes], previous_response_id=one["id"], tools=TOOLS)
    assert [item["type"] for item in two["output"]] == ["mcp_call", "function_call"]
    three = await answer(http, up.url, follows("previous", two))
    assert (text(three), three["run_id"]) == ("It is sunny.", one["run_id"])


# -- when the results come late, twice, or not at all


@pytest.mark.parametrize("way", WAYS)
async def test_the_run_waits_through_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    up = await start_gateway.restart(up)
    two = await answer(http, up.url, follows(way, one))
    assert (text(two), two["run_id"]) == ("It is sunny.", one["run_id"])


@pytest.mark.parametrize("way", WAYS)
async def test_a_retry_of_the_results_joins_what_they_have_led_to(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    held = asyncio.Event()
    provider.reply(CALLS, Reply(text=["It is ", "sunny."], gate=held, gate_after=1))
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    body = {**follows(way, one), "stream": True}
    retry = {"x-stainless-retry-count": "1"}
    async with (
        http.post(f"{up.url}{RESPONSES}", json=body) as first_time,
        http.post(f"{up.url}{RESPONSES}", json=body, headers=retry) as again,
    ):
        held.set()
        assert await read_frames(first_time) == await read_frames(again)
    assert len(provider.requests) == 2


async def test_results_with_a_key_have_the_answer_of_before_also_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", tools=TOOLS)
    key = {"Idempotency-Key": "k1"}
    two = await answer(http, up.url, follows("previous", one), key)
    up = await start_gateway.restart(up)
    assert await answer(http, up.url, follows("previous", one), key) == two
    assert len(provider.requests) == 2


@pytest.mark.parametrize("way", ["previous", "conversation"])
async def test_results_that_nothing_waits_for_are_refused_where_the_gateway_knows_what_was_said(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    await answer(http, up.url, follows(way, one))
    status, _, said = await post(http, up.url, RESPONSES, follows(way, one))
    assert (status, said["error"]["code"]) == (409, "nothing_pending")
    assert len(provider.requests) == 2


async def test_results_of_an_older_call_do_not_answer_a_later_one(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(CALLS, Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", tools=TOOLS)
    two = await answer(http, up.url, follows("previous", one))
    for said in (results(one), "Hm?"):
        status, error = await refused(http, up.url, said, previous_response_id=one["id"])
        assert (status, error["code"]) == (409, "permission_operation_mismatch")
    three = await answer(http, up.url, follows("previous", two))
    assert text(three) == "It is sunny."


@pytest.mark.parametrize("way", WAYS)
async def test_another_message_in_place_of_the_results_ends_the_calls(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    provider.reply(CALLS, Reply(text=["Never mind."]))
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    body = follows(way, one)
    said = [item for item in body["input"] if item.get("type") != "function_call_output"]
    two = await answer(http, up.url, {**body, "input": [*said, user("Forget it.")]})
    assert text(two) == "Never mind."
    seen = await run_events(http, up.url, one["run_id"])
    assert (seen[-1]["status"], seen[-1]["reason"]) == ("succeeded", "tool_use")
    assert asked_of(provider)[-1][-1] == ("user", "Forget it.")


@pytest.mark.parametrize("way", ["previous", "conversation"])
async def test_a_message_behind_the_results_is_answered_after_them(
    start_gateway: Gateways, http: Http, provider: Provider, way: str
) -> None:
    provider.reply(CALLS, DONE, Reply(text=["Not tomorrow."]))
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", **first(way))
    two = await answer(http, up.url, follows(way, one, user("And tomorrow?")))
    assert text(two) == "Not tomorrow."
    assert asked_of(provider)[-1][-2:] == [("assistant", "It is sunny."), ("user", "And tomorrow?")]


async def test_calls_that_nobody_makes_end_and_may_be_told_as_history(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"hitlTimeoutMs": 100})
    provider.reply(CALLS, DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "How is Rome?", tools=TOOLS)
    await run_events(http, up.url, one["run_id"])
    status, _, said = await post(http, up.url, RESPONSES, follows("previous", one))
    assert (status, said["error"]["code"]) == (409, "nothing_pending")
    two = await answer(http, up.url, follows("messages", one))
    assert text(two) == "It is sunny."
    assert two["run_id"] != one["run_id"]
    assert [item["type"] for item in two["output"]] == ["message"]
    _, page = await get(http, up.url, f"{two['id']}/input_items?order=asc")
    assert [item["type"] for item in page["data"]] == [
        "message",
        "message",
        "function_call",
        "function_call_output",
    ]


async def test_what_a_response_was_given_stays_what_it_was_when_others_follow(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(DONE, Reply(calls=[Call("read_file", {"path": "none.txt"})]), DONE)
    up = await start_gateway()
    made = {"type": "function_call", "call_id": "x1", "name": "weather", "arguments": "{}"}
    given = {"type": "function_call_output", "call_id": "x1", "output": "sunny"}
    one = await respond(http, up.url, [user("Go"), made, given], tools=TOOLS)
    page = await get(http, up.url, f"{one['id']}/input_items")
    assert len(page[1]["data"]) == 3
    await respond(http, up.url, "And now?", previous_response_id=one["id"])
    assert await get(http, up.url, f"{one['id']}/input_items") == page


async def test_calls_in_a_row_are_one_answer_of_the_model(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(DONE)
    up = await start_gateway()
    made = [
        {"type": "function_call", "call_id": name, "name": "weather", "arguments": "{}"}
        for name in ("x1", "x2")
    ]
    given = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"}
        for item in made
    ]
    said = {"type": "message", "role": "assistant", "content": "I look."}
    await respond(http, up.url, [user("Go"), said, *made, *given], tools=TOOLS)
    (_, asked, *rest) = [
        item for item in provider.requests[-1].body["messages"] if item["role"] != "system"
    ]
    assert (asked["content"], [call["id"] for call in asked["tool_calls"]]) == (
        "I look.",
        ["x1", "x2"],
    )
    assert [item["tool_call_id"] for item in rest] == ["x1", "x2"]


# -- what is refused


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "of type function"),
        ({"tools": [{"type": "function"}]}, "tools", "'tools.0.name' must be"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools", "'tools.0.defer_loading'"),
        ({"tools": [TOOL, TOOL]}, "tools", "more than one tool named 'weather'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "names no tool",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice",
            "must be auto, none, required, or a function",
        ),
    ],
)
async def test_tools_that_cannot_be_are_refused_by_name_and_nothing_runs(
    start_gateway: Gateways, http: Http, provider: Provider, body: Json, param: str, words: str
) -> None:
    up = await start_gateway()
    status, error = await refused(http, up.url, "Go", **body)
    assert (status, error["param"]) == (400, param)
    assert words in error["message"]
    assert await runs(http, up.url) == []


async def test_results_that_do_not_fit_the_calls_are_refused_and_the_run_waits(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER, CLOCK]), DONE)
    up = await start_gateway()
    one = await respond(http, up.url, "Go", tools=BOTH)
    given = results(one, "sunny", "noon")
    rest = {"previous_response_id": one["id"], "tools": BOTH}
    status, error = await refused(http, up.url, given[:1], **rest)
    assert (status, error["param"]) == (400, "input")
    assert calls(one)[1]["call_id"] in error["message"]
    status, error = await refused(http, up.url, [given[0], given[0]], **rest)
    assert status == 400
    odd = {"type": "function_call_output", "call_id": "x", "output": "?"}
    status, error = await refused(http, up.url, [odd], **rest)
    assert (status, error["code"]) == (409, "nothing_pending")
    status, error = await refused(http, up.url, [odd])
    assert (status, error["param"]) == (400, "input")
    assert "'input.0.call_id' names no tool call before it" in error["message"]
    two = await respond(http, up.url, given, **rest)
    assert text(two) == "It is sunny."


async def test_results_alone_do_not_begin_a_conversation(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    odd = {"type": "function_call_output", "call_id": "x", "output": "?"}
    status, error = await refused(http, up.url, [odd], conversation="chat-1")
    assert (status, error["param"]) == (400, "input")
    assert "'input.0.call_id' names no tool call before it" in error["message"]
    assert not provider.requests


@pytest.mark.parametrize(
    "item",
    [
        {"type": []},
        {"type": {}, "role": "user", "content": "x"},
        {"type": "function_call", "call_id": [], "name": "x", "arguments": "{}"},
        {"type": "function_call_output", "call_id": {}, "output": "x"},
    ],
    ids=str,
)
async def test_items_that_are_none_are_refused(
    start_gateway: Gateways, http: Http, item: Json
) -> None:
    up = await start_gateway()
    status, error = await refused(http, up.url, [user("Go"), item])
    assert (status, error["param"]) == (400, "input")
    assert "input.1" in error["message"]


async def test_calls_may_be_declined_by_another_door(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(CALLS)
    up = await start_gateway()
    one = await respond(http, up.url, "Go", conversation="chat-1", tools=TOOLS)
    (thread,) = (await get_json(http, up.url, "/threads"))["items"]
    await post_json(http, up.url, f"/threads/{thread['id']}/resume", {"action": "deny"})
    seen = await run_events(http, up.url, one["run_id"])
    assert json.dumps(seen).count('"client.result"') == 1
    assert (seen[-1]["status"], seen[-1]["reason"]) == ("succeeded", "tool_use")
