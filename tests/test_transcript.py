from collections.abc import Iterator

import pytest

from ownware_gateway.conversation import conversation
from ownware_gateway.doors.native.messages import messages
from ownware_gateway.events import Attachment, TextDelta, UserMessage
from ownware_gateway.models import AssistantTurn, File, Message, ToolCall, ToolTurn, UserTurn
from ownware_gateway.run import Finish, closing
from ownware_gateway.transcript import Answer, RunFacts, fold, grants
from tests.test_run import (
    AT,
    ENDINGS,
    READ,
    RUNS,
    SHELL,
    SHELL_2,
    USAGE,
    Recorded,
    Recorder,
)


def closed_runs() -> Iterator[tuple[str, Recorded]]:
    """Every recorded run, whole and ended in every way at every place."""
    for name, recorded in RUNS.items():
        yield name, recorded
        for count in range(1, len(recorded.appends)):
            for how, ending in ENDINGS.items():
                earlier = Recorded(recorded.appends[:count], recorded.answers)
                earlier.appends.append(closing(earlier.facts(), ending, AT))
                yield f"{name}, {how} after {count}", earlier


CLOSED = dict(closed_runs())


def loaded(recorded: Recorded) -> RunFacts:
    """The facts with the text of turns that were cut off, as they are loaded from a log."""
    facts = recorded.facts()
    for turn in facts.turns:
        if not turn.complete and not turn.superseded:
            turn.cut_text = "".join(
                event.text
                for event in recorded.events()
                if isinstance(event, TextDelta)
                and event.turn_index == turn.index
                and not event.notice
            )
    return facts


def check_valid(said: list[Message]) -> None:
    """Fail unless every provider takes this conversation."""
    assert isinstance(said[0], UserTurn)
    open_calls: list[str] = []
    for before, message in zip([None, *said], said, strict=False):
        match message:
            case ToolTurn(tool_call_id):
                assert open_calls[0] == tool_call_id, "results come in the order of the calls"
                open_calls.pop(0)
            case _:
                assert not open_calls, "every call has a result before anything else is said"
        match message:
            case UserTurn():
                assert before is None or isinstance(before, AssistantTurn)
                assert not (isinstance(before, AssistantTurn) and before.tool_calls)
            case AssistantTurn():
                assert message.text or message.tool_calls
                open_calls = [call.id for call in message.tool_calls]
            case ToolTurn():
                pass
    assert not open_calls


@pytest.mark.parametrize("recorded", CLOSED.values(), ids=CLOSED.keys())
def test_a_conversation_can_go_on_after_a_run_that_ended_anywhere(recorded: Recorded) -> None:
    after = Recorder("and now?", "run_2").run
    said = conversation([loaded(recorded), after.facts()])
    check_valid(said)
    assert said[-1] == UserTurn("and now?")
    assert isinstance(said[-2], AssistantTurn)


@pytest.mark.parametrize("recorded", RUNS.values(), ids=RUNS.keys())
def test_a_run_under_way_ends_its_conversation_with_what_the_model_must_answer(
    recorded: Recorded,
) -> None:
    facts = recorded.facts(2)
    assert conversation([facts]) == [UserTurn("hello")]


def test_events_are_folded_into_runs_turns_and_calls() -> None:
    first = RUNS["parallel and mixed"]
    second = RUNS["plain answer"]
    runs = fold(list(enumerate([*first.events(), *second.events()], 1)))
    assert [run.message.text for run in runs] == ["hello", "hello"]
    assert [run.seq for run in runs] == [1, len(first.events()) + 1]
    assert [turn.index for turn in runs[0].turns] == [0, 1]
    calls = runs[0].turns[0].calls
    assert list(calls) == ["c_shell", "c_read", "c_unknown", "c_read_2", "c_shell_2"]
    assert {call_id: call.end.is_error for call_id, call in calls.items() if call.end} == {
        "c_shell": False,
        "c_read": False,
        "c_unknown": True,
        "c_read_2": False,
        "c_shell_2": True,
    }
    assert calls["c_shell"].response is not None
    assert calls["c_shell"].response.granted
    assert not calls["c_shell_2"].executing
    assert runs[0].end is not None
    assert runs[0].session is not None


