"""Messages told as events: how a conversation that a client brings along gets into the log.

The other way round from `conversation.conversation`. What is made here is history: a run of it has
ended, is never driven and grants nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from ownware_gateway.events import (
    Attachment,
    Event,
    SessionEnd,
    SessionStart,
    TextComplete,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallStart,
    TurnEnd,
    TurnStart,
    Usage,
    UserMessage,
)
from ownware_gateway.log import Private
from ownware_gateway.masking import Masker
from ownware_gateway.models import AssistantTurn, File, Message, ToolTurn, UserTurn
from ownware_gateway.transcript import Answer

#: Every run begins with a person's message, and so does every request to some providers.
NOBODY_SPOKE: Final = "(The conversation begins with the assistant.)"


class Teller(NamedTuple):
    """Who is said to have led the conversation, and when; `masker` hides the secrets in it."""

    profile_id: str
    model: str
    now_ms: int
    new_id: Callable[[str], str]
    masker: Masker


def told(messages: Sequence[Message], teller: Teller) -> tuple[list[Event], list[Private]]:
    """Return the events that tell of these messages, and what is kept beside them.

    That is their files, and calls to the letter, by the events' places.
    """
    events: list[Event] = []
    private: list[Private] = []
    for asked, answers in _runs(messages):
        private += [
            Private("attachment", file.data, index, len(events))
            for index, file in enumerate(asked.files)
        ]
        events += _run(asked, answers, teller, len(events), private)
    return events, private


def begun(
    messages: Sequence[Message], teller: Teller, at: int
) -> tuple[list[Event], list[Private]]:
    """Return the turns of a run that goes on from these answers of the model and their results.

    The first of them is at a place of its append, behind the run's own beginning. What comes next
    in the run is that the model is asked again.
    """
    private: list[Private] = []
    return _turns(messages, teller, at, private), private


def _runs(messages: Sequence[Message]) -> Iterator[tuple[UserTurn, list[Message]]]:
    """Yield what a person said and what followed; said in a row, it is one message."""
    asked: UserTurn | None = None
    answers: list[Message] = []
    for message in messages:
        if not isinstance(message, UserTurn):
            answers.append(message)
        elif asked is not None and not answers:
            asked = joined(asked, message)
        else:
            if asked is not None or answers:
                yield asked or UserTurn(NOBODY_SPOKE), answers
            asked, answers = message, []
    if asked is not None or answers:
        yield asked or UserTurn(NOBODY_SPOKE), answers


def attachments_of(files: Sequence[File]) -> list[Attachment] | None:
    """Return what a message says of its files."""
    shown = [
        Attachment(
            filename=item.filename,
            mime_type=item.mime_type,
            size_bytes=len(item.data),
            detail=item.detail,
        )
        for item in files
    ]
    return shown or None


def joined(first: UserTurn, second: UserTurn) -> UserTurn:
    """Return two messages of a person as one."""
    text = "\n\n".join(part for part in (first.text, second.text) if part)
    return UserTurn(text, [*first.files, *second.files])


def _run(
    asked: UserTurn, answers: Sequence[Message], teller: Teller, at: int, private: list[Private]
) -> list[Event]:
    run_id, now = teller.new_id("run"), teller.now_ms
    events: list[Event] = [
        UserMessage(
            run_id=run_id, text=asked.text, attachments=attachments_of(asked.files), timestamp=now
        ),
        SessionStart(
            run_id=run_id,
            session_id=run_id,
            profile_id=teller.profile_id,
            model=teller.model,
            timestamp=now,
        ),
    ]
    events += _turns(answers, teller, at + len(events), private)
    return [
        *events,
        SessionEnd(
            run_id=run_id,
            session_id=run_id,
            status="succeeded",
            reason="end_turn",
            total_usage=Usage(),
            turn_count=sum(isinstance(message, AssistantTurn) for message in answers),
            timestamp=now,
        ),
    ]


def _turns(
    answers: Sequence[Message], teller: Teller, at: int, private: list[Private]
) -> list[Event]:
    """Return the events of turns, the first of which is at a place of its append.

    Arguments stand in events as people may see them: what was written is kept beside.
    """
    events: list[Event] = []
    for index, (turn, results) in enumerate(_with_results(answers)):
        events += _answer(turn, index, teller)
        if turn.tool_calls:
            whole = Answer(turn, "tool_use", Usage())
            private.append(Private("message", whole.dump(), 0, at + len(events) - 1))
        events += _results(turn, index, results, teller)
    return events


def _with_results(
    answers: Sequence[Message],
) -> Sequence[tuple[AssistantTurn, dict[str, ToolTurn]]]:
    """Return the model's turns, each with its results: the id of a call may come again later."""
    turns: list[tuple[AssistantTurn, dict[str, ToolTurn]]] = []
    for message in answers:
        match message:
            case AssistantTurn():
                turns.append((message, {}))
            case ToolTurn():
                for turn, results in reversed(turns):
                    if any(call.id == message.tool_call_id for call in turn.tool_calls):
                        results[message.tool_call_id] = message
                        break
            case UserTurn():
                pass  # None is among the answers to one.
    return turns


def _answer(turn: AssistantTurn, index: int, teller: Teller) -> Iterator[Event]:
    yield TurnStart(turn_index=index, timestamp=teller.now_ms)
    for call in turn.tool_calls:
        yield ToolCallStart(tool_call_id=call.id, tool_name=call.name, turn_index=index)
        shown = teller.masker.arguments(call.arguments)
        yield ToolCallArgsDelta(tool_call_id=call.id, delta=shown, turn_index=index)
    yield TextComplete(text=turn.text, turn_index=index)


def _results(
    turn: AssistantTurn, index: int, results: dict[str, ToolTurn], teller: Teller
) -> Iterator[Event]:
    for call in turn.tool_calls:
        if (result := results.get(call.id)) is not None:
            yield ToolCallEnd(
                tool_call_id=call.id,
                tool_name=call.name,
                result=teller.masker.text(result.text),
                is_error=result.is_error,
                duration_ms=0,
                turn_index=index,
                output_bytes_raw=len(result.text.encode("utf-8", "replace")),
            )
    yield TurnEnd(
        turn_index=index,
        stop_reason="tool_use" if turn.tool_calls else "end_turn",
        usage=Usage(),
        timestamp=teller.now_ms,
    )
