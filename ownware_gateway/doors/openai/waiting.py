"""What a run waits for: a person's answer, results of its client's tools, and what brings them.

Whoever goes past it with another message has answered, too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from ownware_gateway.approvals import Decision
from ownware_gateway.doors.openai.asking import Ask, wanted_options
from ownware_gateway.doors.openai.chunks import ANSWERS, APPROVES, question
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.prompts import words_of
from ownware_gateway.doors.openai.readers import Reading, asked_for
from ownware_gateway.doors.openai.telling import Telling, Told
from ownware_gateway.doors.openai.tools import digest, place_of, results_for
from ownware_gateway.engine import Engine, options_of
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    ANSWERING,
    CalledTool,
    ClientCall,
    PermissionRequest,
    QuestionRequest,
)
from ownware_gateway.log import Log, Permission, Run
from ownware_gateway.models import AssistantTurn
from ownware_gateway.transcript import load

APPROVE: Final = "/approve"
DENY: Final = "/deny"
SUPERSEDED: Final = "superseded by the person's next message"

#: What a question of this door ends with.
_ASKED_BY: Final = re.compile(
    rf"(?:{re.escape(APPROVES)}|{re.escape(ANSWERS)}) \((run_[A-Za-z0-9]+)\)\]$"
)


class Waiting:
    """What answers it."""

    def __init__(self, engine: Engine, log: Log, telling: Telling) -> None:
        self._engine = engine
        self._log = log
        self._telling = telling

    # -- people's answers

    async def answered(
        self, run: Run | None, pending: Sequence[Permission], ask: Ask
    ) -> Reading | None:
        """Take a message that is nothing but an answer for one; None for any other.

        To a question in words every text is one.
        """
        if ask.said.answered or (pending and pending[0].kind == "client"):
            return None
        text = words_of(ask.said.tail[-1].text)
        in_words = bool(pending) and pending[0].kind == "question"
        if text not in (APPROVE, DENY) and not (in_words and text):
            return None
        if run is None or not pending:
            raise GatewayError("nothing_pending", "There is no question to answer now.")
        request_id = pending[0].request_id
        if not await self.is_seen(run, ask):
            if text not in (APPROVE, DENY):
                return None
            raise GatewayError(
                "permission_operation_mismatch",
                "Another question is open than the one that was shown; see GET /api/v1/approvals.",
            )
        answer = text if in_words and text not in (APPROVE, DENY) else None
        decision = Decision(text != DENY, answer=answer)
        return await self.decide(run.thread_id, run.id, request_id, decision)

    async def is_seen(self, run: Run, ask: Ask) -> bool:
        """Whether the question that is open may be the one that the person has seen.

        What a client shows as the last answer must end with the very question: a model could have
        written one that looks like it.
        """
        if asked_by(ask) is None:
            return True
        last = ask.said.history[-1]
        (facts,) = await load(self._log, run.stream, after=run.start_seq, files=False)
        asked = facts.open_question()
        if isinstance(asked, ClientCall):
            return False
        _, shape = await self._telling.known(Told(Reading(run.id), run))
        return asked is not None and last.text.endswith(question(shape, asked.model_dump()))

    async def pending(self, run: Run | None) -> Sequence[Permission]:
        """Return what a person is asked now in a run's thread, whichever of its agents asks."""
        return [] if run is None else await self._log.pending(thread_id=run.thread_id)

    async def decide(
        self, thread_id: str, run_id: str, request_id: str, decision: Decision
    ) -> Reading:
        """Answer a question; return the completion that follows it."""
        await self._engine.approvals.decide(thread_id, request_id, decision)
        return await self._behind(run_id, request_id)

    async def _behind(self, run_id: str, request_id: str) -> Reading:
        """Return the completion that follows an answer."""
        run, _ = await self._telling.known(Told(Reading(run_id)))
        after = run.start_seq
        while records := await self._log.read(run.stream, after, deltas=False):
            for record in records:
                if (
                    record.type in ANSWERING
                    and json.loads(record.payload)["requestId"] == request_id
                ):
                    return Reading(run_id, record.seq - 1)
            after = records[-1].seq
        raise GatewayError("run_not_found", "The run has been deleted.")

    async def supersede(self, run: Run) -> None:
        """Answer with no what a person has gone past."""
        for asked in await self.pending(run):
            decision = Decision(granted=False, reason=SUPERSEDED)
            # It may have its answer by now.
            with suppress(GatewayError):
                await self._engine.approvals.decide(asked.thread_id, asked.request_id, decision)

    # -- results of clients' tools

    async def _calling(self, ask: Ask) -> Run | None:
        """Return the run that has made the last calls among the messages, if it was this client's.

        What led to them must be what the client says now: it may have changed its mind since.
        """
        calls = ask.said.last_calls
        place = place_of(calls.tool_calls[0].id) if calls is not None else None
        run = await self._log.run(place.run_id) if place is not None else None
        if run is None or place is None:
            return None
        door = (await options_of(self._log, run)).door or {}
        if door.get("caller") != ask.caller or door.get("model") != ask.agent.shown:
            return None
        if ask.name is None and ask.thread_id is None:
            count, what = door.get("said", (0, None))
            if digest(ask.said.turns[:count]) != what:
                return None
        return run

    async def hand_in_once(self, ask: Ask) -> Reading | None:
        """Take results for the run that waits for them; None when there is none.

        One that waits for them still, and gets something else, ends.
        """
        run = await self._calling(ask)
        pending = await self.pending(run)
        waits = bool(pending) and pending[0].kind == "client"
        if not ask.said.answered:
            if run is not None and waits:
                await self.supersede(run)
            return None
        handed_in = await self._hand_in(run, pending[0], ask) if run is not None and waits else None
        return handed_in or await self.led_to(ask)

    async def hand_in_there(
        self, run: Run | None, pending: Sequence[Permission], ask: Ask
    ) -> Reading | None:
        """Take results for the run that is under way in a conversation; None if none are meant."""
        if run is None or not ask.said.results or not pending or pending[0].kind != "client":
            return None
        calling = await self._calling(ask)
        if calling is None or calling.id != run.id:
            place = place_of(ask.said.results[0].tool_call_id)
            if place is None or place.run_id != run.id:
                return None
            raise refuse(
                "model", "The calls were made for another model; send their results to that one."
            )
        return await self._hand_in(run, pending[0], ask)

    async def _hand_in(self, run: Run, asked: Permission, ask: Ask) -> Reading | None:
        """Give calls their results; None when others are meant, or somebody was first."""
        places = [place_of(result.tool_call_id) for result in ask.said.results]
        if any(place is None or place[:2] != (run.id, asked.turn_index) for place in places):
            return None
        calls = [CalledTool.model_validate(call) for call in (asked.question or {})["calls"]]
        results = results_for(calls, ask.said.results)
        if results is None:
            return None
        before = (await options_of(self._log, run)).door or {}
        kept = {name: before[name] for name in ("said", "brought") if name in before}
        options = wanted_options(ask)
        options = options._replace(door={**(options.door or {}), **kept})
        try:
            await self._engine.hand_in(asked, results, options)
        except GatewayError as error:
            if error.code != "permission_already_decided":
                raise
            return None
        return await self._behind(run.id, asked.request_id)

    async def led_to(self, ask: Ask) -> Reading | None:
        """Return what the same request has led to while this one was on its way."""
        return await self.resent(ask, ended=ask.key is not None) if ask.again else None

    async def resent(self, ask: Ask, *, ended: bool) -> Reading | None:
        """Return the completion that the same results of tools have led to, if they came before."""
        run = await self._calling(ask)
        if run is None or (run.terminal and not (ended and run.status == "succeeded")):
            return None
        for reading, door in await asked_for(self._log, run):
            if door["fingerprint"] == ask.fingerprint:
                return reading
        return None


def asked_by(ask: Ask) -> str | None:
    """Return the run whose question a client shows as the last answer, if that is what it shows."""
    last = ask.said.history[-1] if ask.said.history else None
    found = _ASKED_BY.search(last.text) if isinstance(last, AssistantTurn) else None
    return found[1] if found is not None else None


def decision_of(
    asked: PermissionRequest | QuestionRequest, decisions: Mapping[str, Any]
) -> Decision:
    """Return what a body says to what is asked; raises GatewayError."""
    names = (asked.tool_call_id, asked.request_id)
    given = [decisions[name] for name in names if name in decisions]
    match given if len(decisions) == 1 else []:
        case [False]:
            return Decision(granted=False)
        case [True] if not isinstance(asked, QuestionRequest):
            return Decision(granted=True)
        case [str(text)] if isinstance(asked, QuestionRequest) and text.strip():
            return Decision(granted=True, answer=text)
    wanted = "the answer, or false," if isinstance(asked, QuestionRequest) else "true or false"
    raise refuse(
        asked.tool_call_id,
        f"The body must be {wanted} for the call that waits: {asked.tool_call_id!r}.",
    )
