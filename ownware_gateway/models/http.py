"""How an adapter asks a provider over HTTP: one POST, a stream of events, errors in plain words.

The event stream format is https://html.spec.whatwg.org/multipage/server-sent-events.html, of which
providers use the `data` field; lines end with LF or CRLF. An event that has no end is dropped.
"""

import asyncio
import contextlib
import email.utils
import io
import json
import math
import os
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from yarl import URL

from ownware_gateway.masking import Masker
from ownware_gateway.models import OVERFLOW, ModelError, RetryReason

CONNECT_TIMEOUT_S: Final = 10.0

#: How long the sending of a request may take; `silence_s` is counted from its end.
UPLOAD_TIMEOUT_S: Final = 300.0

#: How long the end of a response may take after its last event, so that its connection can be kept.
LINGER_TIMEOUT_S: Final = 0.2

#: Model calls that may be under way at once; more wait for a connection as long as for a connect.
CONNECTIONS_MAX: Final = 4_096

#: How long an idle connection is kept for the next call.
KEEP_ALIVE_S: Final = 30.0

#: How many kept connections may turn out to be closed before one call is given up.
STALE_CONNECTIONS_MAX: Final = 3

EVENT_BYTES_MAX: Final = 8_388_608

#: A whole answer. Its wrapping is some fifty times its text, and no answer has ten million letters.
STREAM_BYTES_MAX: Final = 536_870_912

#: An answer that is no stream: vectors of a few thousand texts.
ANSWER_BYTES_MAX: Final = 134_217_728

ERROR_BYTES_MAX: Final = 65_536

#: How much of a provider's own words stand in an error message.
SAID_LENGTH_MAX: Final = 500

DONE: Final = b"[DONE]"

#: Content types that are certainly no event stream. Local servers mislabel theirs in other ways.
_WHOLE: Final = frozenset({"application/json", "text/html", "application/xml", "text/xml"})

#: What the types and codes of error objects mean that come without an HTTP status: OpenAI's
#: (https://platform.openai.com/docs/guides/error-codes), Anthropic's
#: (https://docs.anthropic.com/en/api/errors) and Google's.
_STATUS: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "billing_error": 402,
    "insufficient_quota": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "RESOURCE_EXHAUSTED": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}

#: What providers say of a prompt that is longer than the model's window, for few have a code for
#: it: OpenAI and those that copy it (vLLM, OpenRouter, DeepSeek, Groq), Anthropic, Google, xAI,
#: Mistral, Bedrock, llama.cpp, LM Studio and Ollama.
_TOO_LONG: Final = (
    r"context[ _](?:length|window)[ _]exceeded|exceed_context_size"
    r"|maximum (?:context|prompt) length"
    r"|(?:longer|greater|larger) than the (?:maximum model|context) length"
    r"|exceeds? (?:the |this model's )?(?:\w+ )?context (?:window|limit|size|length)"
    r"|context (?:window|limit|size|length) (?:has been )?exceeded"
    r"|prompt (?:is )?too long|input is too long"
    r"|input token count.{0,40}exceeds|reduce the length of the messages"
)

#: Statuses that mean something else whatever the words are: keys, money, rates.
_NEVER_TOO_LONG: Final = frozenset({401, 402, 403, 429})

#: Headers whose values are secret.
_SECRET_HEADER_PARTS: Final = ("auth", "key", "token", "secret", "cookie")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who is asked: `url` is the address of the POST, `provider` its name in messages.

    `headers` hold the key, which no error ever shows; `key_variable` is the setting it comes from.
    After `silence_s` without a byte the call is given up.
    """

    provider: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    silence_s: float = 60.0
    key_variable: str = ""

    @property
    def address(self) -> str:
        """Host and port, as a message may show them."""
        return URL(self.url).authority.rpartition("@")[2]

    @property
    def masker(self) -> Masker:
        """What hides the key of this endpoint in the provider's own words."""
        secret = [
            value
            for name, value in self.headers.items()
            if any(part in name.lower() for part in _SECRET_HEADER_PARTS)
        ]
        return Masker(word for value in secret for word in (value, *value.split()))


