"""Errors in OpenAI's envelope (https://platform.openai.com/docs/guides/error-codes)."""

import json
import logging
import math
import uuid
from typing import Any, Final, NamedTuple

from aiohttp import web

from ownware_gateway.errors import GatewayError
from ownware_gateway.masking import Masker
from ownware_gateway.models import ModelError

CORRELATION: Final = "X-Ownware-Correlation-Id"

#: What some of the gateway's codes are called here, with the status that clients expect for them.
_CODES: Final = {
    "unauthorized": (401, "invalid_api_key"),
    "unknown_model": (404, "model_not_found"),
    "rate_limited": (429, "rate_limit_exceeded"),
}

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

#: The types of a run's failure that are not the server's.
_FAILURES: Final = {"timed_out": 504, "provider_error": 502}

_MISPLACED: Final = {
    404: ("not_found", "There is nothing at this path; docs/openai.md lists the routes."),
    405: ("method_not_allowed", "The path does not take this method; see the Allow header."),
    413: ("payload_too_large", "The body is larger than this gateway takes."),
}

_KEYS: Final = Masker()

_log: Final = logging.getLogger(__name__)


class Wrong(NamedTuple):
    """What went wrong, as a client is told it."""

    status: int
    code: str
    message: str
    param: str | None = None

    def envelope(self) -> dict[str, Any]:
        """Return the object that bodies and frames hold."""
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            # It may quote what the caller sent, and that may hold a key by mistake.
            "message": _KEYS.text(self.message),
            "type": _TYPES.get(self.status, server),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class Failed(Exception):
    """A run came to nothing after it had been started; never to be tried again by itself."""

    def __init__(self, wrong: Wrong, run_id: str) -> None:
        super().__init__(wrong.message)
        self.wrong = wrong
        self.run_id = run_id


def refuse(param: str, message: str, code: str = "invalid_request") -> GatewayError:
    """Return the error for a request of which `param` is wrong."""
    return GatewayError(code, message, param=param)


def run_failed(code: str, message: str) -> Wrong:
    """Return what is said of a run that failed."""
    return Wrong(_FAILURES.get(code, 500), code, message)


def wrong_of(error: GatewayError) -> Wrong:
    """Return what is said of a refusal."""
    status, code = _CODES.get(error.code, (error.status, error.code))
    return Wrong(status, code, error.message, error.details.get("param"))


def answer_to(request: web.Request, error: Exception) -> web.StreamResponse:
    """Return the envelope for whatever went wrong in a request; call it where it was caught.

    Raises what is no error, or has nobody to be told to.
    """
    match error:
        case GatewayError():
            return _answer(wrong_of(error), _headers_of(error))
        case Failed():
            # After a restart the run goes on, and a retry joins it.
            final = {} if error.wrong.code == "shutting_down" else _FINAL
            return _answer(error.wrong, {"X-Run-Id": error.run_id, **final})
        case ModelError():
            return _answer(Wrong(502, error.code, error.message), {})
        case web.HTTPException() if error.status >= 400:
            wrong = ("invalid_request", "The request is wrong.")
            code, message = _MISPLACED.get(error.status, wrong)
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return _answer(Wrong(error.status, code, message), allow)
        case web.HTTPException() | ConnectionError():
            raise error
        case _:
            # Nothing internal may leave; the log has it all.
            _log.exception("%s %s failed", request.method, request.path)
            message = "Something went wrong inside the gateway; its log says what."
            return _answer(Wrong(500, "internal", message), {})


#: OpenAI's clients would send again what has been tried often enough.
_FINAL: Final = {"x-should-retry": "false"}


def _headers_of(error: GatewayError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 409:
        # They take every conflict for one that passes; these have been waited for already.
        headers |= _FINAL
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    if (run_id := error.details.get("runId")) is not None:
        headers["X-Run-Id"] = run_id
    return headers


def _answer(wrong: Wrong, headers: dict[str, str]) -> web.Response:
    correlation_id = str(uuid.uuid4())
    level = logging.ERROR if wrong.status >= 500 else logging.INFO
    _log.log(level, "%s %s: %s", correlation_id, wrong.code, _KEYS.text(wrong.message))
    return web.Response(
        body=json.dumps(wrong.envelope(), ensure_ascii=False).encode("utf-8", "replace"),
        status=wrong.status,
        content_type="application/json",
        headers={CORRELATION: correlation_id, **headers},
    )
