from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ownware_gateway.events import (
    Answers,
    Asks,
    CalledTool,
    ClientCall,
    ClientResult,
    CompactionEnd,
    CompactionStart,
    DecidedBy,
    Error,
    Event,
    PermissionRequest,
    PermissionResponse,
    QuestionRequest,
    QuestionResponse,
    Recovery,
    RunCancel,
    SessionEnd,
    SessionStart,
    StopReason,
    TextComplete,
    TextDelta,
    ThinkingComplete,
    ThinkingDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallExecute,
    ToolCallStart,
    ToolResult,
    TurnEnd,
    TurnInterrupted,
    TurnStart,
    Usage,
    UserMessage,
)
from ownware_gateway.models import OVERFLOW, AssistantTurn, ModelError, RetryReason, ToolCall
from ownware_gateway.permissions import Verdict
from ownware_gateway.run import (
    OVERFLOWS_MAX,
    RETRIES_MAX,
    RETRY_AFTER_S_MAX,
    RETRY_S,
    RETRY_S_MAX,
    TIMED_OUT,
    Answered,
    Ask,
    Begin,
    Deliver,
    Done,
    EndTurn,
    Finish,
    HandOver,
    Limits,
    Question,
    Recall,
    Refuse,
    Rest,
    Retry,
    RunTools,
    Shorten,
    Spawn,
    Step,
    Wait,
    after_failure,
    agent_failed,
    closing,
    next_step,
    over_budget,
    tool_end,
    turn_end,
)
from ownware_gateway.transcript import NOTICE, Answer, Call, RunFacts, Turn, fold

AT = 1_790_000_000_000
USAGE = Usage(input_tokens=10, output_tokens=5, model="openai:test-model", cost_usd=0.25)
LIMITS = Limits(turns_max=100, cost_usd_max=None)

#: More steps than any of the recorded runs can still need.
STEPS_MAX = 40

#: How a run may be ended from outside, or by a failure, wherever it is.
ENDINGS = {
    "cancelled": Finish("cancelled", "aborted", "cancelled"),
    "timed out": Finish("timed_out", "aborted", "timed_out"),
    "failed": Finish("failed", "error", "provider_error", "It broke."),
}


@dataclass
class Recorded:
    """A run as it was appended, one item for each append, with the model's whole answers."""

    appends: list[list[Event]]
    answers: dict[int, Answer] = field(default_factory=dict)

    def facts(self, appends: int | None = None) -> RunFacts:
        """The facts after so many appends, as they are loaded from a log."""
        (run,) = fold(list(enumerate(self.events(appends), 1)))
        for turn in run.turns:
            if turn.complete:
                turn.answer = self.answers[turn.index]
        return run

    def events(self, appends: int | None = None) -> list[Event]:
        return [event for append in self.appends[:appends] for event in append]


def handed(*calls: tuple[str, str], index: int = 0) -> ClientCall:
    return ClientCall(
        request_id=f"perm_{calls[0][0]}",
        calls=[CalledTool(tool_call_id=call_id, tool_name=name) for call_id, name in calls],
        operation_hash="hash",
        expires_at=AT + 1_000,
        usage=USAGE,
        turn_index=index,
    )


def handed_in(call_id: str, results: Sequence[str] | None, index: int = 0) -> ClientResult:
    """The results of the client's calls, by their ids; each call's result is its id."""
    given = [ToolResult(tool_call_id=name, result=name) for name in results or ()]
    return ClientResult(
        request_id=f"perm_{call_id}",
        results=None if results is None else given,
        decided_by="user",
        reason="it is said",
        turn_index=index,
    )


