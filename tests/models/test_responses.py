import asyncio
import base64
import itertools
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
from ownware_gateway.models.responses import CALL_ID_LENGTH_MAX, Responses
from tests.provider import Call, Provider, Reply, sse

KEY = "sk-" + "a" * 24
WEATHER = ToolSpec("weather", "Tells the weather.", {"type": "object", "properties": {}})
QUESTION = UserTurn("Hi.")
HELLO = {"type": "message", "role": "user", "content": "Hi."}


@pytest.fixture
async def model(provider: Provider) -> AsyncIterator[Responses]:
    pool = Pool()
    yield Responses(
        pool,
        provider="openai",
        base_url=provider.base_url,
        key=KEY,
        key_variable="OPENAI_API_KEY",
        silence_s=5.0,
    )
    await pool.close()


async def ask(
    asked: Model, *turns: Message, model: str = "test-model", **fields: Any
) -> list[Part]:
    request = Request(model=model, messages=turns or (QUESTION,), **fields)
    return [part async for batch in asked.stream(request) for part in batch]


def answer(parts: Sequence[Part]) -> Answer:
    *others, last = parts
    assert isinstance(last, Answer)
    assert not any(isinstance(part, Answer) for part in others)
    return last


async def sent(provider: Provider, asked: Model, *turns: Message, **fields: Any) -> dict[str, Any]:
    await ask(asked, *turns, **fields)
    return provider.requests[-1].body


def event(name: str, index: int | None = None, **fields: Any) -> dict[str, Any]:
    place = {} if index is None else {"output_index": index}
    return {"type": f"response.{name}"} | place | fields


def done(index: int, kind: str, **fields: Any) -> dict[str, Any]:
    return event("output_item.done", index, item={"type": kind} | fields)


def end(name: str = "completed", **fields: Any) -> dict[str, Any]:
    return event(name, response={"status": name} | fields)


def stream(*events: dict[str, Any]) -> Reply:
    """Return a reply of raw events, for what the usual one does not do."""
    return Reply(body=sse(*events))


# Requests


async def test_a_request_is_what_the_api_asks_for(provider: Provider, model: Responses) -> None:
    body = await sent(
        provider, model, system="Be brief.", tools=[WEATHER], temperature=0.5, max_tokens=100
    )
    assert body == {
        "model": "test-model",
        "instructions": "Be brief.",
        "input": [HELLO],
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "tools": [
            {
                "type": "function",
                "name": "weather",
                "description": "Tells the weather.",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            }
        ],
        "temperature": 0.5,
        "max_output_tokens": 100,
    }
    (asked,) = provider.requests
    assert asked.path == "/v1/responses"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"


async def test_what_is_not_set_is_not_sent(provider: Provider, model: Responses) -> None:
    body = await sent(provider, model)
    assert body.keys() == {"model", "input", "stream", "store", "include"}


@pytest.mark.parametrize(
    ("thinking", "reasoning"),
    [
        (None, None),
        ("off", {"effort": "none"}),
        ("low", {"effort": "low", "summary": "auto"}),
        ("high", {"effort": "high", "summary": "auto"}),
    ],
)
async def test_how_much_to_think_is_said_in_the_dialect(
    provider: Provider, model: Responses, thinking: Any, reasoning: Any
) -> None:
    assert (await sent(provider, model, thinking=thinking)).get("reasoning") == reasoning


@pytest.mark.parametrize(
    ("name", "sealed"),
    [
        ("gpt-5.5", True),
        ("gpt-6.1-sol", True),
        ("o3", True),
        ("gpt-4.1-mini", False),
        ("gpt-4o", False),
        ("ft:gpt-4o:mine", False),
        ("chatgpt-4o-latest", False),
        ("gpt-5-chat-latest", False),
    ],
)
async def test_a_model_that_does_not_reason_is_not_asked_for_its_reasoning(
    provider: Provider, model: Responses, name: str, sealed: bool
) -> None:
    body = await sent(provider, model, model=name)
    assert ("include" in body) == sealed


UNVERIFIED = Reply(
    status=400,
    error="Your organization must be verified to generate reasoning summaries.",
    error_type="invalid_request_error",
)