class Pool:
    """The connections to all providers."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def stream(
        self, endpoint: Endpoint, body: Mapping[str, Any]
    ) -> AsyncGenerator[list[bytes], None]:
        """POST the body and yield what comes: the events' data, one list per network read.

        No list is empty; the closing `[DONE]` is left out. Leaving an `async for` early does not
        close a generator: use `contextlib.aclosing`, and the connection is cut at once.
        Raises ModelError.
        """
        response = await self._post(endpoint, body)
        try:
            await _check(endpoint, response)
            events = _Events(endpoint)
            while read := await _read(endpoint, response):
                if payloads := events.feed(read):
                    yield payloads
                if events.done:
                    await _linger(response)
                    return
        finally:
            response.close()

    async def ask(self, endpoint: Endpoint, body: Mapping[str, Any]) -> Any:
        """POST the body and return the JSON that is the whole answer. Raises ModelError."""
        response = await self._post(endpoint, body)
        try:
            if response.status != 200:
                await _check(endpoint, response)
            data = bytearray()
            while read := await _read(endpoint, response):
                data += read
                if len(data) > ANSWER_BYTES_MAX:
                    break
            return json.loads(data)
        except ValueError:
            raise ModelError(
                f"{endpoint.provider} at {endpoint.address} answered with something that is not "
                "JSON, or too long. Check its address."
            ) from None
        finally:
            response.close()

    async def _post(self, endpoint: Endpoint, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        data = json.dumps(body).encode()
        for attempt in range(STALE_CONNECTIONS_MAX + 1):
            connection = _Connection()
            try:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S + endpoint.silence_s):
                    return await self._send(endpoint, data, connection)
            except (aiohttp.ClientError, OSError) as error:
                # The other side may have closed a kept connection just now, or (llama.cpp) after
                # each answer without a word: that is no failure, and another one is taken.
                gone = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
                if not (connection.reused and gone) or attempt == STALE_CONNECTIONS_MAX:
                    raise _failed(endpoint, error) from error
        raise AssertionError("the last attempt returns or raises")

    async def _send(
        self, endpoint: Endpoint, data: bytes, connection: "_Connection"
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = _session()
        headers = {
            "Accept": "text/event-stream",
            # A compressing proxy would hold deltas back to fill its window.
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "ownware-gateway",
        }
        return await self._session.post(
            endpoint.url,
            # A file is sent in pieces, so that a big prompt does not block the loop.
            data=io.BytesIO(data),
            headers=headers | dict(endpoint.headers),
            timeout=aiohttp.ClientTimeout(connect=CONNECT_TIMEOUT_S, sock_read=endpoint.silence_s),
            # A redirect would carry the key to wherever it points.
            allow_redirects=False,
            trace_request_ctx=connection,
        )


@dataclass(slots=True)
class _Connection:
    """What is known of the connection of a request: whether it served another one before."""

    reused: bool = False


def _session() -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_mark_reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEP_ALIVE_S),
        # A provider's cookies are nobody's business here.
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[trace],
    )


async def _mark_reused(_session: object, context: Any, _params: object) -> None:
    context.trace_request_ctx.reused = True


def refused(
    endpoint: Endpoint, status: int, said: str, retry_after_s: float | None = None
) -> ModelError:
    """Return the error for a call that the provider answered with an HTTP status of an error.

    `said` is the provider's own message; it is masked and cut here.
    """
    if status not in _NEVER_TOO_LONG and re.search(_TOO_LONG, said, re.IGNORECASE):
        quote = _quote(endpoint, said)
        message = f"The prompt is too long for the model at {endpoint.provider}. It said: {quote}"
        return ModelError(message, code=OVERFLOW)
    message, retry = _meaning(endpoint, status)
    if quote := _quote(endpoint, said):
        message += f" It said: {quote}"
    return ModelError(message, retry=retry, retry_after_s=retry_after_s if retry else None)


def _meaning(endpoint: Endpoint, status: int) -> tuple[str, RetryReason | None]:
    """Return what an HTTP status says, and why the call may succeed later, if it may."""
    who, variable = endpoint.provider, endpoint.key_variable
    retry: RetryReason | None = None
    match status:
        case 401 | 403 if variable:
            message = (
                f"{who} refused the key in {variable} ({status}). Set {variable} to a valid one."
            )
        case 401 | 403:
            message = f"{who} refused the request ({status}); it may want a key."
        case 402:
            message = f"{who} wants to be paid ({status}). Check the billing of your account there."
        case 404:
            message = f"{who} knows no such model, or no such address at {endpoint.address} (404)."
        case 429:
            message, retry = f"{who} limits how often it may be asked (429).", "rate_limit"
        case 408 | 500 | 502 | 503 | 504 | 529:
            message, retry = f"{who} is failing or overloaded ({status}).", "provider_error"
        case _ if status >= 500:
            message, retry = f"{who} failed ({status}).", "provider_error"
        case _ if 300 <= status < 400:
            message = f"{who} has moved away from {endpoint.address} ({status}). Check its address."
        case _:
            message = f"{who} did not accept the request ({status})."
    return message, retry


def reported(endpoint: Endpoint, error: Any, status: int = 500) -> ModelError:
    """Return the error for an error object that came in the body of an answer.

    What it says of itself (a code or a type) goes before `status`, which may be a plain 200.
    """
    return refused(endpoint, _status_of(error, status), _said(error))


def _status_of(error: Any, status: int) -> int:
    if not isinstance(error, dict):
        return status
    for name in ("code", "type", "status"):
        value = error.get(name)
        if isinstance(value, str) and value in _STATUS:
            return _STATUS[value]
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return status


def _said(error: Any) -> str:
    """Return the message in an error body: every provider nests it a little differently."""
    if isinstance(error, list) and error:
        return _said(error[0])
    if isinstance(error, dict):
        for name in ("error", "message", "detail"):
            if error.get(name):
                return _said(error[name])
        return ""
    return error if isinstance(error, str) else ""


def _quote(endpoint: Endpoint, said: str) -> str:
    text = " ".join(endpoint.masker.text(said).split())
    return text if len(text) <= SAID_LENGTH_MAX else text[: SAID_LENGTH_MAX - 1] + "…"


async def _check(endpoint: Endpoint, response: aiohttp.ClientResponse) -> None:
    """Raise ModelError unless an event stream follows."""
    if response.status == 200 and response.content_type not in _WHOLE:
        return
    text = (await _read_error(endpoint, response)).decode("utf-8", "replace")
    retry_after_s = _retry_after_s(response.headers)
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    # Google wraps its errors in a list.
    body = body[0] if isinstance(body, list) and body else body
    error = body.get("error") or body if isinstance(body, dict) else body
    if response.status != 200:
        # A page of HTML is meant for a browser and says nothing here.
        said = _said(error) or ("" if text.lstrip().startswith("<") or body else text)
        raise refused(endpoint, _precise(error, response.status), said, retry_after_s)
    if isinstance(body, dict) and body.get("error"):
        raise reported(endpoint, body["error"])
    raise ModelError(
        f"{endpoint.provider} at {endpoint.address} answered with {response.content_type} and not "
        "with an event stream. Check its address."
    )


def _precise(error: Any, status: int) -> int:
    # OpenAI says 429 for an empty account, too, which no waiting fills.
    return 402 if status == 429 and _status_of(error, status) == 402 else status


async def _read_error(endpoint: Endpoint, response: aiohttp.ClientResponse) -> bytes:
    body = b""
    # The status says enough, if the body does not come.
    with contextlib.suppress(ModelError):
        while len(body) < ERROR_BYTES_MAX and (read := await _read(endpoint, response)):
            body += read
    return body[:ERROR_BYTES_MAX]


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return what `Retry-After` says; a date is measured from the provider's own clock."""
    if (ms := _number(headers.get("Retry-After-Ms", ""))) is not None:
        return ms / 1000
    text = headers.get("Retry-After", "")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        then = email.utils.parsedate_to_datetime(text)
        now = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):
        # TypeError: one date has a zone and the other has none.
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


