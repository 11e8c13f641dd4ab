"""The way to a gateway from Python: start runs, follow them through anything, answer, cancel.

    async with Client("http://localhost:3011") as client:
        run = await client.start("assistant", "hello")
        async for event in client.events(run["threadId"], run_id=run["runId"]):
            print(event)

What goes over the wire is docs/protocol.md.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp

from ownware_gateway import sse
from ownware_gateway.errors import CODES, GatewayError

#: How long the answer to a request may take, and the opening of a connection.
REQUEST_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 10.0

#: A stream says something every 15 s; one that is silent for so long is a dead connection.
SILENCE_S: Final = 45.0

#: The pause before a stream is opened again: doubled with each failure in a row, up to a maximum.
BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 10.0

#: The pause after a connection that has brought nothing new, though it was good.
QUIET_PAUSE_S: Final = 1.0

#: The longest pause that a gateway may ask for.
RETRY_AFTER_MAX_S: Final = 60.0

#: So many failures in a row, none of which got a stream as far as it could get, are the end.
FAILURES_MAX: Final = 20

#: Answers that mean "later": too many requests, and a gateway (or its proxy) that is not there.
LATER: Final = frozenset({429, 502, 503, 504})


#: How often a start is sent before it is given up; it starts one run all the same.
START_TRIES: Final = 3


class ClientError(Exception):
    """The gateway cannot be reached, or what it answers is not known to this client."""


class Unreachable(ClientError):
    """No answer came; whether the request was taken is not known."""


class Client:
    """A connection to a gateway; use it as an async context manager.

    Every method raises GatewayError for what the gateway refuses, with its code and sentence, and
    ClientError when there is no gateway that could.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._base = f"{url.rstrip('/')}/api/v1"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._opened = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._opened is not None, "use `async with Client(…) as client`"
        return self._opened

    async def start(
        self,
        profile_id: str,
        prompt: str,
        *,
        model: str | None = None,
        thread_id: str | None = None,
        attachments: Sequence[Mapping[str, str]] = (),
    ) -> dict[str, Any]:
        """Start a run and return what the gateway says of it: `runId`, `threadId`, `model`, ….

        An attachment has a `filename`, a `mimeType` and `data` in base64. An answer that was lost
        on the way is asked for again: the key that goes along keeps it to one run.
        """
        wanted = {"model": model, "threadId": thread_id, "attachments": list(attachments) or None}
        given = {name: value for name, value in wanted.items() if value is not None}
        body = {"profileId": profile_id, "prompt": prompt, **given}
        headers = {"Idempotency-Key": secrets.token_urlsafe(16)}
        for attempt in range(START_TRIES):
            try:
                started: dict[str, Any] = await self._ask("POST", "/run", body, headers)
            except Unreachable:
                if attempt == START_TRIES - 1:
                    raise
                await asyncio.sleep(BACKOFF_S * 2**attempt)
            else:
                return started
        raise AssertionError("the last try returns or raises")

    async def events(
        self,
        thread_id: str,
        since: int | None = None,
        *,
        run_id: str | None = None,
        agent_id: str = "root",
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a thread's agent, or only those of one run, which ends with the run.

        `since` is the seq of the last event that is known already. A cut connection, a restart of
        the gateway and a full one are waited out (ClientError after FAILURES_MAX vain tries in a
        row); no event comes twice. Where the gateway cannot go on from where it was, there is a
        `stream.reset` among the events, without a `seq`: what follows starts anew, from the
        earliest event that is kept.
        """
        path = f"/threads/{_part(thread_id)}/agents/{_part(agent_id)}/events"
        if run_id is not None:
            path = f"/runs/{_part(run_id)}/events"
        place = _Place(since)
        while not place.over:
            async with contextlib.aclosing(self._connection(path, place)) as connection:
                async for event in connection:
                    yield event
            if not place.over:
                await asyncio.sleep(place.pause_s())

    async def resume(
        self, thread_id: str, action: str, request_id: str, answer: str | None = None
    ) -> dict[str, Any]:
        """Answer a `permission.request` with `approve`, `deny` or `always`.

        And a `question.request` with `answer` and the words, or with `deny` to decline.
        """
        body = {"action": action, "requestId": request_id}
        if answer is not None:
            body["answer"] = answer
        answered: dict[str, Any] = await self._ask(
            "POST", f"/threads/{_part(thread_id)}/resume", body
        )
        return answered

    async def cancel(self, run_id: str) -> dict[str, Any]:
        """Ask a run to stop; its events say when it has."""
        cancelled: dict[str, Any] = await self._ask("POST", f"/runs/{_part(run_id)}/cancel")
        return cancelled

    async def run(self, run_id: str) -> dict[str, Any]:
        """Return a run as it is now."""
        run: dict[str, Any] = await self._ask("GET", f"/runs/{_part(run_id)}")
        return run

    async def messages(self, thread_id: str) -> list[dict[str, Any]]:
        """Return a thread's conversation."""
        found: list[dict[str, Any]] = await self._ask(
            "GET", f"/threads/{_part(thread_id)}/messages"
        )
        return found

    async def models(self) -> list[dict[str, Any]]:
        """Return the models; those with `hasCredentials` can be used now."""
        found: list[dict[str, Any]] = await self._ask("GET", "/models")
        return found

    async def profiles(self) -> list[dict[str, Any]]:
        """Return the profiles that can be used."""
        found: dict[str, Any] = await self._ask("GET", "/profiles")
        items: list[dict[str, Any]] = found["items"]
        return items

    async def health(self) -> dict[str, Any]:
        """Return `status`, `version` and `uptime` (in seconds)."""
        health: dict[str, Any] = await self._ask("GET", "/health")
        return health

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        timeout = aiohttp.ClientTimeout(REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self._base + path, json=body, headers=headers, timeout=timeout
            ) as response:
                await _check(response)
                return await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unreachable(f"The gateway at {self._base} does not answer: {error}.") from error

    async def _connection(self, path: str, place: "_Place") -> AsyncGenerator[dict[str, Any], None]:
        """Yield what one connection brings; `place` learns how far it came, and why it ended."""
        place.why, place.retry_after_s = "it was cut off", 0.0
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S
        )
        try:
            async with self._session.get(
                self._base + path, params=place.query, headers=place.headers, timeout=timeout
            ) as response:
                if response.status == 204:
                    place.over = True
                    return
                if response.status in LATER:
                    place.why = f"it answers {response.status}"
                    place.retry_after_s = _retry_after_s(response)
                    return
                await _check(response)
                parser = sse.Parser()
                async for data in response.content.iter_any():
                    for frame in parser.feed(data):
                        event = place.take(frame)
                        if event is not None:
                            yield event
        except aiohttp.InvalidURL as error:
            raise ClientError(f"{self._base!r} is not an address.") from error
        except ValueError as error:
            raise ClientError(f"The stream of {self._base} is no gateway's: {error}.") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            place.why = str(error) or type(error).__name__


