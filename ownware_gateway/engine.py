"""The run engine: starts runs, keeps one task for each that is under way, takes people's answers.

A run that waits for a person has no task: it is rows in the log. Whoever answers, from any door,
sets it going again; so does the expiry of the question, and the start of the gateway.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from ownware_gateway.approvals import Approvals, Decision
from ownware_gateway.budgets import Budgets
from ownware_gateway.calls import Above, Assignment, Parts
from ownware_gateway.drive import Drive, fallback_of, finish, session_start
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    AgentSpawn,
    Event,
    Fallback,
    RunCancel,
    ToolResult,
    UserMessage,
)
from ownware_gateway.history import Teller, attachments_of, begun, told
from ownware_gateway.log import (
    Append,
    Cancels,
    Drives,
    IdempotencyKey,
    KeptStart,
    Log,
    NewRun,
    Opening,
    Permission,
    Private,
    Refused,
    Run,
    Starts,
    Stream,
    Thread,
    Tombstone,
)
from ownware_gateway.models import (
    AS_THE_PROFILE_SAYS,
    Dispatch,
    File,
    Message,
    Options,
    Request,
    UserTurn,
)
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.recent import Recent
from ownware_gateway.run import Finish
from ownware_gateway.transcript import RunFacts, load

TITLE_CHARS_MAX: Final = 80

#: How long a caller should wait before it asks a busy gateway again.
BUSY_RETRY_S: Final = 2.0

#: After so many deaths of the process runs go on one at a time, and a run ends that had as many.
DEATHS_CAREFUL: Final = 2
DEATHS_MAX: Final = 3

#: A run that stopped because the log could not be used is looked at again after so long.
AGAIN_S: Final = 5.0

#: How long the deletion of a thread waits for its run to end.
DELETE_S: Final = 10.0

#: How long the last word to the log may take.
REST_S: Final = 0.5

#: Who has an agent's run stop when the run that it works for ends.
PARENT: Final = "parent"

#: What `ownware_gateway.models.demo` is called; it may answer a thread that it has begun.
DEMO_PREFIX: Final = "demo:"

_log: Final = logging.getLogger(__name__)


class StartRun(NamedTuple):
    """What somebody asks for: a profile's agent to answer a prompt.

    `skills` of the profile are in the system prompt from the start, by their names.
    `options` go over what the profile says. With a `history`, which a client brings along, the
    thread must not exist yet; so it must not when it `begins` under a name that the caller chose.
    `answered` are turns of the model's, with the results of all their calls, that the run goes on
    from; the thread must not exist then either.
    """

    profile_id: str
    prompt: str
    model: str | None = None
    thread_id: str | None = None
    files: Sequence[File] = ()
    key: IdempotencyKey | None = None
    skills: Sequence[str] = ()
    options: Options = AS_THE_PROFILE_SAYS
    history: Sequence[Message] = ()
    answered: Sequence[Message] = ()
    begins: bool = False
    hidden: bool = False

    @property
    def opens(self) -> bool:
        """Whether the thread is made by this start and no other."""
        return self.begins or self.hidden or bool(self.history or self.answered)


class Begun(Exception):
    """The thread that was to begin exists: somebody else has begun it just now."""


class Started(NamedTuple):
    """A run that is durable; `fallback` says why another model answers, if one does.

    `replayed` means that the same request had started it before.
    """

    run: Run
    fallback: Fallback | None
    replayed: bool = False


@dataclass(slots=True)
class _Slot:
    """A run under way: its task, and whether something happened that it has not seen."""

    task: asyncio.Task[None]
    drive: Drive | None = None
    cancel: RunCancel | None = None
    again: bool = False
    history: list[RunFacts] = field(default_factory=list)


class _Fresh(NamedTuple):
    """A run that begins: what it is driven with need not be read from the log."""

    run: Run
    profile: Profile
    dispatch: Dispatch
    facts: RunFacts
    options: Options


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the operator allows: runs at once, and whether another model may stand in."""

    runs_active_max: int
    stand_in: bool = field(kw_only=True)


