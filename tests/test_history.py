"""Messages of a client, told as events: what a model is told then is what the client said."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from ownware_gateway.conversation import conversation
from ownware_gateway.events import Event, UserMessage, decode
from ownware_gateway.history import NOBODY_SPOKE, Teller, told
from ownware_gateway.masking import Masker
from ownware_gateway.models import (
    AssistantTurn,
    File,
    Message,
    Options,
    Request,
    ToolCall,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.transcript import RunFacts, fold

TELLER = Teller("p", "demo:x", 1, lambda kind: f"{kind}_1", Masker())
CALL = ToolCall("c1", "look", '{"at": 1}')

Text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def retold(messages: Sequence[Message]) -> list[Message]:
    """Return what a model is told of messages that went through the log."""
    events, private = told(messages, TELLER)
    stored: list[Event] = [decode(event.encode()) for event in events]
    runs: list[RunFacts] = fold(list(enumerate(stored)))
    for run in runs:
        run.files = [
            File(item.filename, item.mime_type, fact.body)
            for fact in private
            if fact.place == run.seq
            for item in [(run.message.attachments or [])[fact.index]]
        ]
    return conversation(runs)


def alike(messages: Sequence[Message]) -> list[Message]:
    """Return messages as lists have them, which are no tuples."""
    same: list[Message] = []
    for turn in messages:
        match turn:
            case UserTurn():
                same.append(replace(turn, files=list(turn.files)))
            case AssistantTurn():
                same.append(replace(turn, tool_calls=list(turn.tool_calls)))
            case ToolTurn():
                same.append(turn)
    return same


@given(st.lists(st.tuples(Text, Text), max_size=6))
def test_questions_and_answers_come_back_as_they_were(pairs: list[tuple[str, str]]) -> None:
    said: list[Message] = []
    for asked, answered in pairs:
        said += [UserTurn(asked), AssistantTurn(answered)]
    assert retold(said) == alike(said)


def test_calls_results_and_files_come_back_too() -> None:
    picture, page = File("a.png", "image/png", b"1"), File("b.pdf", "application/pdf", b"2")
    said: list[Message] = [
        UserTurn("see", [picture, page]),
        AssistantTurn("", tool_calls=[CALL]),
        ToolTurn("c1", "look", "a cat"),
        AssistantTurn("A cat."),
    ]
    assert retold(said) == alike(said)


@pytest.mark.parametrize(
    ("said", "known"),
    [
        (
            [UserTurn("a"), UserTurn("b"), AssistantTurn("c")],
            [UserTurn("a\n\nb"), AssistantTurn("c")],
        ),
        ([AssistantTurn("a")], [UserTurn(NOBODY_SPOKE), AssistantTurn("a")]),
        ([], []),
    ],
)
def test_what_providers_refuse_is_put_in_order(said: list[Message], known: list[Message]) -> None:
    assert retold(said) == alike(known)


def test_history_is_made_of_runs_that_have_ended() -> None:
    events, _ = told([UserTurn("a"), AssistantTurn("b")], TELLER)
    assert isinstance(events[0], UserMessage)
    assert events[-1].type == "session.end"


def test_options_come_back_as_they_were_and_those_of_a_newer_gateway_are_left_out() -> None:
    options = Options(temperature=0.0, stop=("a",), metadata={"k": "v"}, bare=True, door={"x": 1})
    again = Options.restore(options.dump())
    assert again._replace(stop=tuple(again.stop)) == options
    assert Options.restore(b'{"seed": 1, "newer": 2}') == Options(seed=1)
    request = Request("m", [], temperature=1.0, max_tokens=5)
    assert Options().apply(request) is request
    asked = options.apply(request)
    assert (asked.temperature, asked.max_tokens, asked.stop) == (0.0, 5, ("a",))
