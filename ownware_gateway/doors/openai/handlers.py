"""The handlers of the OpenAI door: a request becomes a run, and the run's events its answer."""

import functools
import hashlib
import hmac
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, NamedTuple, Protocol

from aiohttp import web

from ownware_gateway import sse
from ownware_gateway.approvals import Decision
from ownware_gateway.auth import CALLER, LIMITED
from ownware_gateway.doors.openai import OpenAIParts
from ownware_gateway.doors.openai.agents import Agent, Agents
from ownware_gateway.doors.openai.bodies import (
    FILE_BYTES_MAX,
    Conversation,
    ExecuteBody,
    conversation,
    parse,
    parse_chat,
    read_json,
)
from ownware_gateway.doors.openai.chunks import (
    ANSWERS,
    APPROVES,
    DONE,
    Answer,
    Frames,
    Shape,
    Whole,
    completion_id,
    parse_completion_id,
    question,
)
from ownware_gateway.doors.openai.errors import Failed, Wrong, refuse
from ownware_gateway.doors.openai.readers import Readers, Reading, asked_for
from ownware_gateway.doors.openai.tools import digest, place_of, results_for
from ownware_gateway.engine import Begun, Started, StartRun, options_of
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import (
    ANSWERING,
    CalledTool,
    ClientCall,
    PermissionRequest,
    QuestionRequest,
)
from ownware_gateway.line import Line
from ownware_gateway.log import Chunk, Gone, IdempotencyKey, Permission, Run, Thread
from ownware_gateway.models import AssistantTurn, File, Options
from ownware_gateway.outbound import Limits, NotReached, Outbound, Policy, Request
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import PLAIN
from ownware_gateway.stream import CaughtUp, Silence, check_cursor, parse_cursor
from ownware_gateway.transcript import load

#: Where a client says which conversation a request belongs to.
OPEN_WEBUI_HEADER: Final = "X-OpenWebUI-Chat-Id"
CONVERSATION_HEADERS: Final = ("X-Conversation-Id", OPEN_WEBUI_HEADER)
#: How Open WebUI names chats that are not to be kept: all those of a browser tab alike.
TEMPORARY: Final = ("temporary:", "local:")
NAME_CHARS_MAX: Final = 255

#: How often a conversation of one name may have been deleted before the name is used up.
DELETIONS_MAX: Final = 100

#: How often the run of one Idempotency-Key may have failed before the key is used up.
FAILURES_MAX: Final = 20

#: How the prompts begin that chat UIs ask by themselves, for a title say. They do not stream these;
#: a person's question about a file may begin so too, and is streamed.
HELPER: Final = "### Task:"

APPROVE: Final = "/approve"
DENY: Final = "/deny"
SUPERSEDED: Final = "superseded by the person's next message"

_NOT_WAITED_FOR: Final = (
    "The conversation does not wait for these results any more; go on with a user's message."
)

#: Names of tokens that are one person's: the operator's, whether the token is asked for or not.
_OPERATORS: Final = frozenset({"local", "token"})

#: What a question of this door ends with.
_ASKED_BY: Final = re.compile(
    rf"(?:{re.escape(APPROVES)}|{re.escape(ANSWERS)}) \((run_[A-Za-z0-9]+)\)\]$"
)

_FETCH: Final = Limits(bytes_max=FILE_BYTES_MAX, total_s=20.0)

_GONE: Final = Wrong(410, "thread_deleted", "The run's events are not kept any more.")
_LEAVING: Final = Wrong(
    503, "shutting_down", "The gateway is shutting down; the run goes on at its next start."
)


class Ask(NamedTuple):
    """A request for a completion, understood.

    `caller` is whose it is, `name` what the client calls its conversation, `thread_id` the thread
    where that is. `again`: it may have come before, and is then not to be done twice.
    """

    agent: Agent
    said: Conversation
    options: Options
    fingerprint: str
    caller: str
    name: str | None = None
    thread_id: str | None = None
    key: IdempotencyKey | None = None
    again: bool = False
    route: str = "POST /v1/chat/completions"


class Told(NamedTuple):
    """A completion that is to be told, and what is known of its run without a look at the log."""

    reading: Reading
    run: Run | None = None
    options: Options | None = None


