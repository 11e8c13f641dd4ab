"""What a run is, and its next step: pure.

`next_step` looks at what is in the log and says what happens next. A run that starts and one that
goes on after a restart ask the same question of the same facts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from ownware_gateway.events import (
    AgentComplete,
    Answers,
    Asks,
    ClientCall,
    ClientResult,
    CompactionEnd,
    DecidedBy,
    EndStatus,
    Error,
    Event,
    PermissionResponse,
    QuestionRequest,
    QuestionResponse,
    SessionEnd,
    StopReason,
    ToolCallEnd,
    TurnEnd,
    TurnInterrupted,
    Usage,
)
from ownware_gateway.models import OVERFLOW, ModelError
from ownware_gateway.permissions import Verdict
from ownware_gateway.transcript import Call, RunFacts, Turn

#: How often in a row a model call is tried again before the run fails.
RETRIES_MAX: Final = 5

#: The first wait before a retry, doubled each time up to the maximum; a provider's own word
#: (`Retry-After`) counts instead, up to its own maximum.
RETRY_S: Final = 0.5
RETRY_S_MAX: Final = 30.0
RETRY_AFTER_S_MAX: Final = 300.0

#: Agents that work for one run at the same time; further ones begin as these end.
AGENTS_AT_ONCE_MAX: Final = 8


#: How often in a turn a prompt that a provider finds too long is made shorter and sent again.
OVERFLOWS_MAX: Final = 3


class Ask(NamedTuple):
    """Ask the model: in a new turn, or again in the one that has shown nothing yet.

    `supersedes` is the turn whose shown text is not part of the answer any more.
    """

    turn_index: int
    new_turn: bool
    supersedes: int | None = None


class RunTools(NamedTuple):
    """Run these calls, together; `rules` are what lets them, by their ids, where a rule does."""

    calls: tuple[Call, ...]
    rules: Mapping[str, str]


class Refuse(NamedTuple):
    """End a call without running it; the reason is its result, `rule` what refuses, if one does."""

    call: Call
    reason: str
    rule: str | None = None


class Answered(NamedTuple):
    """End a call that has asked a person: the answer is its result, or why there is none."""

    call: Call
    result: str
    is_error: bool


class Question(NamedTuple):
    """Ask a person whether the call may run, or what the call itself asks.

    `rule` is what asks whether it may run, if one does.
    """

    call: Call
    reason: str
    rule: str | None = None


class HandOver(NamedTuple):
    """Have the client make these calls, which are of its own tools."""

    calls: tuple[Call, ...]


class Wait(NamedTuple):
    """Nothing can happen before a person, or the client, answers."""

    request_id: str


class Spawn(NamedTuple):
    """Make these calls runs of other agents; `of` is how many are to be made so, these included.

    `rules` as of `RunTools`.
    """

    calls: tuple[Call, ...]
    of: int
    rules: Mapping[str, str]


class Begin(NamedTuple):
    """Begin the agents' runs that these calls are."""

    calls: tuple[Call, ...]


class Deliver(NamedTuple):
    """End these calls: the agents' runs that they are have ended."""

    calls: tuple[Call, ...]


class Recall(NamedTuple):
    """Have these agents' runs stop: the run ends, and not before them."""

    calls: tuple[Call, ...]


class Rest(NamedTuple):
    """Nothing can happen before an agent's run ends; `agents` are under way."""

    agents: int


class EndTurn(NamedTuple):
    """The turn is over and the model is asked again."""

    turn: Turn
    reason: StopReason


class Finish(NamedTuple):
    """The run ends. `message` says what failed, where something did."""

    status: EndStatus
    reason: StopReason
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The run has ended."""


#: How a run ends that was asked to stop.
CANCELLED: Final = Finish("cancelled", "aborted", "cancelled")

TIMED_OUT: Final = Finish("timed_out", "aborted", "timed_out")

#: What is done about a run's agents.
AgentStep = Spawn | Begin | Deliver | Recall | Rest

#: What is done about calls.
CallStep = RunTools | Refuse | Answered | Question | HandOver | Wait

Step = Ask | CallStep | AgentStep | EndTurn | Finish | Done

#: How far the run of an agent is, as its row says: `spawned` has not begun.
AgentState = Literal["spawned", "under_way", "stopping", "ended"]


class Agents(NamedTuple):
    """What a run knows of the agents that work for it.

    `tool` is the tool that spawns them, where it has one; `states` how far those are whose calls
    have not ended, by their ids.
    """

    tool: str | None
    states: Mapping[str, AgentState]

    def of(self, calls: Iterable[Call], *states: AgentState) -> tuple[Call, ...]:
        """Return the calls that are open and whose agents' runs are in one of these states."""
        return tuple(
            call
            for call in calls
            if call.agent is not None
            and call.agent_is_open
            and self.states.get(call.agent.agent_id) in states
        )


