"""Tools of the client: the model calls them, the client makes the calls, the run goes on."""

import asyncio
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.doors.openai import readers
from ownware_gateway.doors.openai.prompts import FOUND_BEGINS
from tests.doors.openai import CHAT, ask, assistant, chunks, content, finish, post, streamed, user
from tests.gateway import (
    FAKE_KEY,
    PATIENCE_S,
    Gateways,
    get_json,
    post_json,
    read_frames,
    run_events,
    until_status,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]
MakeProfile = Callable[..., Path]

CHAT_1: Final = {"X-Conversation-Id": "chat-1"}
RETRY: Final = {"x-stainless-retry-count": "1"}
SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str = "weather", **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


WEATHER: Final = Call("weather", {"city": "Rome"}, id="w1")
READ: Final = Call("read_file", {"path": "none.txt"}, id="r1")
WRITE: Final = Call("write_file", {"path": "a.txt", "content": "x"}, id="f1")
TOOLS: Final = [tool()]
DONE: Final = Reply(text=["It is sunny."])


def message(completion: Json) -> Json:
    return dict(completion["choices"][0]["message"])


def calls(completion: Json) -> list[Json]:
    assert completion["choices"][0]["finish_reason"] == "tool_calls", completion
    found: list[Json] = message(completion)["tool_calls"]
    return found


def result(call: Json, text: str = "sunny") -> Json:
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def results(completion: Json, *texts: str) -> list[Json]:
    """What a client sends back: the answer with its calls, and a result for each of them."""
    made = calls(completion)
    given = texts or ["sunny"] * len(made)
    return [message(completion), *itertools.starmap(result, zip(made, given, strict=True))]


def told(provider: Provider) -> list[tuple[str, Any]]:
    """What the model was told last: the calls of an answer, or what a message says."""
    said = []
    for item in provider.requests[-1].body["messages"]:
        made = [
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in item.get("tool_calls") or ()
        ]
        said.append((item["role"], made or item["content"]))
    return said


def offered(provider: Provider) -> list[str]:
    return [item["function"]["name"] for item in provider.requests[-1].body.get("tools", ())]


async def refused(http: Http, url: str, *messages: Any, headers: Any = None, **body: Any) -> Json:
    """Return the error of a request that is a 400."""
    said = [user(item) if isinstance(item, str) else item for item in messages]
    status, _, answer = await post(http, url, CHAT, {"messages": said, **body}, headers)
    assert status == 400, answer
    return dict(answer["error"])


def of_type(seen: Sequence[Json], event_type: str) -> Json:
    (found,) = [event for event in seen if event["type"] == event_type]
    return found


# -- there and back


@pytest.mark.parametrize("headers", [None, CHAT_1], ids=["once", "in a conversation"])
async def test_the_client_makes_the_call_and_the_same_run_goes_on(
    start_gateway: Gateways, http: Http, provider: Provider, headers: Any
) -> None:
    provider.reply(Reply(text=["I look."], calls=[WEATHER]), DONE)
    up = await start_gateway()
    first = await ask(http, up.url, "How is Rome?", headers=headers, tools=TOOLS)
    (call,) = calls(first)
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert content(first) == "I look."
    assert first["usage"]["total_tokens"] == 15
    run = await get_json(http, up.url, f"/runs/{first['run_id']}")
    assert (run["status"], run["pendingPermissions"][0]["kind"]) == ("waiting", "client")
    assert (await get_json(http, up.url, "/approvals"))["items"] == []

    last = await ask(http, up.url, "How is Rome?", *results(first), headers=headers, tools=TOOLS)
    assert (content(last), last["run_id"]) == ("It is sunny.", first["run_id"])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["total_tokens"] == 15, "the first answer was counted before"
    assert told(provider)[-3:] == [
        ("user", "How is Rome?"),
        ("assistant", [("w1", "weather", '{"city": "Rome"}')]),
        ("tool", "sunny"),
    ]
    seen = await run_events(http, up.url, first["run_id"])
    assert [event["type"] for event in seen if event["type"] not in ("text.delta",)] == [
        "user.message",
        "session.start",
        "turn.start",
        "tool.call.start",
        "tool.call.args_delta",
        "text.complete",
        "client.call",
        "client.result",
        "tool.call.end",
        "turn.end",
        "turn.start",
        "text.complete",
        "turn.end",
        "session.end",
    ]
    assert of_type(seen, "client.call")["calls"] == [{"toolCallId": "w1", "toolName": "weather"}]
    assert of_type(seen, "client.result")["results"] == [{"toolCallId": "w1", "result": "sunny"}]
    assert of_type(seen, "session.end")["totalUsage"]["outputTokens"] == 10
    assert len((await get_json(http, up.url, "/runs"))["items"]) == 1


