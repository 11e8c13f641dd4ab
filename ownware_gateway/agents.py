"""The agents that work for one run: spawned by its calls, each a run in a stream of its own.

A run that waits for its agents has no task. What it knows of them is in the log: that one was
spawned, and which run it is, stands in the run's own stream before that run begins; how far it is
says its row; and what came of it is told once, in the append that ends the call.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from ownware_gateway.calls import Assignment, Calls, Parts, Store
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    ASKED,
    AgentComplete,
    AgentSpawn,
    AgentStatus,
    Event,
    PermissionRequest,
    PermissionResponse,
    ToolCallEnd,
    ToolCallExecute,
)
from ownware_gateway.log import Append, Drives, Log, Run, Stream
from ownware_gateway.permissions import grant
from ownware_gateway.profile import Profile
from ownware_gateway.run import AgentState, Spawn, agent_failed, tool_end
from ownware_gateway.tools import clip
from ownware_gateway.transcript import PAGE, Call, RunFacts, Turn, load

#: Agents that a run and its agents may spawn in all. Looked at before they are spawned, so those
#: that are spawned in the same moment may exceed it by a few.
AGENTS_MAX: Final = 200

_STATUSES: Final[Mapping[str, AgentStatus]] = {
    "succeeded": "completed",
    "cancelled": "aborted",
}

#: How a run ended, for the model that had it done.
_ENDS: Final = {"failed": "failed", "timed_out": "ran out of time", "cancelled": "was stopped"}


#: The exact arguments of a call, and the event that it begins.
Begun = tuple[dict[str, Any], ToolCallExecute]


class Agents:
    """The agents of one run, and what becomes of them."""

    def __init__(self, parts: Parts, assignment: Assignment, calls: Calls, store: Store) -> None:
        self._parts = parts
        self._run = assignment.run
        self._profile = assignment.profile
        self._profile_now = assignment.profile_now
        self._above = assignment.above
        self._family = assignment.family
        self._facts = assignment.history[-1]
        self._ends_at = assignment.ends_at
        self._calls = calls
        self._store = store

    @property
    def _turn(self) -> Turn:
        assert self._facts.turn is not None
        return self._facts.turn

    # -- spawning

    async def spawn(self, step: Spawn, left_ms: int) -> None:
        """Append that calls are runs of agents from here on; `left_ms` is the run's active time.

        One that cannot be ends instead, with the reason.
        """
        top = self._above[-1].run if self._above else self._run
        room = AGENTS_MAX - await self._parts.log.agents_below(top.id)
        events: list[Event] = []
        share = self._share(step.of)
        for call in step.calls:
            try:
                begun = self._calls.begun(call, step.rules.get(call.id))
                events += self._spawned(call, begun, left_ms, share, room)
                room -= 1
            except GatewayError as error:
                reason = self._parts.masker.text(error.message)
                events.append(tool_end(self._turn, call, reason, is_error=True))
        await self._store(events).wait()

    def _share(self, count: int) -> float | None:
        """Return what each of so many agents may cost in US dollars; None is as much as it likes.

        What is left of the run's own limit is shared, but for what those under way may cost still.
        """
        limit = self._profile.execution.max_cost_usd
        if limit is None:
            return None
        spawns = [call.agent for call in self._facts.open_agents if call.agent is not None]
        kept = sum(spawn.max_cost_usd or 0 for spawn in spawns)
        return (limit - self._facts.spent_usd - kept) / count

    def _spawned(
        self, call: Call, begun: Begun, left_ms: int, share: float | None, room: int
    ) -> Sequence[Event]:
        """Return the events that make a call an agent's run. Raises GatewayError."""
        arguments, begins = begun
        profile = self._profile_of(arguments["agent"])
        if room <= 0:
            message = f"{AGENTS_MAX} agents have been spawned, as many as a run may have."
            raise GatewayError("overloaded", message)
        if share is not None and share <= 0:
            message = "What this run may cost is used up, so no agent can work for it."
            raise GatewayError("overloaded", message)
        own = profile.execution.max_cost_usd
        spawn = AgentSpawn(
            agent_id=self._parts.new_id("agent"),
            parent_agent_id=self._run.agent_id,
            run_id=self._parts.new_id("run"),
            tool_call_id=call.id,
            name=arguments["agent"],
            profile_name=profile.name,
            model=profile.model,
            task=self._parts.masker.text(arguments["task"]),
            time_left_ms=max(left_ms, 1),
            ends_at=self._ends_at,
            max_cost_usd=min((cost for cost in (own, share) if cost is not None), default=None),
            turn_index=self._turn.index,
        )
        return [begins, spawn]

    def _profile_of(self, name: str) -> Profile:
        """Return the profile of an agent; what the run started with and what holds now agree."""
        then, now = self._profile.subagents.get(name), self._profile_now.subagents.get(name)
        if then is None or now is None or then.profile != now.profile:
            message = f"Which agent {name!r} is was changed since this run began."
            raise GatewayError("not_found", message)
        return self._family.profile(then.profile)

    # -- as they go on

    async def states(self) -> Mapping[str, AgentState]:
        """Return how far the agents are whose calls have not ended, as their rows say now."""
        spawns = [call.agent for call in self._facts.open_agents if call.agent is not None]
        return {spawn.agent_id: _state(await self._parts.log.run(spawn.run_id)) for spawn in spawns}

    async def begin(self, calls: Sequence[Call]) -> None:
        """Begin agents' runs; a call ends whose agent's run cannot begin."""
        for call in calls:
            assert call.agent is not None
            try:
                await self._family.begin(self._run, call.agent, self._task(call))
            except GatewayError as error:
                why = self._parts.masker.text(error.message)
                failed = agent_failed(self._turn, call.agent.agent_id, why)
                await self._store([failed, tool_end(self._turn, call, why, is_error=True)]).wait()

    def _task(self, call: Call) -> str:
        """Return the task exactly; the arguments fitted when the agent was spawned."""
        answer = self._turn.answer
        assert answer is not None
        wanted = next(item for item in answer.turn.tool_calls if item.id == call.id)
        return str(json.loads(wanted.arguments)["task"])

    async def recall(self, calls: Sequence[Call]) -> None:
        """Have agents' runs stop."""
        for call in calls:
            assert call.agent is not None
            await self._family.recall(call.agent.run_id)

    async def deliver(self, calls: Sequence[Call], charge: Callable[[int], None]) -> None:
        """Append what came of agents whose runs have ended, and that their calls have ended so.

        `charge` is told of the active time that the run has had at least, in milliseconds.
        """
        events: list[Event] = []
        for call in calls:
            assert call.agent is not None
            child = await self._parts.log.run(call.agent.run_id)
            assert child is not None
            charge(self._run.timeout_ms - call.agent.time_left_ms + child.active_ms)
            events += await _outcome(self._parts, self._turn, call, child)
        await self._store(events).wait()

    # -- asking people

    async def hear(self) -> bool:
        """Learn what people have allowed for the rest of the thread; True when it is news."""
        allowed = await thread_grants(self._parts.log, self._run.thread_id)
        if allowed == self._calls.granted_elsewhere:
            return False
        self._calls.granted_elsewhere = allowed
        return True


