"""The Anthropic adapter, against a scripted server on a real socket."""

import asyncio
import base64
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    CallStart,
    File,
    Message,
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
from ownware_gateway.models.anthropic import MAX_TOKENS, Anthropic
from ownware_gateway.models.http import Pool
from tests.provider import Call, Provider, Reply, sse

KEY = "sk-ant-" + "k" * 24
MODEL = "claude-sonnet-5-5"
HELLO = Request(MODEL, [UserTurn("Hello")])
CACHED = {"type": "ephemeral"}


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as running:
        yield running


@pytest.fixture
async def model(provider: Provider) -> AsyncIterator[Anthropic]:
    pool = Pool()
    yield Anthropic(
        pool,
        provider="anthropic",
        base_url=provider.base_url,
        key=KEY,
        key_variable="ANTHROPIC_API_KEY",
        silence_s=5.0,
    )
    await pool.close()


async def parts(model: Anthropic, request: Request = HELLO) -> list[Part]:
    return [part async for batch in model.stream(request) for part in batch]


async def ask(model: Anthropic, request: Request = HELLO) -> Answer:
    answer = (await parts(model, request))[-1]
    assert isinstance(answer, Answer)
    return answer


async def sent(
    provider: Provider, model: Anthropic, /, *messages: Message, **fields: Any
) -> dict[str, Any]:
    """Return the body that is sent for a request with these messages and fields."""
    turns = messages or HELLO.messages
    await ask(model, dataclasses.replace(HELLO, messages=turns, **fields))
    return provider.requests[-1].body


def blocks(*events: dict[str, Any], stop: str = "end_turn") -> Reply:
    """Return a reply of these events between the usual first and last ones."""
    return Reply(
        body=sse(
            {"type": "message_start", "message": {"usage": {"input_tokens": 3}}},
            *events,
            {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {}},
            {"type": "message_stop"},
        )
    )


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": fields}


async def test_text_streams_in_deltas_and_ends_with_the_whole_answer(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], usage=(12, 7)))
    *deltas, answer = await parts(model)
    assert deltas == [Text("Hel"), Text("lo")]
    assert isinstance(answer, Answer)
    assert answer.turn.text == "Hello"
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (12, 7)
    assert answer.usage.cost_usd is None


async def test_a_delta_is_seen_before_the_answer_is_over(
    provider: Provider, model: Anthropic
) -> None:
    gate = asyncio.Event()
    provider.reply(Reply(text=["one", "two"], gate=gate, gate_after=1))
    batches = model.stream(HELLO)
    assert await anext(batches) == [Text("one")]
    gate.set()
    assert (await anext(batches))[0] == Text("two")
    await batches.aclose()


async def test_the_request_is_what_the_api_wants(provider: Provider, model: Anthropic) -> None:
    tool = ToolSpec("ls", "Lists.", {"type": "object", "properties": {}})
    body = await sent(provider, model, system="Be brief.", tools=[tool])
    (asked,) = provider.requests
    assert asked.path == "/v1/messages"
    assert asked.headers["x-api-key"] == KEY
    assert asked.headers["anthropic-version"] == "2023-06-01"
    assert "Authorization" not in asked.headers
    assert body == {
        "model": MODEL,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": CACHED}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hello", "cache_control": CACHED}],
            }
        ],
        "tools": [{"name": "ls", "description": "Lists.", "input_schema": tool.input_schema}],
    }


async def test_a_base_url_may_leave_out_the_version(provider: Provider) -> None:
    pool = Pool()
    model = Anthropic(
        pool,
        provider="anthropic",
        base_url=f"{provider.url}/",
        key=KEY,
        key_variable="ANTHROPIC_API_KEY",
        silence_s=5.0,
    )
    assert (await ask(model)).turn.text == "Hello"
    await pool.close()


async def test_the_whole_prompt_is_counted_with_what_the_cache_held(
    provider: Provider, model: Anthropic
) -> None:
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 200,
        "cache_creation_input_tokens": 30,
        "output_tokens": 1,
    }
    provider.reply(
        Reply(
            body=sse(
                {"type": "message_start", "message": {"usage": usage}},
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": "end_turn"},
                    "usage": {"input_tokens": 0, "output_tokens": 9},
                },
                {"type": "message_stop"},
            )
        )
    )
    found = (await ask(model)).usage
    assert found.input_tokens == 240
    assert found.output_tokens == 9
    assert found.cache_read_tokens == 200
    assert found.cache_creation_tokens == 30