class Recorder:
    """Writes recorded runs down in the order in which a drive appends."""

    def __init__(self, prompt: str = "hello", run_id: str = "run_1") -> None:
        message = UserMessage(run_id=run_id, text=prompt, timestamp=AT)
        self.run = Recorded([[message]])
        self.run_id = run_id
        self.index = 0

    def add(self, *events: Event) -> "Recorder":
        self.run.appends.append(list(events))
        return self

    def begin(self) -> "Recorder":
        start = SessionStart(
            run_id=self.run_id,
            session_id=self.run_id,
            profile_id="assistant",
            model="openai:test-model",
            timestamp=AT,
        )
        return self.add(start, TurnStart(turn_index=0, timestamp=AT))

    def turn(self) -> "Recorder":
        self.index += 1
        return self.add(TurnStart(turn_index=self.index, timestamp=AT))

    def says(self, *pieces: str) -> "Recorder":
        for piece in pieces:
            self.add(TextDelta(text=piece, turn_index=self.index))
        return self

    def thinks(self, text: str) -> "Recorder":
        return self.add(ThinkingDelta(text=text, turn_index=self.index))

    def answer(
        self,
        text: str = "",
        *calls: tuple[str, str],
        thinking: str = "",
        stop: StopReason | None = None,
    ) -> "Recorder":
        """The model's answer is whole; each call is an id and a tool's name."""
        wanted = [ToolCall(call_id, name, "{}") for call_id, name in calls]
        reason: StopReason = stop or ("tool_use" if calls else "end_turn")
        turn = AssistantTurn(text, thinking, wanted, "openai", "test-model", {"content": text})
        self.run.answers[self.index] = Answer(turn, reason, USAGE)
        if calls:
            self.add(
                *(
                    ToolCallStart(tool_call_id=call_id, tool_name=name, turn_index=self.index)
                    for call_id, name in calls
                )
            )
        said: list[Event] = []
        if thinking:
            said.append(ThinkingComplete(text=thinking, turn_index=self.index))
        said += [
            ToolCallArgsDelta(tool_call_id=call_id, delta="{}", turn_index=self.index)
            for call_id, _ in calls
        ]
        return self.add(*said, TextComplete(text=text, turn_index=self.index))

    def executes(self, *calls: tuple[str, str]) -> "Recorder":
        return self.add(
            *(
                ToolCallExecute(
                    tool_call_id=call_id, tool_name=name, input={}, turn_index=self.index
                )
                for call_id, name in calls
            )
        )

    def ends(self, call_id: str, name: str, result: str, *, error: bool = False) -> "Recorder":
        return self.add(
            ToolCallEnd(
                tool_call_id=call_id,
                tool_name=name,
                result=result,
                is_error=error,
                duration_ms=1,
                turn_index=self.index,
                output_bytes_raw=len(result),
            )
        )

    def asks(self, call_id: str, name: str) -> "Recorder":
        if name == "ask_user":
            return self.add(
                QuestionRequest(
                    request_id=f"perm_{call_id}",
                    tool_call_id=call_id,
                    tool_name=name,
                    question="Which one?",
                    options=["red", "green"],
                    multiple=False,
                    operation_hash=f"hash_{call_id}",
                    expires_at=AT + 1_000,
                    turn_index=self.index,
                )
            )
        return self.add(
            PermissionRequest(
                request_id=f"perm_{call_id}",
                tool_call_id=call_id,
                tool_name=name,
                input={},
                reason="it may change something",
                operation_hash=f"hash_{call_id}",
                expires_at=AT + 1_000,
                turn_index=self.index,
            )
        )

    def decides(self, call_id: str, *, granted: bool, always: bool = False) -> "Recorder":
        return self.add(
            PermissionResponse(
                request_id=f"perm_{call_id}",
                granted=granted,
                decided_by="user",
                reason="a person said so",
                always=always,
                turn_index=self.index,
            )
        )

    def answers(
        self, call_id: str, answer: str | None, by: DecidedBy = "user", reason: str = ""
    ) -> "Recorder":
        return self.add(
            QuestionResponse(
                request_id=f"perm_{call_id}",
                answer=answer,
                decided_by=by,
                reason=reason,
                turn_index=self.index,
            )
        )

    def recovers(self, reason: RetryReason | Literal["restart"], attempt: int) -> "Recorder":
        """A try failed before anything was shown."""
        return self.add(
            Recovery(reason=reason, attempt=attempt, detail="it failed", turn_index=self.index)
        )

    def superseded(self, attempt: int = 1) -> "Recorder":
        """A try failed after something was shown."""
        cut = self.index
        self.index += 1
        return self.add(
            TextDelta(text=NOTICE, turn_index=cut, notice=True),
            Recovery(
                reason="connection",
                attempt=attempt,
                detail="it was cut",
                turn_index=cut,
                supersedes=cut,
            ),
            TurnStart(turn_index=self.index, timestamp=AT),
        )

    def turn_ends(self, reason: StopReason = "tool_use") -> "Recorder":
        return self.add(
            TurnEnd(turn_index=self.index, stop_reason=reason, usage=USAGE, timestamp=AT)
        )

    def finishes(self, finish: Finish | None = None) -> Recorded:
        self.add(*closing(self.run.facts(), finish or Finish("succeeded", "end_turn"), AT))
        return self.run


READ = ("c_read", "read_file")
READ_2 = ("c_read_2", "read_file")
SHELL = ("c_shell", "shell_execute")
SHELL_2 = ("c_shell_2", "shell_execute")
UNKNOWN = ("c_unknown", "fly")
PERSON = ("c_person", "ask_user")
PERSON_2 = ("c_person_2", "ask_user")
CLIENT = ("c_client", "weather")
CLIENT_2 = ("c_client_2", "weather")


def judge(call: Call) -> Verdict:
    """Reading is free, the shell is asked for, a person may be asked, nothing else exists."""
    if call.executing:
        return Verdict("deny", "Interrupted: the gateway stopped while this ran.")
    match call.name:
        case "read_file":
            return Verdict("run", "it only reads")
        case "shell_execute" | "ask_user":
            return Verdict("ask", "it may change something")
        case "weather":
            return Verdict("client", "the client runs it")
        case _:
            return Verdict("deny", "There is no such tool.")