async def end_all(
    parts: Parts, run: Run, facts: RunFacts, recall: Callable[[str], Awaitable[None]]
) -> bool:
    """Have the agents of a run that ends stop, and append what came of them; True once all have."""
    left = 0
    for call in facts.open_agents:
        assert call.agent is not None
        child = await parts.log.run(call.agent.run_id)
        if child is None:
            continue  # It has not begun, and does not any more: the end of the run says so.
        if not child.terminal:
            left += 1
            await recall(child.id)
            continue
        assert facts.turn is not None
        events = await _outcome(parts, facts.turn, call, child)
        for event in events:
            facts.apply(event)
        await parts.log.append(Append(run.stream, Drives(run.id, run.generation), events)).wait()
    return left == 0


async def _outcome(parts: Parts, turn: Turn, call: Call, child: Run) -> Sequence[Event]:
    """Return the events that tell what came of an agent whose run has ended."""
    assert call.agent is not None
    runs = await load(parts.log, child.stream, after=child.start_seq, files=False)
    facts = runs[0] if runs else None
    output = clip(parts.masker.text(_told(call.agent.name, child, facts)))
    known = facts.spent_usd if facts is not None else 0.0
    took_ms = (child.terminal_at or child.accepted_at) - child.accepted_at
    status = _STATUSES.get(child.status, "error")
    complete = AgentComplete(
        agent_id=call.agent.agent_id,
        result=output.text,
        status=status,
        error=None if status == "completed" else child.code or child.status,
        duration_ms=took_ms,
        usage=child.usage,
        known_cost_usd=known if child.usage.cost_usd is None and known else None,
        turn_count=facts.turns_done if facts is not None else None,
        turn_index=turn.index,
    )
    ended = ToolCallEnd(
        tool_call_id=call.id,
        tool_name=call.name,
        result=output.text,
        is_error=status != "completed",
        duration_ms=took_ms,
        turn_index=turn.index,
        truncated=output.truncated,
        output_bytes_raw=output.bytes_raw,
    )
    return [complete, ended]