async def test_an_organisation_that_may_not_see_the_reasoning_is_answered_all_the_same(
    provider: Provider, model: Responses
) -> None:
    provider.reply(UNVERIFIED)
    assert answer(await ask(model, thinking="high")).turn.text == "Hi."
    await ask(model, thinking="high")
    shown = {"effort": "high", "summary": "auto"}
    asked = [request.body["reasoning"] for request in provider.requests]
    assert asked == [shown, {"effort": "high"}, {"effort": "high"}]


async def test_a_refusal_without_a_summary_is_not_answered_by_asking_again(
    provider: Provider, model: Responses
) -> None:
    provider.reply(UNVERIFIED, UNVERIFIED)
    await failure(model, thinking="high")
    assert len(provider.requests) == 2
    provider.reply(UNVERIFIED)
    await failure(model)
    assert len(provider.requests) == 3


async def test_files_are_sent_as_what_they_are(provider: Provider, model: Responses) -> None:
    files = [
        File("a.png", "image/png", b"\x89PNG"),
        File("a.md", "text/markdown", b"# Title"),
        File("a.pdf", "application/pdf", b"%PDF-1.7"),
        File("a.zip", "application/zip", b"PK\x03\x04"),
    ]
    body = await sent(provider, model, UserTurn("Look.", files))
    png, pdf = (base64.b64encode(data).decode() for data in (b"\x89PNG", b"%PDF-1.7"))
    unknown = "[The attached file a.zip (application/zip, 4 bytes) cannot be shown.]"
    assert body["input"][0]["content"] == [
        {"type": "input_text", "text": "Look."},
        {"type": "input_image", "image_url": f"data:image/png;base64,{png}"},
        {"type": "input_text", "text": "a.md:\n```\n# Title\n```"},
        {
            "type": "input_file",
            "filename": "a.pdf",
            "file_data": f"data:application/pdf;base64,{pdf}",
        },
        {"type": "input_text", "text": unknown},
    ]