NO_AGENTS: Final = Agents(None, {})


class Limits(NamedTuple):
    """What the run may take. Active time is watched by whoever performs the steps."""

    turns_max: int
    cost_usd_max: float | None


def next_step(
    facts: RunFacts,
    judge: Callable[[Call], Verdict],
    limits: Limits,
    agents: Agents = NO_AGENTS,
    cut: Finish | None = None,
) -> Step:
    """Return what happens next in a run of which the log says this.

    `judge` decides whether a call may run, needs a person, or is refused. `cut` is how it must end
    now for a reason that its own facts do not tell of: its time is over, or a budget is used up.
    """
    if facts.end is not None:
        return Done()
    if facts.cancel is not None:
        cut = CANCELLED
    if cut is not None:
        return before_end(facts, agents) or cut
    turn = facts.turn
    if turn is None:
        return Ask(0, new_turn=True)
    if not turn.complete:
        if turn.shown:
            return Ask(turn.index + 1, new_turn=True, supersedes=turn.index)
        return Ask(turn.index, new_turn=False)
    if turn.end is not None:
        return _stop_at_limit(facts, limits) or Ask(turn.index + 1, new_turn=True)
    if not turn.calls:
        reason = turn.answer.stop_reason if turn.answer is not None else "end_turn"
        if reason == "pause_turn":
            return _stop_at_limit(facts, limits) or EndTurn(turn, reason)
        return Finish("succeeded", reason)
    return (
        _next_for_agents(turn, agents)
        or _next_for_calls(turn, judge, agents)
        or _without_results(turn)
        or _stop_at_limit(facts, limits)
        or EndTurn(turn, "tool_use")
    )


def before_end(facts: RunFacts, agents: Agents) -> Deliver | Recall | Rest | None:
    """Return what is to be done about a run's agents before it ends; None when nothing is."""
    calls = facts.open_agents
    if ended := agents.of(calls, "ended"):
        return Deliver(ended)
    if under_way := agents.of(calls, "under_way"):
        return Recall(under_way)
    stopping = agents.of(calls, "stopping")
    return Rest(len(stopping)) if stopping else None


def _next_for_agents(turn: Turn, agents: Agents) -> Step | None:
    """Return what to do about agents that were spawned, before anything else."""
    if ended := agents.of(turn.calls.values(), "ended"):
        return Deliver(ended)
    if spawned := agents.of(turn.calls.values(), "spawned"):
        return Begin(spawned)
    return None


def _next_for_calls(turn: Turn, judge: Callable[[Call], Verdict], agents: Agents) -> Step | None:
    """Return what to do with the turn's calls; None when all have ended.

    Free calls run first, then people are asked, one question at a time, and what they granted runs
    together: nobody waits for a person who need not, nor for an agent. What the client is to call
    goes out last and all at once, for only then its answer from the gateway is over.
    """
    under_way = len(agents.of(turn.calls.values(), "under_way", "stopping"))
    free: list[Call] = []
    granted: list[Call] = []
    rules: dict[str, str] = {}
    by_client: list[Call] = []
    question: Wait | Question | None = None
    for call in turn.calls.values():
        if call.end is not None or call.agent is not None:
            continue
        match _next_for_call(call, judge):
            case Refuse() | Answered() as ends:
                return ends
            case Wait() | Question() as asks:
                question = question or asks
            case "client":
                by_client.append(call)
            case _May(is_granted, rule):
                (granted if is_granted else free).append(call)
                if rule is not None:
                    rules[call.id] = rule
    places = AGENTS_AT_ONCE_MAX - under_way
    return (
        _run(free, rules, agents.tool, places)
        or question
        or _run(granted, rules, agents.tool, places)
        or (Rest(under_way) if under_way else None)
        or (HandOver(tuple(by_client)) if by_client else None)
    )


def _without_results(turn: Turn) -> Finish | None:
    """Return the end of a run whose client makes none of its calls, and is not there any more.

    Nobody would read what the model says to that.
    """
    responses = [call.response for call in turn.calls.values()]
    left = any(isinstance(said, ClientResult) and not said.granted for said in responses)
    return Finish("succeeded", "tool_use") if left else None


def _run(
    calls: list[Call], rules: Mapping[str, str], spawns: str | None, places: int
) -> Spawn | RunTools | None:
    """Return how calls that may run do, agents first: they take longest."""
    to_spawn = [call for call in calls if call.name == spawns]
    if to_spawn and places > 0:
        return Spawn(tuple(to_spawn[:places]), len(to_spawn), rules)
    others = [call for call in calls if call.name != spawns]
    return RunTools(tuple(others), rules) if others else None


