import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ownware_gateway.events import (
    ANSWERING,
    ASKED,
    ASKING,
    DELTAS,
    EVENTS,
    AgentComplete,
    AgentSpawn,
    AnyEvent,
    Attachment,
    CalledTool,
    ClientCall,
    ClientResult,
    CompactionEnd,
    CompactionStart,
    ContextPressure,
    Error,
    Event,
    Fallback,
    ImagePart,
    PermissionRequest,
    PermissionResponse,
    Position,
    QuestionRequest,
    QuestionResponse,
    Recovery,
    ResourcePart,
    RunCancel,
    SessionEnd,
    SessionStart,
    StreamGap,
    TextComplete,
    TextDelta,
    ThinkingComplete,
    ThinkingDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallProgress,
    ToolCallStart,
    ToolResult,
    ToolResultDrop,
    TurnEnd,
    TurnInterrupted,
    TurnStart,
    Usage,
    UserMessage,
    ValuePart,
    decode,
)

GOLDEN = Path(__file__).parent / "golden" / "events.jsonl"
AT = 1_790_000_000_000
USAGE = Usage(
    input_tokens=10,
    output_tokens=5,
    cache_read_tokens=4,
    cache_creation_tokens=1,
    model="demo:echo",
    cost_usd=0.0125,
)
FILE = Attachment(filename="a b.png", mime_type="image/png", size_bytes=3)
INPUT = {"file_path": "é.txt", "lines": [1, 2.5, None, True], "nested": {"snake_case": "kept"}}

