import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from ownware_gateway.events import Usage
from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    CallStart,
    File,
    Message,
    Model,
    ModelError,
    Part,
    Request,
    Text,
    Thinking,
    ToolCall,
    ToolSpec,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.models.http import Pool
from ownware_gateway.models.openai import OpenAI
from tests.provider import Call, Provider, Reply, sse

KEY = "sk-" + "a" * 24
WEATHER = ToolSpec("weather", "Tells the weather.", {"type": "object", "properties": {}})
QUESTION = UserTurn("Hi.")


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    await pool.close()


@pytest.fixture
def model(provider: Provider, pool: Pool) -> OpenAI:
    return make(provider, pool)


def make(provider: Provider, pool: Pool, *, name: str = "openai", key: str = KEY) -> OpenAI:
    return OpenAI(
        pool,
        provider=name,
        base_url=provider.base_url,
        key=key,
        key_variable="OPENAI_API_KEY",
        silence_s=5.0,
    )


async def batches(model: Model, request: Request) -> list[Sequence[Part]]:
    return [batch async for batch in model.stream(request)]


async def ask(model: Model, *turns: Message, **fields: Any) -> list[Part]:
    request = Request(model="test-model", messages=turns or (QUESTION,), **fields)
    return [part for batch in await batches(model, request) for part in batch]


def answer(parts: Sequence[Part]) -> Answer:
    *others, last = parts
    assert isinstance(last, Answer)
    assert not any(isinstance(part, Answer) for part in others)
    return last


async def sent(provider: Provider, model: Model, *turns: Message, **fields: Any) -> dict[str, Any]:
    await ask(model, *turns, **fields)
    return provider.requests[-1].body


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}]}


def stream(*deltas: dict[str, Any], finish: str | None = "stop") -> Reply:
    """Return a reply of raw deltas, for what a server does that the usual one does not."""
    return Reply(body=sse(*map(chunk, deltas), *([chunk(None, finish)] if finish else [])))


def tool_calls(*pieces: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": list(pieces)}


# Requests


async def test_a_request_is_what_the_api_asks_for(provider: Provider, model: OpenAI) -> None:
    body = await sent(provider, model, system="Be brief.", tools=[WEATHER], temperature=0.5)
    assert body == {
        "model": "test-model",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi."},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Tells the weather.",
                    "parameters": {"type": "object", "properties": {}},
                },
            }
        ],
        "temperature": 0.5,
    }
    (asked,) = provider.requests
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"


async def test_what_is_not_set_is_not_sent(provider: Provider, model: OpenAI) -> None:
    body = await sent(provider, model)
    assert body.keys() == {"model", "messages", "stream", "stream_options"}


async def test_a_server_without_a_key_gets_none(provider: Provider, pool: Pool) -> None:
    await ask(make(provider, pool, key=""))
    assert "Authorization" not in provider.requests[0].headers


@pytest.mark.parametrize(
    ("name", "field"),
    [("openai", "max_completion_tokens"), ("openrouter", "max_tokens"), ("local", "max_tokens")],
)
async def test_the_token_limit_has_the_name_that_the_provider_knows(
    provider: Provider, pool: Pool, name: str, field: str
) -> None:
    body = await sent(provider, make(provider, pool, name=name), max_tokens=100)
    assert {key: body[key] for key in body if "tokens" in key} == {field: 100}


@pytest.mark.parametrize(
    ("name", "thinking", "fields"),
    [
        ("openai", "off", {"reasoning_effort": "none"}),
        ("openai", "high", {"reasoning_effort": "high"}),
        ("google", "low", {"reasoning_effort": "low"}),
        ("openrouter", "off", {"reasoning": {"effort": "none"}}),
        ("openrouter", "medium", {"reasoning": {"effort": "medium"}}),
        ("openai", None, {}),
    ],
)
async def test_how_much_to_think_is_said_in_the_providers_way(
    provider: Provider, pool: Pool, name: str, thinking: Any, fields: dict[str, Any]
) -> None:
    body = await sent(provider, make(provider, pool, name=name), thinking=thinking)
    assert {key: body[key] for key in body if key.startswith("reasoning")} == fields


