"""The Responses API through a gateway: what is asked, kept, gone on with, answered, refused."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import stream as stream_module
from ownware_gateway.doors.openai import readers, responses
from ownware_gateway.sse import Frame
from tests.doors.openai import post, user
from tests.doors.openai.test_resume import cut_streams, until_end
from tests.gateway import FAKE_KEY, Gateways, frames, get_json, read_frames, run_events
from tests.pictures import png
from tests.provider import Call, Provider, Reply
from tests.reliability.process import served

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

RESPONSES: Final = "/v1/responses"
WRITE: Final = Reply(text=["I write."], calls=[Call("write_file", {"path": "a", "content": "x"})])
AUTO: Final = {"permissionMode": "auto"}


async def respond(
    http: Http, url: str, said: Any, *, headers: dict[str, str] | None = None, **body: Any
) -> dict[str, Any]:
    """Return a response, which must be a 200."""
    status, _, answer = await post(http, url, RESPONSES, {"input": said, **body}, headers)
    assert status == 200, answer
    return dict(answer)


async def refused(http: Http, url: str, said: Any, **body: Any) -> tuple[int, Any]:
    """Return the status and the error of a request that is refused."""
    status, _, answer = await post(http, url, RESPONSES, {"input": said, **body})
    return status, answer["error"]


async def get(http: Http, url: str, path: str) -> tuple[int, Any]:
    async with http.get(f"{url}{RESPONSES}/{path}") as response:
        return response.status, await response.json()


@contextlib.asynccontextmanager
async def stream(http: Http, url: str, said: Any, **body: Any) -> AsyncIterator[Any]:
    asked = {"input": said, "stream": True, **body}
    async with http.post(f"{url}{RESPONSES}", json=asked) as response:
        assert response.status == 200, await response.text()
        yield response


async def streamed(http: Http, url: str, said: Any, **body: Any) -> list[Frame]:
    async with stream(http, url, said, **body) as response:
        return await read_frames(response)


async def go_on(
    http: Http, url: str, name: str, after: int | None = None, last_event_id: str | None = None
) -> list[Frame]:
    """Return what a stream is gone on with behind a number, or a cursor."""
    query = {"stream": "true"} | ({"starting_after": str(after)} if after is not None else {})
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    path = f"{url}{RESPONSES}/{name}"
    async with http.get(path, params=query, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await read_frames(response)


def bodies(read: list[Frame]) -> list[dict[str, Any]]:
    assert read[-1].data == "[DONE]", read
    return [json.loads(frame.data) for frame in read[:-1]]


def text(response: dict[str, Any]) -> str:
    """Return what OpenAI's clients call `output_text`."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def named(item: dict[str, Any]) -> dict[str, str]:
    """Return an item as clients name it that rely on what is stored."""
    return {"type": "item_reference", "id": item["id"]}


def asked_of(provider: Provider) -> list[list[Any]]:
    """Return the messages of all requests to the model, without its instructions."""
    return [
        [(m["role"], m["content"]) for m in asked.body["messages"] if m["role"] != "system"]
        for asked in provider.requests
    ]


async def listed(http: Http, url: str) -> list[str]:
    return [item["id"] for item in (await get_json(http, url, "/threads"))["items"]]


# -- asking


async def test_a_text_becomes_a_response(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(thinking=["Hm"], text=["Hel", "lo"]))
    up = await start_gateway()
    got = await respond(http, up.url, "Hi", model="assistant", metadata={"a": "b"}, user="ada")
    assert (got["object"], got["status"], got["model"]) == ("response", "completed", "assistant")
    assert [item["type"] for item in got["output"]] == ["reasoning", "message"]
    assert text(got) == "Hello"
    assert got["usage"]["total_tokens"] == 15
    assert (got["metadata"], got["user"]) == ({"a": "b"}, "ada")
    assert await get(http, up.url, got["id"]) == (200, got)