#: Starts a run if it can be started now. Raises GatewayError `run_in_progress` if not yet.
Attempt = Callable[[], Awaitable[Started]]


class Taking(Protocol):
    """An answer that is told when it is whole; `wrong` is why there is none."""

    wrong: Wrong | None

    @property
    def answer(self) -> Answer:
        """How far it is."""
        ...

    def take(self, sent: sse.Sent) -> None:
        """Take the next event."""
        ...


class Framing(Protocol):
    """An answer that is told as it comes; `finished` once it came to an end that is of use."""

    @property
    def answer(self) -> Answer:
        """How far it is."""
        ...

    @property
    def finished(self) -> bool:
        """Whether a client got all there is to it."""
        ...

    def of(self, sent: sse.Sent) -> bytes:
        """Return the frames that an event becomes. May raise Failed."""
        ...

    def failure(self, wrong: Wrong) -> bytes:
        """Return the frame for a stream that ends before the answer does."""
        ...


class Handlers(Agents):
    """What handles the door's requests."""

    def __init__(self, parts: OpenAIParts) -> None:
        super().__init__(parts)
        self._engine = parts.engine
        self._log = parts.log
        self._streamer = parts.streamer
        self._policy = Policy.naming(parts.fetch_private)
        self._line = Line(parts.log, parts.streamer)
        self._readers = Readers(parts.engine, parts.log, parts.streamer, cancels=parts.cancels)

    # -- completions

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a list of messages, in one piece or as it comes."""
        raw = await read_json(request)
        body = parse_chat(raw)
        agent = self._agent(request.match_info.get("profile_id"), body.model)
        there = functools.partial(self._streamer.while_there, request)
        said = await there(conversation(body.messages, self._fetch))
        name = conversation_name(request)
        helper = self._parts.helper_prompts and not body.stream and is_helper(said)
        fingerprint = fingerprint_of(request, raw, name)
        ask = Ask(agent, said, body.options(), fingerprint, owner_of(request), name)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        ask = with_door(ask, include_usage=usage, helper=helper)
        told = await (self._help(ask) if helper else self._begin(request, ask))
        self._readers.note(ask.fingerprint, told.reading)
        headers = {} if name is None or helper else {"X-Conversation-Id": name}
        return await self._respond(request, told, stream=body.stream, headers=headers)

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Go on with a stream behind the frame that a client has seen last."""
        check_limited(request)
        found = parse_completion_id(request.match_info["completion_id"])
        run = await self._log.run(found[0]) if found is not None else None
        if found is None or run is None:
            raise GatewayError("run_not_found", "There is no such completion.")
        seen = (0, 0)
        if cursor := request.headers.get("Last-Event-ID"):
            seen = await self._seen(run, cursor)
        told = Told(Reading(*found), run)
        return await self._respond(request, told, stream=True, seen=seen)

    async def _seen(self, run: Run, cursor: str) -> tuple[int, int]:
        """Return the place that `<epoch>.<seq>.<k>` names. Raises GatewayError."""
        event, _, number = cursor.rpartition(".")
        if not event or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise GatewayError("cursor_invalid", "A cursor is the id of a frame of this stream.")
        head = await self._log.head(run.stream)
        assert head is not None, run
        seq = check_cursor(parse_cursor(event), head)
        if seq <= run.start_seq or (run.end_seq is not None and seq > run.end_seq):
            raise GatewayError("cursor_mismatch", "The cursor is outside of this completion's run.")
        return seq, int(number)

    async def approve(self, request: web.Request) -> web.StreamResponse:
        """Answer a run's question, and return what the run then says."""
        run = await self._log.run(request.match_info["run_id"])
        if run is None:
            raise GatewayError("run_not_found", "There is no such run.")
        decisions = await read_json(request)
        (facts,) = await load(self._log, run.stream, after=run.start_seq, files=False)
        asked = facts.open_question()
        if asked is None:
            raise GatewayError("nothing_pending", "The run has no question to answer now.")
        if isinstance(asked, ClientCall):
            raise GatewayError(
                "nothing_pending",
                "The run waits for results of its client's tools, which come as tool messages.",
            )
        decision = _decision(asked, decisions)
        reading = await self._decide(run.thread_id, run.id, asked.request_id, decision)
        stream = request.query.get("stream") == "true"
        return await self._respond(request, Told(reading), stream=stream)

    async def execute(self, request: web.Request) -> web.StreamResponse:
        """Ask a model by itself, and return what it says."""
        raw = await read_json(request)
        body = parse(raw, ExecuteBody)
        model = body.model_name
        if body.model_provider:
            name = model or self._profiles.get(PLAIN).model.partition(":")[2]
            model = f"{body.model_provider}:{name}"
        agent = Agent(self._profiles.get(PLAIN), model or None, model or PLAIN)
        messages = [{"role": "user", "content": body.prompt}]
        said = await conversation(messages, self._fetch)
        fingerprint = fingerprint_of(request, raw, None)
        ask = with_door(Ask(agent, said, Options(), fingerprint, owner_of(request)))
        told = await self._begin(request, ask)
        self._readers.note(ask.fingerprint, told.reading)
        run, shape = await self._known(told)
        whole = Whole(shape)
        await self._read_whole(request, run, whole, run.start_seq)
        text = whole.body()["choices"][0]["message"]["content"]
        return web.json_response({"id": run.id, "response": text})

    # -- starting

    async def _help(self, ask: Ask) -> Told:
        """Start what a chat UI asks for itself: a small model, no tools, and no conversation."""
        prompt = ask.said.prompt
        wanted = StartRun(
            profile_id=ask.agent.profile.name,
            prompt=prompt.text,
            model=ask.agent.profile.small_fast_model or ask.agent.model,
            options=_with_instructions(ask)._replace(
                bare=True, client_tools=(), tool_choice=None, parallel_tool_calls=None
            ),
            hidden=True,
        )
        return told_of(await self._engine.start(wanted), ask)

    async def _begin(self, request: web.Request, ask: Ask) -> Told:
        """Start the run that a request asks for, or join the one that it has started before."""
        ask, joined = await self._joined(request, ask)
        if joined is not None:
            return Told(joined)
        if ask.name is None:
            return await self._begin_once(ask)
        thread_id, thread = await self._thread_of(ask.caller, ask.name)
        return await self._begin_in(request, ask._replace(thread_id=thread_id), thread)

    async def _joined(self, request: web.Request, ask: Ask) -> tuple[Ask, Reading | None]:
        """Return the request with the key that names it, and what it has led to if it came before.

        What it joins is under way; with an Idempotency-Key it may also have come to a good end.
        """
        key = request.headers.get("Idempotency-Key")
        retries = request.headers.get("x-stainless-retry-count", "0")
        if key is None and retries == "0":
            return ask, None
        ask = ask._replace(again=True)
        if (found := await self._readers.find(ask.fingerprint)) is not None:
            return ask, found
        if (found := await self._resent(ask, ended=key is not None)) is not None or key is None:
            return ask, found
        if not 1 <= len(key) <= NAME_CHARS_MAX or not key.isprintable():
            raise GatewayError(
                "idempotency_key_invalid",
                f"An Idempotency-Key is 1 to {NAME_CHARS_MAX} printable characters.",
            )
        for number in range(FAILURES_MAX):
            named = IdempotencyKey(request[CALLER], ask.route, f"{key}\0{number}", ask.fingerprint)
            kept = await self._log.kept_start(named)
            if kept is None:
                return ask._replace(key=named), None
            if kept.fingerprint != ask.fingerprint:
                break
            if kept.run is not None and kept.run.status == "succeeded":
                return ask, Reading(kept.run_id)
        raise GatewayError(
            "idempotency_conflict",
            "This Idempotency-Key was used for another request; take a new one.",
        )

    async def _resent(self, ask: Ask, *, ended: bool) -> Reading | None:
        """Return the completion that the same results of tools have led to, if they came before."""
        run = await self._calling(ask)
        if run is None or (run.terminal and not (ended and run.status == "succeeded")):
            return None
        for reading, door in await asked_for(self._log, run):
            if door["fingerprint"] == ask.fingerprint:
                return reading
        return None

    async def _begin_once(self, ask: Ask) -> Told:
        """Start a run on a thread of its own, which begins with what the client brings along."""
        run_id = _asked_by(ask)
        if run_id is not None:
            run = await self._log.run(run_id)
            pending = await self._pending(run)
            if (answered := await self._answered(run, pending, ask)) is not None:
                return Told(answered)
            if run is not None and pending and await self._is_seen(run, ask):
                await self._supersede(run)
        if (handed_in := await self._hand_in_once(ask)) is not None:
            return Told(handed_in)
        return told_of(await self._engine.start(self._start_of(ask, hidden=True)), ask)

    async def _begin_in(
        self, request: web.Request, ask: Ask, thread: Thread | None, attempt: Attempt | None = None
    ) -> Told:
        """Start a run in a conversation, once it is its turn; `attempt` may do so elsewhere."""
        assert ask.thread_id is not None
        active_id = thread.active_run_id if thread is not None else None
        active = await self._log.run(active_id) if active_id is not None else None
        pending = await self._pending(active)
        if (answered := await self._answered(active, pending, ask)) is not None:
            return Told(answered)
        handed_in = await self._hand_in_there(active, pending, ask)
        if thread is not None and ask.said.answered:
            if (led_to := handed_in or await self._led_to(ask)) is None:
                raise GatewayError("nothing_pending", _NOT_WAITED_FOR)
            return Told(led_to)
        superseded = active_id if pending else None

        async def busy(run_id: str) -> None:
            # A question that comes up while a request waits is not what its message is about,
            # unless the run goes on for this request alone.
            if active is not None and run_id == superseded:
                await self._supersede(active)

        attempt = attempt or functools.partial(self._attempt, ask, known=thread is not None)
        there = functools.partial(self._streamer.while_there, request)
        return told_of(await self._line.start(ask.thread_id, attempt, there, busy), ask)

    async def _attempt(self, ask: Ask, *, known: bool) -> Started:
        try:
            return await self._engine.start(self._start_of(ask, known=known))
        except Begun:
            if ask.said.answered:
                raise GatewayError("nothing_pending", _NOT_WAITED_FOR) from None
            return await self._engine.start(self._start_of(ask, known=True))

    def _start_of(self, ask: Ask, *, known: bool = False, hidden: bool = False) -> StartRun:
        """Return what to start; in a `known` conversation only the person's last message is new."""
        prompt = ask.said.tail[-1] if known else ask.said.prompt
        return StartRun(
            profile_id=ask.agent.profile.name,
            prompt=prompt.text,
            model=ask.agent.model,
            thread_id=ask.thread_id,
            files=prompt.files,
            key=ask.key,
            options=_with_instructions(ask),
            history=() if known else ask.said.history,
            answered=() if known else ask.said.answered,
            begins=ask.thread_id is not None and not known,
            hidden=hidden,
        )

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

    async def _hand_in_once(self, ask: Ask) -> Reading | None:
        """Take results for the run that waits for them; None when there is none.

        One that waits for them still, and gets something else, ends.
        """
        run = await self._calling(ask)
        pending = await self._pending(run)
        waits = bool(pending) and pending[0].kind == "client"
        if not ask.said.answered:
            if run is not None and waits:
                await self._supersede(run)
            return None
        handed_in = await self._hand_in(run, pending[0], ask) if run is not None and waits else None
        return handed_in or await self._led_to(ask)

    async def _hand_in_there(
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
        options = _with_instructions(ask)
        options = options._replace(door={**(options.door or {}), **kept})
        try:
            await self._engine.hand_in(asked, results, options)
        except GatewayError as error:
            if error.code != "permission_already_decided":
                raise
            return None
        return await self._behind(run.id, asked.request_id)

    async def _led_to(self, ask: Ask) -> Reading | None:
        """Return what the same request has led to while this one was on its way."""
        return await self._resent(ask, ended=ask.key is not None) if ask.again else None

    # -- people's answers

    async def _answered(
        self, run: Run | None, pending: Sequence[Permission], ask: Ask
    ) -> Reading | None:
        """Take a message that is nothing but an answer for one; None for any other.

        To a question in words every text is one.
        """
        if ask.said.answered or (pending and pending[0].kind == "client"):
            return None
        text = ask.said.tail[-1].text.strip()
        in_words = bool(pending) and pending[0].kind == "question"
        if text not in (APPROVE, DENY) and not (in_words and text):
            return None
        if run is None or not pending:
            raise GatewayError("nothing_pending", "There is no question to answer now.")
        request_id = pending[0].request_id
        if not await self._is_seen(run, ask):
            if text not in (APPROVE, DENY):
                return None
            raise GatewayError(
                "permission_operation_mismatch",
                "Another question is open than the one that was shown; see GET /api/v1/approvals.",
            )
        answer = text if in_words and text not in (APPROVE, DENY) else None
        decision = Decision(text != DENY, answer=answer)
        return await self._decide(run.thread_id, run.id, request_id, decision)

    async def _is_seen(self, run: Run, ask: Ask) -> bool:
        """Whether the question that is open may be the one that the person has seen.

        What a client shows as the last answer must end with the very question: a model could have
        written one that looks like it.
        """
        if _asked_by(ask) is None:
            return True
        last = ask.said.history[-1]
        (facts,) = await load(self._log, run.stream, after=run.start_seq, files=False)
        asked = facts.open_question()
        if isinstance(asked, ClientCall):
            return False
        _, shape = await self._known(Told(Reading(run.id), run))
        return asked is not None and last.text.endswith(question(shape, asked.model_dump()))

    async def _pending(self, run: Run | None) -> Sequence[Permission]:
        """Return what a person is asked now in a run's thread, whichever of its agents asks."""
        return [] if run is None else await self._log.pending(thread_id=run.thread_id)

    async def _decide(
        self, thread_id: str, run_id: str, request_id: str, decision: Decision
    ) -> Reading:
        """Answer a question; return the completion that follows it."""
        await self._engine.approvals.decide(thread_id, request_id, decision)
        return await self._behind(run_id, request_id)

    async def _behind(self, run_id: str, request_id: str) -> Reading:
        """Return the completion that follows an answer."""
        run, _ = await self._known(Told(Reading(run_id)))
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

    async def _supersede(self, run: Run) -> None:
        """Answer with no what a person has gone past."""
        for asked in await self._pending(run):
            decision = Decision(granted=False, reason=SUPERSEDED)
            # It may have its answer by now.
            with suppress(GatewayError):
                await self._engine.approvals.decide(asked.thread_id, asked.request_id, decision)

    # -- answering

    async def _respond(
        self,
        request: web.Request,
        told: Told,
        *,
        stream: bool,
        headers: Mapping[str, str] | None = None,
        seen: tuple[int, int] = (0, 0),
    ) -> web.StreamResponse:
        """Send a completion, as it comes or when it is whole."""
        run, shape = await self._known(told)
        after = run.start_seq if told.reading.after is None else told.reading.after
        sent = {"X-Run-Id": run.id, **(headers or {})}
        if not stream:
            whole = Whole(shape)
            await self._read_whole(request, run, whole, after)
            return web.json_response(whole.body(), headers=sent, dumps=dumps)
        return await self._stream(request, run, Frames(shape, seen), after, sent)

    async def _stream(
        self, request: web.Request, run: Run, frames: Framing, after: int, headers: dict[str, str]
    ) -> web.StreamResponse:
        """Send frames as they come."""
        finished = False
        self._readers.enter(run)
        try:
            pieces = self._pieces(frames, run, after)
            response, taken = await self._streamer.relay(request, pieces, headers)
            finished = taken and frames.finished
        finally:
            self._readers.leave(run, finished=finished, once=await self._is_once(run))
        return response

    async def _read_whole(self, request: web.Request, run: Run, whole: Taking, after: int) -> None:
        """Have an answer taken up to its end; raises Failed when there is none."""
        finished = False
        self._readers.enter(run)
        try:
            await self._streamer.while_there(request, self._read(whole, run, after))
            finished = True
        finally:
            self._readers.leave(run, finished=finished, once=await self._is_once(run))
        if whole.wrong is not None:
            raise Failed(whole.wrong, run.id)

    async def _is_once(self, run: Run) -> bool:
        thread = await self._log.thread(run.thread_id)
        return thread is not None and thread.hidden

    async def _read(self, whole: Taking, run: Run, after: int) -> None:
        async with aclosing(self._chunks(run, after, whole.answer)) as chunks:
            async for chunk in chunks:
                for sent in sse.split(chunk.data if chunk is not None else b""):
                    whole.take(sent)
                    if whole.answer.over:
                        return

    async def _pieces(self, frames: Framing, run: Run, after: int) -> AsyncGenerator[bytes, None]:
        """Yield what goes to the client, up to the end."""
        try:
            async with aclosing(self._chunks(run, after, frames.answer)) as chunks:
                async for chunk in chunks:
                    if chunk is None:
                        yield sse.KEEP_ALIVE
                    elif piece := _frames_of(frames, chunk):
                        yield piece
                    if frames.answer.over:
                        break
        except Failed as failed:
            yield frames.failure(failed.wrong)
        yield DONE

    async def _chunks(
        self, run: Run, after: int, answer: Answer
    ) -> AsyncGenerator[Chunk | None, None]:
        """Yield the log's chunks, None after a silence; raises Failed where they end too early."""
        try:
            async with aclosing(self._streamer.follow(run.stream, after)) as following:
                async for item in following:
                    match item:
                        case Chunk():
                            await self._bring_arguments(run, item, answer)
                            yield item
                            after = item.last_seq
                        case Silence():
                            yield None
                        case CaughtUp():
                            pass
                    # Whoever has read the end does not ask for more.
                    if isinstance(item, CaughtUp) or (isinstance(item, Chunk) and item.ends_run):
                        now = await self._log.run(run.id)
                        if now is None or (now.end_seq is not None and after >= now.end_seq):
                            raise Failed(_GONE, run.id)
        except Gone:
            raise Failed(_GONE, run.id) from None
        raise Failed(_LEAVING, run.id)

    async def _bring_arguments(self, run: Run, chunk: Chunk, answer: Answer) -> None:
        """Give an answer what the model wrote for the client; raises Failed if it is not kept."""
        if b"\nevent: client.call\n" not in chunk.data:
            return
        for sent in sse.split(chunk.data):
            if sent.type == b"client.call":
                asked = json.loads(sent.data)
                exact = await self._log.private_at(run.stream, asked["seq"], "calls")
                if exact is None:
                    raise Failed(_GONE, run.id)
                answer.exact[asked["requestId"]] = json.loads(exact)

    async def _known(self, told: Told) -> tuple[Run, Shape]:
        """Return a completion's run, and how it is told. Raises GatewayError `run_not_found`."""
        reading, run, options = told
        run = run or await self._log.run(reading.run_id)
        if run is None:
            raise GatewayError("run_not_found", "There is no such run.")
        seq = run.start_seq if reading.after is None else reading.after
        door = (options or await options_of(self._log, run, to=seq + 1)).door or {}
        return run, Shape(
            id=completion_id(run.id, reading.after),
            run_id=run.id,
            model=door.get("model", run.profile_id),
            created=run.accepted_at // 1000,
            include_usage=door.get("include_usage", False),
            json=door.get("json", False),
            has_tools=door.get("has_tools", True),
            brought=door.get("brought", 0),
        )

    # -- conversations and files

    async def _thread_of(self, caller: str, name: str) -> tuple[str, Thread | None]:
        """Return the thread of a conversation, if there is one: for ever the same, no one else's.

        Nobody can find another caller's by its name, and a name whose thread was deleted gets
        another one.
        """
        for number in range(DELETIONS_MAX):
            text = f"{caller}\0{name}\0{number}".encode("utf-8", "surrogatepass")
            thread_id = f"conversation_{hmac.digest(self._log.secret, text, 'sha256').hex()[:24]}"
            thread = await self._log.thread(thread_id)
            if thread is not None or await self._log.tombstone(thread_id) is None:
                return thread_id, thread
        raise GatewayError("thread_deleted", "This conversation was deleted too often.")

    async def _fetch(self, url: str, where: str) -> File:
        """Return the image at an address; raises GatewayError."""
        try:
            async with (
                Outbound(self._policy, _FETCH) as outbound,
                outbound.open(Request(url, headers={"Accept": "image/*"})) as response,
            ):
                data, whole = await outbound.read(response)
        except NotReached as error:
            raise refuse("messages", f"The image of '{where}' cannot be had. {error}") from None
        kind = response.content_type.lower()
        if response.status != 200 or not kind.startswith("image/"):
            raise refuse(
                "messages",
                f"The image of '{where}' cannot be had: its address answered with "
                f"{response.status} and {kind[:100]}.",
            )
        if not whole:
            raise refuse(
                "messages", f"The image of '{where}' has more than {FILE_BYTES_MAX} bytes."
            )
        return File(f"image.{kind.removeprefix('image/')}", kind, data)


def check_limited(request: web.Request) -> None:
    """Raise GatewayError for a reconnect that comes too often: only a native stream says so."""
    if (limited := request.get(LIMITED)) is not None:
        raise GatewayError("rate_limited", "Too many requests.", retry_after_s=limited)


def told_of(started: Started, ask: Ask) -> Told:
    """Return the first completion of a run that has just been started."""
    return Told(Reading(started.run.id), started.run, ask.options)


def _asked_by(ask: Ask) -> str | None:
    """Return the run whose question a client shows as the last answer, if that is what it shows."""
    last = ask.said.history[-1] if ask.said.history else None
    found = _ASKED_BY.search(last.text) if isinstance(last, AssistantTurn) else None
    return found[1] if found is not None else None


def _decision(asked: PermissionRequest | QuestionRequest, decisions: Mapping[str, Any]) -> Decision:
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


def with_door(ask: Ask, *, helper: bool = False, **more: Any) -> Ask:
    """Return the request with what is to be found again when its answer is told once more."""
    door = {
        **more,
        "model": ask.agent.shown,
        "json": ask.options.response_format is not None,
        "has_tools": (bool(ask.options.client_tools) or _has_tools(ask.agent.profile))
        and not helper,
        "fingerprint": ask.fingerprint,
        "caller": ask.caller,
        "brought": sum(isinstance(turn, AssistantTurn) for turn in ask.said.answered),
    }
    if ask.options.client_tools and ask.name is None and ask.thread_id is None:
        # By which the request with the results is recognised where nothing else names the run.
        door["said"] = [len(ask.said.turns), digest(ask.said.turns)]
    return ask._replace(options=ask.options._replace(door=door))


def _with_instructions(ask: Ask) -> Options:
    return ask.options._replace(instructions=ask.said.instructions)


def is_helper(said: Conversation) -> bool:
    """Whether a chat UI asks this for itself, and no person."""
    return not said.answered and said.prompt.text.lstrip().startswith(HELPER)


def owner_of(request: web.Request) -> str:
    """Return whose a request is; the names of the operator's token are one."""
    caller: str = request[CALLER]
    return "operator" if caller in _OPERATORS else caller


def _has_tools(profile: Profile) -> bool:
    """Whether an agent has any."""
    tools = profile.tools
    own = (tools.allow, tools.mcp, tools.services, profile.functions, profile.brings)
    return tools.preset != "none" or any(map(bool, own))


def _frames_of(frames: Framing, chunk: Chunk) -> bytes:
    pieces = []
    for sent in sse.split(chunk.data):
        pieces.append(frames.of(sent))
        if frames.answer.over:
            break
    return b"".join(pieces)


def conversation_name(request: web.Request) -> str | None:
    """Return the name of the conversation that a request belongs to; raises GatewayError."""
    for header in CONVERSATION_HEADERS:
        if name := request.headers.get(header):
            if header == OPEN_WEBUI_HEADER and name.startswith(TEMPORARY):
                return None
            if len(name) > NAME_CHARS_MAX or not name.isprintable():
                raise refuse(
                    header, f"{header} must be 1 to {NAME_CHARS_MAX} printable characters."
                )
            return name
    return None


def fingerprint_of(request: web.Request, raw: Mapping[str, Any], name: str | None) -> str:
    """Return what is the same for a request and its retry, and for no other."""
    key = request.headers.get("Idempotency-Key")
    said = json.dumps([request[CALLER], request.path, name, key, raw], sort_keys=True)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def dumps(value: Any) -> str:
    """Return it as JSON, what is no text replaced."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Half a character, of a provider that cut one in two.
    return text.encode("utf-8", "replace").decode()
