"""The run engine: starts runs, keeps one task for each that is under way, takes people's answers.

A run that waits for a person has no task: it is rows in the log. Whoever answers, from any door,
sets it going again; so does the expiry of the question, and the start of the gateway.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from ownware_gateway.drive import Assignment, Drive, Parts, fallback_of, finish
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    Attachment,
    DecidedBy,
    Fallback,
    PermissionResponse,
    RunCancel,
    UserMessage,
)
from ownware_gateway.log import (
    Append,
    Cancels,
    Decides,
    NewRun,
    Permission,
    Private,
    Refused,
    Run,
    Starts,
    Stream,
)
from ownware_gateway.models import Dispatch, File
from ownware_gateway.profile import Profile, Profiles
from ownware_gateway.run import Finish
from ownware_gateway.transcript import load

TITLE_CHARS_MAX: Final = 80

#: How long a caller should wait before it asks a busy gateway again.
BUSY_RETRY_S: Final = 2.0

#: What `ownware_gateway.models.demo` is called; it may answer a thread that it has begun.
DEMO_PREFIX: Final = "demo:"

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartRun:
    """What somebody asks for: a profile's agent to answer a prompt."""

    profile_id: str
    prompt: str
    model: str | None = None
    thread_id: str | None = None
    files: Sequence[File] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A run that is durable; `fallback` says why another model answers, if one does."""

    run: Run
    fallback: Fallback | None


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to a question; `operation_hash` binds it to what was shown."""

    granted: bool
    always: bool = False
    reason: str = ""
    operation_hash: str | None = None