class Engine:
    """Drives the runs of one gateway."""

    def __init__(self, parts: Parts, profiles: Profiles, limits: EngineLimits) -> None:
        self._parts = parts
        self._profiles = profiles
        self._limits = limits
        self._slots: dict[str, _Slot] = {}
        #: Cancellations on their way into the log; a drive that begins now may not read them there.
        self._cancelling: dict[str, RunCancel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._stopping = False
        self._recent = Recent(parts.log)
        self.budgets = Budgets(parts.log, parts.clock_ms)
        self.approvals = Approvals(parts.log, parts.clock_ms, parts.masker, self._go)

    # -- starting

    async def start(self, wanted: StartRun) -> Started:
        """Start a run; return once its first event is durable.

        Raises GatewayError: `not_found` for an unknown profile, skill or thread, `unknown_model`,
        `run_in_progress`, `budget_exceeded`, `overloaded`, `shutting_down`, `invalid_request` for
        options that the model cannot honour; and Begun.
        """
        if wanted.key is not None:
            # Before anything else: the answer to a request that was taken does not change.
            kept = await self._parts.log.kept_start(wanted.key)
            if kept is not None:
                return _replay(wanted.key, kept)
        await self._check_room()
        self._starting += 1
        try:
            return await self._start(wanted)
        finally:
            self._starting -= 1

    async def _start(self, wanted: StartRun) -> Started:
        profile = self._profiles.get(wanted.profile_id, wanted.skills)
        dispatch = await self._dispatch(profile, wanted)
        wanted = self._fitting(profile, dispatch, wanted)
        await self.budgets.admit(profile)
        run_id = self._parts.new_id("run")
        stream = Stream(wanted.thread_id or self._parts.new_id("thread"))
        message = UserMessage(
            run_id=run_id,
            text=wanted.prompt,
            attachments=attachments_of(wanted.files),
            timestamp=self._parts.clock_ms(),
        )
        row = NewRun(
            id=run_id,
            profile_id=profile.name,
            model=dispatch.id,
            timeout_ms=profile.execution.timeout,
            title=" ".join(wanted.prompt.split())[:TITLE_CHARS_MAX],
        )
        fallback = fallback_of(profile, dispatch)
        events, private = self._told(wanted, profile, dispatch, message)
        opening = Opening(events.index(message), wanted.hidden) if wanted.opens else None
        goes_on = wanted.thread_id is not None and opening is None
        guard = Starts(row, wanted.key, fallback, goes_on, opening)
        try:
            run = await self._parts.log.begin(Append(stream, guard, events, private))
        except Refused as refused:
            match refused.winner:
                case KeptStart() as kept if wanted.key is not None:
                    return _replay(wanted.key, kept)
                case Tombstone():
                    raise deleted(stream.thread_id) from None
                case Run(id=active):
                    raise GatewayError(
                        "run_in_progress",
                        f"The thread is busy with the run {active}; wait for its end, answer its "
                        "question, or cancel it.",
                        runId=active,
                    ) from None
                case _ if opening is not None:
                    raise Begun from None
                case _:
                    raise _no_thread(stream.thread_id) from None
        facts = RunFacts(message, run.start_seq + 1, files=wanted.files)
        fresh = _Fresh(run, profile, dispatch, facts, wanted.options)
        self._go(run_id, None if wanted.answered else fresh)
        return Started(run, fallback)

    def _told(
        self, wanted: StartRun, profile: Profile, dispatch: Dispatch, message: UserMessage
    ) -> tuple[list[Event], list[Private]]:
        """Return the events that a run starts with, and what is kept beside them."""
        now, parts = message.timestamp, self._parts
        teller = Teller(profile.name, dispatch.id, now, parts.new_id, parts.masker)
        events, private = told(wanted.history, teller)
        first = len(events)
        private.append(Private("profile", profile.dump().encode(), 0, first))
        if wanted.options != AS_THE_PROFILE_SAYS:
            private.append(Private("options", wanted.options.dump(), 0, first))
        private += [
            Private("attachment", item.data, index, first)
            for index, item in enumerate(wanted.files)
        ]
        events.append(message)
        if wanted.answered:
            events.append(session_start(message.run_id, profile, dispatch, now))
            turns, exact = begun(wanted.answered, teller, len(events))
            events, private = events + turns, private + exact
        return events, private

    async def hand_in(
        self, asked: Permission, results: Sequence[ToolResult], options: Options
    ) -> None:
        """Give calls that wait for a client their results, and the run its options from then on.

        Raises GatewayError: what `Approvals.decide` raises, `invalid_request` for options.
        """
        run = await self._run(asked.run_id)
        profile = self._profiles.get(run.profile_id)
        wanted = StartRun(profile.name, "", options=options)
        wanted = self._fitting(profile, self._parts.catalogue.resolve(run.model), wanted)
        decision = Decision(granted=True, results=results, options=wanted.options.dump())
        await self.approvals.decide(asked.thread_id, asked.request_id, decision)

    def _fitting(self, profile: Profile, dispatch: Dispatch, wanted: StartRun) -> StartRun:
        """Return what is wanted as it can be; raises GatewayError for what cannot."""
        if wanted.options.client_tools:
            from ownware_gateway.client_tools import told_apart

            parts = self._parts
            options = told_apart(wanted.options, profile, parts.tools, parts.sources)
            wanted = wanted._replace(options=options)
        _check_able(dispatch, profile, wanted)
        return wanted

    async def _check_room(self) -> None:
        if self._stopping:
            raise GatewayError(
                "shutting_down", "The gateway is shutting down; try again.", retry_after_s=2
            )
        if await self._parts.log.healthy() is not None:
            raise GatewayError(
                "overloaded", "The log cannot be written now; see /ready.", retry_after_s=5
            )
        if len(self._slots) + self._starting >= self._limits.runs_active_max:
            raise GatewayError(
                "overloaded",
                f"{len(self._slots)} runs are under way, as many as are allowed; try again.",
                retry_after_s=BUSY_RETRY_S,
            )

    async def _dispatch(self, profile: Profile, wanted: StartRun) -> Dispatch:
        """Return the model that answers.

        One that the request names is never replaced. The profile's own may be, when its provider
        has no key: on a thread that begins, or that the built-in model has answered so far.
        """
        if wanted.model is not None:
            return self._parts.catalogue.resolve(wanted.model)
        try:
            return self._parts.catalogue.resolve(profile.model)
        except GatewayError:
            thread = await self._thread(None if wanted.opens else wanted.thread_id)
            begun = thread is not None and thread.model is not None
            demo_began = begun and thread is not None and str(thread.model).startswith(DEMO_PREFIX)
            if not self._limits.stand_in or (begun and not demo_began):
                raise
            return await self._parts.catalogue.stand_in(profile.model)

    async def _thread(self, thread_id: str | None) -> Thread | None:
        """Return the thread that a run is to go on in; None for a new one. Raises GatewayError."""
        if thread_id is None:
            return None
        thread = await self._parts.log.thread(thread_id)
        if thread is None:
            if await self._parts.log.tombstone(thread_id) is not None:
                raise deleted(thread_id)
            raise _no_thread(thread_id)
        return thread

    # -- driving

    def _go(
        self,
        run_id: str,
        fresh: "_Fresh | None" = None,
        *,
        restarted: bool = False,
    ) -> None:
        """Make sure that a task drives the run, and sees everything that is in the log now."""
        slot = self._slots.get(run_id)
        if slot is not None:
            slot.again = True
            return
        if self._stopping:
            return
        work = self._drive(run_id, fresh, restarted=restarted)
        task = asyncio.get_running_loop().create_task(work)
        self._slots[run_id] = _Slot(task, cancel=self._cancelling.get(run_id))

    async def _drive(self, run_id: str, fresh: "_Fresh | None", *, restarted: bool) -> None:
        slot = self._slots[run_id]
        run: Run | None = None
        try:
            while run is None or slot.again:
                slot.again = False
                run = fresh.run if fresh is not None else await self._parts.log.run(run_id)
                if run is None:
                    return  # Its thread has been deleted.
                if run.terminal:
                    break
                await self._drive_once(slot, run, fresh, restarted=restarted)
                fresh, restarted = None, False
            run = await self._parts.log.run(run_id)
            if run is None:
                return
            self._keep(run, slot.history)
            if run.terminal:
                self.approvals.forget(run_id)
                if run.parent_run_id is not None:
                    self._go(run.parent_run_id)
                    await self.approvals.next_in_line(run.thread_id, besides=run_id)
            else:
                await self.approvals.watch(run_id)
                await self._watch_clock(run)
        except Refused:
            _log.info("run %s has ended, or is driven by another gateway now", run_id)
        except Exception:  # noqa: BLE001 - a task of the engine must not die unheard
            _log.exception("run %s stopped inside the gateway", run_id)
            # Not even its end could be written or read; it goes on when that is over.
            asyncio.get_running_loop().call_later(AGAIN_S, self._go, run_id)
        finally:
            del self._slots[run_id]
            if slot.again:
                self._go(run_id)

    async def _watch_clock(self, run: Run) -> None:
        """Have a run end in time that stands in line behind another agent's question.

        One that asks has a question that expires then, and one whose agents are under way is told.
        """
        if run.rests_on != "line":
            return
        wall_ms = (await self._stored_profile(run)).execution.max_wall_time
        if wall_ms is not None:
            self.approvals.watch_clock(run.id, run.accepted_at + wall_ms)

    def _keep(self, run: Run, history: list[RunFacts]) -> None:
        """Keep the conversation of a run that has ended well, for the next one in it.

        An agent's stream has no next one, and what agents below were allowed is not in what was
        driven here.
        """
        own = run.parent_run_id is None and history and not history[-1].has_agents
        if own and run.status == "succeeded" and run.end_seq is not None:
            self._recent.keep(run.stream, run.end_seq, history)

    async def _drive_once(
        self,
        slot: _Slot,
        run: Run,
        fresh: "_Fresh | None",
        *,
        restarted: bool,
    ) -> None:
        try:
            if fresh is not None:
                profile = profile_now = fresh.profile
                dispatch, facts, options = fresh.dispatch, fresh.facts, fresh.options
            else:
                profile, profile_now, dispatch = await self._means(run)
                options = await options_of(self._parts.log, run)
                (facts,) = await load(self._parts.log, run.stream, after=run.start_seq)
            history = [*await self._recent.before(run.stream, run.start_seq), facts]
            slot.history = history
            assignment = Assignment(
                run=run,
                profile=profile,
                profile_now=profile_now,
                dispatch=dispatch,
                history=history,
                family=self,
                restarted=restarted,
                options=options,
                above=await self._above(run),
                budgets=self.budgets,
            )
            slot.drive = Drive(self._parts, assignment)
            if slot.cancel is not None:
                slot.drive.cancel(slot.cancel)
            await slot.drive.go()
        except Refused:
            raise
        except _CannotGoOn as why:
            await self._fail(slot, run, why.code, why.message)
        except Exception:  # noqa: BLE001 - whatever went wrong, the run must end and say so
            _log.exception("run %s failed inside the gateway", run.id)
            message = "Something went wrong inside the gateway; its log says what."
            await self._fail(slot, run, "internal", message)
        finally:
            slot.drive = None

    async def _fail(self, slot: _Slot, run: Run, code: str, message: str) -> None:
        (facts,) = await load(self._parts.log, run.stream, after=run.start_seq)
        if slot.cancel is not None:
            facts.apply(slot.cancel)
        if facts.open_agents and not await self._end_agents(slot, run, facts):
            return  # It is set going again when they have ended.
        await finish(self._parts, run, facts, Finish("failed", "error", code, message))

    async def _means(self, run: Run) -> tuple[Profile, Profile, Dispatch]:
        """Return what the run goes on with: its profile, the profile as it is now, its model.

        Raises _CannotGoOn when one of them is missing, or when going on would do harm.
        """
        if run.code == "restored":
            message = "The log was restored from an older copy while this run was unfinished."
            raise _CannotGoOn("restored", message)
        if run.deaths >= DEATHS_MAX:
            message = f"The gateway died {run.deaths} times while it drove this run."
            raise _CannotGoOn("crash_loop", message)
        profile = await self._stored_profile(run)
        try:
            profile_now = self._profiles.get(run.profile_id)
        except GatewayError as error:
            if not self._profiles.is_broken(run.profile_id):
                message = f"The run cannot go on. {error.message}"
                raise _CannotGoOn("profile_gone", message) from error
            # Somebody is at it: until it can be read again, what the run started with holds.
            profile_now = profile
        try:
            return profile, profile_now, self._parts.catalogue.resolve(run.model)
        except GatewayError as error:
            message = f"The run cannot go on. {error.message}"
            raise _CannotGoOn(error.code, message) from error

    async def _stored_profile(self, run: Run) -> Profile:
        stored = await self._parts.log.private(run.stream, "profile", after=run.start_seq)
        return Profile.restore(stored[0][2].decode())

    # -- agents that work for a run; see `ownware_gateway.calls.Family`

    def profile(self, profile_id: str) -> Profile:
        """Return a profile as it is now. Raises GatewayError `not_found`."""
        return self._profiles.get(profile_id)

    async def begin(self, parent: Run, spawn: AgentSpawn, task: str) -> None:
        """Begin an agent's run, unless it has begun. Raises GatewayError when it cannot."""
        from ownware_gateway.agents import narrowed

        own = self._profiles.get(spawn.profile_name)
        profile = narrowed(own, spawn, self._parts.clock_ms())
        dispatch = await self._agent_dispatch(profile, parent)
        message = UserMessage(run_id=spawn.run_id, text=task, timestamp=self._parts.clock_ms())
        row = NewRun(
            id=spawn.run_id,
            profile_id=profile.name,
            model=dispatch.id,
            timeout_ms=profile.execution.timeout,
            title="",
            parent_run_id=parent.id,
            name=spawn.name,
        )
        stream = Stream(parent.thread_id, spawn.agent_id)
        private = [Private("profile", profile.dump().encode())]
        try:
            run = await self._parts.log.begin(
                Append(stream, Starts(row, goes_on=True), [message], private)
            )
        except Refused:
            # It has begun before, or its own run ends: either way its row says what is next.
            self._go(spawn.run_id)
            return
        facts = RunFacts(message, run.start_seq + 1)
        self._go(run.id, _Fresh(run, profile, dispatch, facts, AS_THE_PROFILE_SAYS))

    async def _agent_dispatch(self, profile: Profile, parent: Run) -> Dispatch:
        """Return the model that answers; the built-in one stands in only below itself."""
        try:
            return self._parts.catalogue.resolve(profile.model)
        except GatewayError:
            if not self._limits.stand_in or not parent.model.startswith(DEMO_PREFIX):
                raise
            return await self._parts.catalogue.stand_in(profile.model)

    async def recall(self, run_id: str) -> None:
        """Have an agent's run stop: the run that it works for ends."""
        await self.cancel(run_id, PARENT)

    async def _end_agents(self, slot: _Slot, run: Run, facts: RunFacts) -> bool:
        """Have a run's agents stop; return whether they all have ended. If not, it rests."""
        from ownware_gateway.agents import end_all

        if await end_all(self._parts, run, facts, self.recall):
            return True
        left = [
            await self._parts.log.run(call.agent.run_id) for call in facts.open_agents if call.agent
        ]
        rests = await self._parts.log.park(
            Drives(run.id, run.generation),
            "agents",
            agents=sum(child is not None and not child.terminal for child in left),
            cancelled=facts.cancel is not None,
        )
        slot.again |= not rests
        return False

    async def _above(self, run: Run) -> list[Above]:
        """Return the runs that one works for, the nearest first."""
        above: list[Above] = []
        while run.parent_run_id is not None:
            run = await self._run(run.parent_run_id)
            profile = profile_now = await self._stored_profile(run)
            with contextlib.suppress(GatewayError):
                # Without its files that run ends itself.
                profile_now = self._profiles.get(run.profile_id)
            above.append(Above(run, profile, profile_now))
        return above

    async def _run(self, run_id: str) -> Run:
        run = await self._parts.log.run(run_id)
        if run is None:
            raise GatewayError("run_not_found", f"There is no run {run_id!r}.")
        return run

    # -- stopping

    async def cancel(
        self, run_id: str, requested_by: str
    ) -> tuple[Run, Literal["requested", "already_requested", "already_terminal"]]:
        """Ask a run to stop; return it and what the request did. Raises GatewayError."""
        event = RunCancel(run_id=run_id, requested_by=requested_by)
        run = await self._run(run_id)
        commit = self._parts.log.append(Append(run.stream, Cancels(run_id), [event]))
        self._cancelling[run_id] = event
        if (slot := self._slots.get(run_id)) is not None:
            # At once and not after the commit: what the drive appends from here on stands behind
            # the cancellation in the log, and must know of it.
            slot.cancel = event
            if slot.drive is not None:
                slot.drive.cancel(event)
        try:
            await commit.wait()
        except Refused:
            run = await self._run(run_id)
            return run, "already_terminal" if run.terminal else "already_requested"
        else:
            self._go(run_id)
        finally:
            self._cancelling.pop(run_id, None)
        return await self._run(run_id), "requested"

    async def delete_thread(self, thread_id: str, by: str) -> list[str]:
        """Delete a thread, its active run first; return the threads that were forked from it.

        Raises GatewayError `run_in_progress` when the run does not end in time.
        """
        give_up_s = asyncio.get_running_loop().time() + DELETE_S
        while True:
            try:
                forks = await self._parts.log.delete(thread_id, by)
                # Afterwards: a run that ended meanwhile may have kept its conversation.
                self._recent.forget(thread_id)
                return forks
            except Refused as refused:
                if not isinstance(refused.winner, Run):
                    raise deleted(thread_id) from None
                active = refused.winner
            left_s = give_up_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise GatewayError(
                    "run_in_progress",
                    "The thread's run was cancelled and has not ended yet; try again.",
                )
            with contextlib.suppress(GatewayError):  # Deleted meanwhile.
                await self.cancel(active.id, by)
            slot = self._slots.get(active.id)
            await asyncio.wait({slot.task}, timeout=left_s) if slot else await asyncio.sleep(0.05)

    # -- after a restart

    async def recover(self) -> int:
        """Pick up every run that has not ended; return how many there were.

        After two deaths of one run they all go on one at a time: the one that kills the process is
        then the only one that is charged, and its neighbours get to their ends.
        """
        await self._parts.log.charge()
        unfinished = await self._parts.log.unfinished()
        under_way = [run for run in unfinished if run.rests_on is None or run.code is not None]
        await self.approvals.watch_all()
        for run in unfinished:
            await self._watch_clock(run)
        if any(run.deaths >= DEATHS_CAREFUL for run in under_way):
            task = asyncio.get_running_loop().create_task(self._one_at_a_time(under_way))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            for run in under_way:
                await self._parts.log.take_over(run.id)
                self._go(run.id, restarted=True)
        return len(unfinished)

    async def _one_at_a_time(self, runs: Sequence[Run]) -> None:
        for waiting in sorted(runs, key=lambda run: run.deaths):
            run = await self._parts.log.run(waiting.id)
            if run is None or run.terminal or run.id in self._slots or self._stopping:
                continue
            await self._parts.log.take_over(run.id)
            self._go(run.id, restarted=True)
            if (slot := self._slots.get(run.id)) is not None:
                await asyncio.wait({slot.task})

    def forget_conversations(self) -> None:
        """Read every conversation from the log again: some of it was removed there."""
        self._recent.clear()

    def refuse(self) -> None:
        """Take no more work: the gateway is leaving."""
        self._stopping = True

    async def missing(self) -> list[str]:
        """Return what keeps new runs from being taken, in sentences; empty when nothing does."""
        missing = ["The gateway is shutting down."] if self._stopping else []
        failure = await self._parts.log.healthy()
        return [*missing, failure] if failure is not None else missing

    async def stop(self, grace_s: float) -> None:
        """Take nothing more; give the steps under way some time, then leave them to the next start.

        What is not finished is in the log, and goes on from there.
        """
        self.refuse()
        self._tasks |= self.approvals.stop()
        for slot in self._slots.values():
            if slot.drive is not None:
                slot.drive.leave()
        tasks = {slot.task for slot in self._slots.values()} | self._tasks
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        # A log that cannot be written must not keep the gateway from leaving.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REST_S):
                await self._parts.log.rest()


async def options_of(log: Log, run: Run, *, to: int | None = None) -> Options:
    """Return what is asked of a run: when it was started, or with the last results, up to a seq."""
    asked = await _kept_options(log, run)
    known = [body for seq, body in asked if to is None or seq <= to]
    return Options.restore(known[-1]) if known else AS_THE_PROFILE_SAYS


async def all_options(log: Log, run: Run) -> list[tuple[int, Options]]:
    """Return all that was asked of a run, each with the number of the event that came with it."""
    return [(seq, Options.restore(body)) for seq, body in await _kept_options(log, run)]


async def _kept_options(log: Log, run: Run) -> list[tuple[int, bytes]]:
    # What is behind its end belongs to later runs.
    return [
        (seq, body)
        for seq, _, body in await log.private(run.stream, "options", after=run.start_seq)
        if run.end_seq is None or seq <= run.end_seq
    ]


def _check_able(dispatch: Dispatch, profile: Profile, wanted: StartRun) -> None:
    """Raise GatewayError for what was asked for and the model will not do."""
    said = [*wanted.history, UserTurn(wanted.prompt, wanted.files), *wanted.answered]
    request = wanted.options.apply(Request(dispatch.name, said, thinking=profile.thinking))
    if wanted.options == AS_THE_PROFILE_SAYS and not wanted.history:
        return  # The native door's files are shown as far as they can be.
    if unable := dispatch.model.unable(request):
        names = " and ".join(repr(name) for name in unable)
        raise GatewayError(
            "invalid_request",
            f"The model {dispatch.id} cannot honour {names}; leave that out, or choose another "
            "model.",
            param=unable[0],
        )


def deleted(thread_id: str) -> GatewayError:
    """Return the error for a thread that was deleted; its name is never used again."""
    return GatewayError("thread_deleted", f"The thread {thread_id!r} has been deleted.")


def _no_thread(thread_id: str) -> GatewayError:
    return GatewayError("not_found", f"There is no thread {thread_id!r}.")


class _CannotGoOn(Exception):
    """The run must end; why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def _replay(key: IdempotencyKey, kept: KeptStart) -> Started:
    """Return the answer to a request that was sent before."""
    if kept.fingerprint != key.fingerprint:
        raise GatewayError(
            "idempotency_conflict",
            "This Idempotency-Key was used for another request; take a new one.",
            runId=kept.run_id,
        )
    if kept.run is None:
        raise GatewayError(
            "thread_deleted", f"The thread of the run {kept.run_id} has been deleted."
        )
    return Started(kept.run, kept.fallback, replayed=True)