async def test_a_tool_call_is_announced_and_its_arguments_are_put_together(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(Reply(text=["Wait."], calls=[Call("read", {"path": "a.txt"}, id="toolu_a")]))
    *_, begun, answer = await parts(model)
    assert begun == CallStart("toolu_a", "read")
    assert isinstance(answer, Answer)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.turn.tool_calls
    assert (call.id, call.name, json.loads(call.arguments)) == (
        "toolu_a",
        "read",
        {"path": "a.txt"},
    )
    assert answer.turn.raw["content"][1] == {
        "type": "tool_use",
        "id": "toolu_a",
        "name": "read",
        "input": {"path": "a.txt"},
    }


async def test_a_call_without_arguments_has_an_empty_object(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(
        blocks(
            start(0, type="tool_use", id="a", name="ls", input={}),
            delta(0, type="input_json_delta", partial_json=""),
        )
    )
    assert (await ask(model)).turn.tool_calls == [ToolCall("a", "ls", "{}")]


@pytest.mark.parametrize("wrote", ['{"path": "a', "[" * 5_000 + "]" * 5_000])
async def test_broken_arguments_are_kept_as_written_and_sent_back_as_an_object(
    provider: Provider, model: Anthropic, wrote: str
) -> None:
    provider.reply(Reply(calls=[Call("ls", wrote, id="a")], stop="max_tokens"))
    answer = await ask(model)
    assert answer.turn.tool_calls == [ToolCall("a", "ls", wrote)]
    assert answer.stop_reason == "tool_use"
    assert answer.turn.raw["content"][0]["input"] == {}


async def test_call_ids_become_unique_in_the_conversation(
    provider: Provider, model: Anthropic
) -> None:
    earlier = AssistantTurn("", tool_calls=[ToolCall("a", "ls", "{}")])
    provider.reply(
        blocks(
            *(
                start(n, type="tool_use", name="ls", input={}, **given)
                for n, given in enumerate([{"id": "a"}, {"id": "a"}, {}, {"id": "f.ls:0"}])
            )
        )
    )
    request = Request(MODEL, [UserTurn("x"), earlier, ToolTurn("a", "ls", "ok")])
    found = await parts(model, request)
    answer = found[-1]
    assert isinstance(answer, Answer)
    ids = [call.id for call in answer.turn.tool_calls]
    assert ids == ["a_2", "a_3", "toolu_3", "f_ls_0"]
    assert [part.id for part in found if isinstance(part, CallStart)] == ids
    assert [block["id"] for block in answer.turn.raw["content"]] == ids


async def test_thinking_streams_and_is_sent_back_verbatim_with_its_signature(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(
        blocks(
            start(0, type="thinking", thinking="", signature=""),
            delta(0, type="thinking_delta", thinking="Let me "),
            delta(0, type="thinking_delta", thinking="see."),
            delta(0, type="signature_delta", signature="c2ln"),
            start(1, type="redacted_thinking", data="b3BhcXVl"),
            start(2, type="text", text=""),
            start(3, type="tool_use", id="a", name="ls", input={}),
        )
    )
    found = await parts(model)
    assert found[:2] == [Thinking("Let me "), Thinking("see.")]
    answer = found[-1]
    assert isinstance(answer, Answer)
    assert answer.turn.thinking == "Let me see."
    assert (answer.turn.dialect, answer.turn.model) == ("anthropic", MODEL)
    # What is sent back has been through the log as JSON.
    turn = dataclasses.replace(answer.turn, raw=json.loads(json.dumps(answer.turn.raw)))
    body = await sent(provider, model, UserTurn("x"), turn, ToolTurn("a", "ls", "ok"))
    assert body["messages"][1] == {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "b3BhcXVl"},
            {"type": "tool_use", "id": "a", "name": "ls", "input": {}},
        ],
    }


@pytest.mark.parametrize(
    "made_by", [("anthropic", "claude-opus-5-5"), ("openai", MODEL)], ids=["model", "dialect"]
)
async def test_another_models_answer_is_sent_without_its_thinking(
    provider: Provider, model: Anthropic, made_by: tuple[str, str]
) -> None:
    turn = AssistantTurn(
        "Hm.", "secret thoughts", [ToolCall("f.ls:0", "ls", '{"path": "."}')], *made_by, {"x": 1}
    )
    result = ToolTurn("f.ls:0", "ls", "a.txt")
    body = await sent(provider, model, UserTurn("x"), turn, result)
    assert body["messages"][1]["content"] == [
        {"type": "text", "text": "Hm."},
        {"type": "tool_use", "id": "f_ls_0", "name": "ls", "input": {"path": "."}},
    ]
    assert body["messages"][2]["content"][0]["tool_use_id"] == "f_ls_0"


async def test_blocks_may_be_interleaved(provider: Provider, model: Anthropic) -> None:
    provider.reply(
        blocks(
            start(1, type="text", text="b"),
            start(0, type="text", text=""),
            delta(0, type="text_delta", text="a"),
            delta(1, type="text_delta", text="c"),
        )
    )
    *deltas, answer = await parts(model)
    assert deltas == [Text("b"), Text("a"), Text("c")]
    assert isinstance(answer, Answer)
    assert answer.turn.text == "abc"


async def test_unknown_events_and_blocks_are_no_reason_to_fail(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(
        blocks(
            {"type": "tomorrow"},
            start(0, type="tomorrow", thing=1),
            delta(0, type="tomorrow_delta", thing=2),
            start(1, type="text", text=""),
            delta(1, type="text_delta", text="a"),
        )
    )
    answer = await ask(model)
    assert answer.turn.text == "a"
    assert answer.turn.raw["content"][0] == {"type": "tomorrow", "thing": 1}


async def test_results_in_a_row_become_one_message(provider: Provider, model: Anthropic) -> None:
    calls = [ToolCall("a", "ls", "{}"), ToolCall("b", "rm", "{}")]
    body = await sent(
        provider,
        model,
        UserTurn("x"),
        AssistantTurn("", tool_calls=calls),
        ToolTurn("a", "ls", "a.txt"),
        ToolTurn("b", "rm", "Denied.", is_error=True),
    )
    assert body["messages"][2:] == [
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "a.txt"},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "content": "Denied.",
                    "is_error": True,
                    "cache_control": CACHED,
                },
            ],
        }
    ]


