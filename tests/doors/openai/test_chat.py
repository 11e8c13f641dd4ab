"""Chat completions, plain and streamed: what is asked reaches the model, its words the client."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ownware_gateway.doors.openai.prompts import FOUND_BEGINS
from ownware_gateway.models import Options, Request, UserTurn
from ownware_gateway.models.catalogue import DEMO_ID
from ownware_gateway.models.http import Pool
from ownware_gateway.models.responses import Responses, _body
from tests.doors.openai import (
    CHAT,
    ask,
    assistant,
    chunks,
    content,
    finish,
    post,
    said,
    stream,
    streamed,
    user,
)
from tests.gateway import PATIENCE_S, Gateways, frames, get_json, read_frames
from tests.loopback import Loopback
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 20).decode()
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
CLOSELY = {"type": "image_url", "image_url": {**IMAGE["image_url"], "detail": "high"}}
AUDIO = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"},
}
PDF = {
    "type": "file",
    "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PNG}"},
}
SCHEMA = {"name": "n", "schema": {"type": "object", "properties": {}}, "strict": True}


async def test_a_completion_has_the_shape_of_openai_with_its_cost(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    answer = await ask(http, up.url, "hello", model=DEMO_ID)
    run_id = answer["run_id"]
    assert answer["id"] == f"chatcmpl-{run_id.removeprefix('run_')}"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == DEMO_ID
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert "offline model" in choice["message"]["content"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert usage["cost_usd"] == 0
    assert (await get_json(http, up.url, f"/runs/{run_id}"))["status"] == "succeeded"


async def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_mark(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(thinking=["Hm", "."], text=["One", " two"], stop="max_tokens"))
    up = await start_gateway()
    read = await streamed(http, up.url, "count", stream_options={"include_usage": True})
    first, *middle, last, usage = chunks(read)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"content": "One"},
        {"content": " two"},
    ]
    assert last["choices"][0] | {"delta": {}} == last["choices"][0]
    assert finish(read) == "length"
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 10
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert len({chunk["id"] for chunk in chunks(read)}) == 1


async def test_the_role_and_each_delta_come_while_the_model_still_speaks(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    begin, go_on = asyncio.Event(), asyncio.Event()
    provider.reply(Reply(text=["first", " second"], gate=go_on, gate_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go") as response, asyncio.timeout(PATIENCE_S):
        async for frame in frames(response):
            if frame.data == "[DONE]":
                break
            if '"first"' in frame.data:
                go_on.set()
                begin.set()
    assert begin.is_set()


async def test_what_a_client_says_before_is_what_the_model_is_told(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", soul="You are the profile.", tools={"preset": "none"})
    up = await start_gateway()
    call = {"id": "c9", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    await ask(
        http,
        up.url,
        {"role": "system", "content": "You are asked."},
        user([{"type": "text", "text": "What is it?"}, IMAGE]),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "c9", "content": "a cat"},
        assistant("A cat."),
        {"role": "developer", "content": "Be brief."},
        "Sure?",
        "Really?",
    )
    (asked,) = await provider.requested()
    system, first, called, result, answer, last = asked.body["messages"]
    assert system["content"] == "You are the profile.\n\nYou are asked.\n\nBe brief."
    assert first["content"] == [{"type": "text", "text": "What is it?"}, IMAGE]
    assert called["tool_calls"][0]["id"] == "c9"
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"at": 1}
    assert (result["role"], result["content"]) == ("tool", "a cat")
    assert answer["content"] == "A cat."
    assert last["content"] == "Sure?\n\nReally?"


async def test_a_conversation_that_the_assistant_begins_is_told_as_well(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    await ask(http, up.url, assistant("Welcome!"), "Hi")
    (asked,) = await provider.requested()
    roles = [message["role"] for message in asked.body["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert asked.body["messages"][1]["content"] == "Welcome!"


async def test_a_request_without_a_conversation_leaves_a_hidden_thread(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    answer = await ask(http, up.url, "one", assistant("two"), "three")
    run = await get_json(http, up.url, f"/runs/{answer['run_id']}")
    assert (await get_json(http, up.url, "/threads"))["items"] == []
    (thread,) = (await get_json(http, up.url, "/threads?hidden=true"))["items"]
    assert thread["id"] == run["threadId"]
    assert thread["historyTo"] == run["startSeq"] > 0
    messages = await get_json(http, up.url, f"/threads/{thread['id']}/messages")
    assert [item["content"] for item in messages] == ["one", "two", "three", "three"]


# -- options


async def test_every_option_reaches_a_model_whose_dialect_has_it(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    options: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.9,
        "stop": ["END"],
        "seed": 7,
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "reasoning_effort": "minimal",
        "verbosity": "low",
        "user": "ada",
    }
    await ask(http, up.url, "go", **options, max_tokens=9, metadata={"a": "b"}, n=1, store=True)
    (asked,) = await provider.requested()
    assert {name: asked.body[name] for name in options} == options
    assert asked.body["max_completion_tokens"] == 9
    assert "metadata" not in asked.body


async def test_anthropic_gets_the_options_under_its_own_names(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway(anthropic_base_url=provider.url, anthropic_api_key="k" * 20)
    form = {"type": "json_schema", "json_schema": SCHEMA}
    model = "anthropic:claude-sonnet-4-5"
    await ask(
        http, up.url, "go", model=model, stop="X", top_p=0.5, user="ada", response_format=form
    )
    (asked,) = await provider.requested()
    assert asked.body["stop_sequences"] == ["X"]
    assert asked.body["top_p"] == 0.5
    assert asked.body["metadata"] == {"user_id": "ada"}
    assert asked.body["output_config"]["format"] == {
        "type": "json_schema",
        "schema": SCHEMA["schema"],
    }


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        ("anthropic:claude-sonnet-4-5", {"seed": 1}, "seed"),
        ("anthropic:claude-sonnet-4-5", {"temperature": 1.5}, "temperature"),
        ("anthropic:claude-opus-5", {"top_p": 0.5}, "top_p"),
        (
            "anthropic:claude-opus-5",
            {"response_format": {"type": "json_object"}},
            "response_format",
        ),
        (DEMO_ID, {"response_format": {"type": "json_object"}}, "response_format"),
        ("openai:gpt-5", {"messages": [user([AUDIO])]}, "input_audio"),
        ("ollama:llama", {"messages": [user([AUDIO])]}, "input_audio"),
        (DEMO_ID, {"messages": [user([AUDIO]), assistant("?"), user("Now?")]}, "input_audio"),
        ("anthropic:claude-opus-5", {"messages": [user([CLOSELY])]}, "detail"),
        ("ollama:llama", {"messages": [user([CLOSELY]), assistant("?"), user("Now?")]}, "detail"),
        (DEMO_ID, {"messages": [user([CLOSELY])]}, "detail"),
        ("anthropic:claude-opus-5", {"reasoning_effort": "xhigh"}, "reasoning_effort"),
        ("ollama:llama", {"reasoning_effort": "minimal"}, "reasoning_effort"),
        ("ollama:llama", {"verbosity": "low"}, "verbosity"),
    ],
)
async def test_what_a_model_cannot_honour_is_refused_by_name_before_anything_runs(
    start_gateway: Gateways, http: Http, provider: Provider, model: str, options: Any, named: str
) -> None:
    up = await start_gateway(anthropic_base_url=provider.url, anthropic_api_key="k" * 20)
    body = {"messages": [user("go")], "model": model, **options}
    status, _, answer = await post(http, up.url, CHAT, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == named
    assert named in answer["error"]["message"]
    assert provider.requests == []
    assert (await get_json(http, up.url, "/runs"))["items"] == []


@pytest.mark.parametrize("asked", ["tool_choice", "temperature", "top_p"])
async def test_what_a_model_cannot_honour_while_its_profile_has_it_think_is_refused_too(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, asked: str
) -> None:
    make_profile("assistant", model="anthropic:claude-sonnet-4-5", thinking="high")
    up = await start_gateway(anthropic_base_url=provider.url, anthropic_api_key="k" * 20)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    value: Any = "required" if asked == "tool_choice" else 0.5
    body = {"messages": [user("go")], "tools": tools, asked: value}
    status, _, answer = await post(http, up.url, CHAT, body)
    assert (status, answer["error"]["param"]) == (400, asked)
    assert provider.requests == []
    await ask(http, up.url, "go", tools=tools, reasoning_effort="none", **{asked: value})
    assert len(provider.requests) == 1


async def test_openai_itself_is_asked_through_responses_with_what_that_has() -> None:
    """The adapter alone: its own address cannot be a server on loopback."""
    model = Responses(Pool(), provider="openai", base_url="x", key="", key_variable="", silence_s=1)
    options = Options(
        top_p=0.5,
        stop=["x"],
        seed=1,
        user="u" * 80,
        thinking="minimal",
        verbosity="low",
        response_format={"type": "json_schema", "json_schema": SCHEMA},
    )
    request = options.apply(Request("gpt-5", [UserTurn("hi")]))
    assert model.unable(request) == ["stop", "seed"]
    body = _body(request, summary=False)
    assert body["top_p"] == 0.5
    assert body["text"] == {"format": {"type": "json_schema", **SCHEMA}, "verbosity": "low"}
    assert body["reasoning"] == {"effort": "minimal"}
    assert len(body["safety_identifier"]) == 64


async def test_a_run_that_is_taken_up_again_asks_as_it_began(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["never"], gate=gate, gate_after=-1))
    up = await start_gateway()
    messages = [{"role": "system", "content": "Rhyme."}, "one", assistant("two"), "three"]
    async with stream(http, up.url, *messages, seed=5, stop="Z") as response:
        await provider.requested()
        run_id = response.headers["X-Run-Id"]
        up = await start_gateway.restart(up)
        first, again = (asked.body for asked in await provider.requested(2))
        assert first == again
        assert again["seed"] == 5
        assert again["messages"][0]["content"] == "Rhyme."
    async with http.get(f"{up.url}/api/v1/runs/{run_id}/events") as events:
        await read_frames(events, until="done")


# -- files


async def test_images_audio_and_documents_reach_a_model_that_takes_them(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway(local_base_url=provider.base_url)
    await ask(http, up.url, user([IMAGE, AUDIO, PDF]), model="local:ears")
    (asked,) = await provider.requested()
    assert asked.body["messages"][-1]["content"] == [IMAGE, AUDIO, PDF]


async def test_how_closely_an_image_is_looked_at_reaches_the_model_whenever_it_is_asked(
    start_gateway: Gateways, http: Http, provider: Provider, pictures: str
) -> None:
    up = await start_gateway(fetch_private=(pictures,))
    address = {"url": f"http://{pictures}/cat.png", "detail": "low"}
    there = {"type": "image_url", "image_url": address}
    await ask(http, up.url, user([CLOSELY, there]), assistant("A cat."), user([CLOSELY, IMAGE]))
    (asked,) = await provider.requested()
    shown = [
        part["image_url"].get("detail")
        for message in asked.body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    assert shown == ["high", "low", "high", None]


@pytest.fixture
async def pictures() -> AsyncIterator[str]:
    """A web server with an image, and with what is none."""

    async def image(_: web.Request) -> web.Response:
        return web.Response(body=base64.b64decode(PNG), content_type="image/png")

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html")

    app = web.Application()
    app.add_routes([web.get("/cat.png", image), web.get("/page", page)])
    async with Loopback(app) as server:
        yield server.url.removeprefix("http://")


async def test_an_image_at_an_address_is_fetched_and_shown(
    start_gateway: Gateways, http: Http, provider: Provider, pictures: str
) -> None:
    up = await start_gateway(fetch_private=(pictures,))
    part = {"type": "image_url", "image_url": {"url": f"http://{pictures}/cat.png"}}
    await ask(http, up.url, user([{"type": "text", "text": "What?"}, part]))
    (asked,) = await provider.requested()
    assert asked.body["messages"][-1]["content"][1] == IMAGE


@pytest.mark.parametrize(
    ("allowed", "path"), [(False, "/cat.png"), (True, "/page"), (True, "/missing")]
)
async def test_an_image_that_cannot_be_had_is_a_400_and_nothing_runs(
    start_gateway: Gateways, http: Http, pictures: str, allowed: bool, path: str
) -> None:
    up = await start_gateway(fetch_private=(pictures,) if allowed else ())
    part = {"type": "image_url", "image_url": {"url": f"http://{pictures}{path}"}}
    status, _, answer = await post(http, up.url, CHAT, {"messages": [user([part])]})
    assert status == 400
    assert "messages.0.content.0" in answer["error"]["message"]
    assert (await get_json(http, up.url, "/runs"))["items"] == []


# -- what is wrong with a request


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": [user("hi"), assistant("there")]}, "messages", "last message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "last message"),
        ({"messages": [user("  ")]}, "messages", "last message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages", "tool_call_id"),
        ({"messages": [user([{"type": "video"}])]}, "messages", "messages.0.content.0"),
        (
            {
                "messages": [
                    user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}])
                ]
            },
            "messages",
            "base64",
        ),
        (
            {"messages": [user([IMAGE | {"image_url": IMAGE["image_url"] | {"detail": "fine"}}])]},
            "messages",
            "messages.0.content.0.image_url.detail",
        ),
        ({"messages": [user([IMAGE] * 40)]}, "messages", "32 files"),
        ({"n": 2}, "n", "one answer"),
        ({"logprobs": True}, "logprobs", "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "type function"),
        ({"temperature": 3}, "temperature", "temperature"),
        ({"temprature": 1}, "temprature", "temperature"),
        ({"stop": list("abcde")}, "stop", "stop"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"reasoning_effort": "most"}, "reasoning_effort", "reasoning_effort"),
        ({"verbosity": "none"}, "verbosity", "verbosity"),
        ({"audio": {"voice": "x"}}, "audio", "audio"),
        ({"model": "nobody"}, "model", "assistant"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_runs(
    start_gateway: Gateways, http: Http, body: Any, param: str, words: str
) -> None:
    up = await start_gateway()
    given = {"messages": [user("go")], **body} if body else {}
    status, _, answer = await post(http, up.url, CHAT, given)
    assert status == (404 if param == "model" else 400)
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert (await get_json(http, up.url, "/runs"))["items"] == []


async def test_two_megabytes_of_messages_are_a_400(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    body = json.dumps({"messages": [user("x" * 1_000_000)] * 2}).encode()
    async with http.post(f"{up.url}{CHAT}", data=io.BytesIO(body)) as response:
        assert response.status == 400
        assert "characters" in (await response.json())["error"]["message"]
    assert (await get_json(http, up.url, "/runs"))["items"] == []


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"messages": NaN}'),
        *(b'{"messages": ' + b"[" * deep + b"]" * deep + b"}" for deep in (100, 940, 100_000)),
    ],
)
async def test_a_body_that_is_no_json_object_is_a_400(
    start_gateway: Gateways, http: Http, sent: bytes
) -> None:
    up = await start_gateway()
    async with http.post(f"{up.url}{CHAT}", data=sent) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_what_changes_nothing_may_be_said(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    neutral: dict[str, Any] = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "tool_choice": None,
        "parallel_tool_calls": True,
        "stream_options": None,
        "max_tokens": None,
        "stop": None,
        "seed": None,
        "modalities": ["text"],
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prediction": {"type": "content", "content": "as it was"},
    }
    assert content(await ask(http, up.url, "as it is", **neutral)) == "as it is"


# -- what goes wrong later


async def test_a_run_that_fails_is_an_error_that_nobody_sends_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(status=400, error="no such thing"))
    up = await start_gateway()
    status, headers, answer = await post(http, up.url, CHAT, {"messages": [user("go")]})
    assert status == 502
    assert answer["error"]["type"] == "server_error"
    assert answer["error"]["code"] == "provider_error"
    assert "no such thing" in answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    assert headers["X-Run-Id"]


async def test_a_failure_in_an_open_stream_is_an_error_frame_and_the_mark(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(status=400, error="no such thing"))
    up = await start_gateway()
    *_, last = chunks(await streamed(http, up.url, "go"))
    assert last["error"]["code"] == "provider_error"
    assert "no such thing" in last["error"]["message"]
    assert "choices" not in last


async def test_a_turn_that_was_cut_shows_its_notice_in_a_stream_and_is_left_out_of_the_whole(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    cut = Reply(text=["half an", " ans"], cut_after=2)
    provider.reply(cut, Reply(text=["The answer."]), cut, Reply(text=["The answer."]))
    up = await start_gateway()
    read = await streamed(http, up.url, "go")
    assert said(read) == "half an ans\n\n[interrupted, answering again]\n\nThe answer."
    assert content(await ask(http, up.url, "go")) == "The answer."


async def test_a_json_answer_that_was_cut_ends_with_an_error_frame(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "none"})
    provider.reply(Reply(text=['{"a":', " 1"], cut_after=2), Reply(text=['{"a": 1}']))
    up = await start_gateway()
    form = {"type": "json_object"}
    *_, last = chunks(await streamed(http, up.url, "go", response_format=form))
    assert last["error"]["code"] == "interrupted"


async def test_a_json_answer_holds_nothing_but_the_last_word(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"permissionMode": "auto"})
    looks = Reply(text=["Let me look."], calls=[Call("list_files", {})])
    provider.reply(looks, Reply(text=['{"a"', ": 1}"]), looks, Reply(text=['{"a": 1}']))
    up = await start_gateway()
    form = {"type": "json_object"}
    assert json.loads(said(await streamed(http, up.url, "go", response_format=form))) == {"a": 1}
    assert json.loads(content(await ask(http, up.url, "go", response_format=form))) == {"a": 1}


async def test_tools_of_the_profile_are_run_here_and_never_shown_as_calls(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security={"permissionMode": "auto"})
    provider.reply(Reply(text=["I look."], calls=[Call("list_files", {})]), Reply(text=["Done."]))
    up = await start_gateway()
    read = await streamed(http, up.url, "go")
    assert said(read) == "I look.\n\nDone."
    assert finish(read) == "stop"
    assert not any("tool_calls" in frame.data for frame in read)


# -- who answers


async def test_without_a_model_the_default_profile_answers(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile
) -> None:
    up = await start_gateway()
    make_profile("alpha")
    assert (await ask(http, up.url, "hi"))["model"] == "assistant"
    make_profile("default")
    assert (await ask(http, up.url, "hi"))["model"] == "default"


async def test_a_model_by_itself_has_neither_tools_nor_instructions(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    up = await start_gateway()
    await ask(http, up.url, "hi", model="openai:other/model:free")
    (asked,) = await provider.requested()
    assert asked.body["model"] == "other/model:free"
    assert "tools" not in asked.body
    assert [message["role"] for message in asked.body["messages"]] == ["user"]
    make_profile("plain", soul="You are plain.")
    await ask(http, up.url, "hi", model="openai:test-model")
    assert provider.requests[-1].body["messages"][0]["content"] == "You are plain."


async def test_a_profile_in_the_path_answers_with_the_model_that_is_named(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("poet", soul="Rhyme.", tools={"preset": "none"})
    up = await start_gateway()
    path = "/openai/poet/v1/chat/completions"
    for model in ("", "poet", "openai:other"):
        body = {"messages": [user("hi")], "model": model}
        status, _, answer = await post(http, up.url, path, body)
        assert status == 200, answer
    models = [asked.body["model"] for asked in provider.requests]
    assert models == ["test-model", "test-model", "other"]
    assert {asked.body["messages"][0]["content"] for asked in provider.requests} == {"Rhyme."}
    status, _, _ = await post(http, up.url, path, {"messages": [user("hi")], "model": "assistant"})
    assert status == 404


async def test_a_chat_uis_own_prompts_get_the_small_fast_model_no_tools_and_no_conversation(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", soul="You are long.", smallFastModel="openai:small")
    up = await start_gateway()
    prompt = "### Task:\nGenerate a title."
    chat = {"X-OpenWebUI-Chat-Id": "c"}
    await ask(http, up.url, prompt, headers=chat)
    (asked,) = await provider.requested()
    assert asked.body["model"] == "small"
    assert "tools" not in asked.body
    assert [message["role"] for message in asked.body["messages"]] == ["user"]
    assert (await get_json(http, up.url, "/threads"))["items"] == []
    body = {"input": prompt}
    status, sent, answer = await post(http, up.url, "/v1/responses", body, chat)
    assert (status, answer["status"], answer["conversation"]) == (200, "completed", None)
    assert "X-Conversation-Id" not in sent
    assert provider.requests[-1].body["model"] == "small"
    await streamed(http, up.url, prompt, headers=chat)
    assert provider.requests[-1].body["model"] == "small"
    assert (await get_json(http, up.url, "/threads"))["items"] == []
    up = await start_gateway.restart(up, helper_prompts=False)
    await ask(http, up.url, prompt, headers=chat)
    assert "tools" in provider.requests[-1].body
    assert len((await get_json(http, up.url, "/threads"))["items"]) == 1


async def test_a_persons_question_that_begins_like_a_chat_uis_own_is_answered_as_such(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", smallFastModel="openai:small")
    up = await start_gateway()
    prompt = f"{FOUND_BEGINS}.\n<context>\n</context>\n\nWho wrote this?"
    for ask_for in (ask, streamed):
        await ask_for(http, up.url, prompt, headers={"X-OpenWebUI-Chat-Id": "c"})
        assert provider.requests[-1].body["model"] == "test-model"
    assert len((await get_json(http, up.url, "/threads"))["items"]) == 1


async def test_a_chat_uis_own_prompts_want_none_of_the_tools_that_come_along(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", smallFastModel="ollama:small")
    up = await start_gateway(ollama_host=provider.url)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    more: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    await ask(http, up.url, "### Task:\nGenerate a title.", tools=tools, **more)
    (asked,) = await provider.requested()
    assert not {"tools", *more} & {*asked.body}