async def test_a_conversation_with_tools_is_told_in_the_dialect(
    provider: Provider, model: Responses
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
    assert body["input"] == [
        HELLO,
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "weather",
            "arguments": '{"city":"Rome"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny."},
        {"type": "function_call_output", "call_id": "c2", "output": "Error: No such city."},
        {"type": "message", "role": "assistant", "content": "It is sunny."},
        {"type": "message", "role": "user", "content": "Thanks."},
    ]


async def test_an_id_that_is_too_long_is_shortened_alike_for_the_call_and_its_output(
    provider: Provider, model: Responses
) -> None:
    given = ["x" * 100 + end for end in "ab"]
    turns = [ToolTurn(call_id, "weather", "Sunny.") for call_id in given]
    calls = [ToolCall(call_id, "weather", "{}") for call_id in given]
    body = await sent(provider, model, QUESTION, AssistantTurn("", tool_calls=calls), *turns)
    first, second, *outputs = [item["call_id"] for item in body["input"][1:]]
    assert outputs == [first, second]
    assert first != second
    assert max(len(first), len(second)) <= CALL_ID_LENGTH_MAX


@pytest.mark.parametrize(
    ("dialect", "asked_model", "verbatim"),
    [
        ("openai-responses", "test-model", True),
        ("openai-responses", "another", False),
        ("openai", "test-model", False),
    ],
)
async def test_items_go_back_verbatim_only_to_the_model_that_wrote_them(
    provider: Provider, model: Responses, dialect: str, asked_model: str, verbatim: bool
) -> None:
    raw = [{"type": "reasoning", "encrypted_content": "x"}, {"type": "message", "id": "m"}]
    turn = AssistantTurn("Told.", dialect=dialect, model=asked_model, raw=raw)
    body = await sent(provider, model, QUESTION, turn, UserTurn("And?"))
    told = [{"type": "message", "role": "assistant", "content": "Told."}]
    assert body["input"][1:-1] == (raw if verbatim else told)


# Answers


async def test_every_delta_is_a_part_and_every_packet_a_batch(
    provider: Provider, model: Responses
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
    async with aclosing(model.stream(Request("test-model", [QUESTION]))) as batches:
        assert await anext(batches) == [Thinking("H"), Thinking("m."), Text("Hel")]
        gate.set()
        rest = [part async for batch in batches for part in batch]
    turn = AssistantTurn(
        "Hello",
        thinking="Hm.",
        tool_calls=[],
        dialect="openai-responses",
        model="test-model",
        raw=[
            {
                "id": "item_0",
                "status": "completed",
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Hm."}],
                "encrypted_content": "sealed",
            },
            {
                "id": "item_1",
                "status": "completed",
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
            },
        ],
    )
    usage = Usage(input_tokens=7, output_tokens=3, cache_read_tokens=4)
    assert rest == [Text("lo"), Answer(turn, "end_turn", usage)]


async def test_tool_calls_are_announced_and_come_whole_with_the_answer(
    provider: Provider, model: Responses
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


async def test_an_answer_goes_back_verbatim_in_the_next_request(
    provider: Provider, model: Responses
) -> None:
    provider.reply(Reply(thinking=["Hm."], calls=[Call("weather", {"city": "Rome"}, "c1")]))
    turn = answer(await ask(model)).turn
    body = await sent(provider, model, QUESTION, turn, ToolTurn("c1", "weather", "Sunny."))
    assert body["input"][1:3] == turn.raw
    assert [item["type"] for item in body["input"][1:]] == [
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert turn.raw[0]["encrypted_content"] == "sealed"


async def test_an_id_that_the_conversation_knows_already_is_replaced(
    provider: Provider, model: Responses
) -> None:
    earlier = AssistantTurn("", tool_calls=[ToolCall("call_0", "weather", "{}")])
    turns = (QUESTION, earlier, ToolTurn("call_0", "weather", "Sunny."))
    provider.reply(Reply(calls=[Call("weather", {}, name) for name in ("call_0", "new", "new")]))
    *shown, last = await ask(model, *turns)
    assert isinstance(last, Answer)
    ids = [call.id for call in last.turn.tool_calls]
    assert len({"call_0", *ids}) == 4
    assert ids[1] == "new"
    assert shown == [CallStart(call_id, "weather") for call_id in ids]
    assert [item["call_id"] for item in last.turn.raw] == ids


async def test_items_that_only_the_end_holds_are_part_of_the_answer(
    provider: Provider, model: Responses
) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "time", "arguments": "{}"}
    provider.reply(stream(end(output=[call])))
    *shown, last = await ask(model)
    assert isinstance(last, Answer)
    assert shown == [CallStart("c1", "time")]
    assert last.turn.tool_calls == [ToolCall("c1", "time", "{}")]
    assert last.turn.raw == [call]


async def test_an_end_without_items_leaves_those_that_came_before(
    provider: Provider, model: Responses
) -> None:
    provider.reply(stream(done(1, "message"), done(0, "reasoning", summary=[]), end(output=[])))
    raw = answer(await ask(model)).turn.raw
    assert [item["type"] for item in raw] == ["reasoning", "message"]


async def test_messages_and_thoughts_are_paragraphs(provider: Provider, model: Responses) -> None:
    def thought(index: int, part: int, delta: str) -> dict[str, Any]:
        name = "reasoning_summary_text.delta"
        return event(name, index, summary_index=part, delta=delta)

    provider.reply(
        stream(
            thought(0, 0, "One"),
            thought(0, 0, "."),
            thought(0, 1, "Two."),
            event("output_text.delta", 1, delta="I look."),
            thought(2, 0, "Three."),
            event("output_text.delta", 3, delta="It is "),
            event("output_text.delta", 3, delta="sunny."),
            end(),
        )
    )
    parts = await ask(model)
    turn = answer(parts).turn
    assert turn.thinking == "One.\n\nTwo.\n\nThree."
    assert turn.text == "I look.\n\nIt is sunny."
    assert "".join(part.text for part in parts if isinstance(part, Text)) == turn.text
    assert "".join(part.text for part in parts if isinstance(part, Thinking)) == turn.thinking


async def test_reasoning_that_is_shown_whole_is_thinking(
    provider: Provider, model: Responses
) -> None:
    provider.reply(stream(event("reasoning_text.delta", 0, content_index=0, delta="Hm."), end()))
    assert (await ask(model))[:-1] == [Thinking("Hm.")]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, "end_turn"),
        ("max_tokens", "max_tokens"),
        ("refusal", "refusal"),
    ],
)
async def test_the_reason_for_the_end_is_one_of_our_own(
    provider: Provider, model: Responses, stop: str | None, expected: str
) -> None:
    provider.reply(Reply(text=["Yes."], stop=stop))
    assert answer(await ask(model)).stop_reason == expected