async def test_files_are_sent_as_what_they_are(provider: Provider, model: Anthropic) -> None:
    files = [
        File("a.png", "image/png", b"\x89PNG"),
        File("b.pdf", "application/pdf", b"%PDF"),
        File("c.py", "application/octet-stream", b"x = 1"),
        File("d.bin", "application/zip", b"\xff\xfe\x00"),
    ]
    body = await sent(provider, model, UserTurn("look", files))
    image, document, text, unknown, said = body["messages"][0]["content"]
    assert image["source"] == {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(b"\x89PNG").decode(),
    }
    assert document["type"] == "document"
    assert document["title"] == "b.pdf"
    assert base64.b64decode(document["source"]["data"]) == b"%PDF"
    assert text == {"type": "text", "text": "File c.py:\nx = 1"}
    assert "d.bin" in unknown["text"]
    assert said["text"] == "look"


async def test_no_blank_text_is_sent_which_the_api_refuses(
    provider: Provider, model: Anthropic
) -> None:
    body = await sent(provider, model, UserTurn(" "), AssistantTurn("  "), UserTurn("x"))
    texts = [b["text"] for m in body["messages"] for b in m["content"] if b["type"] == "text"]
    assert all(text.strip() for text in texts)
    assert [message["role"] for message in body["messages"]] == ["user"]