async def test_a_stream_has_the_calls_when_they_are_whole_and_goes_on_with_the_results(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    both = [WEATHER, Call("clock", "", id="c1")]
    provider.reply(Reply(text=["I look."], calls=both), DONE)
    up = await start_gateway()
    tools = [tool(), {"type": "function", "function": {"name": "clock"}}]
    frames = await streamed(http, up.url, "How is Rome?", tools=tools)
    assert finish(frames) == "tool_calls"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(frames)]
    made = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["type"], call["function"]) for call in made] == [
        (0, "function", {"name": "weather", "arguments": '{"city": "Rome"}'}),
        (1, "function", {"name": "clock", "arguments": "{}"}),
    ]
    said = [assistant("I look.", tool_calls=made), result(made[1], "noon"), result(made[0])]
    run_id = chunks(frames)[-1]["run_id"]
    frames = await streamed(http, up.url, "How is Rome?", *said, tools=tools)
    assert (finish(frames), chunks(frames)[-1]["run_id"]) == ("stop", run_id)
    assert told(provider)[-2:] == [("tool", "sunny"), ("tool", "noon")]


async def test_a_loop_of_calls_is_one_run_that_counts_its_turns(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", maxTurns=3)
    provider.default = Reply(calls=[Call("weather", {"city": "Rome"})])
    up = await start_gateway()
    messages: list[Any] = ["Look again and again."]
    answer = await ask(http, up.url, *messages, tools=TOOLS)
    for _ in range(2):
        messages += results(answer)
        answer = await ask(http, up.url, *messages, tools=TOOLS)
    last = await ask(http, up.url, *messages, *results(answer), tools=TOOLS)
    assert (last["choices"][0]["finish_reason"], last["run_status"]) == ("length", "failed")
    assert len(provider.requests) == 3
    assert len((await get_json(http, up.url, "/runs"))["items"]) == 1


async def test_each_request_brings_its_own_tools_and_options(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), Reply(calls=[Call("map", {}, id="m1")]), DONE)
    up = await start_gateway()
    forced = {"type": "function", "function": {"name": "weather"}}
    one = await ask(
        http, up.url, "Go", tools=TOOLS, tool_choice=forced, parallel_tool_calls=False, seed=1
    )
    body = provider.requests[-1].body
    assert (body["tool_choice"], body["parallel_tool_calls"], body["seed"]) == (forced, False, 1)
    two = await ask(http, up.url, "Go", *results(one), tools=[tool("map", strict=True)])
    body = provider.requests[-1].body
    assert not {"tool_choice", "parallel_tool_calls", "seed"} & {*body}
    (strict,) = [item for item in body["tools"] if item["function"]["name"] == "map"]
    assert strict["function"]["strict"] is True
    assert "weather" not in offered(provider)
    three = await ask(
        http, up.url, "Go", *results(one), *results(two), tool_choice="required", tools=TOOLS
    )
    assert provider.requests[-1].body["tool_choice"] == "required"
    assert content(three) == "It is sunny."


