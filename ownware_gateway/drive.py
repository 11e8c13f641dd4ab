"""One run on its way: performs the steps that `run.next_step` names and appends their outcome.

A drive holds what it has appended as facts, so each step is decided from what the log says, and a
run that goes on after a restart is driven by the same code as one that has just begun.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from ownware_gateway.calls import Assignment, Calls, Parts, load_checks
from ownware_gateway.conversation import conversation
from ownware_gateway.events import (
    Event,
    Fallback,
    Recovery,
    RunCancel,
    SessionStart,
    TextComplete,
    TextDelta,
    ThinkingComplete,
    ThinkingDelta,
    ToolCallArgsDelta,
    ToolCallStart,
    TurnStart,
    Usage,
)
from ownware_gateway.log import Append, Commit, Drives, Private, RestsOn, Run, Spent
from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    CallStart,
    Dispatch,
    ModelError,
    Part,
    Request,
    Text,
    Thinking,
    ToolSpec,
)
from ownware_gateway.profile import SPAWN, Profile
from ownware_gateway.run import (
    NO_AGENTS,
    TIMED_OUT,
    Agents as AgentStates,
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
    RunTools,
    Shorten,
    Spawn,
    Step,
    Wait,
    after_failure,
    closing,
    next_step,
    over_budget,
    tool_end,
    turn_end,
)
from ownware_gateway.tokens import prompt_tokens
from ownware_gateway.tools import clip
from ownware_gateway.transcript import NOTICE, Answer as StoredAnswer, RunFacts, Turn, let_go

if TYPE_CHECKING:
    from ownware_gateway.agents import Agents
    from ownware_gateway.relief import Relief

#: No window is smaller than what such a prompt leaves room for: what the model's is, which may have
#: to be found out, is not asked for it.
SMALL_PROMPT_TOKENS: Final = 6_000

#: Events that may be on their way to the disk before the model's stream is read on.
UNCOMMITTED_EVENTS_MAX: Final = 2_000


class Drive:
    """Drives one run until it ends, waits for a person or its agents, or is taken over."""

    def __init__(self, parts: Parts, assignment: Assignment) -> None:
        self._parts = parts
        self._assignment = assignment
        self._run = assignment.run
        self._profile = assignment.profile
        self._profile_now = assignment.profile_now
        self._dispatch = assignment.dispatch
        self._history = assignment.history
        self._facts = assignment.history[-1]
        let_go(self._history)
        self._restarted = assignment.restarted
        self._options = assignment.options
        self._calls = Calls(parts, assignment, self._store)
        self._guard = Drives(assignment.run.id, assignment.run.generation)
        self._limits = Limits(
            assignment.profile.max_turns, assignment.profile.execution.max_cost_usd
        )
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._began_ms = assignment.run.active_ms
        self._scope: asyncio.Timeout | None = None
        #: Its time was up when its agents were told to stop, and it rests until they have.
        self._timed_out = bool(self._facts.open_agents) and self._began_ms >= self._run.timeout_ms
        #: What of its active time is its agents', and is not in the log yet.
        self._charged_ms = 0
        self._budgets = assignment.budgets
        self._ends_at = assignment.ends_at
        #: Which budget is used up, in a sentence.
        self._used_up: str | None = None
        self._relief: Relief | None = None
        self._leaving = False
        self._uncommitted = 0
        self._milestone: Commit | None = None
        #: What was said of servers that cannot be used, so that it is said once.
        self._told: set[str] = set()

    async def go(self) -> None:
        """Take one step after the other. Raises Refused when the run is not ours any more."""
        if self._facts.turn is not None and self._facts.turn.calls:
            await load_checks()
        if self._facts.cancel is None and self._facts.end is None:
            # Before anything is judged: what a call may do, its server says.
            await self._within_time(self._calls.connect())
        while not self._leaving:
            if self._wall_left_s() <= 0:
                self._end_by_the_clock()
            step = next_step(
                self._facts,
                self._calls.judge,
                self._limits,
                await self._agent_states(),
                self._cut(),
            )
            if await self._take(step):
                return

    async def _take(self, step: Step) -> bool:
        """Take a step; return whether nothing is to be done after it for now."""
        match step:
            case Done():
                return True
            case Wait():
                if self._profile.subagents:
                    # What came of an agent may have been told since the question was asked.
                    await self._park("person", len(self._facts.open_agents))
                return True
            case Finish():
                await finish(self._parts, self._run, self._facts, step, self._active_ms())
            case Question() | HandOver():
                # Not to be cut off: whether it is asked must be known to whoever ends the run.
                return await self._question(step)
            case Begin() | Deliver() | Recall() | Rest():
                # Nor these, which are done about agents when the run's time is over, too.
                return await self._with_agents(step)
            case _:
                await self._within_time(self._perform(step))
        return False

    def _cut(self) -> Finish | None:
        if self._used_up is not None:
            return over_budget(self._used_up)
        return TIMED_OUT if self._timed_out else None

    def leave(self) -> None:
        """Stop before the next step: the gateway is leaving, and the log knows where to go on."""
        self._leaving = True

    def cancel(self, event: RunCancel) -> None:
        """Note that the run was asked to stop, and cut off the step under way."""
        self._facts.apply(event)
        if self._scope is not None:
            # Refused when the step is being cut off already.
            with suppress(RuntimeError):
                self._scope.reschedule(self._loop.time())

    def _active_ms(self) -> int:
        return self._began_ms + int((self._loop.time() - self._began_s) * 1000)

    def _wall_left_s(self) -> float:
        if self._ends_at is None:
            return float("inf")
        return (self._ends_at - self._parts.clock_ms()) / 1000

    def _end_by_the_clock(self) -> None:
        assert self._ends_at is not None
        allowed_s = (self._ends_at - self._run.accepted_at) / 1000
        self._used_up = (
            f"The run has taken the {allowed_s:g} s by the clock that its profile allows "
            "(execution.maxWallTime)."
        )

    async def _within_time(self, work: Coroutine[Any, Any, None]) -> None:
        left_s = (self._run.timeout_ms - self._active_ms()) / 1000
        by_the_clock = self._wall_left_s() < left_s
        left_s = min(left_s, self._wall_left_s())
        try:
            async with asyncio.timeout(max(left_s, 0)) as self._scope:
                await work
        except TimeoutError:
            if self._scope is None or not self._scope.expired():
                raise
            if by_the_clock:
                self._end_by_the_clock()
            else:
                self._timed_out = True
        finally:
            self._scope = None

    async def _perform(self, step: Step) -> None:
        match step:
            case Ask():
                await self._ask(step)
            case RunTools(calls, rules):
                await self._calls.run(calls, rules)
            case Spawn():
                await self._agents.spawn(step, self._run.timeout_ms - self._active_ms())
            case Refuse(call, reason, rule):
                ended = clip(self._parts.masker.text(reason)).text
                by = None if rule is None else self._parts.masker.text(rule)
                self._store([tool_end(self._turn, call, ended, is_error=True, rule=by)])
            case Answered(call, result, is_error):
                said = self._parts.masker.text(result)
                self._store([tool_end(self._turn, call, said, is_error=is_error)])
            case EndTurn(turn, reason):
                self._store([turn_end(turn, reason, self._parts.clock_ms())])
            case _:
                raise AssertionError(step)

    # -- agents

    @cached_property
    def _agents(self) -> "Agents":
        from ownware_gateway.agents import Agents

        return Agents(self._parts, self._assignment, self._calls, self._store)

    async def _agent_states(self) -> AgentStates:
        if not self._profile.subagents:
            return NO_AGENTS
        states = await self._agents.states() if self._facts.open_agents else {}
        return AgentStates(SPAWN, states)

    async def _with_agents(self, step: Begin | Deliver | Recall | Rest) -> bool:
        """Do what is to be done about the run's agents; return whether the run rests."""
        match step:
            case Begin(calls):
                await self._agents.begin(calls)
            case Recall(calls):
                await self._agents.recall(calls)
            case Deliver(calls):
                await self._agents.deliver(calls, self._charge)
            case Rest(agents):
                return await self._park("agents", agents)
        return False

    def _charge(self, active_ms: int) -> None:
        """Note that the run has been active for so long at least, its agents' time included."""
        grown_ms = max(0, active_ms - self._active_ms())
        self._began_ms += grown_ms
        self._charged_ms += grown_ms
        self._timed_out |= self._active_ms() >= self._run.timeout_ms

    async def _question(self, step: Question | HandOver) -> bool:
        """Ask a person, or the client, when it is this agent's turn; return whether it rests."""
        alone = self._run.parent_run_id is None and not self._facts.has_agents
        if not alone and await self._agents.hear():
            return False  # Perhaps there is nothing left to ask.
        if self._facts.cancel is not None:
            return False
        if isinstance(step, HandOver):
            asked = await self._calls.hand_over(step.calls)
        else:
            asked = await self._calls.ask(step.call, step.reason, step.rule)
        if asked:
            return False
        agents = await self._agent_states()
        under_way = agents.of(self._facts.open_agents, "under_way", "stopping")
        return await self._park("line", len(under_way))

    async def _park(self, rests_on: RestsOn, agents: int) -> bool:
        cancelled = self._facts.cancel is not None
        return await self._parts.log.park(
            self._guard,
            rests_on,
            agents=agents,
            cancelled=cancelled,
            active_ms=self._active_ms(),
        )

    @property
    def _turn(self) -> Turn:
        assert self._facts.turn is not None
        return self._facts.turn

    def _store(
        self,
        events: Sequence[Event],
        private: Sequence[Private] = (),
        spent: Spent | None = None,
        *,
        asks: bool = False,
    ) -> Commit:
        """Append what happened and fold it into the facts; the commit says when it is durable."""
        for event in events:
            self._facts.apply(event)
        guard = self._guard._replace(asks=True) if asks else self._guard
        charged_ms, self._charged_ms = self._charged_ms, 0
        return self._parts.log.append(
            Append(
                self._run.stream,
                guard,
                events,
                private,
                active_ms=self._active_ms(),
                charged_ms=charged_ms,
                spent=spent,
            )
        )

    # -- asking the model

    async def _ask(self, step: Ask) -> None:
        await self._calls.connect()
        with self._budgets.asking(self._profile_now) as under_way:
            why = await self._budgets.used_up(self._profile_now, under_way)
            if why is None:
                await self._ask_within_budget(step)
            self._used_up = why

    async def _ask_within_budget(self, step: Ask) -> None:
        opening = self._opening(step)
        if step.turn_index == 0 and step.new_turn:
            opening += await self._unpriced()
        if opening:
            self._store(opening)
        turn = self._turn
        try:
            answer = await self._listen(turn, await self._request_that_fits())
        except ModelError as error:
            await self._after_failure(turn, error)
        else:
            await self._keep(turn, answer)

    async def _unpriced(self) -> list[Event]:
        """Return what a person should know of a budget of money that no price is known for."""
        names = []
        if self._profile.execution.max_cost_usd is not None:
            names.append("execution.maxCostUsd")
        if self._profile_now.execution.per_day.max_cost_usd is not None:
            names.append("execution.perDay.maxCostUsd")
        if not names:
            return []
        priced = await self._parts.catalogue.price(self._dispatch.id, Usage())
        if priced.cost_usd is not None:
            return []
        why = (
            f"The price of {self._dispatch.id} is not known: {' and '.join(names)} cannot hold it."
        )
        return [TextDelta(text=f"[{why}]\n\n", turn_index=0, notice=True)]

    async def _request_that_fits(self) -> Request:
        """Return the request, its prompt shortened where it would not fit the model's window."""
        request = self._request()
        tokens = prompt_tokens(request, self._counted())
        stated = self._profile.compaction.context_window is not None
        if tokens <= SMALL_PROMPT_TOKENS and not stated and not self._turn.overflowed:
            return request
        if self._relief is None:
            try:
                from ownware_gateway.relief import Relief
            except (OSError, ImportError):
                # There may be no file handle left for that now; the next prompt is looked at again.
                return request
            self._relief = Relief(self._parts, self._assignment, self._store)
        shorter = await self._relief.make_room(tokens, request)
        return self._request() if shorter else request

    def _counted(self) -> tuple[AssistantTurn, Usage] | None:
        """Return the last answer, with what its provider counted, if the prompt began as it does.

        That is not so after it was shortened, nor for an answer of another profile or model.
        """
        if self._turn.relieved:
            return None
        for run in reversed(self._history[-2:]):
            session = run.session
            if session is None or (session.model, session.profile_id) != (
                self._dispatch.id,
                self._run.profile_id,
            ):
                return None
            for turn in reversed(run.turns):
                if turn.answer is not None and not turn.superseded:
                    counted = turn.answer.usage.input_tokens > 0
                    return (turn.answer.turn, turn.answer.usage) if counted else None
        return None

    def _opening(self, step: Ask) -> list[Event]:
        now = self._parts.clock_ms()
        events: list[Event] = []
        if self._facts.session is None:
            events.append(session_start(self._run.id, self._profile, self._dispatch, now))
        if step.supersedes is not None or (self._restarted and not step.new_turn):
            recovery = Recovery(
                reason="restart",
                attempt=self._turn.retries + 1,
                detail="The gateway was restarted during the answer; the model is asked again.",
                turn_index=self._turn.index,
                supersedes=step.supersedes,
            )
            events += self._again(recovery, now)
        elif step.new_turn:
            events.append(TurnStart(turn_index=step.turn_index, timestamp=now))
        self._restarted = False
        return events + self._notices(step.turn_index)

    def _notices(self, turn_index: int) -> list[Event]:
        """Return what a person should know of servers that cannot be used, each thing once."""
        missing = dict.fromkeys(self._calls.missing.values())
        news = [why for why in missing if why not in self._told]
        self._told.update(news)
        return [TextDelta(text=f"[{why}]\n\n", turn_index=turn_index, notice=True) for why in news]

    def _again(self, recovery: Recovery, now: int) -> list[Event]:
        """Return what announces that the model is asked again.

        Where something was shown already, a person sees why it starts anew, in a turn of its own.
        """
        if recovery.supersedes is None:
            return [recovery]
        index = recovery.supersedes
        return [
            TextDelta(text=NOTICE, turn_index=index, notice=True),
            recovery,
            TurnStart(turn_index=index + 1, timestamp=now),
        ]

    async def _listen(self, turn: Turn, request: Request) -> Answer:
        """Append the model's answer as it comes; return it whole."""
        stream = self._dispatch.model.stream(request)
        answer: Answer | None = None
        async with aclosing(stream) as batches:  # type: ignore[type-var]
            async for parts in batches:
                events, ended = _events(parts, turn)
                answer = ended or answer
                if events:
                    await self._pace(self._store_deltas(turn, events), len(events))
        if answer is None:
            raise ModelError("The model's answer ended in the middle.", retry="connection")
        return answer

    def _store_deltas(self, turn: Turn, events: Sequence[Event]) -> Commit:
        """Append without folding: all that deltas say to the facts is that something was shown."""
        # The first words are what a person waits for; those that follow may share a commit.
        first, turn.shown = not turn.shown, True
        for event in events:
            if isinstance(event, ToolCallStart):
                self._facts.apply(event)
        append = Append(self._run.stream, self._guard, events, at_once=first)
        return self._parts.log.append(append)

    async def _pace(self, commit: Commit, events: int) -> None:
        """Hold the model back when the disk does not keep up: two batches may be under way."""
        self._uncommitted += events
        if self._uncommitted >= UNCOMMITTED_EVENTS_MAX // 2:
            if self._milestone is not None:
                await self._milestone.wait()
            self._milestone, self._uncommitted = commit, 0

    def _request(self) -> Request:
        profile = self._profile
        request = Request(
            model=self._dispatch.name,
            messages=conversation(self._history),
            system=self._instructions(),
            tools=[
                ToolSpec(tool.name, tool.description, tool.input_schema, tool.strict)
                for tool in self._calls.tools.values()
            ],
            temperature=profile.temperature,
            max_tokens=profile.max_tokens,
            thinking=profile.thinking,
        )
        return self._options.apply(request)

    def _instructions(self) -> str:
        """Return the system prompt, with what the model should know of servers that are away."""
        away = dict.fromkeys(self._calls.missing.values())
        missing = [f"[{why} Its tools cannot be used.]" for why in away]
        own = "" if self._options.bare else self._profile.instructions
        parts = (own, self._options.instructions, *missing)
        return "\n\n".join(part for part in parts if part)

    async def _keep(self, turn: Turn, answer: Answer) -> None:
        """Append that the answer is whole, and keep it exactly, before anything follows from it."""
        index = turn.index
        usage = await self._parts.catalogue.price(self._dispatch.id, answer.usage)
        if answer.turn.tool_calls:
            await load_checks()
        turn.answer = StoredAnswer(answer.turn, answer.stop_reason, usage)
        events: list[Event] = []
        if answer.turn.thinking:
            events.append(ThinkingComplete(text=answer.turn.thinking, turn_index=index))
        for call in answer.turn.tool_calls:
            if call.id not in turn.calls:
                events.append(
                    ToolCallStart(tool_call_id=call.id, tool_name=call.name, turn_index=index)
                )
            shown = self._parts.masker.arguments(call.arguments)
            events.append(ToolCallArgsDelta(tool_call_id=call.id, delta=shown, turn_index=index))
        events.append(TextComplete(text=answer.turn.text, turn_index=index))
        spent = Spent(usage.cost_usd or 0.0, 1)
        await self._store(events, [Private("message", turn.answer.dump())], spent).wait()

    async def _after_failure(self, turn: Turn, error: ModelError) -> None:
        message = self._parts.masker.text(error.message)
        then = after_failure(turn, error, compacts=self._profile.compaction.enabled)
        if isinstance(then, Finish):
            failed = Finish(then.status, then.reason, then.code, message)
            await finish(self._parts, self._run, self._facts, failed, self._active_ms())
            return
        if isinstance(then, Shorten):
            too_long = Recovery(
                reason="prompt_too_long",
                attempt=then.attempt,
                detail=f"{message} It is made shorter and sent again.",
                turn_index=turn.index,
                supersedes=turn.index if turn.shown else None,
            )
            await self._store(self._again(too_long, self._parts.clock_ms())).wait()
            return
        assert error.retry is not None
        recovery = Recovery(
            reason=error.retry,
            attempt=then.attempt,
            detail=f"{message} Trying again in {then.delay_s:g} s.",
            turn_index=turn.index,
            supersedes=turn.index if turn.shown else None,
        )
        await self._store(self._again(recovery, self._parts.clock_ms())).wait()
        await asyncio.sleep(then.delay_s)