async def test_a_refusal_is_shown_as_text(provider: Provider, model: Responses) -> None:
    message = done(0, "message", content=[{"type": "refusal", "refusal": "I won't."}])
    deltas = [event("refusal.delta", 0, delta=piece) for piece in ("I ", "won't.")]
    provider.reply(stream(*deltas, message, end()))
    parts = await ask(model)
    assert parts[:-1] == [Text("I "), Text("won't.")]
    last = answer(parts)
    assert (last.stop_reason, last.turn.text) == ("refusal", "I won't.")
    assert last.turn.raw == [message["item"]]


async def test_reasoning_that_led_to_nothing_does_not_go_back(
    provider: Provider, model: Responses
) -> None:
    reason = {"reason": "max_output_tokens"}
    reasoning = done(0, "reasoning", summary=[], encrypted_content="sealed")
    provider.reply(stream(reasoning, end("incomplete", incomplete_details=reason)))
    last = answer(await ask(model))
    assert last.stop_reason == "max_tokens"
    body = await sent(provider, model, QUESTION, last.turn, UserTurn("Go on."))
    assert [item["content"] for item in body["input"]] == ["Hi.", "Go on."]


async def test_a_call_that_was_cut_off_has_broken_arguments(
    provider: Provider, model: Responses
) -> None:
    def call(index: int, arguments: str, **fields: Any) -> dict[str, Any]:
        return done(index, "function_call", name="erase", arguments=arguments, **fields)

    whole = call(0, "", call_id="c0")
    cut = [call(1, '{"path": "/', call_id="c1"), call(2, "", call_id="c2", status="incomplete")]
    provider.reply(stream(whole, *cut, end("incomplete")))
    calls = answer(await ask(model)).turn.tool_calls
    assert [call.arguments for call in calls] == ["{}", '{"path": "/', "{"]


async def test_events_that_say_nothing_new_bring_nothing(
    provider: Provider, model: Responses
) -> None:
    keepalive = {"type": "keepalive", "sequence_number": 3}
    provider.reply(stream(event("in_progress"), keepalive, event("invented.later"), end()))
    (last,) = await ask(model)
    assert isinstance(last, Answer)


async def test_half_a_character_never_leaves_the_adapter(
    provider: Provider, model: Responses
) -> None:
    delta = b'{"type":"response.output_text.delta","output_index":0,"delta":"a\\ud83d"}'
    provider.reply(Reply(body=sse(delta, end())))
    assert answer(await ask(model)).turn.text == "a\ufffd"


async def test_a_connection_serves_one_answer_after_another(
    provider: Provider, model: Responses
) -> None:
    for _ in range(3):
        await ask(model)
    assert len({request.peer for request in provider.requests}) == 1


# What goes wrong


async def failure(model: Model, **fields: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        await ask(model, **fields)
    assert KEY not in raised.value.message
    return raised.value


async def test_a_stream_that_ends_without_an_end_was_cut_off(
    provider: Provider, model: Responses
) -> None:
    provider.reply(stream(event("output_text.delta", 0, delta="Hel")))
    error = await failure(model)
    assert error.message == "The answer of openai was cut off."
    assert error.retry == "connection"


async def test_a_cut_connection_is_a_model_error_that_may_be_retried(
    provider: Provider, model: Responses
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], cut_after=1))
    assert (await failure(model)).retry == "connection"


