"""Events in, frames out: what this door emits is pinned, byte for byte."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway import sse
from ownware_gateway.doors.openai.chunks import (
    DONE,
    Answer,
    Frames,
    Shape,
    Whole,
    completion_id,
    parse_completion_id,
)
from ownware_gateway.events import (
    EVENTS,
    AgentComplete,
    AgentSpawn,
    CalledTool,
    ClientCall,
    ClientResult,
    CompactionEnd,
    CompactionStart,
    ContextPressure,
    Error,
    Event,
    PermissionRequest,
    PermissionResponse,
    Position,
    QuestionRequest,
    QuestionResponse,
    Recovery,
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
)
from ownware_gateway.sse import Sent

GOLDEN = Path(__file__).parents[2] / "golden"
AT = 1_790_000_000_000
USAGE = Usage(input_tokens=10, output_tokens=5, cache_read_tokens=4, model="demo:x", cost_usd=0.01)
SHAPE = Shape("chatcmpl-1", "run_1", "assistant", AT // 1000, include_usage=True)
INPUT = {"path": "é.txt"}
ASKED = PermissionRequest(
    request_id="p1",
    tool_call_id="c1",
    tool_name="write_file",
    input=INPUT,
    reason="the profile asks first.",
    operation_hash="h",
    expires_at=AT,
    turn_index=2,
)


def end(status: Any = "succeeded", reason: Any = "end_turn") -> SessionEnd:
    return SessionEnd(
        run_id="run_1",
        session_id="run_1",
        status=status,
        reason=reason,
        total_usage=USAGE,
        turn_count=1,
        timestamp=AT,
    )


def turn(index: int) -> TurnEnd:
    return TurnEnd(turn_index=index, stop_reason="tool_use", usage=USAGE, timestamp=AT)


#: A run with everything that can happen in it, in six completions.
ASKS: list[Event] = [
    UserMessage(run_id="run_1", text="Go", timestamp=AT),
    SessionStart(run_id="run_1", session_id="run_1", profile_id="p", model="demo:x", timestamp=AT),
    TurnStart(turn_index=0, timestamp=AT),
    TextDelta(text="[A server is away.]\n\n", turn_index=0, notice=True),
    ThinkingDelta(text="Hm", turn_index=0),
    TextDelta(text='I "look"\n\u2028é', turn_index=0),
    ToolCallStart(tool_call_id="c0", tool_name="glob", turn_index=0),
    ThinkingComplete(text="Hm", turn_index=0),
    ToolCallArgsDelta(tool_call_id="c0", delta="{}", turn_index=0),
    TextComplete(text='I "look"\n\u2028é', turn_index=0),
    ToolCallExecute(tool_call_id="c0", tool_name="glob", input={}, turn_index=0),
    ToolCallProgress(tool_call_id="c0", progress="…", turn_index=0),
    ToolCallEnd(
        tool_call_id="c0",
        tool_name="glob",
        result="a",
        is_error=False,
        duration_ms=1,
        turn_index=0,
        output_bytes_raw=1,
    ),
    turn(0),
    TurnStart(turn_index=1, timestamp=AT),
    TextDelta(text="half an ans", turn_index=1),
    TextDelta(text="\n\n[interrupted, answering again]\n\n", turn_index=1, notice=True),
    Recovery(reason="connection", attempt=1, detail="cut", turn_index=1, supersedes=1),
    TurnStart(turn_index=2, timestamp=AT),
    Recovery(reason="rate_limit", attempt=1, detail="slow down", turn_index=2),
    # Its deltas are not kept any more.
    StreamGap(from_seq=21, to_seq=21, reason="retention"),
    ThinkingComplete(text="So.", turn_index=2),
    TextComplete(text="I write.", turn_index=2),
    ASKED,
]
ANSWERS: list[Event] = [
    PermissionResponse(
        request_id="p1", granted=True, decided_by="user", reason="yes", turn_index=2
    ),
    AgentSpawn(
        agent_id="agent_1",
        parent_agent_id="root",
        run_id="run_2",
        tool_call_id="c2",
        name="helper",
        profile_name="helps",
        model="demo:x",
        task="Look.",
        time_left_ms=1,
        turn_index=2,
    ),
    AgentComplete(
        agent_id="agent_1", result="Seen.", status="completed", duration_ms=1, turn_index=2
    ),
    turn(2),
    TurnStart(turn_index=3, timestamp=AT),
    ContextPressure(level=0.9, token_count=9, context_window=10, turn_index=3),
    ToolResultDrop(
        dropped_count=1,
        bytes_reclaimed=1,
        kept_chars=0,
        through=Position(run_id="run_1", turn_index=0),
        turn_index=3,
    ),
    CompactionStart(strategy="summary", pre_token_count=9, turn_index=3),
    CompactionEnd(
        strategy="summary",
        status="failed",
        pre_token_count=9,
        post_token_count=9,
        saved_percent=0,
        turn_index=3,
    ),
    TextDelta(text="Done.", turn_index=3),
    TextComplete(text="Done.", turn_index=3),
    turn(3),
    end("failed", "max_turns"),
]
WORDS: list[Event] = [
    QuestionResponse(
        request_id="q1", answer="blue", decided_by="user", reason="answered", turn_index=2
    ),
    QuestionRequest(
        request_id="q2",
        tool_call_id="c3",
        tool_name="ask_user",
        question="Which one?",
        options=["green", "red"],
        multiple=False,
        operation_hash="h",
        expires_at=AT,
        turn_index=2,
    ),
]
FAILS: list[Event] = [
    PermissionResponse(
        request_id="p1", granted=True, decided_by="user", reason="yes", turn_index=2
    ),
    RunCancel(run_id="run_1", requested_by="local"),
    TurnInterrupted(turn_index=2, reason="aborted", timestamp=AT),
    Error(code="provider_error", message="It said no.", recoverable=False),
    end("failed", "error"),
]


CALLS: list[Event] = [
    TurnStart(turn_index=2, timestamp=AT),
    ToolCallStart(tool_call_id="c4", tool_name="weather", turn_index=2),
    ToolCallArgsDelta(tool_call_id="c4", delta='{"key":"[secret]"}', turn_index=2),
    TextComplete(text="I look.", turn_index=2),
    ClientCall(
        request_id="q3",
        calls=[
            CalledTool(tool_call_id="c4", tool_name="weather"),
            CalledTool(tool_call_id="c5", tool_name="clock"),
        ],
        operation_hash="h",
        expires_at=AT,
        usage=USAGE,
        turn_index=2,
    ),
]
RESULTS: list[Event] = [
    ClientResult(
        request_id="q3",
        results=[
            ToolResult(tool_call_id="c4", result="sunny"),
            ToolResult(tool_call_id="c5", result="noon"),
        ],
        decided_by="user",
        reason="the client answered",
        turn_index=2,
    ),
    turn(2),
    TurnStart(turn_index=3, timestamp=AT),
    TextComplete(text="It is sunny.", turn_index=3),
    turn(3),
    end(),
]

#: What the events have with secrets masked.
EXACT = {"q3": ['{"key": "\u2028é"', ""]}

ALL = (ASKS, ANSWERS, WORDS, FAILS, CALLS, RESULTS)


def sent(events: Sequence[Event]) -> list[Sent]:
    frames = b""
    for seq, event in enumerate(events, 1):
        payload = event.encode()[:-1] + f',"seq":{seq}}}'.encode()
        frames += sse.frame(f"e.{seq}", event.type, payload)
    return list(sse.split(frames))


def frames(events: Sequence[Event], shape: Shape = SHAPE, seen: tuple[int, int] = (0, 0)) -> bytes:
    made = Frames(shape, seen)
    made.answer.exact.update(EXACT)
    pieces = [made.of(item) for item in sent(events)]
    assert made.answer.over
    return b"".join(pieces) + DONE


def test_the_frames_are_these() -> None:
    made = b"".join(frames(events) for events in ALL)
    assert made == (GOLDEN / "openai.sse").read_bytes()


def test_the_completion_is_this() -> None:
    bodies = []
    for events in ALL:
        whole = Whole(SHAPE)
        whole.answer.exact.update(EXACT)
        for item in sent(events):
            whole.take(item)
        assert whole.answer.over
        bodies.append(whole.body() if whole.wrong is None else whole.wrong.envelope())
    made = "".join(json.dumps(body, ensure_ascii=False) + "\n" for body in bodies)
    assert made == (GOLDEN / "openai.jsonl").read_text("utf-8")


def test_every_event_that_there_is_can_happen_here() -> None:
    assert {event.type for events in ALL for event in events} == set(EVENTS)


@pytest.mark.parametrize("events", [ASKS, CALLS])
def test_what_was_seen_is_left_out_and_the_rest_is_the_same_to_the_byte(
    events: list[Event],
) -> None:
    whole = frames(events)
    blocks = whole.split(b"\n\n")
    for place, block in enumerate(blocks[:-2], 1):
        _, seq, number = block.partition(b"\n")[0].split(b".")
        rest = frames(events, seen=(int(seq), int(number)))
        assert rest == b"\n\n".join(blocks[place:])


@pytest.mark.parametrize(
    ("status", "reason", "finish"),
    [
        ("succeeded", "end_turn", "stop"),
        ("succeeded", "stop_sequence", "stop"),
        ("succeeded", "max_tokens", "length"),
        ("succeeded", "refusal", "content_filter"),
        ("failed", "budget_exceeded", "length"),
        ("cancelled", "aborted", "stop"),
    ],
)
def test_the_reason_of_an_end_in_openais_words(status: str, reason: str, finish: str) -> None:
    *_, last, usage, done, _ = frames([end(status, reason)]).split(b"\n\n")
    chunk = json.loads(last.partition(b"data: ")[2])
    assert chunk["choices"][0]["finish_reason"] == finish
    assert chunk.get("run_status") == (None if status == "succeeded" else status)
    assert b'"usage":{' in usage
    assert done == b"data: [DONE]"


def test_what_the_client_has_said_before_is_not_said_again() -> None:
    events = [*CALLS[:-1], turn(2), *RESULTS[2:]]
    made = frames(events, SHAPE._replace(brought=3))
    assert (b"I look." in made, b"It is sunny." in made) == (False, True)
    assert b'"total_tokens":15,' in made


def test_a_run_out_of_time_is_no_answer() -> None:
    assert b'"code":"timed_out"' in frames([end("timed_out", "aborted")])


@pytest.mark.parametrize("has_tools", [True, False])
def test_json_is_not_mixed_with_words(has_tools: bool) -> None:
    shape = SHAPE._replace(json=True, has_tools=has_tools)
    events = [
        TextDelta(text="[A server is away.]", turn_index=0, notice=True),
        TurnStart(turn_index=0, timestamp=AT),
        TextDelta(text='{"a":', turn_index=0),
        TextDelta(text=" 1}", turn_index=0),
        TextComplete(text='{"a": 1}', turn_index=0),
        end(),
    ]
    made = frames(events, shape)
    assert made.count(b'"content":"') == (2 if has_tools else 3), "the first one is the role's"
    assert b"server is away" not in made
    assert b'"content":"' not in frames([ASKED], shape).partition(b'"role"')[2].partition(b"\n")[2]


def test_half_a_character_of_a_provider_breaks_no_frame() -> None:
    answer = Answer(SHAPE, holds=False)
    (said,) = answer.take("text.delta", {"text": "x", "seq": 1})
    assert said.text == "x"  # type: ignore[union-attr]
    made = Frames(SHAPE).of(Sent(b"e.1", b"text.delta", b'{"text":"\\ud83d","seq":1}'))
    assert b"?" in made


def test_the_name_of_a_completion_leads_to_its_run() -> None:
    for run_id, after in (("run_0a1b", None), ("run_0a1b", 17)):
        assert parse_completion_id(completion_id(run_id, after)) == (run_id, after)
    for name in ("x", "chatcmpl-a-b", "chatcmpl-a-", "chatcmpl-a-" + "9" * 20):
        assert parse_completion_id(name) is None