async def test_items_reach_the_model_as_what_they_are(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    picture = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"id": "rs_1", "type": "reasoning", "summary": []},
        {"id": "m", "type": "message", "role": "assistant", "status": "incomplete", "content": []},
        {
            "id": "mcp_1",
            "type": "mcp_call",
            "server_label": "ownware",
            "name": "glob",
            "arguments": "{}",
            "output": "a.txt",
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "three"},
                {"type": "input_image", "image_url": picture, "detail": "auto"},
                {"type": "input_image", "image_url": picture, "detail": "low"},
            ],
        },
    ]
    got = await respond(http, up.url, items, instructions="Be brief.", temperature=0.5)
    asked = provider.requests[0].body
    assert asked["temperature"] == 0.5
    system, first, called, result, second, last = asked["messages"]
    assert system["content"].endswith("Be brief.\n\nBe kind.")
    assert (first["content"], second["content"]) == ("one", "two")
    assert called["tool_calls"][0]["function"] == {"name": "glob", "arguments": "{}"}
    assert result["content"] == "a.txt"
    assert [part["type"] for part in last["content"]] == ["text", "image_url", "image_url"]
    assert [part["image_url"].get("detail") for part in last["content"][1:]] == [None, "low"]
    _, listing = await get(http, up.url, f"{got['id']}/input_items?order=asc")
    kinds = [item["type"] for item in listing["data"]]
    assert kinds == ["message", "function_call", "function_call_output", "message", "message"]
    shown = listing["data"][-1]["content"][1:]
    assert [part["image_url"] for part in shown] == [picture, picture]
    assert [part["detail"] for part in shown] == ["auto", "low"]


