"""The native door, `/api/v1`: start a run, stream it, answer it, look at what there is.

The contract is docs/protocol.md.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from aiohttp import web

from ownware_gateway import __version__
from ownware_gateway.approvals import Decision
from ownware_gateway.auth import CALLER, LIMITED
from ownware_gateway.doors.native.answers import (
    agent_shape,
    answer,
    answer_to,
    model_shape,
    permission_shape,
    profile_shape,
    run_shape,
    thread_shape,
    usage_shape,
)
from ownware_gateway.doors.native.bodies import (
    BODY_BYTES_MAX,
    DecisionBody,
    ForkBody,
    ResumeBody,
    RunBody,
    ThreadBody,
    TitleBody,
    answer_of,
    files_of,
    flag,
    idempotency_key,
    page_limit,
    path_id,
    place,
    query,
    read_body,
    read_bytes,
)
from ownware_gateway.doors.native.files import export_header, parse_export
from ownware_gateway.doors.native.messages import messages
from ownware_gateway.doors.native.outputs import number, part_response, text_response
from ownware_gateway.doors.native.servers import ServerHandlers
from ownware_gateway.doors.native.services import ServiceHandlers
from ownware_gateway.engine import Engine, StartRun, deleted
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import (
    INBOX,
    ROOT,
    Head,
    Log,
    Permission,
    Refused,
    Run,
    RunQuery,
    Stream,
    ThreadQuery,
)
from ownware_gateway.mcp import Servers
from ownware_gateway.models import Catalogue
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.services import Services
from ownware_gateway.stream import Plan, Streamer, check_cursor, parse_cursor
from ownware_gateway.transcript import load

__all__ = ["BODY_BYTES_MAX", "Native", "NativeParts", "answer_to"]

_STATUSES: Final = (
    "active",
    "accepted",
    "running",
    "waiting",
    "cancel_requested",
    "succeeded",
    "failed",
    "cancelled",
    "timed_out",
)


class NativeParts(NamedTuple):
    """What the door opens onto."""

    engine: Engine
    log: Log
    streamer: Streamer
    catalogue: Catalogue
    profiles: Profiles
    servers: Servers
    services: Services
    missing: Callable[[Profile], Mapping[str, str]]
    uptime_s: Callable[[], float]
    new_id: Callable[[str], str]
    require_request_id: bool
    servers_may_be_added: bool


class Native(ServerHandlers, ServiceHandlers):
    """The handlers of the native door."""

    def __init__(self, parts: NativeParts) -> None:
        self._engine = parts.engine
        self._log = parts.log
        self._streamer = parts.streamer
        self._catalogue = parts.catalogue
        self._profiles = parts.profiles
        self._servers = parts.servers
        self._services = parts.services
        self._servers_may_be_added = parts.servers_may_be_added
        self._parts = parts

    def routes(self) -> list[web.RouteDef]:
        """Return every route of the door."""
        base = "/api/v1"
        stream = f"{base}/threads/{{thread_id}}/agents/{{agent_id}}/events"
        output = f"{base}/threads/{{thread_id}}/agents/{{agent_id}}/outputs/{{seq}}"
        decision = f"{base}/runs/{{run_id}}/permissions/{{request_id}}/decision"
        return [
            web.post(f"{base}/run", self.start),
            web.get(f"{base}/runs", self.runs),
            web.get(f"{base}/runs/{{run_id}}", self.run),
            web.get(f"{base}/runs/{{run_id}}/events", self.run_events, allow_head=False),
            web.post(f"{base}/runs/{{run_id}}/cancel", self.cancel),
            web.post(decision, self.decide),
            web.get(f"{base}/threads", self.threads),
            web.post(f"{base}/threads", self.make_thread),
            web.post(f"{base}/threads/import", self.adopt),
            web.get(f"{base}/threads/{{thread_id}}", self.thread),
            web.patch(f"{base}/threads/{{thread_id}}", self.rename),
            web.delete(f"{base}/threads/{{thread_id}}", self.delete),
            web.post(f"{base}/threads/{{thread_id}}/fork", self.fork),
            web.get(f"{base}/threads/{{thread_id}}/export", self.export, allow_head=False),
            web.get(f"{base}/threads/{{thread_id}}/messages", self.messages),
            web.get(f"{base}/threads/{{thread_id}}/agents", self.agents),
            web.post(f"{base}/threads/{{thread_id}}/resume", self.resume),
            web.post(f"{base}/threads/{{thread_id}}/abort", self.abort),
            web.get(stream, self.thread_events, allow_head=False),
            web.get(f"{stream}/history", self.history),
            web.get(output, self.output),
            web.get(f"{output}/{{index}}", self.output_part),
            web.get(f"{base}/approvals", self.approvals),
            web.get(f"{base}/approvals/events", self.approval_events, allow_head=False),
            web.get(f"{base}/models", self.models),
            web.get(f"{base}/usage", self.usage),
            web.get(f"{base}/profiles", self.list_profiles),
            web.get(f"{base}/profiles/{{profile_id}}", self.profile),
            *self.server_routes(f"{base}/mcp"),
            *self.service_routes(base),
            web.get(f"{base}/health", self.health),
            web.get(f"{base}/ready", self.ready),
        ]

    # -- runs

    async def start(self, request: web.Request) -> web.Response:
        """Start a run; the answer comes once its first event is durable."""
        body = await read_body(request, RunBody)
        wanted = StartRun(
            profile_id=body.profile_id,
            prompt=body.prompt,
            model=body.model,
            thread_id=body.thread_id,
            files=files_of(body),
            key=idempotency_key(request, body),
            skills=[skill.id for skill in body.active_context.skills]
            if body.active_context is not None
            else (),
        )
        started = await self._engine.start(wanted)
        run = started.run
        shape: dict[str, Any] = {
            "runId": run.id,
            "threadId": run.thread_id,
            "agentId": run.agent_id,
            "profileId": run.profile_id,
            "model": run.model,
            # What it is when the answer is first given; a repeated answer says the same.
            "status": "accepted",
            "startSeq": run.start_seq,
            "timeoutMs": run.timeout_ms,
        }
        if started.fallback is not None:
            shape["fallback"] = started.fallback.model_dump()
        response = answer(shape, Location=f"/api/v1/runs/{run.id}/events")
        if started.replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return response

    async def runs(self, request: web.Request) -> web.Response:
        """List runs, newest first."""
        values = query(request, "status", "threadId", "limit", "cursor")
        status = values.get("status")
        if status is not None and status not in _STATUSES:
            raise GatewayError(
                "invalid_request", f"The parameter 'status' must be one of: {', '.join(_STATUSES)}."
            )
        limit = page_limit(values)
        before = place(values, r"[0-9]{1,18}")
        found = await self._log.runs(
            RunQuery(status, values.get("threadId"), before and int(before), limit)
        )
        items = [run_shape(run, await self._pending(run)) for _, run in found]
        return answer({"items": items, "nextCursor": _next([str(key) for key, _ in found], limit)})

    async def run(self, request: web.Request) -> web.Response:
        """Show a run."""
        run = await self._find_run(request)
        return answer(run_shape(run, await self._pending(run)))

    async def _pending(self, run: Run) -> list[Permission]:
        """Return what a run waits for: the question of an agent, too, that works for it."""
        if run.terminal:
            return []
        pending = await self._log.pending(thread_id=run.thread_id)
        return [asked for asked in pending if await self._works_for(asked.run_id, run)]

    async def cancel(self, request: web.Request) -> web.Response:
        """Ask a run to stop."""
        run_id = path_id(request, "run_id")
        run, outcome = await self._engine.cancel(run_id, request[CALLER])
        return answer(
            {
                "runId": run.id,
                "status": run.status,
                "terminal": run.terminal,
                "cancellation": outcome,
            },
            200 if outcome == "already_terminal" else 202,
        )

    async def abort(self, request: web.Request) -> web.Response:
        """Ask the thread's active run to stop."""
        thread_id = await self._find_thread_id(request)
        run = await self._log.active_run(Stream(thread_id))
        requested = False
        if run is not None:
            _, outcome = await self._engine.cancel(run.id, request[CALLER])
            requested = outcome != "already_terminal"
        return answer({"aborted": True, "cancelRequested": requested, "threadId": thread_id})

    async def run_events(self, request: web.Request) -> web.StreamResponse:
        """Stream one run, from its first event to its last."""
        if (limited := request.get(LIMITED)) is not None:
            return await self._streamer.refuse(request, "rate_limited", limited)
        plan = await self._run_plan(request)
        if plan is None:
            # What tells an EventSource to stop coming back.
            return web.Response(status=204)
        return await self._streamer.respond(request, plan)

    async def _run_plan(self, request: web.Request) -> Plan | None:
        """Return what to stream of a run; None when an EventSource has all of it."""
        values = query(request, "since")
        run = await self._find_run(request)
        head = await self._log.head(run.stream)
        assert head is not None, run
        last_event_id = request.headers.get("Last-Event-ID")
        reset = None
        since = run.start_seq
        if last_event_id:
            try:
                since = _within(run, await self._place(run.stream, head, last_event_id))
            except GatewayError as error:
                reset = _reset(error, head)
            if reset is None and run.end_seq is not None and since >= run.end_seq:
                return None
        elif "since" in values:
            since = _within(run, await self._place(run.stream, head, values["since"]))
        return Plan(run.stream, head, since, run, reset=reset)

    # -- threads

    async def threads(self, request: web.Request) -> web.Response:
        """List threads, most recently changed first."""
        values = query(request, "profileId", "limit", "cursor", "hidden")
        limit = page_limit(values)
        before = place(values, r"[0-9]{1,18}\.[0-9]{1,18}")
        hidden = flag(values, "hidden", default=False)
        found = await self._log.threads(ThreadQuery(values.get("profileId"), before, limit, hidden))
        items = [thread_shape(thread) for _, thread in found]
        return answer({"items": items, "nextCursor": _next([key for key, _ in found], limit)})

    async def make_thread(self, request: web.Request) -> web.Response:
        """Make an empty thread."""
        body = await read_body(request, ThreadBody)
        profile_id = body.profile_id
        if profile_id is not None:
            profile_id = self._profiles.get(profile_id).name
        thread = await self._log.make_thread(
            self._parts.new_id("thread"), title=body.title, profile_id=profile_id
        )
        return answer(thread_shape(thread), 201, Location=f"/api/v1/threads/{thread.id}")

    async def thread(self, request: web.Request) -> web.Response:
        """Show a thread."""
        thread = await self._log.thread(await self._find_thread_id(request))
        assert thread is not None
        return answer(thread_shape(thread))

    async def rename(self, request: web.Request) -> web.Response:
        """Give a thread another title."""
        thread_id = await self._find_thread_id(request)
        body = await read_body(request, TitleBody)
        await self._log.rename(thread_id, body.title)
        return await self.thread(request)

    async def delete(self, request: web.Request) -> web.Response:
        """Delete a thread for good, its run first."""
        thread_id = await self._find_thread_id(request)
        forks = await self._engine.delete_thread(thread_id, request[CALLER])
        return answer({"threadId": thread_id, "deleted": True, "forks": forks})

    async def fork(self, request: web.Request) -> web.Response:
        """Make a thread that begins as a copy of this one."""
        thread_id = await self._find_thread_id(request)
        body = await read_body(request, ForkBody)
        try:
            thread = await self._log.fork(thread_id, body.at_seq, self._parts.new_id("thread"))
        except Refused:
            raise GatewayError(
                "invalid_request",
                f"No run ends at {body.at_seq}: 'atSeq' must be the endSeq of a run, or 0.",
            ) from None
        return answer(thread_shape(thread), 201, Location=f"/api/v1/threads/{thread.id}")

    async def export(self, request: web.Request) -> web.StreamResponse:
        """Send a thread as a file, one event a line."""
        thread_id = await self._find_thread_id(request)
        thread = await self._log.thread(thread_id)
        assert thread is not None
        response = web.StreamResponse(
            headers={"Content-Disposition": f'attachment; filename="{thread_id}.jsonl"'}
        )
        response.content_type = "application/x-ndjson"
        await response.prepare(request)
        await response.write(export_header(thread))
        after = 0
        while records := await self._log.read(Stream(thread_id), after):
            await response.write(b"".join(record.payload + b"\n" for record in records))
            after = records[-1].seq
        await response.write_eof()
        return response

    async def adopt(self, request: web.Request) -> web.Response:
        """Make a thread of an exported file: history, which is never driven."""
        title, events = parse_export(await read_bytes(request))
        thread = await self._log.adopt(self._parts.new_id("thread"), title, events)
        return answer(thread_shape(thread), 201, Location=f"/api/v1/threads/{thread.id}")

    async def messages(self, request: web.Request) -> web.Response:
        """Show a thread's conversation, folded from its log."""
        thread_id = await self._find_thread_id(request)
        return answer(messages(await load(self._log, Stream(thread_id), files=False)))

    async def agents(self, request: web.Request) -> web.Response:
        """List the agents that have a stream in a thread."""
        thread_id = await self._find_thread_id(request)
        runs = await self._log.agent_runs(thread_id)
        agents_of = {run.id: run.agent_id for run in runs.values()}
        agents = [
            agent_shape(agent_id, head, runs.get(agent_id), agents_of)
            for agent_id, head in await self._log.agents(thread_id)
        ]
        return answer({"threadId": thread_id, "count": len(agents), "agents": agents})

    async def thread_events(self, request: web.Request) -> web.StreamResponse:
        """Stream a thread's agent: what has happened, then what happens."""
        if (limited := request.get(LIMITED)) is not None:
            return await self._streamer.refuse(request, "rate_limited", limited)
        # Planned apart: what a stream's frames hold, it holds for as long as it is open.
        return await self._streamer.respond(request, await self._thread_plan(request))

    async def _thread_plan(self, request: web.Request) -> Plan:
        values = query(request, "since", "follow")
        stream, head = await self._find_stream(request)
        # An agent that was spawned has one run, and nothing follows that.
        follow = flag(values, "follow", default=True) and stream.agent_id == ROOT
        return await self._from(request, Plan(stream, head, head.earliest - 1, follow=follow))

    async def _from(self, request: web.Request, plan: Plan) -> Plan:
        """Return the plan from where the request says.

        A header that comes by itself is never refused.
        """
        last_event_id = request.headers.get("Last-Event-ID")
        if last_event_id:
            try:
                since = await self._place(plan.stream, plan.head, last_event_id)
                plan = plan._replace(since=since)
            except GatewayError as error:
                plan = plan._replace(reset=_reset(error, plan.head))
        elif "since" in request.query:
            since = await self._place(plan.stream, plan.head, request.query["since"])
            plan = plan._replace(since=since)
        return plan

    async def _place(self, stream: Stream, head: Head, text: str) -> int:
        """Return where a cursor says to read on; raises GatewayError when that is nowhere."""
        since = check_cursor(parse_cursor(text), head)
        if since and (end := await self._log.gap(stream, since)) is not None:
            raise GatewayError(
                "cursor_expired",
                "What follows this cursor is not kept any more; read on from the end of the gap.",
                earliestRetainedCursor=end,
            )
        return since

    async def history(self, request: web.Request) -> web.Response:
        """Show a page of a stream as JSON."""
        values = query(request, "since", "limit")
        stream, head = await self._find_stream(request)
        since = head.earliest - 1
        if "since" in values:
            since = await self._place(stream, head, values["since"])
        records = await self._log.read(stream, since, limit=page_limit(values, 500))
        return answer(
            {
                "threadId": stream.thread_id,
                "agentId": stream.agent_id,
                "since": since,
                "count": len(records),
                "maxSeq": head.last,
                "epoch": head.epoch,
                "events": [json.loads(record.payload) for record in records],
            }
        )

    async def output(self, request: web.Request) -> web.Response:
        """Send all of the text that a tool call gave back."""
        query(request)
        stream, _ = await self._find_stream(request)
        return await text_response(self._log, stream, number(request, "seq"))

    async def output_part(self, request: web.Request) -> web.Response:
        """Send the bytes of a part of what a tool call gave back."""
        query(request)
        stream, _ = await self._find_stream(request)
        seq, index = number(request, "seq"), number(request, "index")
        return await part_response(self._log, stream, seq, index)

    # -- people's answers

    async def resume(self, request: web.Request) -> web.Response:
        """Answer the question that a thread's run waits for."""
        thread_id = path_id(request, "thread_id")
        if await self._log.tombstone(thread_id) is not None:
            raise deleted(thread_id)
        body = await read_body(request, ResumeBody)
        if self._parts.require_request_id and body.request_id is None:
            raise GatewayError("invalid_request", "The field 'requestId' is required here.")
        granted = body.action != "deny"
        decision = Decision(
            granted,
            always=body.action == "always",
            operation_hash=body.operation_hash,
            answer=answer_of(body),
        )
        asked = await self._engine.approvals.decide(thread_id, body.request_id, decision)
        pending = await self._log.pending(thread_id=thread_id)
        return answer(
            {
                "threadId": thread_id,
                "requestId": asked.request_id,
                "action": body.action,
                "approved": granted,
                "pendingCount": len(pending),
            }
        )

    async def decide(self, request: web.Request) -> web.Response:
        """Decide one exact operation of a run."""
        run = await self._find_run(request)
        request_id = path_id(request, "request_id")
        body = await read_body(request, DecisionBody)
        found = await self._log.permission(request_id)
        if found is None or not await self._works_for(found.run_id, run):
            raise GatewayError(
                "permission_request_not_found", f"The run has no question {request_id!r}."
            )
        granted = body.decision == "approve"
        decision = Decision(granted, operation_hash=body.operation_hash)
        asked = await self._engine.approvals.decide(run.thread_id, request_id, decision)
        return answer(
            {
                "runId": run.id,
                "requestId": asked.request_id,
                "decision": body.decision,
                "approved": granted,
            }
        )

    async def approvals(self, request: web.Request) -> web.Response:
        """List every question that waits for a person, over all threads."""
        values = query(request, "status")
        if values.get("status", "pending") != "pending":
            raise GatewayError("invalid_request", "The parameter 'status' must be pending.")
        head = await self._log.head(Stream(INBOX))
        assert head is not None
        # Asked after the head: what comes later is in the stream that goes on from there.
        # What waits for a client is nothing that a person could decide.
        asked = [item for item in await self._log.pending() if item.kind != "client"]
        items = [permission_shape(item) for item in asked]
        return answer({"items": items, "cursor": f"{head.epoch}.{head.last}"})

    async def approval_events(self, request: web.Request) -> web.StreamResponse:
        """Stream what people are asked, and their answers, over all threads."""
        if (limited := request.get(LIMITED)) is not None:
            return await self._streamer.refuse(request, "rate_limited", limited)
        query(request, "since")
        head = await self._log.head(Stream(INBOX))
        assert head is not None
        plan = await self._from(request, Plan(Stream(INBOX), head, head.earliest - 1))
        return await self._streamer.respond(request, plan)

    # -- what there is

    async def models(self, request: web.Request) -> web.Response:
        """List the models, the usable ones first."""
        query(request)
        return answer([model_shape(model) for model in await self._catalogue.list()])

    async def usage(self, request: web.Request) -> web.Response:
        """Show what a profile's runs have spent today, and what they may."""
        profile_id = query(request, "profileId").get("profileId")
        if profile_id is None:
            raise GatewayError("invalid_request", "The parameter 'profileId' is missing.")
        profile = self._profiles.get(profile_id)
        spent, resets_at = await self._engine.budgets.today(profile)
        return answer(usage_shape(profile, spent, resets_at))

    async def list_profiles(self, request: web.Request) -> web.Response:
        """List the profiles, and what is wrong with those that cannot be used."""
        query(request)
        return answer(
            {
                "items": [self._profile_shape(profile) for profile in self._profiles.all()],
                "broken": [
                    {"folder": item.folder, "message": item.message}
                    for item in self._profiles.broken()
                ],
                "warnings": [
                    {"folder": item.folder, "message": item.message}
                    for item in self._profiles.warnings()
                ],
            }
        )

    async def profile(self, request: web.Request) -> web.Response:
        """Show a profile."""
        return answer(self._profile_shape(self._profiles.get(path_id(request, "profile_id"))))

    def _profile_shape(self, profile: Profile) -> dict[str, Any]:
        missing = dict.fromkeys(self._parts.missing(profile).values())
        return {**profile_shape(profile), "missing": list(missing)}

    async def health(self, request: web.Request) -> web.Response:
        """Say that the process answers; never needs a token."""
        uptime = round(self._parts.uptime_s(), 3)
        return answer({"status": "healthy", "version": __version__, "uptime": uptime})

    async def ready(self, request: web.Request) -> web.Response:
        """Say whether work can be taken, and what is missing if not."""
        missing = await self._engine.missing()
        ready = not missing
        return answer({"ready": ready, "missing": missing}, 200 if ready else 503)

    # -- finding things

    async def _works_for(self, run_id: str, run: Run) -> bool:
        """Whether a run is this one, or an agent's that works for it."""
        found: str | None = run_id
        while found is not None and found != run.id:
            above = await self._log.run(found)
            found = above.parent_run_id if above is not None else None
        return found is not None

    async def _find_run(self, request: web.Request) -> Run:
        run_id = path_id(request, "run_id")
        run = await self._log.run(run_id)
        if run is None:
            raise GatewayError("run_not_found", f"There is no run {run_id!r}.")
        return run

    async def _find_thread_id(self, request: web.Request) -> str:
        thread_id = path_id(request, "thread_id")
        if await self._log.thread(thread_id) is None:
            if await self._log.tombstone(thread_id) is not None:
                raise deleted(thread_id)
            raise GatewayError("not_found", f"There is no thread {thread_id!r}.")
        return thread_id

    async def _find_stream(self, request: web.Request) -> tuple[Stream, Head]:
        stream = Stream(path_id(request, "thread_id"), path_id(request, "agent_id"))
        head = await self._log.head(stream)
        if head is None:
            await self._find_thread_id(request)
            raise GatewayError(
                "not_found", f"The thread has no agent {stream.agent_id!r} with a stream."
            )
        return stream, head


def _within(run: Run, seq: int) -> int:
    """Return a cursor of the run's interval; raises GatewayError for one outside of it."""
    if seq < run.start_seq or (run.end_seq is not None and seq > run.end_seq):
        raise GatewayError(
            "cursor_mismatch",
            "The cursor is outside of this run; the thread's stream has what is before and after.",
            runStartSeq=run.start_seq,
            runEndSeq=run.end_seq,
        )
    return seq


def _reset(error: GatewayError, head: Head) -> dict[str, Any]:
    return {
        "reason": error.code,
        "earliestRetainedCursor": head.earliest - 1,
        "highWaterCursor": head.last,
    }


def _next(positions: list[str], limit: int) -> str | None:
    return positions[-1] if len(positions) == limit else None