def test_events_before_the_first_message_belong_to_no_run() -> None:
    events = RUNS["plain answer"].events()[1:]
    assert fold(list(enumerate(events, 1))) == []


@pytest.mark.parametrize("name", ["plain answer", "parallel and mixed", "superseded turn"])
def test_deltas_say_nothing_that_a_later_event_does_not(name: str) -> None:
    events = list(enumerate(RUNS[name].events(), 1))
    deltas = {"text.delta", "thinking.delta", "tool.call.args_delta"}
    (whole,) = fold(events)
    (short,) = fold([(seq, event) for seq, event in events if event.type not in deltas])
    for turn in (*whole.turns, *short.turns):
        turn.shown = False
    assert short == whole


def test_the_open_question_is_the_one_without_an_answer() -> None:
    recorder = Recorder().begin().answer("", SHELL, SHELL_2).asks(*SHELL)
    assert getattr(recorder.run.facts().question(), "request_id", None) == "perm_c_shell"
    recorder.decides(SHELL[0], granted=False)
    assert recorder.run.facts().question() is None
    recorder.asks(*SHELL_2)
    assert getattr(recorder.run.facts().question(), "request_id", None) == "perm_c_shell_2"
    assert Recorder().run.facts().question() is None


def test_a_superseded_turn_is_left_out() -> None:
    facts = loaded(RUNS["superseded turn"])
    assert [turn.superseded for turn in facts.turns] == [True, True, False]
    (user, answer) = conversation([facts])
    assert user == UserTurn("hello")
    assert isinstance(answer, AssistantTurn)
    assert answer.text == "Hello"
    (_, reply) = messages([facts])
    assert reply["content"] == "Hello"


def test_what_the_provider_said_is_kept_word_by_word() -> None:
    facts = RUNS["free tool"].facts()
    raws = [turn.raw for turn in conversation([facts]) if isinstance(turn, AssistantTurn)]
    assert raws == [{"content": "I look."}, {"content": "Done"}]


def test_an_answer_survives_being_stored() -> None:
    turn = AssistantTurn(
        "text",
        "thought",
        [ToolCall("c", "t", '{"broken')],
        "anthropic",
        "claude",
        {"content": [{"type": "thinking", "signature": "é\ud800"}]},
    )
    answer = Answer(turn, "tool_use", USAGE)
    assert Answer.restore(answer.dump()) == answer


def test_a_result_stands_under_its_call_in_the_order_of_the_calls() -> None:
    said = conversation([RUNS["parallel and mixed"].facts()])
    results = [(turn.tool_call_id, turn.text) for turn in said if isinstance(turn, ToolTurn)]
    assert results == [
        ("c_shell", "ok"),
        ("c_read", "one"),
        ("c_unknown", "There is no such tool."),
        ("c_read_2", "two"),
        ("c_shell_2", "Denied: a person said so"),
    ]


@pytest.mark.parametrize(
    ("finish", "word"),
    [
        (ENDINGS["cancelled"], "[no answer: the run was cancelled]"),
        (ENDINGS["timed out"], "[no answer: the run timed_out (aborted)]"),
        (ENDINGS["failed"], "[no answer: the run failed (error)]"),
        (Finish("failed", "max_turns", "max_turns"), "[no answer: the run failed (max_turns)]"),
    ],
    ids=["cancelled", "timed out", "failed", "limit"],
)
def test_a_run_without_an_answer_gets_a_word_of_the_assistant(finish: Finish, word: str) -> None:
    recorder = Recorder().begin().answer("", READ).executes(READ).ends(*READ, "x")
    said = conversation([recorder.finishes(finish).facts()])
    assert said[-1] == AssistantTurn(word)


def test_an_answer_that_somebody_cut_off_is_kept_as_far_as_it_came() -> None:
    recorded = Recorder().begin().says("Hel", "lo").finishes(ENDINGS["cancelled"])
    facts = loaded(recorded)
    assert conversation([facts])[-1] == AssistantTurn("Hello\n\n[interrupted]")
    (_, reply) = messages([facts])
    assert reply["parts"] == [{"kind": "text", "text": "Hello", "interrupted": True}]
    assert reply["status"] == "cancelled"