async def _read(endpoint: Endpoint, response: aiohttp.ClientResponse) -> bytes:
    """Return what has come since the last read, waiting for it; nothing at the end."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise _failed(endpoint, error) from error


async def _linger(response: aiohttp.ClientResponse) -> None:
    """Wait a moment for the end of the response: what remains open then is closed, not kept."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(LINGER_TIMEOUT_S):
            while await response.content.readany():
                pass


def _failed(endpoint: Endpoint, error: aiohttp.ClientError | OSError) -> ModelError:
    """Return the error for what went wrong on the way."""
    who = endpoint.provider
    match error:
        case aiohttp.ConnectionTimeoutError():
            message = (
                f"{who} at {endpoint.address} took no connection within {CONNECT_TIMEOUT_S:g} s."
            )
        case TimeoutError():
            message = f"Nothing came from {who} for {endpoint.silence_s:g} s; it was given up."
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return ModelError(f"The address of {who} is not an http or https address.")
        case aiohttp.ClientSSLError() | aiohttp.ServerFingerprintMismatch():
            return ModelError(f"{who} at {endpoint.address} could not prove who it is (TLS).")
        case aiohttp.ClientConnectorError():
            message = (
                f"{who} cannot be reached at {endpoint.address}: {_reason(error)}. "
                "Is it running, is the network up?"
            )
        case _:
            message = f"The connection to {who} was cut off."
    return ModelError(message, retry="connection")