async def test_files_are_sent_as_what_they_are(provider: Provider, model: OpenAI) -> None:
    files = [
        File("a.png", "image/png", b"\x89PNG"),
        File("a.md", "text/markdown; charset=utf-8", b"# Title\n```\ncode\n```"),
        File("a.json", "application/json", b'{"a": 1}'),
        File("a.svg", "image/svg+xml", b"<svg/>"),
        File("a.pdf", "application/pdf", b"%PDF-1.7"),
        File("a.zip", "application/zip", b"PK\x03\x04"),
    ]
    body = await sent(provider, model, UserTurn("Look.", files))
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "Look."},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()},
        },
        {"type": "text", "text": "a.md:\n````\n# Title\n```\ncode\n```\n````"},
        {"type": "text", "text": 'a.json:\n```\n{"a": 1}\n```'},
        {"type": "text", "text": "a.svg:\n```\n<svg/>\n```"},
        {
            "type": "file",
            "file": {
                "filename": "a.pdf",
                "file_data": "data:application/pdf;base64,"
                + base64.b64encode(b"%PDF-1.7").decode(),
            },
        },
        {
            "type": "text",
            "text": "[The attached file a.zip (application/zip, 4 bytes) cannot be shown.]",
        },
    ]


async def test_a_file_without_words_needs_no_empty_text(provider: Provider, model: OpenAI) -> None:
    body = await sent(provider, model, UserTurn("", [File("a.txt", "text/plain", b"hello")]))
    assert body["messages"][0]["content"] == [{"type": "text", "text": "a.txt:\n```\nhello\n```"}]


async def test_a_conversation_with_tools_is_told_in_the_dialect(
    provider: Provider, model: OpenAI
) -> None:
    calls = [ToolCall("c1", "weather", '{"city":"Rome"}'), ToolCall("c2", "weather", "{}")]
    body = await sent(
        provider,
        model,
        QUESTION,
        AssistantTurn("", thinking="Hm.", tool_calls=calls),
        ToolTurn("c1", "weather", "Sunny."),
        ToolTurn("c2", "weather", "No such city.", is_error=True),
        AssistantTurn("It is sunny."),
        UserTurn("Thanks."),
    )
    assert body["messages"] == [
        {"role": "user", "content": "Hi."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
                },
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "weather", "arguments": "{}"},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: No such city."},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize(
    ("dialect", "asked_model", "verbatim"),
    [
        ("openai", "test-model", True),
        ("openai", "another", False),
        ("anthropic", "test-model", False),
    ],
)
async def test_a_message_goes_back_verbatim_only_to_the_model_that_wrote_it(
    provider: Provider, model: OpenAI, dialect: str, asked_model: str, verbatim: bool
) -> None:
    raw = {"role": "assistant", "content": "Raw.", "reasoning_details": [{"type": "x"}]}
    turn = AssistantTurn("Told.", dialect=dialect, model=asked_model, raw=raw)
    body = await sent(provider, model, QUESTION, turn, UserTurn("And?"))
    told = {"role": "assistant", "content": "Told."}
    assert body["messages"][1] == (raw if verbatim else told)


