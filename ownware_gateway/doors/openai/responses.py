"""The Responses API: a request becomes a run or goes on with one, and the run's events its answer.

What a run is to a response, how its id is made and what a stream is gone on with by, is the same as
for completions; `items` tells it.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, get_args

from aiohttp import web

from ownware_gateway import sse
from ownware_gateway.approvals import Decision
from ownware_gateway.auth import CALLER
from ownware_gateway.doors.openai.asking import (
    Ask,
    asks_for_itself,
    conversation_name,
    fingerprint_of,
    owner_of,
    with_door,
)
from ownware_gateway.doors.openai.bodies import Conversation, read_json
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.given import input_items
from ownware_gateway.doors.openai.handlers import Handlers, told_of
from ownware_gateway.doors.openai.items import (
    Before,
    Items,
    ResponseFrames,
    ResponseShape,
    before,
    parse_response_id,
    response_id,
    response_of_item,
)
from ownware_gateway.doors.openai.readers import Reading
from ownware_gateway.doors.openai.response_bodies import (
    PAGE_MAX,
    REFERRED_CHARS_MAX,
    REFERRED_MAX,
    Approval,
    Included,
    ResponseBody,
    bare_results,
    only_new,
    parse_response,
    read_input,
    referred,
)
from ownware_gateway.doors.openai.telling import Told, check_limited, dumps
from ownware_gateway.doors.openai.tools import Place, call_id
from ownware_gateway.engine import Started, options_of
from ownware_gateway.errors import GatewayError
from ownware_gateway.events import ASKING
from ownware_gateway.log import Gone, Refused, Run, Stream

#: How long a cancelled response is waited for.
CANCEL_S: Final = 10.0

PAGE: Final = 20

_NOTHING: Final = Conversation("", (), ())

#: What the options of a run call their names, where a response calls them otherwise.
_NAMES: Final = {
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
    "verbosity": "text",
}


class Responses(Handlers):
    """The handlers of the Responses API, beside all others."""

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Answer in one piece, as it comes, or later."""
        raw = await read_json(request)
        body = parse_response(raw)
        agent = self._agent(None, body.model or await self._model_before(body))
        name = body.name
        if name is None and body.previous_response_id is None and body.store:
            name = conversation_name(request)
        ask = Ask(
            agent,
            _NOTHING,
            body.options(),
            fingerprint_of(request, raw, name),
            owner_of(request),
            name,
            await self._thread_behind(body.previous_response_id),
            route="POST /v1/responses",
        )
        body = await self._with_items(body)
        called = await self._called(ask, body)
        given = await self._streamer.while_there(request, read_input(body, self._fetch, called))
        said = given if isinstance(given, Conversation) else _NOTHING
        asks = isinstance(given, Conversation) and asks_for_itself(said)
        helper = self._parts.helper_prompts and asks
        name = None if helper else name
        ask = with_door(ask._replace(said=said), helper=helper, response=body.echo(raw, name))
        with _named_here():
            told = await (self._help(ask) if helper else self._answer(request, ask, body, given))
        self._readers.note(ask.fingerprint, told.reading)
        headers = {} if name is None else {"X-Conversation-Id": name}
        return await self._tell(request, told, body, headers)

    async def _model_before(self, body: ResponseBody) -> str:
        """Return who answers where nobody is named: who did before."""
        if body.previous_response_id is None:
            return ""
        run, _ = await self._found(body.previous_response_id, "previous_response_id")
        door = (await options_of(self._log, run)).door or {}
        return str(door.get("model", run.profile_id))

    async def _thread_behind(self, previous: str | None) -> str | None:
        """Return the thread that a response has, if one is named; raises GatewayError."""
        if previous is None:
            return None
        run, _ = await self._found(previous, "previous_response_id")
        return run.thread_id

    async def _with_items(self, body: ResponseBody) -> ResponseBody:
        """Return the request with the items that it only names; raises GatewayError."""
        if isinstance(body.input, str) or not any(map(referred, body.input)):
            return body
        outputs: dict[str, Mapping[str, Any]] = {}
        items: list[dict[str, Any]] = []
        size = 0
        for index, item in enumerate(body.input):
            if (name := referred(item)) is None:
                items.append(item)
                continue
            try:
                items.append(await self._item(name, outputs))
            except GatewayError as error:
                message = f"The field 'input.{index}.id' names no item that is kept: {name[:100]!r}"
                raise refuse("input", f"{message}. {error.message}") from None
            # One that is long may be named often.
            if (size := size + len(dumps(items[-1]))) > REFERRED_CHARS_MAX:
                raise refuse(
                    "input",
                    f"The items that 'input' names have more than {REFERRED_CHARS_MAX} characters.",
                )
        return body.model_copy(update={"input": items})

    async def _item(self, name: str, outputs: dict[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return an item of a response's output; raises GatewayError."""
        if name.isascii() and await self._log.permission(name) is not None:
            return {"type": "mcp_approval_request"}
        wanted = response_of_item(name) or name
        if wanted not in outputs:
            if len(outputs) == REFERRED_MAX:
                raise refuse("input", f"Items of more than {REFERRED_MAX} responses are named.")
            outputs[wanted] = await self._output(wanted)
        if (found := outputs[wanted].get(name)) is None:
            raise refuse("input", "Its response has no such item.")
        return dict(found)

    async def _output(self, wanted: str) -> Mapping[str, Any]:
        """Return the items of a response that can be gone on with, by their ids."""
        run, _ = await self._found(wanted, "input")
        thread = await self._log.thread(run.thread_id)
        if thread is None or thread.hidden:
            raise _no_response("input", wanted)
        parsed = parse_response_id(wanted)
        assert parsed is not None
        run, shape, after = await self._response_of(Told(Reading(*parsed), run))
        items = await self._now(run, shape, after)
        return {item["id"]: item for item in items.output}

    async def _called(self, ask: Ask, body: ResponseBody) -> Sequence[Mapping[str, Any]]:
        """Return the calls of which the input has but the results, as items.

        They are those that wait in the thread that the request goes on in, if these are meant.
        """
        if not (names := bare_results(body)):
            return ()
        thread_id = ask.thread_id
        if ask.name is not None:
            name, thread = await self._thread_of(ask.caller, ask.name)
            thread_id = name if thread is not None else None
        if thread_id is None:
            return ()  # To be refused by its place: the input has no such call.
        waiting = [
            call_id(Place(asked.run_id, asked.turn_index, number))
            for asked in await self._log.pending(thread_id=thread_id)
            if asked.kind == "client"
            for number in range(len((asked.question or {})["calls"]))
        ]
        meant = waiting if set(names) <= set(waiting) else dict.fromkeys(names)
        return [_bare_call(name) for name in meant]

    async def _answer(
        self,
        request: web.Request,
        ask: Ask,
        body: ResponseBody,
        given: Conversation | Approval,
    ) -> Told:
        """Start the run that a request asks for, go on with one, or join what it has started."""
        ask, joined = await self._joined(request, ask)
        if joined is not None:
            return Told(joined)
        if isinstance(given, Approval):
            return Told(await self._approved(given, body.previous_response_id))
        if body.previous_response_id is not None:
            return await self._go_on(request, ask, body.previous_response_id)
        if ask.name is None:
            if (handed_in := await self._waiting.hand_in_once(ask)) is not None:
                return Told(handed_in)
            start = self._start_of(ask, hidden=not body.store)
            return told_of(await self._engine.start(start), ask)
        thread_id, thread = await self._thread_of(ask.caller, ask.name)
        # Who names it by a header says all of it again each time, as with completions.
        if thread is not None and body.name is not None:
            ask = ask._replace(said=only_new(ask.said))
        return await self._begin_in(request, ask._replace(thread_id=thread_id), thread)

    async def _tell(
        self, request: web.Request, told: Told, body: ResponseBody, headers: dict[str, str]
    ) -> web.StreamResponse:
        run, shape, after = await self._response_of(told)
        sent = {"X-Run-Id": run.id, **headers}
        if body.stream:
            return await self._telling.stream(request, run, ResponseFrames(shape), after, sent)
        if body.background:
            items = await self._now(run, shape, after)
        else:
            items = Items(shape)
            await self._telling.read_whole(request, run, items, after)
        return web.json_response(items.response(), headers=sent, dumps=dumps)

    # -- going on

    async def _go_on(self, request: web.Request, ask: Ask, previous: str) -> Told:
        """Start a run behind a response: in its thread, or in a fork if that has gone on."""
        ask = ask._replace(said=only_new(ask.said))
        run, after = await self._found(previous, "previous_response_id")
        thread = await self._log.thread(run.thread_id)
        if thread is None or thread.hidden:
            raise _no_response("previous_response_id", previous)

        async def attempt() -> Started:
            return await self._start_behind(ask, run.id)

        if not run.terminal and (asked := await self._open_question(run)) is not None:
            if asked != await self._asked_after(run, after):
                raise GatewayError(
                    "permission_operation_mismatch",
                    "The run waits for an answer to something else that it has asked since then; "
                    f"GET /api/v1/runs/{run.id} shows what.",
                )
        elif run.terminal:
            thread = thread._replace(active_run_id=None)
        return await self._begin_in(request, ask, thread, attempt)

    async def _start_behind(self, ask: Ask, run_id: str) -> Started:
        run = await self._log.run(run_id)
        head = await self._log.head(run.stream) if run is not None else None
        if run is None or head is None:
            raise GatewayError("run_not_found", "The response before this one has been deleted.")
        if run.end_seq is None or head.last == run.end_seq:
            return await self._engine.start(self._start_of(ask, known=True))
        fork_id = self._parts.new_id("thread")
        try:
            await self._log.fork(run.thread_id, run.end_seq, fork_id)
        except Refused:
            raise GatewayError(
                "run_not_found", "The response before this one has been deleted."
            ) from None
        try:
            return await self._engine.start(
                self._start_of(ask._replace(thread_id=fork_id), known=True)
            )
        except GatewayError:
            with suppress(Refused):
                await self._log.delete(fork_id, "gateway")
            raise

    async def _approved(self, approval: Approval, previous: str | None) -> Reading:
        """Answer what a response has asked; return the response that follows."""
        asked = await self._log.permission(approval.request_id)
        if asked is None:
            raise GatewayError(
                "permission_request_not_found",
                f"There is no question {approval.request_id[:100]!r}.",
            )
        run = await self._log.active_run(Stream(asked.thread_id))
        if previous is not None:
            before_it, _ = await self._found(previous, "previous_response_id")
            if before_it.thread_id != asked.thread_id:
                raise refuse("input", "The question was not asked by 'previous_response_id'.")
        run = run or await self._log.run(asked.run_id)
        if run is None:
            raise GatewayError("run_not_found", "The run has been deleted.")
        decision = Decision(approval.approve, reason=approval.reason)
        return await self._waiting.decide(asked.thread_id, run.id, asked.request_id, decision)

    async def _open_question(self, run: Run) -> str | None:
        pending = await self._waiting.pending(run)
        return pending[0].request_id if pending else None

    async def _asked_after(self, run: Run, after: int) -> str | None:
        """Return what the response that begins behind an event ends with, if it is a question."""
        for event in await self._events(run, after, None):
            if event["type"] in ASKING:
                return str(event["requestId"])
        return None

    # -- what there is

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """Show a response as it is now, or stream it from a place on."""
        check_limited(request)
        wanted = request.match_info["response_id"]
        included = {*request.query.getall("include", ()), *request.query.getall("include[]", ())}
        if unknown := sorted(included - {*get_args(Included)}):
            raise refuse(
                "include", f"The field 'include' cannot be honoured: {unknown[0][:100]!r}."
            )
        run, _ = await self._found(wanted)
        parsed = parse_response_id(wanted)
        assert parsed is not None
        run, shape, after = await self._response_of(Told(Reading(*parsed), run))
        if request.query.get("stream") != "true":
            items = await self._now(run, shape, after)
            return web.json_response(items.response(), headers={"X-Run-Id": run.id}, dumps=dumps)
        starting_after = _whole_number(request, "starting_after", -1, 2**53)
        seen = (0, 0)
        if cursor := request.headers.get("Last-Event-ID"):
            seen = await self._telling.seen(run, cursor)
        frames = ResponseFrames(shape, starting_after, seen)
        return await self._telling.stream(request, run, frames, after, {"X-Run-Id": run.id})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """Stop the run that answers; return the response as it is then."""
        wanted = request.match_info["response_id"]
        run, after = await self._found(wanted)
        await self._engine.cancel(run.id, request[CALLER])
        parsed = parse_response_id(wanted)
        assert parsed is not None
        run, shape, _ = await self._response_of(Told(Reading(*parsed), run))
        items = Items(shape)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_S):
                await self._streamer.while_there(request, self._telling.read(items, run, after))
        return web.json_response(items.response(), dumps=dumps)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Remove a response without a trace, if nothing else is in its thread."""
        wanted = request.match_info["response_id"]
        run, _ = await self._found(wanted)
        thread = await self._log.thread(run.thread_id)
        head = await self._log.head(run.stream)
        follows = thread is not None and run.start_seq > thread.history_to
        goes_on = run.end_seq is not None and head is not None and head.last > run.end_seq
        if follows or goes_on:
            raise GatewayError(
                "invalid_request",
                "Other responses belong to the same conversation, and they are deleted together: "
                f"DELETE /api/v1/threads/{run.thread_id}.",
            )
        await self._engine.delete_thread(run.thread_id, request[CALLER])
        return web.json_response({"id": wanted, "object": "response", "deleted": True})

    async def input_items(self, request: web.Request) -> web.StreamResponse:
        """List what a response was given."""
        wanted = request.match_info["response_id"]
        run, after = await self._found(wanted)
        items = await self._input(run, after, wanted)
        if request.query.get("order", "desc") != "asc":
            items.reverse()
        if (cursor := request.query.get("after")) is not None:
            places = [place for place, item in enumerate(items, 1) if item["id"] == cursor]
            if not places:
                raise refuse("after", "The field 'after' must be the id of one of the items.")
            items = items[places[0] :]
        limit = _whole_number(request, "limit", PAGE, PAGE_MAX)
        page = items[: max(limit, 1)]
        answer = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
        return web.json_response(answer, dumps=dumps)

    async def _input(self, run: Run, after: int, wanted: str) -> list[Any]:
        """Return the input items of a response, the oldest first."""
        name = wanted.removeprefix("resp_")
        if after != run.start_seq:
            return input_items(name, (await self._events(run, after, after + 1)), {})
        begins, first = run.start_seq, run.start_seq + 1
        brought = ((await options_of(self._log, run, to=first)).door or {}).get("brought", 0)
        thread = await self._log.thread(run.thread_id)
        if thread is not None and thread.forked_from is None and thread.history_to == begins:
            begins = 0  # What the client has brought along.
        events = await self._events(run, begins, run.end_seq if brought else first)
        events = [
            event
            for event in events
            if event["seq"] <= first or event.get("turnIndex", brought) < brought
        ]
        files: dict[tuple[int, int], bytes] = {}
        for event in events:
            for index in range(len(event.get("attachments") or ())):
                data = await self._log.private_at(run.stream, event["seq"], "attachment", index)
                files[event["seq"], index] = data or b""
        return input_items(name, events, files)

    # -- reading

    async def _found(self, wanted: str, param: str | None = None) -> tuple[Run, int]:
        """Return a response's run, and where it begins. Raises GatewayError `run_not_found`."""
        parsed = parse_response_id(wanted)
        run = await self._log.run(parsed[0]) if parsed is not None else None
        if parsed is None or run is None or run.parent_run_id is not None:
            raise _no_response(param, wanted)
        after = run.start_seq if parsed[1] is None else parsed[1]
        if not run.start_seq <= after < (run.end_seq or after + 1):
            raise _no_response(param, wanted)
        return run, after

    async def _response_of(self, told: Told) -> tuple[Run, ResponseShape, int]:
        """Return a response's run, how it is told, and where it begins."""
        reading, run, options = told
        run = run or await self._log.run(reading.run_id)
        if run is None:
            raise GatewayError("run_not_found", "There is no such run.")
        after = run.start_seq if reading.after is None else reading.after
        door = (options or await options_of(self._log, run, to=after + 1)).door or {}
        echo = dict(door.get("response", {}))
        earlier = Before()
        if reading.after is not None:
            events = await self._events(run, run.start_seq, reading.after)
            earlier = before(run.id, events)
            echo["previous_response_id"] = earlier.previous
        shape = ResponseShape(
            id=response_id(run.id, reading.after),
            run_id=run.id,
            model=door.get("model", run.profile_id),
            created=run.accepted_at // 1000,
            echo=echo,
            json=door.get("json", False),
            has_tools=door.get("has_tools", True),
            brought=door.get("brought", 0),
            before=earlier,
        )
        return run, shape, after

    async def _now(self, run: Run, shape: ResponseShape, after: int) -> Items:
        """Return a response as far as it has come. Raises GatewayError when nothing is kept."""
        items, begun = Items(shape), False
        try:
            while (chunk := await self._log.chunk(run.stream, after)) is not None:
                await self._telling.bring_arguments(run, chunk, items.answer)
                for sent in sse.split(chunk.data):
                    items.take(sent)
                    begun = True
                    if items.answer.over:
                        return items
                after = chunk.last_seq
                if run.end_seq is not None and after >= run.end_seq:
                    break
        except Gone:
            begun = False
        if not begun or run.terminal:
            raise GatewayError("thread_deleted", "The response's events are not kept any more.")
        return items

    async def _events(self, run: Run, after: int, to: int | None) -> list[Mapping[str, Any]]:
        """Return the events of a run's stream behind one and up to another, without deltas."""
        events: list[Mapping[str, Any]] = []
        while records := await self._log.read(run.stream, after, deltas=False):
            for record in records:
                if to is not None and record.seq > to:
                    return events
                events.append(json.loads(record.payload))
            after = records[-1].seq
        return events


@contextlib.contextmanager
def _named_here() -> Iterator[None]:
    """Have what a model cannot do named as a response names it."""
    try:
        yield
    except GatewayError as error:
        for theirs, ours in _NAMES.items():
            if error.details.get("param") == theirs:
                error.details["param"] = ours
            error.message = error.message.replace(f"{theirs!r}", f"{ours!r}")
        raise


def _bare_call(name: str) -> dict[str, Any]:
    """Return a call that waits, as far as its result needs one."""
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}


def _no_response(param: str | None, wanted: str) -> GatewayError:
    message = f"There is no response {wanted[:100]!r}."
    return GatewayError("run_not_found", message, param=param)


def _whole_number(request: web.Request, name: str, default: int, most: int) -> int:
    """Return a number of the query; raises GatewayError."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > most:
        raise refuse(name, f"The field {name!r} must be a whole number from 0 to {most}.")
    return int(text)