def test_an_empty_answer_gets_a_word_of_the_assistant() -> None:
    said = conversation([Recorder().begin().answer("").finishes().facts()])
    assert said[-1] == AssistantTurn("[no answer: the run succeeded (end_turn)]")


def test_a_message_carries_its_files() -> None:
    message = UserMessage(
        run_id="run_1",
        text="look",
        attachments=[Attachment(filename="a.png", mime_type="image/png", size_bytes=3)],
        timestamp=AT,
    )
    (run,) = fold([(1, message)])
    run.files = [File("a.png", "image/png", b"abc")]
    assert conversation([run]) == [UserTurn("look", [File("a.png", "image/png", b"abc")])]
    (shown,) = messages([run])
    assert shown["attachments"] == [{"filename": "a.png", "mimeType": "image/png", "sizeBytes": 3}]


def test_messages_have_the_shape_that_people_read() -> None:
    user, reply = messages([RUNS["free tool"].facts()])
    assert user == {
        "id": "run_1.user",
        "role": "user",
        "content": "hello",
        "parts": [{"kind": "text", "text": "hello"}],
        "attachments": None,
        "usage": None,
        "timestamp": AT,
        "model": None,
    }
    usage = reply.pop("usage")
    assert (usage["inputTokens"], usage["outputTokens"], usage["costUsd"]) == (20, 10, 0.5)
    assert reply == {
        "id": "run_1.assistant",
        "role": "assistant",
        "content": "I look.\n\nDone",
        "parts": [
            {"kind": "text", "text": "I look."},
            {
                "kind": "tool",
                "toolCallId": "c_read",
                "toolName": "read_file",
                "input": {},
                "result": "text",
                "isError": False,
                "granted": None,
            },
            {"kind": "text", "text": "Done"},
        ],
        "status": "succeeded",
        "timestamp": AT,
        "model": "openai:test-model",
    }


def test_messages_show_thinking_denials_and_errors() -> None:
    (_, reply) = messages([RUNS["thinking"].facts()])
    assert [part["kind"] for part in reply["parts"]] == ["thinking", "text"]
    (_, reply) = messages([RUNS["asked and denied"].facts()])
    assert [part["granted"] for part in reply["parts"] if part["kind"] == "tool"] == [False]
    (_, reply) = messages([Recorder().begin().finishes(ENDINGS["failed"]).facts()])
    assert reply["parts"] == [{"kind": "error", "code": "provider_error", "text": "It broke."}]
    assert reply["status"] == "failed"


def test_a_message_that_nobody_has_answered_yet_stands_alone() -> None:
    assert [shown["role"] for shown in messages([Recorder().run.facts()])] == ["user"]
    (_, reply) = messages([Recorder().begin().run.facts()])
    assert (reply["status"], reply["content"]) == ("running", "")


def test_only_a_granted_always_is_a_grant() -> None:
    recorder = Recorder().begin().answer("", SHELL).asks(*SHELL)
    assert grants([recorder.run.facts()]) == set()
    once = Recorded([*recorder.run.appends], recorder.run.answers)
    once.appends.append(Recorder().decides(SHELL[0], granted=True).run.appends[-1])
    assert grants([once.facts()]) == set()
    denied = Recorded([*recorder.run.appends], recorder.run.answers)
    denied.appends.append(Recorder().decides(SHELL[0], granted=False, always=True).run.appends[-1])
    assert grants([denied.facts()]) == set()
    recorder.decides(SHELL[0], granted=True, always=True)
    assert grants([recorder.run.facts()]) == {"shell_execute", "hash_c_shell"}


def test_a_grant_holds_for_later_runs_of_the_thread() -> None:
    recorder = Recorder().begin().answer("", SHELL).asks(*SHELL)
    first = recorder.decides(SHELL[0], granted=True, always=True).finishes(ENDINGS["cancelled"])
    later = Recorder("again", "run_2").run
    assert "hash_c_shell" in grants([first.facts(), later.facts()])