def _state(run: Run | None) -> AgentState:
    if run is None:
        return "spawned"
    if run.terminal:
        return "ended"
    return "under_way" if run.cancel_requested_at is None else "stopping"


def _told(name: str, child: Run, facts: RunFacts | None) -> str:
    """Return what the model is told of an agent's run that has ended."""
    said = _last_words(facts)
    if child.status == "succeeded":
        reason = facts.end.reason if facts is not None and facts.end is not None else "end_turn"
        cut = "" if reason in ("end_turn", "stop_sequence") else f"\n\n[it ended so: {reason}]"
        return (said or f"[{name} ended without a word.]") + cut
    why = f" ({child.code})" if child.code not in (None, child.status) else ""
    error = facts.error if facts is not None else None
    what = f" {error.message}" if error is not None else ""
    last = f"\n\nThe last that it said:\n{said}" if said else ""
    return f"The agent {name} {_ENDS.get(child.status, child.status)}{why}.{what}{last}"


def _last_words(facts: RunFacts | None) -> str:
    """Return the last text of a run's model that is not empty, cut off as it may be."""
    for turn in reversed(facts.turns if facts is not None else ()):
        text = turn.text if turn.text is not None else turn.cut_text
        if text and not turn.superseded:
            return text
    return ""


async def thread_grants(log: Log, thread_id: str) -> frozenset[str]:
    """Return what people have allowed for the rest of a thread, whichever of its agents asked.

    As `transcript.grants`; the thread's own stream has the questions of all its agents.
    """
    thread = await log.thread(thread_id)
    asked: dict[str, PermissionRequest] = {}
    allowed: set[str] = set()
    # What was copied from another thread grants nothing.
    after = thread.history_to if thread is not None else 0
    while records := await log.read(Stream(thread_id), after, limit=PAGE, deltas=False):
        after = records[-1].seq
        for event in (record.event() for record in records if record.type in ASKED):
            match event:
                case PermissionRequest():
                    asked[event.request_id] = event
                case PermissionResponse(granted=True, always=True) if event.request_id in asked:
                    request = asked[event.request_id]
                    allowed |= {grant(request.tool_name, request.rule), request.operation_hash}
                case _:
                    pass
    return frozenset(allowed)


def narrowed(profile: Profile, spawn: AgentSpawn, now_ms: int) -> Profile:
    """Return a profile that takes no more time and money than the agent above has left for it."""
    own = profile.execution
    limits: dict[str, Any] = {"timeout": min(own.timeout, spawn.time_left_ms)}
    if spawn.ends_at is not None:
        left_ms = max(spawn.ends_at - now_ms, 1)
        limits["max_wall_time"] = min(own.max_wall_time or left_ms, left_ms)
    if spawn.max_cost_usd is not None:
        limits["max_cost_usd"] = min(own.max_cost_usd or spawn.max_cost_usd, spawn.max_cost_usd)
    return profile.model_copy(update={"execution": own.model_copy(update=limits)})