async def test_broken_arguments_go_back_as_json_that_every_server_can_read(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(Reply(calls=[Call("weather", '{"city": "Ro', "c1"), Call("weather", {}, "c2")]))
    turn = answer(await ask(model)).turn
    assert [call.arguments for call in turn.tool_calls] == ['{"city": "Ro', "{}"]
    results = [ToolTurn("c1", "weather", "Broken.", is_error=True), ToolTurn("c2", "weather", "")]
    for told in (turn, AssistantTurn(turn.text, tool_calls=turn.tool_calls)):
        body = await sent(provider, model, QUESTION, told, *results)
        functions = [call["function"] for call in body["messages"][1]["tool_calls"]]
        assert [json.loads(function["arguments"]) for function in functions] == [
            {"broken": '{"city": "Ro'},
            {},
        ]


# Answers


async def test_every_delta_is_a_part_and_every_packet_a_batch(
    provider: Provider, model: OpenAI
) -> None:
    gate = asyncio.Event()
    provider.reply(
        Reply(
            thinking=["H", "m."],
            text=["Hel", "lo"],
            usage=(7, 3),
            cached=4,
            gate=gate,
            gate_after=3,
        )
    )
    request = Request("test-model", [QUESTION])
    async with aclosing(model.stream(request)) as stream:
        assert await anext(stream) == [Thinking("H"), Thinking("m."), Text("Hel")]
        gate.set()
        rest = [part async for batch in stream for part in batch]
    turn = AssistantTurn(
        "Hello",
        thinking="Hm.",
        tool_calls=[],
        dialect="openai",
        model="test-model",
        raw={"role": "assistant", "content": "Hello", "reasoning_content": "Hm."},
    )
    usage = Usage(input_tokens=7, output_tokens=3, cache_read_tokens=4)
    assert rest == [Text("lo"), Answer(turn, "end_turn", usage)]


async def test_tool_calls_are_announced_and_come_whole_with_the_answer(
    provider: Provider, model: OpenAI
) -> None:
    calls = [Call("weather", {"city": "Rome"}, "c1"), Call("time", {}, "c2")]
    provider.reply(Reply(text=["Look."], calls=calls))
    *shown, last = await ask(model)
    assert shown == [Text("Look."), CallStart("c1", "weather"), CallStart("c2", "time")]
    assert isinstance(last, Answer)
    assert last.stop_reason == "tool_use"
    assert last.turn.tool_calls == [
        ToolCall("c1", "weather", '{"city": "Rome"}'),
        ToolCall("c2", "time", "{}"),
    ]
    assert last.turn.raw == {
        "role": "assistant",
        "content": "Look.",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }


async def test_an_answer_goes_back_verbatim_in_the_next_request(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(Reply(thinking=["Hm."], calls=[Call("weather", {"city": "Rome"}, "c1")]))
    turn = answer(await ask(model)).turn
    body = await sent(provider, model, QUESTION, turn, ToolTurn("c1", "weather", "Sunny."))
    assert body["messages"][1] == turn.raw
    assert turn.raw["content"] is None


def piece(
    name: str | None = None, arguments: Any = None, given_id: str | None = None, **fields: Any
) -> dict[str, Any]:
    function = {
        key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None
    }
    return ({"id": given_id} if given_id is not None else {}) | {"function": function} | fields


A, B = ("a", '{"x":1}'), ("b", "{}")


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        pytest.param(
            [
                tool_calls(piece("a", "", "1", index=0)),
                tool_calls(piece("b", "", "2", index=1)),
                tool_calls(piece(None, '{"x"', index=0), piece(None, "{", index=1)),
                tool_calls(piece(None, ":1}", index=0), piece(None, "}", index=1)),
            ],
            [A, B],
            id="interleaved",
        ),
        pytest.param(
            [tool_calls(piece("a", '{"x":1}', "1", index=0), piece("b", "{}", "2", index=1))],
            [A, B],
            id="whole, in one delta",
        ),
        pytest.param(
            [tool_calls(piece("a", '{"x":1}', "1")), tool_calls(piece("b", "{}", "2"))],
            [A, B],
            id="without an index",
        ),
        pytest.param(
            [tool_calls(piece("a", '{"x":1}')), tool_calls(piece("b", "{}"))],
            [A, B],
            id="without an index and an id",
        ),
        pytest.param(
            [tool_calls(piece("a", "{}", ""), piece("a", "{}", ""))],
            [("a", "{}"), ("a", "{}")],
            id="the same twice, without an index and an id",
        ),
        pytest.param(
            [
                tool_calls(piece("a", '{"x"', "1")),
                tool_calls(piece(None, ":1", "1")),
                tool_calls(piece(None, "}")),
            ],
            [A],
            id="in pieces, without an index",
        ),
        pytest.param(
            [
                tool_calls(piece("a", '{"x":1}', "1", index=0)),
                tool_calls(piece("b", "{}", "2", index=0)),
            ],
            [A, B],
            id="one index for all",
        ),
        pytest.param(
            [
                tool_calls(piece("a", '{"x":1}', index=0)),
                tool_calls(piece("b", "{}", index=0)),
            ],
            [A, B],
            id="one index for all, without ids",
        ),
        pytest.param(
            [
                tool_calls(piece("a", "", "1", index=0)),
                tool_calls(piece("a", '{"x"', "1", index=0)),
                tool_calls(piece("a", ":1}", "1", index=0)),
                tool_calls(piece("a", "", "1", index=0)),
            ],
            [A],
            id="name and id in every piece",
        ),
        pytest.param(
            [
                tool_calls(piece("get_", None, "1", index=0)),
                tool_calls(piece("weather", None, index=0)),
                tool_calls(piece(None, "{}", index=0)),
            ],
            [("get_weather", "{}")],
            id="a name in pieces",
        ),
        pytest.param(
            [tool_calls(piece("a", {"x": 1}, "1", index=0))],
            [("a", '{"x": 1}')],
            id="arguments as an object",
        ),
        pytest.param(
            [tool_calls(piece("b", None, "1", index=0)), {"content": None, "tool_calls": None}],
            [B],
            id="no arguments, and nulls",
        ),
        pytest.param(
            [tool_calls({"index": 0, "id": "1", "function": {"name": "b", "arguments": None}})],
            [B],
            id="null arguments",
        ),
    ],
)
@pytest.mark.parametrize("finish", ["tool_calls", "stop", "function_call"])
async def test_tool_calls_are_understood_however_they_are_streamed(
    provider: Provider,
    model: OpenAI,
    deltas: list[dict[str, Any]],
    expected: list[tuple[str, str]],
    finish: str,
) -> None:
    provider.reply(stream(*deltas, finish=finish))
    *shown, last = await ask(model)
    assert isinstance(last, Answer)
    calls = last.turn.tool_calls
    assert [(call.name, call.arguments) for call in calls] == expected
    assert shown == [CallStart(call.id, call.name) for call in calls]
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id for call in calls)
    assert last.stop_reason == "tool_use"
    assert [call["id"] for call in last.turn.raw["tool_calls"]] == [call.id for call in calls]
    assert all("index" not in call for call in last.turn.raw["tool_calls"])


