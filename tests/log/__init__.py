"""Events and appends to fill a log with, and what the tests of a log have in common."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from ownware_gateway.events import (
    EndStatus,
    Event,
    PermissionRequest,
    PermissionResponse,
    QuestionRequest,
    QuestionResponse,
    RunCancel,
    SessionEnd,
    SessionStart,
    TextDelta,
    TurnEnd,
    Usage,
    UserMessage,
)
from ownware_gateway.log import (
    Append,
    Decides,
    Drives,
    Log,
    NewRun,
    Private,
    Starts,
    Stream,
)

STREAM: Final = Stream("thread_1")

#: How long a test waits for something that must happen.
PATIENCE_S: Final = 10.0


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def message(run_id: str, text: str = "hello") -> UserMessage:
    return UserMessage(run_id=run_id, text=text, timestamp=1)


def session_start(run_id: str) -> SessionStart:
    return SessionStart(run_id=run_id, session_id=run_id, profile_id="p", model="m", timestamp=2)


def delta(text: str = "word ") -> TextDelta:
    return TextDelta(text=text, turn_index=0)


def question(request_id: str, expires_at: int = 2_000_000) -> PermissionRequest:
    return PermissionRequest(
        request_id=request_id,
        tool_call_id="call",
        tool_name="shell_execute",
        input={"command": "true"},
        reason="it changes things",
        operation_hash="hash",
        expires_at=expires_at,
        turn_index=3,
    )


def words(
    request_id: str, text: str = "Which one?", expires_at: int = 2_000_000
) -> QuestionRequest:
    """A question that wants an answer in words."""
    return QuestionRequest(
        request_id=request_id,
        tool_call_id="call",
        tool_name="ask_user",
        question=text,
        options=["red", "green"],
        multiple=True,
        operation_hash="hash",
        expires_at=expires_at,
        turn_index=3,
    )


def answer(request_id: str, text: str | None, *, late: bool = False) -> QuestionResponse:
    return QuestionResponse(
        request_id=request_id,
        answer=text,
        decided_by="timeout" if late else "user",
        reason="",
        turn_index=3,
    )


def reply(request_id: str, *, granted: bool = True, late: bool = False) -> PermissionResponse:
    return PermissionResponse(
        request_id=request_id,
        granted=granted,
        decided_by="timeout" if late else "user",
        reason="",
        turn_index=3,
    )


def cancel(run_id: str) -> RunCancel:
    return RunCancel(run_id=run_id, requested_by="test")


def turn_end(usage: Usage) -> TurnEnd:
    return TurnEnd(turn_index=0, stop_reason="end_turn", usage=usage, timestamp=3)


def session_end(
    run_id: str, status: EndStatus = "succeeded", usage: Usage | None = None
) -> SessionEnd:
    return SessionEnd(
        run_id=run_id,
        session_id=run_id,
        status=status,
        reason="end_turn",
        total_usage=usage or Usage(),
        turn_count=1,
        timestamp=4,
    )


def starts(run_id: str, stream: Stream = STREAM, private: Sequence[Private] = ()) -> Append:
    run = NewRun(id=run_id, profile_id="p", model="m", timeout_ms=60_000, title=f"of {run_id}")
    return Append(stream, Starts(run), [message(run_id)], private)


def drives(
    run_id: str,
    *events: Event,
    stream: Stream = STREAM,
    generation: int = 1,
    private: Sequence[Private] = (),
) -> Append:
    return Append(stream, Drives(run_id, generation), events, private)


def decides(request_id: str, *, late: bool = False) -> Append:
    return Append(STREAM, Decides(request_id, late), [reply(request_id, late=late)])


async def whole_run(log: Log, run_id: str, *events: Event, stream: Stream = STREAM) -> None:
    """Store a run from its first event to its last."""
    log.append(starts(run_id, stream))
    await log.append(drives(run_id, *events, session_end(run_id), stream=stream)).wait()


async def read_chunks(log: Log, stream: Stream = STREAM, after: int = 0) -> bytes:
    """Return the bytes of all frames above a cursor."""
    data = b""
    while (chunk := await log.chunk(stream, after)) is not None:
        data += chunk.data
        after = chunk.last_seq
    return data


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Look again and again until something holds that nobody announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():
            await asyncio.sleep(0.005)
