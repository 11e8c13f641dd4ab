"""The stream follows the log to the client: replay first, then live, by the same loop.

A subscriber is a cursor and a wake-up. `follow` reads from the cursor until there is nothing more,
then waits; live is replay that has caught up. There is no queue per subscriber and so nothing to
overflow: a slow client only falls behind itself, and the log is its buffer.
"""

import asyncio
import contextlib
import fcntl
import re
import socket
import struct
import termios
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeVar

from aiohttp import web

from ownware_gateway import sse
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import INBOX, ROOT, Chunk, Gone, Head, Log, Run, Stream

#: A comment goes out after so long a silence, so that nothing in between closes the connection.
KEEP_ALIVE_S: Final = 15.0

#: A client whose socket has taken no byte for this long is closed; it may come back any time.
STALL_S: Final = 60.0

#: What the kernel may buffer for one client, so that a reader that stalls costs little.
SEND_BUFFER_BYTES: Final = 65_536

#: What HTTP puts around one write at most, the headers of the response included.
FRAMING_BYTES: Final = 2_048

#: How often a client that does not take what it was sent is looked at.
POLL_S: Final = 1.0

#: How often it is looked whether clients have left: a stream that nobody reads holds its memory.
LOOK_S: Final = 1.0

#: A stalled connection is cut off when this long after its close it has still taken nothing.
LINGER_S: Final = 5.0

#: When a client should come back: after a cut connection, and after the gateway has left.
RETRY_MS: Final = 1_000
SHUTDOWN_RETRY_MS: Final = 2_000

#: The largest number that a cursor may hold.
CURSOR_MAX: Final = 2**63 - 1

ShutdownReason = Literal["gateway_shutdown", "slow_consumer", "overloaded", "rate_limited"]

T = TypeVar("T")

_DONE: Final = sse.envelope("done", {"status": "complete"})

