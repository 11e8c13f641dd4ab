"""People's answers: a question is decided once, by whoever answers first, or by the clock.

A question is a row in the log, so it outlives every process; deciding it is an append whose guard
lets one through. Here a question is when it expires, a number; one timer waits for the next.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    Answers,
    ClientResult,
    DecidedBy,
    PermissionResponse,
    QuestionResponse,
    ToolResult,
)
from ownware_gateway.log import Append, Decides, Log, Permission, Private, Refused, Stream
from ownware_gateway.masking import Masker

#: The timer is set for no longer than this, and set again: it does not count the time that the
#: machine is suspended, which the clock does.
LOOK_S_MAX: Final = 60.0

#: Nor for less than this: of many questions that expire one after the other each look finds some.
LOOK_S_MIN: Final = 0.02

#: Questions that are answered together when their time is over.
EXPIRE_TOGETHER_MAX: Final = 100

_log: Final = logging.getLogger(__name__)


class Decision(NamedTuple):
    """A person's answer; `operation_hash` binds it to what was shown.

    `answer` is for a question that wants words; where the person declines it, as for a permission
    that is denied, `granted` is False and there are none. `results` are for calls that wait for a
    client, one for each of them, with the `options` that hold for the run from then on, if others.
    """

    granted: bool
    always: bool = False
    reason: str = ""
    operation_hash: str | None = None
    answer: str | None = None
    results: Sequence[ToolResult] | None = None
    options: bytes | None = None


class Approvals:
    """The questions of all runs. `go` is told of a run whose question has its answer.

    Also of one that must be over before it is its turn to ask.
    """

    def __init__(
        self, log: Log, clock_ms: Callable[[], int], masker: Masker, go: Callable[[str], None]
    ) -> None:
        self._log = log
        self._masker = masker
        self._clock_ms = clock_ms
        self._go = go
        #: When each run's question expires, in milliseconds since 1970: a run has one at a time, or
        #: stands in line to ask one and must be over then.
        self._expires_at: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0
        self._expiring: asyncio.Task[None] | None = None
        self._stopping = False

    async def decide(
        self, thread_id: str, request_id: str | None, decision: Decision
    ) -> Permission:
        """Answer a question; return it as it was asked. The first answer wins.

        Without a request id it is the thread's open question. Raises GatewayError: `not_found`
        (the thread), `nothing_pending`, `permission_request_not_found`, `invalid_request` for an
        answer of the other kind, `permission_already_decided` with the winning decision,
        `permission_operation_mismatch`.
        """
        asked = await self._find(thread_id, request_id)
        _check_kind(asked, decision)
        if decision.operation_hash not in (None, asked.operation_hash):
            raise GatewayError(
                "permission_operation_mismatch",
                "The decision is about another operation than the one that is asked for.",
                operationHash=asked.operation_hash,
            )
        await self._answer(asked, decision, "user", decision.reason or _said(asked, decision))
        return asked

    async def _find(self, thread_id: str, request_id: str | None) -> Permission:
        if request_id is not None:
            found = await self._log.permission(request_id)
            if found is None or found.thread_id != thread_id:
                raise _unknown(request_id)
            return found
        if await self._log.thread(thread_id) is None:
            raise GatewayError("not_found", f"There is no thread {thread_id!r}.")
        # Whichever of its agents asks it: one question is open at a time.
        pending = await self._log.pending(thread_id=thread_id)
        if not pending:
            raise GatewayError("nothing_pending", "The thread has no question to answer now.")
        return pending[0]

    async def _answer(
        self, asked: Permission, decision: Decision, by: DecidedBy, reason: str
    ) -> None:
        response = self._response(asked, decision, by, reason)
        options = decision.options
        private = [] if options is None else [Private("options", options)]
        guard = Decides(asked.request_id, late=by == "timeout")
        stream = Stream(asked.thread_id, asked.agent_id)
        try:
            await self._log.append(Append(stream, guard, [response], private)).wait()
        except Refused as refused:
            if not isinstance(refused.winner, Permission):
                raise _unknown(asked.request_id) from None  # Its thread was deleted just now.
            raise await self._already_decided(refused.winner) from None
        self.forget(asked.run_id)
        self._go(asked.run_id)
        await self.next_in_line(asked.thread_id, besides=asked.run_id)

    async def next_in_line(self, thread_id: str, *, besides: str) -> None:
        """Set a thread's other agents going: some may have waited for this one."""
        for run_id in await self._log.ready(thread_id):
            if run_id != besides:
                self._go(run_id)

    def _response(
        self, asked: Permission, decision: Decision, by: DecidedBy, reason: str
    ) -> Answers:
        if asked.kind == "question":
            answer = decision.answer
            return QuestionResponse(
                request_id=asked.request_id,
                # Seen by everybody, and by the model, like what a tool brings.
                answer=None if answer is None else self._masker.text(answer),
                decided_by=by,
                reason=reason,
                turn_index=asked.turn_index,
            )
        if asked.kind == "client":
            given = decision.results
            mask = self._masker.text
            return ClientResult(
                request_id=asked.request_id,
                results=None
                if given is None
                else [r.model_copy(update={"result": mask(r.result)}) for r in given],
                decided_by=by,
                reason=reason,
                turn_index=asked.turn_index,
            )
        return PermissionResponse(
            request_id=asked.request_id,
            granted=decision.granted,
            decided_by=by,
            reason=reason,
            always=decision.always,
            turn_index=asked.turn_index,
        )

    async def watch(self, run_id: str) -> None:
        """Have the run's question answered with no, once its time is over."""
        for asked in await self._log.pending(run_id=run_id):
            self._note(asked)

    async def watch_all(self) -> None:
        """Have every question that there is answered with no, each once its time is over."""
        for asked in await self._log.pending():
            self._note(asked)

    def watch_clock(self, run_id: str, ends_at: int) -> None:
        """Look at a run again at a time, in milliseconds since 1970."""
        self._expires_at[run_id] = ends_at
        if self._timer is None or ends_at < self._rings_at:
            self._set_timer(ends_at)

    def forget(self, run_id: str) -> None:
        """Let go of the run's question: it has its answer, or the run has ended."""
        self._expires_at.pop(run_id, None)

    def _note(self, asked: Permission) -> None:
        self.watch_clock(asked.run_id, asked.expires_at)

    def _set_timer(self, at: int) -> None:
        """Look through the questions when the clock says so; while that is done, afterwards."""
        if self._stopping or self._expiring is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        left_s = min(max((at - self._clock_ms()) / 1000, LOOK_S_MIN), LOOK_S_MAX)
        self._rings_at = at
        self._timer = asyncio.get_running_loop().call_later(left_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._expiring = asyncio.get_running_loop().create_task(self._expire_due())

    async def _expire_due(self) -> None:
        next_at = self._clock_ms() + round(LOOK_S_MAX * 1000)
        try:
            while due := self._due():
                # All of them, whatever becomes of one: who has its answer must be set going.
                ends = await asyncio.gather(*map(self._expire, due), return_exceptions=True)
                for failure in filter(None, ends):
                    raise failure
            next_at = min(self._expires_at.values(), default=next_at)
        except Exception:  # noqa: BLE001 - the questions stay noted and are looked at again
            _log.exception("questions could not be answered in time")
        finally:
            self._expiring = None
        if self._expires_at:
            self._set_timer(next_at)

    def _due(self) -> list[str]:
        now = self._clock_ms()
        over = (run_id for run_id, expires_at in self._expires_at.items() if expires_at <= now)
        return [] if self._stopping else list(itertools.islice(over, EXPIRE_TOGETHER_MAX))

    async def _expire(self, run_id: str) -> None:
        now = self._clock_ms()
        pending = await self._log.pending(run_id=run_id)
        if not pending:
            # It stands in line, or has its answer; whoever drives it sees which.
            self._go(run_id)
        for asked in pending:
            if asked.expires_at > now:
                self._note(asked)
                continue
            waited_s = round((asked.expires_at - asked.requested_at) / 1000, 1)
            reason = f"nobody answered within {waited_s:g} s"
            # It may have been decided in the last moment.
            with contextlib.suppress(GatewayError):
                await self._answer(asked, Decision(granted=False), "timeout", reason)
        # Unless the run has asked another one meanwhile.
        if self._expires_at.get(run_id, now) <= now:
            self.forget(run_id)

    def stop(self) -> set[asyncio.Task[None]]:
        """Watch nothing more; return what is still under way."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        return set() if self._expiring is None else {self._expiring}

    async def _already_decided(self, winner: Permission) -> GatewayError:
        by, granted = winner.decided_by, bool(winner.granted)
        if winner.granted is None:
            # Nobody has written it down yet, but it is settled: expired, or the run ends.
            run = await self._log.run(winner.run_id)
            ends = run is not None and run.cancel_requested_at is not None
            by = "cancel" if ends else "timeout"
        how = "allowed" if granted else "denied"
        if winner.kind != "permission":
            how = "answered" if granted else "closed without an answer"
        return GatewayError(
            "permission_already_decided",
            f"The question was answered already: {how} by {by}.",
            requestId=winner.request_id,
            granted=granted,
            decidedBy=by,
        )


def _check_kind(asked: Permission, decision: Decision) -> None:
    """Raise GatewayError for an answer that cannot be meant for what was asked."""
    if asked.kind == "permission" and decision.answer is not None:
        raise GatewayError(
            "invalid_request",
            "The question is whether a tool may run; answer approve, deny or always.",
        )
    if asked.kind == "client" and decision.granted and decision.results is None:
        raise GatewayError(
            "invalid_request",
            "The calls wait for the client whose tools they are, which sends their results through "
            "its own door; deny ends them and the run.",
        )
    if asked.kind == "question" and decision.granted and decision.answer is None:
        raise GatewayError(
            "invalid_request",
            "The question wants an answer in words; send the action answer with the field "
            "'answer', or deny to decline.",
        )


def _said(asked: Permission, decision: Decision) -> str:
    if asked.kind == "client":
        return "the client answered" if decision.granted else "the calls were declined"
    if asked.kind == "question":
        return "the person answered" if decision.granted else "the person declined to answer"
    return f"the answer was {'yes' if decision.granted else 'no'}"


def _unknown(request_id: str) -> GatewayError:
    return GatewayError(
        "permission_request_not_found", f"There is no question {request_id!r} here."
    )