async def test_an_id_that_the_conversation_knows_already_is_replaced(
    provider: Provider, model: OpenAI
) -> None:
    earlier = AssistantTurn("", tool_calls=[ToolCall("call_0", "weather", "{}")])
    turns = (QUESTION, earlier, ToolTurn("call_0", "weather", "Sunny."))
    calls = [Call("weather", {}, name) for name in ("call_0", "call_0", "new", "new")]
    provider.reply(Reply(calls=calls))
    turn = answer(await ask(model, *turns)).turn
    ids = [call.id for call in turn.tool_calls]
    assert len({"call_0", *ids}) == 5
    assert ids[2] == "new"
    assert [call["id"] for call in turn.raw["tool_calls"]] == ids


async def test_signatures_beside_calls_and_text_are_kept_for_the_next_request(
    provider: Provider, model: OpenAI
) -> None:
    one = {"extra_content": {"google": {"thought_signature": "one"}}}
    two = {"extra_content": {"google": {"thought_signature": "two"}}}
    call = piece("weather", "{", "c1", type="function")
    provider.reply(stream(tool_calls(call), tool_calls(one), tool_calls(piece(None, "}")), two))
    raw = answer(await ask(model)).turn.raw
    assert raw["tool_calls"] == [
        one | {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    ]
    assert raw["extra_content"] == two["extra_content"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_is_thinking_and_goes_back_under_its_own_name(
    provider: Provider, model: OpenAI, field: str
) -> None:
    provider.reply(stream({field: "H"}, {field: "m.", "content": ""}, {"content": "Yes."}))
    parts = await ask(model)
    assert parts[:-1] == [Thinking("H"), Thinking("m."), Text("Yes.")]
    turn = answer(parts).turn
    assert turn.thinking == "Hm."
    assert turn.raw == {"role": "assistant", "content": "Yes.", field: "Hm."}


async def test_reasoning_that_comes_under_two_names_is_shown_once(
    provider: Provider, model: OpenAI
) -> None:
    details = [{"type": "reasoning.text", "text": "Hm.", "index": 0}]
    delta = {"reasoning": "Hm.", "reasoning_content": "Hm.", "reasoning_details": details}
    provider.reply(stream(delta, {"content": "Yes."}))
    assert (await ask(model))[:-1] == [Thinking("Hm."), Text("Yes.")]


async def test_reasoning_details_are_put_together_as_the_blocks_they_were(
    provider: Provider, model: OpenAI
) -> None:
    def text(words: str, **fields: Any) -> dict[str, Any]:
        detail = {"type": "reasoning.text", "text": words, "index": 0} | fields
        return {"reasoning_details": [detail]}

    sealed = [{"type": "reasoning.encrypted", "data": data, "index": 1} for data in ("x", "y")]
    provider.reply(
        stream(
            text("H", signature=None),
            text("m."),
            text("", signature="signed"),
            {"reasoning_details": sealed},
            {"reasoning_details": [{"type": "reasoning.summary", "summary": "So.", "index": 2}]},
            {"content": "Yes."},
        )
    )
    parts = await ask(model)
    assert parts[:-1] == [Thinking("H"), Thinking("m."), Thinking("So."), Text("Yes.")]
    assert answer(parts).turn.raw["reasoning_details"] == [
        {"type": "reasoning.text", "text": "Hm.", "index": 0, "signature": "signed"},
        *sealed,
        {"type": "reasoning.summary", "summary": "So.", "index": 2},
    ]


async def test_content_that_comes_as_a_list_of_parts_is_text(
    provider: Provider, model: OpenAI
) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}, {"type": "odd"}]
    provider.reply(stream({"content": parts}))
    assert (await ask(model))[0] == Text("Hello")


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@pytest.mark.parametrize(
    ("chunks", "usage"),
    [
        ([chunk({}, "stop"), {"choices": [], "usage": USAGE}], (7, 3)),
        ([chunk({}, "stop"), {"usage": USAGE}], (7, 3)),
        ([chunk({}, "stop") | {"usage": USAGE}], (7, 3)),
        ([chunk() | {"usage": {"prompt_tokens": 7}}, chunk({}, "stop") | {"usage": USAGE}], (7, 3)),
        ([chunk() | {"usage": None}, chunk({}, "stop"), chunk() | {"usage": USAGE}], (7, 3)),
        ([chunk({}, "stop") | {"usage": {"prompt_tokens_details": None}}], (0, 0)),
        ([chunk({}, "stop")], (0, 0)),
    ],
)
async def test_usage_is_found_wherever_it_comes(
    provider: Provider, model: OpenAI, chunks: list[Any], usage: tuple[int, int]
) -> None:
    provider.reply(Reply(body=sse(chunk({"content": "Yes."}), *chunks, b"[DONE]")))
    found = answer(await ask(model)).usage
    assert (found.input_tokens, found.output_tokens) == usage
    assert found.cost_usd is None