def recorded_runs() -> dict[str, Recorded]:
    """One whole run of every kind, by name."""
    return {
        "plain answer": Recorder().begin().says("Hel", "lo").answer("Hello").finishes(),
        "thinking": (
            Recorder().begin().thinks("Hm").says("Yes").answer("Yes", thinking="Hm").finishes()
        ),
        "free tool": (
            Recorder()
            .begin()
            .says("I look.")
            .answer("I look.", READ)
            .executes(READ)
            .ends(*READ, "text")
            .turn_ends()
            .turn()
            .says("Done")
            .answer("Done")
            .finishes()
        ),
        "asked and approved": (
            Recorder()
            .begin()
            .answer("", SHELL)
            .asks(*SHELL)
            .decides(SHELL[0], granted=True)
            .executes(SHELL)
            .ends(*SHELL, "ok")
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "asked and denied": (
            Recorder()
            .begin()
            .answer("", SHELL)
            .asks(*SHELL)
            .decides(SHELL[0], granted=False)
            .ends(*SHELL, "Denied: a person said so", error=True)
            .turn_ends()
            .turn()
            .answer("A pity")
            .finishes()
        ),
        "parallel and mixed": (
            Recorder()
            .begin()
            .answer("I try.", SHELL, READ, UNKNOWN, READ_2, SHELL_2)
            .ends(*UNKNOWN, "There is no such tool.", error=True)
            .executes(READ, READ_2)
            .ends(*READ_2, "two")
            .ends(*READ, "one")
            .asks(*SHELL)
            .decides(SHELL[0], granted=True)
            .asks(*SHELL_2)
            .decides(SHELL_2[0], granted=False)
            .ends(*SHELL_2, "Denied: a person said so", error=True)
            .executes(SHELL)
            .ends(*SHELL, "ok")
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "a person is asked and answers": (
            Recorder()
            .begin()
            .answer("", PERSON)
            .asks(*PERSON)
            .answers(PERSON[0], "green")
            .ends(*PERSON, "green")
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "a person is asked and declines": (
            Recorder()
            .begin()
            .answer("", PERSON)
            .asks(*PERSON)
            .answers(PERSON[0], None, reason="the person declined to answer")
            .ends(*PERSON, "The person declined to answer.", error=True)
            .turn_ends()
            .turn()
            .answer("A pity")
            .finishes()
        ),
        "questions of both kinds": (
            Recorder()
            .begin()
            .answer("", PERSON, SHELL, READ, PERSON_2)
            .executes(READ)
            .ends(*READ, "one")
            .asks(*PERSON)
            .answers(PERSON[0], "red")
            .ends(*PERSON, "red")
            .asks(*SHELL)
            .decides(SHELL[0], granted=True)
            .asks(*PERSON_2)
            .answers(PERSON_2[0], None, "timeout", "nobody answered within 1 s")
            .ends(*PERSON_2, "Nobody answered within 1 s.", error=True)
            .executes(SHELL)
            .ends(*SHELL, "ok")
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "the client makes calls beside others": (
            Recorder()
            .begin()
            .answer("", CLIENT, READ, SHELL, CLIENT_2)
            .executes(READ)
            .ends(*READ, "one")
            .asks(*SHELL)
            .decides(SHELL[0], granted=False)
            .ends(*SHELL, "Denied: a person said so", error=True)
            .add(handed(CLIENT, CLIENT_2))
            .add(handed_in(CLIENT[0], [CLIENT_2[0], CLIENT[0]]))
            .ends(*CLIENT, CLIENT[0])
            .ends(*CLIENT_2, CLIENT_2[0])
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "the client makes no call": (
            Recorder()
            .begin()
            .answer("", CLIENT, CLIENT_2)
            .add(handed(CLIENT, CLIENT_2))
            .add(handed_in(CLIENT[0], None))
            .ends(*CLIENT, "It is said.", error=True)
            .ends(*CLIENT_2, "It is said.", error=True)
            .finishes(Finish("succeeded", "tool_use"))
        ),
        "retries": (
            Recorder()
            .begin()
            .recovers("rate_limit", 1)
            .recovers("provider_error", 2)
            .says("At last")
            .answer("At last")
            .finishes()
        ),
        "superseded turn": (
            Recorder()
            .begin()
            .says("Hal")
            .superseded(1)
            .says("Hall")
            .superseded(2)
            .says("Hello")
            .answer("Hello")
            .finishes()
        ),
        "superseded call": (
            Recorder()
            .begin()
            .add(ToolCallStart(tool_call_id="c_cut", tool_name="read_file", turn_index=0))
            .superseded()
            .answer("", READ)
            .executes(READ)
            .ends(*READ, "text")
            .turn_ends()
            .turn()
            .answer("Done")
            .finishes()
        ),
        "pause": (
            Recorder()
            .begin()
            .answer("One moment.", stop="pause_turn")
            .turn_ends("pause_turn")
            .turn()
            .answer("Here it is.")
            .finishes()
        ),
        "restarted": (
            Recorder().begin().recovers("restart", 1).says("Hello").answer("Hello").finishes()
        ),
    }


RUNS = recorded_runs()

#: Every state that a recorded run passes through, one case for each append.
PREFIXES = [
    pytest.param(recorded, count, id=f"{name}, {count} of {len(recorded.appends)}")
    for name, recorded in RUNS.items()
    for count in range(1, len(recorded.appends) + 1)
]


def perform(step: Step, facts: RunFacts) -> list[Event]:
    """Do what a step says, as a drive would, with a model that answers "Done"; fold and return."""
    turn = facts.turn
    events: list[Event] = []
    answer = None
    match step:
        case Ask(index, new_turn, supersedes):
            if facts.session is None:
                events += Recorder().begin().run.appends[1][:1]
            if supersedes is not None:
                recorder = Recorder()
                recorder.index = supersedes
                events += recorder.superseded().run.appends[-1]
            elif new_turn:
                events.append(TurnStart(turn_index=index, timestamp=AT))
            events.append(TextComplete(text="Done", turn_index=index))
            answer = Answer(AssistantTurn("Done"), "end_turn", USAGE)
        case RunTools(calls):
            assert turn is not None
            for call in calls:
                events.append(
                    ToolCallExecute(
                        tool_call_id=call.id, tool_name=call.name, input={}, turn_index=turn.index
                    )
                )
                events.append(tool_end(turn, call, "ok", is_error=False))
        case Refuse(call, reason):
            assert turn is not None
            events.append(tool_end(turn, call, reason, is_error=True))
        case Answered(call, result, is_error):
            assert turn is not None
            events.append(tool_end(turn, call, result, is_error=is_error))
        case Question(call, _):
            events += Recorder().asks(call.id, call.name).run.appends[-1]
        case Wait(request_id):
            call_id = request_id.removeprefix("perm_")
            said = Recorder().decides(call_id, granted=True)
            asked = facts.question()
            if isinstance(asked, QuestionRequest):
                said = Recorder().answers(call_id, "green")
            events += said.run.appends[-1]
            if isinstance(asked, ClientCall):
                results = [called.tool_call_id for called in asked.calls]
                events = [handed_in(call_id, results, asked.turn_index)]
        case HandOver(calls):
            assert turn is not None
            events.append(handed(*((call.id, call.name) for call in calls), index=turn.index))
        case Begin(calls) | Deliver(calls):
            assert turn is not None
            for call in calls:
                assert call.agent is not None
                events.append(agent_failed(turn, call.agent.agent_id, "It is not there."))
                events.append(tool_end(turn, call, "It is not there.", is_error=True))
        case Spawn() | Recall() | Rest():
            raise AssertionError("nobody spawns agents here")
        case EndTurn(ended, reason):
            events.append(turn_end(ended, reason, AT))
        case Finish():
            return closing(facts, step, AT)
        case Done():
            raise AssertionError("nothing is left to do")
    for event in events:
        facts.apply(event)
    if answer is not None:
        assert facts.turn is not None
        facts.turn.answer = answer
    return events


def drive(facts: RunFacts, limits: Limits = LIMITS) -> list[Event]:
    """Take steps until the run has ended; every step must change something."""
    events: list[Event] = []
    for _ in range(STEPS_MAX):
        step = next_step(facts, judge, limits)
        if isinstance(step, Done):
            return events
        said = perform(step, facts)
        assert said, step
        events += said
    raise AssertionError(f"the run goes on for ever: {events}")


def check_whole(events: list[Event]) -> None:
    """Fail unless these are the events of a run that ended, with all it opened closed once."""
    ends = [event for event in events if isinstance(event, SessionEnd)]
    assert ends == [events[-1]]
    (end,) = ends
    asked = [event.request_id for event in events if isinstance(event, Asks)]
    answered = [event.request_id for event in events if isinstance(event, Answers)]
    assert sorted(asked) == sorted(answered)
    superseded = {
        event.supersedes
        for event in events
        if isinstance(event, Recovery) and event.supersedes is not None
    }
    turns = [event.turn_index for event in events if isinstance(event, TurnStart)]
    assert turns == list(range(len(turns)))
    closed = [event.turn_index for event in events if isinstance(event, TurnEnd | TurnInterrupted)]
    assert sorted([*closed, *superseded]) == turns, "each turn has one end"
    started = [
        event.tool_call_id
        for event in events
        if isinstance(event, ToolCallStart) and event.turn_index not in superseded
    ]
    ended = [event.tool_call_id for event in events if isinstance(event, ToolCallEnd)]
    assert sorted(started) == sorted(ended)
    interrupted = [event for event in events if isinstance(event, TurnInterrupted)]
    if interrupted:
        assert end.reason in ("aborted", "budget_exceeded")
        assert interrupted == [events[-2]]
    told = end.reason in ("error", "budget_exceeded")
    assert bool([e for e in events if isinstance(e, Error)]) is told
    assert end.turn_count == sum(isinstance(event, TextComplete) for event in events)


@pytest.mark.parametrize("recorded", RUNS.values(), ids=RUNS.keys())
def test_the_recorded_runs_are_whole(recorded: Recorded) -> None:
    check_whole(recorded.events())


@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
def test_a_run_cut_off_anywhere_goes_on_to_its_end(recorded: Recorded, count: int) -> None:
    facts = recorded.facts(count)
    check_whole(recorded.events(count) + drive(facts))


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
def test_a_run_may_be_ended_anywhere_and_leaves_nothing_open(
    recorded: Recorded, count: int, ending: Finish
) -> None:
    facts = recorded.facts(count)
    if facts.end is not None:
        return
    within_a_turn = facts.turn is not None and facts.turn.end is None
    events = closing(facts, ending, AT)
    check_whole(recorded.events(count) + events)
    assert any(isinstance(event, TurnInterrupted) for event in events) is (
        within_a_turn and ending.reason == "aborted"
    )
    assert isinstance(next_step(facts, judge, LIMITS), Done)


@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
def test_a_cancelled_run_can_only_end_as_cancelled(recorded: Recorded, count: int) -> None:
    facts = recorded.facts(count)
    ended = facts.end is not None
    facts.apply(RunCancel(run_id="run_1", requested_by="local"))
    step = next_step(facts, judge, Limits(0, 0.0), cut=TIMED_OUT)
    assert step == (Done() if ended else Finish("cancelled", "aborted", "cancelled"))


@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
def test_a_run_out_of_time_ends_as_timed_out(recorded: Recorded, count: int) -> None:
    facts = recorded.facts(count)
    step = next_step(facts, judge, LIMITS, cut=TIMED_OUT)
    ended = facts.end is not None
    assert step == (Done() if ended else Finish("timed_out", "aborted", "timed_out"))


@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        pytest.param(Limits(1, None), "max_turns", id="turns"),
        pytest.param(Limits(100, 0.25), "budget_exceeded", id="money"),
    ],
)
def test_a_run_at_its_limit_ends_before_the_model_is_asked_again(
    recorded: Recorded, count: int, limits: Limits, reason: str
) -> None:
    facts = recorded.facts(count)
    if facts.end is not None:
        return
    # A turn that has begun already is not taken back.
    asking = facts.turn is not None and not facts.turn.complete
    answers = max(1, facts.turns_done + asking)
    events = recorded.events(count) + drive(facts, limits)
    check_whole(events)
    end = events[-1]
    assert isinstance(end, SessionEnd)
    assert end.turn_count == answers
    assert end.reason in (reason, "end_turn", "tool_use")


@pytest.mark.parametrize(("recorded", "count"), PREFIXES)
def test_a_budget_that_is_used_up_ends_a_run_anywhere_and_says_why(
    recorded: Recorded, count: int
) -> None:
    facts = recorded.facts(count)
    step = next_step(facts, judge, LIMITS, cut=over_budget("It is used up."))
    if facts.end is not None:
        assert isinstance(step, Done)
        return
    assert step == over_budget("It is used up.")
    assert isinstance(step, Finish)
    events = closing(facts, step, AT)
    check_whole(recorded.events(count) + events)
    assert [event.message for event in events if isinstance(event, Error)] == ["It is used up."]
    # What was cut off in the middle of an answer does not look like one.
    whole = all(turn.complete for turn in facts.turns if not turn.superseded)
    assert any(isinstance(event, TurnInterrupted) for event in events) is not whole


def test_a_run_that_ends_while_it_is_made_shorter_closes_that_too() -> None:
    begin = CompactionStart(strategy="summary", pre_token_count=9, turn_index=0)
    recorder = begun().add(begin)
    events = recorder.finishes(ENDINGS["cancelled"]).events()
    check_whole(events)
    (end,) = (event for event in events if isinstance(event, CompactionEnd))
    assert (end.status, end.summary, end.through) == ("failed", None, None)


def test_a_prompt_that_is_too_long_is_shortened_so_often_and_not_tried_as_it_is() -> None:
    turn = Turn(0, AT)
    error = ModelError("It is too long.", code=OVERFLOW)
    for attempt in range(1, OVERFLOWS_MAX + 1):
        assert after_failure(turn, error, compacts=True) == Shorten(attempt)
        turn.overflows = attempt
    failed = Finish("failed", "error", OVERFLOW, "It is too long.")
    assert after_failure(turn, error, compacts=True) == failed
    assert after_failure(Turn(0, AT), error) == failed
    # One that could not be made any shorter.
    helpless = Turn(0, AT, overflows=1, overflowed=True)
    assert after_failure(helpless, error, compacts=True) == failed


def facts_of(recorder: Recorder) -> RunFacts:
    return recorder.run.facts()


def begun() -> Recorder:
    return Recorder().begin()


def call_names(step: Step) -> Any:
    """A step with its calls by id, so that a table can say what is expected."""
    match step:
        case RunTools(calls):
            return "run", *(call.id for call in calls)
        case Refuse(call, reason):
            return "refuse", call.id, reason
        case Question(call, _):
            return "ask", call.id
        case HandOver(calls):
            return "hand over", *(call.id for call in calls)
        case Answered(call, result, is_error):
            return "answered", call.id, result, is_error
        case EndTurn(turn, reason):
            return "end turn", turn.index, reason
        case _:
            return step


CUT = ("refuse", "c_read", "Interrupted: the gateway stopped while this ran.")
NO_TOOL = ("refuse", "c_unknown", "There is no such tool.")
TABLE: dict[str, tuple[Recorder, Any]] = {
    "nothing but the message": (Recorder(), Ask(0, new_turn=True)),
    "a turn that has shown nothing": (begun(), Ask(0, new_turn=False)),
    "a failed try": (begun().recovers("connection", 1), Ask(0, new_turn=False)),
    "text without its end": (begun().says("He"), Ask(1, new_turn=True, supersedes=0)),
    "thinking without its end": (begun().thinks("Hm"), Ask(1, new_turn=True, supersedes=0)),
    "a turn in place of one cut off": (begun().says("He").superseded(), Ask(1, new_turn=False)),
    "a whole answer": (begun().answer("Hello"), Finish("succeeded", "end_turn")),
    "an answer at its maximum": (
        begun().answer("Hel", stop="max_tokens"),
        Finish("succeeded", "max_tokens"),
    ),
    "a refusal": (begun().answer("No", stop="refusal"), Finish("succeeded", "refusal")),
    "a stop sequence": (
        begun().answer("No", stop="stop_sequence"),
        Finish("succeeded", "stop_sequence"),
    ),
    "a pause": (begun().answer("So", stop="pause_turn"), ("end turn", 0, "pause_turn")),
    "an ended turn": (
        begun().answer("So", stop="pause_turn").turn_ends("pause_turn"),
        Ask(1, new_turn=True),
    ),
    "a free call": (begun().answer("", READ), ("run", "c_read")),
    "two free calls": (begun().answer("", READ, READ_2), ("run", "c_read", "c_read_2")),
    "one of two free calls has ended": (
        begun().answer("", READ, READ_2).executes(READ, READ_2).ends(*READ, "x"),
        ("refuse", "c_read_2", CUT[2]),
    ),
    "a call that was executing": (begun().answer("", READ).executes(READ), CUT),
    "calls for the client": (
        begun().answer("", CLIENT, CLIENT_2),
        ("hand over", "c_client", "c_client_2"),
    ),
    "free calls go before the client's": (begun().answer("", CLIENT, READ), ("run", "c_read")),
    "questions go before the client's calls": (
        begun().answer("", CLIENT, SHELL),
        ("ask", "c_shell"),
    ),
    "the client has the calls": (
        begun().answer("", CLIENT, CLIENT_2).add(handed(CLIENT, CLIENT_2)),
        Wait("perm_c_client"),
    ),
    "the client has made its calls": (
        begun().answer("", CLIENT).add(handed(CLIENT)).add(handed_in(CLIENT[0], [CLIENT[0]])),
        ("answered", "c_client", "c_client", False),
    ),
    "the client makes no calls": (
        begun().answer("", CLIENT).add(handed(CLIENT)).add(handed_in(CLIENT[0], None)),
        ("answered", "c_client", "It is said.", True),
    ),
    "the client has made no calls": (
        begun()
        .answer("", CLIENT)
        .add(handed(CLIENT))
        .add(handed_in(CLIENT[0], None))
        .ends(*CLIENT, "It is said.", error=True),
        Finish("succeeded", "tool_use"),
    ),
    "an unknown tool": (begun().answer("", UNKNOWN), NO_TOOL),
    "an unknown tool beside others": (begun().answer("", READ, SHELL, UNKNOWN), NO_TOOL),
    "a call to ask for": (begun().answer("", SHELL), ("ask", "c_shell")),
    "free calls go before questions": (begun().answer("", SHELL, READ), ("run", "c_read")),
    "an open question": (begun().answer("", SHELL).asks(*SHELL), Wait("perm_c_shell")),
    "one question at a time": (
        begun().answer("", SHELL, SHELL_2).asks(*SHELL),
        Wait("perm_c_shell"),
    ),
    "the next question comes before what was granted runs": (
        begun().answer("", SHELL, SHELL_2).asks(*SHELL).decides("c_shell", granted=True),
        ("ask", "c_shell_2"),
    ),
    "a granted call": (
        begun().answer("", SHELL).asks(*SHELL).decides("c_shell", granted=True),
        ("run", "c_shell"),
    ),
    "granted calls run together": (
        begun()
        .answer("", SHELL, SHELL_2)
        .asks(*SHELL)
        .decides("c_shell", granted=True)
        .asks(*SHELL_2)
        .decides("c_shell_2", granted=True),
        ("run", "c_shell", "c_shell_2"),
    ),
    "a denied call": (
        begun().answer("", SHELL).asks(*SHELL).decides("c_shell", granted=False),
        ("refuse", "c_shell", "Denied: a person said so"),
    ),
    "a granted call that was executing": (
        begun().answer("", SHELL).asks(*SHELL).decides("c_shell", granted=True).executes(SHELL),
        ("refuse", "c_shell", CUT[2]),
    ),
    "a call that asks a person": (begun().answer("", PERSON), ("ask", "c_person")),
    "free calls go before a person is asked": (
        begun().answer("", PERSON, READ),
        ("run", "c_read"),
    ),
    "a question without its answer": (
        begun().answer("", PERSON, PERSON_2, SHELL).asks(*PERSON),
        Wait("perm_c_person"),
    ),
    "an answer is the result, before anything else is asked": (
        begun().answer("", PERSON, SHELL).asks(*PERSON).answers("c_person", "blue"),
        ("answered", "c_person", "blue", False),
    ),
    "the next question": (
        begun()
        .answer("", PERSON, PERSON_2)
        .asks(*PERSON)
        .answers("c_person", "red")
        .ends(*PERSON, "red"),
        ("ask", "c_person_2"),
    ),
    "a question that was declined": (
        begun()
        .answer("", PERSON)
        .asks(*PERSON)
        .answers("c_person", None, reason="the person declined to answer"),
        ("answered", "c_person", "The person declined to answer.", True),
    ),
    "a question that nobody answered": (
        begun()
        .answer("", PERSON)
        .asks(*PERSON)
        .answers("c_person", None, "timeout", "nobody answered within 60 s"),
        ("answered", "c_person", "Nobody answered within 60 s.", True),
    ),
    "all calls have ended": (
        begun().answer("", READ).executes(READ).ends(*READ, "x"),
        ("end turn", 0, "tool_use"),
    ),
}


@pytest.mark.parametrize(("recorder", "expected"), TABLE.values(), ids=TABLE.keys())
def test_what_is_in_the_log_says_what_happens_next(recorder: Recorder, expected: Any) -> None:
    assert call_names(next_step(facts_of(recorder), judge, LIMITS)) == expected


def test_a_call_that_is_safe_to_repeat_runs_again_after_it_was_cut_off() -> None:
    facts = facts_of(begun().answer("", READ).executes(READ))
    step = next_step(facts, lambda _: Verdict("run", "it is safe to repeat"), LIMITS)
    assert call_names(step) == ("run", "c_read")


def test_a_whole_answer_ends_the_run_well_even_at_its_limits() -> None:
    facts = facts_of(begun().answer("Hello"))
    assert next_step(facts, judge, Limits(1, 0.01)) == Finish("succeeded", "end_turn")


def test_the_tools_of_the_last_turn_still_run() -> None:
    facts = facts_of(begun().answer("", READ))
    assert call_names(next_step(facts, judge, Limits(1, None))) == ("run", "c_read")


def test_a_cost_that_nobody_knows_exceeds_no_budget() -> None:
    recorder = begun().answer("", READ).executes(READ).ends(*READ, "x")
    turn = recorder.run.answers[0]
    recorder.run.answers[0] = Answer(turn.turn, "tool_use", Usage(model="m"))
    step = next_step(facts_of(recorder), judge, Limits(100, 0.01))
    assert call_names(step) == ("end turn", 0, "tool_use")


def test_the_end_says_what_the_run_used() -> None:
    recorder = begun().answer("", READ).executes(READ).ends(*READ, "x").turn_ends().turn()
    (*_, end) = closing(facts_of(recorder.answer("Done")), Finish("succeeded", "end_turn"), AT)
    assert isinstance(end, SessionEnd)
    assert end.turn_count == 2
    assert end.total_usage == USAGE.plus(USAGE)
    assert (end.status, end.reason, end.code) == ("succeeded", "end_turn", None)


def closing_types(recorder: Recorder, finish: Finish) -> list[str]:
    return [event.type for event in closing(facts_of(recorder), finish, AT)]


def test_a_run_that_ends_while_it_waits_answers_its_question_and_ends_its_call() -> None:
    facts = facts_of(begun().answer("", SHELL).asks(*SHELL))
    response, call, turn, end = closing(facts, ENDINGS["cancelled"], AT)
    assert isinstance(response, PermissionResponse)
    assert isinstance(call, ToolCallEnd)
    assert isinstance(turn, TurnInterrupted)
    assert isinstance(end, SessionEnd)
    assert (response.request_id, response.granted) == ("perm_c_shell", False)
    assert response.decided_by == "cancel"
    assert (call.is_error, call.result) == (True, "Not run: the run ended.")
    assert turn.reason == "aborted"
    assert (end.status, end.reason, end.code) == ("cancelled", "aborted", "cancelled")


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_run_that_was_asked_to_stop_is_closed_as_cancelled(ending: Finish) -> None:
    facts = facts_of(begun().says("He"))
    facts.apply(RunCancel(run_id="run_1", requested_by="local"))
    turn, end = closing(facts, ending, AT)
    assert isinstance(turn, TurnInterrupted)
    assert isinstance(end, SessionEnd)
    assert (turn.reason, end.status, end.code) == ("aborted", "cancelled", "cancelled")


def test_a_question_of_a_run_out_of_time_is_answered_by_the_timeout() -> None:
    facts = facts_of(begun().answer("", SHELL).asks(*SHELL))
    response, call, turn, _ = closing(facts, ENDINGS["timed out"], AT)
    assert isinstance(response, PermissionResponse)
    assert isinstance(call, ToolCallEnd)
    assert isinstance(turn, TurnInterrupted)
    assert response.decided_by == "timeout"
    assert call.result == "Not run: the run ran out of time."
    assert turn.reason == "timeout"


@pytest.mark.parametrize(("ending", "by"), [("cancelled", "cancel"), ("timed out", "timeout")])
def test_a_question_of_a_run_that_ends_stays_without_an_answer(ending: str, by: str) -> None:
    facts = facts_of(begun().answer("", PERSON).asks(*PERSON))
    response, call, *_ = closing(facts, ENDINGS[ending], AT)
    assert isinstance(response, QuestionResponse)
    assert isinstance(call, ToolCallEnd)
    assert (response.request_id, response.answer) == ("perm_c_person", None)
    assert response.decided_by == by
    assert call.result == f"Not answered: {response.reason}."
    assert call.is_error


def test_an_answer_stays_the_result_though_the_run_ends_before_it_was_told() -> None:
    facts = facts_of(begun().answer("", PERSON).asks(*PERSON).answers("c_person", "red"))
    call, *rest = closing(facts, ENDINGS["cancelled"], AT)
    assert isinstance(call, ToolCallEnd)
    assert (call.result, call.is_error) == ("red", False)
    assert [event.type for event in rest] == ["turn.interrupted", "session.end"]


def test_an_answer_counts_though_the_tool_is_refused_by_now() -> None:
    facts = facts_of(begun().answer("", PERSON).asks(*PERSON).answers("c_person", "red"))
    step = next_step(facts, lambda _: Verdict("deny", "no more"), LIMITS)
    assert call_names(step) == ("answered", "c_person", "red", False)


def test_a_call_that_was_running_is_told_to_be_interrupted() -> None:
    facts = facts_of(begun().answer("", READ).executes(READ))
    (call, *_) = closing(facts, ENDINGS["cancelled"], AT)
    assert isinstance(call, ToolCallEnd)
    assert call.result == "Interrupted: the run ended."


def test_a_failed_run_says_what_failed_before_its_turn_ends() -> None:
    assert closing_types(begun().says("He"), ENDINGS["failed"]) == [
        "error",
        "turn.end",
        "session.end",
    ]
    error, turn, end = closing(facts_of(begun().says("He")), ENDINGS["failed"], AT)
    assert isinstance(error, Error)
    assert isinstance(turn, TurnEnd)
    assert isinstance(end, SessionEnd)
    assert (error.code, error.message) == ("provider_error", "It broke.")
    assert (error.recoverable, error.turn_index) == (False, 0)
    assert turn.stop_reason == "error"
    assert (end.status, end.code) == ("failed", "provider_error")


def test_a_run_at_its_limit_ends_its_turn_as_tool_use() -> None:
    recorder = begun().answer("", READ).executes(READ).ends(*READ, "x")
    turn, end = closing(facts_of(recorder), Finish("failed", "max_turns", "max_turns"), AT)
    assert isinstance(turn, TurnEnd)
    assert isinstance(end, SessionEnd)
    assert turn.stop_reason == "tool_use"
    assert (end.reason, end.code) == ("max_turns", "max_turns")


def test_a_run_that_ends_between_turns_interrupts_none() -> None:
    recorder = begun().answer("", READ).executes(READ).ends(*READ, "x").turn_ends()
    assert closing_types(recorder, ENDINGS["cancelled"]) == ["session.end"]
    assert closing_types(Recorder(), ENDINGS["cancelled"]) == ["session.end"]


def failing(retries: int) -> Any:
    """A turn that was tried again so often."""
    recorder = begun()
    for attempt in range(1, retries + 1):
        recorder.recovers("connection", attempt)
    return facts_of(recorder).turn


def failure(retry: RetryReason | None, retry_after_s: float | None = None) -> ModelError:
    return ModelError("It broke.", code="provider_error", retry=retry, retry_after_s=retry_after_s)


GIVEN_UP = Finish("failed", "error", "provider_error", "It broke.")


@pytest.mark.parametrize(
    ("retries", "error", "expected"),
    [
        pytest.param(0, failure(None), GIVEN_UP, id="nothing to try again"),
        pytest.param(0, failure("connection"), Retry(RETRY_S, 1), id="first"),
        pytest.param(1, failure("connection"), Retry(2 * RETRY_S, 2), id="second, doubled"),
        pytest.param(2, failure("provider_error"), Retry(4 * RETRY_S, 3), id="third, doubled"),
        pytest.param(
            RETRIES_MAX - 1,
            failure("provider_error"),
            Retry(min(RETRY_S * 2 ** (RETRIES_MAX - 1), RETRY_S_MAX), RETRIES_MAX),
            id="last",
        ),
        pytest.param(RETRIES_MAX, failure("provider_error"), GIVEN_UP, id="one too many"),
        pytest.param(0, failure("rate_limit", 7.0), Retry(7.0, 1), id="the provider's own word"),
        pytest.param(0, failure("rate_limit", 0.0), Retry(0.0, 1), id="no wait at all"),
        pytest.param(
            3,
            failure("rate_limit", RETRY_AFTER_S_MAX),
            Retry(RETRY_AFTER_S_MAX, 4),
            id="as long as is waited",
        ),
        pytest.param(
            0, failure("rate_limit", RETRY_AFTER_S_MAX + 1), GIVEN_UP, id="longer than is waited"
        ),
        pytest.param(
            RETRIES_MAX, failure("rate_limit", 1.0), GIVEN_UP, id="one too many, with a word"
        ),
    ],
)
def test_a_failed_model_call_is_tried_again_with_growing_patience(
    retries: int, error: ModelError, expected: Retry | Finish
) -> None:
    assert after_failure(failing(retries), error) == expected


def test_no_wait_of_our_own_is_longer_than_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ownware_gateway.run.RETRY_S", RETRY_S_MAX)
    assert after_failure(failing(2), failure("connection")) == Retry(RETRY_S_MAX, 3)


def test_a_turn_in_place_of_one_cut_off_goes_on_counting_its_tries() -> None:
    facts = facts_of(begun().recovers("connection", 1).says("He").superseded(2))
    assert facts.turn is not None
    assert facts.turn.retries == 2


def test_a_whole_answer_forgets_earlier_failures() -> None:
    facts = facts_of(
        begun()
        .recovers("connection", 1)
        .answer("", READ)
        .executes(READ)
        .ends(*READ, "x")
        .turn_ends()
        .turn()
    )
    assert facts.turn is not None
    assert facts.turn.retries == 0


def test_a_restart_is_no_failure_of_the_model() -> None:
    facts = facts_of(begun().recovers("restart", 1))
    assert facts.turn is not None
    assert facts.turn.retries == 0
