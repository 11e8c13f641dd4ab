"""What goes out through the native door: JSON shapes, and the one translation of errors."""

import json
import logging
import math
import uuid
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from pydantic.alias_generators import to_camel

from ownware_gateway.errors import GatewayError
from ownware_gateway.log import ROOT, Permission, Run, Spent, Thread
from ownware_gateway.masking import Masker
from ownware_gateway.models import ModelInfo
from ownware_gateway.profile import Profile

CORRELATION: Final = "X-Ownware-Correlation-Id"

#: What an error of the HTTP layer itself is called here.
_HTTP_CODES: Final = {
    404: ("not_found", "There is nothing at this path; docs/protocol.md lists the routes."),
    405: ("method_not_allowed", "The path does not take this method; see the Allow header."),
    413: ("payload_too_large", "The body is larger than this gateway takes."),
}

#: Recognises keys by their shape.
_KEYS: Final = Masker()

_log: Final = logging.getLogger(__name__)


def answer(value: Any, status: int = 200, **headers: str) -> web.Response:
    """Return a value as JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return web.Response(
        body=text.encode("utf-8", "replace"),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def error_answer(error: GatewayError, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error as the envelope that every client gets, and log it under the same id."""
    correlation_id = str(uuid.uuid4())
    # A message may quote what the caller sent, and that may hold a key by mistake.
    message = _KEYS.text(error.message)
    level = logging.ERROR if error.status >= 500 else logging.INFO
    _log.log(level, "%s %s: %s", correlation_id, error.code, message)
    extra = {CORRELATION: correlation_id, **(headers or {})}
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.code == "unauthorized":
        extra["WWW-Authenticate"] = "Bearer"
    body = {
        **error.details,
        "error": error.code,
        "message": message,
        "category": error.category,
        "correlationId": correlation_id,
    }
    return answer(body, error.status, **extra)


def answer_to(request: web.Request, error: Exception) -> web.StreamResponse:
    """Return the envelope for whatever went wrong in a request; call it where it was caught.

    Raises what is no error, or has nobody to be told to.
    """
    match error:
        case GatewayError():
            return error_answer(error)
        case web.HTTPException() if error.status >= 400:
            wrong = ("invalid_request", "The request is wrong.")
            code, message = _HTTP_CODES.get(error.status, wrong)
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            return error_answer(GatewayError(code, message), allow)
        case web.HTTPException() | ConnectionError():
            raise error
        case _:
            # Nothing internal may leave; the log has it all.
            _log.exception("%s %s failed", request.method, request.path)
            message = "Something went wrong inside the gateway; its log says what."
            return error_answer(GatewayError("internal", message))


def run_shape(run: Run, pending: list[Permission]) -> dict[str, Any]:
    """Return a run as `GET /runs/{runId}` shows it."""
    return {
        "runId": run.id,
        "threadId": run.thread_id,
        "agentId": run.agent_id,
        "parentRunId": run.parent_run_id,
        "profileId": run.profile_id,
        "model": run.model,
        "status": run.status,
        "terminal": run.terminal,
        "acceptedAt": run.accepted_at,
        "startedAt": run.started_at,
        "updatedAt": run.updated_at,
        "terminalAt": run.terminal_at,
        "cancelRequestedAt": run.cancel_requested_at,
        "startSeq": run.start_seq,
        "endSeq": run.end_seq,
        "timeoutMs": run.timeout_ms,
        "code": run.code,
        "usage": run.usage.model_dump(),
        "pendingPermissions": [permission_shape(item) for item in pending],
    }


def agent_shape(
    agent_id: str, head: int, run: Run | None, agents: Mapping[str, str]
) -> dict[str, Any]:
    """Return an agent that has a stream; `agents` tells whose the thread's runs are."""
    return {
        "agentId": agent_id,
        "parentAgentId": agents.get(run.parent_run_id or "", ROOT) if run and run.name else None,
        "name": run.name if run is not None else None,
        "profileId": run.profile_id if run is not None else None,
        "runId": run.id if run is not None else None,
        "status": run.status if run is not None else None,
        "maxSeq": head,
    }


def permission_shape(asked: Permission) -> dict[str, Any]:
    """Return what is asked of a person, of either kind; one that waits has what it asks."""
    row = asked._asdict()
    words = row.pop("question") or {}
    return {"kind": asked.kind, **{to_camel(name): value for name, value in row.items()}, **words}


def thread_shape(thread: Thread) -> dict[str, Any]:
    """Return a thread."""
    return {
        **{to_camel(name): value for name, value in thread._asdict().items()},
        "status": "active" if thread.active_run_id is not None else "idle",
    }


def model_shape(model: ModelInfo) -> dict[str, Any]:
    """Return an entry of `GET /models`."""
    return {to_camel(name): value for name, value in model._asdict().items()}


def usage_shape(profile: Profile, spent: Spent, resets_at: int) -> dict[str, Any]:
    """Return what a profile's runs have spent today, as `GET /usage` shows it."""
    budgets = profile.execution.per_day.model_dump(mode="json")
    return {
        "profileId": profile.name,
        "resetsAt": resets_at,
        **{to_camel(name): value for name, value in spent._asdict().items()},
        "perDay": budgets,
    }


def profile_shape(profile: Profile) -> dict[str, Any]:
    """Return a profile as its files say, under the id that a run names."""
    shape = {"id": profile.name, **profile.model_dump(mode="json")}
    shape["skills"]["names"] = list(profile.listed)
    shape["tools"]["mcp"] = {name: server.shown() for name, server in profile.tools.mcp.items()}
    services = profile.tools.services.items()
    shape["tools"]["services"] = {name: service.shown() for name, service in services}
    shape["tools"]["custom"] = profile.tools.custom.shown()
    return shape