async def test_input_items_come_in_pages_the_newest_first(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    said = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    name = (await respond(http, up.url, said))["id"]
    _, first = await get(http, up.url, f"{name}/input_items?limit=2")
    _, rest = await get(http, up.url, f"{name}/input_items?limit=2&after={first['last_id']}")
    texts = [item["content"][0]["text"] for item in [*first["data"], *rest["data"]]]
    assert texts == ["three", "two", "one"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    status, _ = await get(http, up.url, f"{name}/input_items?after=nothing")
    assert status == 400


async def test_an_answer_may_have_to_be_json(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "point", "schema": schema, "strict": True}
    got = await respond(http, up.url, '{"x":1}', text={"format": form})
    assert provider.requests[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "point", "schema": schema, "strict": True},
    }
    assert text(got) == '{"x":1}'
    assert got["text"]["format"] == {**form, "description": None}


async def test_tools_of_the_profile_are_items_that_no_client_runs(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    provider.reply(WRITE, Reply(calls=[Call("read_file", {"path": "no"})]), Reply(text=["Done."]))
    up = await start_gateway()
    got = await respond(http, up.url, "go")
    written, failed = (item for item in got["output"] if item["type"] == "mcp_call")
    assert (written["server_label"], written["name"]) == ("ownware", "write_file")
    assert json.loads(written["arguments"]) == {"path": "a", "content": "x"}
    assert (written["status"], written["error"], failed["status"]) == ("completed", None, "failed")
    assert failed["error"]["type"] == "mcp_tool_execution_error"
    assert text(got) == "I write.Done."


# -- streams


async def test_a_stream_goes_on_behind_every_number_also_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    looks = Reply(thinking=["Hm"], text=["I", " look."], calls=[Call("list_files", {})])
    provider.reply(looks, Reply(text=["cut"], cut_after=1), Reply(text=["Done", "."]))
    up = await start_gateway()
    whole = await streamed(http, up.url, "go")
    told = bodies(whole)
    assert [body["sequence_number"] for body in told] == list(range(len(told)))
    assert [frame.event for frame in whole[:-1]] == [body["type"] for body in told]
    last = told[-1]["response"]
    assert text(last) == "I look.Done."
    up = await start_gateway.restart(up)
    assert await go_on(http, up.url, last["id"]) == whole
    for number in range(len(told)):
        rest = whole[number + 1 :]
        assert await go_on(http, up.url, last["id"], number) == rest
        assert await go_on(http, up.url, last["id"], last_event_id=whole[number].id) == rest
    assert await get(http, up.url, last["id"]) == (200, last)
    assert len((await get_json(http, up.url, "/runs"))["items"]) == 1


async def test_a_stream_that_is_cut_anywhere_is_gone_on_with_to_the_same_end(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    await cut_and_go_on(start_gateway, http, provider, responses=3, cuts=6)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_stream_that_is_cut_thirty_times_is_gone_on_with_to_the_same_end(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    await cut_and_go_on(start_gateway, http, provider, responses=50, cuts=30)


async def cut_and_go_on(
    start_gateway: Gateways, http: Http, provider: Provider, *, responses: int, cuts: int
) -> None:
    up = await start_gateway()
    async for prompt, url, whole in cut_streams(up.url, provider, responses, cuts):
        body = {"input": prompt, "stream": True}
        read, headers = await until_end(http.post(f"{url}{RESPONSES}", json=body))
        name = f"resp_{headers['X-Run-Id'].removeprefix('run_')}"
        while not read or read[-1].data != "[DONE]":
            query = {"stream": "true", "starting_after": str(len(read) - 1)}
            if not read:
                del query["starting_after"]
            more, _ = await until_end(http.get(f"{url}{RESPONSES}/{name}", params=query))
            read += more
        told = bodies(read)
        assert [body["sequence_number"] for body in told] == list(range(len(told)))
        assert text(told[-1]["response"]) == whole
        deltas = [body["delta"] for body in told if body["type"] == "response.output_text.delta"]
        assert "".join(deltas) == whole
    assert len((await get_json(http, up.url, "/runs"))["items"]) == min(responses, 50)


async def test_a_stream_that_the_gateway_leaves_says_so_and_goes_on_afterwards(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    cut = Reply(text=["one ", "two"], hang=True, hang_after=1)
    provider.reply(cut, Reply(text=["again"]))
    up = await start_gateway()
    read: list[Frame] = []
    async with stream(http, up.url, "go") as response:
        coming = frames(response)
        async for frame in coming:
            read.append(frame)
            if "one" in frame.data:
                break
        stopping = asyncio.ensure_future(start_gateway.restart(up))
        read += [frame async for frame in coming]
        up = await stopping
    *seen, wrong, done = read
    error = json.loads(wrong.data)
    assert (wrong.event, error["code"], done.data) == ("error", "shutting_down", "[DONE]")
    name = json.loads(seen[0].data)["response"]["id"]
    more = bodies(await go_on(http, up.url, name, error["sequence_number"]))
    assert more[0]["sequence_number"] == len(seen)
    assert text(more[-1]["response"]) == "again"
    cut_off, _ = more[-1]["response"]["output"]
    assert cut_off["status"] == "incomplete"


async def test_a_run_that_fails_is_an_error_a_failed_response_and_the_last_frame(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.default = Reply(status=400, error="no such thing")
    up = await start_gateway()
    status, error = await refused(http, up.url, "go")
    assert (status, error["code"]) == (502, "provider_error")
    last = bodies(await streamed(http, up.url, "go"))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "no such thing" in last["response"]["error"]["message"]
    assert await get(http, up.url, last["response"]["id"]) == (200, last["response"])


async def test_a_retry_joins_the_response_that_is_under_way(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate, gate_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go") as first:
        run_id = first.headers["X-Run-Id"]
    again = {"x-stainless-retry-count": "1"}
    body = {"input": "go", "stream": True}
    async with http.post(f"{up.url}{RESPONSES}", json=body, headers=again) as second:
        assert second.headers["X-Run-Id"] == run_id
        gate.set()
        assert text(bodies(await read_frames(second))[-1]["response"]) == "one two"


async def test_an_idempotency_key_gives_the_response_of_the_first_time(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    key = {"Idempotency-Key": "k1"}
    first = await respond(http, up.url, "go", headers=key)
    assert await respond(http, up.url, "go", headers=key) == first


@pytest.mark.parametrize(("store", "ends"), [(True, "succeeded"), (False, "cancelled")])
async def test_what_is_stored_goes_on_without_readers_and_what_is_not_does_not(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    store: bool,
    ends: str,
) -> None:
    monkeypatch.setattr(readers, "LEFT_S", 0.02)
    monkeypatch.setattr(stream_module, "LOOK_S", 0.02)
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate, gate_after=1))
    up = await start_gateway()
    async with stream(http, up.url, "go", store=store) as response:
        run_id = response.headers["X-Run-Id"]
        await provider.requested()
    if store:
        # Longer than a run that is for nobody else is left.
        await asyncio.sleep(readers.LEFT_S * 5)
        gate.set()
    assert (await run_events(http, up.url, run_id))[-1]["status"] == ends


# -- later


async def test_a_background_response_answers_at_once_and_is_got_when_it_is_there(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one ", "two"], gate=gate))
    up = await start_gateway()
    got = await respond(http, up.url, "go", background=True)
    assert got["status"] in ("queued", "in_progress")
    assert (got["background"], got["usage"]) == (True, None)
    gate.set()
    told = bodies(await go_on(http, up.url, got["id"]))
    kinds = [body["type"] for body in told[:3]]
    assert kinds == ["response.created", "response.queued", "response.in_progress"]
    assert told[0]["response"]["status"] == "queued"
    assert await get(http, up.url, got["id"]) == (200, told[-1]["response"])
    assert text(told[-1]["response"]) == "one two"


async def test_a_background_response_outlives_the_death_of_the_gateway(
    tmp_path: Path, provider: Provider, http: Http
) -> None:
    provider.reply(Reply(text=["one ", "two"], hang=True, hang_after=1), Reply(text=["again"]))
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": FAKE_KEY}
    async with served(tmp_path, environment=environment) as gateway:
        body = {"background": True, "stream": True, "model": "openai:test-model"}
        read: list[Frame] = []
        with contextlib.suppress(aiohttp.ClientError):
            async with stream(http, gateway.url, "go", **body) as response:
                async for frame in frames(response):
                    read.append(frame)
                    if "one" in frame.data:
                        gateway.kill()
        await gateway.died(1)
        await gateway.up.wait()
        name = json.loads(read[0].data)["response"]["id"]
        more = await go_on(http, gateway.url, name, len(read) - 1)
        whole = await go_on(http, gateway.url, name)
        assert [*read, *more] == whole
        assert text(bodies(whole)[-1]["response"]) == "again"


async def test_a_response_is_cancelled(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(text=["one"], hang=True, hang_after=1))
    up = await start_gateway()
    got = await respond(http, up.url, "go", background=True)
    await provider.requested()
    cancel = f"{RESPONSES}/{got['id']}/cancel"
    status, _, told = await post(http, up.url, cancel, {})
    assert (status, told["status"]) == (200, "cancelled")
    assert (await post(http, up.url, cancel, {}))[2] == told
    last = bodies(await go_on(http, up.url, got["id"]))[-1]
    assert (last["type"], last["response"]) == ("response.incomplete", told)


# -- going on


async def test_a_response_goes_on_with_the_one_before_it_in_its_thread(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one", instructions="Shout.")
    up = await start_gateway.restart(up)
    second = await respond(http, up.url, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    said = [("user", "one"), ("assistant", "one"), ("user", "two")]
    assert asked_of(provider)[-1] == said
    assert "Shout." not in json.dumps(provider.requests[-1].body), "they are not carried over"
    assert len(await listed(http, up.url)) == 1
    _, given = await get(http, up.url, f"{second['id']}/input_items")
    assert [item["content"][0]["text"] for item in given["data"]] == ["two"]


async def test_who_answered_before_answers_again_where_nobody_is_named(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile
) -> None:
    make_profile("zoe")
    up = await start_gateway()
    first = await respond(http, up.url, "one", model="zoe")
    second = await respond(http, up.url, "two", previous_response_id=first["id"])
    assert second["model"] == "zoe"


async def test_one_that_goes_on_with_an_older_response_forks(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one")
    await respond(http, up.url, "two", previous_response_id=first["id"])
    other = await respond(http, up.url, "three", previous_response_id=first["id"])
    assert asked_of(provider)[-1] == [("user", "one"), ("assistant", "one"), ("user", "three")]
    assert len(await listed(http, up.url)) == 2
    fourth = await respond(http, up.url, "four", previous_response_id=other["id"])
    assert [said for _, said in asked_of(provider)[-1]] == ["one", "one", "three", "three", "four"]
    assert len(await listed(http, up.url)) == 2
    assert await get(http, up.url, fourth["id"]) == (200, fourth)


async def test_two_at_once_that_go_on_with_the_same_response_do_not_see_each_other(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one")
    more = [respond(http, up.url, said, previous_response_id=first["id"]) for said in "abc"]
    assert sorted(text(got) for got in await asyncio.gather(*more)) == ["a", "b", "c"]
    assert all(len(said) == 3 for said in asked_of(provider)[1:])


async def test_one_that_goes_on_with_a_response_under_way_waits_for_it(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one"], gate=gate))
    up = await start_gateway()
    first = await respond(http, up.url, "go", background=True)
    second = asyncio.ensure_future(respond(http, up.url, "two", previous_response_id=first["id"]))
    await provider.requested()
    gate.set()
    assert text(await second) == "two"
    assert asked_of(provider)[-1] == [("user", "go"), ("assistant", "one"), ("user", "two")]


async def test_a_fork_whose_start_is_refused_leaves_no_thread(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one")
    await respond(http, up.url, "two", previous_response_id=first["id"])
    there = await listed(http, up.url)
    more = {"previous_response_id": first["id"], "model": "demo:assistant"}
    status, error = await refused(
        http, up.url, "x", text={"format": {"type": "json_object"}}, **more
    )
    assert (status, error["param"]) == (400, "text")
    assert await listed(http, up.url) == there


@pytest.mark.parametrize("name", ["chat-1", {"id": "chat-1"}])
async def test_a_conversation_is_a_thread_that_all_doors_know(
    start_gateway: Gateways, http: Http, provider: Provider, name: Any
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one", conversation=name)
    assert first["conversation"] == {"id": "chat-1"}
    chat = {"messages": [user("two")]}
    named = {"X-Conversation-Id": "chat-1"}
    status, _, _ = await post(http, up.url, "/v1/chat/completions", chat, named)
    assert status == 200
    await respond(http, up.url, "three", headers=named)
    assert [said for _, said in asked_of(provider)[-1]] == ["one", "one", "two", "two", "three"]


async def test_who_names_a_conversation_by_a_header_may_say_again_what_was_said(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    named = {"X-OpenWebUI-Chat-Id": "chat-1"}
    await respond(http, up.url, "one", headers=named)
    again = [user("one"), {"role": "assistant", "content": "one"}, user("two")]
    await respond(http, up.url, again, headers=named)
    assert [said for _, said in asked_of(provider)[-1]] == ["one", "one", "two"]
    status, error = await refused(http, up.url, again, conversation="chat-1")
    assert (status, error["param"]) == (400, "input")


async def test_what_is_not_stored_is_hidden_and_cannot_be_gone_on_with(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    got = await respond(http, up.url, "one", store=False)
    assert got["store"] is False
    assert await listed(http, up.url) == []
    status, error = await refused(http, up.url, "two", previous_response_id=got["id"])
    assert (status, error["param"]) == (404, "previous_response_id")


# -- people


async def test_a_permission_is_an_approval_request_and_its_answer_the_next_response(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(text=["Done."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    request = first["output"][-1]
    assert (first["status"], request["type"]) == ("completed", "mcp_approval_request")
    assert json.loads(request["arguments"]) == {"path": "a", "content": "x"}
    assert first["pending_approvals"][0]["request_id"] == request["id"]
    up = await start_gateway.restart(up)
    assert await get(http, up.url, first["id"]) == (200, first)
    answer = {
        "type": "mcp_approval_response",
        "approval_request_id": request["id"],
        "approve": True,
    }
    second = await respond(http, up.url, [answer], previous_response_id=first["id"])
    call, said = second["output"]
    assert (call["approval_request_id"], call["status"]) == (request["id"], "completed")
    assert json.loads(call["arguments"]) == {"path": "a", "content": "x"}
    assert (said["content"][0]["text"], second["previous_response_id"]) == ("Done.", first["id"])
    assert await get(http, up.url, second["id"]) == (200, second)
    _, given = await get(http, up.url, f"{second['id']}/input_items")
    (item,) = given["data"]
    assert (item["approval_request_id"], item["approve"]) == (request["id"], True)
    status, error = await refused(http, up.url, [answer], previous_response_id=first["id"])
    assert (status, error["code"]) == (409, "permission_already_decided")
    third = await respond(http, up.url, "thanks", previous_response_id=second["id"])
    assert text(third) == "thanks"


async def test_a_permission_may_be_denied_where_the_client_keeps_the_conversation(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(text=["Then not."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go", store=False)
    answer = {
        "type": "mcp_approval_response",
        "approval_request_id": first["output"][-1]["id"],
        "approve": False,
        "reason": "too risky",
    }
    second = await respond(http, up.url, [user("go"), *first["output"], answer], store=False)
    call, said = second["output"]
    assert (call["status"], said["content"][0]["text"]) == ("failed", "Then not.")
    assert "too risky" in call["error"]["content"][0]["text"]


async def test_what_was_answered_before_is_history_where_the_client_keeps_the_conversation(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(text=["Done."]))
    up = await start_gateway()
    tools = [OWN]
    first = await respond(http, up.url, "go", tools=tools)
    assert first["tools"] == []
    answer = {**ANSWER, "approval_request_id": first["output"][-1]["id"]}
    said = [user("go"), *first["output"], answer]
    second = await respond(http, up.url, said, tools=tools)
    assert text(second) == "Done."
    third = await respond(http, up.url, [*said, *second["output"], user("thanks")], tools=tools)
    assert text(third) == "thanks"
    roles = ["user", "assistant", "assistant", "tool", "assistant", "user"]
    assert [role for role, _ in asked_of(provider)[-1]] == roles


async def test_any_other_message_denies_and_is_answered_itself(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(text=["Not then."]), Reply(text=["Four."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    second = await respond(http, up.url, "2 + 2?", previous_response_id=first["id"])
    assert text(second) == "Four."
    assert len(await listed(http, up.url)) == 1


async def test_what_an_agent_below_asks_is_asked_and_answered_here(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, subagents={"helper": {"profile": "helps"}})
    make_profile("helps", model="openai:helps-model")
    spawn = Call("spawn_agent", {"agent": "helper", "task": "write"})
    provider.reply(Reply(calls=[spawn]), Reply(text=["It has."]))
    provider.reply_as("helps-model", WRITE, Reply(text=["Written."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    *_, request = first["output"]
    assert (request["type"], request["name"]) == ("mcp_approval_request", "write_file")
    answer = {
        "type": "mcp_approval_response",
        "approval_request_id": request["id"],
        "approve": True,
    }
    second = await respond(http, up.url, [answer], stream=False)
    assert text(second) == "It has."
    assert await get(http, up.url, second["id"]) == (200, second)


async def test_a_response_that_waits_for_a_person_may_be_cancelled_and_stays_what_it_was(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE)
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    status, _, told = await post(http, up.url, f"{RESPONSES}/{first['id']}/cancel", {})
    assert (status, told) == (200, first)
    assert (await run_events(http, up.url, first["run_id"]))[-1]["status"] == "cancelled"


async def test_a_question_in_words_is_a_message_and_the_next_text_its_answer(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    question = {"question": "Which one?", "options": ["green", "red"]}
    provider.reply(Reply(calls=[Call("ask_user", question)]), Reply(text=["Red it is."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    assert text(first).startswith("Which one?\n1. green")
    assert first["pending_questions"][0]["options"] == ["green", "red"]
    second = await respond(http, up.url, "red", previous_response_id=first["id"])
    assert text(second) == "Red it is."
    _, given = await get(http, up.url, f"{second['id']}/input_items")
    assert given["data"][0]["content"][0]["text"] == "red"


async def test_an_old_response_does_not_answer_a_question_that_came_later(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, WRITE)
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    second = await respond(http, up.url, "/approve", previous_response_id=first["id"])
    assert second["output"][-1]["type"] == "mcp_approval_request"
    status, error = await refused(http, up.url, "/approve", previous_response_id=first["id"])
    assert (status, error["code"]) == (409, "permission_operation_mismatch")
    assert second["previous_response_id"] == first["id"]


# -- deleting


async def test_a_response_is_deleted_without_a_trace(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    got = await respond(http, up.url, "one")
    async with http.delete(f"{up.url}{RESPONSES}/{got['id']}") as response:
        assert await response.json() == {"id": got["id"], "object": "response", "deleted": True}
    status, answer = await get(http, up.url, got["id"])
    assert (status, answer["error"]["code"]) == (404, "run_not_found")
    assert await listed(http, up.url) == []


async def test_a_response_that_others_stand_on_is_not_deleted_by_itself(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one")
    second = await respond(http, up.url, "two", previous_response_id=first["id"])
    for name in (first["id"], second["id"]):
        async with http.delete(f"{up.url}{RESPONSES}/{name}") as response:
            assert response.status == 400
            assert "/api/v1/threads/" in (await response.json())["error"]["message"]
    assert await get(http, up.url, second["id"]) == (200, second)


# -- what is refused

ANSWER: Final = {"type": "mcp_approval_response", "approval_request_id": "p", "approve": True}
OWN: Final = {"type": "mcp", "server_label": "ownware"}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("include", {"include": ["message.output_text.logprobs"]}),
        ("max_tool_calls", {"max_tool_calls": 3}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("reasoning", {"reasoning": {"effort": "most"}}),
        ("reasoning", {"model": "demo:assistant", "reasoning": {"effort": "minimal"}}),
        ("reasoning", {"reasoning": {"summary": "concise"}}),
        ("tools", {"tools": [{"type": "mcp", "server_label": "theirs"}]}),
        ("tools", {"tools": [{**OWN, "require_approval": "never"}]}),
        ("text", {"text": {"format": {"type": "grammar"}}}),
        ("text", {"text": {"verbosity": "none"}}),
        ("text", {"model": "demo:assistant", "text": {"verbosity": "low"}}),
        ("truncation", {"truncation": "often"}),
        ("conversation", {"conversation": "a", "previous_response_id": "resp_1"}),
        ("conversation", {"conversation": ""}),
        ("store", {"store": False, "background": True}),
        ("store", {"store": False, "conversation": "a"}),
        ("input", {"input": []}),
        ("input", {"input": [{"role": "assistant", "content": "x"}]}),
        ("input", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("input", {"input": [{"type": "item_reference", "id": "msg_1_0"}, user("x")]}),
        ("input", {"input": [{"type": "item_reference", "id": "\ud800"}, user("x")]}),
        ("input", {"input": [{"id": ["x"]}, user("x")]}),
        ("input", {"input": [{"type": "reasoning", "summary": []}]}),
        ("input", {"input": [user([{"type": "input_image", "file_id": "f"}])]}),
        ("input", {"input": [user([{"type": "input_image", "image_url": "data:x"}])]}),
        ("input", {"input": [user([{"type": "video"}])]}),
        ("input", {"input": [ANSWER, user("and?")]}),
        ("input", {"input": [ANSWER, ANSWER]}),
        ("input", {"input": [{**ANSWER, "approve": "yes"}]}),
        ("input", {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name_and_nothing_runs(
    start_gateway: Gateways, http: Http, param: str, body: dict[str, Any]
) -> None:
    up = await start_gateway()
    status, error = await refused(http, up.url, body.pop("input", "x"), **body)
    assert (status, error["param"]) == (400, param), error
    assert (await get_json(http, up.url, "/runs"))["items"] == []


async def test_a_wrong_part_is_named_by_its_place_in_the_input(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    wrong = user([{"type": "input_image", "image_url": "data:image/png;base64,%"}])
    skipped = {"type": "reasoning", "summary": []}
    _, error = await refused(http, up.url, [user("x"), skipped, wrong])
    assert "'input.2.content.0.image_url'" in error["message"]
    picture = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    finely = {"type": "input_image", "image_url": picture, "detail": "fine"}
    _, error = await refused(http, up.url, [user([finely])])
    assert "'input.0.content.0.detail'" in error["message"]


async def test_items_may_be_named_instead_of_sent_where_their_response_is_stored(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(WRITE, Reply(thinking=["Hm."], text=["Done."]))
    up = await start_gateway()
    first = await respond(http, up.url, "go")
    request = first["output"][-1]["id"]
    answer = {**ANSWER, "approval_request_id": request}
    said = [user("go"), {"id": first["output"][0]["id"]}, named(first["output"][-1]), answer]
    second = await respond(http, up.url, said)
    assert text(second) == "Done."
    up = await start_gateway.restart(up)
    said = [*said, *map(named, second["output"]), user("thanks")]
    third = await respond(http, up.url, said)
    assert text(third) == "thanks"
    *_, called, result, done, thanks = asked_of(provider)[-1]
    assert (called[0], result[0], done, thanks) == (
        *("assistant", "tool"),
        *(("assistant", "Done."), ("user", "thanks")),
    )
    async with http.delete(f"{up.url}/api/v1/threads/{(await listed(http, up.url))[-1]}"):
        status, error = await refused(http, up.url, said)
    assert (status, error["param"]) == (400, "input")
    assert "'input.1.id'" in error["message"]


async def test_what_is_not_stored_is_not_there_to_be_named(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one", store=False)
    status, error = await refused(http, up.url, [*map(named, first["output"]), user("two")])
    assert (status, error["param"]) == (400, "input")
    assert first["output"][0]["id"] in error["message"]
    stored = await respond(http, up.url, "one")
    beyond = {"type": "item_reference", "id": f"{stored['output'][0]['id']}7"}
    status, error = await refused(http, up.url, [beyond, user("two")])
    assert (status, error["param"]) == (400, "input")
    assert len(provider.requests) == 2


async def test_what_is_named_may_not_be_more_than_what_could_be_sent(
    start_gateway: Gateways, http: Http, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "REFERRED_CHARS_MAX", 3_000)
    up = await start_gateway()
    first = await respond(http, up.url, "x" * 1_000)
    once = map(named, first["output"])
    assert text(await respond(http, up.url, [*once, user("go on")])) == "go on"
    often = [*map(named, first["output"] * 3), user("go on")]
    status, error = await refused(http, up.url, often)
    assert (status, error["param"]) == (400, "input")
    assert "more than 3000 characters" in error["message"]
    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"include": ["reasoning.encrypted_content"], "store": False},
        {"include": ["web_search_call.action.sources", "message.input_image.image_url"]},
        {"include": []},
        {"reasoning": {"effort": "low", "summary": "detailed"}},
        {"tools": [OWN]},
    ],
)
async def test_what_changes_nothing_may_be_asked_of_a_response(
    start_gateway: Gateways, http: Http, provider: Provider, body: dict[str, Any]
) -> None:
    up = await start_gateway()
    plain, got = [await respond(http, up.url, "hi", **more) for more in ({}, body)]
    assert (text(got), got["tools"]) == (text(plain), [])
    first, second = (asked.body for asked in provider.requests)
    assert first.get("tools") == second.get("tools")
    query = "include[]=reasoning.encrypted_content"
    assert await get(http, up.url, f"{got['id']}?{query}") == (200, got)
    status, _ = await get(http, up.url, f"{got['id']}?include=message.output_text.logprobs")
    assert status == 400


async def test_what_was_said_already_is_not_said_again_where_the_gateway_has_it(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    first = await respond(http, up.url, "one")
    said = [user("one"), {"role": "assistant", "content": "one"}, user("two")]
    status, error = await refused(http, up.url, said, previous_response_id=first["id"])
    assert (status, error["param"]) == (400, "input")


@pytest.mark.parametrize("name", ["resp_x", "chatcmpl-1", "resp_{run}-999999", "{run}"])
async def test_a_response_that_is_none_is_a_404(
    start_gateway: Gateways, http: Http, name: str
) -> None:
    up = await start_gateway()
    run = (await respond(http, up.url, "one"))["id"].removeprefix("resp_")
    for path in ("", "?stream=true", "/input_items"):
        status, answer = await get(http, up.url, name.format(run=run) + path)
        assert (status, answer["error"]["code"]) == (404, "run_not_found")
    status, _ = await refused(http, up.url, "x", previous_response_id=name.format(run=run))
    assert status == 404


async def test_a_number_that_is_none_is_refused(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    got = await respond(http, up.url, "one")
    for number in ("x", "-1", "9" * 30):
        query = f"?stream=true&starting_after={number}"
        status, answer = await get(http, up.url, got["id"] + query)
        assert (status, answer["error"]["param"]) == (400, "starting_after")