#: Every type once, and once more where an optional field changes what is written.
EXAMPLES: list[AnyEvent] = [
    UserMessage(run_id="r", text='Hi "é"\n\u2028', attachments=None, timestamp=AT),
    UserMessage(run_id="r", text="", attachments=[FILE], timestamp=AT),
    SessionStart(run_id="r", session_id="r", profile_id="p", model="demo:echo", timestamp=AT),
    SessionStart(
        run_id="r",
        session_id="r",
        profile_id="p",
        model="demo:echo",
        fallback=Fallback(requested_model="openai:x", reason="no key"),
        timestamp=AT,
    ),
    TurnStart(turn_index=0, timestamp=AT),
    TextDelta(text="Hel", turn_index=0),
    TextDelta(text="\n\n[interrupted, answering again]\n\n", turn_index=0, notice=True),
    TextComplete(text="Hello", turn_index=0),
    ThinkingDelta(text="Hm", turn_index=0),
    ThinkingComplete(text="Hmm", turn_index=0),
    ToolCallStart(tool_call_id="c", tool_name="read_file", turn_index=0),
    ToolCallArgsDelta(tool_call_id="c", delta='{"a": 1}', turn_index=0),
    ToolCallExecute(tool_call_id="c", tool_name="read_file", input=INPUT, turn_index=0),
    ToolCallExecute(
        tool_call_id="c",
        tool_name="read_file",
        input={},
        turn_index=0,
        decision="allow",
        rule="policies.0",
    ),
    ToolCallProgress(tool_call_id="c", progress="line", turn_index=0),
    ToolCallEnd(
        tool_call_id="c",
        tool_name="read_file",
        result="done",
        is_error=False,
        duration_ms=12,
        turn_index=0,
        truncated=True,
        output_bytes_raw=70_000,
    ),
    ToolCallEnd(
        tool_call_id="c",
        tool_name="web__shot",
        result="done",
        is_error=False,
        duration_ms=12,
        turn_index=0,
        truncated=True,
        output_bytes_raw=70_000,
        output_bytes_kept=70_001,
        content=[
            ValuePart(value={"a": [1]}),
            ImagePart(mime_type="image/png", size_bytes=3, index=1),
            ResourcePart(uri="urn:a", mime_type="text/plain", size_bytes=4, index=2),
            ResourcePart(uri="urn:b", mime_type="application/octet-stream"),
        ],
    ),
    ToolCallEnd(
        tool_call_id="c",
        tool_name="read_file",
        result="denied",
        is_error=True,
        duration_ms=0,
        turn_index=0,
        output_bytes_raw=6,
        decision="deny",
        rule="floor.keys",
    ),
    PermissionRequest(
        request_id="q",
        tool_call_id="c",
        tool_name="shell",
        input={"command": "ls"},
        reason="The profile asks.",
        operation_hash="h",
        expires_at=AT,
        turn_index=0,
    ),
    PermissionRequest(
        request_id="q",
        tool_call_id="c",
        tool_name="shell",
        input={},
        reason="A rule asks.",
        operation_hash="h",
        expires_at=AT,
        turn_index=0,
        rule="policies.1",
    ),
    PermissionResponse(
        request_id="q", granted=False, decided_by="timeout", reason="too late", turn_index=0
    ),
    PermissionResponse(
        request_id="q", granted=True, decided_by="user", reason="", always=True, turn_index=0
    ),
    QuestionRequest(
        request_id="q",
        tool_call_id="c",
        tool_name="ask_user",
        question='Which "é"?',
        options=["red", "green"],
        multiple=True,
        operation_hash="h",
        expires_at=AT,
        turn_index=0,
    ),
    QuestionRequest(
        request_id="q",
        tool_call_id="c",
        tool_name="ask_user",
        question="Which one?",
        options=None,
        multiple=False,
        operation_hash="h",
        expires_at=AT,
        turn_index=0,
    ),
    QuestionResponse(
        request_id="q", answer="red\né", decided_by="user", reason="it was said", turn_index=0
    ),
    QuestionResponse(
        request_id="q", answer=None, decided_by="timeout", reason="too late", turn_index=0
    ),
    TurnEnd(turn_index=0, stop_reason="tool_use", usage=USAGE, timestamp=AT),
    TurnInterrupted(turn_index=1, reason="aborted", timestamp=AT),
    Recovery(reason="restart", attempt=1, detail="went on", turn_index=1),
    Recovery(reason="rate_limit", attempt=2, detail="429", turn_index=1, supersedes=0),
    Recovery(reason="prompt_too_long", attempt=1, detail="shorter", turn_index=1),
    ContextPressure(level=0.8, token_count=800, context_window=1_000, turn_index=1),
    ToolResultDrop(
        dropped_count=2,
        bytes_reclaimed=4_000,
        kept_chars=0,
        through=Position(run_id="r", turn_index=0),
        turn_index=1,
    ),
    CompactionStart(strategy="summary", pre_token_count=800, turn_index=1),
    CompactionEnd(
        strategy="summary",
        status="succeeded",
        pre_token_count=800,
        post_token_count=200,
        saved_percent=75,
        summary="Facts: none.",
        through=Position(run_id="q"),
        usage=Usage(input_tokens=700, output_tokens=5, model="openai:x"),
        turn_index=1,
    ),
    CompactionEnd(
        strategy="summary",
        status="failed",
        pre_token_count=800,
        post_token_count=800,
        saved_percent=0,
        detail="It failed.",
        turn_index=1,
    ),
    RunCancel(run_id="r", requested_by="token"),
    Error(code="provider_error", message="It failed.", recoverable=False),
    Error(code="provider_error", message="It failed.", recoverable=True, turn_index=1),
    SessionEnd(
        run_id="r",
        session_id="r",
        status="succeeded",
        reason="end_turn",
        total_usage=Usage(),
        turn_count=1,
        timestamp=AT,
    ),
    SessionEnd(
        run_id="r",
        session_id="r",
        status="failed",
        reason="error",
        code="provider_error",
        total_usage=USAGE,
        turn_count=2,
        timestamp=AT,
    ),
    StreamGap(from_seq=4, to_seq=9, reason="retention"),
    AgentSpawn(
        agent_id="agent_1",
        parent_agent_id="root",
        run_id="r2",
        tool_call_id="c",
        name="reviewer",
        profile_name="careful",
        model="demo:echo",
        task="Look at it.",
        time_left_ms=1_000,
        turn_index=0,
    ),
    AgentSpawn(
        agent_id="agent_1",
        parent_agent_id="root",
        run_id="r2",
        tool_call_id="c",
        name="reviewer",
        profile_name="careful",
        model="demo:echo",
        task="Look at it.",
        time_left_ms=1_000,
        max_cost_usd=0.5,
        turn_index=0,
    ),
    AgentComplete(
        agent_id="agent_1",
        result="It is well.",
        status="completed",
        duration_ms=12,
        usage=USAGE,
        turn_count=2,
        turn_index=0,
    ),
    AgentComplete(
        agent_id="agent_1",
        result="It has never begun.",
        status="error",
        error="It has never begun.",
        duration_ms=0,
        turn_index=0,
    ),
    PermissionRequest(
        request_id="q",
        tool_call_id="c",
        tool_name="shell",
        input={},
        reason="The profile asks.",
        operation_hash="h",
        expires_at=AT,
        turn_index=0,
        agent_id="agent_1",
    ),
    PermissionResponse(
        request_id="q",
        granted=True,
        decided_by="user",
        reason="",
        turn_index=0,
        agent_id="agent_1",
    ),
    ClientCall(
        request_id="q",
        calls=[CalledTool(tool_call_id="c", tool_name="weather")],
        operation_hash="h",
        expires_at=AT,
        usage=USAGE,
        turn_index=0,
    ),
    ClientResult(
        request_id="q",
        results=[ToolResult(tool_call_id="c", result="sunny\né")],
        decided_by="user",
        reason="the client answered",
        turn_index=0,
    ),
    ClientResult(
        request_id="q", results=None, decided_by="timeout", reason="too late", turn_index=0
    ),
]