class _May(NamedTuple):
    """A call may run: a person has granted it, or nobody need; `rule` lets it, if one does."""

    is_granted: bool
    rule: str | None


def _next_for_call(
    call: Call, judge: Callable[[Call], Verdict]
) -> Refuse | Answered | Wait | Question | _May | Literal["client"]:
    if isinstance(call.response, QuestionResponse | ClientResult):
        return _answered(call, call.response)
    if call.response is not None and not call.executing and not call.response.granted:
        return Refuse(call, _denial(call.response))
    if call.request is not None and call.response is None and not call.executing:
        return Wait(call.request.request_id)
    # A call that was executing was cut off by a restart: `judge` says whether it may run again.
    verdict = judge(call)
    if verdict.decision == "deny":
        return Refuse(call, verdict.reason, verdict.rule)
    granted = call.response is not None and not call.executing
    if not granted and verdict.decision == "client":
        return "client"
    if granted or verdict.decision == "run":
        # What a person has granted bears the rule that asked in its question.
        return _May(granted, verdict.rule if verdict.decision == "run" else None)
    return Question(call, verdict.reason, verdict.rule)


def _denial(response: PermissionResponse) -> str:
    return f"Denied: {response.reason}"


def _answered(call: Call, response: QuestionResponse | ClientResult) -> Answered:
    if isinstance(response, ClientResult):
        for item in response.results or ():
            if item.tool_call_id == call.id:
                return Answered(call, item.result, is_error=False)
    elif response.answer is not None:
        return Answered(call, response.answer, is_error=False)
    return Answered(call, f"{response.reason[:1].upper()}{response.reason[1:]}.", is_error=True)


def _stop_at_limit(facts: RunFacts, limits: Limits) -> Finish | None:
    if facts.turns_done >= limits.turns_max:
        return Finish("failed", "max_turns", "max_turns")
    if limits.cost_usd_max is not None and facts.spent_usd >= limits.cost_usd_max:
        return over_budget(
            f"The run has cost {facts.spent_usd:.4g} US dollars; its profile allows "
            f"{limits.cost_usd_max:g} (execution.maxCostUsd)."
        )
    return None


def over_budget(why: str) -> Finish:
    """Return the end of a run that has used up a budget, with the sentence that says which."""
    return Finish("failed", "budget_exceeded", "budget_exceeded", why)


class Retry(NamedTuple):
    """Try the model call again after a while."""

    delay_s: float
    attempt: int


class Shorten(NamedTuple):
    """Make the prompt shorter and ask again, at once."""

    attempt: int


def after_failure(
    turn: Turn, error: ModelError, *, compacts: bool = False
) -> Retry | Shorten | Finish:
    """Return what follows a failed model call: another try, or the end of the run.

    `compacts` says whether a prompt may be made shorter.
    """
    # One that is still too long was not to be made any shorter.
    helpless = turn.overflowed or turn.overflows >= OVERFLOWS_MAX
    if error.code == OVERFLOW and compacts and not helpless:
        return Shorten(turn.overflows + 1)
    attempt = turn.retries + 1
    if error.retry is None or attempt > RETRIES_MAX:
        return Finish("failed", "error", error.code, error.message)
    if error.retry_after_s is not None:
        if error.retry_after_s > RETRY_AFTER_S_MAX:
            return Finish("failed", "error", error.code, error.message)
        return Retry(error.retry_after_s, attempt)
    return Retry(min(RETRY_S * 2 ** (attempt - 1), RETRY_S_MAX), attempt)


def closing(facts: RunFacts, finish: Finish, now_ms: int) -> list[Event]:
    """Return the events that end the run and everything it left open, for one append.

    A run that was asked to stop ends as cancelled, whatever else has gone wrong meanwhile.
    """
    if facts.cancel is not None:
        finish = CANCELLED
    turn = facts.turn
    events: list[Event] = []
    if turn is not None and turn.end is None:
        events += _close_calls(turn, finish)
        events += _close_compaction(facts)
    if finish.reason == "error" or finish.message is not None:
        index = turn.index if turn is not None else None
        events.append(
            Error(
                code=finish.code or "internal",
                message=finish.message or "The run failed.",
                recoverable=False,
                turn_index=index,
            )
        )
    if turn is not None and turn.end is None:
        events.append(_end_turn(turn, finish, now_ms))
    for event in events:
        facts.apply(event)
    end = SessionEnd(
        run_id=facts.message.run_id,
        session_id=facts.message.run_id,
        status=finish.status,
        reason=finish.reason,
        code=finish.code,
        total_usage=facts.usage,
        turn_count=facts.turns_done,
        timestamp=now_ms,
    )
    facts.apply(end)
    return [*events, end]