@pytest.mark.parametrize(
    ("finish", "stop_reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("content_filter", "refusal"),
        ("tool_calls", "end_turn"),
        ("something_new", "end_turn"),
    ],
)
async def test_the_reason_for_the_end_is_one_of_our_own(
    provider: Provider, model: OpenAI, finish: str, stop_reason: str
) -> None:
    provider.reply(stream({"content": "Yes."}, finish=finish))
    assert answer(await ask(model)).stop_reason == stop_reason


async def test_an_answer_may_be_empty(provider: Provider, model: OpenAI) -> None:
    provider.reply(stream({"role": "assistant", "content": ""}))
    (last,) = await ask(model)
    assert isinstance(last, Answer)
    assert last.turn.text == ""
    assert last.turn.raw == {"role": "assistant", "content": ""}


async def test_a_refusal_is_shown_as_text(provider: Provider, model: OpenAI) -> None:
    provider.reply(stream({"refusal": "I "}, {"refusal": "won't."}))
    parts = await ask(model)
    assert parts[:-1] == [Text("I "), Text("won't.")]
    last = answer(parts)
    assert last.stop_reason == "refusal"
    assert last.turn.text == "I won't."
    assert last.turn.raw == {"role": "assistant", "content": None, "refusal": "I won't."}


async def test_half_a_character_never_leaves_the_adapter(provider: Provider, model: OpenAI) -> None:
    body = b'data: {"choices":[{"delta":{"content":"a\\ud83d\\ude00b\\ud83dc"}}]}\n\n'
    provider.reply(Reply(body=body + sse(chunk({}, "stop"))))
    parts = await ask(model)
    assert parts[0] == Text("a\U0001f600b\ufffdc")
    assert answer(parts).turn.raw["content"] == "a\U0001f600b\ufffdc"


# What goes wrong


async def failure(model: Model, **fields: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        await ask(model, **fields)
    assert KEY not in raised.value.message
    return raised.value


async def test_a_stream_that_ends_without_a_reason_was_cut_off(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(stream({"content": "Hel"}, finish=None))
    error = await failure(model)
    assert error.message == "The answer of openai was cut off."
    assert error.retry == "connection"


async def test_a_cut_connection_is_a_model_error_that_may_be_retried(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], cut_after=1))
    assert (await failure(model)).retry == "connection"


async def test_a_connection_cut_after_the_last_word_loses_nothing(
    provider: Provider, model: OpenAI
) -> None:
    body = [sse(chunk({"content": "Yes."}), chunk({}, "stop"))]
    provider.reply(Reply(body=body, cut_after=1))
    assert answer(await ask(model)).turn.text == "Yes."