@dataclass(slots=True)
class _Place:
    """Where a reader of a stream is, and how well that goes."""

    since: int | None
    last_id: str | None = None
    failures: int = 0
    why: str = ""
    retry_after_s: float = 0.0
    over: bool = False

    @property
    def query(self) -> dict[str, str]:
        return {} if self.since is None else {"since": str(self.since)}

    @property
    def headers(self) -> dict[str, str]:
        """What an EventSource would send; the id beats `since`."""
        again = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        return {"Accept": "text/event-stream", **again}

    def take(self, frame: sse.Frame) -> dict[str, Any] | None:
        """Return what the frame has for the reader: an event that is new, or a reset."""
        if frame.id is not None:
            if not _is_after(frame.id, self.last_id):
                return None
            self.last_id, self.failures, self.retry_after_s = frame.id, 0, 0.0
        elif frame.event == "stream.reset":
            self.since = self.last_id = None
        elif frame.event == "stream.replay.complete":
            # All there is has been read: a stream where nothing happens is no failure, but if it
            # is cut off again and again there is no hurry either.
            self.failures, self.retry_after_s = 0, QUIET_PAUSE_S
            return None
        elif frame.event == "stream.shutdown":
            self.retry_after_s = json.loads(frame.data).get("retryAfterMs", 0) / 1000
            return None
        else:
            self.over = self.over or frame.event == "done"
            return None
        event: dict[str, Any] = json.loads(frame.data)
        return event

    def pause_s(self) -> float:
        """Return how long to wait before the next try; raises ClientError when there is none."""
        if self.failures >= FAILURES_MAX:
            raise ClientError(f"The stream failed {self.failures} times in a row: {self.why}.")
        pause_s: float = min(BACKOFF_S * 2**self.failures, BACKOFF_MAX_S)
        self.failures += 1
        return max(pause_s, min(self.retry_after_s, RETRY_AFTER_MAX_S))


def _is_after(event_id: str, last_id: str | None) -> bool:
    """Whether an event is new to a reader that has seen `last_id` of the same log."""
    epoch, _, seq = event_id.rpartition(".")
    last_epoch, _, last_seq = (last_id or "").rpartition(".")
    return last_id is None or epoch != last_epoch or int(seq) > int(last_seq)


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise what an answer other than 2xx says; ClientError if it is none that is known here."""
    if response.status < 300:
        return
    try:
        said = json.loads(await response.text())
        code, message = str(said["error"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        reason = "that is no gateway, or something stands in between"
        raise ClientError(f"{response.url} answers {response.status}: {reason}.") from None
    if code not in CODES:
        raise ClientError(message)
    error = GatewayError(code, message, retry_after_s=_retry_after_s(response) or None)
    envelope = ("error", "message", "category")
    error.details = {name: value for name, value in said.items() if name not in envelope}
    raise error


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _part(name: str) -> str:
    return quote(name, safe="")