def _end_turn(turn: Turn, finish: Finish, now_ms: int) -> Event:
    if finish.reason == "aborted":
        return TurnInterrupted(
            turn_index=turn.index,
            reason="timeout" if finish.status == "timed_out" else "aborted",
            timestamp=now_ms,
        )
    if finish.reason == "budget_exceeded" and not turn.complete:
        return TurnInterrupted(turn_index=turn.index, reason="timeout", timestamp=now_ms)
    limited = finish.reason in ("max_turns", "budget_exceeded")
    return turn_end(turn, "tool_use" if limited else finish.reason, now_ms)


def turn_end(turn: Turn, reason: StopReason, now_ms: int) -> TurnEnd:
    """Return the end of a turn."""
    usage = turn.answer.usage if turn.answer is not None else Usage()
    return TurnEnd(turn_index=turn.index, stop_reason=reason, usage=usage, timestamp=now_ms)


def _close_compaction(facts: RunFacts) -> list[Event]:
    if facts.compacting is None:
        return []
    begun = facts.compacting
    return [
        CompactionEnd(
            strategy=begun.strategy,
            status="failed",
            pre_token_count=begun.pre_token_count,
            post_token_count=begun.pre_token_count,
            saved_percent=0,
            detail="The run ended before there was a summary.",
            turn_index=begun.turn_index,
        )
    ]


def _close_calls(turn: Turn, finish: Finish) -> list[Event]:
    """End what is open, so that the next request to a provider is valid."""
    decided_by: DecidedBy = "timeout" if finish.status == "timed_out" else "cancel"
    why = f"the run {'ran out of time' if finish.status == 'timed_out' else 'ended'}"
    events: list[Event] = []
    answered: set[str] = set()
    for call in turn.calls.values():
        if call.end is not None:
            continue
        asked = call.request
        # Several calls may wait with one request.
        if asked is not None and call.response is None and asked.request_id not in answered:
            answered.add(asked.request_id)
            events.append(_unanswered(asked, decided_by, why))
        ended = _close_call(turn, call, why)
        if call.agent is not None:
            events.append(agent_failed(turn, call.agent.agent_id, ended.result, "aborted"))
        events.append(ended)
    return events


def _close_call(turn: Turn, call: Call, why: str) -> ToolCallEnd:
    if isinstance(call.response, QuestionResponse | ClientResult):
        # It was answered, and nothing but its end is missing.
        said = _answered(call, call.response)
        return tool_end(turn, call, said.result, is_error=said.is_error)
    how = "Interrupted" if call.executing else "Not run"
    if isinstance(call.request, QuestionRequest | ClientCall):
        how = "Not answered"
    return tool_end(turn, call, f"{how}: {why}.", is_error=True)


def _unanswered(asked: Asks, by: DecidedBy, why: str) -> Answers:
    """Return the response to what a person, or a client, was asked and has not answered."""
    if isinstance(asked, ClientCall):
        return ClientResult(
            request_id=asked.request_id,
            results=None,
            decided_by=by,
            reason=why,
            turn_index=asked.turn_index,
        )
    if isinstance(asked, QuestionRequest):
        return QuestionResponse(
            request_id=asked.request_id,
            answer=None,
            decided_by=by,
            reason=why,
            turn_index=asked.turn_index,
        )
    return PermissionResponse(
        request_id=asked.request_id,
        granted=False,
        decided_by=by,
        reason=why,
        turn_index=asked.turn_index,
    )


def agent_failed(
    turn: Turn, agent_id: str, why: str, status: Literal["error", "aborted"] = "error"
) -> AgentComplete:
    """Return the end of an agent whose run has never begun."""
    return AgentComplete(
        agent_id=agent_id,
        result=why,
        status=status,
        error=why,
        duration_ms=0,
        turn_index=turn.index,
    )


def tool_end(
    turn: Turn, call: Call, result: str, *, is_error: bool, rule: str | None = None
) -> ToolCallEnd:
    """Return the end of a call that did not run; `rule` is what denied it, if one did."""
    return ToolCallEnd(
        tool_call_id=call.id,
        tool_name=call.name,
        result=result,
        is_error=is_error,
        duration_ms=0,
        turn_index=turn.index,
        output_bytes_raw=len(result.encode()),
        decision=None if rule is None else "deny",
        rule=rule,
    )