@pytest.mark.parametrize(
    "payload",
    [
        b'{"choices": [{"del',
        b"nonsense",
        b"17",
        b'{"choices": {"a": 1}}',
        b'{"choices": [7]}',
        b'{"choices": [{"delta": [1]}]}',
        b'{"choices": [{"delta": {"content": 7}}]}',
        b'{"choices": [{"delta": {"content": [7]}}]}',
        b'{"choices": [{"delta": {"reasoning_details": 7}}]}',
        b'{"choices": [{"delta": {"tool_calls": [7]}}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"function": {"name": 7}}]}}]}',
        b'{"usage": {"prompt_tokens": "many"}}',
        b'{"usage": 7}',
        b"[" * 100_000,
    ],
)
async def test_a_broken_chunk_is_a_model_error_that_may_be_retried(
    provider: Provider, model: OpenAI, payload: bytes
) -> None:
    provider.reply(Reply(body=sse(payload, chunk({}, "stop"))))
    error = await failure(model)
    assert error.message == "openai sent something that is no chunk of an answer."
    assert error.retry == "provider_error"


@pytest.mark.parametrize(
    ("payload", "retry"),
    [
        ({"error": {"message": "It broke.", "code": 502}}, "provider_error"),
        ({"error": {"message": "It broke.", "type": "invalid_request_error"}}, None),
        ({"error": "It broke.", "choices": []}, "provider_error"),
        ({"object": "error", "message": "It broke.", "code": 400}, None),
        ({"error": {"message": "It broke.", "code": 429}} | chunk({}, "error"), "rate_limit"),
    ],
)
async def test_an_error_in_the_middle_of_a_stream_is_a_model_error(
    provider: Provider, model: OpenAI, payload: dict[str, Any], retry: str | None
) -> None:
    provider.reply(Reply(body=sse(chunk({"content": "Hel"}), payload, b"[DONE]")))
    error = await failure(model)
    assert error.message.endswith("It said: It broke.")
    assert error.retry == retry


@pytest.mark.parametrize("finish", ["error", "abort", "insufficient_system_resource"])
async def test_an_end_that_is_a_failure_may_be_retried(
    provider: Provider, model: OpenAI, finish: str
) -> None:
    provider.reply(stream({"content": "Hel"}, finish=finish))
    error = await failure(model)
    assert finish in error.message
    assert error.retry == "provider_error"


async def test_an_empty_answer_for_an_unknown_reason_is_a_failure(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(stream(finish="function_call_filter: MALFORMED_FUNCTION_CALL"))
    error = await failure(model)
    assert "MALFORMED_FUNCTION_CALL" in error.message
    assert error.retry == "provider_error"


async def test_a_call_without_a_name_is_a_failure(provider: Provider, model: OpenAI) -> None:
    provider.reply(stream(tool_calls(piece(None, "{}", "1", index=0))))
    assert (await failure(model)).retry == "provider_error"


async def test_a_refused_key_names_the_setting(provider: Provider, model: OpenAI) -> None:
    provider.reply(Reply(status=401, error=f"Incorrect API key provided: {KEY}."))
    error = await failure(model)
    assert "OPENAI_API_KEY" in error.message
    assert error.retry is None


async def test_leaving_early_cuts_the_connection_at_once(provider: Provider, model: OpenAI) -> None:
    provider.reply(Reply(text=["Hel", "lo"], hang=True, hang_after=1))
    async with aclosing(model.stream(Request("test-model", [QUESTION]))) as stream:
        assert await anext(stream) == [Text("Hel")]
    await provider.left()


async def test_cancelling_the_reader_cuts_the_connection_at_once(
    provider: Provider, model: OpenAI
) -> None:
    provider.reply(Reply(hang=True, hang_after=-1))
    task = asyncio.create_task(ask(model))
    await provider.requested()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.left()


async def test_many_thousand_deltas_arrive_whole_and_in_order(
    provider: Provider, model: OpenAI
) -> None:
    words = [f"{number} " for number in range(20_000)]
    provider.reply(Reply(text=words))
    request = Request("test-model", [QUESTION])
    *found, last = await batches(model, request)
    parts = list(itertools.chain.from_iterable(found))
    assert parts == [Text(word) for word in words]
    assert answer(last).turn.text == "".join(words)
    # A burst is a few appends to the log, not one for each delta.
    assert len(found) < len(words) / 20