every_example = pytest.mark.parametrize(
    "event", EXAMPLES, ids=lambda event: f"{event.type}-{len(event.model_fields_set)}"
)


def keys(value: Any) -> list[str]:
    """Return all names in a JSON value, but for what stands in a tool's own input."""
    match value:
        case dict():
            return [*value, *(k for name, v in value.items() if name != "input" for k in keys(v))]
        case list():
            return [key for item in value for key in keys(item)]
        case _:
            return []


def test_every_type_has_an_example() -> None:
    assert {event.type for event in EXAMPLES} == set(EVENTS)


def test_the_vocabulary_is_complete() -> None:
    assert set(EVENTS.values()) == set(get_args(AnyEvent)) == set(Event.__subclasses__())
    assert len(EVENTS) == len(get_args(AnyEvent))
    for name, event in EVENTS.items():
        assert get_args(event.model_fields["type"].annotation) == (name,)


def test_what_is_asked_and_answered_is_of_three_kinds_two_of_which_are_a_persons() -> None:
    assert {"permission.request", "question.request", "client.call"} == ASKING
    assert {"permission.response", "question.response", "client.result"} == ANSWERING
    assert {"client.call", "client.result"} == (ASKING | ANSWERING) - ASKED


def test_deltas_are_events_and_no_fact_is_a_delta() -> None:
    assert set(EVENTS) > DELTAS
    assert DELTAS.isdisjoint({"text.complete", "tool.call.end", "session.end"})


@every_example
def test_an_event_is_one_line_of_camel_case_json_that_begins_with_its_type(event: Event) -> None:
    encoded = event.encode()
    assert encoded.startswith(b'{"type":"%b",' % event.type.encode())
    assert b"\n" not in encoded
    assert b"\r" not in encoded
    assert not [key for key in keys(json.loads(encoded)) if "_" in key]
    assert "seq" not in json.loads(encoded)


@every_example
def test_what_is_written_is_what_is_read(event: Event) -> None:
    decoded = decode(event.encode())
    assert type(decoded) is type(event)
    assert decoded == event
    assert decoded.encode() == event.encode()


@every_example
def test_fields_of_a_newer_version_and_the_number_in_the_log_are_ignored(event: Event) -> None:
    payload = json.loads(event.encode()) | {"seq": 7, "newField": {"x": 1}}
    assert decode(json.dumps(payload).encode()) == event


def test_the_bytes_of_every_type_stay_as_they_are() -> None:
    # Existing clients and stored logs depend on them: this file may grow, and not change.
    golden = GOLDEN.read_bytes().splitlines()
    assert [event.encode() for event in EXAMPLES] == golden


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b'{"type":"no.such.type"}',
        b'{"type":"turn.start","turnIndex":0}',
        b'{"type":"turn.start","turnIndex":"x","timestamp":1}',
        b'{"type":"turn.interrupted","turnIndex":0,"reason":"bored","timestamp":1}',
        b'{"turnIndex":0,"timestamp":1}',
    ],
)
def test_a_payload_that_is_no_known_event_is_refused(payload: bytes) -> None:
    with pytest.raises(ValidationError):
        decode(payload)


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TextDelta(text="a", turn_index=0).text = "b"  # type: ignore[misc]


def test_what_is_not_there_is_not_written_and_what_is_unknown_is_null() -> None:
    plain = json.loads(TextDelta(text="a", turn_index=0).encode())
    assert plain == {"type": "text.delta", "text": "a", "turnIndex": 0}
    end = TurnEnd(turn_index=0, stop_reason="end_turn", usage=Usage(), timestamp=AT)
    assert json.loads(end.encode())["usage"]["costUsd"] is None


def test_half_a_character_of_a_model_does_not_stop_a_run() -> None:
    assert decode(TextDelta(text="a\ud83d", turn_index=0).encode()) == TextDelta(
        text="a\ufffd", turn_index=0
    )