def session_start(run_id: str, profile: Profile, dispatch: Dispatch, now_ms: int) -> SessionStart:
    """Return the event that a run begins."""
    return SessionStart(
        run_id=run_id,
        session_id=run_id,
        profile_id=profile.name,
        model=dispatch.id,
        fallback=fallback_of(profile, dispatch),
        timestamp=now_ms,
    )


def fallback_of(profile: Profile, dispatch: Dispatch) -> Fallback | None:
    """Return why another model answers than the profile names; None when it is the one."""
    if dispatch.fallback_reason is None:
        return None
    return Fallback(requested_model=profile.model, reason=dispatch.fallback_reason)


async def finish(
    parts: Parts, run: Run, facts: RunFacts, how: Finish, active_ms: int | None = None
) -> None:
    """End a run, and all that it left open, in one append. Raises Refused when it is not ours."""
    events = closing(facts, how, parts.clock_ms())
    guard = Drives(run.id, run.generation)
    await parts.log.append(Append(run.stream, guard, events, active_ms=active_ms)).wait()


def _events(parts: Sequence[Part], turn: Turn) -> tuple[list[Event], Answer | None]:
    """Return the events that a batch of the model's stream is, and the answer if it ended."""
    index = turn.index
    events: list[Event] = []
    answer: Answer | None = None
    for part in parts:
        if isinstance(part, Text):
            events.append(TextDelta(text=part.text, turn_index=index))
        elif isinstance(part, Thinking):
            events.append(ThinkingDelta(text=part.text, turn_index=index))
        elif isinstance(part, CallStart):
            events.append(
                ToolCallStart(tool_call_id=part.id, tool_name=part.name, turn_index=index)
            )
        else:
            answer = part
    return events, answer