@pytest.mark.parametrize(
    ("name", "level", "fields"),
    [
        (MODEL, None, {}),
        (MODEL, "off", {"thinking": {"type": "between_tools"}}),
        ("claude-sonnet-5", "off", {"thinking": {"type": "disabled"}}),
        ("claude-opus-4-6", "off", {"thinking": {"type": "disabled"}}),
        ("claude-haiku-5-5", "off", {"thinking": {"type": "disabled"}}),
        ("claude-haiku-4-5", "off", {"thinking": {"type": "disabled"}}),
        ("claude-opus-5-5", "off", {"output_config": {"effort": "low"}}),
        ("claude-fable-5-1", "off", {"output_config": {"effort": "low"}}),
        (
            MODEL,
            "high",
            {
                "thinking": {"type": "adaptive", "display": "summarized"},
                "output_config": {"effort": "high"},
            },
        ),
        (
            "claude-opus-4-6",
            "low",
            {
                "thinking": {"type": "adaptive", "display": "summarized"},
                "output_config": {"effort": "low"},
            },
        ),
        (
            "claude-sonnet-4-5-20250929",
            "medium",
            {"thinking": {"type": "enabled", "budget_tokens": 8192}},
        ),
        (
            "claude-opus-4-20250514",
            "low",
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
        ),
        ("glm-5", "low", {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
    ],
)
async def test_how_much_to_think_is_said_as_the_model_wants_it(
    provider: Provider, model: Anthropic, name: str, level: Any, fields: dict[str, Any]
) -> None:
    body = await sent(provider, model, model=name, thinking=level)
    assert {k: v for k, v in body.items() if k in ("thinking", "output_config")} == fields


async def test_a_thinking_budget_leaves_room_for_the_answer(
    provider: Provider, model: Anthropic
) -> None:
    body = await sent(provider, model, model="claude-haiku-4-5", thinking="high", max_tokens=4_000)
    assert body["thinking"]["budget_tokens"] == 2_000
    assert body["max_tokens"] == 4_000
    body = await sent(provider, model, model="claude-haiku-4-5", thinking="high", max_tokens=1_000)
    assert "thinking" not in body


@pytest.mark.parametrize(
    ("name", "thinking", "temperature"),
    [
        ("claude-haiku-4-5", None, 0.5),
        ("claude-sonnet-4-6", "off", 0.5),
        ("claude-haiku-4-5", "low", None),
        ("claude-opus-4-7", None, None),
        (MODEL, None, None),
    ],
)
async def test_a_temperature_is_sent_only_where_it_is_taken(
    provider: Provider, model: Anthropic, name: str, thinking: Any, temperature: float | None
) -> None:
    body = await sent(provider, model, model=name, thinking=thinking, temperature=0.5)
    assert body.get("temperature") == temperature


async def test_a_temperature_is_no_higher_than_the_api_takes(
    provider: Provider, model: Anthropic
) -> None:
    body = await sent(provider, model, model="claude-haiku-4-5", temperature=1.7)
    assert body["temperature"] == 1.0


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("end_turn", "end_turn"),
        ("max_tokens", "max_tokens"),
        ("model_context_window_exceeded", "max_tokens"),
        ("stop_sequence", "stop_sequence"),
        ("refusal", "refusal"),
        ("pause_turn", "pause_turn"),
        ("tool_use", "end_turn"),
        ("tomorrow", "end_turn"),
    ],
)
async def test_stop_reasons_are_our_own(
    provider: Provider, model: Anthropic, word: str, reason: str
) -> None:
    provider.reply(blocks(start(0, type="text", text="a"), stop=word))
    assert (await ask(model)).stop_reason == reason


@pytest.mark.parametrize(
    ("kind", "retry"),
    [
        ("overloaded_error", "provider_error"),
        ("rate_limit_error", "rate_limit"),
        ("api_error", "provider_error"),
        ("invalid_request_error", None),
    ],
)
async def test_an_error_in_mid_stream_says_whether_to_try_again(
    provider: Provider, model: Anthropic, kind: str, retry: str | None
) -> None:
    provider.reply(Reply(text=["a"], error=f"It was {KEY}.", error_type=kind))
    with pytest.raises(ModelError) as caught:
        await parts(model)
    assert caught.value.retry == retry
    assert "anthropic" in caught.value.message
    assert KEY not in caught.value.message


async def test_a_refused_key_names_its_setting_and_not_the_key(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(Reply(status=401, error=f"bad {KEY}", error_type="authentication_error"))
    with pytest.raises(ModelError) as caught:
        await parts(model)
    assert caught.value.retry is None
    assert "ANTHROPIC_API_KEY" in caught.value.message
    assert KEY not in caught.value.message
    assert KEY not in repr(model)


async def test_a_stream_that_is_cut_may_be_asked_again(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(Reply(text=["a", "b"], cut_after=1))
    with pytest.raises(ModelError) as caught:
        await parts(model)
    assert caught.value.retry == "connection"


async def test_a_stream_that_ends_without_its_end_may_be_asked_again(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(
        Reply(body=sse(start(0, type="text", text=""), delta(0, type="text_delta", text="a")))
    )
    with pytest.raises(ModelError) as caught:
        await parts(model)
    assert caught.value.retry == "connection"
    assert "cut" in caught.value.message


@pytest.mark.parametrize(
    "event", [b"{", b"[]", b"{}", json.dumps(delta(7, type="text_delta")).encode()]
)
async def test_an_event_that_makes_no_sense_is_a_model_error(
    provider: Provider, model: Anthropic, event: bytes
) -> None:
    provider.reply(Reply(body=sse(event)))
    with pytest.raises(ModelError) as caught:
        await parts(model)
    assert caught.value.retry == "provider_error"


async def test_closing_the_iterator_cuts_the_connection(
    provider: Provider, model: Anthropic
) -> None:
    provider.reply(Reply(text=["a", "b"], hang=True, hang_after=1))
    async with aclosing(model.stream(HELLO)) as batches:
        assert await anext(batches) == [Text("a")]
    await provider.left()


async def test_the_connection_is_kept_for_the_next_question(
    provider: Provider, model: Anthropic
) -> None:
    for _ in range(3):
        assert (await ask(model)).turn.text == "Hello"
    assert provider.disconnects == 0
    connector = model.pool._session.connector  # type: ignore[union-attr]
    assert len(connector._conns) == 1  # type: ignore[union-attr]