_CURSOR: Final = re.compile(r"(?:(?P<epoch>[0-9a-f]{1,64})\.)?(?P<seq>[0-9]{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a stream: everything up to `seq` has been seen. `epoch` may be unknown."""

    seq: int
    epoch: str | None = None


def parse_cursor(text: str) -> Cursor:
    """Return the cursor `<seq>` or `<epoch>.<seq>`; raises GatewayError `cursor_invalid`."""
    found = _CURSOR.fullmatch(text)
    if found is None or int(found["seq"]) > CURSOR_MAX:
        raise GatewayError(
            "cursor_invalid",
            "A cursor is the id of an event, or its seq: a whole number from 0 on.",
        )
    return Cursor(int(found["seq"]), found["epoch"])


def check_cursor(cursor: Cursor, head: Head) -> int:
    """Return where to read on from.

    Raises GatewayError `cursor_expired` for a place in another log or before what is kept, and
    `cursor_ahead` for one that does not exist yet.
    """
    if cursor.epoch is not None and cursor.epoch != head.epoch:
        raise GatewayError(
            "cursor_expired",
            "This cursor belongs to another stream or log; read from the earliest event again.",
            earliestRetainedCursor=head.earliest - 1,
        )
    if cursor.seq > head.last:
        raise GatewayError(
            "cursor_ahead",
            f"This cursor is ahead of the stream, whose last event is {head.last}.",
            streamHighWaterCursor=head.last,
        )
    return cursor.seq


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """The reader has everything there is; said once, before the first wait."""

    through_seq: int


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing came for a while."""


async def follow(
    log: Log,
    stream: Stream,
    after: int,
    *,
    leaving: Callable[[], bool],
    silence_s: float = KEEP_ALIVE_S,
) -> AsyncGenerator[Chunk | CaughtUp | Silence, None]:
    """Yield everything above a cursor as it becomes durable, in order, without a hole.

    Ends only when `leaving` says so; whoever reads may stop at any chunk.
    """
    caught_up = False
    while not leaving():
        chunk = await log.chunk(stream, after)
        if chunk is not None:
            after = chunk.last_seq
            yield chunk
            continue
        if not caught_up:
            caught_up = True
            yield CaughtUp(after)
            # Time has passed: look again before waiting.
            continue
        if leaving():
            # The wake-up of a gateway that leaves may have come while the log was read.
            return
        if not await log.wait(stream, after, silence_s):
            yield Silence()


class Plan(NamedTuple):
    """What one response streams, and when it ends by itself.

    `run` bounds it to the interval of that run. Otherwise `follow` stays for whatever comes, and
    without it the response ends once it has caught up and no run is under way. `reset` is said
    first where a cursor that came with an automatic reconnect could not be used.
    """

    stream: Stream
    head: Head
    since: int
    run: Run | None = None
    follow: bool = True
    reset: dict[str, Any] | None = None

    @property
    def names(self) -> dict[str, Any]:
        """The fields that every envelope frame of this response carries."""
        if self.stream.thread_id == INBOX:
            return {"stream": "approvals"}
        names = {"threadId": self.stream.thread_id, "agentId": self.stream.agent_id}
        return names if self.run is None else names | {"runId": self.run.id}


class Slow(Exception):
    """The client's socket has taken nothing for too long."""


class Streamer:
    """Answers requests with streams. `leaving` becomes true when the gateway shuts down."""

    def __init__(
        self,
        log: Log,
        leaving: Callable[[], bool],
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        stall_s: float = STALL_S,
    ) -> None:
        self._log = log
        self._leaving = leaving
        self._keep_alive_s = keep_alive_s
        self._stall_s = stall_s
        self._clients: set[Client] = set()
        self._looking: asyncio.TimerHandle | None = None

    async def respond(self, request: web.Request, plan: Plan) -> web.StreamResponse:
        """Stream to the client until the plan, the client or the gateway ends it."""
        client = await _open(request, self._stall_s)
        self._attend(client)
        try:
            await client.send(_opening(plan))
            await self._send_all(client, plan)
            await client.response.write_eof()
        except Gone:
            await _say_gone(client, plan)
        except Slow:
            await client.give_up(plan)
        except ConnectionError:
            pass  # The client has left; that changes nothing for anybody else.
        except asyncio.CancelledError:
            if not client.missed():
                raise
        finally:
            self._clients.discard(client)
        return client.response

    @property
    def leaving(self) -> bool:
        """Whether the gateway is shutting down."""
        return self._leaving()

    def follow(
        self, stream: Stream, after: int
    ) -> AsyncGenerator[Chunk | CaughtUp | Silence, None]:
        """Follow the log until the gateway leaves, for a door with frames of its own."""
        return follow(self._log, stream, after, leaving=self._leaving, silence_s=self._keep_alive_s)

    async def relay(
        self, request: web.Request, pieces: AsyncGenerator[bytes, None], headers: dict[str, str]
    ) -> tuple[web.StreamResponse, bool]:
        """Send what comes as an event stream; return the response, and whether all was taken.

        A client that is slow, stalls or leaves costs nobody else anything. `pieces` is closed at
        the end; one that raises ConnectionError has the connection cut, so that nobody takes what
        was sent for all there is.
        """
        client = await _open(request, self._stall_s, headers)
        self._attend(client)
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    await client.send(piece)
            await client.response.write_eof()
        except (Slow, ConnectionError):
            if request.transport is not None:
                request.transport.abort()
            return client.response, False
        except asyncio.CancelledError:
            if not client.missed():
                raise
            return client.response, False
        finally:
            self._clients.discard(client)
        return client.response, True

    async def while_there(self, request: web.Request, work: Awaitable[T]) -> T:
        """Do what a client waits for; raises ConnectionResetError once it has left."""
        client = Client(request, web.StreamResponse(), self._stall_s)
        self._attend(client)
        try:
            return await work
        except asyncio.CancelledError:
            if not client.missed():
                raise
            raise ConnectionResetError from None
        finally:
            self._clients.discard(client)

    def _attend(self, client: "Client") -> None:
        """Look from here on whether the client has left."""
        self._clients.add(client)
        if self._looking is None:
            self._look()

    def _look(self) -> None:
        """End the streams of those who have left: an idle one would learn it at its next word."""
        for client in self._clients:
            client.miss()
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(LOOK_S, self._look) if self._clients else None

    async def refuse(
        self, request: web.Request, reason: ShutdownReason, retry_after_s: float
    ) -> web.StreamResponse:
        """Say in-stream that there is no stream now: a status would end an EventSource for good."""
        client = await _open(request, self._stall_s)
        with contextlib.suppress(Slow, ConnectionError):
            await client.send(_shutdown({}, reason, int(retry_after_s * 1000)))
            await client.response.write_eof()
        return client.response

    async def _send_all(self, client: "Client", plan: Plan) -> None:
        after = plan.since
        if plan.run is not None and await self._is_over(plan, after):
            # Nothing of the run is left; what follows in the stream belongs to later ones.
            await client.send(await self._replay_complete(plan, after) + _DONE)
            return
        caught_up = False
        following = follow(
            self._log, plan.stream, after, leaving=self._leaving, silence_s=self._keep_alive_s
        )
        try:
            async for item in following:
                look = False
                match item:
                    case Chunk():
                        await client.send(item.data)
                        after = item.last_seq
                        look = item.ends_run
                    case CaughtUp():
                        caught_up = look = True
                        await client.send(await self._replay_complete(plan, after))
                    case Silence():
                        look = not plan.follow
                        await client.send(await self._sign_of_life())
                # It may be large, and the next one long in coming.
                del item
                if look and await self._is_over(plan, after):
                    if not caught_up:
                        await client.send(await self._replay_complete(plan, after))
                    await client.send(_DONE)
                    return
        finally:
            await following.aclose()
        await client.send(_shutdown(plan.names, "gateway_shutdown", SHUTDOWN_RETRY_MS))

    async def _sign_of_life(self) -> bytes:
        """Return what goes out after a silence; the client must know when the log is to blame."""
        wrong = await self._log.healthy()
        if wrong is None:
            return sse.KEEP_ALIVE
        return sse.envelope("stream.stalled", {"reason": "log_unavailable", "message": wrong})

    async def _is_over(self, plan: Plan, after: int) -> bool:
        """Whether nothing that the plan wants can follow."""
        if plan.run is not None:
            run = await self._log.run(plan.run.id)
            return run is None or (run.end_seq is not None and after >= run.end_seq)
        if plan.follow or await self._log.active_run(plan.stream) is not None:
            return False
        if not after and plan.stream.agent_id != ROOT:
            # An agent that was spawned begins in a moment, unless the run that did it has ended.
            root = Stream(plan.stream.thread_id)
            if await self._log.active_run(root) is not None:
                return False
        # Asked in this order: what was appended before the run ended is there by now.
        return await self._log.chunk(plan.stream, after) is None

    async def _replay_complete(self, plan: Plan, after: int) -> bytes:
        live = await self._log.active_run(plan.stream)
        return sse.envelope(
            "stream.replay.complete",
            {
                **plan.names,
                "since": plan.since,
                "replayedThroughSeq": after,
                "maxSeqAtStart": plan.head.last,
                "liveTail": live is not None,
            },
        )


class Client:
    """One client's connection, which may be slow, stall, or go away."""

    __slots__ = ("_missed", "_room", "_stall_s", "_task", "_transport", "response")

    def __init__(self, request: web.Request, response: web.StreamResponse, stall_s: float) -> None:
        self.response = response
        self._transport = request.transport
        self._stall_s = stall_s
        # How much an empty buffer takes without a wait.
        high = self._transport.get_write_buffer_limits()[1] if self._transport else 0
        self._room = high - FRAMING_BYTES
        self._task = asyncio.current_task()
        self._missed = False

    def miss(self) -> None:
        """Cancel the task that the client's stream runs in, once, if the client has left."""
        gone = self._transport is None or self._transport.is_closing()
        if gone and not self._missed and self._task is not None:
            self._missed = True
            self._task.cancel()

    def missed(self) -> bool:
        """Whether its task was cancelled for that and nothing else; then it is so no more."""
        return self._missed and self._task is not None and self._task.uncancel() == 0

    async def send(self, data: bytes) -> None:
        """Write, waiting for a client that is merely slow.

        Raises Slow when its socket has stopped taking bytes, ConnectionError when it has left.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError
        if len(data) <= self._room and not self._transport.get_write_buffer_size():
            # Nothing can block, so nothing needs to be timed: nearly every write is like this.
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(min(POLL_S, self._stall_s)):
                await self.response.write(data)
        except TimeoutError:
            # The data is in the buffer already; what is left is to see it taken.
            await self._drained(self._transport)

    async def _drained(self, transport: asyncio.WriteTransport) -> None:
        loop = asyncio.get_running_loop()
        unsent, taken_s = _unsent(transport), loop.time()
        # Down to where writing is resumed: until then every write would end as cancelled, for
        # aiohttp keeps the waiter that the timeout has cancelled.
        low, _ = transport.get_write_buffer_limits()
        while transport.get_write_buffer_size() > low:
            await asyncio.sleep(min(POLL_S, self._stall_s))
            if transport.is_closing():
                raise ConnectionResetError
            now = _unsent(transport)
            if now < unsent:
                unsent, taken_s = now, loop.time()
            elif loop.time() - taken_s >= self._stall_s:
                raise Slow

    async def give_up(self, plan: Plan) -> None:
        """Close a stalled connection: the reason stands last in its buffer, should it be read."""
        frame = _shutdown(plan.names, "slow_consumer", SHUTDOWN_RETRY_MS)
        for last in (self.response.write(frame), self.response.write_eof()):
            # Both put their bytes into the buffer at once; waiting for them is what we give up.
            # It may end as cancelled, see `_drained`.
            with contextlib.suppress(TimeoutError, ConnectionError, asyncio.CancelledError):
                async with asyncio.timeout(0):
                    await last
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)


async def _open(
    request: web.Request, stall_s: float, headers: dict[str, str] | None = None
) -> Client:
    response = web.StreamResponse(
        headers={
            **(headers or {}),
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache, no-transform",
            "X-Accel-Buffering": "no",
        }
    )
    response.content_type = "text/event-stream"
    transport = request.transport
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    # One who has left already is noticed at the first write, which is the next thing to come.
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
    return Client(request, response, stall_s)


async def _say_gone(client: Client, plan: Plan) -> None:
    with contextlib.suppress(Slow, ConnectionError):
        reset = {**plan.names, "reason": "thread_deleted"}
        await client.send(sse.envelope("stream.reset", reset))
        await client.send(sse.envelope("done", {"status": "deleted"}))
        await client.response.write_eof()


def _opening(plan: Plan) -> bytes:
    start = {
        **plan.names,
        "since": plan.since,
        "maxSeqAtStart": plan.head.last,
        "epoch": plan.head.epoch,
    }
    opening = sse.envelope("stream.start", start, retry_ms=RETRY_MS)
    if plan.reset is not None:
        opening += sse.envelope("stream.reset", {**plan.names, **plan.reset})
    return opening


def _shutdown(names: dict[str, Any], reason: ShutdownReason, retry_after_ms: int) -> bytes:
    fields = {**names, "reason": reason, "retryAfterMs": retry_after_ms}
    return sse.envelope("stream.shutdown", fields, retry_ms=retry_after_ms)


def _unsent(transport: asyncio.WriteTransport) -> int:
    """Return how many bytes wait for the client, in our buffer and in the kernel's."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return transport.get_write_buffer_size()
    queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    return transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])