def _reason(error: aiohttp.ClientConnectorError) -> str:
    # Only a system error number has a text worth showing; resolvers count below zero.
    number = error.os_error.errno or 0
    return os.strerror(number).lower() if number > 0 else "its name has no address"


class _Events:
    """Cuts a byte stream into events; by hand, because every delta of every run goes through."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.done = False
        self._endpoint = endpoint
        self._rest: list[bytes] = []  # the pieces of an unfinished line
        self._lines: list[bytes] = []  # the data of an unfinished event
        self._held = 0
        self._total = 0

    def feed(self, read: bytes) -> list[bytes]:
        """Return the data of the events that this read completes."""
        self._total += len(read)
        head, newline, rest = read.rpartition(b"\n")
        if newline:
            payloads = self._take(b"".join((*self._rest, head)).split(b"\n"))
            self._rest = [rest]
            self._held = len(rest) + sum(map(len, self._lines))
        else:
            payloads = []
            self._rest.append(read)
            self._held += len(read)
        if self._held > EVENT_BYTES_MAX or self._total > STREAM_BYTES_MAX:
            raise ModelError(
                f"{self._endpoint.provider} at {self._endpoint.address} sent more than an answer "
                f"can hold: {EVENT_BYTES_MAX} bytes in one event, or {STREAM_BYTES_MAX} in all."
            )
        return payloads

    def _take(self, lines: list[bytes]) -> list[bytes]:
        payloads: list[bytes] = []
        held = self._lines
        for line in lines:
            text = line[:-1] if line.endswith(b"\r") else line
            if text.startswith(b"data:"):
                held.append(text[6:] if text.startswith(b"data: ") else text[5:])
            elif not text and held:
                payload = b"\n".join(held)
                held.clear()
                if payload == DONE:
                    self.done = True
                    break
                if payload:
                    payloads.append(payload)
        return payloads