async def test_a_connection_cut_after_the_end_loses_nothing(
    provider: Provider, model: Responses
) -> None:
    body = [sse(event("output_text.delta", 0, delta="Yes."), end())]
    provider.reply(Reply(body=body, cut_after=1))
    assert answer(await ask(model)).turn.text == "Yes."


async def test_a_server_that_does_not_close_after_the_end_is_not_waited_for(
    provider: Provider, model: Responses
) -> None:
    body = [sse(event("output_text.delta", 0, delta="Yes."), end())]
    provider.reply(Reply(body=body, hang=True, hang_after=1))
    async with asyncio.timeout(4):
        assert answer(await ask(model)).turn.text == "Yes."


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type": "response.comp',
        b"nonsense",
        b"17",
        b"{}",
        b'{"type": "response.completed"}',
        b'{"type": "response.completed", "response": {"output": 7}}',
        b'{"type": "response.completed", "response": {"output": [7]}}',
        b'{"type": "response.completed", "response": {"usage": {"input_tokens": "many"}}}',
        b'{"type": "response.output_text.delta", "output_index": 0}',
        b'{"type": "response.output_text.delta", "output_index": 0, "delta": 7}',
        b'{"type": "response.output_item.added", "output_index": 0, "item": {}}',
        b'{"type": "response.output_item.added", "output_index": 0, '
        b'"item": {"type": "function_call"}}',
        b"[" * 100_000,
    ],
)
async def test_a_broken_event_is_a_model_error_that_may_be_retried(
    provider: Provider, model: Responses, payload: bytes
) -> None:
    provider.reply(Reply(body=sse(payload, end())))
    error = await failure(model)
    assert error.message == "openai sent something that is no event of an answer."
    assert error.retry == "provider_error"


@pytest.mark.parametrize(
    ("code", "retry"),
    [
        ("server_error", "provider_error"),
        ("server_is_overloaded", "provider_error"),
        ("rate_limit_exceeded", "rate_limit"),
        ("invented_later", "provider_error"),
        (None, "provider_error"),
        ("insufficient_quota", None),
        ("invalid_prompt", None),
        ("image_too_large", None),
        ("context_length_exceeded", None),
    ],
)
async def test_a_response_that_failed_is_a_model_error(
    provider: Provider, model: Responses, code: str | None, retry: str | None
) -> None:
    error = {"code": code, "message": f"It broke. {KEY}"}
    flat, nested = {"type": "error"} | error, {"type": "error", "error": error}
    for last in (end("failed", error=error), flat, nested):
        provider.reply(stream(event("output_text.delta", 0, delta="Hel"), last))
        raised = await failure(model)
        assert "It said: It broke." in raised.message
        assert raised.retry == retry


async def test_a_refused_key_names_the_setting(provider: Provider, model: Responses) -> None:
    provider.reply(Reply(status=401, error=f"Incorrect API key provided: {KEY}."))
    error = await failure(model)
    assert "OPENAI_API_KEY" in error.message
    assert error.retry is None


async def test_leaving_early_cuts_the_connection_at_once(
    provider: Provider, model: Responses
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], hang=True, hang_after=1))
    async with aclosing(model.stream(Request("test-model", [QUESTION]))) as batches:
        assert await anext(batches) == [Text("Hel")]
    await provider.left()


async def test_cancelling_the_reader_cuts_the_connection_at_once(
    provider: Provider, model: Responses
) -> None:
    provider.reply(Reply(hang=True, hang_after=-1))
    task = asyncio.create_task(ask(model))
    await provider.requested()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.left()


async def test_many_thousand_deltas_arrive_whole_and_in_order(
    provider: Provider, model: Responses
) -> None:
    words = [f"{number} " for number in range(20_000)]
    provider.reply(Reply(text=words))
    batches = [batch async for batch in model.stream(Request("test-model", [QUESTION]))]
    *parts, last = itertools.chain.from_iterable(batches)
    assert parts == [Text(word) for word in words]
    assert isinstance(last, Answer)
    assert last.turn.text == "".join(words)
    # A burst is a few appends to the log, not one for each delta.
    assert len(batches) < len(words) / 20
