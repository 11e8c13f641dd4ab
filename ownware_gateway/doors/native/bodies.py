"""What comes in through the native door: bodies, ids, queries; strict, with errors that help."""

import base64
import binascii
import hashlib
import json
import re
from typing import Any, Final, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from ownware_gateway.auth import CALLER
from ownware_gateway.doors import body_of
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import IdempotencyKey
from ownware_gateway.models import File
from ownware_gateway.profile.explain import explain

#: The largest body of a request; attachments stand in it as base64, a third larger.
BODY_BYTES_MAX: Final = 32 * 1_048_576
PROMPT_CHARS_MAX: Final = 1_048_576
ATTACHMENTS_MAX: Final = 8
ATTACHMENT_BYTES_MAX: Final = 4 * 1_048_576
SKILLS_MAX: Final = 8
PAGE_MAX: Final = 500
KEY_CHARS_MAX: Final = 255

#: The longest answer of a person to a question, in UTF-8.
ANSWER_BYTES_MAX: Final = 16_384

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_JSON_TYPE: Final = re.compile(r"application/(?:[\w.-]+\+)?json", re.ASCII)

_Body = TypeVar("_Body", bound=BaseModel)


class Body(BaseModel):
    """A request body: camelCase, no field that is not known, no value of another type."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        defer_build=True,
    )


class AttachmentBody(Body):
    """A file that comes with a prompt; `data` is base64."""

    filename: str = Field(min_length=1, max_length=255, pattern=r"^[^/\\\x00-\x1f]+$")
    data: str
    mime_type: str = Field(pattern=r"^[\w.+-]+/[\w.+-]+$", max_length=127)


class SkillBody(Body):
    """A skill, by its name in `id`; `name` is what a client calls it, and is not looked at."""

    id: str = Field(min_length=1, max_length=64)
    name: str | None = Field(default=None, max_length=256)


class ContextBody(Body):
    """What a run has in its system prompt beside what its profile says."""

    skills: list[SkillBody] = Field(default_factory=list, max_length=SKILLS_MAX)


class RunBody(Body):
    """`POST /run`."""

    profile_id: str = Field(min_length=1, max_length=128)
    prompt: str = Field(min_length=1, max_length=PROMPT_CHARS_MAX)
    model: str | None = Field(default=None, min_length=1, max_length=256)
    thread_id: str | None = Field(default=None, pattern=f"^{_ID.pattern}$")
    attachments: list[AttachmentBody] = Field(default_factory=list, max_length=ATTACHMENTS_MAX)
    active_context: ContextBody | None = None


class ResumeBody(Body):
    """`POST /threads/{threadId}/resume`."""

    action: Literal["approve", "deny", "always", "answer"]
    request_id: str | None = Field(default=None, pattern=f"^{_ID.pattern}$")
    operation_hash: str | None = Field(default=None, min_length=1, max_length=128)
    answer: str | None = None


class DecisionBody(Body):
    """`POST /runs/{runId}/permissions/{requestId}/decision`."""

    decision: Literal["approve", "deny"]
    operation_hash: str = Field(min_length=1, max_length=128)


class ThreadBody(Body):
    """`POST /threads`."""

    title: str = Field(default="", max_length=200)
    profile_id: str | None = Field(default=None, min_length=1, max_length=128)


class TitleBody(Body):
    """`PATCH /threads/{threadId}`."""

    title: str = Field(min_length=1, max_length=200)


class ForkBody(Body):
    """`POST /threads/{threadId}/fork`."""

    at_seq: int = Field(ge=0, le=2**62)


def idempotency_key(request: web.Request, body: RunBody) -> IdempotencyKey | None:
    """Return what names this request, if it has a key; raises GatewayError for one that is none.

    The caller's name outlives the token that it shows, so a key survives a new token.
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 1 <= len(key) <= KEY_CHARS_MAX or not key.isprintable():
        raise GatewayError(
            "idempotency_key_invalid",
            f"An Idempotency-Key is 1 to {KEY_CHARS_MAX} printable characters.",
        )
    canonical = json.dumps(body.model_dump(), sort_keys=True)
    fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    return IdempotencyKey(request[CALLER], "POST /api/v1/run", key, fingerprint)