async def test_no_tool_of_the_clients_is_offered_where_it_wants_none_called(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    await ask(http, up.url, "Go", tools=TOOLS, tool_choice="none")
    assert "weather" not in offered(provider)
    assert "read_file" in offered(provider)


async def test_what_the_model_wrote_reaches_the_client_to_the_letter(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    secret = "sk-" + "s" * 40
    odd = [
        Call("weather", '{"city": "Ro', id="a"),
        Call("weather", json.dumps({"city": secret}), id="b"),
        Call("weather", json.dumps({"city": "x" * 200_000}), id="c"),
        Call("weather", '{"city" : "\\ud83d\u2028é"}', id="d"),
    ]
    provider.reply(Reply(calls=odd), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    assert [call["function"]["arguments"] for call in calls(answer)] == [c.text for c in odd]
    await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    _, (_, made), *_ = told(provider)[-6:]
    wrote = [arguments for _, _, arguments in made]
    # What is no JSON goes back to a provider as JSON that holds it.
    assert (json.loads(wrote[0]), wrote[1:]) == (
        {"broken": odd[0].text},
        [call.text for call in odd[1:]],
    )
    seen = await run_events(http, up.url, answer["run_id"])
    assert secret not in json.dumps(seen)


async def test_a_secret_in_a_result_is_hidden_and_a_long_one_is_not_cut(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    given = results(answer, f"{FAKE_KEY} " + "y" * 300_000)
    await ask(http, up.url, "Go", *given, tools=TOOLS)
    assert told(provider)[-1] == ("tool", "[secret] " + "y" * 300_000)


# -- beside the gateway's own


async def test_the_gateways_own_calls_run_first_and_are_not_shown(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER, READ]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    assert [call["function"]["name"] for call in calls(answer)] == ["weather"]
    assert message(answer)["content"] is None
    await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert [role for role, _ in told(provider)[-3:]] == ["assistant", "tool", "tool"]
    seen = await run_events(http, up.url, answer["run_id"])
    types = [event["type"] for event in seen]
    assert types.index("tool.call.end") < types.index("client.call")


@pytest.mark.parametrize("headers", [None, CHAT_1], ids=["once", "in a conversation"])
async def test_a_question_is_settled_before_the_client_is_called(
    start_gateway: Gateways, http: Http, provider: Provider, headers: Any
) -> None:
    provider.reply(Reply(calls=[WEATHER, WRITE]), DONE)
    up = await start_gateway()
    first = await ask(http, up.url, "Go", headers=headers, tools=TOOLS)
    assert first["choices"][0]["finish_reason"] == "stop"
    assert first["pending_approvals"][0]["tool_name"] == "write_file"
    said = ["Go", message(first), "/approve"]
    second = await ask(http, up.url, *said, headers=headers, tools=TOOLS)
    assert (calls(second)[0]["function"]["name"], second["run_id"]) == ("weather", first["run_id"])
    last = await ask(http, up.url, *said, *results(second), headers=headers, tools=TOOLS)
    assert (content(last), last["run_id"]) == ("It is sunny.", first["run_id"])
    assert [second["usage"]["total_tokens"], last["usage"]["total_tokens"]] == [15, 15]


async def test_a_tool_with_the_name_of_one_of_the_gateways_is_the_models_beside_it(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    home = {"command": "none", "args": []}
    make_profile("assistant", tools={"preset": "readonly", "mcp": {"home": home}})
    names = ["read_file", "home__light", "client__x", "weather"]
    forced = {"type": "function", "function": {"name": "read_file"}}
    other = [f"client__{name}" for name in names[:3]]
    provider.reply(Reply(calls=[READ, *(Call(name, {}) for name in [*other, "weather"])]), DONE)
    up = await start_gateway()
    tools = [tool(name) for name in names]
    answer = await ask(http, up.url, "Go", tools=tools, tool_choice=forced)
    assert {*other, "read_file", "weather"} <= {*offered(provider)}
    assert provider.requests[-1].body["tool_choice"]["function"]["name"] == other[0]
    assert [call["function"]["name"] for call in calls(answer)] == names
    last = await ask(http, up.url, "Go", *results(answer), tools=tools, tool_choice=forced)
    assert (content(last), last["run_id"]) == ("It is sunny.", answer["run_id"])
    seen = await run_events(http, up.url, answer["run_id"])
    shown = [call["toolName"] for call in of_type(seen, "client.call")["calls"]]
    assert shown == [*other, "weather"]


async def test_an_agent_that_works_for_the_run_has_ended_and_has_none_of_the_clients_tools(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", subagents={"helper": {"profile": "helper"}})
    make_profile("helper", model="openai:small", tools={"preset": "none"})
    spawn = Call("spawn_agent", {"agent": "helper", "task": "Look."}, id="s1")
    provider.reply_as("test-model", Reply(calls=[WEATHER, spawn]), DONE)
    provider.reply_as("small", Reply(text=["Seen."]))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    assert [call["function"]["name"] for call in calls(answer)] == ["weather"]
    (below,) = [asked.body for asked in provider.requests if asked.body["model"] == "small"]
    assert "tools" not in below
    last = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert content(last) == "It is sunny."
    assert told(provider)[-2:] == [("tool", "sunny"), ("tool", "Seen.")]


async def test_a_run_that_waits_for_its_client_is_no_question_to_a_person(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=CHAT_1, tools=TOOLS)
    run_id = answer["run_id"]
    status, _, said = await post(http, up.url, f"/v1/approvals/{run_id}", {"w1": True})
    assert (status, said["error"]["code"]) == (409, "nothing_pending")
    (thread,) = (await get_json(http, up.url, "/threads"))["items"]
    resume = f"/threads/{thread['id']}/resume"
    for action in ("approve", "always"):
        status, said = await post_json(http, up.url, resume, {"action": action})
        assert (status, said["error"]) == (400, "invalid_request")
    status, said = await post_json(http, up.url, resume, {"action": "answer", "answer": "x"})
    assert status == 400, said
    status, said = await post_json(http, up.url, resume, {"action": "deny"})
    assert (status, said["approved"]) == (200, False)
    seen = await run_events(http, up.url, run_id)
    assert of_type(seen, "client.result")["results"] is None
    assert (seen[-1]["status"], seen[-1]["reason"]) == ("succeeded", "tool_use")


# -- when the results come late, or not at all


async def test_the_run_waits_through_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    up = await start_gateway.restart(up)
    last = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert (content(last), last["run_id"]) == ("It is sunny.", answer["run_id"])


@pytest.mark.parametrize("headers", [None, CHAT_1], ids=["once", "in a conversation"])
async def test_calls_that_nobody_makes_end_and_so_does_the_run_without_another_question(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    headers: Any,
) -> None:
    make_profile("assistant", security={"hitlTimeoutMs": 100})
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=headers, tools=TOOLS)
    seen = await run_events(http, up.url, answer["run_id"])
    assert of_type(seen, "client.result")["decidedBy"] == "timeout"
    assert of_type(seen, "tool.call.end")["result"] == "Nobody answered within 0.1 s."
    assert (seen[-1]["status"], seen[-1]["reason"]) == ("succeeded", "tool_use")
    assert len(provider.requests) == 1

    body = {"messages": [user("Go"), *results(answer)], "tools": TOOLS}
    status, _, last = await post(http, up.url, CHAT, body, headers)
    if headers is not None:
        # What was said in it is the gateway's to know.
        assert (status, last["error"]["code"]) == (409, "nothing_pending")
        await ask(http, up.url, "And now?", headers=headers)
        assert [role for role, _ in told(provider)] == [
            "user",
            "assistant",
            "tool",
            "assistant",
            "user",
        ]
        return
    assert (status, content(last)) == (200, "It is sunny.")
    assert last["run_id"] != answer["run_id"]
    assert told(provider)[-1] == ("tool", "sunny")


@pytest.mark.parametrize("headers", [None, CHAT_1], ids=["once", "in a conversation"])
async def test_another_message_in_place_of_the_results_ends_the_calls(
    start_gateway: Gateways, http: Http, provider: Provider, headers: Any
) -> None:
    provider.reply(Reply(calls=[WEATHER]), Reply(text=["Never mind."]))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=headers, tools=TOOLS)
    said = ["Go", message(answer), "Forget it."]
    last = await ask(http, up.url, *said, headers=headers, tools=TOOLS)
    assert content(last) == "Never mind."
    seen = await run_events(http, up.url, answer["run_id"])
    ended = of_type(seen, "tool.call.end")
    assert (ended["result"], ended["isError"]) == (
        "Superseded by the person's next message.",
        True,
    )
    assert len(provider.requests) == 2
    assert told(provider)[-1] == ("user", "Forget it.")


@pytest.mark.parametrize("headers", [None, CHAT_1], ids=["once", "in a conversation"])
async def test_another_message_in_place_of_an_approval_leaves_no_call_waiting(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    headers: Any,
) -> None:
    monkeypatch.setattr(readers, "LEFT_S", 0.0)
    provider.reply(Reply(calls=[WEATHER, WRITE]), Reply(text=["Never mind."]))
    up = await start_gateway()
    first = await ask(http, up.url, "Go", headers=headers, tools=TOOLS)
    said = ["Go", message(first), "Forget it."]
    last = await ask(http, up.url, *said, headers=headers, tools=TOOLS)
    assert content(last) == "Never mind."
    seen = await run_events(http, up.url, first["run_id"])
    assert of_type(seen, "session.end")["status"] == (
        "cancelled" if headers is None else "succeeded"
    )
    assert len(provider.requests) == 2


async def test_a_message_behind_the_results_is_answered_after_them(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE, Reply(text=["Not tomorrow."]))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=CHAT_1, tools=TOOLS)
    said = ["Go", *results(answer), "And tomorrow?"]
    last = await ask(http, up.url, *said, headers=CHAT_1, tools=TOOLS)
    assert content(last) == "Not tomorrow."
    assert [role for role, _ in told(provider)] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(
    ("calls_first", "then"),
    [
        ([WEATHER], [WEATHER]),
        ([WRITE], [WEATHER]),
        ([WRITE], [Call("ask_user", {"question": "Which?"})]),
    ],
    ids=["calls after results", "calls after a no", "a question after a no"],
)
async def test_a_message_goes_past_what_the_run_asks_while_it_waits(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    calls_first: list[Call],
    then: list[Call],
) -> None:
    provider.reply(Reply(calls=calls_first), Reply(calls=then))
    provider.default = Reply(text=["Not tomorrow."])
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=CHAT_1, tools=TOOLS)
    given = results(answer) if calls_first == [WEATHER] else [message(answer)]
    async with asyncio.timeout(PATIENCE_S):
        last = await ask(http, up.url, "Go", *given, "And tomorrow?", headers=CHAT_1, tools=TOOLS)
    assert content(last) == "Not tomorrow."
    assert last["run_id"] != answer["run_id"]
    assert told(provider)[-1] == ("user", "And tomorrow?")


async def test_calls_that_were_made_elsewhere_are_history_that_a_run_goes_on_from(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(DONE)
    broken = '{"city": "Ro'
    call = {"id": "x1", "type": "function", "function": {"name": "weather", "arguments": broken}}
    said = ["Hi", assistant("Hello."), "Go", assistant(None, tool_calls=[call]), result(call)]
    answer = await ask(http, up.url, *said, tools=TOOLS)
    assert content(answer) == "It is sunny."
    assert told(provider) == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Go"),
        ("assistant", [("x1", "weather", json.dumps({"broken": broken}))]),
        ("tool", "sunny"),
    ]
    seen = await run_events(http, up.url, answer["run_id"])
    assert seen[0]["text"] == "Go"
    assert seen[-1]["turnCount"] == 2
    again = await read_frames(await http.get(f"{up.url}{CHAT}/{answer['id']}/stream"))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks(again)][1:-1] == [
        "It is sunny."
    ]


async def test_each_result_belongs_to_the_call_before_it_where_an_id_comes_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(DONE)
    call = {"id": "x1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    again = assistant(None, tool_calls=[call])
    await ask(http, up.url, "Go", again, result(call, "rainy"), again, result(call), tools=TOOLS)
    assert [said for role, said in told(provider) if role == "tool"] == ["rainy", "sunny"]


async def test_a_conversation_that_the_client_tells_otherwise_is_another_one(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), Reply(text=["Another."]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    other = await ask(http, up.url, "Go on", *results(answer), tools=TOOLS)
    assert (content(other), told(provider)[-3]) == ("Another.", ("user", "Go on"))
    assert other["run_id"] != answer["run_id"]
    last = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert (content(last), last["run_id"]) == ("It is sunny.", answer["run_id"])


@pytest.mark.parametrize("now", ["{}Go", "Go"], ids=["found anew", "not the last any more"])
async def test_a_conversation_is_the_same_whatever_open_webui_has_found_in_files_for_it(
    start_gateway: Gateways, http: Http, provider: Provider, now: str
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    found = FOUND_BEGINS + ".\n<context>\n{}\n</context>\n\n"
    asked = chunks(await streamed(http, up.url, found.format("One.") + "Go", tools=TOOLS))
    deltas = [chunk["choices"][0]["delta"] for chunk in asked]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    said = [now.format(found.format("Two.")), assistant("", tool_calls=[call]), result(call)]
    last = await ask(http, up.url, *said, tools=TOOLS)
    assert (content(last), last["run_id"]) == ("It is sunny.", asked[-1]["run_id"])


async def test_results_that_are_sent_twice_and_no_retry_are_two_answers(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE, Reply(text=["Fair."]))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    one = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    two = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert (content(one), content(two)) == ("It is sunny.", "Fair.")


# -- streams that are cut, and retries


async def test_a_stream_with_calls_is_gone_on_with_to_the_byte(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(text=["I look."], calls=[WEATHER, Call("weather", "{", id="w2")]), DONE)
    up = await start_gateway()
    frames = await streamed(http, up.url, "Go", tools=TOOLS)
    made = [c for f in chunks(frames) for c in f["choices"][0]["delta"].get("tool_calls", ())]
    said = [assistant("I look.", tool_calls=made), *map(result, made)]
    after = await streamed(
        http, up.url, "Go", *said, tools=TOOLS, stream_options={"include_usage": True}
    )
    up = await start_gateway.restart(up)
    for whole in (frames, after):
        completion = chunks(whole)[0]["id"]
        for place in (0, len(whole) // 2, len(whole) - 2):
            headers = {"Last-Event-ID": str(whole[place].id)}
            path = f"{up.url}{CHAT}/{completion}/stream"
            async with http.get(path, headers=headers) as response:
                assert await read_frames(response) == whole[place + 1 :]


@pytest.mark.parametrize("restart", [False, True], ids=["at once", "after a restart"])
async def test_a_retry_joins_what_the_same_results_have_led_to(
    start_gateway: Gateways, http: Http, provider: Provider, restart: bool
) -> None:
    provider.reply(Reply(calls=[WEATHER]), Reply(text=["It", " is."], hang=True, hang_after=1))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=CHAT_1, tools=TOOLS)
    body = {"messages": [user("Go"), *results(answer)], "tools": TOOLS, "stream": True}
    async with http.post(f"{up.url}{CHAT}", json=body, headers=CHAT_1) as response:
        assert response.status == 200
        await provider.requested(2)
    provider.default = DONE
    if restart:
        up = await start_gateway.restart(up)
    async with http.post(f"{up.url}{CHAT}", json=body, headers={**CHAT_1, **RETRY}) as response:
        assert response.headers["X-Run-Id"] == answer["run_id"]
        if not restart:
            await post_json(http, up.url, f"/runs/{answer['run_id']}/cancel")
        frames = await read_frames(response)
    assert finish(frames) == "stop"
    assert len((await get_json(http, up.url, "/runs"))["items"]) == 1


async def test_results_with_a_key_have_the_answer_of_before(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    key = {"Idempotency-Key": "k1"}
    said = ["Go", *results(answer)]
    one = await ask(http, up.url, *said, headers=key, tools=TOOLS)
    two = await ask(http, up.url, *said, headers=key, tools=TOOLS)
    assert one == two
    assert len(provider.requests) == 2


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k1"}, RETRY], ids=["key", "retry"])
@pytest.mark.parametrize("there", [{}, CHAT_1], ids=["once", "in a conversation"])
async def test_the_same_results_at_the_same_time_are_handed_in_once(
    start_gateway: Gateways, http: Http, provider: Provider, headers: Any, there: Any
) -> None:
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", headers=there, tools=TOOLS)
    said = ["Go", *results(answer)]
    same = [ask(http, up.url, *said, headers={**there, **headers}, tools=TOOLS) for _ in range(3)]
    one, *others = await asyncio.gather(*same)
    assert (others, content(one)) == ([one, one], "It is sunny.")
    assert len(provider.requests) == 2


# -- what cannot be


CALL: Final = {"id": "x1", "type": "function", "function": {"name": "a", "arguments": "{}"}}


@pytest.mark.parametrize(
    "made",
    [
        *(5, True, "x1", {"x1": CALL}, [5], [{**CALL, "id": 5}], [CALL, CALL]),
        *([{**CALL, "function": wrong}] for wrong in ("a", 5, ["a"], {}, {"name": "a"})),
    ],
    ids=str,
)
async def test_calls_that_are_none_are_refused_by_their_place(
    start_gateway: Gateways, http: Http, provider: Provider, made: Any
) -> None:
    up = await start_gateway()
    error = await refused(http, up.url, "Hi", assistant(None, tool_calls=made), "Go")
    assert error["param"] == "messages"
    assert "'messages.1.tool_calls" in error["message"]
    assert not provider.requests


async def test_characters_count_as_what_they_are(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(DONE)
    wrote = json.dumps({"city": "я" * 200_000}, ensure_ascii=False)
    call = {**CALL, "function": {"name": "a", "arguments": wrote}}
    tools = [tool(description="я" * 200_000)]
    said = [user("Go"), assistant(None, tool_calls=[call]), result(call)]
    body = json.dumps({"messages": said, "tools": tools}, ensure_ascii=False).encode()
    async with http.post(f"{up.url}{CHAT}", data=io.BytesIO(body)) as response:
        assert content(await response.json()) == "It is sunny."


async def test_results_that_do_not_fit_the_calls_are_refused_by_name(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(calls=[WEATHER, Call("weather", "{}", id="w2")]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    one, two = calls(answer)
    said = ["Go", message(answer)]
    error = await refused(http, up.url, *said, result(one), tools=TOOLS)
    assert error["param"] == "messages"
    assert two["id"] in error["message"]
    assert one["id"] not in error["message"]
    twice = await refused(http, up.url, *said, result(one), result(one), result(two))
    assert "more than one result" in twice["message"]
    wrong = await refused(http, up.url, *said, result(one), result({"id": "call_none"}))
    assert "names no tool call" in wrong["message"]
    assert len(provider.requests) == 1
    last = await ask(http, up.url, *said, result(two), result(one), tools=TOOLS)
    assert content(last) == "It is sunny."


@pytest.mark.parametrize(
    ("param", "body", "says"),
    [
        ("tools", {"tools": [tool("home__" + "x" * 55)]}, "has the name of a tool"),
        ("tools", {"tools": [tool(), tool()]}, "more than one tool named 'weather'"),
        ("tools", {"tools": [tool("a b")]}, "tools.0.function.name"),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "type function"),
        ("tools", {"tools": [tool(parameters={"type": "array"})]}, "JSON Schema of an object"),
        ("tools", {"tools": [tool(examples=[])]}, "tools.0.function.examples"),
        ("tools", {"tools": [tool(f"t{n}") for n in range(129)]}, "128 are allowed"),
        ("tools", {"tools": [tool(description="x" * 262_144)]}, "characters of JSON"),
        ("tool_choice", {"tool_choice": "required"}, "there are no tools"),
        ("tool_choice", {"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {
            "type": "function", "function": {"name": "clock"}}}, "'clock'"),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ("functions", {"functions": [{"name": "x"}]}, "use tools"),
        ("tool_choice", {"model": "demo:assistant", "tools": TOOLS, "tool_choice": "required"},
         "demo:assistant"),
    ],
)  # fmt: skip
async def test_tools_that_cannot_be_are_refused_by_name(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    param: str,
    body: Json,
    says: str,
) -> None:
    servers = {"home": {"command": "none"}}
    make_profile("assistant", tools={"preset": "coding", "mcp": servers})
    up = await start_gateway()
    error = await refused(http, up.url, "Go", **body)
    assert (error["param"], says in error["message"]) == (param, True), error
    assert not provider.requests


async def test_results_with_options_that_cannot_be_leave_the_run_waiting(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"mcp": {"home": {"command": "none", "args": []}}})
    provider.reply(Reply(calls=[WEATHER]), DONE)
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    error = await refused(http, up.url, "Go", *results(answer), tools=[tool("home__" + "x" * 55)])
    assert "'home__x" in error["message"]
    last = await ask(http, up.url, "Go", *results(answer), tools=TOOLS)
    assert last["run_id"] == answer["run_id"]


async def test_a_cancelled_run_ends_its_calls(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    two = [WEATHER, Call("weather", "{}", id="w2")]
    provider.reply(Reply(calls=two))
    up = await start_gateway()
    answer = await ask(http, up.url, "Go", tools=TOOLS)
    await post_json(http, up.url, f"/runs/{answer['run_id']}/cancel")
    await until_status(http, up.url, {"runId": answer["run_id"]}, "cancelled")
    seen = await run_events(http, up.url, answer["run_id"])
    assert of_type(seen, "client.result")["decidedBy"] == "cancel"
    ends = [event["result"] for event in seen if event["type"] == "tool.call.end"]
    assert ends == ["Not answered: the run ended."] * 2
