"""The handlers of the OpenAI door: a request becomes a run, and the run's events its answer."""

import functools
import hmac
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from ownware_gateway.auth import CALLER
from ownware_gateway.doors.openai import OpenAIParts
from ownware_gateway.doors.openai.agents import Agent, Agents
from ownware_gateway.doors.openai.asking import (
    NAME_CHARS_MAX,
    Ask,
    asks_for_itself,
    conversation_name,
    fingerprint_of,
    owner_of,
    wanted_options,
    with_door,
)
from ownware_gateway.doors.openai.bodies import (
    FILE_BYTES_MAX,
    ExecuteBody,
    conversation,
    parse,
    parse_chat,
    read_json,
)
from ownware_gateway.doors.openai.chunks import Whole, parse_completion_id
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.readers import Readers, Reading
from ownware_gateway.doors.openai.telling import Telling, Told, check_limited
from ownware_gateway.doors.openai.waiting import Waiting, asked_by, decision_of
from ownware_gateway.engine import Begun, Started, StartRun
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import ClientCall
from ownware_gateway.line import Line
from ownware_gateway.log import IdempotencyKey, Thread
from ownware_gateway.models import File, Options
from ownware_gateway.outbound import Limits, NotReached, Outbound, Policy, Request
from ownware_gateway.profile.folder import PLAIN
from ownware_gateway.transcript import load

#: How often a conversation of one name may have been deleted before the name is used up.
DELETIONS_MAX: Final = 100

#: How often the run of one Idempotency-Key may have failed before the key is used up.
FAILURES_MAX: Final = 20

_NOT_WAITED_FOR: Final = (
    "The conversation does not wait for these results any more; go on with a user's message."
)

_FETCH: Final = Limits(bytes_max=FILE_BYTES_MAX, total_s=20.0)

#: Starts a run if it can be started now. Raises GatewayError `run_in_progress` if not yet.
Attempt = Callable[[], Awaitable[Started]]


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
        self._telling = Telling(parts.log, parts.streamer, self._readers)
        self._waiting = Waiting(parts.engine, parts.log, self._telling)

    # -- completions

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a list of messages, in one piece or as it comes."""
        raw = await read_json(request)
        body = parse_chat(raw)
        agent = self._agent(request.match_info.get("profile_id"), body.model)
        there = functools.partial(self._streamer.while_there, request)
        said = await there(conversation(body.messages, self._fetch))
        name = conversation_name(request)
        helper = self._parts.helper_prompts and asks_for_itself(said)
        fingerprint = fingerprint_of(request, raw, name)
        ask = Ask(agent, said, body.options(), fingerprint, owner_of(request), name)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        ask = with_door(ask, include_usage=usage, helper=helper)
        told = await (self._help(ask) if helper else self._begin(request, ask))
        self._readers.note(ask.fingerprint, told.reading)
        headers = {} if name is None or helper else {"X-Conversation-Id": name}
        return await self._telling.respond(request, told, stream=body.stream, headers=headers)

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Go on with a stream behind the frame that a client has seen last."""
        check_limited(request)
        found = parse_completion_id(request.match_info["completion_id"])
        run = await self._log.run(found[0]) if found is not None else None
        if found is None or run is None:
            raise GatewayError("run_not_found", "There is no such completion.")
        seen = (0, 0)
        if cursor := request.headers.get("Last-Event-ID"):
            seen = await self._telling.seen(run, cursor)
        told = Told(Reading(*found), run)
        return await self._telling.respond(request, told, stream=True, seen=seen)

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
        decision = decision_of(asked, decisions)
        reading = await self._waiting.decide(run.thread_id, run.id, asked.request_id, decision)
        stream = request.query.get("stream") == "true"
        return await self._telling.respond(request, Told(reading), stream=stream)

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
        run, shape = await self._telling.known(told)
        whole = Whole(shape)
        await self._telling.read_whole(request, run, whole, run.start_seq)
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
            options=wanted_options(ask)._replace(
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
        if (
            found := await self._waiting.resent(ask, ended=key is not None)
        ) is not None or key is None:
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

    async def _begin_once(self, ask: Ask) -> Told:
        """Start a run on a thread of its own, which begins with what the client brings along."""
        run_id = asked_by(ask)
        if run_id is not None:
            run = await self._log.run(run_id)
            pending = await self._waiting.pending(run)
            if (answered := await self._waiting.answered(run, pending, ask)) is not None:
                return Told(answered)
            if run is not None and pending and await self._waiting.is_seen(run, ask):
                await self._waiting.supersede(run)
                await self._telling.forsake(run)
        if (handed_in := await self._waiting.hand_in_once(ask)) is not None:
            return Told(handed_in)
        return told_of(await self._engine.start(self._start_of(ask, hidden=True)), ask)

    async def _begin_in(
        self, request: web.Request, ask: Ask, thread: Thread | None, attempt: Attempt | None = None
    ) -> Told:
        """Start a run in a conversation, once it is its turn; `attempt` may do so elsewhere."""
        assert ask.thread_id is not None
        active_id = thread.active_run_id if thread is not None else None
        active = await self._log.run(active_id) if active_id is not None else None
        pending = await self._waiting.pending(active)
        if (answered := await self._waiting.answered(active, pending, ask)) is not None:
            return Told(answered)
        handed_in = await self._waiting.hand_in_there(active, pending, ask)
        if thread is not None and ask.said.answered:
            if (led_to := handed_in or await self._waiting.led_to(ask)) is None:
                raise GatewayError("nothing_pending", _NOT_WAITED_FOR)
            return Told(led_to)
        superseded = active_id if pending else None

        async def busy(run_id: str) -> None:
            # A question that comes up while a request waits is not what its message is about,
            # unless the run goes on for this request alone.
            if active is not None and run_id == superseded:
                await self._waiting.supersede(active)

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
            options=wanted_options(ask),
            history=() if known else ask.said.history,
            answered=() if known else ask.said.answered,
            begins=ask.thread_id is not None and not known,
            hidden=hidden,
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


def told_of(started: Started, ask: Ask) -> Told:
    """Return the first completion of a run that has just been started."""
    return Told(Reading(started.run.id), started.run, ask.options)