async def read_bytes(request: web.Request) -> bytes:
    """Return the request's body as it is; raises GatewayError when there is none."""
    data = await body_of(request)
    if not data.strip():
        raise GatewayError("invalid_request", "The request has no body.")
    return data


async def read_body(request: web.Request, model: type[_Body]) -> _Body:
    """Return the request's body; raises GatewayError with what is wrong in it."""
    kind = request.headers.get("Content-Type")
    if kind is not None and not _JSON_TYPE.fullmatch(kind.partition(";")[0].strip().lower()):
        raise GatewayError(
            "unsupported_media_type", f"The body must be application/json, not {kind[:80]!r}."
        )
    data = await read_bytes(request)
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise GatewayError("invalid_request", "The body is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise GatewayError(
            "invalid_request",
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
        ) from None
    except (ValueError, RecursionError):
        raise GatewayError("invalid_request", "The body is not JSON that can be read.") from None
    if not isinstance(value, dict):
        raise GatewayError("invalid_request", "The body must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise GatewayError("invalid_request", explain(error, model)) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def files_of(body: RunBody) -> list[File]:
    """Return the attachments' bytes; raises GatewayError for one that is broken or too large."""
    files = []
    for index, item in enumerate(body.attachments):
        try:
            data = base64.b64decode(item.data, validate=True)
        except (binascii.Error, ValueError):
            raise GatewayError(
                "invalid_request", f"The field 'attachments.{index}.data' is not base64."
            ) from None
        if len(data) > ATTACHMENT_BYTES_MAX:
            raise GatewayError(
                "payload_too_large",
                f"The attachment {item.filename!r} has {len(data)} bytes; "
                f"{ATTACHMENT_BYTES_MAX} are allowed.",
            )
        files.append(File(item.filename, item.mime_type, data))
    return files


def answer_of(body: ResumeBody) -> str | None:
    """Return a person's words where the action is to answer; raises GatewayError for none."""
    if body.action != "answer":
        return None
    if body.answer is None or not body.answer.strip():
        raise GatewayError(
            "invalid_request",
            "The action answer needs words in the field 'answer'; deny declines a question.",
        )
    if len(body.answer.encode("utf-8", "surrogatepass")) > ANSWER_BYTES_MAX:
        raise GatewayError(
            "invalid_request", f"The field 'answer' may have at most {ANSWER_BYTES_MAX} bytes."
        )
    return body.answer


def path_id(request: web.Request, name: str) -> str:
    """Return an id from the path; raises GatewayError when it cannot be one."""
    value = request.match_info[name]
    if not _ID.fullmatch(value):
        raise GatewayError(
            "invalid_request",
            f"The path's {to_camel(name)} is malformed: letters, digits and . _ : - only, "
            "up to 128.",
        )
    return value


def query(request: web.Request, *known: str) -> dict[str, str]:
    """Return the query's parameters, the first of each; raises GatewayError for unknown ones."""
    for name in request.query:
        if name not in (*known, "token"):
            names = ", ".join(known) or "none"
            raise GatewayError(
                "invalid_request", f"There is no parameter {name[:80]!r}; known are: {names}."
            )
    return {name: request.query[name] for name in known if name in request.query}


def page_limit(values: dict[str, str], default: int = 50) -> int:
    """Return `limit`, from 1 to PAGE_MAX; raises GatewayError."""
    text = values.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or not 1 <= int(text) <= PAGE_MAX:
        raise GatewayError(
            "invalid_request", f"The parameter 'limit' must be from 1 to {PAGE_MAX}."
        )
    return int(text)


def flag(values: dict[str, str], name: str, *, default: bool) -> bool:
    """Return a parameter that is `true` or `false`; raises GatewayError."""
    text = values.get(name, str(default).lower())
    if text not in ("true", "false", "1", "0"):
        raise GatewayError("invalid_request", f"The parameter {name!r} must be true or false.")
    return text in ("true", "1")


def place(values: dict[str, str], pattern: str) -> Any:
    """Return `cursor`, where a list goes on; raises GatewayError when it is not one of ours."""
    text = values.get("cursor")
    if text is not None and not re.fullmatch(pattern, text, re.ASCII):
        raise GatewayError(
            "cursor_invalid", "This cursor is not one that a page of this list gave."
        )
    return text