@dataclass(slots=True)
class _Slot:
    """A run under way: its task, and whether something happened that it has not seen."""

    task: asyncio.Task[None]
    drive: Drive | None = None
    cancel: RunCancel | None = None
    again: bool = False


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
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: Runs that are being cancelled: whoever drives one from now on must know of it, whatever
        #: the log says yet, and their questions are closed with them.
        self._cancelling: dict[str, RunCancel] = {}
        self._stopping = False

    # -- starting

    async def start(self, wanted: StartRun) -> Started:
        """Start a run; return once its first event is durable.

        Raises GatewayError: `not_found` for an unknown profile or thread, `unknown_model`,
        `run_in_progress`, `overloaded`, `shutting_down`.
        """
        await self._check_room()
        profile = self._profiles.get(wanted.profile_id)
        dispatch = await self._dispatch(profile, wanted)
        run_id = self._parts.new_id("run")
        stream = Stream(wanted.thread_id or self._parts.new_id("thread"))
        attachments = [
            Attachment(filename=item.filename, mime_type=item.mime_type, size_bytes=len(item.data))
            for item in wanted.files
        ]
        message = UserMessage(
            run_id=run_id,
            text=wanted.prompt,
            attachments=attachments or None,
            timestamp=self._parts.clock_ms(),
        )
        row = NewRun(
            id=run_id,
            profile_id=profile.name,
            model=dispatch.id,
            timeout_ms=profile.execution.timeout,
            title=" ".join(wanted.prompt.split())[:TITLE_CHARS_MAX],
        )
        private = [
            Private("profile", profile.dump().encode()),
            *(Private("attachment", item.data, index) for index, item in enumerate(wanted.files)),
        ]
        try:
            await self._parts.log.append(Append(stream, Starts(row), [message], private)).wait()
        except Refused as refused:
            assert isinstance(refused.winner, Run)
            raise GatewayError(
                "run_in_progress",
                f"The thread is busy with the run {refused.winner.id}; wait for its end, "
                "answer its question, or cancel it.",
                runId=refused.winner.id,
            ) from None
        run = await self._run(run_id)
        self._go(run, profile, dispatch)
        return Started(run, fallback_of(profile, dispatch))

    async def _check_room(self) -> None:
        if self._stopping:
            raise GatewayError(
                "shutting_down", "The gateway is shutting down; try again.", retry_after_s=2
            )
        if await self._parts.log.healthy() is not None:
            raise GatewayError(
                "overloaded", "The log cannot be written now; see /ready.", retry_after_s=5
            )
        if len(self._slots) >= self._limits.runs_active_max:
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
        thread = None
        if wanted.thread_id is not None:
            thread = await self._parts.log.thread(wanted.thread_id)
            if thread is None:
                raise GatewayError("not_found", f"There is no thread {wanted.thread_id!r}.")
        if wanted.model is not None:
            return self._parts.catalogue.resolve(wanted.model)
        try:
            return self._parts.catalogue.resolve(profile.model)
        except GatewayError:
            begun = thread is not None and thread.model is not None
            demo_began = begun and thread is not None and str(thread.model).startswith(DEMO_PREFIX)
            if not self._limits.stand_in or (begun and not demo_began):
                raise
            return await self._parts.catalogue.stand_in(profile.model)

    # -- driving

    def _go(
        self,
        run: Run,
        profile: Profile | None = None,
        dispatch: Dispatch | None = None,
        *,
        restarted: bool = False,
    ) -> None:
        """Make sure that a task drives the run, and sees everything that is in the log now."""
        slot = self._slots.get(run.id)
        if slot is not None:
            slot.again = True
            return
        if self._stopping:
            return
        work = self._drive(run, profile, dispatch, restarted=restarted)
        task = asyncio.get_running_loop().create_task(work)
        self._slots[run.id] = _Slot(task, cancel=self._cancelling.get(run.id))

    async def _drive(
        self, run: Run, profile: Profile | None, dispatch: Dispatch | None, *, restarted: bool
    ) -> None:
        slot: _Slot | None = None
        try:
            while slot is None or slot.again:
                slot = self._slots[run.id]
                slot.again = False
                await self._drive_once(slot, run, (profile, dispatch), restarted=restarted)
                run = await self._run(run.id)
                restarted = False
        except Refused:
            _log.info("run %s has ended, or is driven by another gateway now", run.id)
        except Exception:  # noqa: BLE001 - a task of the engine must not die unheard
            _log.exception("run %s stopped inside the gateway", run.id)
        finally:
            del self._slots[run.id]
        if run.terminal:
            self._cancelling.pop(run.id, None)
        else:
            await self._watch_expiry(run)

    async def _drive_once(
        self,
        slot: _Slot,
        run: Run,
        known: tuple[Profile | None, Dispatch | None],
        *,
        restarted: bool,
    ) -> None:
        try:
            profile = known[0] or await self._profile(run)
            history = await load(self._parts.log, run.stream)
            dispatch = known[1] or self._parts.catalogue.resolve(run.model)
            slot.drive = Drive(self._parts, Assignment(run, profile, dispatch, history, restarted))
            if slot.cancel is not None:
                slot.drive.cancel(slot.cancel)
            await slot.drive.go()
        except Refused:
            raise
        except GatewayError as error:
            await self._fail(slot, run, error.code, error.message)
        except Exception:  # noqa: BLE001 - whatever went wrong, the run must end and say so
            _log.exception("run %s failed inside the gateway", run.id)
            message = "Something went wrong inside the gateway; its log says what."
            await self._fail(slot, run, "internal", message)
        finally:
            slot.drive = None

    async def _fail(self, slot: _Slot, run: Run, code: str, message: str) -> None:
        facts = (await load(self._parts.log, run.stream))[-1]
        if slot.cancel is not None:
            facts.apply(slot.cancel)
        await finish(self._parts, run, facts, Finish("failed", "error", code, message))

    async def _profile(self, run: Run) -> Profile:
        """Return the version of the profile that the run started with."""
        facts = await self._parts.log.private(run.stream, "profile", after=run.start_seq)
        _, _, body = facts[0]
        return Profile.restore(body.decode())

    async def _run(self, run_id: str) -> Run:
        run = await self._parts.log.run(run_id)
        assert run is not None, run_id
        return run

    # -- people's answers

    async def decide(
        self, thread_id: str, request_id: str | None, decision: Decision
    ) -> Permission:
        """Answer a question; return it as it was asked. The first answer wins.

        Raises GatewayError: `not_found` (the thread), `nothing_pending`,
        `permission_request_not_found`, `permission_already_decided` with the winning decision,
        `permission_operation_mismatch`.
        """
        asked = await self._question(thread_id, request_id)
        if decision.operation_hash not in (None, asked.operation_hash):
            raise GatewayError(
                "permission_operation_mismatch",
                "The decision is about another operation than the one that is asked for.",
                operationHash=asked.operation_hash,
            )
        verb = "allowed" if decision.granted else "denied"
        reason = decision.reason or f"a person {verb} it"
        await self._answer(asked, decision, "user", reason)
        return asked

    async def _question(self, thread_id: str, request_id: str | None) -> Permission:
        if request_id is not None:
            found = await self._parts.log.permission(request_id)
            if found is None or found.thread_id != thread_id:
                raise GatewayError(
                    "permission_request_not_found", f"There is no question {request_id!r} here."
                )
            return found
        if await self._parts.log.thread(thread_id) is None:
            raise GatewayError("not_found", f"There is no thread {thread_id!r}.")
        run = await self._parts.log.active_run(Stream(thread_id))
        pending = await self._parts.log.pending(run_id=run.id) if run is not None else []
        if not pending:
            raise GatewayError("nothing_pending", "The thread has no question to answer now.")
        return pending[0]

    async def _answer(
        self, asked: Permission, decision: Decision, by: DecidedBy, reason: str
    ) -> None:
        response = PermissionResponse(
            request_id=asked.request_id,
            granted=decision.granted,
            decided_by=by,
            reason=reason,
            always=decision.always,
            turn_index=asked.turn_index,
        )
        guard = Decides(asked.request_id, late=by == "timeout")
        stream = Stream(asked.thread_id, asked.agent_id)
        run = await self._run(asked.run_id)
        if run.id in self._cancelling or run.cancel_requested_at is not None:
            # Whoever closes the run may have read the log already, and answers the question too.
            winner = await self._parts.log.permission(asked.request_id)
            assert winner is not None
            if winner.granted is None:
                winner = replace(winner, granted=False, decided_by="cancel")
            raise _already_decided(winner)
        try:
            await self._parts.log.append(Append(stream, guard, [response])).wait()
        except Refused as refused:
            assert isinstance(refused.winner, Permission)
            raise _already_decided(refused.winner) from None
        if expiry := self._expiries.pop(asked.request_id, None):
            expiry.cancel()
        self._go(await self._run(asked.run_id))

    async def _watch_expiry(self, run: Run) -> None:
        """Have the run's question answered with no, once its time is over."""
        for asked in await self._parts.log.pending(run_id=run.id):
            if asked.request_id not in self._expiries and not self._stopping:
                left_s = max(0.0, (asked.expires_at - self._parts.clock_ms()) / 1000)
                self._expiries[asked.request_id] = asyncio.get_running_loop().call_later(
                    left_s, self._expire_soon, asked
                )

    async def _expire(self, asked: Permission) -> None:
        self._expiries.pop(asked.request_id, None)
        # Rounded, because the request was stamped a moment after its expiry was set.
        waited_s = round((asked.expires_at - asked.requested_at) / 1000, 1)
        reason = f"nobody answered within {waited_s:g} s"
        try:
            await self._answer(asked, Decision(granted=False), "timeout", reason)
        except GatewayError:
            # Decided in the last moment, or the clock was set back: then it is asked for longer.
            await self._watch_expiry(await self._run(asked.run_id))

    def _expire_soon(self, asked: Permission) -> None:
        task = asyncio.get_running_loop().create_task(self._expire(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- stopping

    async def cancel(
        self, run_id: str, requested_by: str
    ) -> tuple[Run, Literal["requested", "already_requested", "already_terminal"]]:
        """Ask a run to stop; return it and what the request did. Raises GatewayError."""
        if await self._parts.log.run(run_id) is None:
            raise GatewayError("run_not_found", f"There is no run {run_id!r}.")
        event = RunCancel(run_id=run_id, requested_by=requested_by)
        run = await self._run(run_id)
        self._cancelling[run_id] = event
        commit = self._parts.log.append(Append(run.stream, Cancels(run_id), [event]))
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
            if not run.terminal:
                return run, "already_requested"
            self._cancelling.pop(run_id, None)
            return run, "already_terminal"
        run = await self._run(run_id)
        if not run.terminal:
            for asked in await self._parts.log.pending(run_id=run_id):
                if expiry := self._expiries.pop(asked.request_id, None):
                    expiry.cancel()
            self._go(run)
        return run, "requested"

    async def recover(self) -> int:
        """Pick up every run that has not ended; return how many there were."""
        runs = await self._parts.log.unfinished()
        for unfinished in runs:
            run = await self._parts.log.take_over(unfinished.id)
            if run.status == "waiting":
                await self._watch_expiry(run)
            else:
                self._go(run, restarted=True)
        return len(runs)

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
        for expiry in self._expiries.values():
            expiry.cancel()
        self._expiries.clear()
        for slot in self._slots.values():
            if slot.drive is not None:
                slot.drive.leave()
        tasks = {slot.task for slot in self._slots.values()} | self._tasks
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)


def _already_decided(winner: Permission) -> GatewayError:
    if winner.granted is None:
        return GatewayError(
            "permission_already_decided",
            "The question has expired; the answer is no.",
            requestId=winner.request_id,
            granted=False,
            decidedBy="timeout",
        )
    verb = "allowed" if winner.granted else "denied"
    return GatewayError(
        "permission_already_decided",
        f"The question was answered already: {verb} by {winner.decided_by}.",
        requestId=winner.request_id,
        granted=winner.granted,
        decidedBy=winner.decided_by,
    )
