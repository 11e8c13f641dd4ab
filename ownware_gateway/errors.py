"""Every error that the gateway tells anybody about: a code, a sentence, and what the code means."""

from typing import Any, Final, Literal

Category = Literal[
    "invalid_request", "auth", "not_found", "conflict", "rate_limit", "overload", "internal"
]

#: What each code answers over HTTP. docs/protocol.md describes every one; a test holds it complete.
CODES: Final[dict[str, tuple[int, Category]]] = {
    "invalid_request": (400, "invalid_request"),
    "cursor_invalid": (400, "invalid_request"),
    "idempotency_key_invalid": (400, "invalid_request"),
    "unknown_model": (400, "invalid_request"),
    "unauthorized": (401, "auth"),
    "forbidden_host": (403, "auth"),
    "forbidden_origin": (403, "auth"),
    "forbidden_proxy": (403, "auth"),
    "forbidden_server": (403, "auth"),
    "not_found": (404, "not_found"),
    "run_not_found": (404, "not_found"),
    "output_not_found": (404, "not_found"),
    "permission_request_not_found": (404, "not_found"),
    "method_not_allowed": (405, "invalid_request"),
    "payload_too_large": (413, "invalid_request"),
    "unsupported_media_type": (415, "invalid_request"),
    "body_timeout": (408, "invalid_request"),
    "run_in_progress": (409, "conflict"),
    "cursor_ahead": (409, "conflict"),
    "cursor_mismatch": (409, "conflict"),
    "idempotency_conflict": (409, "conflict"),
    "nothing_pending": (409, "conflict"),
    "server_exists": (409, "conflict"),
    "permission_already_decided": (409, "conflict"),
    "permission_operation_mismatch": (409, "conflict"),
    "cursor_expired": (410, "not_found"),
    "thread_deleted": (410, "not_found"),
    "rate_limited": (429, "rate_limit"),
    "budget_exceeded": (429, "rate_limit"),
    "internal": (500, "internal"),
    "shutting_down": (503, "overload"),
    "overloaded": (503, "overload"),
}


class GatewayError(Exception):
    """Something that a person can act on; each door translates it once.

    `details` are extra fields of the answer (camelCase, as on the wire); `retry_after_s` becomes
    the `Retry-After` header.
    """

    def __init__(
        self, code: str, message: str, *, retry_after_s: float | None = None, **details: Any
    ) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.details = details

    @property
    def status(self) -> int:
        """The HTTP status of the code."""
        return CODES[self.code][0]

    @property
    def category(self) -> Category:
        """The code's category, as in the error envelope."""
        return CODES[self.code][1]


class BootError(Exception):
    """The gateway cannot start as asked; the message is the one sentence the terminal shows."""
